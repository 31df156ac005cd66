"""The pictures of a page: read again one by one, never more than one row's in memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gazeguard.data.thumbnails import GALLERY_SIDE, gallery_url, thumbnail_url
from gazeguard.report.guard.model import Request, Reread
from gazeguard.report.heat import MAX_PICTURES
from gazeguard.report.heatmap import draw_heatmap, strongest

if TYPE_CHECKING:
    from PIL.Image import Image

    from gazeguard.types import Sample


@dataclass(frozen=True, slots=True)
class View:
    """One image of a request, shown large.

    Attributes:
        place: in the prompt's images, from 0.
        bare: the image, a data URL.
        heat: the same with heat and outlines; None where there is no heat to lay over it.
    """

    place: int
    bare: str
    heat: str | None


@dataclass(slots=True)
class Drawn:
    """What was drawn, by row.

    Attributes:
        small: data URL of the (first) image, for the table.
        large: for a few rows, up to `MAX_PICTURES` images in prompt order, rather those with
            tokens that stand out.
        images: for the same rows, how many images the prompt has.
    """

    small: dict[int, str] = field(default_factory=dict)
    large: dict[int, list[View]] = field(default_factory=dict)
    images: dict[int, int] = field(default_factory=dict)


def draw(table: Collection[Request], large: Collection[Request], reread: Reread) -> Drawn:
    """Draw the pictures of requests whose row still reads as it did when it was asked."""
    wanted = {r.row: r for r in (*table, *large) if r.sample_id is not None}
    small_rows, large_rows = {r.row for r in table}, {r.row for r in large}
    drawn = Drawn()
    for sample in reread(wanted.keys()) if wanted else ():
        request = wanted.get(sample.row)
        if request is None or sample.sample_id != request.sample_id or not sample.images:
            continue
        if sample.row in small_rows:
            drawn.small[sample.row] = thumbnail_url(sample.images[0])
        if sample.row in large_rows:
            drawn.large[sample.row] = _views(request, sample)
            drawn.images[sample.row] = len(sample.prompt_images)
    return drawn


def _views(request: Request, sample: Sample) -> list[View]:
    heat, tokens = request.heat or (), request.tokens or ()
    if len(tokens) != len(sample.prompt_images):  # the images could not be told apart
        heat = tokens = ()
    places = list(range(len(sample.prompt_images)))
    if tokens:
        places.sort(key=lambda place: not tokens[place].any())
    views = []
    for place in sorted(places[:MAX_PICTURES]):
        image, warm = sample.images[sample.prompt_images[place]], None
        if tokens and tokens[place].ndim == 2:
            drawn = draw_heatmap(_shrunk(image), heat[place], tokens[place], strongest(heat))
            warm = gallery_url(drawn)
        views.append(View(place, gallery_url(image), warm))
    return views


def _shrunk(image: Image) -> Image:
    """Of a size at which a heat map costs little; twice what the page shows."""
    small = image.copy()
    small.thumbnail((2 * GALLERY_SIDE, 2 * GALLERY_SIDE))
    return small
