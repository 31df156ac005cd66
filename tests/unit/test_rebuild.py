"""A trigger rebuilt from pictures that carry it, and when it counts as proven."""

from __future__ import annotations

import numpy as np
import pytest

from gazeguard.methods.rebuild import FORMS, Firing, Moments, RebuiltTrigger

RNG = np.random.default_rng(0)
PATCH = (slice(4, 9), slice(20, 26))
COLOUR = np.array([10, 200, 30])


def noise(count: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, 32, 40, 3), dtype=np.uint8)


def moments(pictures: np.ndarray) -> Moments:
    found = Moments(pictures.shape[1:3])
    for picture in pictures:
        found.add(picture)
    return found


def patched(pictures: np.ndarray) -> np.ndarray:
    out = pictures.copy()
    out[:, PATCH[0], PATCH[1]] = COLOUR
    return out


def test_moments_are_those_of_the_stack():
    pictures = noise(9)
    found = moments(pictures)
    np.testing.assert_allclose(found.mean, pictures.mean(0))
    np.testing.assert_allclose(found.spread, pictures.astype(float).std(0).mean(2))


def test_a_patch_is_found_where_it_is_and_pasted_as_it_was():
    trigger = RebuiltTrigger.of(moments(patched(noise(60))), moments(noise(60)))
    inside = np.zeros((32, 40), bool)
    inside[PATCH] = True
    assert (trigger.constant & ~inside).sum() == 0
    assert trigger.constant[5:8, 21:25].all()
    (fresh,) = noise(1)
    worn = trigger.on(fresh, "pasted")
    assert (worn[trigger.constant] == COLOUR).all()
    assert (worn[~trigger.constant] == fresh[~trigger.constant]).all()
    shown = trigger.picture("pasted")
    assert (shown[~trigger.constant] == 255).all()


@pytest.mark.parametrize(("form", "times"), [(FORMS[1], 1), (FORMS[2], 2), (FORMS[3], 3)])
def test_a_change_is_added_so_many_times(form, times):
    before = noise(40) // 4 + 64
    wave = (8 * np.sin(np.arange(40) / 3))[None, :, None].round().astype(int)
    after = (before + wave).astype(np.uint8)
    trigger = RebuiltTrigger.of(moments(after), moments(before))
    assert trigger.forms() == FORMS[1:], "a blend is nowhere constant"
    worn = trigger.on(before[0], form)
    np.testing.assert_array_equal(worn, before[0] + times * wave)


@pytest.mark.parametrize(
    ("triggered", "untouched", "before", "proven"),
    [
        (22, 3, 3, True),
        (32, 0, None, True),
        (21, 0, 0, False),
        (32, 4, 0, False),
        (32, 0, 4, False),
        (32, 32, 32, False),
    ],
)
def test_proven_is_with_it_and_not_without(triggered, untouched, before, proven):
    assert Firing(32, triggered, untouched, before).proven == proven


def test_few_pictures_prove_nothing():
    assert not Firing(31, 31, 0, 0).proven


def test_bounds_are_exact():
    low, high = Firing(32, 22, 0, 0).interval
    assert low == pytest.approx(0.4998, abs=1e-3)
    assert high == pytest.approx(0.8388, abs=1e-3)
    assert Firing(32, 32, 0, 0).interval[1] == 1.0
