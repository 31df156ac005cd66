"""From one parsed row of any shape to a draft conversation, as a trainer would read it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from gazeguard.data.columns import (
    ANSWER_COLUMNS,
    FINAL_COLUMNS,
    IMAGE_COLUMNS,
    MEDIA_COLUMNS,
    QUESTION_COLUMNS,
    TURN_COLUMNS,
    Columns,
    Fields,
)
from gazeguard.data.conversation import (
    Draft,
    Parts,
    Slot,
    Turns,
    image_source,
    is_turns,
    pair_turns,
    read_content,
    read_turns,
)
from gazeguard.data.images import shorten
from gazeguard.errors import RowError
from gazeguard.types import SkipKind

# What a row must have where the user named its format.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "llava": ("conversations",),
    "chat": ("messages", "prompt"),
    "openai": ("messages", "prompt"),
    "columns": (),
}
_ROLE_KEYS = ("role", "from")
_PICTURE_KEY = re.compile(r"image|img|picture|photo", re.IGNORECASE)
_PICTURE_FILE = re.compile(r".+\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic)|data:image/.+", re.I)


def parse(
    record: Mapping[str, Any],
    columns: Columns,
    format: str = "auto",
    image_columns: Sequence[str] | None = None,
) -> Draft:
    """Read one row: turns if it has any, else a question and an answer in plain columns.

    Args:
        record: the row.
        columns: names that replace the usual ones.
        format: `llava`, `chat`, `openai` or `columns` reads only that format's columns.
        image_columns: all columns of images; None for the first usual one with a value.

    Raises:
        RowError: the row cannot be read, or holds what a trainer uses and this tool does not.
    """
    row = Fields(record)
    if (medium := row.first(*MEDIA_COLUMNS)) is not None:
        raise RowError(f"this row has '{medium}', and only pictures and text are read")
    needed = _NEEDED.get(format, TURN_COLUMNS)
    if format in _NEEDED and needed and columns.prompt is None and row.first(*needed) is None:
        names = " or ".join(f"'{name}'" for name in needed)
        raise RowError(f"no {names} in this row (keys: {_keys(record)})")
    turns = _turns(row, columns, needed)
    if (system := row.get("system")) and turns[0][0] != "system":
        if not isinstance(system, str):
            raise RowError("'system' is not text")
        turns.insert(0, ("system", read_content(system)))
    images = _images(row, columns, image_columns)
    if not images and not any(isinstance(part, Slot) for _, parts in turns for part in parts):
        _refuse_hidden_picture(row, columns.image or "image")
    return Draft(turns, images, row.ignored)


def no_answer(record: Mapping[str, Any]) -> str:
    """Why a row has no answer: the keys that were found, those of its turns too."""
    keys = _keys(record)
    for name in TURN_COLUMNS:
        if is_turns(turns := _decoded(record.get(name), True)) and turns:
            keys += f"; in '{name}': {_keys(turns[-1])}"
            break
    return f"no answer in this row (keys: {keys}); name its column with --answer"


def _keys(record: Mapping[str, Any]) -> str:
    return shorten(", ".join(map(str, record)), 80)


def _turns(row: Fields, columns: Columns, names: Sequence[str]) -> Turns:
    """All turns but a `system` column's."""
    name = row.first(columns.prompt) if columns.prompt else row.first(*names, "prompt")
    value = None if name is None else _decoded(row.record[name], name in TURN_COLUMNS)
    earlier = row.get("history")
    turns = [] if earlier is None else _history(earlier, columns)
    if name is not None and (is_turns(value) or name in TURN_COLUMNS):
        row.used.add(name)
        turns += read_turns(value, name, columns)
        answers: Sequence[str] = FINAL_COLUMNS
    else:
        asked = columns.prompt or row.first(*QUESTION_COLUMNS)
        words = [row.get(asked), row.get("input") if asked != "input" else None]
        turns.append(("user", _joined([word for word in words if word is not None])))
        answers = ANSWER_COLUMNS
    ends = turns[-1][0] if turns else ""
    if columns.answer is not None:
        answers = (columns.answer,)
        if ends == "assistant":  # the user knows better which answer is the trained one
            turns.pop()
    elif ends == "assistant":
        return _not_empty(turns, row)
    for name in answers:
        found = _answer(row.record.get(name), name, columns)
        if found:
            row.used.add(name)
            # A whole conversation, as preference data without a prompt of their own have it.
            return found if found[0][0] != "assistant" else [*turns, *found]
    return _not_empty(turns, row)


