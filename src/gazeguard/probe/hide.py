"""Hiding chosen keys of chosen samples from one attention call, with the model's own kernel.

The other samples of the batch must not notice, to the last bit. A mask added to a batch that had
none would send all of it down another kernel path, so the kernel first runs on the untouched call
and the chosen samples are computed again, apart, and put in their places.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gazeguard.errors import ModelError
from gazeguard.probe.intercept import AttentionCall

# Flash kernels take no mask over single keys. One more channel does it: queries hold the first
# number there, hidden keys the second, other keys 0. The product, -2^22 before scaling, leaves
# nothing of a softmax weight; both numbers are exact in float16 and bfloat16. Kernels like head
# sizes that are a multiple of 8.
_QUERY_MARK, _KEY_MARK, _EXTRA_CHANNELS = 256.0, -16384.0, 8
_FLASH_MAX_CHANNELS = 256
# Kernel options with one entry per sample. Others, such as a sink per head, are shared.
_PER_SAMPLE = {"position_ids": 2, "position_bias": 4}


def run_hiding(call: AttentionCall, samples: Tensor, hidden: Tensor) -> Any:
    """Run a call so that some samples give no weight at all to some keys.

    Args:
        call: the attention call, as the model made it.
        samples: int64 `(chosen,)`, distinct places in the batch, ascending.
        hidden: bool `(chosen, key)`, True for keys that the sample's queries shall not see.

    Returns:
        What the kernel returns. For all samples not in `samples` it is, bit for bit, what it
        returns on the untouched call.

    Raises:
        ModelError: keys cannot be hidden from this kernel.
    """
    if len(samples) == call.query.shape[0]:
        return _hiding(call, hidden).run()
    output, weights = call.run()
    part, part_weights = _hiding(_only(call, samples), hidden).run()
    output = output.index_copy(0, samples, part)
    if torch.is_tensor(weights) and torch.is_tensor(part_weights):
        weights = weights.index_copy(0, samples, part_weights)
    return output, weights


def _only(call: AttentionCall, samples: Tensor) -> AttentionCall:
    """The call of these samples alone."""
    batch = call.query.shape[0]
    mask = call.mask
    if torch.is_tensor(mask) and mask.shape[0] == batch:
        mask = mask[samples]
    options = {
        name: value[samples]
        if torch.is_tensor(value)
        and value.ndim == _PER_SAMPLE.get(name)
        and value.shape[0] == batch
        else value
        for name, value in call.options.items()
    }
    return replace(
        call,
        query=call.query[samples],
        key=call.key[samples],
        value=call.value[samples],
        mask=mask,
        options=options,
    )


def _hiding(call: AttentionCall, hidden: Tensor) -> AttentionCall:
    """The call with `hidden` `(sample, key)` worked into its mask, or its channels."""
    if "flash" in call.backend:
        return _by_channel(call, hidden)
    mask, columns = call.mask, hidden[:, None, None]
    if mask is None:
        mask = _explicit(call, hidden)
    elif not torch.is_tensor(mask) or mask.ndim != 4:
        raise ModelError(
            f"the attention backend '{call.backend}' has a mask in which gazeguard cannot hide"
            " image tokens: load the model with attn_implementation='sdpa'."
        )
    elif mask.dtype == torch.bool:
        mask = mask & ~columns
    else:
        # The lowest finite number: a query all of whose keys are hidden must not become NaN.
        mask = mask.masked_fill(columns, torch.finfo(mask.dtype).min)
    return replace(call, mask=mask)


def _explicit(call: AttentionCall, hidden: Tensor) -> Tensor:
    """A bool mask `(sample, 1, query, key)` for a kernel that had none to read."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    seen = ~hidden[:, None, None]
    if queries == 1:
        if call.backend == "eager":  # adds its mask to the scores
            lowest = torch.finfo(call.query.dtype).min
            return torch.zeros_like(seen, dtype=call.query.dtype).masked_fill(~seen, lowest)
        return seen
    if call.backend != "sdpa":
        raise ModelError(
            f"layer {call.layer} keeps the order of its tokens inside the '{call.backend}' kernel,"
            " where gazeguard cannot hide image tokens: load the model with"
            " attn_implementation='sdpa'."
        )
    causal = call.options.get("is_causal")
    if getattr(call.module, "is_causal", True) if causal is None else causal:
        # Aligned at the first key: more keys than queries are the empty slots of a static cache.
        ones = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device)
        seen = seen & ones.tril()
    return seen


def _by_channel(call: AttentionCall, hidden: Tensor) -> AttentionCall:
    channels = call.query.shape[-1]
    if channels + _EXTRA_CHANNELS > _FLASH_MAX_CHANNELS or call.options.get("softcap") is not None:
        raise ModelError(
            f"the '{call.backend}' kernel of layer {call.layer} has no room to hide image tokens"
            " (very wide heads or capped scores): load the model with attn_implementation='sdpa',"
            " or 'eager' for capped scores."
        )
    query = F.pad(call.query, (0, _EXTRA_CHANNELS))
    query[..., channels] = _QUERY_MARK
    key = F.pad(call.key, (0, _EXTRA_CHANNELS))
    key[..., channels] = (hidden[:, None] * _KEY_MARK).to(key.dtype)
    width = call.value.shape[-1]
    value = F.pad(call.value, (0, query.shape[-1] - width))
    scaling = call.options.get("scaling")
    # The kernel's own default would be that of the wider head.
    options = call.options | {"scaling": channels**-0.5 if scaling is None else scaling}

    def cropped(*arguments: Any, **named: Any) -> Any:
        output, weights = call.kernel(*arguments, **named)
        return output[..., :width], weights

    return replace(call, query=query, key=key, value=value, options=options, kernel=cropped)
