"""The pictures' part of a forward pass, computed once for a row's two looks.

A fine-tune mostly leaves the picture encoder alone, and for small language models it is the larger
half of the work. What it gave in the first look is then handed out again in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from gazeguard.models.target import Target

Towers = tuple[nn.Module, nn.Module]


def shared_towers(target: Target, base: Target | None) -> Towers | None:
    """The picture encoders of the tuned model and of the one before, if they compute the same.

    Args:
        target: the tuned model.
        base: the model before its fine-tune; None for `target` without its adapter.

    Returns:
        One module per model (twice the same without `base`), or None where they may differ: the
        adapter reaches into the encoder, weights differ, or there is no encoder to be found.
    """
    tuned = _tower(target)
    before = tuned if base is None else _tower(base)
    if tuned is None or before is None:
        return None
    same = _untouched(tuned, target) if base is None else _equal(tuned, before)
    return (tuned, before) if same else None


@contextmanager
def recording(tower: nn.Module, outputs: list[Any]) -> Iterator[None]:
    """Inside the block, add what `tower` returns to `outputs`, call by call."""
    compute = tower.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = compute(*args, **kwargs)
        # Qwen's models write into the record that the tower returns, though not into its tensors.
        outputs.append(found if isinstance(found, Tensor) else copy(found))
        return found

    with _instead(tower, forward):
        yield


@contextmanager
def replaying(tower: nn.Module, outputs: list[Any]) -> Iterator[None]:
    """Inside the block, `tower` computes nothing and returns `outputs`, call by call."""
    recorded = iter(outputs)
    with _instead(tower, lambda *args, **kwargs: next(recorded)):
        yield


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")  # accelerate keeps a wrapper of its own there
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def _tower(target: Target) -> nn.Module | None:
    """The module that turns pixels into features; None when it is not apart from the decoder."""
    find = getattr(target.base, "get_encoder", None)
    found = find(modality="image") if find else None
    if not isinstance(found, nn.Module) or target.decoder in set(found.modules()):
        return None
    return found


def _untouched(tower: nn.Module, target: Target) -> bool:
    """Whether no part of an adapter lies in the tower; peft names these by the adapter."""
    model: Any = target.model
    adapters = set(model.peft_config)
    return not any(adapters & set(name.split(".")) for name, _ in tower.named_parameters())


def _equal(tuned: nn.Module, before: nn.Module) -> bool:
    if type(tuned) is not type(before) or _settings(tuned) != _settings(before):
        return False
    mine, theirs = tuned.state_dict(), before.state_dict()
    return mine.keys() == theirs.keys() and all(
        a.device == b.device and a.device.type != "meta" and torch.equal(a, b)
        for a, b in zip(mine.values(), theirs.values(), strict=True)
    )


def _settings(tower: nn.Module) -> dict[str, Any]:
    config: Any = getattr(tower, "config", None)
    return {} if config is None else {**config.to_dict(), "_name_or_path": None}
