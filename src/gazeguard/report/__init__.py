"""Writing results down: JSON for machines, one self-contained HTML page for people."""
