"""Windows of a matrix into rows of a buffer: direct, ranged or decoded."""
