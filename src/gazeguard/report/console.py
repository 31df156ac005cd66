"""The short terminal summary at the end of `gazeguard clean`; says everything without colour."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gazeguard.report import words
from gazeguard.report.model import (
    NO_PICTURE,
    CleanReport,
    explanation,
    headline,
    near_misses,
    selected_layers,
)
from gazeguard.types import Outcome

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLE = {
    Outcome.CLEAN: "bold green",
    Outcome.FLAGGED: "bold red",
    Outcome.INCONCLUSIVE: "bold yellow",
}
SHOWN_REASONS = 3
SHOWN_LAYERS = 12
SHOWN_ROWS = 10


def render_console(report: CleanReport) -> RenderableType:
    """Verdict, counts, layers used, reasons of skipped rows and files, in about ten lines."""
    result, counts = report.result, report.counts
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        "Rows",
        Text(
            f"{words.count(counts['rows'])} read: {words.count(counts['kept'])} kept, "
            f"{words.count(counts['removed'])} removed "
            f"({words.share(counts['removed'], counts['rows'])}), "
            f"{words.count(counts['skipped'])} skipped"
        ),
    )
    if counts["suspected"]:
        suspected = f"{words.count(counts['suspected'])} of the kept rows suspected"
        table.add_row("", Text(f"{suspected}: --remove suspected takes them out"))
    if counts["text_only"]:
        table.add_row("", Text(f"{words.count(counts['text_only'])} kept: {NO_PICTURE}"))
    table.add_row("Method", Text(f"{result.method}, rule {result.rule}"))
    table.add_row("Layers", Text(_layers(report)))
    for label, text in (*_near_misses(report), *_skipped(report)):
        table.add_row(label, Text(text))
    for proof in report.proofs:
        table.add_row("Trigger", Text(proof.sentence))
    for i, (name, path) in enumerate(report.files.items()):
        table.add_row("Files" if i == 0 else "", Text(f"{name}: {path}"))
    lines: list[RenderableType] = [
        Text(headline(report) + ".", style=_STYLE[result.verdict.outcome])
    ]
    why = explanation(report)
    if why:
        lines.append(Text(why))
    return Group(*lines, Text(), table)


def _layers(report: CleanReport) -> str:
    used = selected_layers(report)
    if not used:
        return f"none of {len(report.layers)} used"
    best = max(
        (stat for stat in report.result.layer_stats if stat.selected), key=lambda stat: stat.bsi
    )
    named = ", ".join(map(str, used[:SHOWN_LAYERS])) + (", …" if len(used) > SHOWN_LAYERS else "")
    return (
        f"{len(used)} of {len(report.layers)} used ({named}); strongest separation "
        f"{words.number(best.bsi)} in layer {best.layer}"
    )


def _near_misses(report: CleanReport) -> list[tuple[str, str]]:
    """Rows with the target's words that only these gave away, and those that were kept."""
    lines = []
    for removed, what in ((False, "kept, though"), (True, "removed, as")):
        found = near_misses(report, removed=removed)
        if found:
            rows = ", ".join(report.name(m.place) for m in found[:SHOWN_ROWS])
            more = f" and {words.count(len(found) - SHOWN_ROWS)} more" if found[SHOWN_ROWS:] else ""
            said = ", ".join(f"“{phrase}”" for phrase in dict.fromkeys(m.phrase for m in found))
            number = words.plural(len(found), "row")
            lines.append(("Same words", f"{number} {what} the answer says {said}: {rows}{more}"))
    return lines


def _skipped(report: CleanReport) -> list[tuple[str, str]]:
    kinds = Counter(words.reason_kind(row.reason) for row in report.skipped)
    example = {words.reason_kind(row.reason): row.reason for row in reversed(report.skipped)}
    common = kinds.most_common(SHOWN_REASONS)
    lines = [
        ("Skipped" if i == 0 else "", f"{words.count(n)}: {words.shorten(example[kind], 160)}")
        for i, (kind, n) in enumerate(common)
    ]
    rest = sum(kinds.values()) - sum(n for _, n in common)
    if rest:
        lines.append(("", f"{words.count(rest)} for other reasons, see reasons.jsonl"))
    return lines
