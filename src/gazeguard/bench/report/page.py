"""`table.html`: one self-contained page with pictures and tables, no script and no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gazeguard._version import __version__
from gazeguard.bench.report import plots, sections
from gazeguard.bench.report.conditions import Part
from gazeguard.bench.report.quantities import LEAD, metric
from gazeguard.bench.report.stored import StoredRun
from gazeguard.report.template import asset, environment, policy

LONG = 12  # rows of a table that is folded away at first


def render_html(run: StoredRun, found: Sequence[Part]) -> str:
    """The file's text."""
    style = asset("report.css") + asset("bench.css")
    rest = [
        ("Attacks", sections.attacks(run)),
        ("Attacks that failed", sections.failed(run)),
        ("Cells without a number, and why", sections.missing(run, found)),
    ]
    return (
        environment()
        .get_template("bench.html")
        .render(
            headline=run.title,
            lede=sections.what_was_run(run),
            against=sections.against(run, found),
            parts=[_part(run, part) for part in found],
            rest=[(title, table) for title, table in rest if table],
            reading=sections.READING,
            long=LONG,
            policy=policy("", style),
            style=style,
            version=__version__,
        )
    )


def _part(run: StoredRun, part: Part) -> dict[str, Any]:
    lead = metric(part.level, LEAD[part.level])
    return {
        "title": sections.heading(part),
        "name": f"{part.level}-{part.kind}",
        "lead": lead,
        "heat": plots.heat(part, [sections.group_of(c, run) for c in part.attacked])
        if part.attacked
        else None,
        "trade": plots.tradeoff(part),
        "curves": plots.curves(part),
        "tables": [
            ("Means over all attacks", sections.means(part)),
            ("All numbers", sections.numbers(run, part)),
            ("Published figures beside ours", sections.printed(run, part)),
        ],
    }
