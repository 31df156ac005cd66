"""The types on the arrows: Sample -> AttentionRows -> Profile -> Verdict.

Nothing here imports torch at run time, so `import gazeguard` stays light.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class KeyKind(IntEnum):
    """What an attended key position holds."""

    PAD = 0
    IMAGE = 1
    PROMPT = 2  # the user's own words: `P` in the papers
    TEMPLATE = 3  # system prompt, chat template, role names, image tags, earlier turns


class Outcome(StrEnum):
    """The three possible answers; `INCONCLUSIVE` is never shown as clean."""

    CLEAN = "clean"
    FLAGGED = "flagged"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class TextPart:
    """Words inside a turn."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """The place of an image inside a turn; `index` counts into `Sample.images`."""

    index: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. `role` is `system`, `user` or `assistant`."""

    role: str
    parts: tuple[TextPart | ImagePart, ...]

    @property
    def text(self) -> str:
        """The turn's words without its images."""
        return " ".join(p.text for p in self.parts if isinstance(p, TextPart)).strip()


@dataclass(frozen=True, slots=True)
class Sample:
    """One readable row: decoded RGB images and the conversation around them.

    `sample_id` is the SHA-256 of the row's text and image bytes; `row` is its 0-based place in
    the input. `files` says what each image is called where it was read from: its file, or its place
    in the row; empty when nobody said.
    """

    row: int
    sample_id: str
    images: tuple[Image, ...]
    turns: tuple[Turn, ...]
    files: tuple[str, ...] = ()

    @property
    def prompt_turns(self) -> tuple[Turn, ...]:
        """Everything before the first assistant turn: what the model sees before it answers."""
        for i, turn in enumerate(self.turns):
            if turn.role == "assistant":
                return self.turns[:i]
        return self.turns

    @property
    def prompt_images(self) -> tuple[int, ...]:
        """Places in `images` of the images before the first answer, in prompt order."""
        parts = (part for turn in self.prompt_turns for part in turn.parts)
        return tuple(part.index for part in parts if isinstance(part, ImagePart))

    @property
    def prompt(self) -> str:
        """The user's words before the first answer."""
        return "\n".join(t.text for t in self.prompt_turns if t.role == "user" and t.text)

    @property
    def answer(self) -> str:
        """The first assistant turn's words, or an empty string."""
        return next((t.text for t in self.turns if t.role == "assistant"), "")

    @property
    def asked(self) -> tuple[Asked, ...]:
        """This conversation as it stands before each of its answers, in order.

        An answer without words, or before the first picture, is none that could be judged; a
        conversation of such alone is asked once, as `prompt_turns` has it.
        """
        places = [i for i, turn in enumerate(self.turns) if turn.role == "assistant"]
        row = (self.row, self.sample_id, self.images, self.turns, self.files)
        asked = (
            Asked(*row, place=place, turn=number)
            for number, place in enumerate(places, 1)
            if self.turns[place].text
        )
        seeing = tuple(each for each in asked if each.prompt_images)
        return seeing or (Asked(*row, place=len(self.prompt_turns), turn=1),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Sample):
    """A conversation before one of its answers: all earlier turns are part of the prompt.

    Attributes:
        place: of the answer in `turns`; their number where it is still to come.
        turn: which of the conversation's answers it is, from 1.
    """

    place: int
    turn: int

    @property
    def prompt_turns(self) -> tuple[Turn, ...]:
        """Everything before the answer."""
        return self.turns[: self.place]

    @property
    def prompt(self) -> str:
        """The user's words since the answer before."""
        words: list[str] = []
        for turn in self.prompt_turns:
            if turn.role == "assistant":
                words.clear()
            elif turn.role == "user" and turn.text:
                words.append(turn.text)
        return "\n".join(words)

    @property
    def answer(self) -> str:
        """The answer's words."""
        return self.turns[self.place].text if self.place < len(self.turns) else ""


class SkipKind(StrEnum):
    """What kept a row from being looked at, for counts per cause."""

    BAD_ROW = "row cannot be read"
    NO_ANSWER = "no answer"
    NO_IMAGE_FILE = "picture not found"
    BAD_IMAGE = "picture cannot be read"
    MEASUREMENT = "not measured"


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that could not be read or measured, and why."""

    row: int
    reason: str
    sample_id: str | None = None
    kind: SkipKind = SkipKind.BAD_ROW


@dataclass(frozen=True, slots=True)
class TextOnlyRow:
    """A readable conversation without a picture: nothing that an attention method could judge."""

    row: int

    def as_skipped(self) -> SkippedRow:
        """The same row for a caller that can only use rows with pictures."""
        return SkippedRow(self.row, "no picture in this row")


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Attention of the last prompt position to every key, for a batch of samples.

    Where every answer of a conversation was asked for, each is a sample of its own here.

    Attributes:
        weights: float32 tensor `(sample, layer, head, key)`; `head` has length 1 when heads were
            averaged in the probe. Pad keys, and those after the position, hold exactly 0.
        key_kind: int8 tensor `(sample, key)` of `KeyKind`.
        layers: decoder layer index of each entry on the layer axis.
        sample_id: one id per sample.
        finite: bool tensor `(sample,)`, False where the model's logits or weights are not finite.
    """

    weights: Tensor
    key_kind: Tensor
    layers: tuple[int, ...]
    sample_id: tuple[str, ...]
    finite: Tensor


