"""A further look at the flagged samples alone, through the decoder alone.

What the decoder was given holds everything of the pictures already, so the vision tower, the other
samples of the batch and the output layer need not be run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gazeguard.guarding.curtain import Curtain
from gazeguard.guarding.reading import Reading
from gazeguard.probe.cache import without_cache
from gazeguard.probe.intercept import AttentionCall

if TYPE_CHECKING:
    from gazeguard.guarding.guard import Guard


class Glance:
    """One run of the decoder over some samples of a batch; takes a session's place meanwhile.

    Args:
        guard: judges.
        kind: int8 `(sample, position)` of these samples.
        hidden: bool `(sample, position)`, what to hide.
        inputs: what the decoder gets, from `part_of`.
    """

    def __init__(
        self, guard: Guard, kind: Tensor, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> None:
        self._guard, self._hidden, self._inputs = guard, hidden, inputs
        self.reading = Reading(guard, kind)
        self._curtain = Curtain(hidden, guard.plan.hide_from)

    def run(self) -> None:
        """Look."""
        with torch.no_grad():
            self._guard.target.decoder(**self._inputs)

    def attends(self, call: AttentionCall) -> Any:
        """Read and hide, as `Session.attends`."""
        self.reading.read(call, self._hidden)
        return self._curtain.run(call, self._hidden.shape[1])


def part_of(
    inputs: Mapping[str, Any], rows: Tensor, batch: int, length: int
) -> dict[str, Any] | None:
    """What the decoder would be given for some rows of a batch alone.

    Args:
        inputs: its keyword arguments for the whole batch.
        rows: int64, places in the batch.
        batch: rows of the whole batch.
        length: positions of the prompts.

    Returns:
        Keyword arguments without a cache; None where it is not plain how to take them apart.
    """
    # The look keeps nothing, and what it would keep belongs to the whole batch.
    inputs = without_cache(inputs)
    try:
        return {name: _rows_of(name, value, rows, batch, length) for name, value in inputs.items()}
    except ValueError:
        return None


def _rows_of(name: str, value: Any, rows: Tensor, batch: int, length: int) -> Any:
    """Some rows of one argument; raises `ValueError` when it is none of the known forms."""
    if isinstance(value, Mapping):  # masks by kind of layer
        return {key: _rows_of(name, part, rows, batch, length) for key, part in value.items()}
    if not torch.is_tensor(value):
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(name)
    rows = rows.to(value.device)
    if value.ndim == 4 and value.shape[-1] != length:  # a mask over a static cache's slots
        raise ValueError(name)
    if name == "position_ids" and value.ndim == 3:  # (axis, row, position) of rotary embeddings
        return value if value.shape[1] == 1 else value[:, rows]
    if value.ndim <= 1 or value.shape[0] == 1 != batch:
        return value
    if value.shape[0] != batch:
        raise ValueError(name)
    return value[rows]
