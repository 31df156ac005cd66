"""From an image reference in a row to decoded pixels, with every limit checked before decoding.

Rows come from strangers: a reference may name a file outside the image folder, a web address, a
device, a decompression bomb or no image at all. Each of these ends in a `RowError` with a short
reason; nothing outside the image folder is opened, and nothing is fetched from the network.
"""

from __future__ import annotations

import base64
import io
import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from gazeguard.errors import RowError

# Pillow also has plug-ins that start programs (EPS) or read several files; rows get none of them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "MPO")


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one row may cost, checked before any pixel is decoded.

    Attributes:
        max_pixels: pixels of all images of a row together. The default is where Pillow itself
            starts to warn; Pillow refuses single images above twice that, whatever is set here.
        max_bytes: encoded bytes of all images of a row together.
    """

    max_pixels: int = 89_478_485
    max_bytes: int = 64 * 1024 * 1024


def shorten(text: str, limit: int = 100) -> str:
    """Make a stranger's text safe to show in one line of a terminal or report."""
    clean = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


@dataclass(frozen=True, slots=True)
class ImageRoot:
    """The one folder whose files rows may name, and the limits on what they may load.

    A path, absolute or relative, is followed through `..` and links first and must then lie in
    `folder`; so an upload cannot show a platform's other files in a report.
    """

    folder: Path
    limits: ImageLimits

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder.resolve())  # once, not for every image

    def locate(self, reference: str) -> Path:
        """Return the real path that a reference names, whether or not the file exists.

        Raises:
            RowError: a web address, an unusable path, or a place outside the folder.
        """
        name = reference
        if "://" in name:
            try:
                url = urlsplit(name)
            except ValueError:
                raise RowError(f"image address cannot be read: {shorten(name)}") from None
            if url.scheme.lower() != "file":
                raise RowError(f"image is a web address, download it first: {shorten(name)}")
            if url.netloc not in ("", "localhost"):
                raise RowError(f"image is on another machine: {shorten(name)}")
            name = unquote(url.path)
        try:
            real = (self.folder / name).resolve()
        except (OSError, ValueError, RuntimeError):  # NUL or surrogate, too long, link loop
            raise RowError(f"image path cannot be used: {shorten(reference)}") from None
        if not real.is_relative_to(self.folder):
            raise RowError(f"image path leaves the image folder: {shorten(reference)}")
        return real

    def identity(self, source: str | bytes) -> str:
        """Tell whether a referenced file changed: its name, size and modification time."""
        if isinstance(source, bytes) or _is_data_url(source):
            return ""  # the bytes are part of the data file
        try:
            info = self.locate(source).stat()
        except (RowError, OSError):
            return f"{source}\0absent"
        return f"{source}\0{info.st_size}\0{info.st_mtime_ns}"

    def read(self, sources: Sequence[str | bytes]) -> list[bytes]:
        """Return the encoded bytes of a row's images: paths, `file://`, data URLs or bytes.

        Raises:
            RowError: an image that is missing, too large, or outside the folder.
        """
        encoded: list[bytes] = []
        left = self.limits.max_bytes
        for source in sources:
            if isinstance(source, bytes):
                data = source
            elif _is_data_url(source):
                data = _decode_data_url(source, left)
            else:
                data = self._read_file(source, left)
            left -= len(data)
            if left < 0:
                raise self._too_many_bytes()
            encoded.append(data)
        return encoded

    def decode(self, encoded: Sequence[bytes]) -> tuple[Image.Image, ...]:
        """Decode a row's images to upright RGB; animations and documents give their first page.

        Raises:
            RowError: not an image, broken, truncated, or more pixels than allowed.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on size and palettes: judged here
            opened = [self._open(data) for data in encoded]
            pixels = sum(image.width * image.height for image in opened)
            if pixels > self.limits.max_pixels:
                raise self._too_many_pixels(f"{pixels:,} pixels")
            return tuple(_to_rgb(image) for image in opened)

    def _open(self, data: bytes) -> Image.Image:
        try:
            Image.init()
            formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF may be left out
            return Image.open(io.BytesIO(data), formats=formats)  # reads the header only
        except Image.DecompressionBombError:
            raise self._too_many_pixels("too many pixels") from None
        except UnidentifiedImageError:
            what = "image is empty" if not data else "not an image, or of a kind not read here"
            raise RowError(what) from None
        except Exception as error:  # decoders raise anything on hostile bytes
            raise RowError(f"image is broken: {shorten(str(error))}") from None

    def _read_file(self, reference: str, left: int) -> bytes:
        path = self.locate(reference)
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):  # a pipe would wait for ever
                raise RowError(f"image is not a file: {shorten(reference)}")
            if info.st_size > left:
                raise self._too_many_bytes()
            with path.open("rb") as handle:
                return handle.read(left + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise RowError(f"image not found: {shorten(reference)}") from None
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise RowError(f"image cannot be read ({why}): {shorten(reference)}") from None

    def _too_many_bytes(self) -> RowError:
        return RowError(f"image data is above the limit of {self.limits.max_bytes:,} bytes a row")

    def _too_many_pixels(self, size: str) -> RowError:
        limit = f"{self.limits.max_pixels:,} pixels a row"
        return RowError(f"image has {size}, above the limit of {limit}")


def _is_data_url(source: str) -> bool:
    return source[:5].lower() == "data:"


def _decode_data_url(url: str, left: int) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowError("image data URL is not base64")
    if len(payload) // 4 * 3 > left + 2:  # before decoding: 4 letters give 3 bytes
        raise RowError("image data URL is above the byte limit of a row")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except ValueError:
        raise RowError("image data URL holds broken base64") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        upright = ImageOps.exif_transpose(image)  # always a copy, so the file's bytes can go
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except Exception as error:  # decoders raise anything on hostile bytes
        raise RowError(f"image is broken: {shorten(str(error))}") from None
