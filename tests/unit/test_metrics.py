"""Detection scores against hand-counted cases."""

import numpy as np
import pytest

from gazeguard.bench.metrics import detection, mean_interval


def test_hand_counted():
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    flagged = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0], bool)
    got = detection(flagged, truth)
    assert (got.precision, got.recall, got.f1) == (0.75, 0.75, 0.75)
    assert got.f1_low < 0.75 < got.f1_high


def test_nothing_flagged_scores_zero():
    got = detection(np.zeros(10, bool), np.arange(10) < 3)
    assert (got.precision, got.recall, got.f1) == (0, 0, 0)


def test_clean_set_has_no_f1():
    got = detection(np.arange(10) < 1, np.zeros(10, bool))
    assert (got.flagged, got.f1) == (1, None)


def test_interval_narrows_with_rows():
    def width(n):
        truth = np.arange(n) < n // 10
        got = detection(np.roll(truth, n // 100), truth)
        return got.f1_high - got.f1_low

    assert width(10_000) < width(1_000) / 2


def test_mean_interval():
    mean, half = mean_interval([0.9, 1.0])
    assert mean == pytest.approx(0.95)
    assert half == pytest.approx(12.706 * 0.05, rel=1e-3)
    assert np.isnan(mean_interval([1.0])[1])
