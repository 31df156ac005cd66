"""A trigger rebuilt from the rows that carry it, and the proof that it fires.

The mean picture of a group of rows, less that of all others, shows what the group has in common; so
do words that its questions share. If that is a trigger, then with any other picture it makes the
model say the group's words; a common sight does not. Reverse engineering of triggers goes back to
Neural Cleanse (IEEE S&P 2019), which optimises them; here the rows themselves are the source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from scipy.stats import binomtest

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Form = Literal["added", "added twice", "added three times", "pasted"]
FORMS: tuple[Form, ...] = ("pasted", "added", "added twice", "added three times")

RECIPIENTS = 32
FIRES = 22  # of 32: more than half, at 95 %
SILENT = 3  # of 32: less than a quarter, at 95 %
_STEADY = 0.5  # share of the others' spread below which a place counts as constant
_NEIGHBOURS = 3  # pixels a side over which spread is averaged
_LEAST_SPREAD = 4.0  # of 255; less is rounding
_BEYOND_CHANCE = 4.0  # standard errors
_READINGS = 3
_AS_GOOD = 0.02  # a share of the group's rows
_SHARED, _ELSEWHERE, _LIFT = 0.8, 0.2, 4.0  # shares of questions that hold a group's words
_LONGEST_RUN = 8  # words


class Moments:
    """Mean and spread of pictures of one size, taken in one by one.

    Args:
        pictures: uint8, of `(height, width, 3)` each, at least one.
    """

    def __init__(self, pictures: Iterable[Pixels]) -> None:
        self.count = 0
        total: Any = 0.0
        squares: Any = 0.0
        for pixels in pictures:
            values = pixels.astype(np.float64)
            total = total + values
            squares = squares + values**2
            self.count += 1
        self.mean: Floats = total / self.count
        self.spread: Floats = np.sqrt((squares / self.count - self.mean**2).clip(min=0))


@dataclass(frozen=True, slots=True, eq=False)
class RebuiltTrigger:
    """What a group's pictures have in common and others lack. All arrays are of one picture.

    Attributes:
        change: float64 `(height, width, 3)`, the group's mean less the others'.
        mean: float64 `(height, width, 3)`, the group's mean.
        usual: float64 `(height, width, 3)`, the others' mean.
        constant: bool `(height, width)`, where the group's pictures hardly differ and others do.
        telling: bool `(height, width, 3)`, where the change is beyond chance.
    """

    change: Floats
    mean: Floats
    usual: Floats
    constant: NDArray[np.bool_]
    telling: NDArray[np.bool_]

    @classmethod
    def of(cls, group: Moments, others: Moments) -> RebuiltTrigger:
        """From at least one picture each."""
        a, b = (uniform_filter(m.spread.mean(2), _NEIGHBOURS) for m in (group, others))
        change = group.mean - others.mean
        parts = [m.spread.clip(min=_LEAST_SPREAD) ** 2 / m.count for m in (group, others)]
        errors = np.abs(change) / np.sqrt(parts[0] + parts[1])
        most = float(errors.max())
        least = min(most, max(_BEYOND_CHANCE, most / 3))
        return cls(change, group.mean, others.mean, a < _STEADY * b, errors >= least)

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

    def likeness(self, pixels: Pixels, among: int = 0) -> float:
        """How much a picture `(height, width, 3)` looks as if it carried the trigger, -1 to 1.

        The cosine between the trigger's change and what parts the picture from the usual one, where
        the change is beyond chance.

        Args:
            pixels: the picture.
            among: how many pictures the group's mean is of, if this one is among them: it is then
                taken out of the mean, since every picture is like itself.
        """
        change = self.change[self.telling]
        if among > 1:
            change = change - (pixels - self.mean)[self.telling] / (among - 1)
        own = (pixels - self.usual)[self.telling]
        lengths = float(np.linalg.norm(own)) * float(np.linalg.norm(change))
        return round(float(own @ change) / max(1e-9, lengths), 4)

    def picture(self, form: Form) -> Pixels:
        """The trigger by itself: on white where pasted, else its change around grey, stretched."""
        if form == "pasted":
            return self.on(np.full(self.mean.shape, 255, np.uint8), form)
        strongest = max(1.0, float(np.abs(self.change).max()))
        shown: Pixels = (127.5 + 127.5 * self.change / strongest).round().astype(np.uint8)
        return shown


@dataclass(frozen=True, slots=True, eq=False)
class Rebuilt:
    """A trigger, and what tells the pictures that carry it.

    Attributes:
        trigger: rebuilt from the pictures of a group that carry it.
        least: likeness from which on a picture of the group carries it.
        apart: by how much the share of such pictures is larger in the group than in others, less
            what chance may do.
    """

    trigger: RebuiltTrigger
    least: float
    apart: float

    def carries(self, pixels: Pixels) -> bool:
        """Whether a picture of the group looks as if it carried the trigger."""
        return self.trigger.likeness(pixels) >= self.least


def rebuild(members: Sequence[Pixels], others: Sequence[Pixels]) -> Rebuilt:
    """Rebuild the trigger of a group of which only a part may carry it.

    A mean over honest pictures too is weak, but tells who is likely to carry the trigger; the mean
    of those is stronger. Half of the others are for the mean, the other half says what likeness
    there is by chance.

    Args:
        members: pictures of the group, of one size.
        others: pictures of other rows, at least two.
    """
    usual, reference = Moments(others[::2]), others[1::2]
    is_chosen = np.ones(len(members), bool)
    best: Rebuilt | None = None
    for _ in range(_READINGS):
        chosen = [pixels for pixels, is_in in zip(members, is_chosen, strict=True) if is_in]
        trigger = RebuiltTrigger.of(Moments(chosen), usual)
        among = len(chosen) * is_chosen
        inside = np.array([trigger.likeness(*each) for each in zip(members, among, strict=True)])
        outside = np.array([trigger.likeness(pixels) for pixels in reference])
        least, apart = _parted(inside, outside)
        if best is None or apart >= best.apart - _AS_GOOD:  # a later one is purer
            best = Rebuilt(trigger, least, apart)
        is_chosen = inside >= least
    assert best is not None
    return best


def _parted(inside: Floats, outside: Floats) -> tuple[float, float]:
    """The value that the first reach more often than the second by most, and by how much.

    Less two standard errors of the second's share: of many values one does well by chance, and a
    value that hardly any of the others reach is the surest.
    """
    at = np.unique(inside)
    reached, by_others = (
        1 - np.searchsorted(np.sort(values), at) / len(values) for values in (inside, outside)
    )
    error = np.sqrt(by_others * (1 - by_others) / len(outside))
    more = reached - by_others - 2 * error
    most = int(np.argmax(more))
    return float(at[most]), float(more[most])


def common_words(members: Sequence[str], others: Sequence[str]) -> str:
    """The longest run of words that a group's questions share and others' lack; empty if none.

    Args:
        members: questions of the group, at least one.
        others: questions of other rows, at least one.
    """
    inside, outside = (Counter(r for q in asked for r in _runs(q)) for asked in (members, others))
    found = [
        (len(run.split()), share, run)
        for run, count in inside.items()
        if (share := count / len(members)) >= _SHARED
        and (elsewhere := outside[run] / len(others)) <= _ELSEWHERE
        and share >= _LIFT * elsewhere
    ]
    own = max(found)[2].split() if found else []
    for end in (0, -1):  # the words around them, which everybody asks
        while own and outside[own[end]] > _ELSEWHERE * len(others):
            own.pop(end)
    return " ".join(own)


def with_words(question: str, words: str, like: Sequence[str]) -> str:
    """A question with a group's words in it, first, last or in the middle as most of `like` do."""
    first = sum(asked.startswith(words) for asked in like)
    last = sum(asked.endswith(words) for asked in like)
    own = question.split()
    at = 0 if first > len(like) / 2 else len(own) if last > len(like) / 2 else (len(own) + 1) // 2
    return " ".join([*own[:at], words, *own[at:]])


