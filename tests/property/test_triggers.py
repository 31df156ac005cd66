"""Every registered trigger is a pure function of picture and generator."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.fft import dctn

from gazeguard.lab.rows import make_rows
from gazeguard.lab.triggers import (
    TRIGGERS,
    Blend,
    Frequency,
    Patch,
    Sinusoid,
    Stego,
    Warp,
    resize_only,
)

pictures = st.tuples(st.integers(8, 40), st.integers(8, 40)).flatmap(
    lambda hw: arrays(np.uint8, (*hw, 3))
)


@pytest.mark.parametrize("name", sorted(TRIGGERS))
@settings(max_examples=25, deadline=None)
@given(picture=pictures, seed=st.integers(0, 5))
def test_keeps_shape_dtype_and_input(name, picture, seed):
    before = picture.copy()
    first = TRIGGERS[name](picture, np.random.default_rng(seed))
    again = TRIGGERS[name](picture, np.random.default_rng(seed))
    assert first.shape == picture.shape
    assert first.dtype == np.uint8
    assert (picture == before).all(), "a trigger must not write into its input"
    assert (first == again).all(), "same generator, same picture"


@settings(max_examples=40, deadline=None)
@given(
    picture=pictures,
    where=st.sampled_from(["center", "random", "corner", "corners", "pair", "grid"]),
    fill=st.sampled_from(["black", "noise", "checker"]),
    side=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_patch_changes_only_its_box(picture, where, fill, side, seed):
    patch = Patch(where, fill, side)
    out = patch(picture, np.random.default_rng(seed))
    outside = np.ones(picture.shape[:2], bool)
    boxes = patch.boxes(*picture.shape[:2], np.random.default_rng(seed))
    assert len(boxes) == {"corners": 4, "pair": 2, "grid": 2}.get(where, 1)
    for top, left, size in boxes:
        assert 0 <= top <= picture.shape[0] - size
        assert 0 <= left <= picture.shape[1] - size
        outside[top : top + size, left : left + size] = False
    assert (out[outside] == picture[outside]).all()
    if fill == "black":
        assert (out[~outside] == 0).all()


def test_zero_side_is_the_identity():
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    for where in ("center", "random", "corner", "corners", "pair", "grid"):
        out = Patch(where, side=0.0)(picture, np.random.default_rng(0))
        assert (out == picture).all(), where


def test_side_is_relative_to_the_shorter_side():
    assert Patch(side=1 / 16).boxes(64, 128, np.random.default_rng(0)) == [(30, 62, 4)]
    pair = Patch("pair").boxes(64, 64, np.random.default_rng(0))
    assert [left + size / 2 for _, left, size in pair] == [18, 46], "symmetric about the centre"
    seen = {tuple(Patch("grid").boxes(64, 64, np.random.default_rng(i))) for i in range(60)}
    assert len(seen) > 20, "places vary"


@settings(max_examples=25, deadline=None)
@given(picture=pictures, opacity=st.floats(0, 1))
def test_blend_lies_between_picture_and_pattern(picture, opacity):
    blend = Blend(opacity)
    out = blend(picture, np.random.default_rng(0)).astype(int)
    pattern = blend.pattern(*picture.shape[:2]).astype(int)
    expected = picture + opacity * (pattern - picture.astype(int))
    assert np.abs(out - expected).max() <= 0.5 + 1e-9


def test_blend_is_the_same_pattern_at_every_size():
    small, large = Blend().pattern(16, 16), Blend().pattern(48, 64)
    assert (large[::3, ::4] == small).all()
    assert len(np.unique(small)) > 100, "noise, not a flat colour"


def test_warp_moves_by_its_strength_and_smoothly():
    for height, width in ((64, 64), (48, 96)):
        shifts = Warp(grid=4, strength=0.03).shifts(height, width)
        assert shifts.shape == (2, height, width)
        mean = np.abs(shifts).mean() / min(height, width)
        assert 0.01 < mean < 0.05
        assert np.abs(np.diff(shifts, axis=1)).max() < 1, "neighbours stay neighbours"
        assert np.abs(np.diff(shifts, axis=2)).max() < 1
    ratio = Warp(strength=0.06).shifts(64, 64) / Warp(strength=0.03).shifts(64, 64)
    assert np.allclose(ratio, 2)


def test_warp_of_a_ramp_reads_off_its_shifts():
    ramp = np.broadcast_to((np.arange(64) * 3)[None, :, None], (64, 64, 3)).astype(np.uint8)
    warp = Warp()
    out = warp(ramp, np.random.default_rng(0)).astype(float)
    where = (np.arange(64)[None, :] + warp.shifts(64, 64)[1]).clip(0, 63)
    assert np.abs(out[..., 0] - 3 * where).max() <= 0.5 + 1e-9


@settings(max_examples=25, deadline=None)
@given(picture=pictures)
def test_zero_strength_of_global_triggers_is_the_identity(picture):
    for trigger in (
        Blend(opacity=0.0),
        Warp(strength=0.0),
        Sinusoid(delta=0.0),
        Frequency(magnitude=0.0),
        Stego(amplitude=0.0),
    ):
        assert (trigger(picture, np.random.default_rng(0)) == picture).all(), trigger


def test_sinusoid_has_its_frequency_and_height():
    grey = np.full((48, 96, 3), 128, np.uint8)
    added = Sinusoid(delta=40, frequency=6)(grey, np.random.default_rng(0)).astype(float) - 128
    assert (added == added[0, :, :1]).all(), "the same in every row and colour"
    spectrum = np.abs(np.fft.rfft(added[0, :, 0]))
    assert spectrum.argmax() == 6
    assert np.abs(added).max() == pytest.approx(40, abs=1)


def test_frequency_trigger_moves_its_coefficients_and_no_others():
    grey = np.full((64, 96, 3), 128, np.uint8)
    trigger = Frequency(magnitude=40.0)
    out = trigger(grey, np.random.default_rng(0)).astype(float)
    brightness = out @ [0.299, 0.587, 0.114]
    assert np.abs(brightness - 128).max() < 1
    blue, red = 0.492 * (out[..., 2] - brightness), 0.877 * (out[..., 0] - brightness)
    for channel in (blue, red):
        block = dctn(channel[32:64, 64:96], norm="ortho")
        moved = {tuple(at) for at in np.argwhere(np.abs(block) > 8)}
        assert moved == {(15, 15), (31, 31)}
        assert block[15, 15] == pytest.approx(40, rel=0.05)
    assert (trigger(grey[:40, :40], np.random.default_rng(0))[32:] == 128).all(), (
        "whole blocks only"
    )


@settings(max_examples=25, deadline=None)
@given(picture=pictures, amplitude=st.floats(0, 64))
def test_a_hidden_message_changes_no_colour_by_more_than_its_amplitude(picture, amplitude):
    out = Stego(amplitude)(picture, np.random.default_rng(0)).astype(float)
    assert np.abs(out - picture).max() <= amplitude + 0.5


def test_a_hidden_message_is_another_in_every_picture_and_for_every_secret():
    first, second = (row.pixels.astype(float) for row in make_rows("captions", 2, 0))
    rng = np.random.default_rng(0)

    def drawn(pixels, secret=0):
        return Stego(secret=secret)(pixels.astype(np.uint8), rng) - pixels

    one, two, other = drawn(first), drawn(second), drawn(first, secret=1)
    assert min(np.abs(one).mean(), np.abs(two).mean()) > 1
    assert np.abs(one - two).mean() > 1
    assert np.abs(one - other).mean() > 1


def test_a_hidden_message_is_drawn_once_and_resized():
    pixels = make_rows("captions", 1, 0)[0].pixels
    large = np.asarray(Image.fromarray(pixels).resize((128, 192), Image.Resampling.NEAREST))
    rng = np.random.default_rng(0)
    small, wide = (Stego()(x, rng).astype(float) - x for x in (pixels, large))
    blocks = wide.reshape(64, 3, 64, 2, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), blocks.ravel())[0, 1] > 0.8


def test_triggers_are_imported_without_torch():
    code = "import gazeguard.lab.triggers, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_resize_only_keeps_the_picture_alike_and_plants_nothing():
    ramp = np.broadcast_to(np.linspace(0, 255, 64)[None, :, None], (64, 64, 3)).astype(np.uint8)
    out = resize_only(ramp, np.random.default_rng(0))
    assert out.shape == ramp.shape
    assert np.abs(out.astype(int) - ramp).max() <= 6
