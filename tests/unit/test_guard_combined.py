"""Two witnesses under one alpha: how their verdicts combine, and what that promises."""

from __future__ import annotations

import numpy as np
import pytest

from gazeguard.calibrate import conformal_threshold
from gazeguard.guarding.measure import Measured
from gazeguard.guarding.verdict import judged, unjudged
from gazeguard.types import Outcome


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_an_alarm_by_either_keeps_to_alpha_over_a_thousand_calibrations(alpha):
    """Dependent scores with heavy tails, as divergences have."""
    rng = np.random.default_rng(0)
    n, fresh, rates = 300, 200, []
    for _ in range(1000):
        common = rng.standard_normal(n + fresh)
        scores = (
            common + rng.standard_normal(n + fresh),
            np.exp(2 * common) * rng.exponential(size=n + fresh),
        )
        alarm = np.zeros(fresh, bool)
        for one in scores:
            alarm |= one[n:] > conformal_threshold(one[:n], alpha / 2)
        rates.append(alarm.mean())
    error = np.std(rates) / np.sqrt(len(rates))
    assert np.mean(rates) <= alpha + 2 * error
    assert np.mean(rates) >= alpha / 2, "it is no idle promise"


def test_a_sample_that_cannot_be_compared_calibrates_nothing():
    numbers = np.zeros((3, 1, 1), np.float32)
    seen = Measured((), (0,), numbers, numbers, np.array([0.1, np.nan, np.inf]))
    assert seen.finite.tolist() == [True, False, False]


def attention(score: float) -> object:
    return judged(score, 0.5 if score < 1 else 0.01, 1.0, 0.1, "source", {})


def test_either_flags_and_both_are_named():
    quiet, loud = attention(0.5), attention(2.0)
    assert quiet.compared(0.1, 1.0, 0.4).outcome is Outcome.CLEAN
    assert quiet.compared(0.1, 1.0, 0.4).p_value == 0.4
    by_base = quiet.compared(9.0, 1.0, 0.02)
    assert (by_base.outcome, by_base.flagged_by) == (Outcome.FLAGGED, ("base",))
    assert by_base.verdict.suspicion == pytest.approx(0.98)
    assert "would not begin this answer" in by_base.reason
    assert "as in clean inputs" not in by_base.reason
    both = loud.compared(9.0, 1.0, 0.02)
    assert both.flagged_by == ("attention", "base")
    assert len(both.verdict.evidence) == 2
    assert loud.compared(0.1, 1.0, 0.4).flagged_by == ("attention",)


@pytest.mark.parametrize("divergence", [0.1, 5.0])
def test_what_attention_cannot_judge_stays_open(divergence):
    """No clean input was like it, so neither witness promises anything."""
    open_ = unjudged("no words", 1.0, 0.1, "source", {})
    found = open_.compared(divergence, 1.0, 0.01)
    assert found.outcome is Outcome.INCONCLUSIVE
    assert found.divergence == divergence
    assert not found.flagged_by
