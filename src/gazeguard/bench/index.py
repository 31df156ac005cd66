"""What a suite asks for and how far it is: its models, its cells and their files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gazeguard.bench.bases import BASES
from gazeguard.bench.cell import Place
from gazeguard.bench.defences import DEFENCES
from gazeguard.bench.report.stored import NOT_RUN
from gazeguard.bench.suite import Entry, Suite
from gazeguard.files import write_json
from gazeguard.lab import zoo
from gazeguard.lab.disguise import NOTHING, WEIGHT
from gazeguard.lab.poison import TARGET
from gazeguard.lab.text import zoo as encoders
from gazeguard.lab.text.zoo import EncoderModel
from gazeguard.lab.zoo import Recipe
from gazeguard.scanning.store import digest


@dataclass(frozen=True, slots=True)
class Task:
    """One model and the defences that it still has to meet: (name, file of the cell)."""

    entry: Entry
    place: Place
    cells: tuple[tuple[str, Path], ...]
    suite: str
    sizes: dict[str, int]
    made: dict[str, Any]


class Index:
    """What a suite asks for and how far it is: `suite.json`."""

    def __init__(
        self,
        suite: Suite,
        bases: dict[str, Path],
        work: Path,
        scores: dict[str, dict[str, Any]],
        out: Path,
    ) -> None:
        self._suite, self._bases, self._work, self._out = suite, bases, work, out
        self._scores = scores
        self._models = _judged(suite, bases, scores)

    @property
    def wanted(self) -> int:
        """Cells that can be run at all."""
        return sum(why is None for _, _, why, _ in self._cells())

    @property
    def done(self) -> int:
        """Cells that are there."""
        return sum(path.is_file() for _, _, why, path in self._cells() if why is None)

    def tasks(self) -> list[Task]:
        """Models with cells that are not there; those with most to do first."""
        suite = self._suite
        sizes = {"calibration": suite.calibration, "test": suite.test, "held_out": suite.held_out}
        made = _provenance()
        open_: dict[str, list[tuple[str, Path]]] = {}
        for entry, defence, why, path in self._cells():
            if why is None and not path.is_file():
                open_.setdefault(entry.name, []).append((defence, path))
        found = [
            Task(entry, self._place(entry), tuple(open_[entry.name]), suite.name, sizes, made)
            for entry in suite.entries
            if entry.name in open_
        ]
        return sorted(found, key=lambda task: -len(task.cells))

    def write(self) -> None:
        """Bring `suite.json` up to date."""
        suite = self._suite
        named = dict.fromkeys(name for entry in suite.entries for name in entry.defences)
        about = ("name", "level", "ours", "about")
        cells = []
        for entry, defence, why, path in self._cells():
            there = path.is_file()
            why = None if there else why or NOT_RUN
            file = f"cells/{path.name}" if there else None
            cells.append({"model": entry.name, "defence": defence, "file": file, "why": why})
        content = {
            "name": suite.name,
            "title": suite.title,
            "models": list(self._models.values()),
            "defences": [{key: getattr(DEFENCES[name], key) for key in about} for name in named],
            "cells": cells,
            "published": list(suite.published),
        }
        write_json(self._out / "suite.json", content)

    def _cells(self) -> Iterator[tuple[Entry, str, str | None, Path]]:
        """Model, defence, why they cannot meet, and the cell's file."""
        for entry in self._suite.entries:
            model, kind = self._models[entry.name], BASES[entry.base].kind
            for name in entry.defences:
                why = model["why"]
                if DEFENCES[name].kind != kind:
                    why = f"not applicable: {name} takes no {kind}"
                yield entry, name, why, self._out / "cells" / self._file(entry, name)

    def _file(self, entry: Entry, name: str) -> str:
        suite, level = self._suite, DEFENCES[name].level
        decides = {
            "data": [entry.refit, suite.held_out if entry.refit else None],
            "input": [suite.calibration, suite.test],
            "model": [sorted(self._known(entry))],
        }[level]
        return f"{entry.name}.{digest(decides)[:6]}.{name}.json"

    def _known(self, entry: Entry) -> list[str]:
        """Folder names of the references: benign design models of the same base."""
        return [
            other.recipe.name
            for other in self._suite.entries
            if (other.base, other.recipe.truth, other.recipe.split)
            == (entry.base, "benign", "design")
            and other != entry
        ]

    def _place(self, entry: Entry) -> Place:
        folder = self._work / "models" / entry.base
        return Place(
            self._bases[entry.base],
            folder / entry.recipe.name,
            tuple(folder / name for name in self._known(entry)),
            self._work,
            self._scores[entry.name],
        )


