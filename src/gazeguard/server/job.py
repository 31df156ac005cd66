"""One request between the event loop that speaks HTTP and the thread that owns the model."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gazeguard.models.target import Encoded
from gazeguard.server.batch import fits
from gazeguard.server.errors import ApiError, timed_out
from gazeguard.server.requests import Options


@dataclass(frozen=True, slots=True)
class Judged:
    """The prompt was read, and the request will be answered; the first event."""

    verdict: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete; the last event."""

    finish_reason: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """There is no answer, or no more of it; the last event."""

    error: ApiError


Event = Judged | Piece | Done | Failed


class GoneError(Exception):
    """The client has hung up."""


@dataclass(eq=False, slots=True)
class Job:
    """A request for the worker; made in the event loop.

    Attributes:
        prompt: the encoded prompt, a batch of one.
        options: how it wants to be answered.
        stream: whether every piece of text is wanted as it comes.
        cancelled: nobody waits for the answer any more.
        arrived: monotonic seconds.
        kind: requests of one kind can be answered together.
    """

    prompt: Encoded
    options: Options
    stream: bool
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)
    kind: tuple[object, ...] = field(init=False)
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def __post_init__(self) -> None:
        self.kind = fits(self.prompt)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return int(self.prompt.inputs["input_ids"].shape[1])

    def send(self, event: Event) -> None:
        """Tell the event loop; called by the worker."""
        if not self.cancelled:
            with suppress(RuntimeError):  # the loop has ended: a second SIGTERM
                self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(
        self, deadline: float, timeout: float, gone: asyncio.Task[None] | None = None
    ) -> Event:
        """The worker's next event.

        Args:
            deadline: on the clock of `time.monotonic`.
            timeout: the same as told to the client.
            gone: ends when the client hangs up.

        Raises:
            ApiError: 504, after the deadline.
            GoneError: the client has hung up.
        """
        event = asyncio.ensure_future(self._events.get())
        try:
            waiting = {event} if gone is None else {event, gone}
            await asyncio.wait(
                waiting,
                timeout=max(0.0, deadline - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if event.done():
                return event.result()
            if gone is not None and gone.done():
                raise GoneError
            raise timed_out(timeout)
        finally:
            event.cancel()
