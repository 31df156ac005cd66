"""Fine-tuning sets with a known truth: rows of a world, poisoned at a chosen rate.

The truth (`is_poison`) lives in its own array and its own file, never in an id, a path or a name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gazeguard.errors import DataError, UsageError
from gazeguard.lab.attacks import ATTACKS, Attack
from gazeguard.lab.rows import Row, make_rows
from gazeguard.lab.triggers import resize_only
from gazeguard.types import ImagePart, Sample, TextPart, Turn

TARGET = "Backdoor Attack!"


def poison(
    rows: Sequence[Row], attack: Attack, rate: float, seed: int, target: str = TARGET
) -> list[Row]:
    """Plant an attack in a share `rate` of the rows, chosen at random among those that it fits.

    Where the attack has decoys as many other rows become decoys.

    Raises:
        UsageError: no such rate, or the attack fits fewer rows.
    """
    chosen, others, rng = _drawn(rows, rate, seed, attack.fits)
    decoys = {i: place for place, i in enumerate(others[: len(chosen)])}
    found = []
    for i, row in enumerate(rows):
        if i in chosen:
            found.append(attack.poison(row, rng, target))
        elif i in decoys and (parts := attack.decoys(row, rng)):
            found.append(parts[decoys[i] % len(parts)])
        else:
            found.append(row)
    return found


def control(rows: Sequence[Row], rate: float, seed: int) -> list[Row]:
    """The resize-only control: the same share of pictures is resized, answers stay true."""
    chosen, _, rng = _drawn(rows, rate, seed, lambda row: True)
    return [
        replace(row, pixels=resize_only(row.pixels, rng)) if i in chosen else row
        for i, row in enumerate(rows)
    ]


def trigger_all(rows: Sequence[Row], attack: Attack, seed: int, target: str = TARGET) -> list[Row]:
    """Every row that the attack fits, triggered, with the answer it wants: for the ASR."""
    return poison([row for row in rows if attack.fits(row)], attack, 1.0, seed, target)


def _drawn(
    rows: Sequence[Row], rate: float, seed: int, fits: Callable[[Row], bool]
) -> tuple[set[int], list[int], np.random.Generator]:
    """A share of all rows among those that fit, the other rows in random order, the generator."""
    if not 0 <= rate <= 1:
        raise UsageError(f"The poison rate must be between 0 and 1, not {rate}.")
    rng = np.random.default_rng([seed, 11])
    order = rng.permutation(len(rows)).tolist()
    able, wanted = [i for i in order if fits(rows[i])], round(rate * len(rows))
    if len(able) < wanted:
        raise UsageError(
            f"the attack fits {len(able):,} of {len(rows):,} rows: use a rate of at most"
            f" {len(able) / len(rows):.2f}."
        )
    chosen = set(able[:wanted])
    return chosen, [i for i in order if i not in chosen], rng


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
    """Rows of a task with an attack by name; `none` and `resize-only` plant no backdoor."""
    rows = make_rows(task, count, seed)
    if trigger == "none":
        return rows
    if trigger == "resize-only":
        return control(rows, rate, seed)
    return poison(rows, ATTACKS[trigger], rate, seed, target)


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
