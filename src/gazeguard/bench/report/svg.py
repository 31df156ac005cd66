"""A matplotlib figure as SVG inside a page: the page's colours and font, no style, stable bytes.

The page's policy admits no inline style, so every style becomes an attribute; colours of `THEME`
become the page's variables and follow its dark and light dress; texts stay texts.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

INK, SOFT, GRID, CARD = "#010203", "#040506", "#070809", "#0a0b0c"
THEME = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--grid)", CARD: "var(--card)"}
PIXEL = 1 / 72  # inches: matplotlib's SVG has 72 units to the inch
_SPACE = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_USED = re.compile(r"url\(#([^)]+)\)")
_NO_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # characters that a name may bring along
# What the element's style sheet says of all elements, inherited from the root instead.
_ROOT = {"stroke-linejoin": "round", "stroke-linecap": "butt"}
_OURS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "figure.facecolor": "none",
    "legend.frameon": False,
}


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """Draw and save figures in here: no setting of the user's changes them.

    Args:
        salt: makes the ids of one figure differ from those of the page's others.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The browser's fonts draw the text: what matplotlib's own lacks is no matter.
        warnings.filterwarnings("ignore", message="Glyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_OURS, "svg.hashsalt": salt})
        yield


def inline(figure: Figure, label: str, kind: str) -> str:
    """The figure as an `svg` element.

    Args:
        figure: made within `drawing`, and saved within it.
        label: what somebody hears who does not see it.
        kind: the element's class.
    """
    stream = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=nothing)
    drawn = _NO_XML.sub("\N{REPLACEMENT CHARACTER}", stream.getvalue())
    root = ElementTree.fromstring(drawn)  # matplotlib's own text, nobody else's
    width, height = (f"{float(x):g}" for x in root.attrib["viewBox"].split()[2:])
    used = {name for node in root.iter() for name in _names(node)}
    for node in root.iter():
        _plain(node, used)
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in ("style", "metadata")]:
            parent.remove(child)
    root.attrib = {
        "class": f"plot {kind}",
        "viewBox": f"0 0 {width} {height}",
        "width": width,
        "height": height,
        "role": "img",
        "aria-label": label,
        **_ROOT,
    }
    return ElementTree.tostring(root, encoding="unicode")


def _names(node: ElementTree.Element) -> Iterator[str]:
    """Ids that an element points at."""
    yield from (name for value in node.attrib.values() for name in _USED.findall(value))
    if _LINK in node.attrib:
        yield node.attrib[_LINK].removeprefix("#")


def _plain(node: ElementTree.Element, used: set[str]) -> None:
    """Styles as attributes, no unused id, no name space, no space between elements."""
    node.tag = node.tag.removeprefix(f"{{{_SPACE}}}")
    found = dict(node.attrib)
    style = found.pop("style", "")
    for part in filter(None, (each.strip() for each in style.split(";"))):
        name, value = (side.strip() for side in part.split(":", 1))
        if name != "font-family":
            found[name] = THEME.get(value, value)
    if _LINK in found:
        found["href"] = found.pop(_LINK)
    if found.get("id") not in used:
        found.pop("id", None)
    if "d" in found:
        found["d"] = " ".join(found["d"].split())
    node.attrib = found
    node.tail = None
    if node.text and not node.text.strip():
        node.text = None
