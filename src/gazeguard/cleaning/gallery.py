"""Pictures for the report: the most suspicious rows and a typical one, with attention heat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gazeguard.probe.attention import attend
from gazeguard.report.html import MAX_GALLERY
from gazeguard.report.model import GalleryItem
from gazeguard.signals.entropy import visual_attention
from gazeguard.types import CleaningResult, KeyKind, Profile, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from gazeguard.data.dataset import Dataset
    from gazeguard.models.target import Target


def gallery(
    target: Target, dataset: Dataset, profile: Profile, result: CleaningResult
) -> tuple[list[GalleryItem], GalleryItem | None]:
    """Look again at a few rows and keep their images and heat maps.

    Returns:
        The most suspicious flagged rows, worst first, and a row from the middle of the others.
    """
    flagged = np.flatnonzero(result.is_flagged)
    worst = flagged[np.argsort(-result.suspicion[flagged], kind="stable")][:MAX_GALLERY]
    others = np.flatnonzero(~result.is_flagged)
    middle = others[np.argsort(result.score[others], kind="stable")][len(others) // 2 :][:1]
    suspicion = {int(profile.row[i]): float(result.suspicion[i]) for i in (*worst, *middle)}
    items = {
        sample.row: _item(target, sample, suspicion[sample.row])
        for sample in dataset.rows(suspicion.__contains__)
        if isinstance(sample, Sample)
    }
    shown = [items[row] for i in worst if (row := int(profile.row[i])) in items]
    typical = next((items[row] for i in middle if (row := int(profile.row[i])) in items), None)
    return shown, typical


def thumbnails(dataset: Dataset, rows: Sequence[int]) -> Mapping[int, Image]:
    """First images of those `rows` that still have one."""
    wanted = frozenset(rows)
    return {
        sample.row: sample.images[0]
        for sample in dataset.rows(wanted.__contains__)
        if isinstance(sample, Sample) and sample.images
    }


def _item(target: Target, sample: Sample, suspicion: float) -> GalleryItem:
    return GalleryItem(
        row=sample.row,
        sample_id=sample.sample_id,
        prompt=sample.prompt,
        answer=sample.answer,
        suspicion=suspicion,
        image=sample.images[0],
        heat=_heat(target, sample),
    )


def _heat(target: Target, sample: Sample) -> dict[int, NDArray[np.float32]] | None:
    """Layer -> attention over the image grid; None when the tokens are not one plain grid."""
    encoded = target.encode([sample])
    grid = encoded.grids[0]
    if grid is None:
        return None
    rows = attend(target, encoded)
    seen = visual_attention(rows.weights, rows.key_kind)[0].float().cpu()
    on_image = seen[:, rows.key_kind[0].cpu() == KeyKind.IMAGE].numpy()
    return {layer: on_image[i].reshape(grid) for i, layer in enumerate(rows.layers)}
