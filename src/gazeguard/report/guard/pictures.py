"""The pictures of a page: read again one by one, never more than one in memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gazeguard.report.guard.model import Request, Reread
from gazeguard.report.heatmap import draw_heatmap
from gazeguard.report.images import GALLERY_SIDE, gallery_url, thumbnail_url

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(slots=True)
class Drawn:
    """Data URLs by row: small for the table; large, bare and with heat, for a few."""

    small: dict[int, str] = field(default_factory=dict)
    large: dict[int, str] = field(default_factory=dict)
    heat: dict[int, str] = field(default_factory=dict)


def draw(table: Collection[Request], large: Collection[Request], reread: Reread) -> Drawn:
    """Draw the (first) pictures of requests whose row still reads as it did when it was asked."""
    wanted = {r.row: r for r in (*table, *large) if r.sample_id is not None}
    small_rows, large_rows = {r.row for r in table}, {r.row for r in large}
    drawn = Drawn()
    for sample in reread(wanted.keys()) if wanted else ():
        request = wanted.get(sample.row)
        if request is None or sample.sample_id != request.sample_id or not sample.images:
            continue
        image = sample.images[0]
        if sample.row in small_rows:
            drawn.small[sample.row] = thumbnail_url(image)
        if sample.row in large_rows:
            drawn.large[sample.row] = gallery_url(image)
            if has_heat(request):
                warm = draw_heatmap(_shrunk(image), request.heat, request.tokens)
                drawn.heat[sample.row] = gallery_url(warm)
    return drawn


def has_heat(request: Request) -> bool:
    """Whether its image tokens are one plain grid that can be laid over the picture."""
    return request.tokens is not None and request.tokens.ndim == 2


def _shrunk(image: Image) -> Image:
    """Of a size at which a heat map costs little; twice what the page shows."""
    small = image.copy()
    small.thumbnail((2 * GALLERY_SIDE, 2 * GALLERY_SIDE))
    return small
