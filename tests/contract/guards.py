"""Guards that flag what a test wants, and an independent way to hide tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature

import numpy as np
import torch
from PIL import Image
from transformers.models.llama.modeling_llama import LlamaModel

from gazeguard.guarding.guard import Guard
from gazeguard.guarding.saved import Saved
from gazeguard.methods.cleansight.settings import Setting, plan
from gazeguard.models.fingerprint import fingerprint
from gazeguard.models.target import Encoded, Target
from gazeguard.probe.attention import attend
from gazeguard.signals.ratio import visual_prompt_ratio
from gazeguard.types import ImagePart, Sample, TextPart, Turn

# What transformers calls the cache of keys and values; said here once, apart from what is tested.
CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"


def sample(row: int, text: str = "what is it?") -> Sample:
    """A question about a picture of noise."""
    pixels = np.random.default_rng(row).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    turns = (Turn("user", (ImagePart(0), TextPart(text))),)
    return Sample(row, f"id-{row}", (Image.fromarray(pixels),), turns)


def rigged(target: Target, encoded: Encoded, flagged: set[int], setting: Setting) -> Guard:
    """A guard whose distance is large for the flagged samples and 0 for the others.

    It looks along the direction that separates the two groups and across all differences inside
    the group of the others.
    """
    layers = target.layers if setting.layers == "all" else setting.layers
    what = plan(setting, layers, target.layers)
    rows = attend(target, encoded, layers=what.layers, reduce_heads=False)
    features = visual_prompt_ratio(
        rows.weights, rows.key_kind, log=setting.feature == "log-ratio"
    ).double()
    x = features.flatten(1).numpy()
    others = np.array([i for i in range(len(x)) if i not in flagged])
    mean = x[others].mean(0) if len(others) else np.zeros(x.shape[1])
    basis = np.linalg.qr((x[others] - mean).T)[0] if len(others) > 1 else np.zeros((x.shape[1], 1))
    whitener = np.zeros((x.shape[1], len(flagged) or 1))
    for column, i in enumerate(sorted(flagged)):
        away = x[i] - mean
        away = away - basis @ (basis.T @ away)
        whitener[:, column] = away / (away @ (x[i] - mean))  # the flagged sample scores 1
    arrays = {
        "mean": mean,
        "whitener": whitener,
        "calibration": np.linspace(0.0, 0.5, 199),
        "levels": np.full(features.shape[1:], 1.0),
    }
    counts = {"fit": 0, "threshold": 199, "left_out": 0}
    return Guard(target, Saved(setting, what, arrays, 0.01, 0, counts, fingerprint(target)))


@contextmanager
def mask_edited(target: Target, hidden: Mapping[int, torch.Tensor], first: int) -> Iterator[None]:
    """Hide keys the long way: write them into the eager mask that each attention module gets.

    Args:
        target: a model that runs with eager attention.
        hidden: sample -> bool `(position,)` of the prompt.
        first: first layer in which they are hidden.
    """

    def edit(module, args, kwargs):
        mask, cache = kwargs["attention_mask"].clone(), kwargs.get(CACHE)
        queries = (
            kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1]
        )
        seen = queries + (0 if cache is None else int(cache.get_seq_length(module.layer_idx)))
        keys = mask.shape[-1]
        start = max(0, seen - keys)  # what a sliding cache has dropped
        for i, slots in hidden.items():
            for slot in slots.nonzero().flatten().tolist():
                if start <= slot < start + keys:
                    mask[i, :, :, slot - start] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    hooks = [
        module.register_forward_pre_hook(edit, with_kwargs=True)
        for module, layer in target.attention_modules.items()
        if layer >= first
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def steps(target: Target, inputs: Mapping[str, torch.Tensor], tokens: int = 4, **options):
    """Greedy generation of exactly so many tokens: sequences, and logits `(step, row, word)`."""
    out = target.model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits)
