"""From an image reference in a row to decoded pixels, with every limit checked before decoding.

Rows come from strangers: a reference may name a file outside the image folder, a web address, a
device, a decompression bomb or no image at all. Each of these ends in a `RowError` with a short
reason; nothing outside the image folder is opened, and nothing is fetched from the network.
"""

from __future__ import annotations

import base64
import io
import os
import re
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gazeguard.errors import RowError
from gazeguard.types import SkipKind

# Pillow also has plug-ins that start programs (EPS) or read several files; rows get none of them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "MPO")
_HEIC = re.compile(rb"....ftyp(?:hei[cxsm]|hev[cms]|mif1|msf1)", re.DOTALL)
# What bytes that Pillow cannot open begin with, after white space.
_OTHER_KINDS = (
    (
        re.compile(rb"....ftypavi[fs]", re.DOTALL),
        "image is AVIF, which this Pillow was built without",
    ),
    (re.compile(rb"(?:<\?xml.*?)?<svg", re.DOTALL), "image is SVG, a drawing; save it as PNG"),
    (
        re.compile(rb"<(?:!doctype html|html)", re.I),
        "image is a web page; download the picture again",
    ),
    (re.compile(rb"version https://git-lfs"), "image is a Git LFS pointer; run `git lfs pull`"),
    (re.compile(rb"%PDF"), "image is a PDF document; save its page as PNG"),
    (re.compile(rb"$"), "image is empty"),
)


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

    @property
    def max_row_bytes(self) -> int:
        """Longest row of text: base64 has 4 letters for 3 bytes, and nobody writes 16 MiB more."""
        return self.max_bytes * 4 // 3 + (16 << 20)


