"""Does `scan --make-references` tell a zoo's models apart, with no benign fine-tune to hand?

    python -m gazeguard.bench.made_references runs/zoo/llava

The user's way from end to end: each suspect is scanned with references that the tool tunes itself
on rows that no suspect has learnt. Suspects are the held-out LoRA models of one rank, which share
references where their weights moved alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from gazeguard.assets import BASE
from gazeguard.bench.entropy_measures import auroc, share
from gazeguard.bench.entropyscan import SEED, benign_rows, hides
from gazeguard.calibrate import needed_samples
from gazeguard.files import write_json
from gazeguard.lab.poison import write_set
from gazeguard.lab.recipes import read_manifest
from gazeguard.methods.entropyscan import Settings
from gazeguard.scanning import scan
from gazeguard.scanning.options import VisionOptions
from gazeguard.types import Outcome

TUNED_ON = 512  # rows behind the probed ones
_FOLDER = click.Path(path_type=Path)


def suspects(zoo: Path, rank: int) -> list[dict[str, Any]]:
    """Entries of the models that are scanned."""
    models = read_manifest(zoo, "zoo")["models"]
    return [
        entry
        for entry in models
        if entry["passed"]
        and entry["split"] == "held-out"
        and not hides(entry)
        and (entry["recipe"]["tuning"], entry["recipe"]["rank"]) == ("lora", rank)
    ]


def verdicts(
    zoo: Path,
    entries: list[dict[str, Any]],
    base: Path,
    data: Path,
    steps: int,
    alpha: float,
    out: Path,
) -> dict[str, Any]:
    """Scan every suspect with references of at most `steps` steps."""
    options = VisionOptions(
        samples=data, make_references=needed_samples(alpha), reference_steps=steps
    )
    report = scan(
        [zoo / entry["model"] for entry in entries],
        references=[base],
        alpha=alpha,
        vision=options,
        out=out,
        dtype="float32",
        watch=lambda report: click.echo(
            f"{steps} steps: {sum(model.verdict is not None for model in report.models)} of"
            f" {len(entries)}",
            err=True,
        ),
    )
    models = []
    for entry, found in zip(entries, report.models, strict=True):
        if found.verdict is None:
            raise click.ClickException(f"{entry['model']}: {found.error}")
        kept = {key: entry[key] for key in ("model", "truth", "recipe")}
        scores = [one["score"] for one in found.numbers["references"] if one["score"] is not None]
        numbers = {key: found.numbers[key] for key in ("score", "p_value")}
        models.append(
            {**kept, **numbers, "references": scores, "outcome": str(found.verdict.outcome)}
        )
    bad = np.array([model["truth"] == "backdoored" for model in models])
    said = np.array([model["outcome"] == Outcome.FLAGGED for model in models])
    # A suspect's score depends on its own references, so it is the rank that compares.
    rank = np.array([0.0 if m["p_value"] is None else 1 - m["p_value"] for m in models])
    return {
        "steps": steps,
        "recall": share(said[bad]),
        "false_alarms": share(said[~bad]),
        "auroc": auroc(bad, rank),
        "benign": int((~bad).sum()),
        "backdoored": int(bad.sum()),
        "models": models,
    }


@click.command()
@click.argument("zoo", type=_FOLDER)
@click.option("--base", type=_FOLDER, default=BASE, help="The shipped base by default.")
@click.option("--steps", type=int, multiple=True, default=(2000,), show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--alpha", default=0.05, show_default=True)
@click.option("--work", type=_FOLDER, default=Path("runs/made"), help="References go here.")
@click.option("--out", type=_FOLDER, default=Path("bench/results/made_references.json"))
@click.option("--threads", default=2, show_default=True)
def main(
    zoo: Path,
    base: Path,
    steps: tuple[int, ...],
    rank: int,
    alpha: float,
    work: Path,
    out: Path,
    threads: int,
) -> None:
    """Scan the held-out LoRA models of ZOO with references made by the tool."""
    torch.set_num_threads(threads)
    settings = Settings()
    data = write_set(benign_rows(settings.samples + TUNED_ON), work / "samples")
    entries = suspects(zoo, rank)
    runs = [verdicts(zoo, entries, base, data, count, alpha, work) for count in steps]
    about = {"zoo": zoo.name, "rank": rank, "alpha": alpha, "seed": SEED}
    about |= {"n_samples": settings.samples, "settings": settings.as_dict(), "tuned_on": TUNED_ON}
    write_json(out, {**about, "runs": runs})
    for run in runs:
        click.echo(
            f"{run['steps']} steps: {run['recall']['value']:.3f} of {run['backdoored']} backdoored"
            f" and {run['false_alarms']['value']:.3f} of {run['benign']} benign models flagged"
        )


if __name__ == "__main__":
    main()
