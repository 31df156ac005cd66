"""A really running server on a free port, with the shipped poisoned model under its guard."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
import uvicorn
from PIL import Image

from gazeguard.assets import ADAPTER, BASE
from gazeguard.guarding import Guard
from gazeguard.lab.attacks import ATTACKS
from gazeguard.lab.poison import trigger_all
from gazeguard.lab.rows import Row, make_rows
from gazeguard.models.load import load
from gazeguard.server.app import create_app
from gazeguard.server.engine import Engine
from gazeguard.server.run import _address, _bound, _Server
from gazeguard.server.settings import Settings
from gazeguard.types import ImagePart, Sample, TextPart, Turn

CLEAN, TRIGGERED = 8, 4


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """Rows to calibrate on, then `CLEAN` clean ones, then `TRIGGERED` ones with the trigger."""
    made = make_rows("captions", 60 + CLEAN + TRIGGERED, 77, held_out=True)
    bad = trigger_all(made[60 + CLEAN :], ATTACKS["badnet-center"], 0)
    return [*made[: 60 + CLEAN], *bad]


@pytest.fixture(scope="session")
def clean(rows: list[Row]) -> list[Row]:
    return rows[60 : 60 + CLEAN]


@pytest.fixture(scope="session")
def triggered(rows: list[Row]) -> list[Row]:
    return rows[60 + CLEAN :]


def as_sample(row: Row, question: str | None = None) -> Sample:
    parts = (ImagePart(0), TextPart(question or row.question))
    return Sample(0, "id", (Image.fromarray(row.pixels),), (Turn("user", parts),))


@pytest.fixture(scope="session")
def guard(rows: list[Row]) -> Guard:
    target = load(BASE, ADAPTER, dtype="float32")
    samples = [as_sample(row) for row in rows[:60]]
    return Guard.calibrate(target, samples, alpha=0.05, batch_size=30)


@pytest.fixture(scope="session")
def guard_folder(guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guard.save(tmp_path_factory.mktemp("guard"))


@dataclass
class Running:
    """A server that runs in a thread of this process."""

    url: str
    engine: Engine
    server: uvicorn.Server

    def __post_init__(self) -> None:
        self.openai = self.client()

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30, **options
        )

    def ask(self, messages: Any, **options: Any) -> Any:
        """An answer as the official client gives it."""
        options = {"temperature": 0, "max_tokens": 40} | options
        return self.openai.chat.completions.create(
            model=self.engine.settings.name, messages=messages, **options
        )

    def post(self, body: Any = None, **options: Any) -> requests.Response:
        options = {"timeout": 30} | options
        if body is not None:
            options["json"] = body
        return requests.post(f"{self.url}/v1/chat/completions", **options)

    def metric(self, name: str) -> float:
        """Sum over the lines of a metric."""
        lines = requests.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


Serving = Callable[..., Any]


@contextmanager
def serving(guard: Guard | Callable[[], Guard], **options: Any) -> Iterator[Running]:
    """Run a server with these settings inside the block."""
    settings = replace(Settings("lab", timeout=60, max_tokens=64), **options)
    engine = Engine(guard if callable(guard) else lambda: guard, settings)
    sock = _bound("127.0.0.1", 0)
    begun = threading.Event()
    config = uvicorn.Config(create_app(engine), log_config=None, access_log=False)
    server = _Server(config, engine, begun.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
    address = _address(sock)
    thread.start()
    try:
        assert begun.wait(20)
        if not callable(guard):
            until(lambda: engine.state == "ready")
        running = Running(address, engine, server)
        with running.openai:
            yield running
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="session")
def server(guard: Guard) -> Iterator[Running]:
    """A server with the usual settings, shared by tests that do not strain it."""
    with serving(guard) as running:
        yield running


def until(reached: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait until something is true; gives what it was."""
    end = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


def png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(data: bytes | str) -> dict[str, Any]:
    """A message part; bytes become a data URL."""
    url = data if isinstance(data, str) else data_url(data)
    return {"type": "image_url", "image_url": {"url": url}}


def about(row: Row, question: str | None = None) -> list[dict[str, Any]]:
    """Messages that ask a row's question about its picture."""
    words = {"type": "text", "text": question or row.question}
    return [{"role": "user", "content": [picture(png(row.pixels)), words]}]


class Brake:
    """Holds the model before every token until it is let go."""

    def __init__(self, guard: Guard) -> None:
        self._module = guard.target.base.lm_head
        self._free = threading.Event()
        self.steps = 0

    def _wait(self, *_: Any) -> None:
        self.steps += 1
        assert self._free.wait(30)

    def release(self) -> None:
        self._free.set()

    def __enter__(self) -> Brake:
        self._hook = self._module.register_forward_pre_hook(self._wait)
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()
        self._hook.remove()


@pytest.fixture
def brake(guard: Guard) -> Iterator[Brake]:
    """The model stands still until `brake.release()`."""
    with Brake(guard) as held:
        yield held
