"""The summary at the end of `gazeguard scan`; says everything without colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gazeguard.report import words
from gazeguard.report.scan.text import headline, left_out, suspicion
from gazeguard.scanning.result import ScannedModel, ScanReport

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLE = {"clean": "bold green", "flagged": "bold red"}
_OTHER = "bold yellow"
_DETAILED = 3  # models that are told about in full; a longer list has its reports for that


def render_console(report: ScanReport) -> RenderableType:
    """A sentence, a table of all models, and what a short list rests on."""
    parts: list[RenderableType] = [
        Text(headline(report) + ".", style=_STYLE.get(report.outcome, _OTHER))
    ]
    if len(report.models) > 1:
        parts += [Text(), _table(report)]
    detailed = len(report.models) <= _DETAILED
    for model in report.models:
        if detailed or model.outcome not in ("clean",):
            parts += [Text(), *_model(model, detailed, len(report.models) > 1)]
    return Group(*parts)


def _table(report: ScanReport) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("model", overflow="fold")
    table.add_column("outcome", no_wrap=True)
    table.add_column("suspicion", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    for model in report.models:
        table.add_row(
            Text(model.model),
            Text(model.outcome, style=_STYLE.get(model.outcome, _OTHER)),
            words.number(suspicion(model)),
            words.number(model.numbers.get("score")),
        )
    return table


def _model(model: ScannedModel, detailed: bool, named: bool) -> list[RenderableType]:
    lines: list[RenderableType] = []
    if named:
        lines.append(Text(model.model, style="bold"))
    lines.append(Text(model.reason))
    lines += [Text(line) for line in left_out(model)]
    if not detailed:
        return lines
    if model.checks:
        if not any(check.decides for check in model.checks):
            lines.append(Text("The paper's gates, which do not decide here:", style="dim"))
        table = Table.grid(padding=(0, 2))
        for check in model.checks:
            table.add_row(
                Text(check.name, style="dim"),
                words.number(check.value, 3),
                f"needs > {check.threshold:g}",
                "met" if check.passed else "not met",
            )
        lines.append(table)
    if model.verdict is not None:
        lines += [Text(f"- {finding.message}") for finding in model.verdict.evidence]
    lines += [Text(f"{what}: {path}") for what, path in model.files.items()]
    return lines
