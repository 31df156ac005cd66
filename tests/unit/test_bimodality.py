"""Two-component fits against samples whose answer is known."""

import numpy as np
import pytest

from gazeguard.signals.bimodality import split_in_two


def two_groups(gap, share=0.2, n=4000, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.normal(-gap, 1, int(n * share))
    return np.concatenate([low, rng.normal(0, 1, n - len(low))])


@pytest.mark.parametrize("fit", ["gmm", "kmeans"])
def test_recovers_two_groups(fit):
    split = split_in_two(two_groups(8.0), fit=fit)
    assert split.mean == pytest.approx([-8, 0], abs=0.15)
    assert split.std == pytest.approx([1, 1], abs=0.1)
    assert split.weight[0] == pytest.approx(0.2, abs=0.01)
    assert split.bsi == pytest.approx(8 / np.sqrt(2), rel=0.05)
    assert split.script_bsi == pytest.approx(4, rel=0.05)


def test_one_group_is_not_two():
    split = split_in_two(np.random.default_rng(1).normal(4, 0.2, 3000))
    assert split.bsi < 2
    assert split.bic_gain < 0


def test_units_do_not_matter():
    x = two_groups(6.0)
    a, b = split_in_two(x), split_in_two(x * 1e-4 + 7)
    assert a.bsi == pytest.approx(b.bsi, rel=1e-6)
    assert a.posterior_low(x) == pytest.approx(b.posterior_low(x * 1e-4 + 7), abs=1e-6)


@pytest.mark.parametrize("fit", ["gmm", "kmeans"])
def test_posterior_never_rises_with_the_value(fit):
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(-3, 3, 300), rng.normal(0, 0.3, 2000)])
    split = split_in_two(x, fit=fit)
    grid = np.linspace(-20, 20, 400)
    assert (np.diff(split.posterior_low(grid)) <= 1e-12).all()


def test_constant_sample_has_no_separation():
    split = split_in_two(np.full(100, 3.0))
    assert split.bsi == 0
    assert split.bic_gain == -np.inf
    assert (split.posterior_low(np.full(100, 3.0)) == 0.5).all()
