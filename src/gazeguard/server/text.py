"""From tokens to text as they come: whole characters, and no more than the stop texts allow."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_LONGEST_CHARACTER = 8  # tokens; after so many, what still is no character is broken
_BROKEN = "\ufffd"


class Detokenizer:
    """Text of a growing list of tokens, given out in pieces that never change afterwards.

    A token may be a part of a character, and its text may depend on its neighbours (the space
    before a word). So the newest token is read together with the last piece before it, and a text
    that ends inside a character waits for the next token.

    Args:
        tokenizer: used by one thread only.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        self._context = 0  # where the last piece begins
        self._done = 0  # tokens given out

    def add(self, token: int) -> str:
        """The text that one more token completes; may be empty."""
        self._ids.append(token)
        text = self._new()
        if text.endswith(_BROKEN) and len(self._ids) - self._done < _LONGEST_CHARACTER:
            return ""
        return self._give(text)

    def end(self) -> str:
        """What is left when no more tokens come."""
        return self._give(self._new())

    def _new(self) -> str:
        before = self._decode(self._ids[self._context : self._done])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._context, self._done = self._done, len(self._ids)
        return text


class Stopper:
    """Ends a text before the first of some stop texts, which may come in pieces.

    White space before the first word is left out: it belongs to the template's last word.

    Args:
        stops: texts that end the answer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._begun = False
        self.stopped = False

    def add(self, piece: str) -> str:
        """What of the text so far is sure to be part of the answer."""
        text = self._held + piece
        places = [at for at in map(text.find, self._stops) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return self._out(text[: min(places)])
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return self._out(text[: len(text) - keep])

    def end(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return self._out(text)

    def _out(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of `text` that `stop` begins with, short of all of it."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
