"""What the threshold promises holds for any scores, and on average over random splits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gazeguard.calibrate import conformal_threshold, needed_samples, p_values

scores = st.integers(1, 80).flatmap(
    lambda n: arrays(np.float64, n, elements=st.floats(-1e6, 1e6, allow_nan=False))
)


@settings(max_examples=300, deadline=None)
@given(
    calibration=scores,
    new=st.floats(-1e6, 1e6, allow_nan=False),
    alpha=st.floats(0.005, 0.9) | st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.25, 0.5]),
)
def test_above_the_threshold_is_a_small_p_value(calibration, new, alpha):
    """Flagging by threshold and by p-value are one and the same."""
    if len(calibration) < needed_samples(alpha):
        return
    flagged = new > conformal_threshold(calibration, alpha)
    p = p_values(calibration, [new])[0]
    assert flagged == bool(p <= alpha + 1e-9)


@pytest.mark.parametrize("draw", ["normal", "standard_cauchy", "exponential"])
@pytest.mark.parametrize(("n", "alpha"), [(99, 0.01), (100, 0.05), (57, 0.1)])
def test_coverage_over_a_thousand_random_splits(draw, n, alpha):
    """The mean false-alarm rate lies at the exact expectation, which is at most alpha.

    A split's rate follows a beta distribution, so the mean over 1,000 splits is known to within
    four standard errors.
    """
    rng = np.random.default_rng(7)
    rates = []
    for _ in range(1000):
        pool = getattr(rng, draw)(size=n + 500)
        rng.shuffle(pool)
        rates.append((pool[n:] > conformal_threshold(pool[:n], alpha)).mean())
    expected = np.floor(alpha * (n + 1) + 1e-9) / (n + 1)
    assert expected <= alpha + 1e-12
    error = np.std(rates) / np.sqrt(len(rates))
    assert abs(np.mean(rates) - expected) < 4 * error


def test_p_values_of_clean_inputs_are_not_too_small():
    rng = np.random.default_rng(3)
    p = np.concatenate([p_values(rng.normal(size=50), rng.normal(size=20)) for _ in range(1000)])
    for level in (0.02, 0.1, 0.3, 0.7):
        assert (p <= level).mean() <= level + 0.01
