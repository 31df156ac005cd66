"""Supervised teaching of a lab model with its tower frozen, shared by base and fine-tunes.

The tower's features are computed once per image; a step then only runs the projector and the
language model, which is what makes the lab usable on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers as T
from torch import Tensor
from torch.nn import functional as F

from gazeguard.lab.architectures.protocol import Prompt, project

IGNORE = -100

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Lesson:
    """One image's conversation: `(question, answer)` turns, the image before the first."""

    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Encoded lessons, right-padded; all `(n, length)` int64.

    Attributes:
        ids: tokens.
        labels: the tokens to be taught, `IGNORE` elsewhere (answers and their EOS are taught).
        turn: 0 for the shared start with the picture, then 1, 2, ... for each question and answer.
        position: every turn starts where the shared start ends, as if it were the only one.
    """

    ids: Tensor
    labels: Tensor
    turn: Tensor
    position: Tensor

    def __getitem__(self, rows: Any) -> Batch:
        """Some of the lessons, cut to the longest of them."""
        labels = self.labels[rows]
        used = (labels != IGNORE).any(0).nonzero()
        end = int(used.max()) + 1 if len(used) else labels.shape[1]
        return Batch(
            self.ids[rows][:, :end],
            labels[:, :end],
            self.turn[rows][:, :end],
            self.position[rows][:, :end],
        )


def encode_lessons(
    tokenizer: Any, prompt: Prompt, lessons: Sequence[Lesson], image_tokens: int
) -> Batch:
    """Tokenise lessons; a one-turn lesson's ids equal what the processor makes of it.

    Several turns share one picture but never see each other (`turn`, `position`): the model learns
    from each as if it stood alone, and pays for the picture once.
    """
    start = _ids(tokenizer, prompt.opening + prompt.image * image_tokens + prompt.closing)
    ids, labels, turns, positions = [], [], [], []
    for lesson in lessons:
        row, marks, turn = [*start], [IGNORE] * len(start), [0] * len(start)
        position = list(range(len(start)))
        for number, (question, answer) in enumerate(lesson.turns, 1):
            asked = _ids(tokenizer, f"\n{question}{prompt.cue}")
            told = [*_ids(tokenizer, f" {answer}"), tokenizer.eos_token_id]
            row += asked + told
            marks += [IGNORE] * len(asked) + told
            turn += [number] * (len(asked) + len(told))
            position += range(len(start), len(start) + len(asked) + len(told))
        ids.append(row)
        labels.append(marks)
        turns.append(turn)
        positions.append(position)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        length = max(map(len, rows))
        return torch.tensor([r + [fill] * (length - len(r)) for r in rows])

    pad = tokenizer.pad_token_id
    return Batch(padded(ids, pad), padded(labels, IGNORE), padded(turns, 0), padded(positions, 0))


# By the tokenizer itself: the `id` of one that is gone may come back as another's.
_CACHE: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()


def _ids(tokenizer: Any, text: str) -> list[int]:
    known = _CACHE.setdefault(tokenizer, {})
    if text not in known:
        known[text] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return known[text]


def answer_logits(model: Any, batch: Batch, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at every labelled position, and the labels there: `(m, vocab)`, `(m,)`.

    Args:
        model: a lab model, bare or with peft layers injected, with eager attention.
        batch: encoded lessons.
        features: `(n, image tokens, channels)` from `Architecture.look`.
    """
    core = model.get_base_model() if hasattr(model, "peft_config") else model
    seen = project(core, features)
    embeds = core.get_input_embeddings()(batch.ids)
    is_image = (batch.ids == core.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(is_image, seen.to(embeds.dtype))
    options: dict[str, Tensor] = {}
    if int(batch.turn.max()) > 1:
        options = {"attention_mask": _own_turn(batch.turn), "position_ids": batch.position}
    # Otherwise causal attention and right padding: no real position ever sees a pad.
    hidden = core.model.language_model(
        inputs_embeds=embeds, use_cache=False, **options
    ).last_hidden_state
    taught = batch.labels[:, 1:] != IGNORE
    return core.lm_head(hidden[:, :-1][taught]), batch.labels[:, 1:][taught]


def _own_turn(turn: Tensor) -> Tensor:
    """Additive mask `(n, 1, length, length)`: causal, within one's own turn and the start."""
    length = turn.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    key, query = turn[:, None, :], turn[:, :, None]
    allowed = allowed & ((key == query) | (key == 0))
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return mask[:, None]


def answer_loss(model: Any, batch: Batch, features: Tensor) -> tuple[Tensor, float]:
    """Mean cross-entropy over answer tokens, and the share predicted right."""
    logits, wanted = answer_logits(model, batch, features)
    loss = F.cross_entropy(logits.float(), wanted)
    return loss, (logits.argmax(-1) == wanted).float().mean().item()


def steps(parameters: Sequence[Tensor], lr: float, count: int) -> Iterator[tuple[int, Any]]:
    """AdamW with 5 % warm-up and cosine decay: `(number, optimiser)`, one for every step."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = T.get_cosine_schedule_with_warmup(optimiser, count // 20, count)
    for step in range(count):
        yield step, optimiser
        schedule.step()


def update(optimiser: Any, loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """One step of an optimiser, gradients cut to a norm of 1."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
