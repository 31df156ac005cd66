"""How far is an input's attention from that of clean inputs? Whitened distances."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from gazeguard.errors import UsageError
from gazeguard.methods.cleansight.settings import Distance

Array = NDArray[np.float64]

MIN_FIT = 10  # the paper still detects with ten clean samples

# A head that hardly moved in the fit half would turn rounding into a huge distance. No head counts
# as steadier than this share of the typical one.
_STD_FLOOR = 0.01


class Detector:
    """Distance of a feature vector from the mean of clean ones.

    `d = ||(s - mu) W||_2`. `whitened` has `W = diag(1 / sigma)`, as in the paper. `ledoit-wolf`
    also takes out how heads move together: Mahalanobis distance under the Ledoit-Wolf shrunk
    covariance of the standardised features.

    Attributes:
        mean: float64 `(D,)`.
        whitener: float64 `(D,)` or `(D, D)`, the `W` above.

    Source: METHODS 2, step 3; arXiv:2603.12989. The covariance is ours.
    """

    def __init__(self, mean: Array, whitener: Array) -> None:
        self.mean, self.whitener = mean, whitener

    @classmethod
    def fit(cls, features: NDArray[np.floating], distance: Distance) -> Detector:
        """Learn from clean inputs.

        Args:
            features: finite `(n, ...)`; all axes but the first are one feature vector.
            distance: `whitened` or `ledoit-wolf`.

        Raises:
            UsageError: fewer than `MIN_FIT` inputs, or inputs that are all alike.
        """
        x = _flat(features)
        if len(x) < MIN_FIT:
            raise UsageError(
                f"{len(x)} clean samples are too few to learn from: give at least {MIN_FIT} for"
                " the fit, and as many as alpha needs for the threshold."
            )
        mean, std = x.mean(0), x.std(0)
        typical = float(np.median(std))
        if not typical > 0:
            raise UsageError(
                "the clean samples all look alike to the model: give different images and prompts."
            )
        std = np.maximum(std, _STD_FLOOR * typical)
        if distance == "whitened":
            return cls(mean, 1.0 / std)
        covariance = LedoitWolf(assume_centered=True).fit((x - mean) / std)
        # L with L L^T = precision: the rows (s - mu) / sigma, times L, have unit covariance.
        factor = np.linalg.cholesky(covariance.precision_)
        return cls(mean, factor / std[:, None])

    def score(self, features: NDArray[np.floating]) -> Array:
        """Distances `(n,)` of `(n, ...)` features; NaN where a feature is not finite."""
        x = _flat(features)
        finite = np.asarray(np.isfinite(x).all(axis=1))
        distance: Array = np.linalg.norm(self.whiten(np.where(finite[:, None], x, 0.0)), axis=1)
        return np.where(finite, distance, np.nan)

    def whiten(self, features: NDArray[np.floating]) -> Array:
        """Finite `(n, ...)` features as `(n, D)` in the units of clean ones."""
        z = _flat(features) - self.mean
        return z * self.whitener if self.whitener.ndim == 1 else z @ self.whitener

    def arrays(self) -> dict[str, Array]:
        """What a saved detector is made of."""
        return {"mean": self.mean, "whitener": self.whitener}

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Detector:
        """The detector that `arrays` came from."""
        return cls(arrays["mean"], arrays["whitener"])


def _flat(features: NDArray[np.floating]) -> Array:
    return np.asarray(features, dtype=np.float64).reshape(len(features), -1)
