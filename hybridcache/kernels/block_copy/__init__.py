"""Block copy: byte ranges of the pool to other byte ranges, in order."""