@dataclass(slots=True)
class Profile:
    """Per-answer, per-layer signals of one data set under one model. All that a method may see.

    A row with several answers has as many entries, one after the other.

    Attributes:
        row: int64 `(N,)`, place of each answer's row in the input.
        turn: int64 `(N,)`, which of its row's answers it is, from 1.
        sample_id: `N` content hashes of the rows.
        prompt: `N` user prompts, each since the answer before; methods may condition on them.
        answer: `N` answers that the rows teach.
        image_tokens: int64 `(N,)`, number of image tokens `T` before each answer.
        layers: `L` decoder layer indices.
        signals: name -> float32 `(N, L)`, or `(N, L, H)` for signals of single heads; `"entropy"`
            (nats, head mean) is always there.
        before: the same signals of the same rows under the model before its fine-tune, or None
            when that model is not at hand.
    """

    row: NDArray[np.int64]
    turn: NDArray[np.int64]
    sample_id: Sequence[str]
    prompt: Sequence[str]
    answer: Sequence[str]
    image_tokens: NDArray[np.int64]
    layers: tuple[int, ...]
    signals: dict[str, NDArray[np.float32]]
    before: dict[str, NDArray[np.float32]] | None = None

    @property
    def entropy(self) -> NDArray[np.float32]:
        """Shannon entropy of visual attention in nats, `(N, L)`."""
        return self.signals["entropy"]

    @property
    def rows(self) -> int:
        """How many rows of the input these are."""
        return len(np.unique(self.row))

    @property
    def unit(self) -> str:
        """What an entry is to a reader: a row, or one of its answers."""
        return "rows" if self.rows == len(self) else "answers"

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of evidence behind a verdict, in words and numbers."""

    message: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to one question.

    Attributes:
        outcome: clean, flagged or inconclusive.
        suspicion: in [0, 1], 1 = worst; None when it could not be measured.
        threshold: the suspicion at or above which the outcome is flagged, or None.
        threshold_source: where the threshold comes from (a paper, a calibration, a default).
        reason: one sentence a newcomer understands.
        evidence: findings; a flagged verdict has at least one.
        provenance: what was run on what (see `provenance.py`).
    """

    outcome: Outcome
    suspicion: float | None
    threshold: float | None
    threshold_source: str
    reason: str
    evidence: tuple[Finding, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.reason:
            raise ValueError("a verdict needs a reason")
        if self.outcome is Outcome.FLAGGED and not self.evidence:
            raise ValueError("a flagged verdict needs evidence")
        if self.suspicion is not None and not 0.0 <= self.suspicion <= 1.0:
            raise ValueError(f"suspicion must be in [0, 1], not {self.suspicion}")


@dataclass(frozen=True, slots=True)
class LayerStat:
    """One layer's two-component fit: what the report draws as a bar."""

    layer: int
    bsi: float
    selected: bool


@dataclass(frozen=True, slots=True)
class Component:
    """One component of the final 1-D two-component fit, in the units of `CleaningResult.score`."""

    mean: float
    std: float
    weight: float
    suspicious: bool


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A row that says what a removed group teaches, though its own attention is no evidence.

    It was removed with its group if it is flagged, and kept otherwise.

    Attributes:
        place: index into the arrays of `CleaningResult`.
        phrase: the words.
    """

    place: int
    phrase: str


@dataclass(slots=True)
class CleaningResult:
    """What a data-set cleaner found: per-row arrays aligned with `Profile.row`, and a verdict.

    Attributes:
        method: registered method name, e.g. `bye`.
        rule: variant of the method, e.g. `robust` or `paper`.
        verdict: the data set's verdict.
        suspicion: float64 `(N,)` in [0, 1].
        is_flagged: bool `(N,)`.
        score: float64 `(N,)`, the 1-D statistic whose histogram the report shows.
        score_name: axis label of `score`, with its unit.
        components: the fitted components over `score` (empty when no fit was possible).
        layer_stats: per-layer separation, one per profile layer.
        info: method-specific numbers needed to score new rows or to explain the decision.
        near_misses: rows with the words of a removed group and no evidence of their own, the
            nearest to the group first.
        is_suspected: bool `(N,)`, kept rows for which there is evidence that falls short of proof.
    """

    method: str
    rule: str
    verdict: Verdict
    suspicion: NDArray[np.float64]
    is_flagged: NDArray[np.bool_]
    score: NDArray[np.float64]
    score_name: str
    components: tuple[Component, ...]
    layer_stats: tuple[LayerStat, ...]
    info: dict[str, Any]
    near_misses: tuple[NearMiss, ...] = ()
    is_suspected: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))

    def __post_init__(self) -> None:
        if not len(self.is_suspected):
            self.is_suspected = np.zeros(len(self.is_flagged), bool)
