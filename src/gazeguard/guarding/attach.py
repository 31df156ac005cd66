"""What hangs on a model while a watch is open on it: two forward hooks and a shim on `generate`.

Which watch a call belongs to is decided per thread: by the watch that is open in the caller's own
context, so that two threads never see each other's. A `generate` in a thread without one (the usual
way to stream) belongs to the model's only open watch.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from gazeguard.errors import UsageError
from gazeguard.models.target import Target
from gazeguard.probe.intercept import handler_of

if TYPE_CHECKING:
    from gazeguard.guarding.watch import Watch

_lock = threading.Lock()
_attachments: dict[nn.Module, _Attachment] = {}


@contextmanager
def attached(target: Target, watch: Watch) -> Iterator[None]:
    """Lead the model's calls to `watch` inside the block; the last one out cleans up."""
    with _lock:
        attachment = _attachments.get(target.base)
        if attachment is None:
            attachment = _attachments[target.base] = _Attachment(target, watch)
        attachment.watches.append(watch)
    try:
        yield
    finally:
        with _lock:
            attachment.watches.remove(watch)
            if not attachment.watches:
                attachment.remove()
                _attachments.pop(target.base, None)


class _Attachment:
    """The hooks of one model, shared by all watches that are open on it."""

    def __init__(self, target: Target, first: Watch) -> None:
        self.watches: list[Watch] = []
        self._base, self._name = target.base, target.name
        # One of the modules that every watch on this model intercepts.
        self._module = next(iter(first.guard.modules))
        self._hooks = [
            self._base.register_forward_pre_hook(self._before, with_kwargs=True),
            self._base.register_forward_hook(self._after, with_kwargs=True),
            target.decoder.register_forward_pre_hook(self._decodes, with_kwargs=True),
        ]
        self._original = self._base.generate

        @functools.wraps(self._original)
        def shim(*args: Any, **kwargs: Any) -> Any:
            return self._generate(*args, **kwargs)

        self._shim = self._base.generate = shim

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        # If somebody wrapped `generate` again meanwhile, the shim stays inside and does nothing.
        if self._base.__dict__.get("generate") is self._shim:
            del self._base.generate

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = self._watch()
        if watch is not None:
            watch.before(args, kwargs)

    def _decodes(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = self._watch()
        if watch is not None:
            watch.decodes(args, kwargs)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        watch = self._watch()
        return None if watch is None else watch.after(module, args, kwargs, output)

    def _watch(self) -> Watch | None:
        """The caller's watch; None when somebody else's block, a probe's, is the inner one."""
        handler = handler_of(self._module)
        if handler is None and self.watches:
            raise UsageError(
                f"{self._name} is guarded by a watch of another thread, and this call is outside of"
                " it: open a watch in this thread too, or call generate()."
            )
        return next((watch for watch in self.watches if watch.attends == handler), None)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if handler_of(self._module) is None and self.watches:
            if len(self.watches) > 1:
                raise UsageError(
                    f"{self._name} has {len(self.watches)} open watches, and this thread has none"
                    " of its own: open a watch in the thread that calls generate()."
                )
            with self.watches[0].intercepting():
                return self._generate(*args, **kwargs)
        watch = self._watch()
        if watch is None:
            return self._original(*args, **kwargs)
        with watch.generating(args, kwargs):
            return self._original(*args, **_uncompiled(kwargs))


def _uncompiled(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with decoding steps left uncompiled.

    transformers compiles them for a static cache on a GPU; a compiled step would skip the guard.
    """
    config = kwargs.get("generation_config")
    if config is None:
        return {**kwargs, "disable_compile": True}
    config = copy.deepcopy(config)
    config.disable_compile = True
    return {**kwargs, "generation_config": config}
