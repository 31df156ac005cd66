"""A run as sections of plain text tables: what `table.md` and the page both say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gazeguard.bench.report.bootstrap import Estimate, over_counts
from gazeguard.bench.report.compared import beside, margins, mean_over
from gazeguard.bench.report.conditions import NOT_APPLICABLE, Condition, Part, conditions
from gazeguard.bench.report.quantities import KINDS, METRICS, Metric
from gazeguard.bench.report.stored import StoredRun
from gazeguard.report.words import plural

NOTHING = "-"
QUESTIONS = {
    "data": "Data: which rows are poisoned?",
    "input": "Inputs: is a trigger seen, and the answer saved?",
    "model": "Models: which ones carry a backdoor?",
}
READING = (
    "A condition is one attack (or none) on one set and base; its runs differ in the seed, and in"
    " what neither name tells (ranks and learning rates of a zoo). Numbers are means over runs"
    " whose attack took; the others are listed with the reason.",
    "In brackets: a 95 % bootstrap interval in two stages, runs and then the rows within a run"
    " (whole models, where models are judged). Behind it: runs x rows that the number rests on. Two"
    " or three runs tell little of how runs differ, one run nothing; a share of 0 or 1 in every run"
    " has an interval without width.",
    "ASR: share of triggered inputs that get the attacker's answer. Right: share of exact answers."
    " Precision, recall and F1 are 0 where nothing is flagged. F1 and AUROC over models are"
    " against all benign models of the same base; a model that could not be judged counts as not"
    " flagged, and is in no AUROC.",
    "Means over conditions weigh each condition alike; their intervals are over runs and rows, not"
    " over attacks that were not tried.",
)
MARGIN_NOTE = (
    "Positive: ours is better. Means over the attacks on which both have a number. Published"
    " margins are the papers' own, of DIFFERENT and much larger MODELS."
)
BESIDE_NOTE = "The published figures are of DIFFERENT MODELS than ours: same attack, other scale."


@dataclass(frozen=True, slots=True)
class Table:
    """Column titles and rows of text; `keys` columns at the left name a row."""

    titles: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    keys: int = 1
    note: str = ""


def what_was_run(run: StoredRun) -> str:
    """How much of the suite is there, at which commit, on which machine."""
    asked = [c for c in run.cells.values() if not (c.why or "").startswith(NOT_APPLICABLE)]
    there = sum(cell.result is not None for cell in asked)
    took = sum(model.passed for model in run.models)
    said = (
        f"Suite {run.name}: {took} of {plural(len(run.models), 'model')} in use,"
        f" {there:,} of {plural(len(asked), 'cell')} with numbers"
    )
    if not run.commits:
        return f"{said}."
    return f"{said}; commit {', '.join(run.commits)}; {'; '.join(run.machines)}."


def everything(run: StoredRun, found: Sequence[Part]) -> list[tuple[str, Table]]:
    """All tables with their titles, the summary first."""
    titled = [("Ours against baselines", against(run, found))]
    for part in found:
        titled += [
            (heading(part), means(part)),
            (f"All numbers. {heading(part)}", numbers(run, part)),
            (f"Published figures beside ours. {heading(part)}", printed(run, part)),
        ]
    titled += [
        ("Attacks", attacks(run)),
        ("Attacks that failed", failed(run)),
        ("Cells without a number, and why", missing(run, found)),
    ]
    return [(title, table) for title, table in titled if table]


def told(found: Estimate | None, models: bool = False, signed: bool = False) -> str:
    """A number, its interval and what it rests on; `-` for none."""
    if found is None:
        return NOTHING
    behind = plural(found.n, "model") if models else f"{found.runs} x {found.n // found.runs:,}"
    if not models and found.n % found.runs:
        behind = f"{plural(found.runs, 'run')}, {found.n:,}"
    return f"{_interval(found, signed)} ({behind})"


def heading(part: Part) -> str:
    """What a part is about."""
    return f"{QUESTIONS[part.level]} ({KINDS[part.kind]})"


def group_of(condition: Condition, run: StoredRun) -> str:
    """The group, and the base where its kind of model has several: one goes without saying."""
    kind = condition.models[0].kind
    several = len({model.base for model in run.models if model.kind == kind}) > 1
    said = (condition.group, condition.base if several or not condition.group else "")
    return ", ".join(word for word in said if word)


def against(run: StoredRun, found: Sequence[Part]) -> Table | None:
    """Margins of ours over each baseline; None without ours, baselines or numbers."""
    rows: list[tuple[str, ...]] = []
    pairs = [(part, each) for part in found for each in margins(part, run.published)]
    for part, each in pairs:
        printed = NOTHING
        if each.published is not None:
            printed = f"{each.published:+.3f} ({each.where}; {plural(each.figures, 'figure')})"
        runs = plural(each.runs, "model" if part.level == "model" else "run")
        rows.append(
            (
                part.level if part.kind == "vlm" else f"{part.level}, {KINDS[part.kind]}",
                each.ours.name,
                each.baseline.name,
                each.metric.title,
                _interval(each.margin, signed=True),
                f"{each.mine.value:.3f}",
                f"{each.theirs.value:.3f}",
                f"{plural(each.conditions, 'attack')}, {runs}",
                printed,
            )
        )
    titles = (
        *("level", "ours", "baseline", "metric", "margin", "mean of ours", "of the baseline"),
        *("over", "published margin, different models"),
    )
    return Table(titles, rows, 3, MARGIN_NOTE) if rows else None


def means(part: Part) -> Table:
    """Every defence's means over the attacks, and over benign models."""
    benign = [condition for condition in part.conditions if not condition.backdoored]
    columns = [
        (f"{metric.title}{', clean models' if where is benign else ''}", where, metric)
        for where in (part.overview, benign)
        for metric in METRICS[part.level]
        if any(mean_over(part, where, line, metric.key)[1] for line in part.defences)
    ]
    rows = []
    for line in part.defences:
        cells = [line.name, "yes" if line.ours else "", line.about]
        for _, where, metric in columns:
            mean, n = mean_over(part, where, line, metric.key)
            cells.append(f"{_interval(mean)} ({n})" if mean else NOTHING)
        rows.append(tuple(cells))
    titles = ("defence", "ours", "what it is", *(title for title, _, _ in columns))
    return Table(titles, rows, 1, "In round brackets: the number of conditions.")


