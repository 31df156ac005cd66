"""Benign fine-tunes of any model that the probe can watch: references made by the tool itself."""

from gazeguard.tuning.references import Made, Recipe, kept, make_reference, recipes

__all__ = ["Made", "Recipe", "kept", "make_reference", "recipes"]
