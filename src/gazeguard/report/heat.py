"""Heat maps for a page, as bytes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PICTURES = 4  # of one row or request that are shown large
HEAT_SIDE = 32  # larger grids are averaged down: nobody sees more on a 200 px picture


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
