"""Tsallis entropy against the published formula, its limits and its bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gazeguard.errors import UsageError
from gazeguard.signals.entropy import head_entropy, visual_entropy
from gazeguard.signals.tsallis import head_tsallis, tsallis_entropy, visual_tsallis
from gazeguard.types import KeyKind

P = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])


@pytest.mark.parametrize("q", [0.3, 0.5, 2.0, 3.0, 10.0])
def test_is_the_published_formula(q: float):
    plain = (1 - sum(p**q for p in [0.5, 0.2, 0.2, 0.1])) / (q - 1)
    assert tsallis_entropy(P, q).item() == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("step", [1e-3, 1e-5, 1e-7, 1e-12])
def test_goes_to_shannon_from_both_sides(step: float):
    shannon = tsallis_entropy(P, 1.0).item()
    assert shannon == pytest.approx(-sum(p * math.log(p) for p in [0.5, 0.2, 0.2, 0.1]), rel=1e-6)
    for q in (1 - step, 1 + step):
        assert tsallis_entropy(P, q).item() == pytest.approx(shannon, rel=2 * step + 1e-6)


def test_q_0_counts_and_large_q_sees_the_strongest_token():
    assert tsallis_entropy(P, 0.0).item() == pytest.approx(3.0)
    strong = tsallis_entropy(torch.tensor([0.9, 0.1]), 50.0).item()
    assert strong * 49 == pytest.approx(1 - 0.9**50, rel=1e-4)


@pytest.mark.parametrize("q", [0.0, 0.05, 0.5, 1.0, 2.0])
def test_bounds_and_tiny_weights(q: float):
    even = torch.full((7,), 1 / 7)
    top = math.log(7) if q == 1 else (1 - 7 ** (1 - q)) / (q - 1)
    assert tsallis_entropy(even, q).item() == pytest.approx(top, rel=1e-5)
    assert tsallis_entropy(torch.tensor([1.0, 0.0]), q).item() == 0.0
    tiny = torch.tensor([1.0, 1e-38, 1e-44])
    assert 0 <= tsallis_entropy(tiny, q).item() <= 2.001


def test_of_attention_rows():
    rng = np.random.default_rng(0)
    weights = torch.tensor(rng.dirichlet(np.full(8, 0.3), size=(2, 3, 4)), dtype=torch.float32)
    kind = torch.tensor([[3, 1, 1, 1, 1, 2, 2, 3]] * 2, dtype=torch.int8)
    got = visual_tsallis(weights, kind, (1.0, 2.0))
    assert got.shape == (2, 3, 2)
    assert torch.equal(got[..., 0], visual_entropy(weights, kind))
    heads = head_tsallis(weights, kind, (0.5, 1.0, 2.0))
    assert heads.shape == (2, 3, 4, 3)
    assert torch.equal(heads[..., 1], head_entropy(weights, kind))
    mine = weights[0, 0, 0, 1:5] / weights[0, 0, 0, 1:5].sum()
    assert heads[0, 0, 0, 2].item() == pytest.approx(1 - (mine**2).sum().item(), rel=1e-5)


def test_broken_weights_stay_visible():
    kind = torch.full((1, 3), int(KeyKind.IMAGE), dtype=torch.int8)
    weights = torch.tensor([[[[0.5, float("nan"), 0.5]]]])
    assert visual_tsallis(weights, kind, (2.0,)).isnan().all()
    assert tsallis_entropy(torch.tensor([float("nan"), 1.0]), 0.0).isnan()


@pytest.mark.parametrize("q", [-0.1, float("nan"), float("inf")])
def test_a_q_without_meaning_is_refused(q: float):
    with pytest.raises(UsageError, match="0 or more"):
        tsallis_entropy(P, q)
