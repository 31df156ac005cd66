"""Models spread over devices, or kept in main memory and on disk between passes.

accelerate hangs a hook on every module of such a model. It moves inputs to where the module
computes and, where the weights are kept elsewhere, fetches them for the pass alone. In between
these weights are on PyTorch's "meta" device: a shape without numbers. What reads a weight outside
of a forward pass must therefore come here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from gazeguard.errors import ModelError, UsageError

# What accelerate writes into a module.
_HOOK = "_hf_hook"
_HOOK_STATE = (_HOOK, "_old_forward", "forward")
# Maps that transformers makes by itself, from the memory that is free.
_MADE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def compute_device(module: nn.Module) -> torch.device:
    """Where a module computes, wherever its weights are kept meanwhile.

    Args:
        module: with at least one parameter of its own or below.
    """
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def weight(model: nn.Module, name: str, found: Tensor) -> Tensor:
    """The numbers of a tensor of `model.state_dict()`, fetched where they are kept elsewhere.

    Args:
        model: the model.
        name: its key in the state dict.
        found: its value there.

    Raises:
        ModelError: there are none.
    """
    if not found.is_meta:
        return found
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        own = ".".join(parts[depth:])
        for hook in _hooks(model.get_submodule(".".join(parts[:depth]))):
            if hook.offload and own in hook.original_devices:
                kept: Tensor = hook.weights_map[own]
                return kept
    raise ModelError(
        f"the weight '{name}' has a shape but no numbers (it is on the meta device): load the"
        " model's weights first."
    )


def offloads(model: nn.Module) -> bool:
    """Whether the weights of some module are kept elsewhere between passes."""
    return any(hook.offload for module in model.modules() for hook in _hooks(module))


def check_device_map(device_map: Any) -> None:
    """Refuse a map that gives a module two places.

    Raises:
        UsageError: it does.
    """
    names = list(device_map) if isinstance(device_map, Mapping) else []
    for name in names:
        for other in names:
            if other != name and (not name or other.startswith(f"{name}.")):
                raise UsageError(
                    f"the device_map places '{other}' twice, by itself and with '{name}': name the"
                    f" other parts of '{name}' one by one instead."
                )


def places(model: Any) -> tuple[str, ...]:
    """Where the parts of a spread model are kept: devices, `cpu` and `disk`, sorted.

    Empty for a model that is in one place.
    """
    kind = compute_device(model.get_input_embeddings()).type
    kept = (getattr(model, "hf_device_map", None) or {}).values()
    found = {f"{kind}:{place}" if isinstance(place, int) else str(place) for place in kept}
    return tuple(sorted(found)) if len(found) > 1 or "disk" in found else ()


def may_use_disk(device_map: Any) -> bool:
    """Whether a `device_map` of `from_pretrained` can leave layers on disk."""
    if isinstance(device_map, Mapping):
        return "disk" in device_map.values()
    return isinstance(device_map, str) and device_map in _MADE_MAPS


def fetch_whole(model: nn.Module) -> None:
    """Have modules whose forward pass reads their children's weights fetch these with their own.

    Of PyTorch's modules that is `MultiheadAttention`, in SigLIP's pooling head.
    """
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found = [hook for hook in _hooks(module) if hook.offload]
            if found and any(hook.offload for hook in _hooks(module.out_proj)):
                remove_hook_from_module(module, recurse=True)
                together = AlignDevicesHook(
                    found[0].execution_device,
                    offload=True,
                    weights_map=found[0].weights_map,
                    place_submodules=True,
                )
                add_hook_to_module(module, together)


def one_thread_each(model: nn.Module) -> None:
    """Let one thread at a time into each module whose weights come and go with its pass.

    accelerate keeps no account of threads: one that leaves a module takes the weights away from
    the other inside, whose numbers are then wrong, without an error in some modules.
    """
    for module in model.modules():
        compute = vars(module).get("forward")
        offloaded = any(hook.offload for hook in _hooks(module))
        if offloaded and compute is not None and not hasattr(compute, "_gazeguard"):
            vars(module)["forward"] = _locked(compute)


def _locked(compute: Callable[..., Any]) -> Callable[..., Any]:
    lock = Lock()

    @wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return compute(*args, **kwargs)

    forward._gazeguard = True  # type: ignore[attr-defined]
    return forward


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Inside the block, a spread model looks like one without accelerate.

    Weights that are kept elsewhere have their shape, number format and device there, and no numbers
    that mean anything; each takes the memory of a single one. Copies made of such modules are
    ordinary modules. Afterwards the hooks of the model's own modules are back.
    """
    states: list[tuple[nn.Module, dict[str, Any]]] = []
    weights: list[tuple[nn.Module, str, nn.Parameter]] = []
    device_map = vars(model).pop("hf_device_map", None)
    for module in list(model.modules()):
        own = vars(module)
        for hook in _hooks(module):
            for name in hook.original_devices if hook.offload else ():
                owner, _, last = name.rpartition(".")
                holder = module.get_submodule(owner)
                kept = getattr(holder, last)
                if kept.is_meta:
                    weights.append((holder, last, kept))
                    device = hook.execution_device
                    blank = torch.zeros((), dtype=kept.dtype, device=device).expand(kept.shape)
                    setattr(holder, last, nn.Parameter(blank, requires_grad=False))
        if _HOOK in own:
            states.append((module, {key: own.pop(key) for key in _HOOK_STATE if key in own}))
    try:
        yield
    finally:
        for module, name, kept in weights:
            setattr(module, name, kept)
        for module, state in states:
            vars(module).update(state)
        if device_map is not None:
            model.hf_device_map = device_map


def follow(module: nn.Module, beside: nn.Module) -> None:
    """Move the inputs of a module that has no hook to where its neighbour computes."""
    if _HOOK not in vars(module) and _hooks(beside):
        add_hook_to_module(module, AlignDevicesHook(compute_device(beside)))


def _hooks(module: nn.Module) -> tuple[AlignDevicesHook, ...]:
    hook = getattr(module, _HOOK, None)
    every = getattr(hook, "hooks", (hook,))
    return tuple(one for one in every if isinstance(one, AlignDevicesHook))
