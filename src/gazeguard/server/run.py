"""Running the server: its socket, its signals, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from gazeguard.errors import UsageError
from gazeguard.guarding.guard import Guard
from gazeguard.server.app import create_app
from gazeguard.server.engine import Engine
from gazeguard.server.settings import Settings

_BACKLOG = 2048


def serve(
    load: Callable[[], Guard],
    settings: Settings,
    host: str,
    port: int,
    listening: Callable[[str], None],
) -> bool:
    """Serve until a signal comes; requests in the house are answered first.

    Args:
        load: gives the guard with its model; called while the server says that it is loading.
        settings: of the server.
        host: name or address to listen at.
        port: to listen at; 0 takes a free one.
        listening: called with the address once connections are taken.

    Returns:
        Whether a second signal cut the last answers short.

    Raises:
        UsageError: host and port cannot be listened at.
        GazeguardError: whatever `load` raises.
    """
    with _bound(host, port) as sock:
        engine = Engine(load, settings)
        config = uvicorn.Config(
            create_app(engine), log_config=None, access_log=False, backlog=_BACKLOG
        )
        server = _Server(config, engine, lambda: listening(_address(sock)))
        asyncio.run(server.serve([sock]))
    if engine.error is not None:
        raise engine.error
    if server.force_exit:
        engine.stop()
    return server.force_exit


def is_loopback(host: str) -> bool:
    """Whether a host can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Server(uvicorn.Server):
    """uvicorn, with an engine that drains at the first signal and gives up at the second."""

    def __init__(self, config: uvicorn.Config, engine: Engine, begun: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine, self._begun = engine, begun

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._begun()

    async def on_tick(self, counter: int) -> bool:
        if self._engine.state == "failed":
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own, which raises the signal again at the end: a clean end is exit code 0.
        if self.should_exit:
            self.force_exit = True
        self._engine.drain()
        self.should_exit = True


def _bound(host: str, port: int) -> socket.socket:
    """A socket of our own: uvicorn would end the process with exit code 1, which means flagged."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        why = "is in use" if taken else "cannot be listened at"
        raise UsageError(f"{host}:{port} {why}: choose others with --host and --port.") from error


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
