"""How the rows of a set will be read, with an example of each shape and what stands out."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gazeguard.data.dataset import Reading
from gazeguard.data.images import shorten
from gazeguard.data.survey import Survey
from gazeguard.types import Sample, SkipKind, SkippedRow

EXAMPLES = 3
_REASONS = 100  # kinds of reasons; what comes later is counted alone
_TEXT = 300  # letters of an example
_PARTICULARS = re.compile(r"'[^']*'|\d+|: .*|\(.*?\)|<img>.*</img>")


@dataclass(slots=True)
class Shape:
    """The rows with one set of columns.

    Attributes:
        keys: the columns.
        rows: how many have them.
        ignored: columns that nothing is read from, with the number of rows where they hold
            something.
        example: the first row that can be used, as JSON types; None while there is none.
    """

    keys: tuple[str, ...]
    rows: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    example: dict[str, Any] | None = None


@dataclass(slots=True)
class Reason:
    """Skipped rows with one kind of reason: places and names in it may differ.

    Attributes:
        kind: the cause.
        first: the first such row.
        rows: how many.
    """

    kind: SkipKind
    first: SkippedRow
    rows: int = 0


@dataclass(slots=True)
class Inspection:
    """What a walk over a set finds; give it every reading.

    Attributes:
        survey: the counts.
        shapes: by their set of columns.
        reasons: why rows cannot be used.
        repeated: rows with an answer that an earlier row has too.
        same_picture: rows with the pictures of an earlier row.
        contradicting: those of them with the same question and another answer.
        examples: first pairs of contradicting rows, the earlier one first.
    """

    survey: Survey = field(default_factory=Survey)
    shapes: dict[frozenset[str], Shape] = field(default_factory=dict)
    reasons: dict[str, Reason] = field(default_factory=dict)
    repeated: int = 0
    same_picture: int = 0
    contradicting: int = 0
    examples: list[tuple[int, int]] = field(default_factory=list)
    _answers: Counter[bytes] = field(default_factory=Counter)
    _texts: dict[bytes, str] = field(default_factory=dict)  # of answers that were seen twice
    _pictures: set[bytes] = field(default_factory=set)
    _asked: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)

    def add(self, reading: Reading) -> None:
        """One more row."""
        found = reading.found
        shape = self.shapes.setdefault(frozenset(reading.keys), Shape(reading.keys))
        shape.rows += 1
        shape.ignored.update(reading.ignored)
        self.survey.ignore(reading.ignored)
        if isinstance(found, SkippedRow):
            self.survey.skip(found.kind)
            pattern = _PARTICULARS.sub("", found.reason)
            if len(self.reasons) < _REASONS or pattern in self.reasons:
                self.reasons.setdefault(pattern, Reason(found.kind, found)).rows += 1
        elif isinstance(found, Sample):
            self.survey.read(len(found.images), len(found.turns))
            if shape.example is None:
                shape.example = _example(found)
            self._compare(found)
        else:
            self.survey.read(0, 0)

    def most_repeated(self) -> list[tuple[str, int]]:
        """The answers that most rows share, with the number of rows."""
        often = (entry for entry in self._answers.most_common(EXAMPLES) if entry[1] > 1)
        return [(self._texts[key], count) for key, count in often]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON types."""
        survey = self.survey
        return {
            "rows": survey.rows,
            "with_pictures": survey.with_pictures,
            "pictures": survey.pictures,
            "turns": survey.turns,
            "text_only": survey.text_only,
            "skipped": {
                str(kind): {
                    "rows": count,
                    "reasons": [
                        {"rows": r.rows, "first_row": r.first.row, "first": r.first.reason}
                        for r in self.reasons.values()
                        if r.kind is kind
                    ],
                }
                for kind, count in survey.skipped.most_common()
            },
            "ignored_columns": dict(survey.ignored.most_common()),
            "shapes": [
                {
                    "keys": list(shape.keys),
                    "rows": shape.rows,
                    "ignored_columns": dict(shape.ignored.most_common()),
                    "example": shape.example,
                }
                for shape in self.shapes.values()
            ],
            "repeated_answers": {
                "rows": self.repeated,
                "most": [{"answer": text, "rows": count} for text, count in self.most_repeated()],
            },
            "same_picture": {
                "rows": self.same_picture,
                "same_question_other_answer": self.contradicting,
                "first": [list(pair) for pair in self.examples],
            },
        }

    def _compare(self, sample: Sample) -> None:
        """Only hashes are kept: a set may have millions of rows."""
        answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
        answered = _digest(text.encode() for text in answers)
        self._answers[answered] += 1
        if self._answers[answered] > 1:
            self.repeated += 1
            self._texts.setdefault(answered, _flat(" / ".join(answers)))
        picture = _digest(image.tobytes() for image in sample.images)
        self.same_picture += picture in self._pictures
        self._pictures.add(picture)
        questions = (turn.text.encode() for turn in sample.turns if turn.role == "user")
        asked = _digest([picture, *questions])
        row, before = self._asked.setdefault(asked, (sample.row, answered))
        if before != answered:
            self.contradicting += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append((row, sample.row))


def _example(sample: Sample) -> dict[str, Any]:
    return {
        "row": sample.row,
        "prompt": _flat(sample.prompt),
        "turns": [turn.role for turn in sample.turns],
        "answer": _flat(sample.answer),
        "pictures": [f"{image.width} x {image.height}" for image in sample.images],
    }


def _flat(text: str) -> str:
    return shorten(" ".join(text.split()), _TEXT)


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
