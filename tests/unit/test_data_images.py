"""Hostile and broken images end in one short reason; nothing outside the folder is opened."""

from __future__ import annotations

import base64
import io
import os
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gazeguard.data.images import EmbeddedImage, ImageLimits, ImageRoot, image_name
from gazeguard.errors import RowError
from gazeguard.types import SkipKind


def encoded(
    mode: str = "RGB", size: tuple[int, int] = (8, 5), kind: str = "PNG", **options: object
) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(out, kind, **options)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that promises many pixels."""
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


@pytest.fixture
def root(tmp_path: Path) -> ImageRoot:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/ö 1.png").write_bytes(encoded())
    (tmp_path / "secret.png").write_bytes(encoded())
    return ImageRoot(folder, ImageLimits())


def test_paths_below_the_root_are_read(root: ImageRoot) -> None:
    picture = root.folder / "sub/ö 1.png"
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    forms = ["sub/ö 1.png", "sub/../sub/ö 1.png", str(picture), picture.as_uri(), url]
    assert set(root.read(forms)) == {picture.read_bytes()}


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("../secret.png", "leaves the image folder: ../secret.png"),
        ("../../../../../../etc/passwd", "leaves the image folder"),
        ("/etc/passwd", "leaves the image folder"),
        ("file:///etc/passwd", "leaves the image folder"),
        ("file://server/share/1.png", "on another machine"),
        ("https://example.org/1.png", "web address, download it first: https://example.org"),
        ("http://[", "cannot be read"),
        ("sub/2.png", "image not found: sub/2.png"),
        ("sub/ö 1.png/x", "image not found"),
        ("sub", "not a file"),
        ("a\0b.png", "cannot be used: a\ufffdb.png"),
        ("\ud800.png", "cannot be used"),
        ("x" * 5000, "xx..."),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,@@@@", "broken base64"),
    ],
)
def test_bad_references_are_named(root: ImageRoot, reference: str, reason: str) -> None:
    with pytest.raises(RowError) as error:
        root.read([reference])
    assert reason in str(error.value)
    assert len(str(error.value)) < 200
    assert str(error.value).isprintable(), "a reason must not steer the terminal"


def test_a_link_out_of_the_root_is_not_followed(root: ImageRoot, tmp_path: Path) -> None:
    (root.folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(RowError, match="leaves the image folder"):
        root.read(["link.png"])
    (tmp_path / "alias").symlink_to(root.folder)
    alias = ImageRoot(tmp_path / "alias", ImageLimits())
    assert alias.read(["sub/ö 1.png"]), "the root itself may be a link"


def test_a_pipe_is_not_waited_for(root: ImageRoot) -> None:
    os.mkfifo(root.folder / "pipe.png")
    with pytest.raises(RowError, match="not a file"):
        root.read(["pipe.png"])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image is empty"),
        (b"hello", "not an image"),
        (bytes(range(256)) * 9, "not an image"),
        (encoded()[:60], "broken"),
        (encoded(kind="JPEG", size=(64, 64))[:-99], "truncated"),
        (bomb(100_000, 100_000), "above the limit of 89,478,485 pixels"),
        (bomb(10_000, 10_000), "100,000,000 pixels, above the limit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_broken_images_and_bombs_are_named(root: ImageRoot, data: bytes, reason: str) -> None:
    with warnings.catch_warnings(record=True) as seen, pytest.raises(RowError) as error:
        root.decode([data])
    assert not seen, "Pillow's own warning must not reach the user"
    assert reason in str(error.value)


def test_limits_count_all_images_of_a_row(root: ImageRoot) -> None:
    image = encoded(size=(10, 10))
    tight = ImageRoot(root.folder, ImageLimits(max_pixels=250, max_bytes=2 * len(image)))
    assert len(tight.decode([image] * 2)) == 2
    with pytest.raises(RowError, match="300 pixels, above the limit of 250"):
        tight.decode([image] * 3)
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    (root.folder / "x.png").write_bytes(image)
    for source in (image, url, "x.png"):
        assert len(tight.read([source] * 2)) == 2
        with pytest.raises(RowError, match="limit"):
            tight.read([source] * 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGB", "I;16", "I", "CMYK", "F"])
def test_every_mode_becomes_rgb(root: ImageRoot, mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (3, 2)).save(out, "TIFF" if mode in ("CMYK", "F", "I") else "PNG")
    (image,) = root.decode([out.getvalue()])
    assert (image.mode, image.size) == ("RGB", (3, 2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(root: ImageRoot, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    (image,) = root.decode([encoded("L" if kind == "TIFF" else "RGB", (20, 10), kind, exif=exif)])
    assert (image.mode, image.size) == ("RGB", (10, 20))


def test_an_animation_gives_its_first_frame(root: ImageRoot) -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert root.decode([out.getvalue()])[0].getpixel((1, 1)) == (255, 0, 0)


GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (GREYS.astype(np.uint16) * 257, "PNG"),
        (GREYS.astype(np.uint16) * 257, "TIFF"),
        (GREYS.astype(np.uint16), "PNG"),  # eight bits in a container of sixteen
        ((GREYS / 255 * 4095).round().astype(np.uint16), "PNG"),  # a camera's twelve
        ((GREYS / 255 * 1023).round().astype(np.uint16), "TIFF"),
        ((GREYS / 255).astype(np.float32), "TIFF"),
        (GREYS.astype(np.float32), "TIFF"),
        ((GREYS / 255 * 9000).astype(np.float32), "TIFF"),
        ((GREYS / 255 * 2 - 1).astype(np.float32), "TIFF"),
        (GREYS.astype(np.int32) * 2**20, "TIFF"),
    ],
)
def test_more_than_eight_bits_look_like_the_same_picture_in_eight(
    root: ImageRoot, pixels: np.ndarray, kind: str
) -> None:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    (image,) = root.decode([out.getvalue()])
    assert image.mode == "RGB"
    seen = np.asarray(image).astype(int)
    assert abs(seen - GREYS[..., None]).max() <= 1


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<html>", encoded()[:40], bomb(40_000, 40_000), bomb(9_999, 9_999)]
)
def test_a_reason_names_the_file(root: ImageRoot, data: bytes) -> None:
    with pytest.raises(RowError, match=r": a/7\.png$") as error:
        root.decode([encoded(), data], ["a/6.png", "a/7.png"])
    assert error.value.kind is SkipKind.BAD_IMAGE


def test_names_of_images_without_a_file() -> None:
    assert image_name(EmbeddedImage(b"x", "a/b.png"), 0) == "a/b.png"
    assert image_name(b"x", 1) == image_name("data:image/png;base64,x", 1) == "picture 2 of the row"


def test_heic_needs_its_package(root: ImageRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
    with pytest.raises(
        RowError, match=r"HEIC; `pip install 'gazeguard\[heic\]'` to read it: h.heic"
    ):
        root.decode([data], ["h.heic"])


def test_heic_is_read_with_its_package(root: ImageRoot) -> None:
    heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 48), "red")).save(out)
    (image,) = root.decode([out.getvalue()])
    assert image.size == (64, 48)
    assert np.abs(np.asarray(image).astype(int) - (255, 0, 0)).max() < 20
