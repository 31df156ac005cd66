"""Is a sample of numbers one group or two? Two-component fits in one dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

Fit = Literal["gmm", "kmeans"]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Split:
    """A two-component fit, components ordered by mean (low first).

    Attributes:
        mean: `(2,)`.
        std: `(2,)`.
        weight: `(2,)`, sums to 1.
        bic_gain: BIC of one Gaussian minus BIC of this fit, in nats x 2; positive = two is better.
        hard: k-means: membership is by the nearer mean, without a likelihood.
    """

    mean: Array
    std: Array
    weight: Array
    bic_gain: float
    hard: bool = False

    @property
    def bsi(self) -> float:
        """Bimodal separation index `|mu1 - mu2| / sqrt(s1^2 + s2^2)` (arXiv:2505.16916)."""
        spread = float(np.hypot(*self.std))
        gap = float(self.mean[1] - self.mean[0])
        return gap / spread if spread > 0 else (np.inf if gap > 0 else 0.0)

    @property
    def script_bsi(self) -> float:
        """The public script's stricter index, scaled to the same threshold of 2.

        The script asks for `|mu1 - mu2| > 2 (s1 + s2)`; this is `|mu1 - mu2| / (s1 + s2)`.
        """
        spread = float(self.std.sum())
        gap = float(self.mean[1] - self.mean[0])
        return gap / spread if spread > 0 else (np.inf if gap > 0 else 0.0)

    def posterior_low(self, values: Array) -> Array:
        """Posterior `(N,)` of the low component, made monotone: it never rises with the value.

        With unequal widths the wide component also wins far out on the narrow one's side, so both
        tails are cut at the means.
        """
        x = np.asarray(values, dtype=np.float64)
        if self.hard:
            nearer: Array = (x < self.mean.mean()).astype(np.float64)
            return nearer
        if not (self.std > 0).all():
            return np.full(len(x), 0.5)
        odds = np.diff(norm.logpdf(x[:, None], self.mean, self.std) + np.log(self.weight))[:, 0]
        low: Array = expit(-odds)
        low[x >= self.mean[1]] = 0.0
        low[x <= self.mean[0]] = 1.0
        return low


def split_in_two(values: Array, *, fit: Fit = "gmm", seed: int = 0) -> Split:
    """Fit two components to a 1-D sample.

    Args:
        values: float `(N,)`, finite, N >= 2.
        fit: `gmm` (scikit-learn's GaussianMixture) or `kmeans` (hard clusters).
        seed: of the initialisation.

    Returns:
        The fit. A constant sample gives two equal components and no separation.
    """
    x = np.asarray(values, dtype=np.float64)
    scale = float(x.std())
    if scale == 0 or len(x) < 2:
        at = np.full(2, x.mean() if len(x) else 0.0)
        return Split(at, np.zeros(2), np.full(2, 0.5), -np.inf)
    z = ((x - x.mean()) / scale)[:, None]
    if fit == "kmeans":
        label = KMeans(2, n_init=4, random_state=seed).fit(z).labels_
        mean = np.array([z[label == k].mean() for k in (0, 1)])
        std = np.array([z[label == k].std() for k in (0, 1)])
        weight = np.array([(label == k).mean() for k in (0, 1)])
        gain = np.nan
    else:
        two = GaussianMixture(2, random_state=seed, reg_covar=1e-6).fit(z)
        one = GaussianMixture(1).fit(z)
        mean, std, weight = two.means_[:, 0], np.sqrt(two.covariances_[:, 0, 0]), two.weights_
        gain = float(one.bic(z) - two.bic(z))
    order = np.argsort(mean)
    mean, std = mean[order] * scale + x.mean(), std[order] * scale
    return Split(mean, std, weight[order], gain, hard=fit == "kmeans")
