"""Which part of a picture decides the answer, by hiding one part after the other.

Shared by the two baselines that look for a trigger's place, `mask-restore` and `sentinet`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gazeguard.lab.architectures.protocol import GRID
from gazeguard.lab.triggers import Pixels
from gazeguard.types import Sample

Cells = NDArray[np.bool_]
"""`(GRID, GRID)`: a picture in as many cells as the lab's models see tokens."""

Judge = Callable[[Sequence[Sample], Sequence[str]], NDArray[np.float64]]
"""Requests and one answer for each -> how likely the answers are, float64 `(n,)`, nats."""

# A window of 3 x 3 cells moved by two: wherever it lies, a square as large as one token (2 x 2
# cells at most) is wholly inside one of the 16 windows.
WINDOW, STEP = 3, 2
# In cells, how far a filled pixel looks; as far as it must where nothing nearer is left.
FILL_WIDTH = 0.5


def first_picture(request: Sample) -> Pixels:
    """The picture that the prompt shows first, uint8 `(h, w, 3)`."""
    return np.asarray(request.images[request.prompt_images[0]])


def with_picture(request: Sample, pixels: Pixels) -> Sample:
    """A request with its first picture replaced."""
    images = list(request.images)
    images[request.prompt_images[0]] = Image.fromarray(pixels)
    return replace(request, images=tuple(images))


def over_pixels(cells: Cells, height: int, width: int) -> NDArray[np.bool_]:
    """Cells as pixels `(h, w)`; sides differ by one pixel where the grid does not divide them."""
    rows, columns = (np.arange(side) * GRID // side for side in (height, width))
    return np.asarray(cells[rows[:, None], columns])


def filled(pixels: Pixels, cells: Cells) -> Pixels:
    """Some cells painted over from what surrounds them.

    A pixel becomes the mean of the pixels left, weighted by a Gaussian of their distance.

    Args:
        pixels: uint8 `(h, w, 3)`.
        cells: those to paint over, not all of them.
    """
    height, width = pixels.shape[:2]
    hidden = over_pixels(cells, height, width)
    if not hidden.any():
        return pixels
    down, across = _nearness(height), _nearness(width)
    left = np.where(hidden, 0.0, 1.0)
    weight = down @ left @ across
    light = np.moveaxis(down @ np.moveaxis(pixels * left[..., None], -1, 0) @ across, 0, -1)
    painted = pixels.copy()
    painted[hidden] = (light / weight[..., None])[hidden].round().clip(0, 255).astype(np.uint8)
    return painted


@lru_cache
def _nearness(side: int) -> NDArray[np.float64]:
    """Weight of each pixel of a row for each other, `(side, side)`."""
    places = np.arange(side) * GRID / side
    return np.exp(-0.5 * ((places[:, None] - places) / FILL_WIDTH) ** 2)


def windows() -> list[Cells]:
    """The places that are hidden one after the other; together they cover the picture."""
    starts = [*range(0, GRID - WINDOW, STEP), GRID - WINDOW]
    found = []
    for top in starts:
        for left in starts:
            cells = np.zeros((GRID, GRID), np.bool_)
            cells[top : top + WINDOW, left : left + WINDOW] = True
            found.append(cells)
    return found


def drops(judge: Judge, requests: Sequence[Sample], answers: Sequence[str]) -> NDArray[np.float64]:
    """How much of an answer's likelihood goes when a window is hidden.

    One forward pass for each request and window, and one more.

    Args:
        judge: says how likely the answers are.
        requests: with a picture each.
        answers: what the model said to them.

    Returns:
        `(n, window)`, nats.
    """
    before = judge(requests, answers)
    pictures = [first_picture(request) for request in requests]
    found = []
    for cells in windows():
        changed = [
            with_picture(request, filled(pixels, cells))
            for request, pixels in zip(requests, pictures, strict=True)
        ]
        found.append(before - judge(changed, answers))
    return np.stack(found, 1)


def standing_out(dropped: NDArray[np.float64]) -> tuple[float, Cells]:
    """How far the worst window lies above the median one, and the window that is the place.

    An answer that says what a picture shows hangs on several places; one that a patch brings about
    hangs on one. Windows that hide a part of the patch can do as much as the one that hides it all:
    the place is the window whose cells are hidden in the worst windows.

    Args:
        dropped: `(window,)`, of one request.

    Returns:
        The distance from the median, and the window; no cell when the distance is 0.
    """
    places = np.array(windows())
    height = float(dropped.max() - np.median(dropped))
    cells = np.tensordot(dropped, places, 1) / places.sum(0)
    inside = (cells * places).sum((1, 2))
    return height, np.asarray(places[inside.argmax()] & (height > 0))
