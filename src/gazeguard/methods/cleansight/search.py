"""Where the trigger is, found by trial: the window whose hiding makes the guard calmest.

What stands out in the attention points at the trigger only loosely: by the time the answer begins,
other tokens have copied it. Hiding is a test that copying cannot fool. Windows of a quarter of the
picture's sides are tried side by side, then the best one is moved by half its sides as long as that
makes the guard calmer; in a finer picture windows of half the sides are tried within the best, and
so on down to two tokens. Of several images, the one whose hiding makes the guard calmest is found
first, and searched alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.methods.cleansight.looks import Hiding
from gazeguard.models.target import Grid, Images, ImageTokens

SMALLEST = 2  # tokens; a patch of one token's size lies across two when it is not aligned
SHARE = 4  # the first windows' sides are a SHARE-th of the picture's


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of image tokens; places and sides in tokens."""

    top: int
    left: int
    height: int
    width: int

    def mask(self, grid: Grid) -> NDArray[np.bool_]:
        """Bool of the grid's shape, flattened row by row."""
        tokens = np.zeros(grid, bool)
        tokens[self.top : self.top + self.height, self.left : self.left + self.width] = True
        return tokens.ravel()

    def moved(self, grid: Grid) -> list[Window]:
        """The up to eight windows half a side away, within the grid."""
        tops = _near(self.top, self.height, grid[0])
        lefts = _near(self.left, self.width, grid[1])
        places = [(top, left) for top in tops for left in lefts]
        return [replace(self, top=top, left=left) for top, left in places]

    def parts(self) -> list[Window]:
        """Windows of half the sides that cover this one; empty when it is as small as they get."""
        if max(self.height, self.width) <= SMALLEST:
            return []
        tall, tops = _halves(self.height)
        wide, lefts = _halves(self.width)
        return [
            Window(self.top + top, self.left + left, tall, wide) for top in tops for left in lefts
        ]


def first_windows(grid: Grid) -> list[Window]:
    """Windows side by side that cover the grid."""
    tall, wide = (min(side, max(SMALLEST, round(side / SHARE))) for side in grid)
    return [
        Window(min(top, grid[0] - tall), min(left, grid[1] - wide), tall, wide)
        for top in range(0, grid[0], tall)
        for left in range(0, grid[1], wide)
    ]


def _near(start: int, length: int, side: int) -> list[int]:
    step = max(1, length // 2)
    return sorted({max(0, start - step), start, min(side - length, start + step)})


def _halves(side: int) -> tuple[int, list[int]]:
    """Length of a part along one side, and where its parts start."""
    if side <= SMALLEST:
        return side, [0]
    half = (side + 1) // 2
    return half, sorted({0, (side - half) // 2, side - half})


Trials = Generator[NDArray[np.bool_], float, NDArray[np.bool_]]


def find(grid: Grid, threshold: float) -> Trials:
    """The search in one image: yields tokens to hide, takes the score that this gives.

    Args:
        grid: rows and columns of the image tokens.
        threshold: scores up to here are calm.

    Returns:
        The smallest calm window on the way down, flattened; all tokens when none was calm.
    """
    seen: dict[Window, float] = {}

    def calmest(windows: Iterable[Window]) -> Generator[NDArray[np.bool_], float, Window]:
        windows = list(windows)
        for window in windows:
            if window not in seen:
                seen[window] = _or_worst((yield window.mask(grid)))
        return min(windows, key=seen.__getitem__)

    best = yield from calmest(first_windows(grid))
    while (better := (yield from calmest([best, *best.moved(grid)]))) != best:
        best = better
    calm = best if seen[best] <= threshold else None
    while parts := best.parts():
        best = yield from calmest(parts)
        if seen[best] <= threshold:
            calm = best
        elif calm is not None:
            break
    return np.ones(grid[0] * grid[1], bool) if calm is None else calm.mask(grid)


def find_among(images: Images, threshold: float) -> Trials:
    """The search in one input: in its only image, or in the one whose hiding calms the guard most.

    Args:
        images: of the input; in one without a grid, runs of tokens in prompt order are tried.
        threshold: scores up to here are calm.

    Returns:
        As `find`, over the tokens of all images. Where no part of the calmest image is calm, all
        of that image; all images when that is not calm either.
    """
    if len(images) == 1:
        return (yield from find(_grid(images[0]), threshold))
    owner = np.repeat(np.arange(len(images)), [image.count for image in images])
    scores = []
    for i in range(len(images)):
        scores.append(_or_worst((yield owner == i)))
    calmest = int(np.argmin(scores))
    inside = owner == calmest
    found = yield from _within(inside, find(_grid(images[calmest]), threshold))
    if scores[calmest] > threshold and bool(found[inside].all()):
        return np.ones(len(owner), bool)
    return found


def _within(inside: NDArray[np.bool_], search: Trials) -> Trials:
    """A search over the tokens `inside` as one over all tokens."""
    score = None
    while True:
        tokens = np.zeros(len(inside), bool)
        try:
            # The first `send` of a generator takes None.
            tokens[inside] = search.send(score)  # type: ignore[arg-type]
        except StopIteration as end:
            tokens[inside] = end.value
            return tokens
        score = yield tokens


def _grid(image: ImageTokens) -> Grid:
    return image.grid or (1, image.count)


def _or_worst(score: float) -> float:
    """A score that can be compared; not a number is no sign of calm."""
    return score if np.isfinite(score) else np.inf


def searching(image: Tensor, images: Sequence[Images], flagged: Tensor, threshold: float) -> Hiding:
    """The search in every flagged sample of a batch, side by side: one look tries one window each.

    Args:
        image: bool `(sample, key)`.
        images: of each sample.
        flagged: bool `(sample,)`.
        threshold: scores up to here are calm.
    """
    hidden = torch.zeros_like(image)
    searches = {}
    for i in flagged.nonzero().flatten().tolist():
        searches[i] = find_among(images[i], threshold)
    told: dict[int, float | None] = dict.fromkeys(searches)
    while searches:
        for i, search in list(searches.items()):
            try:
                # The first `send` of a generator takes None.
                tokens = search.send(told[i])  # type: ignore[arg-type]
            except StopIteration as end:
                tokens = end.value
                del searches[i]
            hidden[i, image[i]] = torch.from_numpy(tokens)
        if searches:
            look = yield hidden.clone()
            told = {i: float(look.scores[i]) for i in searches}
    return hidden
