"""Number formats and compiled parts: what they bring to the model stage, and what they move."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gazeguard.bench.scale.sets import lab_set
from gazeguard.bench.scale.stage import looking, parts_of, subject
from gazeguard.bench.speed.forward import Size
from gazeguard.bench.speed.instruments import Figure, Part, Spread, interleave, ratio
from gazeguard.cleaning.batches import Part as Encoded
from gazeguard.cleaning.measure import Look
from gazeguard.models.load import load

PLAIN, COMPILED = "float32", "compiled"


def formats(work: Path, rows: int, repeats: int, size: Size | None, compiled: bool) -> Part:
    """The model stage in bfloat16, and in float32 with compiled picture encoder and MLPs.

    Attention itself stays as it is: the probe stands in its way, so a compiler could not see
    through it.

    Args:
        work: for models and sets.
        rows: of the lab.
        repeats: of each way, in turns.
        size: of a random model; the shipped base when None.
        compiled: whether to try that too; the first pass takes a minute and a C++ compiler.
    """
    folder, name = subject(work, size)
    ways = {PLAIN: _look(folder, "float32"), "bfloat16": _look(folder, "bfloat16")}
    if compiled:
        ways[COMPILED] = _look(folder, "float32")
        _compile(ways[COMPILED])
    data = lab_set(work / "set.parquet", rows)
    parts = {way: parts_of(look, data, rows) for way, look in ways.items()}
    runs = {
        # A compiler cannot see through `fast_linear` either.
        way: partial(looking, look, parts[way], fast=way != COMPILED)
        for way, look in ways.items()
    }
    took = interleave(runs, repeats)
    entropy = {way: _entropy(look, parts[way]) for way, look in ways.items()}
    figures = []
    for way in list(ways)[1:]:
        what = f"model stage, {way} / {PLAIN}, {name}, {rows} rows"
        moved = float(np.abs(entropy[way] - entropy[PLAIN]).max())
        figures.append(Figure(f"{what}: rows/s", "x", ratio(took[PLAIN], took[way])))
        figures.append(Figure(f"{what}: entropies move by at most", "nats", Spread.of([moved])))
    return figures, {"rows": rows, "seconds": took}


def _look(folder: Path, dtype: str) -> Look:
    return Look(load(folder, dtype=dtype, device_map="cpu"), None)


def _compile(look: Look) -> None:
    base: Any = look.target.base
    base.model.vision_tower.compile(dynamic=True)
    decoder: Any = look.target.decoder
    for layer in decoder.layers:
        layer.mlp.compile(dynamic=True)


def _entropy(look: Look, parts: list[Encoded]) -> NDArray[np.float32]:
    with torch.inference_mode():
        found = [record for some, encoded in parts for record in look(some, encoded)]
    return np.array([record["entropy"] for record in found], np.float32)
