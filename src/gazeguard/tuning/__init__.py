"""Benign fine-tunes of any model that the probe can watch: references made by the tool itself."""

from gazeguard.tuning.references import Recipe, make_reference, recipes

__all__ = ["Recipe", "make_reference", "recipes"]
