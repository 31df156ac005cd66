"""A batch of prompts with their answers, for any processor: the answer's tokens go behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gazeguard.models.answers import Answers, answered, end_tokens, padded
from gazeguard.models.target import Target
from gazeguard.types import Sample

IGNORE = -100
_ANSWER_TOKENS = 48  # of a model's own answer, at most


def own_answers(target: Target, samples: Sequence[Sample]) -> list[list[int]]:
    """What the model itself answers, greedily: tokens with the end token last."""
    inputs = {k: v.to(target.device) for k, v in target.encode(samples).inputs.items()}
    length = inputs["input_ids"].shape[1]
    model: Any = target.model
    with torch.inference_mode():
        told = model.generate(**inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
    tokenizer, end = target.processor.tokenizer, end_tokens(target)[0]
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
    model: Any = target.model
    longest = max(map(len, answers))
    logits = model(**answered(target, inputs, answers), use_cache=False).logits
    labels, _ = padded(answers, IGNORE, target.device)
    taught = logits[:, -longest - 1 : -1].float().flatten(0, 1)
    return F.cross_entropy(taught, labels.flatten(), ignore_index=IGNORE)
