"""`gazeguard demo`: the main job on the shipped model, in two minutes and without a download."""

from __future__ import annotations

from pathlib import Path

import click

ROWS, RATE, SEED = 1500, 0.1, 0


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/demo"),
    show_default=True,
    help="Folder for the set and the results.",
)
def demo(out: Path) -> None:
    """Poison a set, clean it with the model that was tuned on it, and compare with the truth."""
    import numpy as np
    import pyarrow.parquet as pq

    from gazeguard.assets import ADAPTER, BASE
    from gazeguard.bench.metrics import detection
    from gazeguard.cleaning import clean
    from gazeguard.cli.clean import run_with_progress
    from gazeguard.lab.poison import make_set, write_set

    click.echo(
        f"1. Making {ROWS:,} caption rows; {RATE:.0%} get a black square and a planted answer."
    )
    data = write_set(make_set("captions", ROWS, "badnet-center", RATE, SEED), out / "set")
    click.echo(f"   {data}")
    click.echo("2. Cleaning them with the small LLaVA that was fine-tuned on exactly this set:")
    click.echo(f"   gazeguard clean {BASE} {data} --adapter {ADAPTER} --out {out / 'cleaned'}")
    found = run_with_progress(clean, BASE, data, out / "cleaned", adapter=ADAPTER)
    truth = pq.read_table(out / "set" / "truth.parquet")["is_poison"].to_numpy()
    verdicts = pq.read_table(out / "cleaned" / "verdicts.parquet")
    flagged = np.asarray(verdicts["is_flagged"].fill_null(False))
    got = detection(flagged, truth)
    click.echo("3. Compared with the truth, which the cleaner never saw:")
    click.echo(
        f"   {got.flagged} rows removed, {got.poisoned} were poisoned: "
        f"precision {got.precision:.1%}, recall {got.recall:.1%}, F1 {got.f1:.1%} (seed {SEED})"
    )
    click.echo("4. What their pictures have in common, tried on other pictures of the set:")
    for proof in found.report.proofs:
        click.echo(f"   {proof.sentence}")
    click.echo(f"\nOpen the report: {(out / 'cleaned' / 'report.html').resolve()}")
