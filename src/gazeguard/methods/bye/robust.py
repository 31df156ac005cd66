"""Our rule: all layers at once, no sign, compared only with rows that ask the same kind of thing.

First version, to be replaced by what measures best.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.mixture import GaussianMixture

from gazeguard.methods.bye.decision import low_group
from gazeguard.signals.bimodality import split_in_two
from gazeguard.types import LayerStat, Profile

Array = NDArray[np.float64]


class RobustRule:
    """See module docstring."""

    score_name = "log odds of the majority group"

    def __init__(self, profile: Profile, *, separation: float, max_share: float, seed: int) -> None:
        x = profile.entropy.astype(np.float64)
        self._center, self._scale = x.mean(0), x.std(0) + 1e-9
        self._mix = GaussianMixture(2, random_state=seed, reg_covar=1e-3, n_init=3)
        self._mix.fit((x - self._center) / self._scale)
        self._minority = int(np.argmin(self._mix.weights_))
        self.decision = low_group(
            self.score(profile), separation=separation, max_share=max_share, seed=seed
        )
        self.layer_stats = tuple(
            LayerStat(layer, float(split_in_two(c, seed=seed).bsi), selected=True)
            for layer, c in zip(profile.layers, x.T, strict=True)
        )
        self.info: dict[str, Any] = {}

    def score(self, profile: Profile) -> Array:
        """Log odds of the majority group, `(N,)`."""
        z = (profile.entropy - self._center) / self._scale
        p = self._mix.predict_proba(z)[:, self._minority].clip(1e-12, 1 - 1e-12)
        return np.log1p(-p) - np.log(p)

    def suspicion(self, score: Array) -> Array:
        """Posterior of the minority group."""
        return self.decision.split.posterior_low(score)
