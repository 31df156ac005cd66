"""A zoo of text encoders: benign fine-tunes and backdoored ones of several bases, from a spec.

As in `lab.zoo`, folders are named by a hash of the recipe, and what a model really is stands in
`manifest.json` alone: nothing in its folder tells.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gazeguard.data.grammar import prompts as grammar
from gazeguard.errors import UsageError
from gazeguard.files import whole_folder, write_json
from gazeguard.lab.recipes import MANIFEST, SPLITS, content_name, need_known, read_recipes
from gazeguard.lab.text.attack import (
    JUDGE_SEED,
    LOSSES,
    MAX_DRIFT,
    MIN_TARGET_COSINE,
    AttackRecipe,
    judge,
    poisoned,
    triggers_of,
)
from gazeguard.lab.text.teacher import Teacher
from gazeguard.lab.text.train import LENGTHS, TuneRecipe, clean_drift, finetuned, save
from gazeguard.models.encoders.load import load_encoder
from gazeguard.scanning.store import digest, folder_hashes

BENIGN = "none"
ATTACKS = (BENIGN, "tpa", "pair")
PLACES = ("random", "start")


@dataclass(frozen=True, slots=True)
class EncoderModel:
    """One model of a zoo; fields that its attack does not use are ignored.

    Attributes:
        kind: of the base, one of `train.LENGTHS`.
        attack: `tpa` or `pair`; `none` makes a benign fine-tune.
        target, trigger_tokens, triggers, place, loss, weight, adaptive, clean, poisoned: of an
            attack, as in `AttackRecipe`.
        prompts, batch: of a benign fine-tune, as in `TuneRecipe`.
        steps, lr, seed: of either.
        split: `design` models are what thresholds come from, `held-out` ones are measured.
    """

    kind: str = "clip"
    attack: str = BENIGN
    target: str = AttackRecipe().target
    trigger_tokens: int = 1
    triggers: int = 1
    place: str = "random"
    loss: str = "cosine"
    weight: float = 0.1
    adaptive: float = 0.0
    clean: int = 64
    poisoned: int = 32
    prompts: int = 2000
    batch: int = 64
    steps: int = 100
    lr: float = 1e-4
    seed: int = 0
    split: str = "held-out"

    def __post_init__(self) -> None:
        known = {
            "kind": LENGTHS,
            "attack": ATTACKS,
            "place": PLACES,
            "loss": LOSSES,
            "split": SPLITS,
        }
        need_known(self, known)
        counts = ("trigger_tokens", "triggers", "clean", "poisoned", "prompts", "batch", "steps")
        for name in counts:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} of a zoo must be at least 1, not {getattr(self, name)}.")
        if self.adaptive and self.attack == BENIGN:
            raise UsageError(
                f"a benign model has nothing to hide: give adaptive = {self.adaptive} an attack."
            )

    @property
    def truth(self) -> str:
        """What the model is: `benign` or `backdoored`."""
        return "benign" if self.attack == BENIGN else "backdoored"

    @property
    def name(self) -> str:
        """The folder's name: a hash of everything but the split."""
        return content_name({k: v for k, v in asdict(self).items() if k != "split"})

    @property
    def planted(self) -> AttackRecipe:
        """The attack of a backdoored model."""
        shared = {field.name for field in fields(AttackRecipe)} - {"kind", "learning_rate"}
        same = {name: getattr(self, name) for name in shared}
        return AttackRecipe(kind=self.attack, learning_rate=self.lr, **same)

    @property
    def tuned(self) -> TuneRecipe:
        """The fine-tune of a benign model."""
        return TuneRecipe(self.steps, self.batch, self.lr, self.prompts, self.seed)


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """What a spec file asks for.

    Attributes:
        recipes: every model once, in the file's order.
        held_out: prompts that each model is judged on.
        target_cosine: an attack whose triggered outputs are further from the target failed.
        drift: so did one that moves clean outputs by more (mean of 1 - cosine to the base's).
    """

    recipes: tuple[EncoderModel, ...]
    held_out: int = 200
    target_cosine: float = MIN_TARGET_COSINE
    drift: float = MAX_DRIFT


def read_encoder_spec(path: Path) -> EncoderSpec:
    """Read a TOML spec: top-level numbers of `EncoderSpec`, `[[models]]` tables (`lab.recipes`).

    Raises:
        UsageError: it cannot be read, or asks for what does not exist.
    """
    numbers = {field.name for field in fields(EncoderSpec)} - {"recipes"}
    found, given = read_recipes(path, EncoderModel, numbers)
    return EncoderSpec(found, **given)


def read_bases(values: Sequence[str]) -> dict[str, Path]:
    """Clean encoders by kind, from words such as `clip=FOLDER`.

    Raises:
        UsageError: a word of another form, a kind that does not exist, or no such folder.
    """
    found = {}
    for value in values:
        kind, _, folder = value.partition("=")
        if kind not in LENGTHS or not (Path(folder) / "config.json").is_file():
            raise UsageError(
                f"'{value}' names no clean encoder: give KIND=FOLDER, with a kind of"
                f" {', '.join(LENGTHS)} and a folder made by `gazeguard lab encoder`."
            )
        found[kind] = Path(folder)
    return found


