"""From one parsed row of any format to turns with images at their places."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gazeguard.data.images import shorten
from gazeguard.errors import RowError
from gazeguard.types import ImagePart, TextPart, Turn

MARKER = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
# Plain text columns, most specific first; the first one with a value is taken.
QUESTION_COLUMNS = ("question", "query", "instruction", "prompt", "problem")
ANSWER_COLUMNS = ("answer", "answers", "response", "output", "completion", "caption", "text")
TURN_COLUMNS = ("conversations", "messages", "texts")


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of an image; without a `source` it takes the next of the row's own list."""

    source: str | bytes | None = None


@dataclass(slots=True)
class Draft:
    """A row before its images are placed: turns of words and slots, and the row's image list."""

    turns: list[tuple[str, list[str | Slot]]]
    images: list[str | bytes] = field(default_factory=list)


def parse_llava(record: Mapping[str, Any]) -> Draft:
    """Read `{"image": path | [paths], "conversations": [{"from", "value"}]}`."""
    if record.get("conversations") is None:
        raise RowError("no 'conversations' in this row")
    return Draft(_turns(record["conversations"], "conversations"), _row_images(record))


def parse_chat(record: Mapping[str, Any]) -> Draft:
    """Read `messages`, or `prompt` and `completion`, beside an optional `images` list."""
    if record.get("messages") is not None:
        return Draft(_turns(record["messages"], "messages"), _row_images(record))
    if record.get("prompt") is None:
        raise RowError("no 'messages' or 'prompt' in this row")
    turns: list[tuple[str, list[str | Slot]]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.get(key)
        if isinstance(value, str):
            turns.append((role, _split(value)))
        elif value is not None:
            turns.extend(_turns(value, key))
    return Draft(turns, _row_images(record))


def parse_columns(record: Mapping[str, Any]) -> Draft:
    """Read a table row: turns if there are any, else a question and an answer in plain columns."""
    if record.get("conversations") is not None:
        return parse_llava(record)
    if record.get("messages") is not None or isinstance(record.get("prompt"), list):
        return parse_chat(record)
    turns: list[tuple[str, list[str | Slot]]] = []
    if record.get("texts") is not None:
        for pair in _mappings(record["texts"], "texts"):
            turns += [(role, _content(pair.get(role))) for role in ("user", "assistant")]
        return Draft(turns, _row_images(record))
    turns.append(("user", _content(_first(record, QUESTION_COLUMNS))))
    answer = _first(record, ANSWER_COLUMNS)
    if isinstance(answer, list):
        answer = answer[0] if answer else None  # several accepted answers: the first is trained
    if answer is not None:
        turns.append(("assistant", _content(answer)))
    return Draft(turns, _row_images(record))


def place_images(draft: Draft) -> tuple[tuple[Turn, ...], list[str | bytes]]:
    """Give every slot its image; images without a marker go first in the first user turn.

    Returns:
        The turns, and the image sources in the order of `ImagePart.index`; none for a row of
        text alone.

    Raises:
        RowError: no user turn, or markers and images do not match.
    """
    roles = [role for role, _ in draft.turns]
    if "user" not in roles:
        raise RowError("no user turn in this row")
    turns = [(role, list(parts)) for role, parts in draft.turns]
    slots = [p for _, parts in turns for p in parts if isinstance(p, Slot)]
    markers = sum(slot.source is None for slot in slots)
    if not slots:
        turns[roles.index("user")][1][:0] = [Slot() for _ in draft.images]
    elif markers != len(draft.images):
        if markers == len(slots) and not draft.images:
            raise RowError("no image in this row")
        raise RowError(f"{markers} image markers but {len(draft.images)} images")
    waiting = iter(draft.images)
    sources: list[str | bytes] = []
    placed: list[Turn] = []
    for role, parts in turns:
        done: list[TextPart | ImagePart] = []
        for part in parts:
            if isinstance(part, Slot):
                done.append(ImagePart(len(sources)))
                sources.append(next(waiting) if part.source is None else part.source)
            else:
                done.append(TextPart(part))
        placed.append(Turn(role, tuple(done)))
    return tuple(placed), sources


def content_id(turns: Iterable[Turn], encoded: Sequence[bytes]) -> str:
    """Return the SHA-256 of roles, words and encoded images, in order.

    Each piece is framed by a tag and its length, so no two rows can run together into one. The
    row's place, id and file names do not enter: the same content has the same id in any format.
    """
    digest = hashlib.sha256()

    def add(tag: bytes, data: bytes) -> None:
        digest.update(tag + len(data).to_bytes(8, "big") + data)

    for turn in turns:
        add(b"r", turn.role.encode())
        for part in turn.parts:
            if isinstance(part, TextPart):
                add(b"t", part.text.encode())
            else:
                add(b"i", encoded[part.index])
    return digest.hexdigest()


def _turns(value: object, name: str) -> list[tuple[str, list[str | Slot]]]:
    turns = []
    for item in _mappings(value, name):
        said = item["role"] if item.get("role") is not None else item.get("from")
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise RowError(f"unknown role {shorten(repr(said), 40)} in '{name}'")
        content = item["content"] if item.get("content") is not None else item.get("value")
        turns.append((role, _content(content)))
    return turns


def _mappings(value: object, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RowError(f"'{name}' is not a list of turns")
    return value


def _content(value: object) -> list[str | Slot]:
    """Read a turn's content: text, a number, nothing, or a list of typed parts."""
    if value is None:
        return []
    if isinstance(value, str | int | float):
        return _split(str(value))
    if not isinstance(value, list):
        raise RowError(f"a turn holds {type(value).__name__}, not text or parts")
    parts: list[str | Slot] = []
    for part in value:
        if isinstance(part, str):
            parts += _split(part)
        elif isinstance(part, Mapping):
            parts += _typed_part(part)
        else:
            raise RowError(f"a turn's part is {type(part).__name__}, not an object")
    return parts


def _typed_part(part: Mapping[str, Any]) -> list[str | Slot]:
    kind = part.get("type")
    if kind == "text":
        return _content(part.get("text"))
    if kind in ("image", "image_url"):
        value = next((part[k] for k in ("image_url", "image", "url", "path") if part.get(k)), None)
        return [Slot()] if value is None else [Slot(_source(value))]
    raise RowError(f"a turn's part of type {shorten(repr(kind), 40)} is not text or image")


def _split(text: str) -> list[str | Slot]:
    """Cut text at its image markers; white space beside a marker belongs to the marker."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer takes it
        raise RowError("text holds a broken unicode character") from None
    if MARKER not in text:
        return [text] if text else []
    parts: list[str | Slot] = []
    for i, piece in enumerate(text.split(MARKER)):
        if i:
            parts.append(Slot())
        if piece.strip():
            parts.append(piece.strip())
    return parts


def _row_images(record: Mapping[str, Any]) -> list[str | bytes]:
    value = record["images"] if record.get("images") is not None else record.get("image")
    if value is None or value == "":
        return []
    return [_source(v) for v in (value if isinstance(value, list) else [value]) if v is not None]


def _source(value: object) -> str | bytes:
    """Read one image reference: path, URL, bytes, `{"bytes", "path"}` or `{"url"}`."""
    if isinstance(value, Mapping):
        value = next((value[k] for k in ("bytes", "path", "url") if value.get(k) is not None), None)
    if isinstance(value, str | bytes) and value:
        return value
    raise RowError("an image of this row is neither a path nor bytes")


def _first(record: Mapping[str, Any], columns: Iterable[str]) -> Any:
    return next((record[c] for c in columns if record.get(c) is not None), None)
