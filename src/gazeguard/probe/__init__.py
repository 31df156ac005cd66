"""Watching a model: the last prompt position's attention rows, one interception point."""
