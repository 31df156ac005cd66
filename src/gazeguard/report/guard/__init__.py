"""Reports of a guarded run: followed request by request, written as a page and as JSON."""

from gazeguard.report.guard.html import render_html
from gazeguard.report.guard.json import render_json
from gazeguard.report.guard.model import GuardReport, Request
from gazeguard.report.guard.record import Recorder

__all__ = ["GuardReport", "Recorder", "Request", "render_html", "render_json"]
