"""BYE: find the poisoned rows of a fine-tuning set by the attention of the tuned model."""

from gazeguard.methods.bye.detector import BYE

__all__ = ["BYE"]
