"""Other questions about a picture: what they add to reading its own prompt once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gazeguard.bench.speed.forward import Size, random_llava
from gazeguard.bench.speed.instruments import Figure, Seconds, Spread, interleave
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.probe.branch import branch, with_question
from gazeguard.types import ImagePart, Sample, TextPart, Turn

GRIDS = (8, 24, 48)  # 64, 576 and 2,304 image tokens
# Every byte is a token here, so these are as long as questions of some ten words' pieces.
OWN = "what is it?"
OTHERS = ("how many?", "which one?", "any sign?", "what now?")
ANSWER = "a dog, black"
TOKENS = 8


def measure(
    folder: Path, size: Size, grids: tuple[int, ...]
) -> tuple[list[Figure], dict[str, Any]]:
    """Four questions behind one reading, against the plain prefill of the row's own prompt.

    Both begin at the decoded picture: processor, vision tower, language model.
    """
    figures, seconds = [], {}
    for grid in grids:
        target = load(random_llava(folder / f"grid-{grid}", replace(size, grid=grid)))
        side = target.processor.image_processor.crop_size["height"]
        picture = Image.effect_mandelbrot((side, side), (-2, -1.5, 1, 1.5), 50).convert("RGB")
        asked = Sample(0, "row", (picture,), (Turn("user", (ImagePart(0), TextPart(OWN))),))
        runs: dict[str, Callable[[], object]] = {
            "plain": partial(_plain, target, asked),
            "questions": partial(_ask, target, asked),
            "apart": partial(_apart, target, asked),
        }
        took = interleave(runs, size.repeats)
        seconds[f"{grid**2} tokens"] = took
        what = f"{len(OTHERS)} questions, {TOKENS} answer tokens, {grid**2:,} image tokens"
        added = _added(took, "questions")
        limit = 0.6 if grid == size.grid else None
        figures.append(Figure(f"{what}: added to a plain prefill", "x", added, at_most=limit))
        figures.append(Figure(f"{what}: each a prompt of its own", "x", _added(took, "apart")))
    return figures, {"seconds": seconds}


def _plain(target: Target, sample: Sample) -> None:
    with torch.inference_mode():
        target.model(**target.encode([sample]).inputs, use_cache=False, logits_to_keep=1)


def _ask(target: Target, sample: Sample) -> None:
    """The row's own answer under its own question as well: that reading is the plain prefill."""
    branch(target, [sample], [[OWN, *OTHERS]], [ANSWER], tokens=TOKENS)


def _apart(target: Target, sample: Sample) -> None:
    for question in (OWN, *OTHERS):
        _plain(target, with_question(sample, question))


def _added(took: Seconds, name: str) -> Spread:
    pairs = zip(took[name], took["plain"], strict=True)
    return Spread.of([whole / plain - 1 for whole, plain in pairs])
