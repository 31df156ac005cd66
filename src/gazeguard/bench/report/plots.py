"""The benchmark's pictures: heat maps, ASR against utility, and curves over the poison rate.

Colours are told apart with any kind of colour vision (Okabe and Ito's, and `cividis`), and no
colour stands alone: numbers stand in the cells, and every defence has a marker of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from math import ceil
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gazeguard.bench.report.bootstrap import Estimate
from gazeguard.bench.report.conditions import Condition, Part
from gazeguard.bench.report.quantities import LEAD, metric
from gazeguard.bench.report.svg import GRID, INK, PIXEL, SOFT, drawing, inline

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # as many as are coprime to the colours
CELL_WIDTH, CELL_HEIGHT, LETTER = 66, 36, 6.6
WIDTH, HEIGHT, LEGEND_LINE = 420, 300, 17.5
LEAST_RANGE, DODGE = 0.15, 1.06
IN_TABLE = "The numbers are in the table below."
# Where a level's defence is judged by what an attack and a clean input still get.
TRADE = {"data": ("refit_asr", "refit_clean"), "input": ("asr_after", "clean_after")}


def heat(part: Part, groups: Sequence[str]) -> str:
    """Attacks down, defences across, the level's leading number in each cell; a dash for none.

    Args:
        part: with at least one attacked condition.
        groups: what to write below the attacks' names.
    """
    about = metric(part.level, LEAD[part.level])
    rows, columns = part.attacked, part.defences
    labels = [(c.label, group) for c, group in zip(rows, groups, strict=True)]
    left = 16 + LETTER * max(len(text) for pair in labels for text in pair)
    slant = LETTER * max(len(line.name) for line in columns)
    top, right = 22 + 0.65 * slant, max(8.0, 0.77 * slant - CELL_WIDTH / 2)
    wide, high = CELL_WIDTH * len(columns), CELL_HEIGHT * len(rows)
    with drawing(f"heat {part.level} {part.kind}"):
        figure, axes = _canvas(left, right, top, 6, wide, high)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.set_axis_off()
        colours = matplotlib.colormaps["cividis"]
        for y, (condition, (label, group)) in enumerate(zip(rows, labels, strict=True)):
            axes.text(-0.12, y + 0.36, label, ha="right", va="center", size=12)
            axes.text(-0.12, y + 0.7, group, ha="right", va="center", size=10.5, color=SOFT)
            for x, line in enumerate(columns):
                found = part.of(condition, line, about.key)
                good = None if found is None else found.value if about.more else 1 - found.value
                fill = GRID if good is None else matplotlib.colors.to_hex(colours(good))
                axes.add_patch(Rectangle((x + 0.03, y + 0.05), 0.94, 0.9, fc=fill, ec="none"))
                text = "–" if found is None else f"{found.value:.2f}"
                ink = SOFT if good is None else "#ffffff" if good < 0.5 else "#101010"
                axes.text(x + 0.5, y + 0.52, text, ha="center", va="center", size=13, color=ink)
        for x, line in enumerate(columns):
            weight = "bold" if line.ours else "normal"
            place: dict[str, Any] = {"ha": "left", "va": "bottom", "rotation_mode": "anchor"}
            axes.text(x + 0.45, -0.12, line.name, rotation=40, weight=weight, size=12, **place)
        said = f"{about.title} of {len(columns)} defences on {len(rows)} attacks. {IN_TABLE}"
        return inline(figure, said, "heat")


def tradeoff(part: Part) -> str | None:
    """ASR against clean performance with each defence; None where nothing has both."""
    if part.level not in TRADE:
        return None
    asr, clean = TRADE[part.level]
    points = {
        line.name: [
            (a.value, b.value)
            for c in part.attacked
            if (a := part.of(c, line, asr)) and (b := part.of(c, line, clean))
        ]
        for line in part.defences
    }
    shown = [line.name for line in part.defences if points[line.name]]
    if not shown:
        return None
    plain = [
        (m.asr, m.clean)
        for c in part.attacked
        for m in c.passed
        if m.asr is not None and m.clean is not None
    ]
    with drawing(f"trade {part.level} {part.kind}"):
        figure, axes = _chart(len(shown) + 1)
        for name, (colour, marker) in zip(shown, _looks(), strict=False):
            each = np.array(points[name])
            look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none"}
            axes.plot(*each.T, **look, markersize=4.5, alpha=0.7, markeredgewidth=0)
            middle = each.mean(axis=0)[:, None]
            axes.plot(*middle, **look, markersize=10, markeredgecolor=INK, label=name)
        if plain:
            middle = np.mean(plain, axis=0)[:, None]
            axes.plot(*middle, "*", color=INK, markersize=12, linestyle="none", label="no defence")
        axes.set(xlim=(-0.04, 1.04), xlabel=metric(part.level, asr).title)
        axes.set_ylabel(metric(part.level, clean).title)
        low, high = axes.get_ylim()
        # A few wrong rows more or less must not look like a landslide.
        axes.set_ylim(min(low, high - LEAST_RANGE), max(high, low + LEAST_RANGE))
        _legend(figure, axes)
        said = (
            f"ASR against clean performance of {len(shown)} defences; the numbers are in the table."
        )
        return inline(figure, said, "chart-plot")


def curves(part: Part) -> list[tuple[str, str]]:
    """The leading number over the poison rate, for each attack that has several; with captions."""
    found: list[tuple[str, str]] = []
    for series in _series(part.attacked):
        svg = _curve(part, series, f"rates {part.level} {part.kind} {len(found)}")
        names = "; ".join(f"{c.label} ({c.group})" for c in series)
        found.append((f"{series[0].attack} on {series[0].base}: {names}.", svg))
    return found


def _curve(part: Part, series: Sequence[Condition], salt: str) -> str:
    about = metric(part.level, LEAD[part.level])
    with drawing(salt):
        figure, axes = _chart(len(part.defences))
        # Side by side, so that whiskers at the same rate do not cover each other.
        aside = np.linspace(1 / DODGE, DODGE, len(part.defences) + 2)[1:-1]
        for factor, line, (colour, marker) in zip(aside, part.defences, _looks(), strict=False):
            got = [(_rate(c), e) for c in series if (e := part.of(c, line, about.key))]
            if got:
                rates = [100 * rate * factor for rate, _ in got]
                values, spread = [e.value for _, e in got], _whiskers([e for _, e in got])
                look: dict[str, Any] = {"color": colour, "marker": marker, "label": line.name}
                axes.errorbar(rates, values, spread, capsize=2, elinewidth=1, **look)
        every = sorted({100 * _rate(c) for c in series})
        axes.set(xscale="log", ylim=(-0.04, 1.04), xlabel="poisoned rows in %", ylabel=about.title)
        axes.set_xticks(every, [f"{rate:g}" for rate in every])
        axes.set_xticks([], minor=True)
        _legend(figure, axes)
        said = f"{about.title} over the poison rate of {series[0].attack}. {IN_TABLE}"
        return inline(figure, said, "chart-plot")


def _series(attacked: Sequence[Condition]) -> list[list[Condition]]:
    """Conditions that differ in the poison rate alone, by rate; only where there are several."""
    groups: dict[str, list[Condition]] = {}
    for condition in attacked:
        recipe = condition.models[0].recipe
        if condition.passed and isinstance(recipe.get("rate"), int | float) and recipe["rate"] > 0:
            same = {k: v for k, v in recipe.items() if k not in ("rate", "seed", "split")}
            key = f"{condition.base} {condition.attack} {sorted(same.items())}"
            groups.setdefault(key, []).append(condition)
    return [
        sorted(group, key=_rate)
        for group in groups.values()
        if len({_rate(condition) for condition in group}) > 1
    ]


def _rate(condition: Condition) -> float:
    return float(condition.models[0].recipe["rate"])


def _whiskers(found: Sequence[Estimate]) -> list[list[float]]:
    """Distances to the interval's ends; none is negative, as a quantile may pass the value."""
    down = [max(0.0, each.value - each.low) for each in found]
    return [down, [max(0.0, each.high - each.value) for each in found]]


def _looks() -> Iterator[tuple[str, str]]:
    return zip(cycle(COLOURS), cycle(MARKERS), strict=False)


def _canvas(
    left: float, right: float, top: float, bottom: float, wide: float, high: float
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes of `wide` x `high` pixels within the given margins."""
    width, height = left + wide + right, bottom + high + top
    figure = Figure(figsize=(width * PIXEL, height * PIXEL))
    box = (left / width, bottom / height, wide / width, high / height)
    return figure, figure.add_axes(box)


def _chart(names: int) -> tuple[Figure, Axes]:
    """Axes of the page's usual size, with room for a legend of `names` below."""
    legend = LEGEND_LINE * ceil(names / 2) + 12
    return _canvas(68, 12, 10, 48 + legend, WIDTH - 80, HEIGHT - 58)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    look: dict[str, Any] = {"handlelength": 1.4, "columnspacing": 1.2, "handletextpad": 0.5}
    figure.legend(
        handles,
        names,
        loc="lower left",
        bbox_to_anchor=(0.0, 0.0),
        borderaxespad=0.2,
        ncols=2,
        labelspacing=0.45,
        fontsize=11,
        **look,
    )
