"""Pictures small enough to live inside a page, as data URLs."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image as PILImage

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL_BYTES = 3072
GALLERY_SIDE = 320
GALLERY_BYTES = 40_000

# (longest side in px, JPEG quality), tried in turn until the bytes fit.
_THUMBNAIL_STEPS = ((96, 72), (96, 55), (80, 45), (64, 40), (48, 35), (32, 30))
_GALLERY_STEPS = ((GALLERY_SIDE, 82), (GALLERY_SIDE, 65), (256, 55), (192, 40))


def _flat(image: Image) -> Image:
    """RGB on white, whatever mode came in."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, "white")
        image = PILImage.alpha_composite(white, image)
    return image.convert("RGB")


def _encode(image: Image, side: int, quality: int | None) -> bytes:
    """JPEG at `quality`, or PNG when it is None; never enlarged."""
    small = image
    if max(image.size) > side:
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.resize(size, PILImage.Resampling.LANCZOS)
    buffer = BytesIO()
    if quality is None:
        small.save(buffer, "PNG", optimize=True)
    else:
        small.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def _data_url(image: Image, steps: tuple[tuple[int, int], ...], limit: int) -> str:
    flat = _flat(image)
    if max(flat.size) <= 128:
        # JPEG smears exactly what matters in tiny pictures: hard-edged patches.
        lossless = _encode(flat, 128, None)
        if len(lossless) <= limit:
            return "data:image/png;base64," + base64.b64encode(lossless).decode()
    encoded = b""
    for side, quality in steps:
        encoded = _encode(flat, side, quality)
        if len(encoded) <= limit:
            break
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode()


def thumbnail_url(image: Image) -> str:
    """A thumbnail of about 3 KB at most, as a data URL."""
    return _data_url(image, _THUMBNAIL_STEPS, THUMBNAIL_BYTES)


def gallery_url(image: Image) -> str:
    """A picture of at most 320 px and about 40 KB, as a data URL."""
    return _data_url(image, _GALLERY_STEPS, GALLERY_BYTES)
