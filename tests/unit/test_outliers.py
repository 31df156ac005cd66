"""Calibration rows that stand apart: what is found, and what is only a tail."""

from __future__ import annotations

import numpy as np
import pytest

from gazeguard.methods.cleansight.outliers import outlying

LAYERS, HEADS = 4, 4
PROMPTS = ["what is it?", "where is it?", "how many are there?"]


def rows(n: int, seed: int, *, heavy: bool = False):
    """Log ratios, strongest tokens and prompts of inputs that are one lot."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(2 * LAYERS * HEADS,) * 2) / 6
    x = rng.normal(size=(n, 2 * LAYERS * HEADS)) @ mix
    if heavy:  # a multivariate t with three degrees of freedom
        x *= np.sqrt(3 / rng.chisquare(3, n))[:, None]
    x = x.reshape(n, 2, LAYERS, HEADS)
    return x[:, 0], np.exp(x[:, 1]), [PROMPTS[i % 3] for i in range(n)]


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("n", [60, 200])
def test_a_continuous_tail_is_no_outlier(n, heavy):
    found = [outlying(*rows(n, seed, heavy=heavy), seed) for seed in range(40)]
    assert sum(one is not None for one in found) <= 1


@pytest.mark.parametrize("group", [1, 2, 12, 30])
def test_rows_apart_are_found_and_no_others(group):
    ratio, strongest, prompts = rows(200, 5)
    odd = np.random.default_rng(1).permutation(200)[:group]
    ratio[odd] += 8.0 if group > 2 else 40.0
    found = outlying(ratio, strongest, prompts)
    assert found is not None
    assert sorted(found.rows.tolist()) == sorted(odd.tolist())
    assert (np.diff(found.excess) <= 0).all()
    assert found.excess[-1] > 1.5


def test_rows_that_their_prompt_explains_are_not_odd():
    ratio, strongest, prompts = rows(200, 6)
    asked = [*prompts[:180], *["describe this picture"] * 20]
    ratio[180:] += 8.0
    assert outlying(ratio, strongest, asked) is None
    assert outlying(ratio, strongest, prompts) is not None
    # A word of one row alone explains nothing.
    ratio[180:] -= 8.0
    ratio[7] += 40.0
    assert outlying(ratio, strongest, ["else" if i == 7 else p for i, p in enumerate(prompts)])


def test_more_heads_than_rows():
    rng = np.random.default_rng(2)
    ratio, strongest = rng.normal(size=(60, 32, 8)), rng.gamma(2.0, size=(60, 32, 8))
    assert outlying(ratio, strongest, ["what?"] * 60) is None
    ratio[[3, 11, 40, 41, 42]] += 3.0
    assert sorted(outlying(ratio, strongest, ["what?"] * 60).rows) == [3, 11, 40, 41, 42]


def test_too_few_or_equal_rows_say_nothing():
    ratio, strongest, prompts = rows(39, 3)
    ratio[0] += 100.0
    assert outlying(ratio, strongest, prompts) is None
