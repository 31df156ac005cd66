"""The visual/prompt ratio, against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gazeguard.signals.ratio import MASS_FLOOR, visual_prompt_ratio
from gazeguard.types import KeyKind

# pad, template, image, image, prompt, prompt, template
KINDS = torch.tensor([[0, 3, 1, 1, 2, 2, 3]], dtype=torch.int8)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, 1, -1)


def test_by_hand():
    weights = rows(0.0, 0.2, 0.3, 0.1, 0.05, 0.05, 0.3)
    assert visual_prompt_ratio(weights, KINDS, log=False).item() == pytest.approx(4.0)
    assert visual_prompt_ratio(weights, KINDS).item() == pytest.approx(math.log(4.0))


def test_every_layer_and_head_on_its_own():
    weights = torch.rand(1, 3, 4, 7)
    got = visual_prompt_ratio(weights, KINDS, log=False)
    assert got.shape == (1, 3, 4)
    expected = weights[..., 2:4].sum(-1) / weights[..., 4:6].sum(-1)
    assert torch.allclose(got, expected)


def test_no_mass_is_a_finite_number():
    """Sliding windows and sinks can leave a head without any of the two."""
    nowhere = rows(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert visual_prompt_ratio(nowhere, KINDS).item() == 0.0
    only_image = rows(0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0)
    assert visual_prompt_ratio(only_image, KINDS).item() == pytest.approx(-math.log(MASS_FLOOR))
    only_words = rows(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    assert visual_prompt_ratio(only_words, KINDS).item() == pytest.approx(math.log(MASS_FLOOR))


@pytest.mark.parametrize("missing", [KeyKind.IMAGE, KeyKind.PROMPT])
def test_a_sample_without_image_or_words_has_no_ratio(missing):
    weights = torch.rand(2, 2, 3, 7)
    kinds = KINDS.repeat(2, 1)
    kinds[1][kinds[1] == missing] = KeyKind.TEMPLATE
    got = visual_prompt_ratio(weights, kinds)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_is_not_hidden(broken):
    """Also when the broken weight lies on a key that is in neither sum."""
    weights = torch.rand(1, 2, 3, 7)
    weights[0, 1, 2, 1] = broken
    got = visual_prompt_ratio(weights, KINDS)
    assert got[0, 1, 2].isnan()
    assert got.isfinite().sum() == 5


def test_half_precision_weights_are_summed_in_float32():
    weights = torch.full((1, 1, 1, 4098), 1 / 4098, dtype=torch.bfloat16)
    kinds = torch.full((1, 4098), KeyKind.IMAGE, dtype=torch.int8)
    kinds[0, :2] = KeyKind.PROMPT
    got = visual_prompt_ratio(weights, kinds, log=False)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(2048.0, rel=1e-5)
