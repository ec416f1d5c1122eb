"""Local files and object stores: locate, list, read, put and checksum."""
