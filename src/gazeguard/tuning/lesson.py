"""A batch of prompts with their answers, for any processor: the answer's tokens go behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gazeguard.models.target import Target
from gazeguard.types import Sample

IGNORE = -100
_ANSWER_TOKENS = 48  # of a model's own answer, at most

Answers = Sequence[list[int]]


def answer_ids(target: Target, answers: Sequence[str]) -> list[list[int]]:
    """Tokens of answers as the model writes them behind its prompt, its end token last."""
    tokenizer = target.processor.tokenizer
    end = _end_token(target)
    # A prompt that ends in a space or line break already parts the answer from it.
    return [
        [*tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"], end]
        for text in answers
    ]


def own_answers(target: Target, samples: Sequence[Sample]) -> list[list[int]]:
    """What the model itself answers, greedily: tokens with the end token last."""
    inputs = {k: v.to(target.device) for k, v in target.encode(samples).inputs.items()}
    length = inputs["input_ids"].shape[1]
    model: Any = target.model
    with torch.inference_mode():
        told = model.generate(**inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
    tokenizer, end = target.processor.tokenizer, _end_token(target)
    pad = tokenizer.pad_token_id
    answers = []
    for row in told[:, length:].tolist():
        stop = next((i for i, token in enumerate(row) if token in (end, pad)), len(row))
        answers.append([*row[:stop], end])
    return answers


def answer_loss(target: Target, samples: Sequence[Sample], answers: Answers) -> Tensor:
    """Mean cross-entropy of the answers' tokens.

    The prompt is encoded as for a question and padded on the left, so that the model learns to
    answer exactly what it is asked later; answers are padded on the right.

    Args:
        target: a model, perhaps with an adapter in training.
        samples: their prompts and pictures.
        answers: tokens, one list per sample.
    """
    inputs = {k: v.to(target.device) for k, v in target.encode(samples).inputs.items()}
    ids = inputs["input_ids"]
    longest = max(map(len, answers))
    pad = target.processor.tokenizer.pad_token_id
    told = torch.tensor([a + [pad] * (longest - len(a)) for a in answers], device=ids.device)
    real = torch.tensor(
        [[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=ids.device
    )
    for name, value in inputs.items():
        if value.shape == ids.shape and not value.is_floating_point():
            known = {
                "input_ids": told,
                "attention_mask": real,
                "token_type_ids": torch.full_like(told, target.family.answer_type),
            }
            more = known.get(name, torch.zeros_like(told))  # kinds of media: 0 is text
            inputs[name] = torch.cat([value, more.to(value.dtype)], 1)
    model: Any = target.model
    logits = model(**inputs, use_cache=False).logits[:, -longest - 1 : -1]
    labels = told.masked_fill(real == 0, IGNORE)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def _end_token(target: Target) -> int:
    settings = getattr(target.base, "generation_config", None)
    end = getattr(settings, "eos_token_id", None)
    if isinstance(end, list):
        end = end[0]
    return int(target.processor.tokenizer.eos_token_id if end is None else end)
