"""Scores against a known truth, each with an interval and the n behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Detection:
    """Row-level detection: precision, recall and F1 in [0, 1]; all 0 when nothing is flagged.

    On a set without poison, precision and recall are None and `flagged` is what counts.
    """

    rows: int
    poisoned: int
    flagged: int
    precision: float | None
    recall: float | None
    f1: float | None
    f1_low: float | None
    f1_high: float | None


def detection(flagged: Bools, truth: Bools, *, resamples: int = 2000, seed: int = 0) -> Detection:
    """Compare flags with the truth; the F1 interval is a 95 % bootstrap over rows."""
    n, bad, said = len(truth), int(truth.sum()), int(flagged.sum())
    if not bad:
        return Detection(n, 0, said, None, None, None, None, None)
    hit = int((flagged & truth).sum())
    # F1 depends on the rows only through three counts, so rows are resampled as a multinomial.
    share = np.array([hit, said - hit, bad - hit, n - said - bad + hit]) / n
    drawn = np.random.default_rng(seed).multinomial(n, share, size=resamples)
    f1s = 2 * drawn[:, 0] / np.maximum(2 * drawn[:, 0] + drawn[:, 1] + drawn[:, 2], 1)
    low, high = np.quantile(f1s, [0.025, 0.975])
    f1 = 2 * hit / (said + bad) if said + bad else 0.0
    return Detection(n, bad, said, hit / said if said else 0.0, hit / bad, f1, low, high)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % t interval over runs; half width NaN for a single run."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    return float(x.mean()), float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