def numbers(run: StoredRun, part: Part) -> Table:
    """Every number of every condition."""
    shown = [
        metric
        for metric in METRICS[part.level]
        if any(metric.key in found for found in part.found.values())
    ]
    rows = []
    for condition in part.conditions:
        for line in part.defences:
            found = [part.of(condition, line, metric.key) for metric in shown]
            cells = [told(each, part.level == "model") for each in found]
            rows.append((condition.label, group_of(condition, run), line.name, *cells))
    titles = ("attack", "set", "defence", *(_better(m) for m in shown))
    return Table(titles, rows, 3, "Behind each number: runs x rows." if rows else "")


def printed(run: StoredRun, part: Part) -> Table | None:
    """Published figures beside ours; None without any."""
    rows = []
    for each in beside(part, run.published):
        ours = f"{_interval(each.ours)} ({each.conditions})" if each.ours else NOTHING
        said = each.published
        cells = (said.defence, said.attack, each.metric.title, f"{said.value:.3f}", ours)
        rows.append((*cells, said.where))
    titles = ("defence", "attack", "metric", "published", "ours (conditions)", "published in")
    return Table(titles, rows, 2, BESIDE_NOTE) if rows else None


def attacks(run: StoredRun) -> Table:
    """What was attacked, how many runs took, and how well."""
    rows = []
    for each in conditions(run.models):
        cells = (each.label, each.group, each.base, f"{len(each.passed)} of {len(each.models)}")
        clean, asr = (_share(each, which) for which in ("clean", "asr"))
        rows.append((*cells, told(clean), told(asr)))
    titles = ("attack", "set", "base", "runs that took", "clean right", "ASR")
    return Table(titles, rows, 3)


def failed(run: StoredRun) -> Table | None:
    """Models whose attack did not take: in no mean."""
    rows = [
        (
            condition.label,
            group_of(condition, run),
            model.name,
            NOTHING if model.clean is None else f"{model.clean:.3f}",
            NOTHING if model.asr is None else f"{model.asr:.3f}",
            NOTHING if model.n is None else f"{model.n:,}",
            model.why or "attack failed",
        )
        for condition in conditions(run.models)
        for model in condition.models
        if not model.passed
    ]
    titles = ("attack", "set", "model", "clean right", "ASR", "rows", "why")
    return Table(titles, rows, 3) if rows else None


def missing(run: StoredRun, found: Sequence[Part]) -> Table | None:
    """Every cell that lacks, and why."""
    cells: dict[tuple[Condition, str, str, int], list[str]] = {}
    for each in (each for part in found for each in part.missing):
        key = (each.condition, each.what, each.why, each.models)
        cells.setdefault(key, []).append(each.defence.name)
    rows = [
        (
            condition.label,
            group_of(condition, run),
            f"{models} of {len(condition.models)}",
            ", ".join(names),
            what,
            why,
        )
        for (condition, what, why, models), names in cells.items()
    ]
    titles = ("attack", "set", "models", "defences", "what lacks", "why")
    return Table(titles, rows, 2) if rows else None


def _share(condition: Condition, which: str) -> Estimate | None:
    """Clean performance or ASR of the runs that took, before any defence."""
    rows = []
    for model in condition.passed:
        share = model.clean if which == "clean" else model.asr
        if share is not None and model.n:
            hits = round(share * model.n)
            rows.append([[hits, model.n - hits]])
    if not rows:
        return None
    counts = np.array(rows)
    n = int(counts.sum())
    place = f"{condition.key} | {which}"
    return over_counts(
        counts, lambda c: c[..., 0, 0] / c[..., 0, :].sum(-1), condition.key, [place], n
    )


def _interval(found: Estimate, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _better(metric: Metric) -> str:
    return f"{metric.title} ({'more' if metric.more else 'less'} is better)"
