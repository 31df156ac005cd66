"""Pictures small enough to live inside the page, as data URLs, and heat maps as bytes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL_BYTES = 3072
GALLERY_SIDE = 320
GALLERY_BYTES = 40_000
MAX_PICTURES = 4  # of one row or request that are shown large
HEAT_SIDE = 32  # larger grids are averaged down: nobody sees more on a 200 px picture

# (longest side in px, JPEG quality), tried in turn until the bytes fit.
_THUMBNAIL_STEPS = ((96, 72), (96, 55), (80, 45), (64, 40), (48, 35), (32, 30))
_GALLERY_STEPS = ((GALLERY_SIDE, 82), (GALLERY_SIDE, 65), (256, 55), (192, 40))


def _flat(image: Image) -> Image:
    """RGB on white, whatever mode came in."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, "white")
        image = PILImage.alpha_composite(white, image)
    return image.convert("RGB")


def _encode(image: Image, side: int, quality: int | None) -> bytes:
    """JPEG at `quality`, or PNG when it is None; never enlarged."""
    small = image
    if max(image.size) > side:
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.resize(size, PILImage.Resampling.LANCZOS)
    buffer = BytesIO()
    if quality is None:
        small.save(buffer, "PNG", optimize=True)
    else:
        small.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def _data_url(image: Image, steps: tuple[tuple[int, int], ...], limit: int) -> str:
    flat = _flat(image)
    if max(flat.size) <= 128:
        # JPEG smears exactly what matters in tiny pictures: hard-edged patches.
        lossless = _encode(flat, 128, None)
        if len(lossless) <= limit:
            return "data:image/png;base64," + base64.b64encode(lossless).decode()
    encoded = b""
    for side, quality in steps:
        encoded = _encode(flat, side, quality)
        if len(encoded) <= limit:
            break
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode()


def thumbnail_url(image: Image) -> str:
    """A thumbnail of about 3 KB at most, as a data URL."""
    return _data_url(image, _THUMBNAIL_STEPS, THUMBNAIL_BYTES)


def gallery_url(image: Image) -> str:
    """A picture of at most 320 px and about 40 KB, as a data URL."""
    return _data_url(image, _GALLERY_STEPS, GALLERY_BYTES)


def _shrink(grid: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Average neighbouring cells until neither axis is longer than `side`."""
    for axis in (0, 1):
        length = grid.shape[axis]
        if length > side:
            starts = np.linspace(0, length, side, endpoint=False).astype(int)
            cells = np.diff(np.append(starts, length))
            totals = np.add.reduceat(grid, starts, axis=axis)
            grid = totals / (cells[:, None] if axis == 0 else cells[None, :])
    return grid


def heat_bytes(
    heat: NDArray[np.floating[Any]], beside: Sequence[NDArray[np.floating[Any]]] = ()
) -> dict[str, Any] | None:
    """One heat map for the page, or None when it holds no attention at all.

    Args:
        heat: `(grid rows, grid columns)`, non-negative, any scale.
        beside: the maps of the same prompt's other images, in the same scale; shares are of the
            attention on all of them.

    Returns:
        `w`, `h`; `data`: base64 of one byte per cell, 255 at the strongest; `peak`: share of the
        attention in the strongest cell; `top`: how many times an even share the strongest drawn
        cell gets, so that pictures can share one colour scale; `x`, `y`: the middle of
        the strongest cell, in [0, 1].
    """
    grid = np.nan_to_num(np.asarray(heat, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if grid.ndim != 2:
        raise ValueError(f"a heat map has two axes, not shape {grid.shape}")
    grid = grid.clip(min=0.0)
    total = grid.sum() + sum(float(np.nansum(other)) for other in beside)
    even = total / (grid.size + sum(other.size for other in beside))
    if not grid.sum() > 0:
        return None
    y, x = np.unravel_index(int(grid.argmax()), grid.shape)
    place = ((x + 0.5) / grid.shape[1], (y + 0.5) / grid.shape[0])
    peak = float(grid.max() / total)
    small = _shrink(grid, HEAT_SIDE)
    scaled = np.round(255 * small / small.max()).astype(np.uint8)
    return {
        "w": scaled.shape[1],
        "h": scaled.shape[0],
        "data": base64.b64encode(scaled.tobytes()).decode(),
        "peak": round(peak, 4),
        "top": round(float(small.max() / even), 3),
        "x": round(float(place[0]), 3),
        "y": round(float(place[1]), 3),
    }
