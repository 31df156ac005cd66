"""One picture of what the guard saw: the image, its heat, and the tokens that stand out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_SIDE = 512  # pixels of the longer side, so that single tokens of small images can be seen
_GAP = 16  # pixels between two pictures
_WARM = np.array([220.0, 30.0, 30.0])
_OUTLINE = (255, 214, 0)


def strongest(heats: Sequence[NDArray[np.float32]]) -> float:
    """The strongest heat of a prompt's images; 0 where there is none."""
    return max((float(np.nanmax(heat, initial=0.0)) for heat in heats), default=0.0)


def draw_heatmap(
    image: Image.Image,
    heat: NDArray[np.float32] | None,
    tokens: NDArray[np.bool_] | None,
    top: float | None = None,
) -> Image.Image:
    """Lay heat over an image and outline tokens.

    The grid is stretched over the whole image. For models that crop their input the outermost
    pixels of a long image are not what the model saw.

    Args:
        image: the picture that was asked about.
        heat: non-negative `(rows, columns)`, or None for none.
        tokens: bool like `heat`, or None.
        top: heat that gets the full colour; the map's own strongest when it is None.

    Returns:
        RGB, enlarged to `_SIDE` pixels when it is smaller.
    """
    scale = max(1.0, _SIDE / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    if top is None:
        top = 0.0 if heat is None else strongest([heat])
    if heat is not None and heat.ndim == 2 and top > 0:
        strength = np.nan_to_num(heat / top).clip(0, 1)
        cells = Image.fromarray((255 * strength).astype(np.uint8))
        opacity = np.asarray(cells.resize(size, Image.Resampling.NEAREST), np.float64) / 255 * 0.7
        pixels = np.asarray(picture, np.float64)
        mixed = pixels + (_WARM - pixels) * opacity[..., None]
        picture = Image.fromarray(mixed.round().astype(np.uint8))
    if tokens is not None and tokens.ndim == 2:
        _outline(picture, tokens)
    return picture


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures from left to right on white, RGB; one alone as it is."""
    if len(pictures) == 1:
        return pictures[0]
    width = sum(picture.width + _GAP for picture in pictures) - _GAP
    strip = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + _GAP
    return strip


def _outline(picture: Image.Image, tokens: NDArray[np.bool_]) -> None:
    """A line wherever a chosen cell meets one that is not."""
    pen = ImageDraw.Draw(picture)
    rows, columns = tokens.shape
    x = np.linspace(0, picture.width - 1, columns + 1)
    y = np.linspace(0, picture.height - 1, rows + 1)
    inside = np.pad(tokens, 1)
    width = max(2, min(picture.size) // 150)
    for row in range(rows + 1):
        for column in range(columns + 1):
            here = inside[row + 1, column + 1]
            if column < columns and here != inside[row, column + 1]:
                pen.line([(x[column], y[row]), (x[column + 1], y[row])], _OUTLINE, width)
            if row < rows and here != inside[row + 1, column]:
                pen.line([(x[column], y[row]), (x[column], y[row + 1])], _OUTLINE, width)
