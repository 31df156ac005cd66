"""Statistics by name: from two or more models' sights to one number per model.

Every model is first described by its *shift*: its numbers less those of the base on the same
samples (paired, so that what is particular to a picture cancels), averaged over the samples. A
statistic then says how far one model's shift is from a cloud of others'. It is a symmetric function
of that cloud, so each model of a set can be scored against all the others in turn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from gazeguard.methods.entropyscan.sight import Sight

if TYPE_CHECKING:
    from gazeguard.methods.entropyscan.settings import Settings

Array = NDArray[np.float64]

# A number that hardly moves between models would turn rounding into a huge distance: none counts
# as steadier than this share of the typical one.
_STEADY = 0.05
_FEWEST = 3  # models from which a spread between models can be told


@dataclass(frozen=True, slots=True)
class Statistic:
    """One way to score a model.

    Attributes:
        numbers: names of the `Sight` arrays it reads.
        per_head: whether heads stay apart; otherwise they are averaged (entropy: beforehand).
        describe: `shift` is the mean over samples of the paired difference; `spread` the logarithm
            of its standard deviation over samples.
        judge: distance from the cloud, see `_JUDGES`.
        meaning: for people.
    """

    numbers: tuple[str, ...]
    per_head: bool
    describe: Literal["shift", "spread"]
    judge: Literal["z", "mahalanobis"]
    meaning: str


STATISTICS: dict[str, Statistic] = {
    "entropy": Statistic(
        ("entropy",), False, "shift", "z", "Tsallis entropy of head-mean attention (the paper's)"
    ),
    "head-entropy": Statistic(
        ("head_entropy",), True, "shift", "z", "Tsallis entropy of every head on its own"
    ),
    "mass": Statistic(
        ("mass",), False, "shift", "z", "log odds of the attention that lies on the image"
    ),
    "head-mass": Statistic(("mass",), True, "shift", "z", "the same of every head on its own"),
    "ratio": Statistic(
        ("ratio",), False, "shift", "z", "log of image attention over attention on the words"
    ),
    "profile": Statistic(
        ("head_entropy", "mass", "ratio"),
        True,
        "shift",
        "mahalanobis",
        "all of them of every head, under the references' shrunk covariance",
    ),
    "spread": Statistic(
        ("head_entropy", "mass"),
        True,
        "spread",
        "z",
        "how unevenly the shift falls on the samples, whatever its mean",
    ),
}


def values(sight: Sight, settings: Settings, q: float | None = None) -> Array:
    """The numbers that a statistic reads, `(samples, features)`.

    Args:
        sight: of one model.
        settings: statistic, layers and q.
        q: instead of the settings'.
    """
    statistic = STATISTICS[settings.statistic]
    layers = [sight.layers.index(layer) for layer in settings.chosen(sight.layers)]
    index = sight.q.index(settings.q if q is None else q)
    parts = []
    for name in statistic.numbers:
        part = getattr(sight, name)[:, layers].astype(np.float64)
        if name in ("entropy", "head_entropy"):
            part = part[..., index]
        if not statistic.per_head and part.ndim == 3:
            part = part.mean(-1)
        parts.append(part.reshape(len(part), -1))
    return np.concatenate(parts, 1)


_WORDS = {"entropy": "entropy", "head_entropy": "entropy", "mass": "mass", "ratio": "ratio"}


def names(sight: Sight, settings: Settings) -> list[str]:
    """What each feature of `values` is, for people: `layer 2 head 1 entropy`."""
    statistic = STATISTICS[settings.statistic]
    heads = range(sight.head_entropy.shape[2]) if statistic.per_head else (None,)
    end = " over samples" if statistic.describe == "spread" else ""
    return [
        f"layer {layer}{'' if head is None else f' head {head}'} {_WORDS[name]}{end}"
        for name in statistic.numbers
        for layer in settings.chosen(sight.layers)
        for head in heads
    ]


def describe(own: Array, base: Array, statistic: str) -> Array:
    """A model in `features` numbers; NaN where a feature is not defined for it.

    Args:
        own: `values` of the model.
        base: of the base, on the same samples.
        statistic: its name.
    """
    shift = own - base
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # a feature that is nowhere defined
        if STATISTICS[statistic].describe == "spread":
            return np.asarray(np.log(np.nanstd(shift, axis=0)), dtype=np.float64)
        return np.asarray(np.nanmean(shift, axis=0), dtype=np.float64)


def standard_scores(own: Array, others: Array, unit: Array) -> Array:
    """Where a model stands in every feature, in spreads between the others; NaN where undefined.

    Args:
        own: `(features,)`, from `describe`.
        others: `(models, features)`.
        unit: as for `distance`.
    """
    scores = np.full(len(own), np.nan)
    usable = _usable(own, others, unit)
    if usable.any():
        cloud = others[:, usable]
        scores[usable] = (own[usable] - cloud.mean(0)) / _scale(cloud, unit[usable])
    return scores


def distance(own: Array, others: Array, unit: Array, statistic: str) -> float:
    """How far a model is from others.

    Args:
        own: `(features,)`, from `describe`.
        others: `(models, features)`.
        unit: `(features,)`, spread of the base's values over samples; stands in for the spread
            between models where there are fewer than three.
        statistic: its name.

    Returns:
        At least 0; NaN when no feature can be used.
    """
    usable = _usable(own, others, unit)
    if not usable.any():
        return float("nan")
    own, others, unit = own[usable], others[:, usable], unit[usable]
    return _JUDGES[STATISTICS[statistic].judge](own, others, unit)


def _usable(own: Array, others: Array, unit: Array) -> NDArray[np.bool_]:
    usable: NDArray[np.bool_] = np.isfinite(own) & np.isfinite(others).all(0) & np.isfinite(unit)
    return usable


def _z(own: Array, others: Array, unit: Array) -> float:
    """Root mean square of the standard scores."""
    scale = _scale(others, unit)
    return float(np.sqrt(np.mean(((own - others.mean(0)) / scale) ** 2)))


def _mahalanobis(own: Array, others: Array, unit: Array) -> float:
    """Mahalanobis distance under the Ledoit-Wolf covariance of the others, per feature.

    All models lie in a space of as many dimensions as there are models: it is rotated there first,
    which changes no distance and keeps the covariance small.
    """
    scale = _scale(others, unit)
    cloud = (others - others.mean(0)) / scale
    away = (own - others.mean(0)) / scale
    if len(cloud) < _FEWEST:
        return float(np.sqrt(np.mean(away**2)))
    _, _, axes = np.linalg.svd(np.vstack([cloud, away]), full_matrices=False)
    covariance = LedoitWolf(assume_centered=True).fit(cloud @ axes.T).covariance_
    inside = axes @ away
    return float(np.sqrt(inside @ np.linalg.solve(covariance, inside) / len(away)))


def _scale(others: Array, unit: Array) -> Array:
    spread = others.std(0, ddof=1) if len(others) >= _FEWEST else unit
    typical = float(np.median(spread))
    if not typical > 0:
        typical = float(np.median(unit)) or 1.0
    return np.maximum(spread, _STEADY * typical)


_JUDGES: dict[str, Callable[[Array, Array, Array], float]] = {
    "z": _z,
    "mahalanobis": _mahalanobis,
}
