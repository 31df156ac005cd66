"""The heat map: where it is warm, and what is outlined."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gazeguard.report.heatmap import draw_heatmap, side_by_side, strongest

GREY = Image.new("RGB", (64, 32), (120, 120, 120))


def test_heat_lies_on_its_cells_and_nowhere_else():
    heat = np.zeros((2, 4), np.float32)
    heat[1, 2], heat[0, 0] = 4.0, 1.0
    drawn = np.asarray(draw_heatmap(GREY, heat, None), int)
    assert drawn.shape == (256, 512, 3)
    red = (drawn[..., 0] - drawn[..., 2]).reshape(2, 128, 4, 128).mean((1, 3))
    assert red[1, 2] == red.max() > 100
    assert 20 < red[0, 0] < red[1, 2]
    others = [red[r, c] for r in range(2) for c in range(4) if heat[r, c] == 0]
    assert max(others) == 0


def test_tokens_are_outlined_together():
    tokens = np.zeros((4, 8), bool)
    tokens[1:3, 2:4] = True
    drawn = np.asarray(draw_heatmap(GREY, None, tokens), int)
    yellow = (drawn == (255, 214, 0)).all(-1)
    rows, columns = np.flatnonzero(yellow.any(1)), np.flatnonzero(yellow.any(0))
    assert (rows.min(), rows.max()) == pytest.approx((64, 192), abs=4)
    assert (columns.min(), columns.max()) == pytest.approx((128, 256), abs=4)
    assert not yellow[100:150, 170:210].any(), "no line between two chosen cells"


@pytest.mark.parametrize("heat", [None, np.zeros((2, 2)), np.full((2, 2), np.nan), np.ones(7)])
def test_without_heat_it_is_the_picture(heat):
    drawn = np.asarray(draw_heatmap(GREY, heat, None))
    assert (drawn == 120).all()


def test_pictures_of_one_prompt_share_a_scale():
    weak, strong = np.full((2, 2), 1.0, np.float32), np.full((2, 2), 4.0, np.float32)
    top = strongest([weak, strong, np.full(3, np.nan, np.float32)])
    assert top == 4.0
    red = [np.asarray(draw_heatmap(GREY, heat, None, top), int)[..., 0] for heat in (weak, strong)]
    assert (red[0] < red[1]).all()
    assert strongest([]) == 0.0


def test_pictures_side_by_side_lose_nothing():
    wide, tall = Image.new("RGB", (30, 10), "red"), Image.new("RGB", (10, 40), "blue")
    strip = np.asarray(side_by_side([wide, tall]))
    assert strip.shape[0] == 40
    assert (strip[:10, :30] == (255, 0, 0)).all()
    assert (strip[:, -10:] == (0, 0, 255)).all()
    assert (strip[10:, :30] == 255).all()
    assert side_by_side([tall]) is tall


def test_large_pictures_keep_their_size():
    large = Image.new("RGB", (900, 700))
    assert draw_heatmap(large, np.eye(3, dtype=np.float32), np.eye(3, dtype=bool)).size == (
        900,
        700,
    )
