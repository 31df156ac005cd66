"""Are the calibration inputs one lot? Rows that stand apart from all others, one or a group.

A guard learns from its calibration inputs what is normal, so a poisoned row among them makes
triggers normal. Two statistics of each row are tested, both measured with a detector that was
fitted without the row and that a quarter of odd rows cannot bend: the logarithm of its distance
from the others, which shows a single row far out, and its place along the direction in which the
outer rows lie, which shows a group.

A statistic's upper tail may be as heavy as it likes as long as it has no gap. When a tail is
exponential (a distance with a power-law tail has such a logarithm), the gaps between neighbours,
times the number of rows above, are independent draws of one exponential variable, so the share of
one of them in their sum has an exact distribution; lighter tails have smaller gaps far out.

Sources: Renyi, On the theory of order statistics (1953), for the gaps; Fisher, Tests of
significance in harmonic analysis (1929), for the share; Rousseeuw and Van Driessen, A fast
algorithm for the minimum covariance determinant estimator (1999), for the concentration steps.
Their combination is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import Ridge

from gazeguard.methods.cleansight.detector import MIN_FIT, Detector

Array = NDArray[np.float64]

ALONE, GROUP = 0.005, 0.0005
"""p-values below which a few rows, or a group, stand apart.

They are the rates for clean sets with exponential tails. Clean sets have lighter ones, but fall
into kinds of pictures, which only the stricter level forgives; docs/methods/cleansight.md has what
was measured.
"""

_SPLITS = 5
_KEPT = 0.75  # of the rows that a detector could learn from; so many odd ones cannot bend it
_FEW, _GROUP = 0.2, 0.5  # upper parts of the rows in which gaps of either kind are looked for
_STEPS = 10  # concentration steps; they end by themselves after a few
_STD_FLOOR = 0.01  # as in the detector
_OFTEN = 5  # prompts with a word, and without it, from which on it explains anything


@dataclass(frozen=True, slots=True)
class Outlying:
    """Rows that stand apart.

    Attributes:
        rows: int64, their places, furthest out first.
        excess: float64, of each, how many times as far from the others as the median row.
    """

    rows: NDArray[np.int64]
    excess: Array


def outlying(
    ratio: NDArray[np.floating],
    strongest: NDArray[np.floating],
    prompts: Sequence[str],
    seed: int = 0,
) -> Outlying | None:
    """Find rows that a gap separates from the others.

    Args:
        ratio: finite log ratios `(n, layer, head)`.
        strongest: of the same rows, `T` times the weight of the strongest image token.
        prompts: of the same rows, the user's words; what they explain makes no row odd.
        seed: of the splits.

    Returns:
        None when the rows are one lot, or too few to say.
    """
    n = len(ratio)
    if n < 4 * MIN_FIT:
        return None
    x = np.c_[ratio.reshape(n, -1), np.log(_positive(strongest)).reshape(n, -1)]
    x = _turned(_standard(_without_prompts(_standard(x), prompts)))
    distance, directed = np.zeros(n), []
    for fit, rest in _halves(n, seed):
        far, along = np.empty(n), np.empty(n)
        for learn, judge in ((fit, rest), (rest, fit)):
            z, outer = _whitened(x, learn)
            length = np.linalg.norm(z[judge], axis=1)
            far[judge] = np.log(length / np.median(length))
            along[judge] = _robust(z[judge] @ outer)
        distance += far / _SPLITS
        directed.append(_gap(along, _GROUP))
    alone = _gap(distance, _FEW)
    # Twice the median of several p-values is one again.
    p_group = 2 * float(np.median([gap.p_value for gap in directed]))
    above = alone.above & (alone.p_value < ALONE)
    if p_group < GROUP:
        telling = [gap.above for gap in directed if gap.p_value < GROUP]
        above = above | (np.mean(telling, axis=0) > 0.5)
    rows = np.flatnonzero(above)
    if not len(rows):
        return None
    rows = rows[np.argsort(-distance[rows], kind="stable")]
    return Outlying(rows, np.exp(distance[rows]))


@dataclass(frozen=True, slots=True)
class _Gap:
    """The most telling gap of a statistic: the rows above it, and how probable it is."""

    above: NDArray[np.bool_]
    p_value: float


def _gap(statistic: Array, part: float) -> _Gap:
    """Look for a gap in the upper part, a share of all rows."""
    order = np.argsort(-statistic, kind="stable")
    count = np.arange(1, int(part * len(order)) + 1)
    ranked = statistic[order[: len(count) + 1]]
    spacing = count * (ranked[:-1] - ranked[1:])
    total = spacing.sum()
    share = spacing / total if total > 0 else spacing
    # A bound over all gaps at once, which spends most on small groups: 1/2 + 1/6 + 1/12 + ... = 1.
    p = (1.0 - share) ** (len(count) - 1) * count * (count + 1)
    best = int(p.argmin())
    above = np.zeros(len(order), dtype=bool)
    above[order[: best + 1]] = True
    return _Gap(above, min(1.0, float(p[best])))


def _halves(n: int, seed: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    rng = np.random.default_rng([seed, 29])
    for _ in range(_SPLITS):
        order = rng.permutation(n)
        yield order[: n // 2], order[n // 2 :]


def _whitened(x: Array, learn: NDArray[np.int64]) -> tuple[Array, Array]:
    """All rows in units of the bulk of some, and the direction in which the outer of those lie."""
    z, kept = x, np.zeros(0, np.int64)
    for _ in range(_STEPS):
        length = np.linalg.norm(z[learn], axis=1)
        before, kept = kept, _nearest(length, learn)
        if np.array_equal(before, kept):
            break
        z = Detector.fit(x[kept], "ledoit-wolf").whiten(x)
    length = np.linalg.norm(z[learn], axis=1)
    outer = z[learn[length > np.quantile(length, _KEPT)]]
    direction = np.linalg.svd(outer, full_matrices=False)[2][0]
    return z, direction if (outer @ direction).sum() >= 0 else -direction


def _nearest(length: Array, learn: NDArray[np.int64]) -> NDArray[np.int64]:
    count = max(MIN_FIT, int(np.ceil(_KEPT * len(learn))))
    return np.sort(learn[np.argsort(length, kind="stable")[:count]])


def _standard(x: Array) -> Array:
    """Centred and scaled so that odd rows hardly matter."""
    z = x - np.median(x, axis=0)
    scale = 1.4826 * np.median(np.abs(z), axis=0)
    return z / np.maximum(scale, max(_STD_FLOOR * float(np.median(scale)), np.finfo(float).tiny))


def _without_prompts(x: Array, prompts: Sequence[str]) -> Array:
    """What the words of the prompts do not explain."""
    if len(set(prompts)) == 1:
        return x
    words = CountVectorizer(
        token_pattern=r"\w+",
        ngram_range=(1, 2),
        binary=True,
        min_df=_OFTEN,
        max_df=len(prompts) - _OFTEN,  # nor may a few rows be told by a word that they lack
    )
    try:
        held = words.fit_transform(prompts).astype(np.float64)
    except ValueError:  # no word is left
        return x
    return np.asarray(x - Ridge(solver="lsqr").fit(held, x).predict(held))


def _turned(x: Array) -> Array:
    """Turned so that there are no more columns than rows.

    That keeps all distances, and spares matrices of heads x heads of a large model.
    """
    if x.shape[1] <= len(x):
        return x
    left, size, _ = np.linalg.svd(x, full_matrices=False)
    return np.asarray(left * size)


def _robust(values: Array) -> Array:
    centred = values - np.median(values)
    scale = 1.4826 * float(np.median(np.abs(centred)))
    return centred / scale if scale > 0 else centred


def _positive(weights: NDArray[np.floating]) -> Array:
    values = np.asarray(weights, dtype=np.float64)
    return np.maximum(values, np.finfo(np.float32).eps)
