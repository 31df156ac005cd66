"""Assimilation and the loss landscape, against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from gazeguard.signals.assimilation import assimilation
from gazeguard.signals.landscape import curvatures, directions, offsets, positive_share


def by_pairs(states: torch.Tensor) -> float:
    """The definition: a loop over all pairs of different tokens."""
    n = len(states)
    pairs = [
        float(cosine_similarity(states[i], states[j], dim=0))
        for i in range(n)
        for j in range(n)
        if i != j
    ]
    return sum(pairs) / len(pairs)


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 1000))
def test_equals_the_mean_over_pairs(tokens: int, width: int, seed: int):
    states = torch.randn(3, tokens, width, generator=torch.Generator().manual_seed(seed))
    expected = [by_pairs(prompt) for prompt in states]
    assert assimilation(states).tolist() == pytest.approx(expected, abs=1e-5)


def test_padding_counts_only_when_asked():
    words = torch.eye(4)[:3]
    padding = torch.eye(4)[3].expand(5, 4)
    states = torch.cat([words, padding])[None]
    counted = torch.tensor([[True] * 3 + [False] * 5])
    assert assimilation(states, counted).item() == pytest.approx(0.0)
    assert assimilation(states).item() == pytest.approx(5 * 4 / (8 * 7))


def test_one_token_has_no_pairs():
    counted = torch.tensor([[True, False], [True, True]])
    found = assimilation(torch.ones(2, 2, 3), counted)
    assert math.isnan(found[0])
    assert found[1].item() == pytest.approx(1.0)


def test_has_a_gradient_that_points_to_likeness():
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    assimilation(states).sum().backward()
    assert states.grad[0, 0, 1] > 0
    assert states.grad[0, 1, 0] > 0


def test_directions_are_orthonormal_and_go_down():
    gradient = torch.arange(1.0, 6.0)
    found = directions(gradient, seed=3)
    assert torch.allclose(found @ found.T, torch.eye(2), atol=1e-6)
    assert (found[0] @ gradient).item() == pytest.approx(-gradient.norm().item(), rel=1e-5)
    flat = directions(torch.zeros(5), seed=3)
    assert torch.allclose(flat @ flat.T, torch.eye(2), atol=1e-6)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.integers(3, 8), st.floats(0.5, 10))
def test_curvature_of_a_quadratic_is_exact(a, b, c, points, extent):
    x, y = offsets(points, extent).double().T
    surface = (0.5 * a * x**2 + 0.5 * b * y**2 + c * x * y).reshape(points, points)
    found = curvatures(surface, 2 * extent / (points - 1))
    exact = torch.linalg.eigvalsh(torch.tensor([[a, c], [c, b]], dtype=torch.float64))
    assert found.shape == (points - 2, points - 2, 2)
    assert torch.allclose(found, exact.expand_as(found), atol=1e-4)


def test_share_of_a_bowl_a_saddle_and_a_broken_surface():
    x, y = offsets(5, 1.0).T
    shares = [
        positive_share(curvatures(surface.reshape(5, 5), 0.5))
        for surface in (x**2 + y**2, x**2 - y**2, torch.zeros(25), x * float("nan"))
    ]
    assert shares[:3] == [1.0, 0.5, 0.0]
    assert math.isnan(shares[3])
    with pytest.raises(ValueError, match="inner point"):
        curvatures(torch.zeros(2, 2), 1.0)
