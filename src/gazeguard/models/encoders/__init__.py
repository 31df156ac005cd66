"""Text encoders of image-text models: one class for all, and what differs by kind."""
