"""Entropy and mass of visual attention against plain loops and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gazeguard.signals.entropy import head_entropy, visual_attention, visual_entropy, visual_mass
from gazeguard.types import KeyKind

IMAGE, PROMPT, PAD = KeyKind.IMAGE, KeyKind.PROMPT, KeyKind.PAD


@pytest.fixture
def batch():
    """Two samples with different image positions, three layers, four heads, ten keys."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(10, 0.3), size=(2, 3, 4)).astype(np.float32)
    kind = np.array([[3, 1, 1, 1, 2, 2, 3, 3, 3, 3], [0, 0, 3, 1, 1, 1, 1, 1, 2, 3]], np.int8)
    return weights, kind


def shannon(values):
    total = sum(values)
    return -sum(v / total * math.log(v / total) for v in values if v > 0)


def test_matches_loops(batch):
    weights, kind = batch
    entropy = visual_entropy(torch.tensor(weights), torch.tensor(kind))
    heads = head_entropy(torch.tensor(weights), torch.tensor(kind))
    mass = visual_mass(torch.tensor(weights), torch.tensor(kind))
    assert entropy.dtype == heads.dtype == mass.dtype == torch.float32
    assert entropy.shape == mass.shape == (2, 3)
    assert heads.shape == (2, 3, 4)
    for i in range(2):
        image = [j for j in range(10) if kind[i, j] == IMAGE]
        for layer in range(3):
            mean = [float(np.mean([weights[i, layer, h, j] for h in range(4)])) for j in image]
            assert entropy[i, layer] == pytest.approx(shannon(mean), abs=1e-5)
            assert mass[i, layer] == pytest.approx(sum(mean), abs=1e-6)
            for head in range(4):
                own = [float(weights[i, layer, head, j]) for j in image]
                assert heads[i, layer, head] == pytest.approx(shannon(own), abs=1e-5)


def test_uniform_is_ln_t_and_one_hot_is_zero():
    kind = torch.tensor([[3, 1, 1, 1, 1, 2]], dtype=torch.int8)
    uniform = torch.full((1, 1, 2, 6), 1 / 6)
    one_hot = torch.zeros(1, 1, 2, 6)
    one_hot[..., 2] = 0.01  # little mass, but all of it on one token
    assert visual_entropy(uniform, kind).item() == pytest.approx(math.log(4), abs=1e-6)
    assert visual_entropy(one_hot, kind).item() == 0.0
    assert visual_mass(uniform, kind).item() == pytest.approx(4 / 6)
    assert visual_mass(one_hot, kind).item() == pytest.approx(0.01)


def test_heads_are_averaged_before_the_entropy():
    """Two heads on different tokens look at two tokens: ln 2, not the mean of two zeros."""
    kind = torch.tensor([[1, 1]], dtype=torch.int8)
    weights = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    assert visual_entropy(weights, kind).item() == pytest.approx(math.log(2))
    assert head_entropy(weights, kind).tolist() == [[[0.0, 0.0]]]


def test_renormalised_over_the_image(batch):
    weights, kind = map(torch.tensor, batch)
    seen = visual_attention(weights, kind)
    assert torch.allclose(seen.sum(-1), torch.ones(2, 3))
    assert (seen[(kind != IMAGE)[:, None].expand_as(seen)] == 0).all()


def test_no_visual_mass_is_nan_not_clean():
    kind = torch.tensor([[1, 1, 2]], dtype=torch.int8)
    weights = torch.tensor([[[[0.0, 0.0, 1.0]]]])
    assert visual_entropy(weights, kind).isnan().all()
    assert head_entropy(weights, kind).isnan().all()
    assert visual_mass(weights, kind).item() == 0.0


@pytest.mark.parametrize("position", [0, 2], ids=["image key", "text key"])
def test_a_broken_row_stays_visible(position):
    kind = torch.tensor([[1, 1, 2]], dtype=torch.int8)
    weights = torch.full((1, 2, 1, 3), 1 / 3)
    weights[0, 1, 0, position] = float("nan")
    for signal in (visual_entropy, visual_mass):
        assert signal(weights, kind).isnan().tolist() == [[False, True]]


def test_half_precision_input():
    kind = torch.ones(1, 8, dtype=torch.int8)
    weights = torch.full((1, 1, 1, 8), 1 / 8, dtype=torch.bfloat16)
    assert visual_entropy(weights, kind).item() == pytest.approx(math.log(8), abs=1e-6)
