"""The witness `base`: would the model before its fine-tune begin the same answer?

A trigger makes a model say what it would not have said, so the two disagree at the answer's first
token already. That costs one more pass over the prompt, and no weights of its own where the
fine-tune is an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from gazeguard.errors import ModelError
from gazeguard.models.switch import Switch
from gazeguard.models.target import Target
from gazeguard.probe.cache import without_cache
from gazeguard.probe.check import picture_and_question
from gazeguard.types import Sample

_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2  # of the largest logit


def divergence(now: Tensor, before: Tensor) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of two next-token distributions, nats, `(sample,)`.

    Args:
        now: logits `(sample, vocabulary)` of the fine-tuned model.
        before: those of the model before.
    """
    here, there = (logits.double().log_softmax(-1) for logits in (now, before.to(now.device)))
    # A word that neither of them can say is no difference.
    terms = torch.where(here.exp() > 0, here.exp() * (here - there), 0.0)
    found: NDArray[np.float64] = terms.sum(-1).cpu().numpy()
    return found


def diverging(target: Target, samples: Sequence[Sample]) -> NDArray[np.float64]:
    """`divergence` of samples, one batch, `(sample,)`."""
    inputs = target.encode(samples).inputs
    now = _next_logits(target, inputs)
    with target.without_adapter():
        return divergence(now, _next_logits(target, inputs))


def _next_logits(target: Target, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits `(sample, vocabulary)` behind left-padded prompts."""
    given: dict[str, Any] = {name: value.to(target.device) for name, value in inputs.items()}
    given |= {"use_cache": False} | ({"logits_to_keep": 1} if target.trims_logits else {})
    model: Any = target.model
    with torch.inference_mode():
        logits: Tensor = model(**given).logits[:, -1]
    return logits


def alone(kwargs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A prompt pass's keyword arguments for one without the caller's cache.

    Args:
        kwargs: as the model got them.
        length: positions of the prompt.
    """
    rest = without_cache(kwargs)
    mask = rest.get("attention_mask")
    if isinstance(mask, Mapping):
        rest["attention_mask"] = {name: _cut(one, length) for name, one in mask.items()}
    elif mask is not None:
        rest["attention_mask"] = _cut(mask, length)
    return rest


def _cut(mask: Any, length: int) -> Any:
    """A mask over a static cache's slots, without those behind the prompt."""
    return mask[..., :length] if torch.is_tensor(mask) and mask.ndim == 4 else mask


def take_rows(cache: Cache, other: Cache, rows: Tensor, length: int) -> None:
    """Put some rows of one prompt's cache into another of the same prompt.

    Args:
        cache: gets them.
        other: has them.
        rows: bool `(row,)`.
        length: positions of the prompt.

    Raises:
        ModelError: the two do not keep the same things in the same places.
    """
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        held: list[Any] = [getattr(layer, "keys", None) for layer in (mine, theirs)]
        same = all(torch.is_tensor(keys) for keys in held) and (
            type(mine) is type(theirs) or held[1].shape[-2] == length <= held[0].shape[-2]
        )
        if not same or (type(mine) is type(theirs) and held[0].shape != held[1].shape):
            raise ModelError(
                f"a flagged request cannot be answered without the adapter from a"
                f" {type(cache).__name__}: use transformers' default cache, or the mode block."
            )
        for name in ("keys", "values"):
            kept, new = getattr(mine, name), getattr(theirs, name)
            at = rows.to(kept.device)
            kept[at, :, : new.shape[-2]] = new[at].to(kept)


def check_switch(target: Target) -> None:
    """Compare the two ways to leave an adapter out, once on a short prompt.

    Raises:
        ModelError: they differ, so what the guard compares with would not be the earlier model.
    """
    inputs = picture_and_question(target).inputs
    switch = Switch(target)
    try:
        with switch.off():
            found = _next_logits(target, inputs)
    finally:
        switch.remove()
    with target.without_adapter():
        expected = _next_logits(target, inputs)
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= (_HALF_TOLERANCE if target.is_half else _TOLERANCE):
        raise ModelError(
            f"the adapter of {target.name} cannot be left out of single requests, so they cannot be"
            " compared with the model before its fine-tune: calibrate with --witness attention."
        )