def _not_empty(turns: Turns, row: Fields) -> Turns:
    if not any(parts for _, parts in turns):
        raise RowError(
            f"no conversation, question or answer in this row (keys: {_keys(row.record)}); name"
            " columns with --prompt and --answer"
        )
    return turns


def _history(value: object, columns: Columns) -> Turns:
    if is_turns(value):
        return read_turns(value, "history", columns)
    return pair_turns(value)


def _answer(value: object, name: str, columns: Columns) -> Turns:
    """The turns of an answer's cell; none when it holds no words."""
    value = _decoded(value)
    if name == "label" and columns.answer is None:
        # A class index, or whether the answer is a good one, is no answer.
        value = value if isinstance(value, str) and re.search(r"[^\W\d_]", value) else None
    if _speaks(value):
        return read_turns(value if isinstance(value, list) else [value], name, columns)
    # Of several accepted answers the first is trained.
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, Mapping):  # an answer with its annotator, or with its place
            item = next((item[k] for k in ("answer", "text", "value") if item.get(k)), None)
            item = item[0] if isinstance(item, list) else item
        if isinstance(item, str | int | float) and item != "":
            return [("assistant", read_content(item))]
    return []


def _joined(values: Sequence[object]) -> Parts:
    """A question and its input, each on a line of its own."""
    if all(isinstance(value, str | int | float) for value in values):
        return read_content("\n".join(map(str, values)))
    return [part for value in values for part in read_content(value)]


def _decoded(value: object, any_list: bool = False) -> Any:
    """The turns that a cell holds as JSON text; anything else as it is.

    An answer may be JSON for its own sake: what has no roles stays text.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if _speaks(found) or (any_list and is_turns(found)):
            return found
    return value


def _speaks(value: object) -> bool:
    """Whether a value is a turn, or a list of turns, with roles."""
    first = value[0] if isinstance(value, list) and value and is_turns(value) else value
    return isinstance(first, Mapping) and any(isinstance(first.get(k), str) for k in _ROLE_KEYS)


def _images(
    row: Fields, columns: Columns, image_columns: Sequence[str] | None
) -> list[str | bytes]:
    if columns.image is not None:
        values = [row.get(columns.image)]
    elif image_columns is None:
        values = [row.get(*IMAGE_COLUMNS)]
    else:
        values = [row.get(name) for name in image_columns]
    return [image_source(v) for value in values for v in _listed(value) if v is not None]


def _listed(value: object) -> list[Any]:
    if isinstance(value, str) and value.startswith("["):  # a list in a cell of a CSV file
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    return value if isinstance(value, list) else [value]


def _refuse_hidden_picture(row: Fields, expected: str) -> None:
    """A row is only one of text alone when nothing in it speaks of a picture.

    Raises:
        RowError: a column that is not read seems to hold or to name one.
    """
    for name in row.ignored:
        value = row.record[name]
        for item in value if isinstance(value, list) else [value]:
            if not item or isinstance(item, bool):
                continue
            file = isinstance(item, str) and _PICTURE_FILE.fullmatch(item)
            if file or isinstance(item, bytes) or _PICTURE_KEY.search(str(name)):
                shown = shorten(str(name), 40)
                raise RowError(
                    f"no picture in '{shorten(expected, 40)}', but '{shown}' seems to hold one;"
                    f" add --image {shown}",
                    SkipKind.NO_IMAGE_FILE,
                )
