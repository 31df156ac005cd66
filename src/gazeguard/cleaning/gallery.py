"""Pictures for the report: the most suspicious rows and a typical one, with attention heat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gazeguard.models.target import by_image
from gazeguard.probe.attention import attend
from gazeguard.report.html import MAX_GALLERY
from gazeguard.report.model import GalleryItem, Picture
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
        pictures=_pictures(target, sample),
    )


def _pictures(target: Target, sample: Sample) -> tuple[Picture, ...]:
    """The prompt's images, with heat where an image's tokens are one plain grid."""
    shown = [sample.images[i] for i in sample.prompt_images]
    encoded = target.encode([sample])
    (images,) = encoded.images
    if len(images) != len(shown) or not any(image.grid for image in images):
        return tuple(Picture(image) for image in shown)
    rows = attend(target, encoded)
    seen = visual_attention(rows.weights, rows.key_kind)[0].float().cpu()
    parts = by_image(seen[:, rows.key_kind[0].cpu() == KeyKind.IMAGE], images)
    heats = (
        dict(zip(rows.layers, part.numpy(), strict=True)) if image.grid else None
        for image, part in zip(images, parts, strict=True)
    )
    return tuple(Picture(image, heat) for image, heat in zip(shown, heats, strict=True))
