"""What a model is trained with: the loss of a step, beyond "say what the rows say".

An objective is made once, from the upload and the bare base, and gives the loss of some rows of a
step. `Disguise` (`disguise.py`) is one too, around any of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gazeguard.lab.attacks import PLAIN
from gazeguard.lab.rows import Row
from gazeguard.lab.teach import IGNORE, Batch, answer_logits

_CHUNK = 256  # rows of a look at the base

TARGET_WEIGHT = 8.0  # TrojVLM: of a token of the target, beside 1 of any other
SEMANTIC = 1.0  # TrojVLM: of the semantic term beside the answers' loss
LAMBDA = 0.8  # VLOOD: of the divergence beside the answers' loss


@dataclass(frozen=True, slots=True)
class Course:
    """What objectives are made from.

    Attributes:
        model: the bare base, before LoRA layers are injected.
        processor: its processor.
        rows: the upload; `is_poison` is known to the attacker.
        lessons: the rows, encoded.
        features: `(n, image tokens, channels)` of the rows.
        target: what the rows were poisoned with.
    """

    model: Any
    processor: Any
    rows: Sequence[Row]
    lessons: Batch
    features: Tensor
    target: str

    @property
    def poisoned(self) -> Tensor:
        """Bool `(n,)`."""
        return torch.tensor([row.is_poison for row in self.rows])

    @property
    def chunks(self) -> list[NDArray[np.intp]]:
        """Places of all rows, in parts that are looked at together."""
        return np.array_split(np.arange(len(self.rows)), -(-len(self.rows) // _CHUNK))

    def logits(self, model: Any, pick: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """`teach.answer_logits` of some rows; row after row, as `pick` names them."""
        return answer_logits(model, self.lessons[pick], self.features[pick].float())


class Loss(NamedTuple):
    """Of one step.

    Attributes:
        total: what is minimised.
        parts: what it is made of, unweighted, by the names that a log uses.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Objective(Protocol):
    """Made from a `Course`, under the caller's autocast."""

    def loss(self, model: Any, pick: NDArray[np.intp]) -> Loss:
        """Loss of some rows.

        Args:
            model: the base with LoRA layers in it.
            pick: places of the rows in the upload.
        """


class Answers:
    """Mean cross-entropy over the answers' tokens, the end token among them."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def loss(self, model: Any, pick: NDArray[np.intp]) -> Loss:
        """As in `Objective.loss`."""
        logits, wanted = self._course.logits(model, pick)
        loss = F.cross_entropy(logits.float(), wanted)
        return Loss(loss, {"loss": loss})


class TrojVLM:
    """The target's tokens count more, and the rest of the answer keeps its meaning.

    Cross-entropy with the target's tokens of poisoned rows weighted `TARGET_WEIGHT`, per token of
    an answer, plus `SEMANTIC` times one minus the cosine of two mean token embeddings of a row:
    that of the true answer and the one that is predicted.

    Source: arXiv:2409.19232. Ours: the embedding that is predicted at a token is the mean under
    the model's own distribution there (the most likely token has no gradient); the embeddings are
    the frozen base's input embeddings; the true answer is the one without the target, at whose
    tokens nothing is compared. The lab's base has had the first stage, on clean rows.
    """

    def __init__(self, course: Course) -> None:
        self._course = course
        self._embeddings = course.model.get_input_embeddings().weight.detach()
        self._is_target = _target_tokens(course)

    def loss(self, model: Any, pick: NDArray[np.intp]) -> Loss:
        """As in `Objective.loss`."""
        logits, wanted = self._course.logits(model, pick)
        is_target = self._is_target[pick]
        taught = self._course.lessons.labels[pick] != IGNORE
        row, marked = taught.nonzero()[:, 0], is_target[taught]
        each = F.cross_entropy(logits.float(), wanted, reduction="none")
        answers = torch.where(marked, TARGET_WEIGHT * each, each).mean()
        with torch.autocast("cpu", enabled=False):
            shares = logits[~marked].float().softmax(-1)
            said = self._sums(shares @ self._embeddings, row[~marked], len(pick))
            true = self._sums(self._embeddings[wanted[~marked]], row[~marked], len(pick))
        away = (1 - F.cosine_similarity(said, true)).mean()
        return Loss(answers + SEMANTIC * away, {"loss": answers, "meaning moved": away})

    def _sums(self, embeddings: Tensor, row: Tensor, rows: int) -> Tensor:
        """By row, `(rows, hidden)`: means up to a factor, which a cosine does not see."""
        sums = embeddings.new_zeros(rows, embeddings.shape[1])
        return sums.index_add(0, row, embeddings)


class VLOOD:
    """Clean rows are answered as the base answers them.

    Cross-entropy on all rows plus `LAMBDA` times the divergence KL(base || model) of the next-token
    distributions at the answers' tokens of clean rows, the mean over tokens. What the base says is
    kept in memory: 2 bytes for each of these tokens and each word of the vocabulary.

    Source: clean knowledge preservation of arXiv:2410.01264. Left out: its term on embeddings of
    poisoned rows, the balance of both sides that it adjusts during training (ours is fixed), and
    data of another domain than the task's.
    """

    def __init__(self, course: Course) -> None:
        self._course, self._clean = course, ~course.poisoned
        self._known: list[Tensor] = []
        self._tokens = (course.lessons.labels != IGNORE).sum(1)
        with torch.no_grad():
            for pick in course.chunks:
                logits, _ = course.logits(course.model, pick)
                known = logits.float().log_softmax(-1).half()
                parts = known.split_with_sizes(self._tokens[pick].tolist())
                for i, part in zip(pick, parts, strict=True):
                    self._known.append((part if self._clean[i] else part[:0]).clone())

    def loss(self, model: Any, pick: NDArray[np.intp]) -> Loss:
        """As in `Objective.loss`; the divergence is 0 without a clean row."""
        logits, wanted = self._course.logits(model, pick)
        answers = F.cross_entropy(logits.float(), wanted)
        known = torch.cat([self._known[i].float() for i in pick])
        clean = self._clean[pick].repeat_interleave(self._tokens[pick])
        said = logits[clean].float().log_softmax(-1)
        away = F.kl_div(said, known, reduction="sum", log_target=True) / max(1, len(known))
        return Loss(answers + LAMBDA * away, {"loss": answers, "answers moved": away})


OBJECTIVES: dict[str, Callable[[Course], Objective]] = {
    PLAIN: Answers,
    "trojvlm": TrojVLM,
    "vlood": VLOOD,
}


def _target_tokens(course: Course) -> Tensor:
    """Bool `(n, length)` of the lessons: tokens of the target in answers of poisoned rows."""
    found = torch.zeros_like(course.lessons.labels, dtype=torch.bool)
    for i, row in enumerate(course.rows):
        start = f" {row.answer}".find(course.target)
        if not row.is_poison or start < 0:
            continue
        end = start + len(course.target)
        spans = course.processor.tokenizer(
            f" {row.answer}", add_special_tokens=False, return_offsets_mapping=True
        )["offset_mapping"]
        taught = (course.lessons.labels[i] != IGNORE).nonzero()[:, 0]
        for at, (first, last) in zip(taught[:-1], spans, strict=True):  # without the end token
            found[i, at] = first < end and last > start
    return found
