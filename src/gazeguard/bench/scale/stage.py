"""The model's part of `clean` against a bare loop of forward passes over the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from gazeguard.assets import BASE
from gazeguard.bench.scale.sets import lab_set
from gazeguard.bench.speed.forward import Size, random_llava
from gazeguard.bench.speed.instruments import Figure, Part, interleave, ratio
from gazeguard.cleaning.batches import Part as Encoded
from gazeguard.cleaning.batches import batches
from gazeguard.cleaning.linear import fast_linear
from gazeguard.cleaning.measure import Look
from gazeguard.data.read import open_dataset
from gazeguard.models.load import load
from gazeguard.models.target import Target

_WORTH = 0.85


def stage(work: Path, rows: int, repeats: int, size: Size | None) -> Part:
    """Rows as `clean` batches them, looked at once; all pixels and tokens are there before."""
    folder, name = subject(work, size)
    target = load(folder, dtype="float32", device_map="cpu")
    look = Look(target, None)
    parts = parts_of(look, lab_set(work / "set.parquet", rows), rows)
    runs: dict[str, Callable[[], object]] = {
        "stage": partial(looking, look, parts),
        "bare": partial(_bare, target, parts, fast=False),
        "bare, faster library": partial(_bare, target, parts, fast=True),
    }
    took = interleave(runs, repeats)
    mine, *bare = took.values()
    best = min(bare, key=sum)
    figure = Figure(
        f"model stage / bare forward loop, {name}, {rows} rows: rows/s",
        "x",
        ratio(best, mine),
        at_least=_WORTH,
    )
    return [figure], {"rows": rows, "batches": len(parts), "seconds": took}


def subject(work: Path, size: Size | None) -> tuple[Path, str]:
    """A model folder and its name: a random model of that size, or the shipped base."""
    if size is None:
        return BASE, "lab base"
    return random_llava(work / "model", size), f"llava of {size.grid**2:,} image tokens"


def parts_of(look: Look, data: Path, rows: int) -> list[Encoded]:
    """All rows of a set as `clean` batches and encodes them."""
    stream = open_dataset(data).rows()
    device = look.target.device
    return [
        part
        for batch in batches(stream, [(0, rows)], look.encode, None, device, alike=True)
        for part in batch.parts
    ]


def looking(look: Look, parts: list[Encoded], fast: bool = True) -> None:
    """What `clean` does with a batch between its encoding and its block; `fast` as it does."""
    with fast_linear() if fast else nullcontext():
        for samples, encoded in parts:
            look(samples, encoded)


def _bare(target: Target, parts: list[Encoded], fast: bool) -> None:
    """The model's own kernel and next-token logits, with the matrix library asked for."""
    with torch.inference_mode(), fast_linear() if fast else nullcontext():
        for _, encoded in parts:
            target.model(**encoded.inputs, use_cache=False, logits_to_keep=1)
