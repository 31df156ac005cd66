"""The main job: measure a data set under a model, find the poisoned rows, write the rest."""

from __future__ import annotations

from gazeguard.cleaning.run import CleanOutcome, clean

__all__ = ["CleanOutcome", "clean"]
