"""What every benchmark of time and memory does around its parts: quiet, collect, write, print."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from gazeguard.bench.speed.instruments import Figure, Part, machine
from gazeguard.files import write_json


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

    def add(self, name: str, part: Part) -> None:
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
        write_json(out, result)
        click.echo(table(self._figures))
        click.echo(f"{about['cpu']}, {about['threads']} of {about['cores']} cores; wrote {out}")


def benchmark(
    measured: Callable[[Path, bool, int], Iterator[tuple[str, Part]]],
    does: str,
    threads: int = 1,
    **more: Any,
) -> click.Command:
    """The command of a benchmark: its options, and every part in a folder that is then removed.

    Args:
        measured: gets that folder, whether sizes are small, and the threads of the model passes.
        does: the help's first sentence.
        threads: by default.
        more: also written.
    """

    @click.command(help=f"{does}, print a table, write the numbers as JSON.")
    @click.option(
        "--out",
        type=click.Path(dir_okay=False, path_type=Path),
        required=True,
        help="JSON file to write.",
    )
    @click.option(
        "--quick", is_flag=True, help="Small sizes, in seconds: for tests, not for figures."
    )
    @click.option(
        "--threads",
        default=threads,
        type=click.IntRange(1),
        show_default=True,
        help="Threads of the model passes.",
    )
    def main(out: Path, quick: bool, threads: int) -> None:
        run = Run(quick, threads)
        with tempfile.TemporaryDirectory() as work:
            for name, part in measured(Path(work), quick, threads):
                run.add(name, part)
        run.finish(out, **more)

    return main


def table(figures: list[Figure]) -> str:
    """One line a figure: name, value, target."""
    rows = [("figure", "value", "target"), *((f.name, f.text, f.target) for f in figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
