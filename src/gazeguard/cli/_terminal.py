"""What a person sees: messages and a progress bar on stderr, a summary on stdout."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

QUIET, NORMAL, VERBOSE = -1, 0, 1
_LEVELS = {QUIET: logging.ERROR, NORMAL: logging.INFO, VERBOSE: logging.DEBUG}
_PLAIN_SECONDS = 20.0  # between two lines where there is no terminal to redraw
_UNWRAPPED = 10_000  # columns of a pipe or a file, in which no line is to be broken


class _ConsoleHandler(logging.Handler):
    """Prints log records through the console that also draws the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(
            record.getMessage(), markup=False, highlight=False, soft_wrap=True, emoji=False
        )


@contextmanager
def narrated(verbosity: int) -> Iterator[Console]:
    """Show gazeguard's messages on stderr; other libraries' chatter only when verbose."""
    from rich.console import Console

    console = Console(stderr=True)
    handler = _ConsoleHandler(console)
    names = ["gazeguard", *(("py.warnings", "transformers") if verbosity == VERBOSE else ())]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
    loggers[0].setLevel(_LEVELS[verbosity])
    with warnings.catch_warnings():
        if verbosity == VERBOSE:
            logging.captureWarnings(True)
        else:
            warnings.simplefilter("ignore")
            _hush_transformers(console.is_terminal and verbosity == NORMAL)
        try:
            yield console
        finally:
            logging.captureWarnings(False)
            for logger, level in before:
                logger.removeHandler(handler)
                logger.setLevel(level)


def _hush_transformers(downloads: bool) -> None:
    """Stop transformers' bars and warnings; keep the hub's bars where a download may be long."""
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


def print_summary(summary: RenderableType) -> None:
    """Print on stdout; lines are as long as they are where no terminal has an edge."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(summary)
        return
    wide = Console(width=_UNWRAPPED)
    with wide.capture() as captured:
        wide.print(summary)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


@contextmanager
def row_progress(
    console: Console, verbosity: int, what: str = "Measuring"
) -> Iterator[Callable[[int, int], None] | None]:
    """A function to call with rows done and rows in all; None when nothing is to be shown."""
    if verbosity == QUIET:
        yield None
    elif console.is_terminal:
        with _bar(console, what) as update:
            yield update
    else:
        yield _plain(console, what)


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.1f} rows/s")

    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=console,
        redirect_stdout=False,  # results are printed there meanwhile
    )

    def update(done: int, total: int) -> None:
        if not bar.tasks:
            # Rows of an earlier run are where the bar starts, not a burst of speed.
            bar.add_task("rows", total=total, completed=done)
            bar.start()
        bar.update(bar.task_ids[0], completed=done)

    try:
        yield update
    finally:
        bar.stop()


def _plain(console: Console, what: str = "Measuring") -> Callable[[int, int], None]:
    began = shown = time.monotonic()
    at_start: int | None = None

    def update(done: int, total: int) -> None:
        nonlocal at_start, began, shown
        now = time.monotonic()
        if at_start is None:
            at_start, began, shown = done, now, now
            text = f"{what} {total - done:,} rows"
            text += f"; {done:,} were measured before." if done else "."
        elif done == total or now - shown >= _PLAIN_SECONDS:
            shown = now
            rate = (done - at_start) / max(now - began, 1e-9)
            left = f", {_duration((total - done) / rate)} left" if done < total and rate else ""
            text = f"{done:,} of {total:,} rows, {rate:,.1f} rows/s{left}"
        else:
            return
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    return update


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
