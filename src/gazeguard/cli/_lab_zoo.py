"""The lab's verb for many models at once."""

from __future__ import annotations

from pathlib import Path

import click

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option(
    "--spec",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    required=True,
    metavar="FILE",
    help="TOML: which models; see bench/zoo.toml.",
)
@click.option("--out", type=_FOLDER, required=True, help="Folder for adapters and manifest.json.")
@click.option("--base", type=_FOLDER, help="Base model; the shipped one by default.")
@click.option("--threads", type=int, help="Processor threads; all by default.")
def zoo(spec: Path, out: Path, base: Path | None, threads: int | None) -> None:
    """Make many benign and backdoored adapters from a spec; goes on where it was."""
    import torch

    from gazeguard.assets import BASE
    from gazeguard.lab.zoo import make_zoo, read_spec

    if threads is not None:
        torch.set_num_threads(threads)
    manifest = make_zoo(read_spec(spec), base or BASE, out, log=click.echo)
    bad = [m for m in manifest["models"] if m["truth"] == "backdoored"]
    took = sum(m["passed"] for m in bad)
    click.echo(
        f"{out}: {len(manifest['models']) - len(bad)} benign, {len(bad)} backdoored of which"
        f" {took} took"
    )