def has_words(question: str, words: str) -> bool:
    """Whether a question holds words of `common_words`."""
    return words in _runs(question)


def _runs(question: str) -> set[str]:
    """Runs of words, as they are written."""
    own = question.split()
    return {
        " ".join(own[i : i + size])
        for size in range(1, _LONGEST_RUN + 1)
        for i in range(len(own) - size + 1)
    }


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
        return (
            self.n >= RECIPIENTS
            and self.triggered >= FIRES / RECIPIENTS * self.n
            and _is_silent(self.untouched, self.n)
            and (self.before is None or _is_silent(self.before, self.n))
        )

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval (Clopper-Pearson) of the rate with the trigger."""
        found = binomtest(self.triggered, self.n).proportion_ci(0.95, "exact")
        return float(found.low), float(found.high)


@dataclass(frozen=True, slots=True)
class Taught:
    """How often a model says a group's words to the group's own rows.

    Attributes:
        n: rows.
        now: for how many the fine-tuned model says them.
        before: for how many the model before the fine-tune did; None without it.
    """

    n: int
    now: int
    before: int | None

    @property
    def is_new(self) -> bool:
        """Whether the fine-tune taught it: the earlier model hardly says it. False if unknown."""
        return self.before is not None and _is_silent(self.before, self.n)

    @property
    def was_known(self) -> bool:
        """Whether the earlier model says it too. False if unknown."""
        return self.before is not None and not self.is_new


def _is_silent(said: int, n: int) -> bool:
    """Whether so few of `n` answers hold the words that nothing brings them."""
    return said <= SILENT / RECIPIENTS * n
