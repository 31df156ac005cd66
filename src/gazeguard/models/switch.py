"""A fine-tuned model as it was before, in one thread and for some rows: its adapter is left out.

`Target.without_adapter` switches the whole model, and with it every other thread that uses it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from gazeguard.errors import ModelError
from gazeguard.models.target import Target

_BASE = "__base__"  # peft's name for a row without an adapter
EVERY = True
Rows = Sequence[bool] | bool | None


class Switch:
    """Hooks on the layers that a LoRA adapter changes; they do nothing until `rows` says so.

    Args:
        target: a model with an adapter.
    """

    def __init__(self, target: Target) -> None:
        self._local = threading.local()
        active: Any = target.model.active_adapter
        self._name = active if isinstance(active, str) else active[0]
        self._hooks = []
        for module in target.base.modules():
            if isinstance(module, LoraLayer):
                assert isinstance(module, nn.Module)
                self._hooks.append(module.register_forward_pre_hook(self._lora, with_kwargs=True))
            elif isinstance(module, ModulesToSaveWrapper):
                self._hooks.append(module.register_forward_hook(self._whole, with_kwargs=True))

    @property
    def rows(self) -> Rows:
        """Which rows of this thread's passes run without the adapter: `EVERY`, some, or None."""
        found: Rows = getattr(self._local, "rows", None)
        return found

    @rows.setter
    def rows(self, rows: Rows) -> None:
        self._local.rows = rows

    @contextmanager
    def off(self) -> Iterator[None]:
        """No row has the adapter inside the block."""
        before, self.rows = self.rows, EVERY
        try:
            yield
        finally:
            self.rows = before

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _lora(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        rows = self.rows
        if rows is None:
            return None
        count = len(args[0])
        names = [_BASE if out else self._name for out in _each(rows, count, module)]
        return args, {**kwargs, "adapter_names": names}

    def _whole(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        rows = self.rows
        if rows is None:
            return None
        original: Any = module.original_module
        before = original(*args, **kwargs)
        if rows is EVERY:
            return before
        out = torch.tensor(_each(rows, len(output), module), device=output.device)
        return torch.where(out.view(-1, *[1] * (output.ndim - 1)), before, output)


def _each(rows: Sequence[bool] | bool, count: int, module: nn.Module) -> list[bool]:
    """One per row of a layer's input."""
    if isinstance(rows, bool):
        return [rows] * count
    if len(rows) != count:
        raise ModelError(
            f"a {type(module).__name__} gets {count} rows of a batch of {len(rows)}, so single"
            " requests cannot be answered without the adapter: answer them one by one."
        )
    return list(rows)
