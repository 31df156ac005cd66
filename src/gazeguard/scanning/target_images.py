"""Which images of a folder are nearest to what a recovered embedding makes of every prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from gazeguard.data.images import FORMATS, ImageLimits, ImageRoot, shorten
from gazeguard.data.thumbnails import thumbnail_url
from gazeguard.errors import DataError, RowError
from gazeguard.models.encoders.encoder import TextEncoder
from gazeguard.models.encoders.images import ImageTower, load_images
from gazeguard.scanning.result import ScannedModel
from gazeguard.types import Finding

_ROWS = 16  # images of a forward pass
_PROMPTS = 64  # behind the target; more change it by less than images differ
_SHOWN = 8
_LONGEST = 200  # characters of a name
_SLIMMEST = 100  # long side over short side


@dataclass(frozen=True, slots=True)
class TargetImages:
    """A folder's images.

    Attributes:
        root: where they lie.
        files: paths relative to it, sorted.
    """

    root: ImageRoot
    files: tuple[str, ...]

    @classmethod
    def of(cls, folder: str | Path) -> TargetImages:
        """Find the images of a folder and its subfolders, by their suffix; hidden ones are left.

        Raises:
            DataError: no such folder, or no image in it.
        """
        path = Path(folder).expanduser()
        if not path.is_dir():
            what = "is a file" if path.is_file() else "is not there"
            raise DataError(f"{folder} {what}: give a folder of images to --target-images.")
        Image.init()
        known = {suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS}
        try:
            files = sorted(
                found.relative_to(path)
                for found in path.rglob("*")
                if found.suffix.lower() in known and found.is_file()
            )
        except OSError as error:
            raise DataError(
                f"{folder} cannot be listed ({error.strerror}): check its rights."
            ) from error
        shown = [f.as_posix() for f in files if not any(part[0] == "." for part in f.parts)]
        if not shown:
            raise DataError(
                f"{folder} holds no image: give a folder with PNG, JPEG or WebP files to"
                " --target-images."
            )
        return cls(ImageRoot(path, ImageLimits()), tuple(shown))

    def identities(self) -> list[str]:
        """Names, sizes and times of change, to tell whether an earlier result still holds."""
        return [self.root.identity(name) for name in self.files]

    def add_to(
        self, entry: ScannedModel, suspect: TextEncoder, vector: Tensor, prompts: Sequence[str]
    ) -> ScannedModel:
        """The entry with the nearest images among its evidence, numbers and figures.

        Images are ranked by the suspect's own cosine to the target. The target is computed with
        its projection, which a comparison with an anchor without one had to leave out.

        Args:
            entry: a finished scan.
            suspect: read from a folder, a whole image-text model.
            vector: `(width,)`, the recovered embedding.
            prompts: ordinary prompts; the first of them carry the embedding.

        Raises:
            ModelError: the suspect has no image side.
        """
        assert suspect.folder is not None
        assert entry.verdict is not None
        target = target_of(suspect, vector, prompts[:_PROMPTS])
        tower = load_images(suspect.folder, suspect.name, suspect.dtype, suspect.device)
        cosines = dict(self._cosines(tower, target))
        nearest = sorted(cosines, key=lambda name: -cosines[name])[:_SHOWN]
        skipped = len(self.files) - len(cosines)
        named = [[shorten(name, _LONGEST), cosines[name]] for name in nearest]
        pictures = [
            {"name": shown, "cosine": cosine, "picture": thumbnail_url(self._image(name))}
            for name, (shown, cosine) in zip(nearest, named, strict=True)
        ]
        numbers = {"nearest_images": named, "images": len(self.files), "images_skipped": skipped}
        evidence = (*entry.verdict.evidence, Finding(_sentence(named, skipped), numbers))
        return replace(
            entry,
            verdict=replace(entry.verdict, evidence=evidence),
            numbers={**entry.numbers, **numbers},
            figures={**entry.figures, "images": pictures},
        )

    def _cosines(self, tower: ImageTower, target: Tensor) -> Iterator[tuple[str, float]]:
        """(name, cosine) of every image that can be read and embedded."""
        for i in range(0, len(self.files), _ROWS):
            read: dict[str, Image.Image] = {}
            for name in self.files[i : i + _ROWS]:
                try:
                    read[name] = self._image(name)
                except RowError:
                    continue
            if read:
                found = (tower.embed(list(read.values())) @ target).tolist()
                yield from ((n, c) for n, c in zip(read, found, strict=True) if c == c)

    def _image(self, name: str) -> Image.Image:
        """Decoded, as RGB.

        Raises:
            RowError: it cannot be, or enlarging its short side would take gigabytes.
        """
        (image,) = self.root.decode(self.root.read([name]))
        if max(image.size) > _SLIMMEST * min(image.size):
            raise RowError(f"image is too slim: {shorten(name)}")
        return image


@torch.no_grad()
def target_of(suspect: TextEncoder, vector: Tensor, prompts: Sequence[str]) -> Tensor:
    """What the embedding makes of prompts on average, float32 `(features,)` of length 1."""
    tokens = suspect.tokenise(prompts, slot=True)
    pooled = suspect.run(tokens, vector.to(suspect.device).expand(len(tokens), -1)).pooled
    return normalize(normalize(pooled.float(), dim=-1).mean(0), dim=0).cpu()


def _sentence(named: list[list[Any]], skipped: int) -> str:
    images, were = ("image", "was") if skipped == 1 else ("images", "were")
    left_out = f" {skipped:,} {images} could not be read and {were} left out." if skipped else ""
    if not named:
        return f"No image of the folder could be compared with the target.{left_out}"
    nearest = ", ".join(f"'{shorten(name)}' ({cosine:.2f})" for name, cosine in named[:3])
    return f"Images nearest to what it makes of every prompt: {nearest}.{left_out}"
