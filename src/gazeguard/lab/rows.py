"""Clean rows of the lab's tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gazeguard.errors import UsageError
from gazeguard.lab import easyvqa, worlds

TASKS = ("captions", "mixed", "easy-vqa")


@dataclass(frozen=True, slots=True)
class Row:
    """One fine-tuning row; `pixels` is uint8 `(64, 64, 3)`, `kind` names the question type."""

    pixels: NDArray[np.uint8]
    question: str
    answer: str
    kind: str
    is_poison: bool = False


def make_rows(task: str, count: int, seed: int, *, held_out: bool = False) -> list[Row]:
    """Clean rows of a task: `captions` (one task), `mixed` (captions and five question kinds).

    `easy-vqa` takes one question per third-party image; images that the base saw are left out.

    Args:
        task: one of `TASKS`.
        count: number of rows.
        seed: names the draw.
        held_out: rows for scoring; never overlap the training rows of any seed.
    """
    rng = np.random.default_rng([seed, TASKS.index(_known(task)), int(held_out), 7])
    rows: list[Row] = []
    if task == "easy-vqa":
        images = easyvqa.load("test" if held_out else "finetune")
        while len(rows) < count:
            for i in rng.permutation(len(images))[: count - len(rows)]:
                path, asked = images[i]
                qa = asked[rng.integers(len(asked))]
                with Image.open(path) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                rows.append(Row(pixels, qa.question, qa.answer, qa.kind))
        return rows
    for _ in range(count):
        scene = worlds.make_scene(rng)
        kinds = ["caption"] if task == "captions" else ["caption", *worlds.KINDS]
        kind = kinds[rng.integers(len(kinds))]
        qa = worlds.caption(scene) if kind == "caption" else worlds.ask(scene, kind, rng)
        rows.append(Row(scene.pixels, qa.question, qa.answer, qa.kind))
    return rows


def _known(task: str) -> str:
    if task not in TASKS:
        raise UsageError(f"Task '{task}' is unknown: choose one of {', '.join(TASKS)}.")
    return task
