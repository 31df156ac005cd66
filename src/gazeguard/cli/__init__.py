"""The command line: `main` assembles, one file per verb."""
