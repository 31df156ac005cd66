"""Where in depth a trigger shows: CleanSight's detector on every run of three layers.

    python -m gazeguard.bench.depth SUITE --work runs --out bench/results/depth.json

The paper watches layers 10 to 12 of 32 and reports AUROC near 1 in layers 10 to 24. In a model of
six layers nothing is early or late; this is for models with more, made by `bench run`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from gazeguard.bench.bases import BASES
from gazeguard.bench.entropy_measures import auroc
from gazeguard.bench.speed.instruments import machine
from gazeguard.bench.suite import read_suite
from gazeguard.files import write_json
from gazeguard.guarding.measure import measure
from gazeguard.lab.attacks import ATTACKS
from gazeguard.lab.poison import samples, trigger_all
from gazeguard.lab.rows import make_rows
from gazeguard.lab.zoo import Recipe
from gazeguard.methods.cleansight.detector import Detector
from gazeguard.models.load import load
from gazeguard.types import Sample

WINDOW = 3  # layers, as in the paper
DRAWS = 2000  # of the bootstrap over requests
BATCH = 25


def by_depth(
    base: Path, adapter: Path, recipe: Recipe, trigger: str, known: int, asked: int
) -> dict[str, Any]:
    """AUROC of clean against triggered requests, for every run of `WINDOW` layers.

    The detector is the paper's (attention ratio of every head, diagonal distance), fitted on
    `known` clean requests; none of the `asked` are among them.

    Args:
        base: folder of the clean model.
        adapter: of the tuned one.
        recipe: what it was tuned on.
        trigger: the attack whose trigger is shown; a benign model's too, as a control.
        known: clean requests to fit on.
        asked: clean requests to judge, and as many triggered ones.
    """
    target = load(base, adapter, dtype="float32")
    rows = make_rows(recipe.task, known + asked, recipe.seed, held_out=True)
    attack = ATTACKS[trigger]
    clean = rows[known:]
    bad = trigger_all([r for r in clean if attack.fits(r)], attack, recipe.seed, recipe.target)

    def ratios(some: list[Sample]) -> NDArray[np.float32]:
        found = measure(target, some, layers=target.layers, batch_size=BATCH)
        return np.exp(found.ratio)

    fit, good, hit = (ratios(samples(some)) for some in (rows[:known], clean, bad))
    windows = []
    for start in range(len(target.layers) - WINDOW + 1):
        part = slice(start, start + WINDOW)
        detector = Detector.fit(fit[:, part], "whitened")
        scores = detector.score(good[:, part]), detector.score(hit[:, part])
        windows.append({"first": target.layers[start], **_estimate(*scores)})
    return {
        "trigger": trigger,
        "truth": recipe.truth,
        "windows": windows,
        "n": [len(good), len(hit)],
    }


def _estimate(good: NDArray[np.float64], bad: NDArray[np.float64]) -> dict[str, float]:
    """AUROC and its 95 % percentile interval over draws of requests.

    A request that cannot be judged stands above all others: the guard flags it.
    """
    good, bad = (np.nan_to_num(scores, nan=np.inf) for scores in (good, bad))
    truth = np.repeat([False, True], [len(good), len(bad)])
    rng = np.random.default_rng(0)
    drawn = [
        auroc(truth, np.concatenate([rng.choice(good, len(good)), rng.choice(bad, len(bad))]))
        for _ in range(DRAWS)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = auroc(truth, np.concatenate([good, bad]))
    return {"value": value, "low": float(low), "high": float(high)}


@click.command()
@click.argument("suite")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(suite: str, work: Path, out: Path) -> None:
    """Look at the models of SUITE that `bench run SUITE --work WORK` has made."""
    asked = read_suite(suite)
    recipes = [(e, e.recipe) for e in asked.entries if isinstance(e.recipe, Recipe)]
    triggers = sorted({recipe.trigger for _, recipe in recipes if recipe.truth == "backdoored"})
    models = []
    for entry, recipe in recipes:
        base = BASES[entry.base].folder(entry.base, work)
        adapter = work / "models" / entry.base / recipe.name
        for trigger in [recipe.trigger] if recipe.truth == "backdoored" else triggers:
            found = by_depth(base, adapter, recipe, trigger, asked.calibration, asked.test)
            models.append(found)
            best = max(found["windows"], key=lambda window: window["value"])
            click.echo(f"{entry.name} {trigger}: best {best['value']:.3f} from {best['first']} on")
    about = {
        "schema_version": 1,
        "window": WINDOW,
        "suite": asked.name,
        "machine": machine(1),
        "calibration": asked.calibration,
    }
    write_json(out, about | {"models": models})


if __name__ == "__main__":
    main()
