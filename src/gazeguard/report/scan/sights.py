"""EntropyScan's drawings: the entropy shift, the place among references, attention side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.report.scan.pictures import RAMP, png

Grid = NDArray[np.float64]

_LIMIT = 4.0  # spreads of the references at the ends of the shift's colours
# Blue below, red above, light where nothing moved.
_DIVERGING = np.array(
    [(33, 82, 148), (128, 176, 213), (246, 246, 243), (226, 150, 108), (158, 42, 24)], np.float64
)
_CELL = (6, 16)  # pixels of the shift's cells: width of a sample, height of a layer
_SIDE = 224  # pixels of a map
_WIDTH, _HEIGHT, _MARGIN = 640.0, 92.0, 24.0


@dataclass(frozen=True, slots=True)
class Strip:
    """Scores on one axis, in a drawing of `width` x `height`.

    Attributes:
        dots: (x, y) of each reference.
        suspect: x of the suspect.
        left: whether the suspect's label goes to its left.
        ticks: (x, label).
    """

    dots: list[tuple[float, float]]
    suspect: float
    left: bool
    ticks: list[tuple[float, str]]
    width: float = _WIDTH
    height: float = _HEIGHT


@dataclass(frozen=True, slots=True)
class Sights:
    """What the page shows of one vision-language model; a part is None where there is nothing.

    Attributes:
        shift: PNG as a data URL, layers downwards and samples to the right.
        layers: of the shift's rows.
        limit: shift at the ends of the colours, in spreads of the references.
        strip: place among the references.
        by_q: rows with `q`, `score` and `p_value`.
        suspect, reference: mean attention maps as data URLs on one scale.
        strongest: weight at the lightest colour, in units of the even share.
    """

    shift: str
    layers: list[int]
    limit: float
    strip: Strip
    by_q: list[dict[str, Any]]
    suspect: str | None
    reference: str | None
    strongest: float


def sights(figures: Mapping[str, Any]) -> Sights | None:
    """The drawings of a model, or None when it has none of this kind."""
    if "shift" not in figures:
        return None
    shift = np.array(figures["shift"]["rows"], dtype=np.float64)  # null, of JSON, becomes NaN
    scaled = np.nan_to_num(shift, nan=0.0).clip(-_LIMIT, _LIMIT) / (2 * _LIMIT) + 0.5
    rows, columns = shift.shape
    maps = [np.array(figures["maps"][name], dtype=np.float64) for name in ("suspect", "reference")]
    top = max((float(grid.max()) for grid in maps if grid.size), default=0.0)
    drawn = [png(grid / (top or 1.0), (_SIDE, _SIDE), RAMP) if grid.size else None for grid in maps]
    return Sights(
        png(scaled, (columns * _CELL[0], rows * _CELL[1]), _DIVERGING),
        list(figures["shift"]["layers"]),
        _LIMIT,
        _strip(figures["standing"]),
        list(figures["by_q"]),
        drawn[0],
        drawn[1],
        top * maps[0].size,
    )


def _strip(standing: Mapping[str, Any]) -> Strip:
    references: list[float] = list(standing["references"])
    own = float(standing["suspect"])
    high: float = 1.08 * max([own, *references, 1e-9])

    def x(value: float) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * value / high

    # Neighbours on the axis lie on three levels, so that equal scores can be told apart.
    order = np.argsort(references, kind="stable")
    dots = [(x(references[i]), 26.0 + 14.0 * (place % 3)) for place, i in enumerate(order)]
    ticks = [(x(value), f"{value:.2g}") for value in (0.0, high / 2, high / 1.08)]
    return Strip(dots, x(own), x(own) > _WIDTH / 2, ticks)
