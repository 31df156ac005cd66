"""What every benchmark of time and memory does around its parts: quiet, collect, write, print."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from gazeguard.bench.speed.instruments import Figure, machine
from gazeguard.files import write_bytes


class Run:
    """One run of a benchmark; begins when it is made.

    Args:
        quick: sizes are small, so figures have no bound to meet.
        threads: of the model passes.
    """

    def __init__(self, quick: bool, threads: int) -> None:
        self._began = time.perf_counter()
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("gazeguard").setLevel(logging.ERROR)
        self._quick, self._about = quick, machine(threads)
        self._figures: list[Figure] = []
        self._raw: dict[str, Any] = {}

    def add(self, name: str, part: tuple[list[Figure], dict[str, Any]]) -> None:
        """Take in a part's figures and what they were made of."""
        for figure in part[0]:
            free = replace(figure, at_most=None, at_least=None)
            self._figures.append(free if self._quick else figure)
        self._raw[name] = part[1]
        click.echo(f"{name}: done after {time.perf_counter() - self._began:.0f} s", err=True)

    def finish(self, out: Path, **more: Any) -> None:
        """Write the numbers, and `more`, as JSON; print the table."""
        about = self._about
        result = {
            "schema_version": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "quick": self._quick,
            "machine": about,
            **more,
            "seconds": round(time.perf_counter() - self._began, 1),
            "figures": [figure.as_json() for figure in self._figures],
            "raw": self._raw,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, (json.dumps(result, indent=1) + "\n").encode())
        click.echo(table(self._figures))
        click.echo(f"{about['cpu']}, {about['threads']} of {about['cores']} cores; wrote {out}")


def table(figures: list[Figure]) -> str:
    """One line a figure: name, value, target."""
    rows = [("figure", "value", "target"), *((f.name, f.text, f.target) for f in figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