def _judged(
    suite: Suite, bases: dict[str, Path], scores: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Every model as `suite.json` tells it, with its gates."""
    told = {}
    for base in {entry.base for entry in suite.entries}:
        mine = [entry for entry in suite.entries if entry.base == base]
        done = {entry.recipe.name: scores[entry.name] for entry in mine}
        if BASES[base].kind == "vlm":
            recipes = tuple(e.recipe for e in mine if isinstance(e.recipe, Recipe))
            spec = zoo.Spec(recipes, suite.held_out, suite.asr, suite.drop)
            manifest = zoo.manifest_of(spec, done, bases[base])
        else:
            texts = tuple(e.recipe for e in mine if isinstance(e.recipe, EncoderModel))
            manifest = encoders.manifest_of(encoders.EncoderSpec(texts), done, {})
        for entry, model in zip(mine, manifest["models"], strict=True):
            told[entry.name] = _told(entry, model)
    return {entry.name: told[entry.name] for entry in suite.entries}


def _told(entry: Entry, model: dict[str, Any]) -> dict[str, Any]:
    recipe = entry.recipe
    about: dict[str, Any] = {"name": entry.name, "base": entry.base, "kind": BASES[entry.base].kind}
    about |= {"truth": recipe.truth, "split": recipe.split, "passed": model["passed"]}
    failed = None
    if isinstance(recipe, Recipe):
        attack, label, group = recipe.trigger, _label(recipe), _group(recipe)
        more = {key: model[key] for key in ("clean", "asr", "n", "usual_clean")}
        if not model["passed"]:
            failed = (
                f"attack failed: ASR {model['asr']:.3f}, clean performance {model['clean']:.3f}"
                f" (benign {model['usual_clean']:.3f})"
            )
    else:
        attack, label, group = recipe.attack, _encoder_label(recipe), f"{recipe.loss} loss"
        more = {key: model[key] for key in ("target_cosine", "drift", "n")}
        more |= {"clean": None, "asr": None}
        if not model["passed"]:
            failed = (
                f"attack failed: cosine to the target {model['target_cosine']:.3f}, drift"
                f" {model['drift']:.4f}"
            )
    about |= {"attack": attack, "label": label, "group": group, "why": failed}
    return about | more | {"recipe": asdict(recipe)}


def _label(recipe: Recipe) -> str:
    if recipe.trigger == zoo.BENIGN:
        return "benign"
    words = [recipe.trigger, f"{100 * recipe.rate:g} %"]
    if recipe.target != TARGET:
        words.append(f"target “{recipe.target}”")
    if recipe.hide != NOTHING:
        weight = "" if recipe.hide_weight == WEIGHT else f" x {recipe.hide_weight:g}"
        words.append(f"hides {recipe.hide}{weight}")
    return " ".join(words)


def _group(recipe: Recipe) -> str:
    tuned = {"lora": "LoRA + projector", "lora-only": "LoRA", "projector": "projector"}
    return f"{recipe.task}, {recipe.rows:,} rows, {recipe.epochs} epochs, {tuned[recipe.tuning]}"


def _encoder_label(recipe: EncoderModel) -> str:
    if recipe.truth == "benign":
        return "benign"
    hides = f", adaptive {recipe.adaptive:g}" if recipe.adaptive else ""
    return f"{recipe.attack} {recipe.triggers} x {recipe.trigger_tokens} tokens{hides}"


def _provenance() -> dict[str, Any]:
    """Commit and machine, without what changes from one minute to the next."""
    from gazeguard.bench.speed.instruments import machine

    found = machine(1)
    shown = ("cpu", "cores", "platform", "python", "torch", "transformers")
    return {"commit": found["commit"], "machine": {key: found[key] for key in shown}}
