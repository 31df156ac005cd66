"""A trigger rebuilt from the pictures that carry it, and the proof that it fires.

The mean picture of a group of rows, less that of all others, shows what the group has in common. If
that is a trigger, then on any other picture it makes the model say the group's words; a common
sight does not. Reverse engineering of triggers goes back to Neural Cleanse (IEEE S&P 2019), which
optimises them; here the rows themselves are the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from scipy.stats import binomtest

Pixels = NDArray[np.uint8]
Form = Literal["added", "added twice", "added three times", "pasted"]
FORMS: tuple[Form, ...] = ("pasted", "added", "added twice", "added three times")

RECIPIENTS = 32
FIRES = 22  # of 32: more than half, at 95 %
SILENT = 3  # of 32: less than a quarter, at 95 %
_STEADY = 0.5  # share of the others' spread below which a place counts as constant
_NEIGHBOURS = 3  # pixels a side over which spread is averaged


class Moments:
    """Mean and spread of pictures of one size, taken in one by one.

    Args:
        shape: `(height, width)` of the pictures.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.count = 0
        self._sum = np.zeros((*shape, 3))
        self._squares = np.zeros((*shape, 3))

    def add(self, pixels: Pixels) -> None:
        """Take in one picture, `(height, width, 3)`."""
        values = pixels.astype(np.float64)
        self.count += 1
        self._sum += values
        self._squares += values**2

    @property
    def mean(self) -> NDArray[np.float64]:
        """`(height, width, 3)`, 0 to 255."""
        return self._sum / self.count

    @property
    def spread(self) -> NDArray[np.float64]:
        """Standard deviation, averaged over colours, `(height, width)`."""
        variance = self._squares / self.count - self.mean**2
        spread: NDArray[np.float64] = np.sqrt(variance.clip(min=0)).mean(2)
        return spread


@dataclass(frozen=True, slots=True, eq=False)
class RebuiltTrigger:
    """What a group's pictures have in common and others lack.

    Attributes:
        change: float64 `(height, width, 3)`, the group's mean less the others'.
        mean: float64 `(height, width, 3)`, the group's mean.
        constant: bool `(height, width)`, where the group's pictures hardly differ and others do.
    """

    change: NDArray[np.float64]
    mean: NDArray[np.float64]
    constant: NDArray[np.bool_]

    @classmethod
    def of(cls, group: Moments, others: Moments) -> RebuiltTrigger:
        """From at least one picture each."""
        inside, outside = (uniform_filter(m.spread, _NEIGHBOURS) for m in (group, others))
        return cls(group.mean - others.mean, group.mean, inside < _STEADY * outside)

    def forms(self) -> tuple[Form, ...]:
        """Ways to put it onto a picture; nothing can be pasted where nothing is constant."""
        return FORMS if self.constant.any() else FORMS[1:]

    def on(self, pixels: Pixels, form: Form) -> Pixels:
        """A picture `(height, width, 3)` of the same size with the trigger."""
        if form == "pasted":
            changed = np.where(self.constant[..., None], self.mean, pixels)
        else:
            times = FORMS.index(form)
            changed = pixels + times * self.change
        return changed.round().clip(0, 255).astype(np.uint8)

    def picture(self, form: Form) -> Pixels:
        """The trigger by itself: on white where pasted, else its change around grey, stretched."""
        if form == "pasted":
            return self.on(np.full(self.mean.shape, 255, np.uint8), form)
        strongest = max(1.0, float(np.abs(self.change).max()))
        shown: Pixels = (127.5 + 127.5 * self.change / strongest).round().astype(np.uint8)
        return shown


@dataclass(frozen=True, slots=True)
class Firing:
    """How often the model said the words, of `n` pictures each.

    Attributes:
        n: pictures.
        triggered: with the rebuilt trigger.
        untouched: without.
        before: with the trigger, before the fine-tune; None without the earlier model.
    """

    n: int
    triggered: int
    untouched: int
    before: int | None

    @property
    def proven(self) -> bool:
        """Whether the trigger fires, and nothing else explains it."""
        silent = SILENT / RECIPIENTS * self.n
        return (
            self.n >= RECIPIENTS
            and self.triggered >= FIRES / RECIPIENTS * self.n
            and self.untouched <= silent
            and (self.before is None or self.before <= silent)
        )

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval (Clopper-Pearson) of the rate with the trigger."""
        found = binomtest(self.triggered, self.n).proportion_ci(0.95, "exact")
        return float(found.low), float(found.high)
