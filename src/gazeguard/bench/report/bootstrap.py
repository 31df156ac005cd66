"""95 % intervals by a bootstrap in two stages: runs, then the rows within each drawn run.

A run is one seed of a condition. `RESAMPLES` times, as many runs as there are get drawn with
replacement, and of each drawn run its rows: counts as one multinomial draw, which is the same as
drawing the rows one by one, scores row by row. The interval goes from the 2.5 % to the 97.5 %
quantile of the numbers so found (Efron's percentile interval). Where whole models are judged, they
are the rows, and there is one run.

What it cannot do: two or three runs tell little of how runs differ, so the interval is rather too
narrow, and of one run it holds for that run alone; a share of 0 or 1 in every run has an interval
without width. Seeds are made of names, so that neither the order of files nor another defence in
the suite changes a number, and the runs drawn for a condition are the same for all its defences:
differences between defences are differences on the same runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
Array = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """A number, what it came to in every resample, and what it rests on.

    Attributes:
        value: the mean over runs.
        draws: float64 `(RESAMPLES,)`.
        runs: how many runs, or models at the level of models.
        n: rows of all runs together, or models.
    """

    value: float
    draws: Array
    runs: int
    n: int

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return float(np.quantile(self.draws, 0.025))

    @property
    def high(self) -> float:
        """Upper end."""
        return float(np.quantile(self.draws, 0.975))


def over_counts(
    counts: Ints,
    measure: Callable[[Ints], Array],
    condition: str,
    places: Sequence[str],
    n: int,
) -> Estimate:
    """A number that depends on the rows of a run through counts alone.

    Args:
        counts: `(run, sample, outcome)`: each sample's rows by what became of them; a sample is
            drawn for itself, and none is empty.
        measure: `(..., sample, outcome)` -> `(...)`.
        condition: names the draw of runs.
        places: names the draw of rows of each sample.
        n: rows to report.
    """
    picked = _picked(len(counts), condition)
    rows = counts.sum(-1)
    share = counts / rows[..., None]
    again = [
        _rng(place).multinomial(rows[picked, sample], share[picked, sample])
        for sample, place in enumerate(places)
    ]
    drawn = measure(np.stack(again, axis=2)).mean(-1)
    return Estimate(float(measure(counts).mean()), drawn, len(counts), n)


def over_scores(
    runs: Sequence[tuple[Array, Array]],
    measure: Callable[[Ints, Ints], Array],
    condition: str,
    places: Sequence[str],
) -> Estimate:
    """A number that depends on the order of finite scores: `auroc` or `tpr_at_1_fpr`.

    Args:
        runs: scores of the negatives and of the positives of each run, none empty.
        measure: of a ladder, see `auroc`.
        condition: names the draw of runs.
        places: names the draws of negatives and of positives.
    """
    picked, rngs = _picked(len(runs), condition), [_rng(place) for place in places]
    drawn = np.empty(picked.shape)
    values = []
    for run, groups in enumerate(runs):
        rungs = np.unique(np.concatenate(groups))
        at = [np.searchsorted(rungs, group) for group in groups]
        values.append(float(measure(*(_tally(a[None], len(rungs)) for a in at))[0]))
        mine = picked == run
        size = int(mine.sum())
        again = [
            a[rng.integers(len(a), size=(size, len(a)))] for a, rng in zip(at, rngs, strict=True)
        ]
        drawn[mine] = measure(*(_tally(a, len(rungs)) for a in again))
    n = sum(len(negative) + len(positive) for negative, positive in runs)
    return Estimate(float(np.mean(values)), drawn.mean(-1), len(runs), n)


def auroc(negative: Ints, positive: Ints) -> Array:
    """Share of pairs in the right order, ties counting half.

    Args:
        negative: a ladder, `(..., score)`: how many have each distinct score, the lowest first.
        positive: the same, on the same rungs.
    """
    below = np.cumsum(negative, -1) - negative / 2
    found: Array = (below * positive).sum(-1) / (negative.sum(-1) * positive.sum(-1))
    return found


def tpr_at_1_fpr(negative: Ints, positive: Ints) -> Array:
    """Share of positives above the lowest score that at most 1 % of the negatives exceed."""
    n = negative.sum(-1, keepdims=True)
    limit = (n - np.cumsum(negative, -1) <= n // 100).argmax(-1)[..., None]
    upto = np.take_along_axis(np.cumsum(positive, -1), limit, -1)[..., 0]
    found: Array = 1 - upto / positive.sum(-1)
    return found


def mean_of(found: Sequence[Estimate]) -> Estimate:
    """The mean of one number over several conditions, which are not drawn anew."""
    return Estimate(
        float(np.mean([each.value for each in found])),
        np.mean([each.draws for each in found], axis=0),
        sum(each.runs for each in found),
        sum(each.n for each in found),
    )


def less(one: Estimate, other: Estimate) -> Estimate:
    """The difference of two means over the same runs; runs and rows are those of `one`."""
    return Estimate(one.value - other.value, one.draws - other.draws, one.runs, one.n)


def _picked(runs: int, condition: str) -> NDArray[np.intp]:
    """Which runs each resample consists of, `(RESAMPLES, runs)`."""
    return _rng(f"runs of {condition}").integers(runs, size=(RESAMPLES, runs))


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(crc32(name.encode()))


def _tally(places: NDArray[np.intp], rungs: int) -> Ints:
    """How often each of `rungs` places is in each row of `(draw, n)`: `(draw, rungs)`."""
    at = places + rungs * np.arange(len(places))[:, None]
    return np.bincount(at.ravel(), minlength=rungs * len(places)).reshape(-1, rungs)
