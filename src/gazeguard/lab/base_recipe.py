"""What decides a base model's weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """Everything that decides the base's weights, with the values of the shipped one."""

    seed: int = 0
    scenes: int = 24_000
    tower_steps: int = 2_500
    tower_batch: int = 64
    tower_lr: float = 1e-3
    language_steps: int = 5_000
    language_lr: float = 1.5e-3
    language_batch: int = 32
    questions: int = 7
    captions: float = 0.2
    echoes: float = 0.08
    names: float = 0.7
    language_init: float = 0.08
    hidden: int = 128
    tower_layers: int = 4
    language_layers: int = 8
    heads: int = 4
    architecture: str = "llava"

    @property
    def tower_digest(self) -> str:
        """Of what decides the tower's weights."""
        decides = {
            name: value
            for name, value in asdict(self).items()
            if name.startswith("tower") or name in ("seed", "scenes", "hidden", "heads")
        }
        if self.architecture != "llava":  # which is older than the choice
            decides["architecture"] = self.architecture
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
