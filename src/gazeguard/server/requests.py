"""From the body of a request to what the worker needs of it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from gazeguard.guarding.requests import Conversation
from gazeguard.server.errors import ApiError, bad
from gazeguard.server.images import load_images
from gazeguard.server.schema import ChatRequest, ImageContent, Message, TextContent
from gazeguard.server.settings import Settings
from gazeguard.types import ImagePart, TextPart, Turn

_ROLES = {"developer": "system"}


@dataclass(frozen=True, slots=True)
class Options:
    """How one answer is written.

    Attributes:
        max_tokens: where it is cut off.
        temperature: 0 takes the likeliest word always.
        top_p: share of probability that words are drawn from.
        seed: of the draw.
        stop: texts before which the answer ends.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]


def conversation(body: ChatRequest, settings: Settings) -> Conversation:
    """A request's messages with their pictures decoded; may fetch, may take seconds.

    Raises:
        ApiError: 400, for pictures and texts that are not allowed.
    """
    if body.messages[-1].role != "user":
        last = f"messages.{len(body.messages) - 1}.role"
        raise bad("The last message must be the user's: there is nothing to answer.", last)
    urls: list[tuple[str, str]] = []
    turns = []
    for i, message in enumerate(body.messages):
        turns.append(_turn(message, f"messages.{i}", urls))
    size = sum(len(part.text) for t in turns for part in t.parts if isinstance(part, TextPart))
    if size > settings.max_chars:
        limit = f"{settings.max_chars:,}"
        message_ = f"The messages have {size:,} characters, and {limit} are allowed."
        raise bad(message_, "messages", "string_above_max_length")
    return Conversation(0, "", load_images(urls, settings), tuple(turns))


def options(body: ChatRequest, settings: Settings, prompt_tokens: int, room: int | None) -> Options:
    """How a request wants to be answered.

    Args:
        body: the request.
        settings: the limits.
        prompt_tokens: of the request.
        room: positions that the model has, or None when it does not say.

    Raises:
        ApiError: 400, for an answer longer than there is room.
    """
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = getattr(body, name)
    left = settings.max_tokens if room is None else min(room - prompt_tokens, settings.max_tokens)
    if left < 1:
        raise ApiError(
            400,
            "context_length_exceeded",
            f"The prompt has {prompt_tokens:,} tokens, and the model has room for {room:,} with its"
            " answer.",
            param="messages",
        )
    if asked is not None and asked > left:
        raise bad(f"'{name}' is {asked:,}, and at most {left:,} are possible here.", name)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Options(
        max_tokens=left if asked is None else asked,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop=stop,
    )


def _turn(message: Message, place: str, urls: list[tuple[str, str]]) -> Turn:
    """A turn; its pictures are added to `urls`, the places and addresses of all."""
    role = _ROLES.get(message.role, message.role)
    return Turn(role, tuple(_parts(message, f"{place}.content", urls)))


def _parts(
    message: Message, place: str, urls: list[tuple[str, str]]
) -> Iterator[TextPart | ImagePart]:
    if message.content is None:  # an earlier answer of nothing but a tool call
        return
    if isinstance(message.content, str):
        yield TextPart(message.content)
        return
    for kind, run in groupby(enumerate(message.content), key=lambda item: type(item[1])):
        if kind is TextContent:
            # Two texts side by side are lines: a chat template would join them without a seam, and
            # an image placeholder cut in two would be whole again.
            yield TextPart("\n".join(part.text for _, part in run if isinstance(part, TextContent)))
            continue
        if message.role != "user":
            raise bad("Only the user's messages can have images.", place)
        for i, part in run:
            assert isinstance(part, ImageContent), "the only other kind"
            urls.append((f"{place}.{i}.image_url.url", part.image_url.url))
            yield ImagePart(len(urls) - 1)
