"""Where a long training in stages was when it was cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from gazeguard.errors import UsageError
from gazeguard.files import write_bytes

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, one of each for every weight


class Checkpoint:
    """One file with the weights in training and AdamW's moments, replaced whole at each `write`.

    Attributes:
        stage: the stage that the file was written in; None when there is no file.
        done: steps of that stage that were done.
    """

    def __init__(self, path: Path, digest: str) -> None:
        """Open what an earlier run left.

        Raises:
            UsageError: it was left by a run with another `digest`.
        """
        self._path, self._digest = path, digest
        self.stage: str | None = None
        self.done = 0
        self._tensors: dict[str, Tensor] = {}
        if not path.is_file():
            return
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            if said.get("digest") != digest:
                raise UsageError(
                    f"{path} is the checkpoint of a run with other settings: delete it, or choose"
                    " another folder."
                )
            self.stage, self.done = said["stage"], int(said["done"])
            self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def write(
        self, stage: str, done: int, trained: Mapping[str, Tensor], optimiser: torch.optim.Optimizer
    ) -> None:
        """Keep the weights `trained` and their moments after `done` steps of a stage."""
        tensors = {name: weight.detach() for name, weight in trained.items()}
        for name, weight in trained.items():
            for moment in _MOMENTS:
                tensors[f"{moment}/{name}"] = optimiser.state[weight][moment]
        said = {"digest": self._digest, "stage": stage, "done": str(done)}
        write_bytes(self._path, save(tensors, said))

    def take(self, stage: str, trained: Mapping[str, Tensor]) -> int:
        """Give the weights what was kept of this stage; how many of its steps were done."""
        if stage != self.stage:
            return 0
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(self._tensors[name])
        return self.done

    def restore(self, trained: Mapping[str, Tensor], optimiser: Any) -> None:
        """Give an `optimiser` of the weights its kept moments."""
        for name, weight in trained.items():
            found = {moment: self._tensors[f"{moment}/{name}"] for moment in _MOMENTS}
            optimiser.state[weight] = {"step": torch.tensor(float(self.done)), **found}

    def remove(self) -> None:
        """Delete the file: the run is over."""
        self._path.unlink(missing_ok=True)
