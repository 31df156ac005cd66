"""The cache of keys and values among a call's arguments, found by what it is.

transformers renames that argument: `past_key_values` up to 5.23, `cache` from 5.24 on. A guard that
looks for one name runs on without noticing and reads the prompt into a full cache. This is the only
file that deals with it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from gazeguard.errors import ModelError


def cache_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache that a call of the model is given, whatever the argument's name.

    Raises:
        ModelError: two different ones, so that it cannot be told which one the prompt is read into.
    """
    return _only(value for value in (*args, *kwargs.values()) if isinstance(value, Cache))


def cache_in(output: Any) -> Cache | None:
    """The cache among a model's outputs, from an output class or a tuple; errors as `cache_of`."""
    if isinstance(output, Mapping):
        return cache_of((), output)
    return cache_of(output, {}) if isinstance(output, tuple) else None


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's keyword arguments for a pass that neither reads nor fills a cache."""
    rest = {name: value for name, value in kwargs.items() if not isinstance(value, Cache)}
    return {**rest, "use_cache": False}


def cache_name(model: Any) -> str:
    """What the forward pass of a transformers model calls its cache."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def divides(cache: Cache) -> bool:
    """Whether a cache is keys and values alone, and no state such as that of linear attention."""
    return type(cache) is DynamicCache and all(
        isinstance(layer, DynamicLayer) for layer in cache.layers
    )


def for_lines(cache: Cache, lines: Tensor) -> Cache:
    """A cache of its own for some lines of a batch, repeated ones too; the given one stays whole.

    Args:
        cache: of `n` lines; one that `divides`.
        lines: int64 `(line,)`, places among the `n`.
    """
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        if layer.get_seq_length():
            one = len(layer.keys) == 1  # a view: only what is written behind it takes memory
            layer.keys, layer.values = (
                kept.expand(len(lines), -1, -1, -1) if one else kept[lines.to(kept.device)]
                for kept in (layer.keys, layer.values)
            )
    return chosen


def _only(found: Iterable[Cache]) -> Cache | None:
    caches = list({id(cache): cache for cache in found}.values())
    if len(caches) > 1:
        raise ModelError(
            f"this call has {len(caches)} caches of keys and values, so the guard cannot tell which"
            " one the prompt is read into: call the model with one."
        )
    return caches[0] if caches else None