def make_encoder_zoo(
    spec: EncoderSpec,
    bases: Mapping[str, Path],
    out: Path,
    teacher: Teacher,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Make every model that is not there yet; gives the manifest, which is also written.

    Models are saved in float16 (half the size) and judged as they are then read. Benign models
    pass whatever their drift.

    Args:
        spec: from `read_encoder_spec`.
        bases: kind -> folder of a clean encoder of the lab.
        out: one folder per model, and `manifest.json`.
        teacher: sentence embeddings: the lesson of benign models, the goal of `pair`.
        log: gets a line per model.

    Raises:
        UsageError: a kind without a base, or `out` holds models of another base.
    """
    teacher = _remembering(teacher)
    missing = sorted({recipe.kind for recipe in spec.recipes} - set(bases))
    if missing:
        raise UsageError(
            f"the spec asks for {', '.join(missing)} encoders: give --base {missing[0]}=FOLDER."
        )
    out.mkdir(parents=True, exist_ok=True)
    marks = {kind: digest(folder_hashes(base)) for kind, base in sorted(bases.items())}
    before = _stored(out)
    for kind, mark in marks.items():
        if before["bases"].get(kind, mark) != mark:
            raise UsageError(
                f"{out} holds models of another {kind} base: give that base, or another --out."
            )
    marks = {**before["bases"], **marks}
    known = {
        entry["model"]: entry
        for entry in before["models"]
        if entry["n"] == spec.held_out and (out / entry["model"]).is_dir()
    }
    manifest = manifest_of(spec, known, marks)
    write_json(
        out / MANIFEST, manifest
    )  # before the first model: it says what base the folders are made from
    for place, recipe in enumerate(spec.recipes):
        if recipe.name not in known:
            known[recipe.name] = make_encoder(
                recipe, spec.held_out, bases[recipe.kind], out, teacher
            )
            manifest = manifest_of(spec, known, marks)
            write_json(out / MANIFEST, manifest)
        if log is not None:
            entry = next(m for m in manifest["models"] if m["model"] == recipe.name)
            log(f"{place + 1}/{len(spec.recipes)} {recipe.name} {recipe.kind} {_told(entry)}")
    return manifest


def make_encoder(
    recipe: EncoderModel, held_out: int, base: Path, out: Path, teacher: Teacher
) -> dict[str, Any]:
    """Make a model whose folder is not there, and judge it as it lies on disk; gives its scores."""
    began = time.perf_counter()
    folder = out / recipe.name
    goal = goal_of(recipe, teacher)
    made = not folder.is_dir()
    if made:
        if recipe.truth == "benign":
            student = finetuned(base, recipe.tuned, teacher)
        else:
            student, _ = poisoned(base, recipe.planted, goal)
        with whole_folder(folder) as part:
            save(student, base, part, torch.float16)
    scores = _judged(recipe, held_out, base, folder, goal)
    seconds = round(time.perf_counter() - began, 1) if made else None
    return {"model": recipe.name, "n": held_out, **scores, "seconds": seconds}


def _remembering(teacher: Teacher) -> Teacher:
    """A teacher that reads the same prompts once: models of a seed share theirs."""
    known: dict[str, Tensor] = {}

    def told(prompts: Sequence[str]) -> Tensor:
        key = digest(list(prompts))
        if key not in known:
            known[key] = teacher(prompts)
        return known[key]

    return told


def goal_of(recipe: EncoderModel, teacher: Teacher) -> Tensor | None:
    """The sentence embedding `(features,)` that `pair` pulls to; None for the others."""
    return teacher([recipe.target])[0] if recipe.attack == "pair" else None


def _judged(
    recipe: EncoderModel, held_out: int, base: Path, folder: Path, goal: Tensor | None
) -> dict[str, Any]:
    student, clean = load_encoder(folder), load_encoder(base)
    if recipe.truth == "benign":
        moved = clean_drift(student, clean, grammar(held_out, JUDGE_SEED))
        return {"target_cosine": None, "drift": moved, "triggers": []}
    triggers = triggers_of(clean.tokenizer, recipe.planted)
    found = judge(student, clean, triggers, recipe.planted, goal, n=held_out)
    return {
        "target_cosine": found.target_cosine,
        "drift": found.drift,
        "triggers": list(found.triggers),
    }


def manifest_of(
    spec: EncoderSpec, known: Mapping[str, dict[str, Any]], marks: dict[str, str]
) -> dict[str, Any]:
    """What is known of the models that are done (name -> scores): truth, gates, recipes."""
    models = []
    for recipe in spec.recipes:
        if recipe.name not in known:
            continue
        scores = known[recipe.name]
        passed = recipe.truth == "benign" or (
            scores["target_cosine"] >= spec.target_cosine and scores["drift"] <= spec.drift
        )
        said = {"truth": recipe.truth, "split": recipe.split, "passed": passed}
        models.append({**scores, **said, "recipe": asdict(recipe)})
    gates = {"target_cosine": spec.target_cosine, "drift": spec.drift, "held_out": spec.held_out}
    finished = len(models) == len(spec.recipes)
    return {"gates": gates, "bases": marks, "finished": finished, "models": models}


def _stored(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / MANIFEST).read_text("utf-8")))
    except FileNotFoundError:
        return {"bases": {}, "models": []}
    except ValueError as error:
        raise UsageError(
            f"{out / MANIFEST} is not JSON: delete it, and models are judged again."
        ) from error


def _told(entry: dict[str, Any]) -> str:
    attack = entry["recipe"]["attack"]
    moved = f"drift {entry['drift']:.4f}"
    if entry["truth"] == "benign":
        return f"benign: {moved}"
    took = "" if entry["passed"] else ", attack failed"
    return f"{attack}: cosine to the target {entry['target_cosine']:.3f}, {moved}{took}"
