"""`gazeguard guard`: ask a model under its guard."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gazeguard.cli import _errors
from gazeguard.cli._options import (
    fail_on_option,
    guard_option,
    images_option,
    load_target,
    mode_option,
    model_options,
    role_option,
)
from gazeguard.cli._terminal import NORMAL, QUIET, narrated, row_progress

if TYPE_CHECKING:
    from PIL.Image import Image

    from gazeguard.data.dataset import Dataset
    from gazeguard.guarding import Guard, GuardVerdict
    from gazeguard.guarding.answer import Guarded
    from gazeguard.report.guard import Recorder
    from gazeguard.types import Sample, SkippedRow

    Row = Sample | SkippedRow

_FILE = click.Path(path_type=Path)
_OUTPUT = click.Path(dir_okay=False, path_type=Path)


@click.command(
    epilog="Exit codes: 0 clean, 1 flagged, 2 error, 3 inconclusive, 130 interrupted. Over a data "
    "set, 1 when any item is flagged, else 3 when any could not be judged."
)
@click.argument("model")
@guard_option
@click.option(
    "--image",
    "image",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="Picture to ask about; give several for a prompt with several. With --data: the column"
    " of the pictures, where it has another name than usual.",
)
@click.option(
    "--prompt", metavar="TEXT", help="What to ask. With --data: the column of the questions."
)
@role_option
@click.option(
    "--data", type=_FILE, metavar="PATH", help="Instead: a data set; prints one JSON line per item."
)
@images_option
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N items.")
@mode_option("gives no answer")
@click.option(
    "--fail-closed", is_flag=True, help="Give no answer either when the guard cannot judge."
)
@click.option(
    "--heatmap",
    type=_FILE,
    metavar="FILE",
    help="Write the picture with the tokens that stand out; several side by side.",
)
@click.option(
    "--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), metavar="N"
)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), metavar="N")
@model_options
@click.option("--html-output", type=_OUTPUT, metavar="FILE", help="Write a report as a page.")
@click.option("--json-output", type=_OUTPUT, metavar="FILE", help="Write the report as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print answer and verdict as JSON.")
@fail_on_option()
@click.pass_context
def guard(
    ctx: click.Context,
    /,
    model: str,
    guard_folder: Path,
    image: tuple[Path, ...],
    prompt: str | None,
    roles: tuple[tuple[str, str], ...],
    data: Path | None,
    images: Path | None,
    limit: int | None,
    mode: Any,
    fail_closed: bool,
    heatmap: Path | None,
    max_new_tokens: int,
    batch_size: int,
    html_output: Path | None,
    json_output: Path | None,
    as_json: bool,
    fail_on: frozenset[str],
    **model_kwargs: Any,
) -> None:
    """Answer a question about pictures, judged and disarmed by a guard.

    Prints the answer and the verdict. With --data it does so for every item of a data set, and
    answers each after its last user turn. In mode purify a flagged request is answered a second
    time, with nothing hidden, to say whether hiding changed anything.
    """
    if data is None and (not image or prompt is None or roles):
        raise click.UsageError("give either --image and --prompt, or --data.")
    if data is not None and len(image) > 1:
        raise click.UsageError("with --data, --image is the column of the pictures: give one.")
    if heatmap is not None and data is not None:
        raise click.UsageError("--heatmap needs --image and --prompt.")
    from gazeguard.data.columns import Columns
    from gazeguard.data.read import open_dataset
    from gazeguard.guarding import Guard
    from gazeguard.types import Outcome, TextOnlyRow

    options = {"mode": mode, "max_new_tokens": max_new_tokens, "fail_closed": fail_closed}
    files = _files(html_output, json_output, (data, *image))
    seen, finished = set(), False
    with narrated(NORMAL) as console:
        asked: Dataset | Sample
        if data is None:
            assert prompt is not None, "checked above"
            asked = _sample(image, prompt)
            rows: Iterator[Row] = iter([asked])
        else:
            column = str(image[0]) if image else None
            asked = open_dataset(data, images=images, columns=Columns(None, prompt, column, roles))
            wanted = None if limit is None else range(limit).__contains__
            rows = (
                row.as_skipped() if isinstance(row, TextOnlyRow) else row
                for row in asked.rows(wanted)
            )
        click.echo(f"Loading {model} and the guard in {guard_folder}.", err=True)
        loaded = Guard.load(guard_folder, load_target(model, **model_kwargs))
        recorder, write = _report(
            loaded,
            files,
            asked,
            {**options, "guard": guard_folder, "batch_size": batch_size, "limit": limit},
        )
        # Lines that run over a terminal show how far it is; a bar would be torn by them.
        shown = NORMAL if data is not None and not sys.stdout.isatty() else QUIET
        with row_progress(console, shown, "Answering") as progress:
            total = _total(asked, limit) if progress else 0
            if progress:
                progress(0, total)
            try:
                for done, (row, found) in enumerate(
                    _answered(loaded, rows, batch_size, options), 1
                ):
                    recorder.add(row, found)
                    seen.add(
                        "inconclusive" if isinstance(found, str) else str(found.verdict.outcome)
                    )
                    if data is not None:
                        click.echo(json.dumps(_line(row, found)))  # click flushes every line
                    else:
                        _show(row, found, as_json, heatmap)
                    if progress:
                        progress(done, total)
                finished = True
            finally:
                write(finished)
    if data is not None:
        click.echo(_summary(recorder), err=True)
    for path in files.values():
        click.echo(f"Report: {path}", err=True)
    worst = next((o for o in ("flagged", "inconclusive") if o in seen), "clean")
    ctx.exit(_errors.outcome_code(Outcome(worst), fail_on))


def _sample(files: tuple[Path, ...], prompt: str) -> Sample:
    """The question, read with the limits that rows of a data set have."""
    from gazeguard.data.conversation import content_id
    from gazeguard.data.images import ImageLimits, ImageRoot
    from gazeguard.errors import DataError, RowError
    from gazeguard.types import ImagePart, Sample, TextPart, Turn

    encoded: list[bytes] = []
    pictures: list[Image] = []
    for file in files:
        root = ImageRoot(file.resolve().parent, ImageLimits())
        try:
            encoded += root.read([str(file.resolve())])
            pictures += root.decode(encoded[-1:])
        except RowError as error:
            raise DataError(f"{file}: {error}; give a picture file.") from error
    turns = (Turn("user", (*map(ImagePart, range(len(files))), TextPart(prompt))),)
    return Sample(0, content_id(turns, encoded), tuple(pictures), turns)


def _files(
    html: Path | None, as_json: Path | None, inputs: tuple[Path | None, ...]
) -> dict[str, Path]:
    """The wanted reports by format; none may lie on the input or on another."""
    files = {name: path for name, path in (("html", html), ("json", as_json)) if path is not None}
    taken = {path.resolve() for path in inputs if path is not None}
    for path in files.values():
        if path.resolve() in taken:
            raise click.UsageError(f"{path} is taken already: choose another file for the report.")
        taken.add(path.resolve())
    return files


def _total(asked: Dataset | Sample, limit: int | None) -> int:
    from gazeguard.types import Sample

    if isinstance(asked, Sample):
        return 1
    return min(asked.count(), limit or asked.count())


def _summary(recorder: Recorder) -> str:
    """The run in a sentence or two."""
    from gazeguard.report.guard.text import headline, lede

    report = recorder.report({}, finished=True)
    return f"{headline(report)}. {lede(report)}".strip()


def _report(
    guard: Guard,
    files: dict[str, Path],
    asked: Dataset | Sample,
    arguments: dict[str, Any],
) -> tuple[Recorder, Callable[[bool], None]]:
    """What follows the run, and what writes the wanted reports.

    They are written once before the first request: a file that cannot be written ends the run
    there, and a run that is killed leaves one that says so.
    """
    from gazeguard.provenance import provenance
    from gazeguard.report.files import write_atomic
    from gazeguard.report.guard import Recorder, render_html, render_json
    from gazeguard.types import Sample

    dataset = None if isinstance(asked, Sample) else asked
    recorder = Recorder(guard, arguments["mode"])
    if not files:
        return recorder, lambda finished: None
    origin = provenance(guard.target, dataset, arguments=arguments, seed=guard.seed)

    def reread(wanted: Collection[int]) -> Iterator[Sample]:
        rows = iter([asked]) if dataset is None else dataset.rows(wanted.__contains__)
        return (row for row in rows if isinstance(row, Sample))

    def write(finished: bool) -> None:
        report = recorder.report(origin, finished=finished)
        if "html" in files:
            write_atomic(files["html"], render_html(report, reread))
        if "json" in files:
            write_atomic(files["json"], render_json(report))

    write(False)
    return recorder, write


def _answered(
    guard: Guard, rows: Iterator[Row], batch_size: int, options: dict[str, Any]
) -> Iterator[tuple[Row, Guarded | str]]:
    """Every row with its answer, or why it has none, in their order."""
    from gazeguard.guarding.requests import asked
    from gazeguard.types import SkippedRow

    while batch := [
        row if isinstance(row, SkippedRow) else asked(row) for row in islice(rows, batch_size)
    ]:
        samples = [row for row in batch if not isinstance(row, SkippedRow)]
        found = iter(_tried(guard, samples, options))
        for row in batch:
            yield row, row.reason if isinstance(row, SkippedRow) else next(found)


def _tried(guard: Guard, samples: list[Sample], options: dict[str, Any]) -> list[Guarded | str]:
    from gazeguard.errors import RowError
    from gazeguard.guarding.answer import answer

    if not samples:
        return []
    try:
        return [*answer(guard, samples, **options)]
    except RowError as error:
        if len(samples) == 1:
            return [str(error)]
        return [one for sample in samples for one in _tried(guard, [sample], options)]


def _line(row: Row, found: Guarded | str) -> dict[str, Any]:
    start = {"row": row.row, "sample_id": row.sample_id}
    if isinstance(found, str):
        return start | {"answer": None, "outcome": "inconclusive", "reason": found}
    return start | {
        "answer": found.answer,
        **found.verdict.as_json(),
        "disarmed": found.disarmed,
    }


def _show(row: Row, found: Guarded | str, as_json: bool, heatmap: Path | None) -> None:
    """One answer for a person, or as JSON; the heat map where it was asked for."""
    from gazeguard.errors import DataError

    if isinstance(found, str):
        raise DataError(found)
    verdict = found.verdict
    if heatmap is not None:
        _draw(heatmap, row, verdict)
    if as_json:
        click.echo(json.dumps(_line(row, found), indent=1))
        return
    click.echo("(no answer)" if found.answer is None else found.answer)
    click.echo(f"\nVerdict: {verdict.outcome}: {verdict.reason}.")
    if verdict.tokens is not None:
        what = "hidden from the model" if verdict.hidden else "stand out"
        for number, tokens in enumerate(verdict.tokens, 1):
            where = f" of image {number}" if len(verdict.tokens) > 1 else ""
            click.echo(f"{int(tokens.sum())} of {tokens.size} image tokens{where} {what}.")
    if found.disarmed is False:
        click.echo(
            "The answer is the same with nothing hidden: if a trigger is there, it is not disarmed."
        )
    if heatmap is not None:
        drawn = any(heat.ndim == 2 for heat in verdict.heat or ())
        why = "" if drawn else " (only flagged pictures on a plain grid have heat)"
        click.echo(f"Heat map: {heatmap}{why}")


def _draw(path: Path, row: Row, verdict: GuardVerdict) -> None:
    from gazeguard.files import write_bytes
    from gazeguard.report.heatmap import draw_heatmap, side_by_side, strongest
    from gazeguard.types import SkippedRow

    assert not isinstance(row, SkippedRow), "a row with an answer has a picture"
    heat, tokens = verdict.heat or (), verdict.tokens or ()
    if len(tokens) == len(row.images):
        parts = zip(row.images, heat, tokens, strict=True)
        drawn = [draw_heatmap(*part, strongest(heat)) for part in parts]
    else:  # not flagged, or the images could not be told apart
        drawn = [draw_heatmap(image, None, None) for image in row.images]
    buffer = BytesIO()
    side_by_side(drawn).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
