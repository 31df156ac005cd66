"""The ASGI application: routes, and what stands around them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from gazeguard._version import __version__
from gazeguard.server import errors
from gazeguard.server.chat import Chat
from gazeguard.server.engine import Engine
from gazeguard.server.errors import ApiError
from gazeguard.server.gate import CHAT, Gate
from gazeguard.server.schema import (
    ChatRequest,
    Completion,
    ErrorBody,
    Health,
    Model,
    ModelList,
)

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in ("4XX", "5XX")
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def create_app(engine: Engine) -> FastAPI:
    """Make the application of an engine, which starts and stops with it.

    Args:
        engine: not started yet.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await to_thread.run_sync(engine.stop)

    # The pages of FastAPI load scripts from elsewhere.
    app = FastAPI(
        title="gazeguard", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    errors.install(app)
    app.add_middleware(Gate, engine=engine)
    chat, created = Chat(engine), int(time.time())
    served = Model(id=engine.settings.name, created=created)

    @app.post(CHAT, response_model=Completion, responses={**_STREAM, **_REFUSALS})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, judged by the guard."""
        return await chat.answer(body, request)

    @app.get("/v1/models", responses=_REFUSALS)
    async def models() -> ModelList:
        """Name the one model that is served."""
        return ModelList(data=[served])

    @app.get("/v1/models/{model:path}", responses=_REFUSALS)
    async def model(model: str) -> Model:
        """Tell about the one model that is served."""
        if model != served.id:
            message = f"There is no such model here, only '{served.id}'."
            raise ApiError(404, "model_not_found", message, param="model")
        return served

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Say whether requests are taken: 200 when they are."""
        return JSONResponse({"status": engine.state}, 200 if engine.state == "ready" else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app
