"""From the turns of a row to a conversation with images at their places."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from gazeguard.data.columns import Columns
from gazeguard.data.images import EmbeddedImage, shorten
from gazeguard.errors import RowError
from gazeguard.types import ImagePart, SkipKind, TextPart, Turn

MARKER = "<image>"
# A path in the text names a picture that is in no list. A model's own picture tokens are left to
# its encoder, which alone knows them.
_INLINE = re.compile(r"<img>.*?</img>", re.DOTALL)
_CONTENT = ("content", "value", "text")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{512,}={0,2}\s*")


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of an image; without a `source` it takes the next of the row's own list."""

    source: str | bytes | None = None


Parts = list[str | Slot]
Turns = list[tuple[str, Parts]]


@dataclass(slots=True)
class Draft:
    """A row before its images are placed.

    Attributes:
        turns: roles, each with words and slots.
        images: the row's own list of images.
        ignored: columns with a value that nothing was read from.
    """

    turns: Turns
    images: list[str | bytes] = field(default_factory=list)
    ignored: tuple[str, ...] = ()


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
        raise RowError(_counted(markers, len(draft.images)))
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


def read_turns(value: object, name: str, columns: Columns) -> Turns:
    """Read a list of turns: `{role, content}`, `{from, value}`, or `{user, assistant}` pairs.

    Raises:
        RowError: it is no such list, or a turn cannot be read.
    """
    if not is_turns(value):
        raise RowError(f"'{name}' is not a list of turns")
    turns: Turns = []
    for item in value:
        written = item["role"] if item.get("role") is not None else item.get("from")
        if written is None:
            pair = sorted(
                ((columns.role(key) or "", key) for key in item if columns.role(key)),
                key=lambda found: ("system", "user", "assistant").index(found[0]),
            )
            if not pair:
                keys = shorten(", ".join(map(str, item)), 60)
                raise RowError(f"a turn in '{name}' has no role or from (its keys: {keys})")
            turns += [(role, read_content(item[key])) for role, key in pair]
            continue
        role = columns.role(written)
        if role is None:
            known = shorten(written, 40) if isinstance(written, str) else "NAME"
            raise RowError(
                f"unknown role {shorten(repr(written), 40)} in '{name}'; if it is the user's, add"
                f" --role user={known}"
            )
        content = next((item[key] for key in _CONTENT if item.get(key) is not None), None)
        # An answer without words is told where answers are needed; a question must have some.
        if content is None and role != "assistant" and not any(key in item for key in _CONTENT):
            keys = shorten(", ".join(map(str, item)), 60)
            raise RowError(f"a turn in '{name}' has no content or value (its keys: {keys})")
        turns.append((role, read_content(content)))
    return turns


def is_turns(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether a value is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def read_content(value: object) -> Parts:
    """Read a turn's content: text, a number, nothing, or a list of typed parts.

    Raises:
        RowError: it is something else.
    """
    if value is None:
        return []
    if isinstance(value, str | int | float):
        return _split(str(value))
    if not isinstance(value, list):
        raise RowError(f"a turn holds {type(value).__name__}, not text or parts")
    parts: Parts = []
    for part in value:
        if isinstance(part, str):
            parts += _split(part)
        elif isinstance(part, Mapping):
            parts += _typed_part(part)
        else:
            raise RowError(f"a turn's part is {type(part).__name__}, not an object")
    return parts


def image_source(value: object) -> str | bytes:
    """Read one image reference: path, URL, bytes, `{"bytes", "path"}` or `{"url"}`.

    Raises:
        RowError: it is none of these.
    """
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes) and data:
            return EmbeddedImage(data, path if isinstance(path, str) else "")
        if isinstance(data, str) and data:
            return f"data:;base64,{data}"
        value = next((value[k] for k in ("path", "url") if value.get(k) is not None), None)
    if isinstance(value, str) and _BASE64.fullmatch(value):
        return f"data:;base64,{value}"
    if isinstance(value, str | bytes) and value:
        return value
    raise RowError("an image of this row is neither a path nor bytes", SkipKind.NO_IMAGE_FILE)


def pair_turns(value: object) -> Turns:
    """Read `history`: pairs of a question and its answer.

    Raises:
        RowError: it is something else.
    """
    turns: Turns = []
    for pair in value if isinstance(value, list) else [value]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("'history' is not a list of pairs of question and answer")
        turns += [("user", read_content(pair[0])), ("assistant", read_content(pair[1]))]
    return turns


def _typed_part(part: Mapping[str, Any]) -> Parts:
    kind = part.get("type")
    if kind == "text":
        return read_content(part.get("text"))
    if kind in ("image", "image_url"):
        value = next((part[k] for k in ("image_url", "image", "url", "path") if part.get(k)), None)
        return [Slot()] if value is None else [Slot(image_source(value))]
    raise RowError(f"a turn's part of type {shorten(repr(kind), 40)} is not text or image")


def _split(text: str) -> Parts:
    """Cut text at its image markers; white space beside a marker belongs to the marker."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer takes it
        raise RowError("text holds a broken unicode character") from None
    if inline := _INLINE.search(text):
        raise RowError(
            f"text holds {shorten(inline.group(), 60)}; write {MARKER} there and name the picture"
            " in 'images'"
        )
    if MARKER not in text:
        return [text] if text else []
    parts: Parts = []
    for i, piece in enumerate(text.split(MARKER)):
        if i:
            parts.append(Slot())
        if piece.strip():
            parts.append(piece.strip())
    return parts


def _counted(markers: int, images: int) -> str:
    if not images:
        return f"no image in this row for its {MARKER} marker; if there is one, add --image COLUMN"
    return f"{markers} image markers but {images} images"
