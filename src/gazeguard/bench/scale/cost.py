"""What a row costs in arithmetic, and whether that foretells how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from gazeguard.bench.scale.sets import lab_set
from gazeguard.bench.scale.stage import looking, parts_of
from gazeguard.bench.speed.forward import Size, random_llava
from gazeguard.bench.speed.instruments import Figure, Part, Spread, interleave
from gazeguard.cleaning.measure import Look
from gazeguard.models.load import load

# Two language models that differ by an order of magnitude in arithmetic, over the same prompts.
SIZES = (Size(hidden=256, layers=8, heads=8), Size(hidden=640, layers=12, heads=10))


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Floating point operations of one row's prefill, a multiply-add counted as two.

    Attributes:
        tower: of the picture encoder and the projector; paid once however often a row is looked at.
        language: of the decoder layers, paid for every look.
    """

    tower: float
    language: float

    def of(self, looks: int) -> float:
        """All of a row's, looked at so often."""
        return self.tower + looks * self.language


def arithmetic(config: Any, tokens: int) -> Arithmetic:
    """Count for a LLaVA-like model without making its weights.

    Two per weight and position, and `4 x positions^2 x width` per layer for attention, whose mask
    saves nothing in the kernels at hand. Embeddings, norms and the one row of logits are left out.

    Args:
        config: of the whole model.
        tokens: positions of a prompt, image tokens among them.
    """
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(config)
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    seen = patches - 1
    tower = _matrices(model.model.vision_tower) * 2 * patches
    tower += 4 * patches**2 * vision.hidden_size * vision.num_hidden_layers
    tower += _matrices(model.model.multi_modal_projector) * 2 * seen
    language = _matrices(model.model.language_model.layers) * 2 * tokens
    language += 4 * tokens**2 * text.hidden_size * text.num_hidden_layers
    return Arithmetic(float(tower), float(language))


def _matrices(module: Any) -> int:
    """Weights that are multiplied with every position."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)  # a patch's convolution is one position's product
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, kinds))


def foretold(work: Path, rows: int, repeats: int, sizes: tuple[Size, Size] = SIZES) -> Part:
    """Rows/s of two sizes, and how well the first one's FLOP/s foretell those of the second."""
    data = lab_set(work / "set.parquet", rows)
    runs, costs = {}, {}
    for size in sizes:
        folder = random_llava(work / f"{size.hidden}", size)
        target = load(folder, dtype="float32", device_map="cpu")
        look = Look(target, None)
        parts = parts_of(look, data, rows)
        name = f"width {size.hidden}, {size.layers} layers"
        runs[name] = partial(looking, look, parts)
        tokens = parts[0][1].key_kind.shape[1]
        costs[name] = arithmetic(target.base.config, tokens).of(1)
    took = interleave(runs, repeats)
    speed = {n: [costs[n] * rows / s / 1e9 for s in seconds] for n, seconds in took.items()}
    small, large = speed.values()
    figures = [
        Figure(f"arithmetic of a row, {n}: {costs[n] / 1e9:.1f} GFLOP; done at", "GFLOP/s", s)
        for n, s in ((n, Spread.of(found)) for n, found in speed.items())
    ]
    gap = Spread.of([b / a for a, b in zip(small, large, strict=True)])
    figures.append(Figure("FLOP/s of the larger model / of the smaller", "x", gap))
    return figures, {"rows": rows, "flop_per_row": costs, "seconds": took}
