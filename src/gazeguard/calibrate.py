"""Thresholds with a promise: split-conformal calibration on clean scores.

Scores of clean inputs that the detector was not fitted on are exchangeable with the score of the
next clean input. So the rank of the next one is uniform, and a threshold at the right rank keeps
the false-alarm rate at or below `alpha`, for any score and any distribution, in finite samples.

That is an average over calibrations. One calibration's own rate is a beta variable around it, wide
when the scores are few.

Source: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (2005); the split form of
Papadopoulos et al. (2002). The beta distribution: Vovk, Conditional validity of inductive conformal
predictors (2012).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from gazeguard.errors import UsageError

# Products such as 0.07 * 100 fall just below the whole number they stand for.
_ROUNDING = 1e-9

CONFIDENCE = 0.95


def needed_samples(alpha: float) -> int:
    """The fewest calibration scores for which a threshold at `alpha` exists: `1 / alpha - 1`.

    Raises:
        UsageError: `alpha` is not between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise UsageError(f"alpha must lie between 0 and 1, not {alpha}: 0.01 is usual.")
    return max(1, math.ceil(1 / alpha - 1 - _ROUNDING))


def supported_alpha(samples: int) -> float:
    """The smallest false-alarm rate that so many calibration scores can promise.

    `1 / (n + 1)`, rounded up to three digits so that it can be typed.
    """
    exact = 1.0 / (samples + 1)
    digit = 10.0 ** (math.floor(math.log10(exact)) - 2)
    return float(f"{math.ceil(exact / digit - _ROUNDING) * digit:.3g}")


def conformal_threshold(scores: ArrayLike, alpha: float) -> float:
    """The threshold above which a new score is flagged, with P(false alarm) <= `alpha`.

    It is the k-th smallest of the n scores, `k = ceil((n + 1) (1 - alpha))`. Flagging what lies
    above it is the same as flagging `p_values <= alpha`.

    Args:
        scores: finite float `(n,)`, of clean inputs that the detector was not fitted on; higher
            is more suspicious.
        alpha: the false-alarm rate in (0, 1).

    Raises:
        UsageError: no threshold of n scores promises this alpha; says which alpha n supports.
    """
    ranked = np.sort(_finite(scores))
    n, needed = len(ranked), needed_samples(alpha)
    if n < needed:
        raise UsageError(
            f"{n} calibration scores promise a false-alarm rate of"
            f" {supported_alpha(n) if n else 1:g} at best, not {alpha:g}: give at least {needed}."
        )
    return float(ranked[n - _above(n, alpha)])


def rate_bound(samples: int, alpha: float, confidence: float = CONFIDENCE) -> float:
    """The false-alarm rate that a threshold keeps to with so much confidence.

    The rate of a threshold of n scores is `Beta(r, n + 1 - r)`, r being how many of the n + 1 ranks
    may be flagged; with ties among the scores this is an upper bound.

    Args:
        samples: n, at least `needed_samples(alpha)`.
        alpha: what the rate is at most on average over calibrations.
        confidence: share of calibrations.
    """
    above = _above(samples, alpha)
    return float(beta.ppf(confidence, above, samples + 1 - above))


def recommended_samples(alpha: float) -> int:
    """Calibration scores whose rate is at most twice `alpha` in 95 % of calibrations.

    The fewest at which one more rank may be flagged, for there the bound is highest: it holds for
    all larger numbers too.
    """
    n = needed_samples(alpha)
    while rate_bound(n, alpha) > min(2 * alpha, 0.999):
        n = max(n + 1, math.ceil((_above(n, alpha) + 1) / alpha - 1 - _ROUNDING))
    return n


def p_values(calibration: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """Conformal p-values `(1 + #{calibration >= score}) / (n + 1)`, in (0, 1].

    For a new clean input, `P(p <= a) <= a` for every `a`.

    Args:
        calibration: finite float `(n,)`, as for `conformal_threshold`.
        scores: float `(m,)`.

    Returns:
        float64 `(m,)`; NaN where a score is not a number.
    """
    ranked = np.sort(_finite(calibration))
    asked = np.atleast_1d(np.asarray(scores, dtype=np.float64))
    reached = len(ranked) - np.searchsorted(ranked, asked, side="left")
    p = np.asarray((1.0 + reached) / (len(ranked) + 1.0), dtype=np.float64)
    p[np.isnan(asked)] = np.nan
    return p


def _above(samples: int, alpha: float) -> int:
    """How many of the n + 1 ranks may be flagged."""
    return math.floor(alpha * (samples + 1) + _ROUNDING)


def _finite(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("calibration scores must be finite and have one axis")
    return values
