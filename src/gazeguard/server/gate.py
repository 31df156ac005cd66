"""What a request must pass before anything of its body is read: key, size, room, time."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gazeguard.server.engine import Engine
from gazeguard.server.errors import ApiError, internal, timed_out
from gazeguard.server.settings import digest

CHAT = "/v1/chat/completions"
_GRACE = 5.0  # seconds after the timeout in which an answer may say that it is over
_LATER = {"retry-after": "1"}


class Gate:
    """ASGI middleware around the whole application.

    Args:
        app: what is behind the gate.
        engine: whose queue may be full.
    """

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app, self._engine, self._settings = app, engine, engine.settings
        self._in_house = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = _Passage(send)
        chat = scope["path"] == CHAT and scope["method"] == "POST"
        began = time.monotonic()
        scope.setdefault("state", {})["deadline"] = began + self._settings.timeout
        try:
            self._check_key(scope)
            if chat:
                await self._chat(scope, receive, passage)
            else:
                await self._app(scope, receive, passage.send)
        except ApiError as error:
            await passage.refuse(error, scope, receive)
        except Exception:  # a bug: told in OpenAI's shape, and in the log
            await passage.refuse(internal(), scope, receive)
        finally:
            if chat:
                self._engine.metrics.requests.labels(str(passage.status or "none")).inc()
                self._engine.metrics.duration.observe(time.monotonic() - began)

    async def _chat(self, scope: Scope, receive: Receive, passage: _Passage) -> None:
        self._check_room(scope)
        self._in_house += 1
        self._engine.metrics.in_house.set(self._in_house)
        try:
            # For clients that send or read too slowly; what else takes long watches the deadline.
            async with asyncio.timeout(self._settings.timeout + _GRACE):
                await self._app(scope, self._limited(receive), passage.send)
        except TimeoutError:
            raise timed_out(self._settings.timeout) from None
        finally:
            self._in_house -= 1
            self._engine.metrics.in_house.set(self._in_house)

    def _check_key(self, scope: Scope) -> None:
        keys = self._settings.keys
        if not keys or not scope["path"].startswith("/v1/"):
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = digest(key.strip().encode("latin-1"))
        # Every key is compared, in constant time.
        known = sum(hmac.compare_digest(given, one) for one in keys)
        if scheme.lower() != "bearer" or not known:
            message = "The API key is wrong or missing: send 'Authorization: Bearer KEY'."
            raise ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})

    def _check_room(self, scope: Scope) -> None:
        settings, state = self._settings, self._engine.state
        if state != "ready":
            message = f"The server is not ready ({state})."
            raise ApiError(503, "not_ready", message, headers=_LATER)
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length[:20]) > settings.max_body:
            raise self._too_large()
        if self._in_house >= settings.max_queue + settings.max_batch:
            message = "Too many requests are waiting: try again later."
            raise ApiError(429, "queue_full", message, headers=_LATER)

    def _limited(self, receive: Receive) -> Receive:
        """The body, refused as soon as it is longer than allowed."""
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._settings.max_body:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        message = f"The request is larger than {self._settings.max_body:,} bytes."
        return ApiError(413, "request_too_large", message)


class _Passage:
    """The way back to the client: knows the status, and names the request."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = f"req_{uuid.uuid4().hex}"
        await self._send(message)

    async def refuse(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Answer with an error, if nothing has been answered yet."""
        if self.status is None:
            await error.response()(scope, receive, self.send)
