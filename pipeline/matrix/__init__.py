"""What windows are read from: sources, opening, layout and fingerprint of a matrix."""
