"""The attention rows of some queries per sample, computed beside the model's own kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gazeguard.errors import ModelError
from gazeguard.probe.intercept import AttentionCall
from gazeguard.types import KeyKind

# Kernel options that pick keys in ways this module does not compute.
_UNSUPPORTED = ("sinks", "indices", "block_indices")


def last_real(key_kind: Tensor) -> Tensor:
    """Position of each sample's last token that is not padding, int64 `(sample,)`."""
    slots = torch.arange(key_kind.shape[1], device=key_kind.device)
    return torch.where(key_kind != KeyKind.PAD, slots, -1).amax(1)


def row(
    call: AttentionCall, last: Tensor, length: int | None = None, *, at_end: bool = False
) -> Tensor:
    """Softmax weights from one or several query positions per sample to every key.

    Args:
        call: an attention call that sees the whole prompt (no earlier cache).
        last: int64 `(sample,)` or `(sample, query)`, the queries' positions in the prompt.
        length: positions in the prompt, where the cache has room for more (a static cache hands
            out its empty slots as keys too). By default there is one key per position.
        at_end: the caller knows that every query is the prompt's last position, so that the device
            need not be asked, nor causality be applied.

    Returns:
        float32 `(sample, head, key)`, or `(sample, query, head, key)`; each row sums to 1 (less
        where an attention sink takes a share). Memory is O(queries x keys).

    Raises:
        ModelError: the backend or model uses an attention form that has no such row here.
    """
    if last.ndim == 1:
        return row(call, last[:, None], length, at_end=at_end)[:, 0]
    query, key = call.query, call.key
    samples, heads, queries, channels = query.shape
    groups, keys = key.shape[1], key.shape[2]
    last = last.to(query.device)
    each = torch.arange(samples, device=query.device)[:, None]
    length = keys if length is None else length
    at = last if queries == length else _trimmed(last, queries, length, call, at_end)

    # fp32 from here on: half-precision logits of size 10 would be off by several per cent.
    # Queries lie beside the heads of a group, so that no key is copied for them.
    wanted, each_group = last.shape[1], heads // groups
    q = query[each, :, at].float().view(samples, wanted, groups, each_group, channels)
    q = q.transpose(1, 2).reshape(samples, groups, wanted * each_group, channels)
    scores = (q @ key.float().transpose(-1, -2)).view(samples, groups, wanted, each_group, keys)
    scores = scores.transpose(1, 2).reshape(samples, wanted, heads, keys)
    scaling = call.options.get("scaling")
    scores = scores * (channels**-0.5 if scaling is None else scaling)
    softcap = call.options.get("softcap")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    bias = call.options.get("position_bias")
    if bias is not None:
        scores = scores + bias.expand(samples, -1, -1, -1)[each, :, at][..., :keys].float()

    unmasked = call.mask is None and call.options.get("sliding_window") is None
    if not (at_end and unmasked and keys == length and _dense(call)):
        scores = _masked(call, scores, each, at, last)
    sink = call.options.get("s_aux")
    if sink is None:
        return scores.softmax(-1)
    column = sink.float().reshape(1, 1, heads, 1).expand(samples, wanted, heads, 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def _trimmed(last: Tensor, queries: int, length: int, call: AttentionCall, at_end: bool) -> Tensor:
    """Query index when the model dropped all but the final queries of the prompt."""
    if not at_end and bool((last != length - 1).any()):
        raise ModelError(
            f"layer {call.layer} computes only the last {queries} of {length} positions, which"
            " hides earlier answers, and the prompt's end behind right padding: use left padding"
            " and one answer per row."
        )
    return last - (length - queries)


def _masked(call: AttentionCall, scores: Tensor, each: Tensor, at: Tensor, last: Tensor) -> Tensor:
    """Apply the mask the kernel applies to this query."""
    if not _dense(call):
        raise ModelError(
            f"layer {call.layer} uses sparse or sink attention that gazeguard cannot read yet: use"
            " a model with dense attention."
        )
    mask, keys = call.mask, scores.shape[-1]
    if mask is not None and not torch.is_tensor(mask):
        raise ModelError(
            f"the attention backend '{call.backend}' has a mask that gazeguard cannot read: load"
            " the model with attn_implementation='sdpa'."
        )
    if mask is not None and mask.ndim == 4:
        rows = mask.expand(len(scores), -1, -1, -1)[each, :, at][..., :keys]
        if rows.dtype == torch.bool:
            return scores.masked_fill(~rows, float("-inf"))
        return scores + rows.float()

    # No mask, or the 2-D padding mask of flash attention: causality is the kernel's own.
    slot = torch.arange(keys, device=scores.device)
    seen = torch.ones(len(scores), 1, keys, dtype=torch.bool, device=scores.device)
    if mask is not None:
        seen = mask[:, None, -keys:].bool()
    if _is_causal(call):
        seen = seen & (slot <= last[..., None])
    window: Any = call.options.get("sliding_window")
    if window is not None and "flash" in call.backend:
        seen = seen & (slot > last[..., None] - window)
    return scores.masked_fill(~seen[:, :, None], float("-inf"))


def _dense(call: AttentionCall) -> bool:
    return all(call.options.get(name) is None for name in _UNSUPPORTED)


def _is_causal(call: AttentionCall) -> bool:
    option = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if option is None else option)
