"""The loss landscape as a small PNG and the curvatures as bars, drawn without a script."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE = 320
# Dark to light, so that it reads in grey print too.
RAMP = np.array(
    [(28, 20, 68), (59, 72, 140), (38, 130, 142), (94, 201, 98), (253, 231, 37)], dtype=np.float64
)
_WIDTH, _HEIGHT, _FOOT = 640.0, 200.0, 24.0


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar in the coordinates of the drawing; `positive` bars are of bowl-like curvature."""

    x: float
    y: float
    width: float
    height: float
    positive: bool


@dataclass(frozen=True, slots=True)
class Pictures:
    """What the page shows of one model.

    Attributes:
        surface: PNG as a data URL.
        low, high: loss at the darkest and the lightest colour.
        extent: half the side of the square.
        bars: of the eigenvalue histogram, in a drawing of `width` x `height`.
        ticks: (x, label).
    """

    surface: str
    low: float
    high: float
    extent: float
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    width: float = _WIDTH
    height: float = _HEIGHT + _FOOT


def pictures(figures: Mapping[str, Any]) -> Pictures | None:
    """The drawings of a model, or None when it has no landscape."""
    if "surface" not in figures:
        return None
    grid = np.array(figures["surface"], dtype=np.float64)  # null, of JSON, becomes NaN
    if not np.isfinite(grid).any():
        return None
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    bars, ticks = _bars(figures["eigenvalues"])
    return Pictures(
        png((grid - low) / (high - low or 1.0), (_SIDE, _SIDE), RAMP),
        low,
        high,
        figures["extent"],
        bars,
        ticks,
    )


def png(scaled: NDArray[np.float64], size: tuple[int, int], ramp: NDArray[np.float64]) -> str:
    """A grid as a picture with hard-edged cells, as a data URL.

    Args:
        scaled: `(rows, columns)` in [0, 1]; NaN is drawn as 0.
        size: width and height in pixels.
        ramp: `(colours, 3)`, evenly spaced over [0, 1].
    """
    places = np.linspace(0, 1, len(ramp))
    shown = np.nan_to_num(scaled, nan=0.0)
    colours = np.stack([np.interp(shown, places, ramp[:, i]) for i in range(3)], -1)
    image = Image.fromarray(colours.round().astype(np.uint8))
    buffer = BytesIO()
    image.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _bars(histogram: Mapping[str, Any]) -> tuple[list[Bar], list[tuple[float, str]]]:
    edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])
    span, top = edges[-1] - edges[0], max(1, counts.max())
    left = _WIDTH * (edges[:-1] - edges[0]) / span
    width = _WIDTH / len(counts)
    tall = (_HEIGHT - 10) * np.sqrt(counts / top)
    bars = [
        Bar(float(x) + 1, float(_HEIGHT - h), width - 2, float(h), bool(middle > 0))
        for x, h, middle in zip(left, tall, (edges[:-1] + edges[1:]) / 2, strict=True)
        if h > 0
    ]
    values = [edges[0], edges[-1], *([0.0] if edges[0] < 0 < edges[-1] else [])]
    return bars, [(float(_WIDTH * (v - edges[0]) / span), f"{v:.3g}") for v in values]
