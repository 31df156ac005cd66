"""The search for the trigger's window, against pictures whose trigger is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gazeguard.methods.cleansight.looks import Look
from gazeguard.methods.cleansight.search import (
    SMALLEST,
    Window,
    find,
    find_among,
    first_windows,
    searching,
)
from gazeguard.models.target import ImageTokens

THRESHOLD = 5.0


def touched(grid, top, left, height=2, width=2):
    """The trigger's tokens, a bool grid."""
    return Window(top, left, height, width).mask(grid).reshape(grid)


def score(tokens, trigger):
    """High as long as a part of the trigger is seen; less so the fewer of it, and the more else."""
    hidden = tokens.reshape(trigger.shape)
    left = (trigger & ~hidden).sum() / trigger.sum()
    return 2.0 + 10.0 * left + 2.0 * (hidden & ~trigger).mean()


def search(grid, trigger, judge=score):
    """The found tokens as a grid, and how many windows were tried."""
    found, tried = run(find(grid, THRESHOLD), lambda tokens: judge(tokens, trigger))
    return found.reshape(grid), len(tried)


def run(trials, judge):
    """What a search finds, and all that it tried."""
    tried = [next(trials)]
    while True:
        try:
            tried.append(trials.send(judge(tried[-1])))
        except StopIteration as end:
            return end.value, tried


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (16, 9), (7, 30), (3, 3), (2, 8), (1, 64)])
def test_every_place_is_found(grid):
    high, wide = (min(2, side) for side in grid)
    for top in range(0, grid[0] - high + 1, max(1, grid[0] // 9)):
        for left in range(0, grid[1] - wide + 1, max(1, grid[1] // 9)):
            trigger = touched(grid, top, left, high, wide)
            found, tried = search(grid, trigger)
            assert (found & trigger).sum() == trigger.sum(), (top, left)
            assert found.sum() <= max(4, grid[0] * grid[1] / 8), (top, left)
            assert tried <= 70


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (1, 64), (1, 1), (2, 2)])
def test_a_trigger_that_is_everywhere_costs_the_picture(grid):
    found, _ = search(grid, np.ones(grid, bool), lambda *_: 99.0)
    assert found.all()
    found, _ = search(grid, np.ones(grid, bool), lambda *_: float("nan"))
    assert found.all(), "not a number is no sign of calm"


def test_a_window_that_is_calm_is_kept_when_its_parts_are_not():
    trigger = touched((24, 24), 6, 6, 6, 6)
    found, _ = search(
        (24, 24),
        trigger,
        lambda t, g: 1.0 if (g & ~t.reshape(g.shape)).sum() == 0 else 9.0 - t.mean(),
    )
    assert found.sum() == 36
    assert (found == trigger).all()


@pytest.mark.parametrize("grid", [(8, 8), (5, 9), (1, 64), (1, 1), (24, 17)])
def test_first_windows_and_parts_leave_no_gap(grid):
    windows = first_windows(grid)
    assert np.any([w.mask(grid) for w in windows], axis=0).all()
    for window in windows:
        parts = window.parts()
        assert bool(parts) == (max(window.height, window.width) > SMALLEST)
        if parts:
            cover = np.any([p.mask(grid) for p in parts], axis=0)
            assert (cover == window.mask(grid)).all()


def test_samples_are_searched_side_by_side():
    grid = (4, 4)
    image = torch.zeros(3, 20, dtype=torch.bool)
    image[0, 1:17] = image[1, 3:19] = image[2, 2:18] = True
    triggers = {0: touched(grid, 2, 2), 2: touched(grid, 0, 1)}
    flagged = torch.tensor([True, False, True])
    known, unknown = ImageTokens(16, grid), ImageTokens(16)
    looks = searching(image, [(known,), (known,), (unknown,)], flagged, THRESHOLD)
    hidden, tried = next(looks), 1
    while True:
        assert not hidden[1].any(), "an unflagged sample loses nothing"
        assert not (hidden & ~image).any()
        scores = np.full(3, 1.0)
        for i, trigger in triggers.items():
            scores[i] = score(hidden[i, image[i]].numpy(), trigger)
        try:
            hidden = looks.send(Look(scores, torch.zeros(image.shape)))
            tried += 1
        except StopIteration as end:
            hidden = end.value
            break
    assert (hidden[0, image[0]].numpy().reshape(grid) == triggers[0]).all()
    assert (hidden[2, image[2]].numpy().reshape(grid) & triggers[2]).sum() == 4, "without a grid"
    assert tried < 40


def several(images, which, tokens):
    """Places of an image's tokens among those of all images."""
    every = np.zeros(sum(image.count for image in images), bool)
    start = sum(image.count for image in images[:which])
    every[start : start + images[which].count] = np.ravel(tokens)
    return every


IMAGES = (ImageTokens(12, (3, 4)), ImageTokens(64, (8, 8)), ImageTokens(20))


def test_one_image_is_searched_as_if_there_were_no_others():
    grid = (8, 8)
    trigger = touched(grid, 3, 4)
    alone, tried = run(find(grid, THRESHOLD), lambda tokens: score(tokens, trigger))
    same, again = run(
        find_among((ImageTokens(64, grid),), THRESHOLD), lambda tokens: score(tokens, trigger)
    )
    assert (alone == same).all()
    assert len(tried) == len(again)
    assert all((a == b).all() for a, b in zip(tried, again, strict=True)), "same trials, same order"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_the_image_with_the_trigger_loses_tokens(which):
    shape = IMAGES[which].grid or (1, 20)
    trigger = several(IMAGES, which, touched(shape, shape[0] - 1, 2, 1, 2))
    found, tried = run(find_among(IMAGES, THRESHOLD), lambda tokens: score(tokens, trigger))
    whole = [several(IMAGES, i, np.ones(image.count, bool)) for i, image in enumerate(IMAGES)]
    assert all((a == b).all() for a, b in zip(tried, whole, strict=False)), "whole images first"
    assert not any((tokens & ~whole[which]).any() for tokens in tried[len(IMAGES) :])
    assert (found & trigger).sum() == trigger.sum()
    assert not (found & ~whole[which]).any()
    assert found.sum() < IMAGES[which].count


def test_an_image_none_of_whose_parts_is_calm_goes_as_a_whole():
    whole = several(IMAGES, 1, np.ones(64, bool))
    found, _ = run(find_among(IMAGES, THRESHOLD), lambda t: 9.0 - 8.0 * bool((t >= whole).all()))
    assert (found == whole).all()


@pytest.mark.parametrize("judge", [lambda _: 99.0, lambda _: float("nan")])
def test_where_nothing_is_calm_every_image_goes(judge):
    found, _ = run(find_among(IMAGES, THRESHOLD), judge)
    assert found.all()


def test_the_calmest_image_may_have_a_calm_part_without_being_calm():
    """Hiding a whole image changes the ratio more than hiding a part of it."""
    part = several(IMAGES, 1, touched((8, 8), 2, 2))
    found, _ = run(
        find_among(IMAGES, THRESHOLD),
        lambda tokens: 3.0 if (tokens >= part).all() and tokens.sum() < 9 else 9.0 - tokens.mean(),
    )
    assert (found == part).all()
