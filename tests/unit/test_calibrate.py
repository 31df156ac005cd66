"""Conformal thresholds: the rank, its limits, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from gazeguard.calibrate import (
    conformal_threshold,
    needed_samples,
    p_values,
    rate_bound,
    recommended_samples,
    supported_alpha,
)
from gazeguard.errors import UsageError


@pytest.mark.parametrize(
    ("n", "alpha", "k"),
    [(99, 0.01, 99), (100, 0.01, 100), (198, 0.01, 198), (199, 0.01, 198), (19, 0.05, 19)]
    + [(9, 0.1, 9), (29, 0.1, 27), (999, 0.007, 993), (3, 0.5, 2), (1, 0.5, 1)],
)
def test_threshold_is_the_kth_smallest(n, alpha, k):
    """k = ceil((n + 1)(1 - alpha)), worked out by hand."""
    scores = np.random.default_rng(0).permutation(n) + 1.0
    assert conformal_threshold(scores, alpha) == k


@pytest.mark.parametrize(("alpha", "n"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1), (0.03, 33)])
def test_needed_samples_is_where_a_threshold_begins(alpha, n):
    assert needed_samples(alpha) == n
    conformal_threshold(np.arange(n), alpha)
    with pytest.raises(UsageError, match=f"at least {n}"):
        conformal_threshold(np.arange(n - 1), alpha)


def test_the_alpha_that_is_named_can_be_used():
    for n in range(1, 500):
        alpha = supported_alpha(n)
        assert needed_samples(alpha) <= n, f"{n} scores do not support {alpha}"
        assert alpha < 1.02 / (n + 1), "and it is not much larger than it must be"
    assert str(supported_alpha(140)) == "0.0071"


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(UsageError, match="between 0 and 1"):
        conformal_threshold(np.arange(100), alpha)


def test_p_values_by_hand():
    p = p_values([1.0, 2.0, 2.0, 5.0], [0.0, 2.0, 2.5, 5.0, 6.0, float("nan")])
    assert p[:5].tolist() == [1.0, 0.8, 0.4, 0.4, 0.2]
    assert np.isnan(p[5])


def test_ties_do_not_flag_what_equals_the_calibration():
    scores = np.ones(200)
    assert not (np.ones(5) > conformal_threshold(scores, 0.01)).any()
    assert p_values(scores, [1.0])[0] == 1.0


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [1.0, float("inf")], [[1.0], [2.0]]])
def test_calibration_scores_must_be_numbers(bad):
    with pytest.raises(ValueError, match="finite"):
        conformal_threshold(bad, 0.5)
    with pytest.raises(ValueError, match="finite"):
        p_values(bad, [1.0])


def test_the_rate_of_one_calibration_by_hand():
    """With one rank above the threshold the rate is `Beta(1, n)`: `1 - (1 - c)^(1/n)`."""
    assert rate_bound(99, 0.01) == pytest.approx(1 - 0.05 ** (1 / 99))
    assert rate_bound(99, 0.01, 0.5) == pytest.approx(1 - 0.5 ** (1 / 99))


@pytest.mark.parametrize(("n", "alpha"), [(99, 0.01), (399, 0.01), (57, 0.1)])
def test_95_of_100_calibrations_keep_to_the_bound(n, alpha):
    rng = np.random.default_rng(11)
    bound = rate_bound(n, alpha)
    # The scores are uniform, so a threshold's own rate is what lies above it.
    rates = np.array([1 - conformal_threshold(rng.uniform(size=n), alpha) for _ in range(4000)])
    assert abs((rates <= bound).mean() - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 4000)
    assert rates.mean() <= alpha + 4 * rates.std() / np.sqrt(4000)


def test_from_the_recommended_number_on_the_rate_keeps_to_twice_alpha():
    for alpha in (0.01, 0.05, 0.1, 0.2):
        n = recommended_samples(alpha)
        assert all(rate_bound(more, alpha) <= 2 * alpha for more in range(n, 2 * n))
        assert rate_bound(n - round(1 / alpha), alpha) > 2 * alpha
    assert recommended_samples(0.01) == 399
    assert recommended_samples(0.9) >= 1
