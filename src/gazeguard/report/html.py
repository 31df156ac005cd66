"""`report.html`: one self-contained page for people, with no network access at all.

Size is bounded whatever the data set's: binned scores, at most `MAX_ROWS` table rows with
thumbnails of about 3 KB, at most `MAX_GALLERY` large pictures. Everything that comes from the data
set is escaped twice over: Jinja's autoescape for text, `<`, `>`, `&` as Unicode escapes inside
the embedded JSON; a Content-Security-Policy with the hashes of our own script and style stops
whatever would slip through.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gazeguard._version import __version__
from gazeguard.jsonable import jsonable
from gazeguard.report.files import write_atomic
from gazeguard.report.model import CleanReport, Thumbnails, headline
from gazeguard.report.page import page_data, page_text
from gazeguard.report.template import asset, environment, policy, script

MAX_ROWS = 500
MAX_GALLERY = 12

_SCRIPTS = ("base.js", "plot.js", "charts.js", "heat.js", "table.js", "removed.js")


def embeddable(value: Any) -> str:
    """JSON that is inert inside a `<script type="application/json">` element."""
    text = json.dumps(jsonable(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def render_html(
    report: CleanReport,
    thumbnails: Thumbnails | None = None,
    *,
    max_rows: int = MAX_ROWS,
    max_gallery: int = MAX_GALLERY,
) -> str:
    """The whole page as text.

    Args:
        report: what to show.
        thumbnails: gives the images of flagged rows, asked for in small groups so that only a few
            are in memory at a time; without it the table has no pictures.
        max_rows: rows in the table, the most suspicious first.
        max_gallery: rows shown large with their heat maps.
    """
    code, style = script(*_SCRIPTS), asset("report.css")
    data = page_data(report, thumbnails, max_rows=max_rows, max_gallery=max_gallery)
    page = environment().get_template("report.html")
    return page.render(
        headline=headline(report),
        policy=policy(code, style),
        script=code,
        style=style,
        data=embeddable(data),
        version=__version__,
        **page_text(report, data, max_gallery=max_gallery),
    )


def write_html(
    report: CleanReport,
    path: str | Path,
    thumbnails: Thumbnails | None = None,
    *,
    max_rows: int = MAX_ROWS,
    max_gallery: int = MAX_GALLERY,
) -> Path:
    """Write the page in one step; arguments as in `render_html`.

    Raises:
        UsageError: the file cannot be written.
    """
    text = render_html(report, thumbnails, max_rows=max_rows, max_gallery=max_gallery)
    return write_atomic(path, text)
