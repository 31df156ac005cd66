"""What a defence did to one model: the content of a cell's file, checked as it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Count:
    """`hits` of `of` rows; `of` is at least 1."""

    hits: int
    of: int

    @property
    def pair(self) -> tuple[int, int]:
        """Hits and misses."""
        return self.hits, self.of - self.hits


@dataclass(frozen=True, slots=True)
class DataResult:
    """Rows removed and kept, against the truth; and a model tuned anew on the kept rows, or None.

    Attributes:
        tp, fp, fn, tn: poisoned rows removed, clean rows removed, poisoned kept, clean kept.
        refit_asr: how often the new model's attack works.
        refit_clean: how often it is right on clean rows.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    refit_asr: Count | None
    refit_clean: Count | None


@dataclass(frozen=True, slots=True)
class Answers:
    """How often answers are right on clean rows, right on triggered ones, and the attacker's."""

    clean: Count | None
    triggered: Count | None
    asr: Count | None


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of clean and of triggered rows, float64, higher = more suspicious.

    `broken` counts those that are no finite numbers; they stay in the arrays as NaN.
    """

    clean: Array
    triggered: Array

    @property
    def broken(self) -> int:
        """Rows without a number."""
        return int(sum((~np.isfinite(x)).sum() for x in (self.clean, self.triggered)))


@dataclass(frozen=True, slots=True)
class InputResult:
    """Answers without and with the defence, and what it flagged; None where there is nothing."""

    before: Answers
    after: Answers
    false_alarms: Count | None
    detected: Count | None
    scores: Scores | None


@dataclass(frozen=True, slots=True)
class ModelResult:
    """A verdict (`clean`, `flagged`, `inconclusive`) and a score, None when not measured."""

    outcome: str
    score: float | None


Result = DataResult | InputResult | ModelResult


def parse(level: str, found: Mapping[str, Any]) -> Result:
    """A cell's `result`.

    Raises:
        KeyError, TypeError, ValueError: it is not what the benchmark writes at this level.
    """
    if level == "data":
        refit = found["refit"] or {}
        tp, fp, fn, tn = (_whole(found.get(key, 0)) for key in ("tp", "fp", "fn", "tn"))
        if not tp + fp + fn + tn:
            raise ValueError("a set of no rows")
        return DataResult(tp, fp, fn, tn, _count(refit.get("asr")), _count(refit.get("clean")))
    if level == "input":
        flagged, scores = found["flagged"] or {}, found["scores"]
        return InputResult(
            _answers(found["before"]),
            _answers(found["after"]),
            _count(flagged.get("clean")),
            _count(flagged.get("triggered")),
            None if scores is None else _scores(scores),
        )
    outcome = found["outcome"]
    if outcome not in ("clean", "flagged", "inconclusive"):
        raise ValueError(f"unknown outcome '{outcome}'")
    score = found["score"]
    known = score is not None and math.isfinite(score)
    return ModelResult(outcome, float(score) if known else None)


def _answers(found: Mapping[str, Any]) -> Answers:
    return Answers(*(_count(found.get(key)) for key in ("clean", "triggered", "asr")))


def _scores(found: Mapping[str, Sequence[float | None] | None]) -> Scores:
    clean, triggered = (
        np.array(found.get(key) or [], dtype=np.float64) for key in ("clean", "triggered")
    )
    return Scores(clean, triggered)


def _count(pair: Sequence[int] | None) -> Count | None:
    """`[k, n]`; None of no rows, since a share of nothing is no number."""
    if pair is None:
        return None
    hits, of = (_whole(value) for value in pair)
    if hits > of:
        raise ValueError(f"{hits} of {of} rows")
    return Count(hits, of) if of else None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
