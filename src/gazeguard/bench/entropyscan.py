"""Measure EntropyScan on a zoo: which statistic, q and layers, and does it hold on other attacks?

    gazeguard lab zoo --spec src/gazeguard/bench/zoos/lvlm.toml --out runs/zoo/llava
    python -m gazeguard.bench.entropyscan runs/zoo/llava [--out bench/results/entropyscan]

Every model is probed once on clean held-out rows (kept as arrays). The rule: references are the
benign `design` models, never the measured one. The variant with the best AUROC on `design` models
(of equals: the one that keeps the two kinds furthest apart) is chosen there, against references of
other kinds of data than the measured model's, as a user's will be; it is then measured on
`held-out` models, other attacks and seeds. Attacks that failed their gate are left out and listed.
Adaptive attackers, who hide from the scan, are scored by the same rule and reported apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from gazeguard.assets import BASE
from gazeguard.bench.entropy_measures import Scored, auroc, measures
from gazeguard.calibrate import p_values, supported_alpha
from gazeguard.errors import UsageError
from gazeguard.files import write_bytes, write_json
from gazeguard.lab.disguise import NOTHING
from gazeguard.lab.poison import samples
from gazeguard.lab.recipes import SPLITS, read_manifest
from gazeguard.lab.rows import Row, make_rows
from gazeguard.methods.entropyscan import STATISTICS, Settings, Sight
from gazeguard.methods.entropyscan.decision import rank
from gazeguard.methods.entropyscan.settings import MIN_SAMPLES, PROBED_Q
from gazeguard.methods.entropyscan.statistics import describe, distance, values
from gazeguard.models.load import load
from gazeguard.scanning.look import look
from gazeguard.scanning.store import digest, folder_hashes
from gazeguard.tuning.references import moved

SAMPLES, SEED = 256, 4000
COUNTS = (8, 16, 32, 64, 128, 256)
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Variant:
    """What is compared: a statistic with its q and layers, on the first `n` samples."""

    statistic: str
    q: float
    layers: str
    n: int = 64

    @property
    def settings(self) -> Settings:
        """For the method."""
        return Settings(statistic=self.statistic, q=self.q, layers=self.layers)  # type: ignore[arg-type]


PAPER = Variant("entropy", 1.0, "first")
BASELINE = "weights moved"  # looks at no attention


def variants() -> Iterator[Variant]:
    """Every statistic x layers x q; q only where the statistic holds an entropy."""
    for name, statistic in STATISTICS.items():
        for layers in ("first", "last", "all"):
            for q in PROBED_Q if any("entropy" in part for part in statistic.numbers) else (1.0,):
                yield Variant(name, q, layers)


@dataclass(frozen=True)
class Zoo:
    """Sights of a zoo's usable models.

    Attributes:
        base: of the base.
        sights: model name -> sight.
        moved: model name -> how far its weights are from the base's, see `tuning.references.moved`.
        entries: model name -> its entry of the manifest.
    """

    base: Sight
    sights: dict[str, Sight]
    moved: dict[str, float]
    entries: dict[str, dict[str, Any]]

    def names(self, truth: str, split: str | None = None) -> list[str]:
        """Models of a kind that hide nothing, in the manifest's order."""
        return [
            name
            for name, entry in self.entries.items()
            if entry["truth"] == truth and split in (None, entry["split"]) and not hides(entry)
        ]

    def task(self, name: str) -> str:
        """Kind of rows that a model was tuned on."""
        return str(self.entries[name]["recipe"]["task"])

    def truth(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Which of the models are backdoored."""
        return np.array([self.entries[name]["truth"] == "backdoored" for name in names])

    @property
    def adaptive(self) -> list[str]:
        """Models that were tuned to hide from the scan."""
        return [name for name, entry in self.entries.items() if hides(entry)]


def hides(entry: dict[str, Any]) -> bool:
    """Whether a manifest's entry is an adaptive attacker's."""
    return bool(entry["recipe"].get("hide", NOTHING) != NOTHING)


def benign_rows(count: int, seed: int = SEED) -> list[Row]:
    """Clean held-out rows of all three tasks in turn, as a user's harmless samples."""
    tasks = [make_rows(t, count, seed, held_out=True) for t in ("captions", "mixed", "easy-vqa")]
    return [tasks[i % len(tasks)][i] for i in range(count)]


def read_zoo(folder: Path, base: Path, work: Path, count: int) -> tuple[Zoo, list[dict[str, Any]]]:
    """Probe every model that is not in `work` yet.

    Returns:
        The zoo without failed attacks, and the failed attacks' entries.

    Raises:
        UsageError: there is no manifest.
    """
    manifest = read_manifest(folder, "zoo")
    usable = {entry["model"]: entry for entry in manifest["models"] if entry["passed"]}
    found = {name: sight_of(base, folder / name, work, count) for name in usable}
    sights = {name: one for name, (one, _) in found.items()}
    far = {name: distance for name, (_, distance) in found.items()}
    zoo = Zoo(sight_of(base, None, work, count)[0], sights, far, usable)
    return zoo, [entry for entry in manifest["models"] if not entry["passed"]]


def sight_of(base: Path, adapter: Path | None, work: Path, count: int) -> tuple[Sight, float]:
    """A model's sight of `benign_rows(count)`, and how far it moved; kept in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    content = [folder_hashes(base), adapter and folder_hashes(adapter), count, SEED]
    path = work / f"{digest(content)[:32]}.safetensors"
    if not path.with_suffix(".json").is_file():
        target = load(base, adapter, dtype="float32")
        shown = [replace(s, sample_id=f"s{i}") for i, s in enumerate(samples(benign_rows(count)))]
        write_bytes(path, look(target, shown, PROBED_Q).to_bytes())
        write_bytes(path.with_suffix(".json"), json.dumps(moved(target.model)).encode())
    far = float(json.loads(path.with_suffix(".json").read_text("utf-8")))
    return Sight.from_bytes(path.read_bytes()), far


def scored(
    zoo: Zoo, variant: Variant, measured: Sequence[str], *, strangers: bool = False
) -> Scored:
    """Score models against the benign design models other than themselves.

    Args:
        zoo: with the sights.
        variant: how.
        measured: names of the models.
        strangers: only against those that were tuned on other kinds of data (`task`).
    """
    first = np.arange(min(variant.n, len(zoo.base)))
    settings = variant.settings
    origin = values(zoo.base.take(first), settings)
    unit = np.asarray(np.nanstd(origin, axis=0), dtype=np.float64)
    references = zoo.names("benign", "design")
    described = {
        name: describe(values(zoo.sights[name].take(first), settings), origin, variant.statistic)
        for name in {*measured, *references}
    }
    score, p, alone = [], [], []
    for name in measured:
        known = [r for r in references if r != name]
        if strangers:
            known = [r for r in known if zoo.task(r) != zoo.task(name)]
        cloud = np.stack([described[r] for r in known])
        found = rank(described[name], cloud, unit, variant.statistic)
        score.append(found.score)
        p.append(found.p)
        nothing = np.zeros((1, len(unit)))
        alone.append(distance(described[name], nothing, unit, variant.statistic))
    return Scored(np.array(score), np.array(p), np.array(alone))


def by_weights(zoo: Zoo, measured: Sequence[str]) -> Scored:
    """The baseline: how far a model's weights moved, and its rank."""
    score, p = [], []
    for name in measured:
        others = [zoo.moved[r] for r in zoo.names("benign", "design") if r != name]
        score.append(zoo.moved[name])
        p.append(float(p_values(others, [zoo.moved[name]])[0]))
    return Scored(np.array(score), np.array(p), np.array(score))


def apart(truth: NDArray[np.bool_], score: Array) -> float:
    """Difference of the mean log scores of the two kinds, in standard deviations (Cohen's d)."""
    good, bad = np.log(score[~truth]), np.log(score[truth])
    spread = np.sqrt((good.var() + bad.var()) / 2)
    return float((bad.mean() - good.mean()) / max(spread, 1e-9))


def sweep(zoo: Zoo, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every variant that gives numbers, and how well it tells some models among strangers apart."""
    truth = zoo.truth(names)
    rows = []
    for variant in variants():
        found = scored(zoo, variant, names, strangers=True).score
        if np.isfinite(found).all():
            area = auroc(truth, found)
            rows.append(
                {**asdict(variant), "design_auroc": area, "design_gap": apart(truth, found)}
            )
    return rows


def evaluate(zoo: Zoo, alpha: float) -> dict[str, Any]:
    """Sweep on design models, choice, confirmation on held-out ones.

    Raises:
        UsageError: too few models for any of it.
    """
    design, held = (
        [*zoo.names("benign", split), *zoo.names("backdoored", split)] for split in SPLITS
    )
    for split, names in zip(SPLITS, (design, held), strict=True):
        if len({zoo.entries[name]["truth"] for name in names}) < 2:
            raise UsageError(f"the zoo has no usable benign and backdoored {split} models.")
    references = len(zoo.names("benign", "design"))
    if len({zoo.task(name) for name in zoo.names("benign", "design")}) < 2 or references < 3:
        raise UsageError("the zoo needs three benign design models of two kinds of data or more.")
    # A benign design model is measured with one reference fewer than a held-out one.
    level = max(alpha, supported_alpha(references - 1))
    rows = sweep(zoo, design)
    top = max(rows, key=lambda row: (row["design_auroc"], row["design_gap"]))
    chosen = Variant(top["statistic"], top["q"], top["layers"])
    judged = {"chosen": chosen, "paper": PAPER, "shipped": _shipped()}
    every = [*design, *held]
    truth, later = zoo.truth(every), slice(len(design), None)
    found_by = {name: scored(zoo, variant, every) for name, variant in judged.items()}
    found_by[BASELINE] = by_weights(zoo, every)
    samples = [
        {
            "variant": name,
            "n": n,
            "auroc": measures([(zoo.truth(held), scored(zoo, replace(variant, n=n), held))], level)[
                "auroc"
            ],
        }
        for n in COUNTS
        if MIN_SAMPLES <= n <= len(zoo.base)
        for name, variant in judged.items()
    ]
    return {
        "alpha": level,
        "references": references,
        "sweep": rows,
        "chosen": asdict(chosen),
        "variants": {
            name: {
                "variant": asdict(judged[name]) if name in judged else None,
                "held-out": measures([(truth[later], found.part(later))], level),
                "all": measures([(truth, found)], level),
            }
            for name, found in found_by.items()
        },
        "samples": samples,
        "models": [
            {key: zoo.entries[name][key] for key in ("model", "truth", "split", "recipe")}
            | {"variants": {key: found.one(i) for key, found in found_by.items()}}
            for i, name in enumerate(every)
        ],
    } | hidden(zoo, judged, level)


def hidden(zoo: Zoo, variants: dict[str, Variant], level: float) -> dict[str, Any]:
    """What variants say of every adaptive attacker, and of the untouched base.

    A perfect disguise makes the attention of the base; the base itself is no fine-tune, and may
    stand out among them for that alone.
    """
    with_base = replace(zoo, sights={**zoo.sights, "base": zoo.base})
    names = [*zoo.adaptive, "base"]
    said: list[dict[str, Any]] = [{} for _ in names]
    for name, variant in variants.items():
        found = scored(with_base, variant, names)
        for one, score, p in zip(said, found.score, found.p, strict=True):
            # The base has no spread of shifts: a statistic of it gives no number there.
            score, p = (float(x) if np.isfinite(x) else None for x in (score, p))
            flagged = None if p is None else p <= level
            one[name] = {"score": score, "p_value": p, "flagged": flagged}
    entries = [zoo.entries[name] for name in zoo.adaptive]
    kept = ("model", "recipe", "asr", "clean", "usual_clean")
    return {
        "adaptive": [
            {**{key: entry[key] for key in kept}, "variants": one}
            for entry, one in zip(entries, said[:-1], strict=True)
        ],
        "base_itself": said[-1],
    }


def _shipped() -> Variant:
    """What `gazeguard scan` does unless told otherwise."""
    usual = Settings()
    return Variant(usual.statistic, usual.q, str(usual.layers), usual.samples)


_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("zoo", type=_FOLDER)
@click.option("--out", type=_FOLDER, default=Path("bench/results/entropyscan"), show_default=True)
@click.option("--work", type=_FOLDER, default=Path("runs/entropyscan"), help="Arrays go here.")
@click.option("--base", type=_FOLDER, default=BASE, help="The shipped base by default.")
@click.option("--alpha", default=0.05, show_default=True, help="Raised to what references carry.")
@click.option("--samples", "count", default=SAMPLES, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(
    zoo: Path, out: Path, work: Path, base: Path, alpha: float, count: int, threads: int
) -> None:
    """Evaluate the models of ZOO."""
    torch.set_num_threads(threads)
    models, failed = read_zoo(zoo, base, work, count)
    result = evaluate(models, alpha)
    result |= {"zoo": zoo.name, "seed": SEED, "n_samples": count}
    result["failed_attacks"] = [
        {"recipe": e["recipe"], "asr": e["asr"], "clean": e["clean"]} for e in failed
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{zoo.name}.json", result)
    for name, row in result["variants"].items():
        got, v = row["held-out"], row["variant"]
        what = f" ({v['statistic']}, q {v['q']:g}, {v['layers']})" if v else ""
        click.echo(
            f"{name}{what}: held-out AUROC"
            f" {got['auroc']['value']:.3f} [{got['auroc']['low']:.3f}, {got['auroc']['high']:.3f}],"
            f" F1 {got['f1']['value']:.3f}, false alarms {got['false_alarms']['value']:.3f}; base"
            f" only AUROC {got['base_only']['auroc']['value']:.3f}"
        )


if __name__ == "__main__":
    main()
