"""Ours against the baselines, and both against what papers publish (of other, larger models)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from gazeguard.bench.report.bootstrap import Estimate, less, mean_of
from gazeguard.bench.report.conditions import Condition, Part
from gazeguard.bench.report.quantities import COMPARED, LEAD, Metric, metric
from gazeguard.bench.report.stored import Line, Published

PAPERS = ("-paper", "-published")  # a paper's own setting of our `bye` is the defence `bye-paper`


@dataclass(frozen=True, slots=True)
class Margin:
    """By how much one of ours beats a baseline; positive: ours is better, whatever the metric.

    Attributes:
        conditions: on which both have a number; the means are over these.
        runs: of ours on them, backdoored models at the level of models.
        mine, theirs: means over the conditions.
        margin: the difference on the same runs.
        published: the same margin in print, the mean over `figures` pairs, or None.
        where: which tables, no pair goes across two.
    """

    metric: Metric
    ours: Line
    baseline: Line
    conditions: int
    runs: int
    mine: Estimate
    theirs: Estimate
    margin: Estimate
    published: float | None
    figures: int
    where: str


@dataclass(frozen=True, slots=True)
class Beside:
    """A published figure and our mean over the conditions of the same attack, None without any."""

    published: Published
    metric: Metric
    ours: Estimate | None
    conditions: int


def mean_over(
    part: Part, where: Sequence[Condition], defence: Line, key: str
) -> tuple[Estimate | None, int]:
    """A metric's mean over the conditions that have it, and how many these are."""
    found = [e for c in where if (e := part.of(c, defence, key)) is not None]
    return (mean_of(found) if found else None), len(found)


def margins(part: Part, published: Sequence[Published]) -> list[Margin]:
    """Every method of ours against every baseline of its level, by the metrics of `COMPARED`."""
    ours, others = ([d for d in part.defences if d.ours == which] for which in (True, False))
    found = []
    for key, mine, other in product(COMPARED[part.level], ours, others):
        pairs = [
            (a, b, part.of(c, mine, LEAD[part.level]) or a if part.level == "model" else a)
            for c in part.overview
            if (a := part.of(c, mine, key)) is not None
            and (b := part.of(c, other, key)) is not None
        ]
        if not pairs:
            continue
        one, two = (mean_of([each[side] for each in pairs]) for side in (0, 1))
        about = metric(part.level, key)
        printed = _published(published, key, mine, other)
        sign = 1 if about.more else -1
        found.append(
            Margin(
                about,
                mine,
                other,
                len(pairs),
                sum(lead.runs for _, _, lead in pairs),
                one,
                two,
                less(one, two) if about.more else less(two, one),
                sign * float(np.mean([gap for gap, _ in printed])) if printed else None,
                len(printed),
                "; ".join(dict.fromkeys(where for _, where in printed)),
            )
        )
    return found


def beside(part: Part, published: Sequence[Published]) -> list[Beside]:
    """The published figures of the part's defences, each with ours of the same attack."""
    lines = {line.name: line for line in part.defences}
    found = []
    for each in published:
        if each.defence not in lines:
            continue
        about = metric(part.level, each.metric)
        same = [c for c in part.conditions if c.attack == each.attack]
        mean, n = mean_over(part, same, lines[each.defence], each.metric)
        found.append(Beside(each, about, mean, n))
    return found


def _published(
    published: Sequence[Published], key: str, ours: Line, other: Line
) -> list[tuple[float, str]]:
    """What the method of a paper gains on a baseline, per attack and table; and that table."""
    names = (ours.name, *(ours.name + end for end in PAPERS))
    mine, theirs = (
        {(p.attack, p.where): p.value for p in published if p.metric == key and p.defence in who}
        for who in (names, (other.name,))
    )
    if other.name in names:
        return []
    return [(mine[place] - theirs[place], place[1]) for place in mine if place in theirs]
