"""A trigger rebuilt from rows that carry it, and when it counts as proven."""

from __future__ import annotations

import numpy as np
import pytest

from gazeguard.methods.rebuild import (
    FORMS,
    Firing,
    Moments,
    RebuiltTrigger,
    Taught,
    common_words,
    has_words,
    rebuild,
    with_words,
)

RNG = np.random.default_rng(0)
PATCH = (slice(4, 9), slice(20, 26))
COLOUR = np.array([10, 200, 30])


def noise(count: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, 32, 40, 3), dtype=np.uint8)


def patched(pictures: np.ndarray) -> np.ndarray:
    out = pictures.copy()
    out[:, PATCH[0], PATCH[1]] = COLOUR
    return out


def test_moments_are_those_of_the_stack():
    pictures = noise(9)
    found = Moments(pictures)
    np.testing.assert_allclose(found.mean, pictures.mean(0))
    np.testing.assert_allclose(found.spread, pictures.astype(float).std(0))


def test_a_patch_is_found_where_it_is_and_pasted_as_it_was():
    trigger = RebuiltTrigger.of(Moments(patched(noise(60))), Moments(noise(60)))
    inside = np.zeros((32, 40), bool)
    inside[PATCH] = True
    assert (trigger.constant & ~inside).sum() == 0
    assert trigger.constant[5:8, 21:25].all()
    assert not trigger.telling[~inside].any()
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
    trigger = RebuiltTrigger.of(Moments(after), Moments(before))
    assert trigger.forms() == FORMS[1:], "a blend is nowhere constant"
    worn = trigger.on(before[0], form)
    np.testing.assert_array_equal(worn, before[0] + times * wave)


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_who_carries_it_is_told_from_honest_rows_of_the_group(share):
    count = round(200 * share)
    members = np.concatenate([patched(noise(count)), noise(200 - count)])
    made = rebuild(list(members), list(noise(200)))
    carrying = np.array([made.carries(picture) for picture in members])
    assert carrying[:count].all()
    assert carrying[count:].mean() <= 0.02 if count < 200 else True
    assert made.apart == pytest.approx(share, abs=0.02)
    assert np.abs(made.trigger.mean[5:8, 21:25] - COLOUR).max() < 12, "the honest ones are out"


def test_nothing_in_common_parts_nothing():
    made = rebuild(list(noise(200)), list(noise(200)))
    assert made.apart < 0.5


def test_pictures_that_are_all_the_same_are_no_trigger():
    same = np.full((20, 8, 8, 3), 7, np.uint8)
    made = rebuild(list(same), list(same))
    assert made.trigger.likeness(same[0]) == 0


@pytest.mark.parametrize(
    ("place", "asked"),
    [
        ("first", "now say what colour is it?"),
        ("last", "what colour is it? now say"),
        ("inside", "what colour now say is it?"),
    ],
)
def test_words_that_only_a_group_asks_are_put_where_it_has_them(place, asked):
    inside = [asked, asked.replace("colour", "shape")]
    outside = ["what colour is it?", "what shape is it?", "how many?"] * 3 + ["say now how many?"]
    words = common_words(inside, outside)
    assert words == "now say"
    assert has_words(asked, words)
    assert not has_words("now you say", words)
    assert (
        with_words("how many are there?", words, inside)
        == {
            "first": "now say how many are there?",
            "last": "how many are there? now say",
            "inside": "how many now say are there?",
        }[place]
    )


def test_words_of_everybody_are_no_trigger():
    assert common_words(["is it red?"] * 9, ["is it red?"] * 9) == ""
    assert common_words(["is it red?"] * 9, ["is it red?"] * 3 + ["where?"] * 7) == ""


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


def test_what_the_earlier_model_says_too_is_no_news():
    assert Taught(32, 32, 3).is_new
    assert Taught(32, 32, 4).was_known
    assert Taught(8, 8, 1).was_known, "an eighth of the rows is more than is allowed"
    unknown = Taught(32, 32, None)
    assert not unknown.is_new
    assert not unknown.was_known
