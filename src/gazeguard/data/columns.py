"""Which columns of a row hold what: the usual names, those that a user gives, and what was read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
# Of every kind the first column with a value is taken, so the most specific name comes first.
TURN_COLUMNS = ("conversations", "messages", "conversation", "texts")
QUESTION_COLUMNS = ("question", "query", "instruction", "prompt", "problem")
# What ends a list of turns that has no answer of its own: the preferred one, or the solution.
FINAL_COLUMNS = ("chosen", "completion", "answer", "response", "output", "solution")
ANSWER_COLUMNS = (
    "chosen",
    "answer",
    "multiple_choice_answer",
    "answers",
    "response",
    "output",
    "completion",
    "solution",
    "caption",
    "text",
    "label",
)
IMAGE_COLUMNS = ("images", "image")
MEDIA_COLUMNS = ("video", "videos", "audio", "audios")
TEXT_COLUMNS = (*TURN_COLUMNS, *QUESTION_COLUMNS, *ANSWER_COLUMNS)
READ_COLUMNS = (*TEXT_COLUMNS, "input", "history", "system", *MEDIA_COLUMNS)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns and role names of a set that does not use the usual ones.

    Attributes:
        answer: column of the answers, None for the usual names.
        prompt: column of the questions, or of lists of turns.
        image: column of the pictures.
        roles: pairs of a role as the set writes it and what it is: user, assistant or system.
    """

    answer: str | None = None
    prompt: str | None = None
    image: str | None = None
    roles: tuple[tuple[str, str], ...] = ()

    def role(self, written: object) -> str | None:
        """What a role is that a row writes so; None when nobody knows."""
        if not isinstance(written, str):
            return None
        return dict(self.roles).get(written) or ROLES.get(written)

    def missing(self, names: Iterable[str]) -> tuple[str, str] | None:
        """The first option whose column is not among these, and that column."""
        known = set(names)
        for option in ("prompt", "answer", "image"):
            column = getattr(self, option)
            if column is not None and column not in known:
                return f"--{option}", column
        return None


class Unread:
    """Stands for the value of a table's column that nothing is read from."""


UNREAD = Unread()


class Fields:
    """A record whose columns are asked for by name; remembers which of them gave a value."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.used: set[str] = set()

    def first(self, *names: str) -> str | None:
        """The first of these columns that has a value."""
        return next((name for name in names if has_value(self.record.get(name))), None)

    def get(self, *names: str | None) -> Any:
        """The value of the first of these columns that has one, which then counts as read."""
        name = self.first(*(name for name in names if name is not None))
        if name is None:
            return None
        self.used.add(name)
        return self.record[name]

    @property
    def ignored(self) -> tuple[str, ...]:
        """Columns with a value that nothing was read from."""
        return tuple(k for k, v in self.record.items() if k not in self.used and has_value(v))


def has_value(value: object) -> bool:
    """Whether a cell holds anything: no null, empty text or empty list."""
    return value is not None and value != "" and value != [] and value != {}
