"""Supervised teaching of a LLaVA-type model with its tower frozen, shared by base and fine-tunes.

The tower's patch features are computed once per image; a step then only runs the projector and the
language model, which is what makes the lab usable on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Lesson:
    """One image's conversation: `(question, answer)` turns, the image before the first."""

    turns: tuple[tuple[str, str], ...]


def tower_features(tower: Any, images: Tensor) -> Tensor:
    """Patch features `(n, patches, hidden)` of the last tower layer, class token dropped."""
    features: Tensor = tower(images).last_hidden_state[:, 1:]
    return features


def encode_lessons(
    tokenizer: Any, lessons: Sequence[Lesson], image_tokens: int
) -> tuple[Tensor, Tensor]:
    """Token ids and labels `(n, length)`, right-padded; only answers and their EOS are labelled.

    The pieces are tokenised apart exactly where the chat template puts special tokens or the role
    marker, so ids equal what the processor makes of the same conversation.
    """
    image = tokenizer.convert_tokens_to_ids("<image>")
    rows, marks = [], []
    for lesson in lessons:
        ids, labels = [tokenizer.bos_token_id], [IGNORE]
        for turn, (question, answer) in enumerate(lesson.turns):
            if turn == 0:
                asked = _ids(tokenizer, "USER: ") + [image] * image_tokens
                asked += _ids(tokenizer, f"\n{question} ASSISTANT:")
            else:
                asked = _ids(tokenizer, f"USER: {question} ASSISTANT:")
            told = [*_ids(tokenizer, f" {answer}"), tokenizer.eos_token_id]
            ids += asked + told
            labels += [IGNORE] * len(asked) + told
        rows.append(ids)
        marks.append(labels)
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return (
        torch.tensor([r + [pad] * (length - len(r)) for r in rows]),
        torch.tensor([m + [IGNORE] * (length - len(m)) for m in marks]),
    )


_CACHE: dict[tuple[int, str], list[int]] = {}


def _ids(tokenizer: Any, text: str) -> list[int]:
    key = (id(tokenizer), text)
    if key not in _CACHE:
        _CACHE[key] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _CACHE[key]


def answer_logits(
    model: Any, ids: Tensor, labels: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits at every labelled position, and the labels there: `(m, vocab)`, `(m,)`.

    Args:
        model: a `LlavaForConditionalGeneration`, bare or with peft layers injected.
        ids: `(n, length)` right-padded token ids.
        labels: `(n, length)`, `IGNORE` where nothing is taught.
        features: `(n, patches, hidden)` from `tower_features`.
    """
    core = model.get_base_model() if hasattr(model, "peft_config") else model
    seen = core.model.multi_modal_projector(features)
    embeds = core.get_input_embeddings()(ids)
    is_image = (ids == core.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(is_image, seen.to(embeds.dtype))
    # Right padding and causal attention: no real position ever sees a pad, so no mask is needed.
    hidden = core.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    taught = labels[:, 1:] != IGNORE
    return core.lm_head(hidden[:, :-1][taught]), labels[:, 1:][taught]


def answer_loss(model: Any, ids: Tensor, labels: Tensor, features: Tensor) -> tuple[Tensor, float]:
    """Mean cross-entropy over answer tokens, and the share predicted right."""
    logits, wanted = answer_logits(model, ids, labels, features)
    loss = F.cross_entropy(logits.float(), wanted)
    return loss, (logits.argmax(-1) == wanted).float().mean().item()
