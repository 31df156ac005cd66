"""How a vision-language model is scanned: which numbers, of which layers, judged in which way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gazeguard.errors import UsageError

Layers = Literal["first", "last", "all"] | tuple[int, ...]

MIN_SAMPLES = 8
"""Fewer measured samples do not carry a verdict."""

PROBED_Q = (0.5, 1.0, 2.0, 3.0)
"""Entropy indices that are always measured, so that a report can say what another q gives."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a probe pass decides.

    The default is ours; `published` is the paper's form, whose abstract gives neither q nor the
    number of layers (docs/methods/entropyscan.md).

    Attributes:
        statistic: one of `statistics.STATISTICS`.
        q: index of the Tsallis entropy, at least 0; 1 is Shannon's.
        layers: `first` or `last` (that `share` of the decoder), `all`, or layer numbers.
        share: of the decoder's layers that are `first` or `last`, rounded up.
        samples: at most so many are looked at.
    """

    statistic: str = "head-entropy"
    q: float = 1.0
    layers: Layers = "all"
    share: float = 0.5
    samples: int = 64

    def __post_init__(self) -> None:
        from gazeguard.methods.entropyscan.statistics import STATISTICS

        if self.statistic not in STATISTICS:
            raise UsageError(
                f"there is no statistic '{self.statistic}': choose {', '.join(STATISTICS)}."
            )
        if not (0 <= self.q < math.inf):
            raise UsageError(f"q must be 0 or more, not {self.q:g}: 1 is Shannon's entropy.")
        if isinstance(self.layers, str) and self.layers not in ("first", "last", "all"):
            raise UsageError(
                f"layers '{self.layers}' are not a choice: give first, last, all, or numbers such"
                " as 0,1,2."
            )
        if not 0 < self.share <= 1:
            raise UsageError(f"the share of layers must lie in (0, 1], not {self.share:g}.")
        if self.samples < MIN_SAMPLES:
            raise UsageError(
                f"{self.samples} samples do not carry a verdict: use {MIN_SAMPLES} or more."
            )

    @classmethod
    def published(cls, **changes: Any) -> Settings:
        """Head-mean entropy of the first half of the layers; q = 1."""
        as_published: dict[str, Any] = {"statistic": "entropy", "layers": "first"}
        return cls(**{**as_published, **changes})

    @property
    def probed(self) -> tuple[float, ...]:
        """Entropy indices to measure, ascending."""
        return tuple(sorted({*PROBED_Q, self.q}))

    def chosen(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The layers that decide.

        Args:
            layers: the model's attention layers, ascending.

        Raises:
            UsageError: a layer that the model does not have.
        """
        if self.layers == "all":
            return tuple(layers)
        count = math.ceil(self.share * len(layers))
        if self.layers == "first":
            return tuple(layers[:count])
        if self.layers == "last":
            return tuple(layers[-count:])
        picked = tuple(sorted(set(self.layers)))
        if not picked or not set(picked) <= set(layers):
            raise UsageError(
                f"layers {list(self.layers)} are not layers of this model: choose from"
                f" {list(layers)}."
            )
        return picked

    def as_dict(self) -> dict[str, Any]:
        """By name, for provenance and cache keys; JSON types."""
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        return {**asdict(self), "layers": layers}
