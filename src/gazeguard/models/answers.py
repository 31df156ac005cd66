"""Answers as tokens: how a model writes them behind its prompt, and prompts with answers behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jinja2 import TemplateError
from torch import Tensor

from gazeguard.errors import GazeguardError
from gazeguard.models.target import Target

Answers = Sequence[Sequence[int]]
_MARK = "\ue1f2"  # private use: no template trims it


def answer_ids(target: Target, answers: Sequence[str]) -> list[list[int]]:
    """Tokens of answers as the model writes them behind its prompt, its end token last."""
    tokenizer = target.processor.tokenizer
    lead, end = _lead(target), end_tokens(target)[0]
    return [
        [*tokenizer(lead + text.strip(), add_special_tokens=False)["input_ids"], end]
        for text in answers
    ]


def end_tokens(target: Target) -> list[int]:
    """Tokens that end an answer; the first is the one that a model is taught."""
    settings = getattr(target.base, "generation_config", None)
    end = getattr(settings, "eos_token_id", None)
    if isinstance(end, list):
        return end
    return [int(target.processor.tokenizer.eos_token_id if end is None else end)]


def written(target: Target, inputs: Mapping[str, Tensor], max_new_tokens: int) -> list[str]:
    """What the model answers, greedily, to inputs of `Target.encode`; without an outer space."""
    given = {name: value.to(target.device) for name, value in inputs.items()}
    told = target.base.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)
    new = told[:, inputs["input_ids"].shape[1] :]
    texts = target.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def answered(target: Target, inputs: Mapping[str, Tensor], answers: Answers) -> dict[str, Tensor]:
    """Inputs of left-padded prompts with their answers behind, padded on the right.

    Args:
        target: the model.
        inputs: of `Target.encode`.
        answers: tokens, one list per line of `inputs`.
    """
    ids = inputs["input_ids"]
    told, real = padded(answers, target.processor.tokenizer.pad_token_id, ids.device)
    longer = dict(inputs)
    for name, value in inputs.items():
        if value.shape == ids.shape and not value.is_floating_point():
            known = {
                "input_ids": told,
                "attention_mask": real.long(),
                "token_type_ids": torch.full_like(told, target.family.answer_type),
            }
            more = known.get(name, torch.zeros_like(told))  # kinds of media: 0 is text
            longer[name] = torch.cat([value, more.to(value.dtype)], 1)
    return longer


def padded(
    lines: Answers, pad: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Lists of tokens as int64 `(line, token)`, and which of those are no padding."""
    width = max(map(len, lines), default=0)
    ids = torch.full((len(lines), width), pad, dtype=torch.long)
    real = torch.zeros(len(lines), width, dtype=torch.bool)
    for i, line in enumerate(lines):
        at = slice(width - len(line), None) if left else slice(0, len(line))
        ids[i, at] = torch.tensor(line, dtype=torch.long)
        real[i, at] = True
    return ids.to(device), real.to(device)


def _lead(target: Target) -> str:
    """What the chat template writes between a prompt and its answer: a space, or nothing."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    told = {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}
    prompt = target.family.render(target.processor, [asked])
    more = {"role": "user", "content": [{"type": "text", "text": "And?"}]}
    try:
        whole = target.family.render(target.processor, [asked, told, more])
    except (TemplateError, TypeError, GazeguardError):  # a template of one question
        whole = ""
    before, mark, _ = whole.partition(_MARK)
    if mark and before.startswith(prompt):
        return before[len(prompt) :]
    return "" if prompt[-1:].isspace() else " "
