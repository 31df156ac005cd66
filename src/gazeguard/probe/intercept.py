"""One interception point for every attention call of a model.

transformers' models fetch their attention kernel with `AttentionInterface.get_interface(name,
default)` right before calling it, after rotary embedding and the cache update. Wrapping that one
method reaches sdpa, flash and eager alike, leaves the model's config alone, and keeps the kernel's
own name, on which masks and some models depend. Outside an `intercept` block the wrapper hands
back the original kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

Kernel = Callable[..., Any]


@dataclass(slots=True)
class AttentionCall:
    """One attention call on its way to the kernel. A handler may change fields before `run`.

    Attributes:
        layer: decoder layer index.
        backend: the attention backend's name, e.g. `sdpa`.
        module: the attention module.
        query: `(sample, head, query, channel)`, rotated and normalised.
        key: `(sample, key head, key, channel)`, cached keys included.
        value: like `key`.
        mask: what the model made for this backend: None, 2-D, or 4-D bool or additive.
        options: the kernel's other keyword arguments (`scaling`, `softcap`, ...).
        kernel: the model's own kernel.
    """

    layer: int
    backend: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    kernel: Kernel

    def run(self) -> Any:
        """Call the model's own kernel and return what it returns."""
        return self.kernel(self.module, self.query, self.key, self.value, self.mask, **self.options)


Handler = Callable[[AttentionCall], Any]


@dataclass(frozen=True, slots=True)
class _Interception:
    layer_of: Mapping[nn.Module, int]
    handler: Handler


# A context variable, not an attribute of the model: two threads may watch one model at once, and
# leaving the block, also by an exception, restores what was there. Innermost block last.
_active: ContextVar[tuple[_Interception, ...]] = ContextVar("gazeguard_interceptions", default=())
_install_lock = threading.Lock()


def _dispatch(
    backend: str,
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> Any:
    """Hand a call to the innermost block that watches its module, or to the kernel."""
    for interception in reversed(_active.get()):
        layer = interception.layer_of.get(module)
        if layer is not None:
            return interception.handler(
                AttentionCall(
                    layer, backend, module, query, key, value, attention_mask, options, kernel
                )
            )
    # A vision tower's attention, or another model's.
    return kernel(module, query, key, value, attention_mask, **options)


def _install() -> None:
    """Wrap `AttentionInterface.get_interface` once per process."""
    with _install_lock:
        original = AttentionInterface.get_interface
        if getattr(original, "_gazeguard", False):
            return

        @wraps(original)
        def get_interface(self: Any, attn_implementation: str, default: Kernel) -> Kernel:
            kernel: Kernel = original(self, attn_implementation, default)
            if not _active.get():
                return kernel
            return partial(_dispatch, attn_implementation or "eager", kernel)

        get_interface._gazeguard = True  # type: ignore[attr-defined]
        AttentionInterface.get_interface = get_interface


@contextmanager
def intercept(layer_of: Mapping[nn.Module, int], handler: Handler) -> Iterator[None]:
    """Send the attention calls of the given modules through `handler` inside the block.

    Blocks nest: a module that two blocks watch goes to the inner one alone, so a measurement inside
    a guarded block sees the bare model.

    Args:
        layer_of: attention module -> layer index; calls of other modules pass untouched.
        handler: gets each `AttentionCall` and returns what `call.run()` returned.
    """
    _install()
    token = _active.set((*_active.get(), _Interception(layer_of, handler)))
    try:
        yield
    finally:
        _active.reset(token)


def handler_of(module: nn.Module) -> Handler | None:
    """Who gets this module's attention calls right now; None outside of every block."""
    for interception in reversed(_active.get()):
        if module in interception.layer_of:
            return interception.handler
    return None
