"""What all pages share: templates, the style sheet, and a policy that admits only our own text."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined

from gazeguard.report import words


def asset(name: str) -> str:
    """A file of the templates folder."""
    return resources.files("gazeguard.report").joinpath("templates", name).read_text("utf-8")


@cache
def script(*names: str) -> str:
    """Script files of the templates folder as one; none can see what the browser's page holds."""
    body = "\n".join(asset(name) for name in names)
    return f'(() => {{\n"use strict";\n{body}\n}})();'


def _source_hash(text: str) -> str:
    """The CSP source expression that admits exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def policy(script: str, style: str) -> str:
    """A Content-Security-Policy that admits one inline script (none when empty) and one style."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_source_hash(script)}" if script else "script-src 'none'",
            f"style-src {_source_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


@cache
def environment() -> Environment:
    """The template engine: everything is escaped, and an unknown name is an error."""
    made = Environment(
        loader=PackageLoader("gazeguard.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        count=words.count,
        number=words.number,
        plain=words.plain,
        shorten=words.shorten,
        share=words.share,
    )
    made.globals["plural"] = words.plural
    return made
