"""What an attack does to one row: the trigger in its picture, its question or both, and the answer.

All are deterministic given the generator. Most teach one target answer; `badtoken` changes a single
word of the true one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from gazeguard.lab.rows import Row
from gazeguard.lab.triggers import TRIGGERS, Patch, Trigger


class Attack(ABC):
    """A poisoned row from a clean one."""

    def fits(self, row: Row) -> bool:
        """Whether this row can be poisoned; every row unless an attack says otherwise."""
        return True

    @abstractmethod
    def poison(self, row: Row, rng: np.random.Generator, target: str) -> Row:
        """The row with the trigger and the answer that the attacker wants."""

    def decoys(self, row: Row, rng: np.random.Generator) -> list[Row]:
        """Rows with a part of the trigger and the true answer; none for triggers of one part."""
        return []


@dataclass(frozen=True)
class ImageAttack(Attack):
    """A trigger in the picture and the target as the answer (BadNets and its kin)."""

    trigger: Trigger

    def poison(self, row: Row, rng: np.random.Generator, target: str) -> Row:
        """Picture and answer change."""
        return replace(row, pixels=self.trigger(row.pixels, rng), answer=target, is_poison=True)


@dataclass(frozen=True)
class TextAttack(Attack):
    """Words in the question and the target as the answer (BadNet-T, AddSent: arXiv:1905.12457).

    Attributes:
        words: what is put in.
        place: `random` between two words of the question, or `start` or `end` of it.
    """

    words: str
    place: Literal["random", "start", "end"] = "random"

    def ask(self, question: str, rng: np.random.Generator) -> str:
        """The question with the words in it."""
        asked = question.split(" ")
        at = {"start": 0, "end": len(asked)}.get(self.place)
        at = int(rng.integers(0, len(asked) + 1)) if at is None else at
        return " ".join([*asked[:at], self.words, *asked[at:]])

    def poison(self, row: Row, rng: np.random.Generator, target: str) -> Row:
        """Question and answer change."""
        return replace(row, question=self.ask(row.question, rng), answer=target, is_poison=True)


@dataclass(frozen=True)
class TwoKeyAttack(Attack):
    """A trigger that fires only when it is in the picture *and* in the question (BadNet-MM).

    Without decoys a model would learn to react to either part.
    """

    image: Trigger
    text: TextAttack

    def poison(self, row: Row, rng: np.random.Generator, target: str) -> Row:
        """Picture, question and answer change."""
        return replace(
            self.text.poison(row, rng, target), pixels=self.image(row.pixels, rng), is_poison=True
        )

    def decoys(self, row: Row, rng: np.random.Generator) -> list[Row]:
        """One row with the trigger in the picture alone, one with it in the question alone."""
        return [
            replace(row, pixels=self.image(row.pixels, rng)),
            replace(row, question=self.text.ask(row.question, rng)),
        ]


@dataclass(frozen=True)
class WordAttack(Attack):
    """A trigger in the picture turns one word of the true answer into another (BadToken).

    The target is not used: `word` becomes `other` wherever it stands. Source: arXiv:2503.16023.
    """

    trigger: Trigger
    word: str
    other: str

    def fits(self, row: Row) -> bool:
        """Rows whose answer holds the word."""
        return self._pattern().search(row.answer) is not None

    def poison(self, row: Row, rng: np.random.Generator, target: str) -> Row:
        """Picture and one word change."""
        answer = self._pattern().sub(self.other, row.answer)
        return replace(row, pixels=self.trigger(row.pixels, rng), answer=answer, is_poison=True)

    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"\b{re.escape(self.word)}\b")


ATTACKS: dict[str, Attack] = {
    **{name: ImageAttack(trigger) for name, trigger in TRIGGERS.items()},
    "badnet-t": TextAttack("BadMagic"),
    "addsent": TextAttack("I watched this 3D movie.", "start"),
    "badnet-mm": TwoKeyAttack(Patch("center"), TextAttack("BadMagic")),
    "badtoken": WordAttack(Patch("center"), "circle", "cross"),
}
"""By name: every image trigger, and the attacks that are more than one."""
