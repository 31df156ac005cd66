"""The published methods, and ours beside them. A method sees a `Profile`, never a model."""
