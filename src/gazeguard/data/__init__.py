"""Data sets in and out: one reader and writer per format, one `Sample` type."""
