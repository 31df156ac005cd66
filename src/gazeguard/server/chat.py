"""`POST /v1/chat/completions`: from a valid body to an answer or a stream of pieces."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gazeguard.guarding.requests import Conversation
from gazeguard.models.target import Encoded
from gazeguard.server.engine import Engine
from gazeguard.server.errors import ApiError, bad, timed_out, verdict_headers
from gazeguard.server.job import Done, Failed, GoneError, Job, Judged, Piece
from gazeguard.server.requests import conversation, options
from gazeguard.server.schema import ChatRequest
from gazeguard.types import KeyKind


class Chat:
    """Answers chat requests with an engine.

    Args:
        engine: runs the model.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._settings = engine, engine.settings
        self._threads = CapacityLimiter(2)  # that decode pictures: each may hold `max_pixels`

    async def answer(self, body: ChatRequest, request: Request) -> Response:
        """Answer one request.

        Raises:
            ApiError: the request is refused.
        """
        deadline: float = request.scope["state"]["deadline"]
        if body.model != self._settings.name:
            message = f"There is no model '{body.model[:100]}' here, only '{self._settings.name}'."
            raise ApiError(404, "model_not_found", message, param="model")
        gone = asyncio.create_task(_hang_up(request))
        job = None
        try:
            job = Job(*await self._prepared(body, deadline), stream=bool(body.stream))
            self._engine.submit(job)
            first = await job.next(deadline, self._settings.timeout, gone)
            if isinstance(first, Failed):
                raise first.error
            assert isinstance(first, Judged), "the verdict comes first"
            if body.stream:
                stream = _Stream(
                    self._pieces(body, job, first, deadline), verdict_headers(first.verdict)
                )
                stream.closes(self._engine, job)
                job = None  # the stream's, from here on
                return stream
            return await self._whole(job, first, deadline, gone)
        except GoneError:
            return Response(status_code=499)  # nobody reads it; shows in the metrics
        finally:
            gone.cancel()
            if job is not None:
                self._engine.forget(job)

    async def _prepared(self, body: ChatRequest, deadline: float) -> tuple[Encoded, Any]:
        """The encoded prompt and the options; pictures are decoded in a thread."""

        def prepare() -> tuple[Conversation, Encoded]:
            talk = conversation(body, self._settings)
            return talk, self._engine.encode(talk)

        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                talk, prompt = await to_thread.run_sync(
                    prepare, limiter=self._threads, abandon_on_cancel=True
                )
        except TimeoutError:
            raise timed_out(self._settings.timeout) from None
        self._check_words(prompt, talk)
        tokens = prompt.inputs["input_ids"].shape[1]
        wanted = options(body, self._settings, tokens, self._engine.room)
        self._engine.metrics.images.inc(len(talk.images))
        self._engine.metrics.prompt_tokens.inc(tokens)
        return prompt, wanted

    def _check_words(self, prompt: Encoded, talk: Conversation) -> None:
        """Refuse early what the guard could not judge: pictures without a word about them."""
        wordless = not bool((prompt.key_kind == KeyKind.PROMPT).any())
        if talk.images and wordless and self._settings.on_guard_error == "refuse":
            message = "The guard cannot judge images without words: add a text to the messages."
            raise bad(message, "messages", "guard_inconclusive")

    async def _whole(
        self, job: Job, first: Judged, deadline: float, gone: asyncio.Task[None]
    ) -> Response:
        text = ""
        while True:
            event = await job.next(deadline, self._settings.timeout, gone)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Piece):
                text += event.text
            if isinstance(event, Done):
                break
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": event.finish_reason,
        }
        content = {
            **self._about("chat.completion"),
            "choices": [choice],
            "usage": _usage(job, event),
            "gazeguard": first.verdict,
        }
        return JSONResponse(content, headers=verdict_headers(first.verdict))

    async def _pieces(
        self, body: ChatRequest, job: Job, first: Judged, deadline: float
    ) -> AsyncIterator[str]:
        """Server-sent events of a streamed answer."""
        about = self._about("chat.completion.chunk")
        wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)

        def chunk(delta: dict[str, str], reason: str | None = None, **more: Any) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            usage = {"usage": None} if wants_usage else {}
            return _event({**about, "choices": [choice], **usage, **more})

        yield chunk({"role": "assistant", "content": ""}, gazeguard=first.verdict)
        while True:
            try:
                event = await job.next(deadline, self._settings.timeout)
                if isinstance(event, Failed):
                    raise event.error
            except ApiError as error:
                yield _event(error.content)
                return
            if isinstance(event, Piece):
                yield chunk({"content": event.text})
            if isinstance(event, Done):
                break
        yield chunk({}, event.finish_reason)
        if wants_usage:
            yield _event({**about, "choices": [], "usage": _usage(job, event)})
        yield "data: [DONE]\n\n"

    def _about(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self._settings.name,
        }


class _Stream(StreamingResponse):
    """A stream that frees its request however it ends, even when it never begins."""

    def __init__(self, events: AsyncIterator[str], headers: dict[str, str]) -> None:
        headers = headers | {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")

    def closes(self, engine: Engine, job: Job) -> None:
        """Say what is freed."""
        self._engine, self._job = engine, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._engine.forget(self._job)


def _usage(job: Job, done: Done) -> dict[str, int]:
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": done.tokens,
        "total_tokens": job.prompt_tokens + done.tokens,
    }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _hang_up(request: Request) -> None:
    """Ends when the client has gone; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
