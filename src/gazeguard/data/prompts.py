"""Prompts for text encoders: a user's file, or the built-in grammar."""

from __future__ import annotations

import json
from pathlib import Path

from gazeguard.data.grammar import prompts as built_in
from gazeguard.errors import DataError

_FIELDS = ("prompt", "caption", "text")
_MAX_BYTES = 1 << 28

__all__ = ["built_in", "read_prompts"]


def read_prompts(path: str | Path) -> list[str]:
    """Distinct prompts of a file, in its order.

    One prompt a line; in `.jsonl` and `.json` (a list) strings, or objects with `prompt`, `caption`
    or `text`.

    Raises:
        DataError: no such file, not text, broken JSON, or no prompt in it.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than 256 MB: give a sample of some 4,000 prompts.")
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    try:
        if b"\0" in raw:
            raise ValueError("NUL byte")
        text = raw.decode("utf-8-sig")
    except ValueError as error:
        raise DataError(
            f"{path} is not a text file in UTF-8: give one prompt a line, or JSON lines."
        ) from error
    if path.suffix == ".json":
        found = _items(_json(text, f"{path}"), path)
    elif path.suffix == ".jsonl":
        rows = [
            _json(line, f"line {i} of {path}")
            for i, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
        found = _items(rows, path)
    else:
        found = text.splitlines()
    distinct = list(dict.fromkeys(" ".join(prompt.split()) for prompt in found))
    distinct = [prompt for prompt in distinct if prompt]
    if not distinct:
        raise DataError(f"{path} holds no prompt: give one prompt a line, or leave the file out.")
    return distinct


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): mend it, or give plain lines.") from error


def _items(rows: object, path: Path) -> list[str]:
    found = []
    for i, row in enumerate(rows if isinstance(rows, list) else [None]):
        if isinstance(row, dict):
            row = next((row[name] for name in _FIELDS if name in row), None)
        if not isinstance(row, str):
            raise DataError(
                f"item {i} of {path} is no prompt: give a list of strings, or of objects with"
                " 'prompt', 'caption' or 'text'."
            )
        found.append(row)
    return found
