"""The clean models that suites start from, by name; a line more makes a new one available."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from gazeguard.assets import BASE, INTERNVL_BASE, SMOLLM_TAUGHT
from gazeguard.files import whole_folder
from gazeguard.lab.text.teacher import Teacher, bag_of_words, minilm
from gazeguard.lab.text.train import LENGTHS, TOY, EncoderRecipe, train_encoder


@dataclass(frozen=True, slots=True)
class Base:
    """One clean model.

    Attributes:
        kind: `vlm` or `encoder`.
        make: puts it where there was none; gets the folder. None where `shipped` is set.
        shipped: where it is already.
        family: of an encoder, one of `train.LENGTHS`.
        teacher: of an encoder's fine-tunes.
    """

    kind: str
    make: Callable[[Path], object] | None = None
    shipped: Path | str | None = None
    family: str = ""
    teacher: Callable[[], Teacher] | None = None

    def folder(self, name: str, work: Path) -> Path:
        """Where the model is; it is made under `work` the first time."""
        if self.shipped is not None:
            return Path(self.shipped)
        assert self.make is not None, "a base that does not ship must be made"
        folder = work / "bases" / name
        if not (folder / "config.json").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with whole_folder(folder) as part:
                self.make(part)
        return folder


_minilm = cache(minilm)  # a process makes many models; its weights are read once


def _encoder(kind: str, out: Path) -> None:
    train_encoder(out, EncoderRecipe(kind=kind), _minilm())


def _tiny_clip(out: Path) -> None:
    train_encoder(out, TOY, bag_of_words)


def _smollm(out: Path) -> None:
    from gazeguard.lab.smollm import assemble  # of the packages that it asks for, one is rare

    assemble(out, SMOLLM_TAUGHT)


BASES: dict[str, Base] = {
    "llava": Base("vlm", shipped=BASE),
    "internvl": Base("vlm", shipped=INTERNVL_BASE),
    "smollm2": Base("vlm", _smollm),
    **{
        kind: Base("encoder", partial(_encoder, kind), family=kind, teacher=_minilm)
        for kind in LENGTHS
    },
    "tiny-clip": Base("encoder", _tiny_clip, family="clip", teacher=lambda: bag_of_words),
}
