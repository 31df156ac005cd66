"""The measurements: whole scans of toys, units of work at the true shape, scaling, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gazeguard.bench.amdet_speed import memory
from gazeguard.bench.amdet_speed.public import PublicWay, public_scan
from gazeguard.bench.amdet_speed.subject import Pair, Shape, Toys, random_pair
from gazeguard.bench.speed.instruments import Figure, Part, Spread, in_child, interleave, ratio
from gazeguard.data.prompts import built_in
from gazeguard.methods.amdet import Settings, scan_encoder
from gazeguard.methods.amdet.heldout import held_out
from gazeguard.methods.amdet.inversion import clean_outputs, invert
from gazeguard.methods.amdet.surface import surface
from gazeguard.types import Outcome

FASTER, MEMORY = 8.0, 1.5  # targets
_FEW = 4  # batch-1 passes that stand for all of them

PUBLIC = Settings(
    prompts=4000, points=50, surface_prompts=1, restarts=1, halving=0, patience=0, padding=True
)
"""How the public way works: its amounts of everything, with our loss, so that verdicts compare."""

WAYS = {
    "default": Settings(),
    "as many prompts and steps": replace(Settings(), prompts=PUBLIC.prompts, patience=0),
    "as many prompts, steps and restarts": replace(
        Settings(), prompts=PUBLIC.prompts, patience=0, restarts=1
    ),
}
"""Ours, as users get it, and with ever more amounts of the public way."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        prompts: at most, of a whole scan of a toy.
        points: of every landscape, a side; None as the settings say.
        repeats: of the units of work.
        counts: prompts of the scans that show scaling.
        restarts: of the scans that show scaling, beside one restart.
        widths: of encoders of the true depth.
        memory: repeats of the peaks.
    """

    prompts: int = 4000
    points: int | None = None
    repeats: int = 2
    counts: tuple[int, ...] = (500, 1000, 2000, 4000)
    restarts: tuple[int, ...] = (2, 4, 8)
    widths: tuple[int, ...] = (256, 512, 768)
    memory: int = 2


def whole_scans(made: Toys, effort: Effort) -> Part:
    """Both ways from end to end on a backdoored and a benign toy: seconds, and the same verdict.

    A round before them is not needed: a scan is hundreds of steps, its set-up is nothing beside.
    """
    prompts = built_in(effort.prompts)
    changes = _coarse(effort)
    truth = [Outcome.FLAGGED, Outcome.CLEAN]
    seconds: dict[str, list[float]] = {name: [] for name in ("public", *WAYS)}
    outcomes: dict[str, list[str]] = {name: [] for name in seconds}
    steps: dict[str, list[int]] = {name: [] for name in WAYS}
    phases = []
    for suspect in (made.backdoored, made.benign):
        began = time.perf_counter()
        public = public_scan(suspect, made.anchor, prompts, replace(PUBLIC, **changes))
        seconds["public"].append(time.perf_counter() - began)
        outcomes["public"].append(str(public.verdict.outcome))
        phases.append(public.seconds)
        for name, settings in WAYS.items():
            began = time.perf_counter()
            found = scan_encoder(suspect, made.anchor, prompts, replace(settings, **changes))
            seconds[name].append(time.perf_counter() - began)
            outcomes[name].append(str(found.verdict.outcome))
            steps[name].append(len(found.losses))
    figures = [
        Figure("toy, public way: whole scan", "s", Spread.of(seconds["public"])),
        *(
            Figure(
                f"toy, public way / {name}: whole scan",
                "x",
                ratio(seconds["public"], seconds[name]),
                at_least=FASTER,
            )
            for name in WAYS
        ),
    ]
    for name in WAYS:
        pairs = zip(outcomes[name], outcomes["public"], strict=True)
        same = sum(one == other for one, other in pairs)
        title = f"toys that {name} decides as the public way does, of 2"
        figures.append(Figure(title, "toys", Spread.of([same]), at_least=2))
        right = sum(said == true for said, true in zip(outcomes[name], truth, strict=True))
        title = f"toys that {name} decides rightly, of 2"
        figures.append(Figure(title, "toys", Spread.of([right]), at_least=2))
    raw = {
        "seconds": seconds,
        "outcomes": outcomes,
        "steps": steps,
        "public_phases": phases,
        "backdoor_took": made.took,
    }
    return figures, raw


def true_shape(shape: Shape, effort: Effort) -> Part:
    """A step, held-out prompts and landscape points at the true shape; whole scans from these.

    A whole scan in the public way would take hours on a CPU. Its parts are loops over equal
    steps, so a few of each, times how many there are, is what it takes.
    """
    pair = random_pair(shape)
    used = PUBLIC.prompts
    held = round(PUBLIC.held_out * used)
    steps = 2 * (used - held) // PUBLIC.batch
    parts = {"public": _public_units(pair)} | {
        name: _our_units(pair, settings)
        for name, settings in WAYS.items()
        if settings.patience == 0
    }
    runs = {f"{way}: {part}": run for way, units in parts.items() for part, run in units.items()}
    taken = interleave(runs, effort.repeats)
    often = {
        "public": {"search": steps, "held-out": held, "landscape": PUBLIC.points**2},
        **{
            name: {
                **{f"search of {r}": n for r, n in _schedule(settings, steps).items()},
                "held-out": held,
                "landscape": settings.points**2,
                "clean": used,
            }
            for name, settings in WAYS.items()
        },
    }

    def seconds_of(way: str, part: str) -> list[float]:
        """Of all units whose name begins so, per repeat."""
        units = [unit for unit in parts[way] if unit.startswith(part)]
        return [
            sum(often[way][u] * taken[f"{way}: {u}"][i] / _amount(way, u) for u in units)
            for i in range(effort.repeats)
        ]

    totals = {way: seconds_of(way, "") for way in parts}
    of = f"{shape.layers} layers x {shape.width}"
    figures = [
        Figure(f"{of}, public way: whole scan, from its parts", "s", Spread.of(totals["public"]))
    ]
    for way in parts:
        if way == "public":
            continue
        figures.append(
            Figure(
                f"{of}, public way / {way}: whole scan, from its parts",
                "x",
                ratio(totals["public"], totals[way]),
                at_least=FASTER,
            )
        )
        for part in parts["public"]:
            name = f"{of}, public way / {way}: {part}"
            both = seconds_of("public", part), seconds_of(way, part)
            figures.append(Figure(name, "x", ratio(*both)))
    return figures, {"seconds": taken, "whole_scan_seconds": totals}


def scaling(effort: Effort, depth: int) -> Part:
    """Whole scans over prompts and restarts, steps over widths."""
    small = random_pair(Shape(128, 4, 4, 2000))
    prompts = built_in(max(effort.counts))
    shown: list[Figure] = []

    def once(name: str, run: Callable[[], object]) -> None:
        began = time.perf_counter()
        run()
        shown.append(Figure(name, "s", Spread.of([time.perf_counter() - began])))

    for n in effort.counts:
        settings = Settings(prompts=n, restarts=1, patience=0, **_coarse(effort))
        run = partial(scan_encoder, small.suspect, small.anchor, prompts, settings)
        once(f"4 layers x 128, 1 restart: whole scan of {n:,} prompts", run)
    few = min(effort.counts)
    for r in effort.restarts:
        settings = Settings(prompts=few, restarts=r, halving=0, patience=0, **_coarse(effort))
        run = partial(scan_encoder, small.suspect, small.anchor, prompts, settings)
        once(f"4 layers x 128, {r} restarts: whole scan of {few:,} prompts", run)
    for width in effort.widths:
        pair = random_pair(Shape(width, depth, width // 64, 2000))
        search = _our_units(pair, replace(Settings(), restarts=1))["search of 1"]
        search()
        once(f"{depth} layers x {width}, 1 restart: {_STEPS} steps of the search", search)
    return shown, {}


def peaks(shape: Shape, effort: Effort, threads: int) -> Part:
    """Added peak memory of a scan beside that of one step, of the search and of training."""
    arguments = {
        "shape": [shape.width, shape.layers, shape.heads, shape.vocabulary, shape.length],
        "repeats": effort.memory,
        "threads": threads,
    }
    found: dict[str, list[float]] = in_child(memory.__name__, arguments, threads)
    of = f"{shape.layers} layers x {shape.width}"
    figures = [
        Figure(
            f"{of}, scan (default) / {step}: added peak memory",
            "x",
            ratio(found["scan"], found[step]) if found["scan"] and found[step] else None,
            at_most=MEMORY,
        )
        for step in memory.STEPS
    ]
    return figures, {"added_peak_MiB": found}


def _coarse(effort: Effort) -> dict[str, Any]:
    """What a quick run changes in every setting."""
    return {} if effort.points is None else {"points": effort.points}


_JUDGED, _PLACES, _PLAIN = 40, 4, 120
_STEPS = _PLAIN // PUBLIC.batch  # a whole pass, so that prompts of every length are in it


def _amount(way: str, part: str) -> int:
    """How many of a part one call of its unit does."""
    if part.startswith("search"):
        return 1 if way == "public" else _STEPS
    if way == "public":
        return _FEW
    return {"held-out": _JUDGED, "landscape": _PLACES**2, "clean": _PLAIN}[part]


def _schedule(settings: Settings, steps: int) -> dict[int, int]:
    """How many of `steps` the search does with how many restarts."""
    left, found = settings.restarts, {}
    while settings.halving and left > 1 and steps > settings.halving:
        found[left] = settings.halving
        steps -= settings.halving
        left //= 2
    return {**found, left: steps}


def _public_units(pair: Pair) -> dict[str, Callable[[], object]]:
    prompts = built_in(_PLAIN)
    slotted, plain = (pair.suspect.tokenise(prompts, slot=slot) for slot in (True, False))
    way = PublicWay(pair.suspect, pair.anchor, slotted, plain, PUBLIC)
    vector = pair.suspect.embeddings[0].clone()
    rows: Sequence[int] = range(len(prompts))
    return {
        "search": partial(way.search, rows, vector, 1),
        "held-out": partial(way.judge, rows[:_FEW], vector),
        "landscape": partial(way.landscape, 0, vector, _FEW),
    }


def _our_units(pair: Pair, settings: Settings) -> dict[str, Callable[[], object]]:
    suspect, anchor = pair.suspect, pair.anchor
    prompts = built_in(_PLAIN)
    slotted, plain = (suspect.tokenise(prompts, slot=slot) for slot in (True, False))
    vectors = suspect.embeddings[:1].clone()
    few = settings.surface_prompts
    grid = replace(settings, points=_PLACES)

    return {
        **{
            f"search of {r}": partial(
                invert,
                suspect,
                anchor,
                slotted,
                plain,
                replace(settings, steps=_STEPS, restarts=r, halving=0),
            )
            for r in _schedule(settings, 10 * _STEPS)
        },
        "held-out": partial(held_out, suspect, anchor, slotted[:_JUDGED], vectors, settings),
        "landscape": partial(
            surface, suspect, anchor, slotted[:few], plain[:few], vectors[0], grid
        ),
        # The suspect's are part of the search.
        "clean": partial(clean_outputs, anchor, plain, settings.rows),
    }
