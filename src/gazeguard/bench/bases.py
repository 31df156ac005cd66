"""The clean models that suites start from, by name; a line more makes a new one available."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gazeguard.assets import BASE, INTERNVL_BASE
from gazeguard.errors import UsageError
from gazeguard.files import whole_folder
from gazeguard.lab.text.teacher import Teacher, bag_of_words, minilm
from gazeguard.lab.text.train import LENGTHS, EncoderRecipe, train_encoder


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


def _encoder(kind: str, out: Path) -> None:
    train_encoder(out, EncoderRecipe(kind=kind), minilm())


def _tiny_clip(out: Path) -> None:
    """A CLIP-type encoder that is trained in half a minute, on words alone."""
    recipe = EncoderRecipe(
        layers=2,
        width=64,
        heads=4,
        vocabulary=1000,
        prompts=3000,
        steps=200,
        batch=64,
        learning_rate=3e-3,
    )
    train_encoder(out, recipe, bag_of_words)


BASES: dict[str, Base] = {
    "llava": Base("vlm", shipped=BASE),
    "internvl": Base("vlm", shipped=INTERNVL_BASE),
    **{
        kind: Base("encoder", partial(_encoder, kind), family=kind, teacher=minilm)
        for kind in LENGTHS
    },
    "tiny-clip": Base("encoder", _tiny_clip, family="clip", teacher=lambda: bag_of_words),
}


def known_base(name: str) -> Base:
    """A base by its name.

    Raises:
        UsageError: there is none.
    """
    if name not in BASES:
        raise UsageError(
            f"the benchmark has no base '{name}': choose one of {', '.join(sorted(BASES))}."
        )
    return BASES[name]