class EmbeddedImage(bytes):
    """Encoded bytes out of a row, with the name that the row gives them."""

    name: str

    def __new__(cls, data: bytes, name: str) -> EmbeddedImage:
        """Keep the name beside the bytes."""
        made = super().__new__(cls, data)
        made.name = name
        return made


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
                raise _absent(f"image address cannot be read: {shorten(name)}") from None
            if url.scheme.lower() != "file":
                raise _absent(f"image is a web address, download it first: {shorten(name)}")
            if url.netloc not in ("", "localhost"):
                raise _absent(f"image is on another machine: {shorten(name)}")
            name = unquote(url.path)
        try:
            real = (self.folder / name).resolve()
        except (OSError, ValueError, RuntimeError):  # NUL or surrogate, too long, link loop
            raise _absent(f"image path cannot be used: {shorten(reference)}") from None
        if not real.is_relative_to(self.folder):
            raise _absent(
                f"image path leaves the image folder: {shorten(reference)}; --images names another"
            )
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

    def absence(self, source: str) -> str | None:
        """Why a referenced file is not there; None when it is, or needs no file."""
        if _is_data_url(source):
            return None
        try:
            there = self.locate(source).is_file()
        except (RowError, OSError) as error:
            return str(error)
        return None if there else f"image not found: {shorten(source)}"

    def read(
        self, sources: Sequence[str | bytes], names: Sequence[str] | None = None
    ) -> list[bytes]:
        """Return the encoded bytes of a row's images: paths, `file://`, data URLs or bytes.

        Args:
            sources: the images.
            names: what a reason calls each that is no file.

        Raises:
            RowError: an image that is missing, too large, or outside the folder.
        """
        encoded: list[bytes] = []
        left = self.limits.max_bytes
        for place, source in enumerate(sources):
            name = f": {names[place]}" if names else ""
            if isinstance(source, bytes):
                data = source
            elif _is_data_url(source):
                data = _decode_data_url(source, left, name)
            else:
                data = self._read_file(source, left)
            left -= len(data)
            if left < 0:
                raise self._too_many_bytes(name)
            encoded.append(data)
        return encoded

    def decode(
        self, encoded: Sequence[bytes], names: Sequence[str] | None = None
    ) -> tuple[Image.Image, ...]:
        """Decode a row's images to upright RGB; animations and documents give their first page.

        Args:
            encoded: the images.
            names: what a reason calls each, for example its file.

        Raises:
            RowError: not an image, broken, truncated, or more pixels than allowed.
        """
        opened: list[Image.Image] = []
        pixels = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on size and palettes: judged here
            for place, data in enumerate(encoded):
                name = f": {names[place]}" if names else ""
                opened.append(self._open(data, name))
                pixels += opened[-1].width * opened[-1].height
                if pixels > self.limits.max_pixels:
                    raise self._too_many_pixels(f"{pixels:,} pixels", name)
            return tuple(
                _to_rgb(image, f": {names[place]}" if names else "")
                for place, image in enumerate(opened)
            )

    def _open(self, data: bytes, name: str) -> Image.Image:
        try:
            Image.init()
            formats = [*FORMATS, *(["HEIF"] if _HEIC.match(data) and _reads_heic() else [])]
            # AVIF may be left out of a Pillow. Only the header is read.
            formats = [format for format in formats if format in Image.OPEN]
            return Image.open(io.BytesIO(data), formats=formats)
        except Image.DecompressionBombError:
            raise self._too_many_pixels("too many pixels", name) from None
        except UnidentifiedImageError:
            raise _bad(_what_is(data) + name) from None
        except Exception as error:  # decoders raise anything on hostile bytes
            raise _broken(error, name) from None

    def _read_file(self, reference: str, left: int) -> bytes:
        path = self.locate(reference)
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):  # a pipe would wait for ever
                raise _absent(f"image is not a file: {shorten(reference)}")
            if info.st_size > left:
                raise self._too_many_bytes(f": {shorten(reference)}")
            with path.open("rb") as handle:
                return handle.read(left + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise _absent(f"image not found: {shorten(reference)}") from None
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise _absent(f"image cannot be read ({why}): {shorten(reference)}") from None

    def _too_many_bytes(self, name: str) -> RowError:
        limit = f"{self.limits.max_bytes:,} bytes a row"
        return _bad(f"image data is above the limit of {limit}{name}")

    def _too_many_pixels(self, size: str, name: str) -> RowError:
        limit = f"{self.limits.max_pixels:,} pixels a row"
        return _bad(f"image has {size}, above the limit of {limit}{name}")


def image_name(source: str | bytes, place: int) -> str:
    """What a reason calls an image: its file, or its place in the row."""
    if isinstance(source, EmbeddedImage) and source.name:
        return shorten(source.name)
    if isinstance(source, bytes) or _is_data_url(source):
        return f"picture {place + 1} of the row"
    return shorten(source)


def _is_data_url(source: str) -> bool:
    return source[:5].lower() == "data:"


def _decode_data_url(url: str, left: int, name: str) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _bad(f"image data URL is not base64{name}")
    if len(payload) // 4 * 3 > left + 2:  # before decoding: 4 letters give 3 bytes
        raise _bad(f"image data URL is above the byte limit of a row{name}")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except ValueError:
        raise _bad(f"image data URL holds broken base64{name}") from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        upright = ImageOps.exif_transpose(image)  # always a copy, so the file's bytes can go
        if upright.mode[0] in "IF":  # more than 8 bits, which Pillow would cut off at 255
            upright = _to_8_bits(upright, name)
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except RowError:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise _broken(error, name) from None


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale whole numbers by the bits they need, and fractions by 1 or by what they reach.

    A camera's 12 bits in a 16-bit file are as bright as the same picture in 8 bits.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise _bad(f"image holds values that are no numbers (NaN or infinity){name}")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        top = next((top for top in (1.0, 255.0) if high <= top), high)
    else:
        top = next((2.0**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits), high)
    bottom = min(low, 0.0)
    scaled = (values - bottom) / max(top - bottom, 1e-9) * 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _reads_heic() -> bool:
    try:
        import_module("pillow_heif").register_heif_opener()  # an extra
    except ImportError:
        return False
    return True


def _what_is(data: bytes) -> str:
    if _HEIC.match(data):
        return "image is HEIC; `pip install 'gazeguard[heic]'` to read it"
    start = data[:1000].lstrip()
    kinds = (what for begins, what in _OTHER_KINDS if begins.match(start))
    return next(kinds, "not an image, or of a kind not read here")


def _absent(why: str) -> RowError:
    return RowError(why, SkipKind.NO_IMAGE_FILE)


def _bad(why: str) -> RowError:
    return RowError(why, SkipKind.BAD_IMAGE)


def _broken(error: Exception, name: str) -> RowError:
    return _bad(f"image is broken ({shorten(str(error), 80)}){name}")
