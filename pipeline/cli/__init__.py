"""The command line: arguments in, one report out."""
