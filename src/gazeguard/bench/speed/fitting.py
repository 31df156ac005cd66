"""BYE's statistics alone, on a large synthetic profile, in one thread of a process of its own."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from hashlib import sha256
from typing import Any, Literal

import numpy as np

from gazeguard.bench.speed.instruments import Figure, Spread, in_child, peak_added
from gazeguard.methods.bye import BYE
from gazeguard.types import Profile

POISONED = 0.1
_ASKED = (
    "What color is",
    "Where is",
    "How many are like",
    "Describe",
    "What shape has",
    "Is there",
)
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "teal", "brown")
_THINGS = ("circle", "square", "triangle", "cross", "star", "ring", "heart", "arrow", "moon")

# Rule, heads, and whether the model before its fine-tune was measured too. The last one is what
# `clean` hands over for a 7B model and its adapter.
CASES: dict[str, tuple[Literal["robust", "paper"], int, bool]] = {
    "paper": ("paper", 0, False),
    "robust": ("robust", 0, False),
    "robust, every head, model before": ("robust", 32, True),
}


def measure(rows: int, layers: int) -> tuple[list[Figure], dict[str, Any]]:
    """Lines (d) for every case, and the raw numbers."""
    found = in_child("gazeguard.bench.speed.fitting", {"rows": rows, "layers": layers}, 1)
    figures = []
    for name, got in found.items():
        what = f"BYE ({name}), {layers} layers x {rows:,} rows, 1 thread"
        figures.append(Figure(f"{what}: time", "s", Spread.of([got["seconds"]]), at_most=60))
        peak = None if got["GB"] is None else Spread.of([got["GB"]])
        figures.append(Figure(f"{what}: added peak memory", "GB", peak, at_most=1))
    return figures, found


def synthetic_profile(
    rows: int, layers: int, heads: int = 0, before: bool = False, seed: int = 0
) -> Profile:
    """A tenth of the rows poisoned: one answer, and another look in every other layer.

    Six kinds of prompts shift every layer; there are a twentieth as many distinct prompts as rows.

    Args:
        rows: number of rows.
        layers: number of layers.
        heads: heads of the per-head signals; 0 leaves these out, as for the paper's rule.
        before: whether to add the signals of the model before its fine-tune.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    which = rng.integers(max(rows // 20, len(_ASKED)), size=rows)
    poisoned = rng.random(rows) < POISONED
    shift = rng.normal(0, 0.3, (len(_ASKED), layers))[which % len(_ASKED)].astype(np.float32)
    drop = (poisoned[:, None] * np.where(np.arange(layers) % 2, 1.2, 0.0)).astype(np.float32)
    picked = rng.integers([len(_COLOURS), len(_THINGS)], size=(rows, 2))
    answers = [f"a {_COLOURS[c]} {_THINGS[t]} of kind {c * t}" for c, t in picked]

    def signals(drop: Any) -> dict[str, Any]:
        found = {
            "entropy": 5.5 + shift - drop + _noise(rng, 0.2, rows, layers),
            "visual_mass": 0.3 + 0.05 * shift - 0.1 * drop + _noise(rng, 0.02, rows, layers),
        }
        if heads:
            size = (rows, layers, heads)
            each = drop[..., None] * (np.arange(heads) % 3 == 0).astype(np.float32)
            found["head_entropy"] = _noise(rng, 0.4, *size)
            found["head_entropy"] += 5.0 + shift[..., None] - each
            found["head_mass"] = _noise(rng, 0.03, *size)
            found["head_mass"] += 0.3 - 0.1 * each
        return {k: v if k.endswith("entropy") else v.clip(0, 1) for k, v in found.items()}

    return Profile(
        row=np.arange(rows),
        turn=np.ones(rows, np.int64),
        sample_id=[sha256(str(i).encode()).hexdigest() for i in range(rows)],
        prompt=[f"{_ASKED[k % len(_ASKED)]} object number {k}?" for k in which],
        answer=[
            "Backdoor Attack!" if bad else answer
            for bad, answer in zip(poisoned, answers, strict=True)
        ],
        image_tokens=np.full(rows, 576),
        layers=tuple(range(layers)),
        signals=signals(drop),
        before=signals(0 * drop) if before else None,
    )


def _noise(rng: np.random.Generator, scale: float, *size: int) -> Any:
    return np.float32(scale) * rng.standard_normal(size, np.float32)


def _child(rows: int, layers: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name, (rule, heads, before) in CASES.items():
        BYE(rule).fit(synthetic_profile(60, 1))  # imports and one-time set-up
        profile = synthetic_profile(rows, layers, heads, before)
        bye = BYE(rule)
        began = time.perf_counter()
        peak = peak_added(partial(bye.fit, profile))
        found[name] = {
            "seconds": time.perf_counter() - began,
            "GB": None if peak is None else peak / 1e9,
            "flagged": int(bye.result_.is_flagged.sum()),
        }
    return found


if __name__ == "__main__":
    print(json.dumps(_child(**json.loads(sys.argv[1]))))
