"""`Sight`: what one model's attention did on the samples, and nothing else of the model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

Floats = NDArray[np.float32]

_WORDS = ("sample_id", "prompt", "layers", "q")
_ARRAYS = ("entropy", "head_entropy", "mass", "ratio", "maps")


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """Numbers of `n` samples, `L` layers, `H` heads and `Q` entropy indices.

    Attributes:
        sample_id: of the samples that the model could take, in their order.
        prompt: per sample, a hash of its input ids: models that read a sample as other tokens
            cannot be compared.
        layers: decoder layer of each entry of the layer axis.
        q: entropy indices.
        entropy: `(n, L, Q)`, of head-mean attention over the image.
        head_entropy: `(n, L, H, Q)`.
        mass: `(n, L, H)`, log odds of the share of attention that lies on the image.
        ratio: `(n, L, H)`, log of attention on the image over attention on the user's words.
        maps: `(L, rows, columns)`, mean over samples of the head-mean attention over the image.
        moved: how far the model's weights lie from its base's; NaN where that was not measured.
    """

    sample_id: tuple[str, ...]
    prompt: tuple[str, ...]
    layers: tuple[int, ...]
    q: tuple[float, ...]
    entropy: Floats
    head_entropy: Floats
    mass: Floats
    ratio: Floats
    maps: Floats
    moved: float = math.nan

    def __len__(self) -> int:
        return len(self.sample_id)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        words = {name: getattr(self, name) for name in _WORDS} | {"moved": self.moved}
        return save(
            {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS},
            metadata={"sight": json.dumps(words)},
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Sight:
        """What `to_bytes` wrote.

        Raises:
            ValueError, KeyError, SafetensorError: it did not.
        """
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        words: dict[str, Any] = json.loads(header["__metadata__"]["sight"])
        fields: dict[str, Any] = {name: tuple(words[name]) for name in _WORDS}
        return cls(**fields | load(data), moved=float(words.get("moved", math.nan)))

    def take(self, rows: NDArray[np.intp]) -> Sight:
        """The samples at these places."""
        return replace(
            self,
            sample_id=tuple(self.sample_id[i] for i in rows),
            prompt=tuple(self.prompt[i] for i in rows),
            entropy=self.entropy[rows],
            head_entropy=self.head_entropy[rows],
            mass=self.mass[rows],
            ratio=self.ratio[rows],
        )


def paired(sights: list[Sight]) -> list[Sight]:
    """The same sights on the samples that every model measured, in one order."""
    common = set(sights[0].sample_id).intersection(*(sight.sample_id for sight in sights[1:]))
    order = [name for name in dict.fromkeys(sights[0].sample_id) if name in common]
    found = []
    for sight in sights:
        place = {name: i for i, name in enumerate(sight.sample_id)}
        found.append(sight.take(np.array([place[name] for name in order], dtype=np.intp)))
    return found
