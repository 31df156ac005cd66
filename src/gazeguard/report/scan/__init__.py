"""Reports of `gazeguard scan`: one writer per format, all from the same `ScanReport`."""

from gazeguard.report.scan.html import render_html
from gazeguard.report.scan.json import render_json
from gazeguard.report.scan.junit import render_junit
from gazeguard.report.scan.sarif import render_sarif

WRITERS = {
    "json": render_json,
    "sarif": render_sarif,
    "junit": render_junit,
    "html": render_html,
}
"""Format name -> a function from the report to the text of its file."""

__all__ = ["WRITERS", "render_html", "render_json", "render_junit", "render_sarif"]
