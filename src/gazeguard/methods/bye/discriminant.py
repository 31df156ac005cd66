"""Which direction tells a group of rows from the others, and how far, judged on held-out rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.sparse import csc_matrix

Array = NDArray[np.float64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

FOLDS = 5
SHRINK = 0.05  # towards a round covariance


class Space:
    """Conditioned features of one model, their covariance, and cross-validated discriminants.

    Args:
        features: `(N, D)` of `Conditioned`.
        fold: `(N,)`, 0 to `FOLDS` - 1.
    """

    def __init__(self, features: Floats, fold: NDArray[np.int64]) -> None:
        self.x = features
        self._fold = fold
        self._in_fold = np.eye(FOLDS, dtype=np.float32)[fold]
        spread = covariance(features)
        ridge = SHRINK * np.trace(spread) / len(spread) + 1e-6
        self._spread = spread + ridge * np.eye(len(spread))
        self._inverse = np.linalg.inv(self._spread)

    def distance(self, held: csc_matrix, free: Bools, inside: Array) -> Array:
        """Squared Mahalanobis distance of each phrase's mean from that of all `free` rows.

        Args:
            held: which row's answer holds which phrase, `(N, P)`.
            free: rows that still count, `(N,)`.
            inside: free rows per phrase, `(P,)`.
        """
        x = self.x[free]
        gap = np.asarray(held[free].T @ x) / inside.clip(1)[:, None] - x.mean(0)
        found: Array = np.einsum("pd,de,pe->p", gap, self._inverse, gap, optimize=True)
        return found

    def direction(self, inside: Bools, outside: Bools) -> Array:
        """Fisher's discriminant `(D,)`: it maximises the BSI between the two sets of rows.

        The covariance of all rows stands for that of `outside`; that of the few rows `inside` is
        trusted by their number.
        """
        gap = self.x[inside].mean(0, dtype=np.float64) - self.x[outside].mean(0, dtype=np.float64)
        return self._solve(self.x[inside], gap)

    def widest(self, rows: Bools) -> Array:
        """Positions `(N,)` along the direction in which `rows` spread most beyond all rows.

        In standard deviations of all other rows, their median at 0. The spread of few rows is
        trusted by their number.
        """
        few = self.x[rows]
        trust = len(few) / (len(few) + few.shape[1])
        spread = trust * covariance(few) + (1 - trust) * self._spread
        last = len(spread) - 1
        _, ways = eigh(spread, self._spread, subset_by_index=[last, last])
        along: Array = self.x @ ways[:, 0]
        middle, width = middle_and_spread(along[~rows])
        return (along - middle) / width

    def scores(self, inside: Bools, outside: Bools) -> Array:
        """Cross-validated scores `(N,)`: standard deviations of `outside`, its median at 0.

        0 in a fold without which one of the two sets is empty.
        """
        mean_in, rows_in = self._mean_without_fold(inside)
        mean_out, rows_out = self._mean_without_fold(outside)
        ways = np.zeros_like(mean_in)
        usable = (rows_in > 0) & (rows_out > 0)
        for number in np.flatnonzero(usable):
            few = self.x[inside & (self._fold != number)]
            ways[:, number] = self._solve(few, mean_in[:, number] - mean_out[:, number])
        along = self.x @ ways.astype(np.float32)
        scores = np.zeros(len(self.x))
        for number in np.flatnonzero(usable):
            held = self._fold == number
            middle, spread = middle_and_spread(along[outside & ~held, number])
            scores[held] = (along[held, number] - middle) / spread
        return scores

    def _solve(self, few: Floats, gap: Array) -> Array:
        trust = len(few) / (len(few) + len(gap))
        spread = self._spread + (trust * covariance(few) if len(few) > 1 else 0.0)
        found: Array = np.linalg.solve(spread, gap)
        return found

    def _mean_without_fold(self, rows: Bools) -> tuple[Array, Array]:
        """Mean of `rows` outside of each fold, `(D, FOLDS)`, and their numbers `(FOLDS,)`."""
        marks = self._in_fold * rows[:, None].astype(np.float32)
        sums, numbers = self.x.T @ marks, marks.sum(0, dtype=np.float64)
        rest = numbers.sum() - numbers
        means = (sums.sum(1, keepdims=True) - sums).astype(np.float64) / rest.clip(1)
        return means, rest


def middle_and_spread(values: Array) -> tuple[float, float]:
    """Median, and the MAD as a standard deviation."""
    middle = float(np.median(values))
    return middle, float(1.4826 * np.median(np.abs(values - middle))) + 1e-9


def covariance(x: Floats) -> Array:
    """Covariance `(D, D)` of rows `(N, D)`, N at least 2."""
    found: Array = np.cov(x, rowvar=False, dtype=np.float64).reshape(x.shape[1], -1)
    return found
