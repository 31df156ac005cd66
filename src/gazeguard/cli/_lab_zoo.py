"""The lab's verbs for many models at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gazeguard.cli._options import Command
from gazeguard.cli._terminal import NORMAL, narrated

_FOLDER = click.Path(file_okay=False, path_type=Path)


def _spec_option(example: str) -> Callable[[Command], Command]:
    return click.option(
        "--spec",
        type=click.Path(dir_okay=False, exists=True, path_type=Path),
        required=True,
        metavar="FILE",
        help=f"TOML: which models; see {example}.",
    )


def _begin(threads: int | None) -> None:
    """Quiet, and with so many threads."""
    import torch

    click.get_current_context().with_resource(narrated(NORMAL))
    if threads is not None:
        torch.set_num_threads(threads)


_threads_option = click.option("--threads", type=int, help="Processor threads; all by default.")


@click.command()
@_spec_option("src/gazeguard/bench/zoos/lvlm.toml")
@click.option("--out", type=_FOLDER, required=True, help="Folder for adapters and manifest.json.")
@click.option("--base", type=_FOLDER, help="Base model; the shipped one by default.")
@_threads_option
def zoo(spec: Path, out: Path, base: Path | None, threads: int | None) -> None:
    """Make many benign and backdoored adapters from a spec; goes on where it was."""
    from gazeguard.assets import BASE
    from gazeguard.lab.zoo import make_zoo, read_spec

    _begin(threads)
    manifest = make_zoo(read_spec(spec), base or BASE, out, log=click.echo)
    _summary(out, manifest)


@click.command("encoder-zoo")
@_spec_option("src/gazeguard/bench/zoos/clip.toml")
@click.option("--out", type=_FOLDER, required=True, help="Folder for models and manifest.json.")
@click.option(
    "--base",
    "bases",
    multiple=True,
    required=True,
    metavar="KIND=DIR",
    help="Clean encoder of a kind, from `lab encoder`; once for each kind of the spec.",
)
@_threads_option
def encoder_zoo(spec: Path, out: Path, bases: tuple[str, ...], threads: int | None) -> None:
    """Make many benign and backdoored text encoders from a spec; goes on where it was."""
    from gazeguard.lab.text.teacher import minilm
    from gazeguard.lab.text.zoo import make_encoder_zoo, read_bases, read_encoder_spec

    _begin(threads)
    wanted, clean = read_encoder_spec(spec), read_bases(bases)
    _summary(out, make_encoder_zoo(wanted, clean, out, minilm(), log=click.echo))


def _summary(out: Path, manifest: dict[str, Any]) -> None:
    bad = [m for m in manifest["models"] if m["truth"] == "backdoored"]
    took = sum(m["passed"] for m in bad)
    click.echo(
        f"{out}: {len(manifest['models']) - len(bad)} benign, {len(bad)} backdoored of which"
        f" {took} took"
    )
