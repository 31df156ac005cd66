"""`gazeguard scan`: vet whole models, one or a list."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gazeguard.cli import _errors
from gazeguard.cli._options import (
    adapter_option,
    chosen_ray,
    device_option,
    dtype_option,
    fail_on_option,
    images_option,
    quiet_option,
    ray_options,
    verbose_option,
)
from gazeguard.cli._terminal import NORMAL, QUIET, VERBOSE, narrated, print_summary

if TYPE_CHECKING:
    from rich.console import Console

    from gazeguard.cluster import Ray
    from gazeguard.methods.amdet import Settings
    from gazeguard.scanning import ScanReport
    from gazeguard.scanning.options import VisionOptions

_FILE = click.Path(dir_okay=False, path_type=Path)
_PLAIN_SECONDS = 20.0  # between two lines where there is no terminal to redraw


@click.command(epilog="Exit codes: 0 clean, 1 flagged, 2 error, 3 inconclusive, 130 interrupted.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@adapter_option
@click.option(
    "--anchor",
    metavar="MODEL",
    help="Clean encoder or pipeline that text encoders were made from.",
)
@click.option(
    "--reference",
    "references",
    multiple=True,
    metavar="MODEL",
    help="Known-clean model, or a glob or list of them; may be repeated. Vision-language models: "
    "their base, and benign fine-tunes or adapters. Text encoders: fine-tunes of the anchor.",
)
@click.option(
    "--make-references",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Make N benign fine-tunes of the base, like the suspect and moved about as far, from "
    "--samples. Kept in --out, or in the user's cache, for all suspects like it.",
)
@click.option(
    "--reference-steps",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    metavar="N",
    help="Each is tuned until it has moved far enough; one that takes more steps is cut off.",
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    metavar="DATA",
    help="Harmless pictures and questions, in any format that `clean` reads.",
)
@images_option
@click.option(
    "--alpha",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of benign models that may be flagged; needs 1/alpha - 1 references.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="One prompt a line, or JSON.  [default: built-in ones]",
)
@click.option(
    "--rule",
    type=click.Choice(["robust", "paper"]),
    default="robust",
    show_default=True,
    help="paper: the published form. Text encoders: one restart, padding counted, a 50 x 50 "
    "landscape. Vision-language models: entropy of the first layers.",
)
@click.option(
    "--restarts", type=click.IntRange(1), metavar="N", help="Embeddings searched at once."
)
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Of the search, at most.")
@click.option("--points", type=click.IntRange(3), metavar="N", help="Of the landscape, a side.")
@click.option(
    "--limit",
    type=click.IntRange(2),
    metavar="N",
    help="Use the first N prompts, or samples (64 unless said otherwise).",
)
@click.option(
    "--statistic",
    metavar="NAME",
    help="What decides for vision-language models, e.g. head-entropy or entropy (the paper's).",
)
@click.option("--q", type=float, metavar="Q", help="Index of the Tsallis entropy; 1 is Shannon's.")
@click.option(
    "--layers", metavar="L", help="first, last, all, or numbers such as 0,1,2, from 0 on."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="N",
    help="Samples per forward pass.  [default: suits device and prompts]",
)
@click.option("--seed", type=int, metavar="N", help="Of prompts, starts and batches.")
@click.option(
    "--set",
    "assigned",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other setting of the search in text encoders, e.g. anchor_weight=0.1; a wrong name "
    "lists all.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep results and recovered triggers here; the same command goes on where it was. With "
    "--ray on storage that all machines share.",
)
@click.option(
    "--textual-inversion", is_flag=True, help="Also write the trigger for diffusers into --out."
)
@click.option(
    "--target-images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Show which images of DIR are nearest to the recovered target; text encoders in a whole "
    "image-text model.",
)
@device_option
@dtype_option
@ray_options("the models")
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="With --ray: models side by side.  [default: as many as the cluster holds]",
)
@click.option(
    "--format",
    "shown",
    type=click.Choice(["text", "json", "sarif", "junit"]),
    default="text",
    show_default=True,
    help="What goes to stdout.",
)
@click.option("--json-output", type=_FILE, metavar="FILE", help="Write the report as JSON.")
@click.option("--sarif-output", type=_FILE, metavar="FILE", help="Write it as SARIF 2.1.0.")
@click.option("--junit-output", type=_FILE, metavar="FILE", help="Write it as JUnit XML.")
@click.option("--html-output", type=_FILE, metavar="FILE", help="Write it as a page.")
@fail_on_option(" Errors always do.")
@quiet_option
@verbose_option
@click.pass_context
def scan(
    ctx: click.Context,
    models: tuple[str, ...],
    adapter: str | None,
    anchor: str | None,
    references: tuple[str, ...],
    make_references: int,
    reference_steps: int,
    samples: Path | None,
    images: Path | None,
    alpha: float,
    prompts: Path | None,
    rule: str,
    assigned: tuple[str, ...],
    restarts: int | None,
    steps: int | None,
    points: int | None,
    limit: int | None,
    statistic: str | None,
    q: float | None,
    layers: str | None,
    batch_size: int | None,
    seed: int | None,
    out: Path | None,
    textual_inversion: bool,
    target_images: Path | None,
    device: str,
    dtype: str,
    ray_address: str | None,
    workers: int | None,
    worker_cpus: int | None,
    worker_gpus: float | None,
    shown: str,
    fail_on: frozenset[str],
    quiet: bool,
    verbose: bool,
    json_output: Path | None,
    sarif_output: Path | None,
    junit_output: Path | None,
    html_output: Path | None,
) -> None:
    """Say whether somebody planted a backdoor in each MODEL.

    MODEL is a hub id, a folder, a glob, or a file with one model a line: vision-language models and
    adapters for them, which need --reference and --samples, and text encoders (CLIP, SigLIP and
    their kin, alone, in a whole model or in a diffusers pipeline), which need --anchor.
    ID@REVISION, here and in options, is a commit, branch or tag of a hub model.
    """
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other: give one.")
    if textual_inversion and out is None:
        raise click.UsageError("--textual-inversion needs --out, the folder to write it into.")
    if workers is not None and ray_address is None:
        raise click.UsageError("--workers are those of a Ray cluster: add --ray.")
    ray = chosen_ray(ray_address, workers, worker_cpus, worker_gpus)
    verbosity = QUIET if quiet else VERBOSE if verbose else NORMAL
    from gazeguard.report.scan import WRITERS
    from gazeguard.scanning import scan as scan_models

    wanted = {
        "json": json_output,
        "sarif": sarif_output,
        "junit": junit_output,
        "html": html_output,
    }
    files = {name: path for name, path in wanted.items() if path is not None}
    report = None

    def write(latest: ScanReport) -> None:
        nonlocal report
        report = latest
        _write(latest, files)

    vision = _vision(
        {"statistic": statistic, "q": q, "layers": _layers(layers), "samples": limit},
        rule,
        samples=samples,
        images=images,
        adapter=adapter,
        make_references=make_references,
        reference_steps=reference_steps,
        batch_size=batch_size,
    )
    settings = _settings(
        rule, assigned, restarts=restarts, steps=steps, points=points, prompts=limit, seed=seed
    )
    try:
        with (
            narrated(verbosity) as console,
            _progress(console, verbosity) as progress,
            _kept_clean(ray, verbosity),
        ):
            report = scan_models(
                models,
                anchor,
                prompts=prompts,
                references=references,
                alpha=alpha,
                settings=settings,
                vision=vision,
                out=out,
                textual_inversion=textual_inversion,
                target_images=target_images,
                dtype=dtype,
                device=device,
                ray=ray,
                watch=write,
                progress=progress,
            )
    except KeyboardInterrupt:
        kept = (
            f"finished models are kept in {out}" if out else "with --out finished models are kept"
        )
        click.echo(f"Interrupted: {kept}; run the same command again to go on.", err=True)
        ctx.exit(_errors.INTERRUPTED)
    if shown != "text":
        click.echo(WRITERS[shown](report), nl=False)
    elif not quiet:
        _summary(report)
    for model in report.models:
        if model.error:
            click.echo(f"Error: {model.error}", err=True)
    ctx.exit(exit_code(report, fail_on))


@contextmanager
def _kept_clean(ray: Ray | None, verbosity: int) -> Iterator[None]:
    """Stdout is the report's: Ray's own notices, of workers that died, do not go there."""
    if ray is None:
        yield
        return
    with redirect_stdout(sys.stderr if verbosity == VERBOSE else io.StringIO()):
        yield


def exit_code(report: ScanReport, fail_on: frozenset[str]) -> int:
    """Of a list: a flagged model first, then models that could not be scanned."""
    from gazeguard.types import Outcome

    if report.count("flagged") and "flagged" in fail_on:
        return _errors.FLAGGED
    if report.count("error") or not report.finished:
        return _errors.USAGE
    if report.count("inconclusive"):
        return _errors.outcome_code(Outcome.INCONCLUSIVE, fail_on)
    return _errors.CLEAN


def _settings(rule: str, assigned: Sequence[str], **given: int | None) -> Settings:
    from gazeguard.methods.amdet import Settings

    chosen = Settings.read(assigned)
    chosen |= {name: value for name, value in given.items() if value is not None}
    return Settings.published(**chosen) if rule == "paper" else Settings(**chosen)


def _vision(given: dict[str, Any], rule: str, **options: Any) -> VisionOptions:
    from gazeguard.methods.entropyscan import Settings
    from gazeguard.scanning.options import VisionOptions

    chosen = {name: value for name, value in given.items() if value is not None}
    settings = Settings.published(**chosen) if rule == "paper" else Settings(**chosen)
    return VisionOptions(settings=settings, **options)


def _layers(text: str | None) -> Any:
    """`first`, or `0,1,2` as numbers."""
    if text is None or not text.replace(",", "").replace(" ", "").isdigit():
        return text
    return tuple(int(number) for number in text.split(",") if number.strip())


def _write(report: ScanReport, files: dict[str, Path]) -> None:
    from gazeguard.report.files import write_atomic
    from gazeguard.report.scan import WRITERS

    for name, path in files.items():
        write_atomic(path, WRITERS[name](report))


def _summary(report: ScanReport) -> None:
    from gazeguard.report.scan.console import render_console

    print_summary(render_console(report))


@contextmanager
def _progress(console: Console, verbosity: int) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar where there is a terminal to redraw, elsewhere a line now and then."""
    if verbosity == QUIET:
        yield None
        return
    if not console.is_terminal:
        shown = time.monotonic()

        def line(model: str, done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown > _PLAIN_SECONDS:
                shown = time.monotonic()
                console.print(f"{model}: {done:,} of {total:,}", markup=False, highlight=False)

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(model: str, done: int, total: int) -> None:
            bar.update(task, description=model, completed=done, total=total)

        yield update
