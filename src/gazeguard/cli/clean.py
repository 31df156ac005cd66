"""`gazeguard clean`: the main job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from gazeguard.cli import _errors
from gazeguard.cli._options import (
    adapter_option,
    batch_size_of,
    chosen_ray,
    column_options,
    device_option,
    dtype_option,
    fail_on_option,
    format_option,
    images_option,
    quiet_option,
    ray_options,
    remote_code_option,
    revision_option,
    verbose_option,
)
from gazeguard.cli._terminal import NORMAL, QUIET, VERBOSE, narrated, print_summary, row_progress

if TYPE_CHECKING:
    from gazeguard.cleaning import CleanOutcome
    from gazeguard.data.columns import Columns


@click.command(epilog="Exit codes: 0 clean, 1 flagged, 2 error, 3 inconclusive, 130 interrupted.")
@click.argument("model")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder for the kept, removed and skipped rows, the verdicts and the report.",
)
@adapter_option
@click.option("--base", metavar="MODEL", help="What MODEL was before a full fine-tune.")
@images_option
@format_option
@column_options
@click.option(
    "--rule",
    type=click.Choice(["robust", "paper"]),
    default="robust",
    show_default=True,
    help="paper is the published rule; robust is ours, for mixed sets and any direction.",
)
@click.option(
    "--witness",
    type=click.Choice(["all", "attention"]),
    default="all",
    show_default=True,
    help="attention asks only where the model looks; all also rebuilds triggers and tries them.",
)
@click.option(
    "--remove",
    type=click.Choice(["proven", "suspected"]),
    default="proven",
    show_default=True,
    help="suspected also takes out rows with evidence that falls short of proof.",
)
@click.option(
    "--batch-size",
    callback=batch_size_of,
    metavar="N",
    help="Rows per forward pass; auto tries what is fastest.  [default: suits device and prompts]",
)
@device_option
@dtype_option
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help="Look only at the first N rows; others are in no file.",
)
@click.option(
    "--max-skipped",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Of the rows with pictures: more unread ones make the outcome inconclusive.  [0.01]",
)
@click.option(
    "--resume/--no-resume", default=True, help="Go on from an earlier run in DIR (the default)."
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="Of the statistics.")
@revision_option
@remote_code_option
@ray_options("the rows")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Of Ray.  [default: all]")
@click.option(
    "--store",
    metavar="URL",
    help="Where measured rows are kept: a folder or a URL such as s3://bucket/x.  [default: OUT]",
)
@fail_on_option()
@click.option("--json", "as_json", is_flag=True, help="Print report.json, and only it, to stdout.")
@quiet_option
@verbose_option
@click.option("--block-rows", type=click.IntRange(1), hidden=True, help="Rows between two saves.")
@click.pass_context
def clean(
    ctx: click.Context,
    model: str,
    data: Path,
    out: Path,
    adapter: str | None,
    base: str | None,
    images: Path | None,
    format: str,
    columns: Columns,
    rule: str,
    witness: str,
    remove: str,
    batch_size: int | Literal["auto"] | None,
    device: str,
    dtype: str,
    limit: int | None,
    max_skipped: float | None,
    resume: bool,
    seed: int,
    revision: str | None,
    trust_remote_code: bool,
    ray_address: str | None,
    workers: int | None,
    worker_cpus: int | None,
    worker_gpus: float | None,
    store: str | None,
    fail_on: frozenset[str],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    block_rows: int | None,
) -> None:
    """Find the poisoned rows of DATA with MODEL, the model that was fine-tuned on it.

    MODEL is a hub id or a folder; with --adapter it is the base model. DATA is a file or folder in
    one of the usual fine-tuning formats, in which kept, removed and skipped rows are written too.
    A run that was killed goes on where it was when the same command is run again.
    """
    if as_json + quiet + verbose > 1:
        raise click.UsageError("--json, --quiet and --verbose exclude each other: give one.")
    if workers is not None and ray_address is None:
        raise click.UsageError("--workers are Ray's: add --ray.")
    verbosity = QUIET if quiet else VERBOSE if verbose else NORMAL
    from gazeguard.cleaning import clean as clean_data
    from gazeguard.cleaning.run import BLOCK_ROWS
    from gazeguard.data.survey import MAX_SKIPPED

    try:
        cleaned = run_with_progress(
            clean_data,
            model,
            data,
            out,
            verbosity=verbosity,
            adapter=adapter,
            base=base,
            images=images,
            format=format,
            columns=columns,
            rule=rule,
            witness=witness,
            remove=remove,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            limit=limit,
            max_skipped=MAX_SKIPPED if max_skipped is None else max_skipped,
            resume=resume,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            block_rows=block_rows or BLOCK_ROWS,
            store=store,
            ray=chosen_ray(ray_address, workers, worker_cpus, worker_gpus),
        )
    except KeyboardInterrupt:
        click.echo(
            f"Interrupted: what was measured is kept in {out}; "
            "run the same command again to go on.",
            err=True,
        )
        ctx.exit(_errors.INTERRUPTED)
    if as_json:
        click.echo((cleaned.folder / cleaned.report.files["json"]).read_text("utf-8"), nl=False)
    elif not quiet:
        _summary(cleaned)
    ctx.exit(_errors.outcome_code(cleaned.outcome, fail_on))


def run_with_progress(
    clean: Callable[..., CleanOutcome], *args: Any, verbosity: int = NORMAL, **options: Any
) -> CleanOutcome:
    """Call the library's `clean` with its messages and progress shown on stderr."""
    with narrated(verbosity) as console, row_progress(console, verbosity) as progress:
        return clean(*args, progress=progress, **options)


def _summary(cleaned: CleanOutcome) -> None:
    from gazeguard.report.console import render_console

    click.echo()
    print_summary(render_console(cleaned.report))
    click.echo(f"\nOpen {cleaned.folder / cleaned.report.files['html']}")
