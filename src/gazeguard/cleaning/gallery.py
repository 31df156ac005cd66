"""Pictures for the report: the most suspicious rows and a typical one, with attention heat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gazeguard.models.target import by_image
from gazeguard.probe.attention import attend
from gazeguard.report.html import MAX_GALLERY
from gazeguard.report.model import Answer, GalleryItem, Picture
from gazeguard.signals.entropy import visual_attention
from gazeguard.types import Asked, CleaningResult, KeyKind, Profile, Sample

if TYPE_CHECKING:
    from gazeguard.data.dataset import Dataset
    from gazeguard.models.target import Target


@dataclass(frozen=True, slots=True)
class Choice:
    """Rows worth a picture.

    Attributes:
        worst: the most suspicious flagged rows, worst first.
        typical: a row from the middle of the others, where there is one.
        suspicion: row and turn -> suspicion, of all of them.
    """

    worst: tuple[Answer, ...]
    typical: tuple[Answer, ...]
    suspicion: dict[Answer, float]

    @classmethod
    def of(cls, profile: Profile, result: CleaningResult) -> Choice:
        """Choose from a judged set."""
        flagged = np.flatnonzero(result.is_flagged)
        worst = flagged[np.argsort(-result.suspicion[flagged], kind="stable")][:MAX_GALLERY]
        others = np.flatnonzero(~result.is_flagged)
        middle = others[np.argsort(result.score[others], kind="stable")][len(others) // 2 :][:1]
        named = list(zip(profile.row.tolist(), profile.turn.tolist(), strict=True))
        suspicion = {named[i]: float(result.suspicion[i]) for i in (*worst, *middle)}
        return cls(tuple(named[i] for i in worst), tuple(named[i] for i in middle), suspicion)

    def place(
        self, items: Mapping[Answer, GalleryItem]
    ) -> tuple[list[GalleryItem], GalleryItem | None]:
        """The worst of `items`, worst first, and the typical one; a row may be gone by now."""
        shown = [items[one] for one in self.worst if one in items]
        return shown, next((items[one] for one in self.typical if one in items), None)


def look_again(
    target: Target, dataset: Dataset, suspicion: Mapping[Answer, float]
) -> dict[Answer, GalleryItem]:
    """The chosen answers with their images and heat maps, by row and turn."""
    rows = {row for row, _ in suspicion}
    return {
        (asked.row, asked.turn): _item(target, asked, suspicion[asked.row, asked.turn])
        for sample in dataset.rows(rows.__contains__)
        if isinstance(sample, Sample)
        for asked in sample.asked
        if (asked.row, asked.turn) in suspicion
    }


def thumbnails(dataset: Dataset, rows: Sequence[int]) -> Mapping[int, Picture]:
    """First images of those `rows` that still have one."""
    wanted = frozenset(rows)
    return {
        sample.row: Picture(sample.images[0], name=_name(sample, 0))
        for sample in dataset.rows(wanted.__contains__)
        if isinstance(sample, Sample) and sample.images
    }


def _item(target: Target, sample: Asked, suspicion: float) -> GalleryItem:
    return GalleryItem(
        row=sample.row,
        turn=sample.turn if len(sample.asked) > 1 or sample.turn > 1 else None,
        sample_id=sample.sample_id,
        prompt=sample.prompt,
        answer=sample.answer,
        suspicion=suspicion,
        pictures=_pictures(target, sample),
    )


def _pictures(target: Target, sample: Sample) -> tuple[Picture, ...]:
    """The prompt's images, with heat where an image's tokens are one plain grid."""
    shown = [Picture(sample.images[i], name=_name(sample, i)) for i in sample.prompt_images]
    encoded = target.encode([sample])
    (images,) = encoded.images
    if len(images) != len(shown) or not any(image.grid for image in images):
        return tuple(shown)
    rows = attend(target, encoded)
    seen = visual_attention(rows.weights, rows.key_kind)[0].float().cpu()
    parts = by_image(seen[:, rows.key_kind[0].cpu() == KeyKind.IMAGE], images)
    heats = (
        dict(zip(rows.layers, part.numpy(), strict=True)) if image.grid else None
        for image, part in zip(images, parts, strict=True)
    )
    return tuple(replace(each, heat=heat) for each, heat in zip(shown, heats, strict=True))


def _name(sample: Sample, place: int) -> str:
    return sample.files[place] if sample.files else ""
