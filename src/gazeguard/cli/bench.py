"""`gazeguard bench`: run a suite of attacks and defences, and draw its tables."""

from __future__ import annotations

from pathlib import Path

import click

from gazeguard.cli._options import chosen_ray, ray_options
from gazeguard.cli._terminal import NORMAL, narrated
from gazeguard.errors import MeasurementError

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group()
def bench() -> None:
    """The benchmark: attacks against defences, on models made by the lab."""


@bench.command()
@click.argument("suite")
@click.option("--out", type=_FOLDER, required=True, help="Folder for results.")
@click.option(
    "--work",
    type=_FOLDER,
    help="Folder for models and what defences keep; suites may share it.  [default: OUT/work]",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Processes side by side, of one thread each."
)
@ray_options("models and cells")
def run(
    suite: str,
    out: Path,
    work: Path | None,
    workers: int | None,
    ray_address: str | None,
    worker_cpus: int | None,
    worker_gpus: float | None,
) -> None:
    """Run SUITE, the name of a shipped one or a TOML file; goes on where it was.

    Writes a JSON file per cell (a model and a defence) and the tables of `bench table`. With --ray,
    OUT and --work are on storage that all machines share.
    """
    from gazeguard.bench.run import run_suite
    from gazeguard.bench.suite import read_suite

    click.get_current_context().with_resource(narrated(NORMAL))
    ray = chosen_ray(ray_address, workers, worker_cpus, worker_gpus)
    asked = read_suite(suite)
    failed = run_suite(asked, out, work or out / "work", workers, log=click.echo, ray=ray)
    _tables(out)
    if failed:
        raise MeasurementError(
            f"{len(failed)} cells failed, the first: {failed[0]} Mend the cause and run the same"
            " command again: what is done is kept."
        )


@bench.command()
@click.argument("folder", type=_FOLDER)
def table(folder: Path) -> None:
    """Draw the tables of a run, finished or not: Markdown, CSV and a page with plots."""
    _tables(folder)


@bench.command()
def suites() -> None:
    """List the suites that come with the package, and every defence."""
    from gazeguard.bench.defences import DEFENCES
    from gazeguard.bench.suite import read_suite, shipped

    for name in shipped():
        click.echo(f"{name:20s} {read_suite(name).title}")
    click.echo()
    for defence in DEFENCES.values():
        click.echo(f"{defence.name:24s} {defence.level:6s} {defence.about}")


def _tables(folder: Path) -> None:
    from gazeguard.bench.report.table import write_tables

    for path in write_tables(folder):
        click.echo(path)
