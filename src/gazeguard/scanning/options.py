"""What a scan of vision-language models needs beside their names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gazeguard.errors import UsageError
from gazeguard.methods.entropyscan import Settings


@dataclass(frozen=True, slots=True)
class VisionOptions:
    """Options of EntropyScan; text encoders need none of them.

    Attributes:
        samples: a data set of benign samples, in any format that `clean` reads.
        images: folder that its image paths are relative to.
        adapter: adapter on the one model that is scanned.
        make_references: so many benign fine-tunes of the base are made when they are not there yet.
        reference_steps: of tuning, at most; one that is cut off may not count.
        settings: of the method.
        batch_size: samples per forward pass; None suits it to the device and the prompts.
    """

    samples: str | Path | None = None
    images: str | Path | None = None
    adapter: str | Path | None = None
    make_references: int = 0
    reference_steps: int = 2000
    settings: Settings = field(default_factory=Settings)
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.make_references < 0 or self.reference_steps < 1:
            raise UsageError("the numbers of references and of their steps must be positive.")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size} is too small: use 1 or more.")
