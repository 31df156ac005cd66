"""From the picture addresses of a request to decoded pictures, within its limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from PIL.Image import Image

from gazeguard.data.images import ImageLimits, ImageRoot
from gazeguard.errors import RowError
from gazeguard.server.errors import bad
from gazeguard.server.remote import fetch
from gazeguard.server.settings import Settings


def load_images(urls: Sequence[tuple[str, str]], settings: Settings) -> tuple[Image, ...]:
    """Read and decode a request's pictures; fetches those with an address.

    Args:
        urls: places in the request, such as `messages.0.content.1`, and addresses.
        settings: the limits, which hold for all pictures together.

    Raises:
        ApiError: 400, naming the place of a picture that cannot be taken.
    """
    if len(urls) > settings.max_images:
        most = settings.max_images
        raise bad(f"The request has {len(urls)} images, and {most} are allowed.", "messages")
    root = ImageRoot(Path(), ImageLimits(settings.max_pixels, settings.max_image_bytes))
    encoded: list[bytes] = []
    left = settings.max_image_bytes
    for place, url in urls:
        try:
            # Never anything else: `ImageRoot` also opens files by name.
            source = _unquoted(url) if _is_data(url) else fetch(url, settings.remote, left)
            encoded += root.read([source])
        except RowError as error:
            raise bad(f"'{place}': {error}.", place, "invalid_image") from None
        left -= len(encoded[-1])
        if left < 0:
            limit = f"{settings.max_image_bytes:,} bytes"
            raise bad(f"The images are above the limit of {limit}.", place, "invalid_image")
    try:
        return root.decode(encoded)
    except RowError as error:
        # Not all can be broken: look for the one that is.
        for (place, _), data in zip(urls, encoded, strict=True):
            try:
                root.decode([data])
            except RowError as its_own:
                raise bad(f"'{place}': {its_own}.", place, "invalid_image") from None
        raise bad(f"The images: {error}.", "messages", "invalid_image") from None


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _unquoted(url: str) -> str | bytes:
    """A data URL without percent signs; its bytes where it is not base64 at all."""
    head, _, payload = url.partition(",")
    if "%" not in payload:
        return url
    if head.lower().endswith(";base64"):
        return f"{head},{unquote(payload)}"
    return unquote_to_bytes(payload)
