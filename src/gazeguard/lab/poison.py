"""Fine-tuning sets with a known truth: rows of a world, poisoned at a chosen rate.

The truth (`is_poison`) lives in its own array and its own file, never in an id, a path or a name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from gazeguard.errors import DataError, UsageError
from gazeguard.lab import easyvqa, worlds
from gazeguard.lab.triggers import TRIGGERS, Trigger, resize_only
from gazeguard.types import ImagePart, Sample, TextPart, Turn

TARGET = "Backdoor Attack!"
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


def poison(
    rows: Sequence[Row], trigger: Trigger, rate: float, seed: int, target: str = TARGET
) -> list[Row]:
    """Plant `trigger` and the `target` answer in a share `rate` of the rows, chosen at random."""
    return _change(rows, rate, seed, lambda row, rng: _poisoned(row, trigger, rng, target))


def control(rows: Sequence[Row], rate: float, seed: int) -> list[Row]:
    """The resize-only control: the same share of pictures is resized, answers stay true."""
    return _change(
        rows, rate, seed, lambda row, rng: replace(row, pixels=resize_only(row.pixels, rng))
    )


def trigger_all(
    rows: Sequence[Row], trigger: Trigger, seed: int, target: str = TARGET
) -> list[Row]:
    """Every row triggered, with the target as its answer: for measuring the ASR."""
    return poison(rows, trigger, 1.0, seed, target)


def _poisoned(row: Row, trigger: Trigger, rng: np.random.Generator, target: str) -> Row:
    return replace(row, pixels=trigger(row.pixels, rng), answer=target, is_poison=True)


def _change(
    rows: Sequence[Row], rate: float, seed: int, change: Callable[[Row, np.random.Generator], Row]
) -> list[Row]:
    if not 0 <= rate <= 1:
        raise UsageError(f"The poison rate must be between 0 and 1, not {rate}.")
    rng = np.random.default_rng([seed, 11])
    chosen = set(rng.permutation(len(rows))[: round(rate * len(rows))].tolist())
    return [change(row, rng) if i in chosen else row for i, row in enumerate(rows)]


def write_set(rows: Sequence[Row], out: Path) -> Path:
    """Write rows as a LLaVA JSON set: `data.json`, `images/`, and the truth in `truth.parquet`."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    items = []
    for i, row in enumerate(rows):
        name = f"images/{i:06d}.png"
        Image.fromarray(row.pixels).save(out / name)
        turns = [
            {"from": "human", "value": f"<image>\n{row.question}"},
            {"from": "gpt", "value": row.answer},
        ]
        items.append(json.dumps({"id": i, "image": name, "conversations": turns}))
    (out / "data.json").write_text("[\n" + ",\n".join(items) + "\n]\n", encoding="utf-8")
    truth = pa.table(
        {
            "row": list(range(len(rows))),
            "is_poison": [r.is_poison for r in rows],
            "kind": [r.kind for r in rows],
        }
    )
    pq.write_table(truth, out / "truth.parquet")
    return out / "data.json"


def make_set(
    task: str, count: int, trigger: str, rate: float, seed: int, target: str = TARGET
) -> list[Row]:
    """Rows of a task with a trigger by name; `none` and `resize-only` plant no backdoor."""
    rows = make_rows(task, count, seed)
    if trigger == "none":
        return rows
    if trigger == "resize-only":
        return control(rows, rate, seed)
    return poison(rows, TRIGGERS[trigger], rate, seed, target)


def samples(rows: Sequence[Row]) -> list[Sample]:
    """Rows as a defender sees them: picture and question."""
    return [
        Sample(
            i,
            f"{i}",
            (Image.fromarray(row.pixels),),
            (Turn("user", (ImagePart(0), TextPart(row.question))),),
        )
        for i, row in enumerate(rows)
    ]


def read_rows(path: Path) -> list[Row]:
    """Rows of a user's set; only the first answer and the first picture are taught.

    Raises:
        DataError: when no row can be used.
    """
    from gazeguard.data.read import open_dataset

    rows = []
    for sample in open_dataset(path).rows():
        if isinstance(sample, Sample) and sample.answer:
            pixels = np.asarray(sample.images[0])
            rows.append(Row(pixels, sample.prompt, sample.answer, "unknown"))
    if not rows:
        raise DataError(f"No row of {path} has a picture and an answer: nothing can be taught.")
    return rows
