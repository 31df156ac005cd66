"""Invented reports with pictures, for the tests of the writers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from gazeguard.report.model import CleanReport, GalleryItem, Picture
from gazeguard.types import (
    CleaningResult,
    Component,
    Finding,
    LayerStat,
    Outcome,
    SkipKind,
    SkippedRow,
    Verdict,
)

COLOURS = ("firebrick", "seagreen", "royalblue", "goldenrod", "slategray", "orchid")
SHAPES = ("circle", "square", "triangle")
INERT = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def scene(row: int, *, triggered: bool, side: int = 64) -> Image.Image:
    """Coloured shapes on a noisy background; a black patch in the middle when triggered."""
    rng = np.random.default_rng(row)
    noise = rng.normal(210, 14, (side, side, 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(noise)
    draw = ImageDraw.Draw(image)
    for k in range(3):
        x, y = rng.integers(0, side - side // 4, 2).tolist()
        box = (x, y, x + side // 5, y + side // 5)
        draw.ellipse(box, fill=COLOURS[(row + k) % 6])
    if triggered:
        middle, patch = side // 2, side // 8
        draw.rectangle((middle, middle, middle + patch - 1, middle + patch - 1), fill="black")
    return image


def heat(row: int, layer: int, *, triggered: bool, grid: int = 8) -> np.ndarray:
    """Attention over the grid: gathered in the middle when triggered, spread out otherwise."""
    rng = np.random.default_rng(1000 * row + layer)
    spread = rng.gamma(2.0, 1.0, (grid, grid))
    if triggered:
        spread[grid // 2, grid // 2] += 12.0 * (layer + 1)
    return (spread / spread.sum()).astype(np.float32)


def gallery_item(row: int, *, triggered: bool, with_heat: bool = True) -> GalleryItem:
    return GalleryItem(
        row=row,
        turn=None,
        sample_id=hashlib.sha256(str(row).encode()).hexdigest(),
        prompt="What colour is the large shape on the left?",
        answer="hello from the attacker" if triggered else "seagreen",
        suspicion=0.998 if triggered else 0.003,
        pictures=(
            Picture(
                scene(row, triggered=triggered),
                {k: heat(row, k, triggered=triggered) for k in range(6)} if with_heat else None,
            ),
        ),
    )


def thumbnails(rows: Sequence[int]) -> dict[int, Picture]:
    return {row: Picture(scene(row, triggered=True), name=f"{row:06d}.png") for row in rows}


def make_report(
    outcome: Outcome = Outcome.FLAGGED,
    *,
    n: int = 1500,
    poisoned: int = 150,
    skipped: int = 12,
    layers: int = 6,
    prompt: str | None = None,
    pictures: bool = True,
    with_heat: bool = True,
    provenance: dict[str, Any] | None = None,
) -> CleanReport:
    """`n` input rows, of which `skipped` were not measured and `poisoned` stand apart."""
    rng = np.random.default_rng(0)
    if outcome is not Outcome.FLAGGED:
        poisoned = 0
    numbers = rng.permutation(n)
    rows = np.sort(numbers[skipped:]).astype(np.int64)
    flagged = np.zeros(len(rows), dtype=bool)
    flagged[rng.choice(len(rows), poisoned, replace=False)] = True
    entropy = rng.normal(3.6, 0.12, (len(rows), layers)).astype(np.float32)
    shift = np.linspace(-1.1, 0.5, layers).astype(np.float32)
    entropy[flagged] += shift
    score = entropy[:, :2].mean(1).astype(np.float64)
    suspicion = np.where(flagged, rng.beta(60, 1, len(rows)), rng.beta(1, 60, len(rows)))
    components = (
        Component(2.65, 0.12, poisoned / max(1, len(rows)), suspicious=True),
        Component(3.6, 0.09, 1 - poisoned / max(1, len(rows)), suspicious=False),
    )
    used = 2 if outcome is Outcome.FLAGGED else 0
    bsi = np.abs(shift) * 6 if used else rng.uniform(0.3, 1.2, layers)
    if outcome is Outcome.INCONCLUSIVE:
        components, bsi = (), np.zeros(layers)
    return CleanReport(
        result=CleaningResult(
            method="bye",
            rule="paper",
            verdict=_verdict(outcome, poisoned, len(rows)),
            suspicion=suspicion if used else np.zeros(len(rows)),
            is_flagged=flagged,
            score=score,
            score_name="mean entropy of the sensitive layers (nats)",
            components=components if used else components[1:],
            layer_stats=tuple(
                LayerStat(k, float(bsi[k]), selected=k < used) for k in range(layers)
            ),
            info={"bsi_threshold": 2.0, "bsi_threshold_source": "arXiv:2505.16916, section 4.2"},
        ),
        rows=rows,
        turns=np.ones(len(rows), np.int64),
        prompts=[prompt or f"What colour is shape {row} on the left?" for row in rows.tolist()],
        answers=["hello from the attacker" if f else "seagreen" for f in flagged.tolist()],
        sample_ids=[hashlib.sha256(str(row).encode()).hexdigest() for row in rows.tolist()],
        counts={
            "rows": n,
            "kept": len(rows) - poisoned,
            "removed": poisoned,
            "suspected": 0,
            "skipped": skipped,
            "text_only": 0,
        },
        skipped=_skipped(np.sort(numbers[:skipped]).tolist()),
        entropy=entropy,
        layers=tuple(range(layers)),
        provenance=provenance
        or {
            "gazeguard": "0.1.0",
            "model": {"id": "lab/tiny-llava", "revision": "9f31c2", "weights": {"a": "b1946ac9"}},
            "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
            "dtype": "float32",
            "seed": 0,
        },
        files={
            "kept": "kept.json",
            "removed": "removed.json",
            "skipped": "skipped.json",
            "reasons": "reasons.jsonl",
            "verdicts": "verdicts.parquet",
        },
        gallery=[
            gallery_item(int(row), triggered=True, with_heat=with_heat)
            for row in rows[flagged][:12]
            if pictures
        ],
        typical=(
            gallery_item(int(rows[~flagged][0]), triggered=False, with_heat=with_heat)
            if pictures and poisoned
            else None
        ),
    )


def _verdict(outcome: Outcome, poisoned: int, n: int) -> Verdict:
    source = "posterior of the group"
    if outcome is Outcome.FLAGGED:
        reason = f"{poisoned:,} of {n:,} rows look poisoned: a group of 10 % stands apart."
        found = Finding("Two groups fit the rows better than one; their separation is 4.12.")
        return Verdict(outcome, 0.998, 0.5, source, reason, (found,))
    if outcome is Outcome.CLEAN:
        why = "the rows form one group (separation 0.92, 2 is needed)"
        return Verdict(outcome, 0.0, 0.5, source, f"No sign of poisoning: {why}.")
    reason = "12 rows could be measured, and at least 50 are needed to tell two groups."
    return Verdict(outcome, None, None, "too few rows", reason)


def _skipped(rows: list[int]) -> list[SkippedRow]:
    reasons = (
        ("Image 'images/{row}.jpg' does not exist.", SkipKind.NO_IMAGE_FILE),
        ("Image 'images/{row}.jpg' is broken (truncated file).", SkipKind.BAD_IMAGE),
        ("The row has no image.", SkipKind.BAD_ROW),
    )
    return [
        SkippedRow(row, reasons[i % 3][0].format(row=row), kind=reasons[i % 3][1])
        for i, row in enumerate(rows)
    ]
