"""The paper's rule against a second, literal implementation of its published equations."""

import numpy as np
from sklearn.mixture import GaussianMixture

from gazeguard.methods.bye import BYE
from tests.unit.test_bye import poisoned, profile


def published_rule(entropy, threshold=2.0):
    """arXiv:2505.16916: BSI per layer, mean over sensitive layers, low component."""
    sensitive = []
    for layer in range(entropy.shape[1]):
        gm = GaussianMixture(2, random_state=0).fit(entropy[:, [layer]])
        mu, var = gm.means_[:, 0], gm.covariances_[:, 0, 0]
        if abs(mu[0] - mu[1]) / np.sqrt(var.sum()) >= threshold:
            sensitive.append(layer)
    mean = entropy[:, sensitive].mean(1, keepdims=True)
    gm = GaussianMixture(2, random_state=0).fit(mean)
    return sensitive, gm.predict(mean) == gm.means_[:, 0].argmin()


def test_same_layers_and_rows_as_the_equations():
    for seed in range(3):
        entropy, _ = poisoned(seed=seed, n=1500, shift=-0.9)
        layers, rows = published_rule(entropy.astype(np.float32).astype(float))
        result = BYE("paper").fit(profile(entropy)).result_
        assert [s.layer for s in result.layer_stats if s.selected] == layers
        assert (result.is_flagged == rows).mean() >= 0.999
