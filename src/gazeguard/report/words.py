"""Numbers and texts as a reader of the page sees them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_VARIABLE_PART = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\S*[/\\]\S*|\b\d[\d,.]*\b")


def count(value: int) -> str:
    """`12345` -> `12,345`."""
    return f"{value:,}"


def share(part: int, whole: int) -> str:
    """A percentage that never rounds something to 0 % nor nearly everything to 100 %."""
    if whole == 0 or part == 0:
        return "0 %"
    if part == whole:
        return "100 %"
    percent = 100 * part / whole
    if percent < 0.1:
        return "< 0.1 %"
    if percent > 99.9:
        return "> 99.9 %"
    return f"{percent:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    """Fixed digits; an en dash where there is no number."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def plain(value: float | None) -> str:
    """As few digits as it takes; an en dash where there is no number."""
    return "–" if value is None or not math.isfinite(value) else f"{value:g}"


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, cut with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def plural(n: int, one: str, many: str | None = None) -> str:
    """`3 rows`, `1 row`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def reason_kind(reason: str) -> str:
    """A reason without its file names, quotations and numbers, so equal kinds group together."""
    return _VARIABLE_PART.sub("…", reason).strip()


def row_name(row: int, turn: int | None) -> str:
    """`1,234`, or `1,234, turn 2` for one of several answers."""
    return count(row) if turn is None else f"{count(row)}, turn {turn}"


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as `dotted.key`, text pairs; the entries of a list of objects are numbered."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, list) and item and all(isinstance(each, Mapping) for each in item):
            item = {str(place): each for place, each in enumerate(item, 1)}
        if isinstance(item, Mapping) and item:
            pairs.extend(flatten(item, f"{name}."))
        else:
            pairs.append((name, shorten(_said(item), 400)))
    return pairs


def _said(value: Any) -> str:
    """A JSON value in words."""
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        nested = any(isinstance(each, list) for each in value)
        return ("; " if nested else ", ").join(map(_said, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
