"""A full queue, a slow answer, a client that hangs up, a server that is told to stop."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests

from gazeguard.errors import UsageError
from gazeguard.server import gate
from gazeguard.server.run import _bound, is_loopback
from tests.server.conftest import serving, until

ASK = {"model": "lab", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
LONG = ASK | {"max_tokens": 64, "temperature": 0}


def idle(server) -> bool:
    return server.metric("gazeguard_in_house_requests") == 0


def test_a_full_queue_says_when_to_come_back(guard, brake):
    with serving(guard, max_batch=1, max_queue=1) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.post, ASK)
        until(lambda: brake.steps)
        second = pool.submit(server.post, ASK)
        until(lambda: server.metric("gazeguard_in_house_requests") == 2)
        third = server.post(ASK)
        assert third.status_code == 429
        assert third.headers["retry-after"] == "1"
        assert third.json()["error"]["code"] == "queue_full"
        brake.release()
        assert first.result().status_code == second.result().status_code == 200
        until(lambda: idle(server))
        assert server.post(ASK).status_code == 200


def test_timeouts_free_the_place(guard, brake):
    with serving(guard, max_batch=1, max_queue=1, timeout=1.0) as server:
        with ThreadPoolExecutor(2) as pool:  # one runs, one waits
            running = pool.submit(server.post, ASK)
            until(lambda: brake.steps)
            found = [running.result(), server.post(ASK)]
        assert [r.status_code for r in found] == [504, 504]
        assert found[0].json()["error"]["code"] == "timeout"
        until(lambda: idle(server))
        brake.release()
        assert server.post(ASK).status_code == 200


def test_a_stream_that_takes_too_long_says_so_and_ends(guard):
    slow = guard.target.base.lm_head.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    try:
        with serving(guard, timeout=1.0) as server:
            with pytest.raises(openai.APIError, match="not complete after 1 seconds"):
                list(server.ask(LONG["messages"], stream=True, max_tokens=64))
            until(lambda: not server.engine._running)
    finally:
        slow.remove()


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_place(guard, stream):
    """The model stops long before the 64 tokens that were asked for."""
    steps = []

    def slowly(*_: object) -> None:
        steps.append(1)
        time.sleep(0.05)

    slow = guard.target.base.lm_head.register_forward_pre_hook(slowly)
    try:
        with serving(guard, max_batch=1, max_queue=0) as server:
            connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps(LONG | {"stream": stream}),
                {"content-type": "application/json"},
            )
            until(lambda: len(steps) > 2)
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            until(lambda: idle(server) and not server.engine._running)
            assert len(steps) < 40
            assert server.post(ASK).status_code == 200
    finally:
        slow.remove()


def test_who_hangs_up_while_waiting_is_never_run(guard, brake):
    with serving(guard, max_batch=1) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, ASK)
        until(lambda: brake.steps)
        with pytest.raises(requests.ReadTimeout):
            server.post(ASK, timeout=0.5)
        until(lambda: server.metric("gazeguard_in_house_requests") == 1)
        assert not server.engine._waiting
        brake.release()
        assert first.result().status_code == 200
        assert server.metric("gazeguard_batch_requests_count") == 1


def raw(server, head: str, *pieces: bytes) -> bytes:
    """What the server says to these bytes; the connection is left open on our side."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as connection:
        lines = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n"
        connection.sendall(lines.encode())
        for piece in pieces:
            connection.sendall(piece)
        told = b""
        while not told.endswith(b"}}"):
            told += connection.recv(65536) or b"}}"
        return told


def test_bodies_are_cut_off_at_the_limit(guard, monkeypatch):
    monkeypatch.setattr(gate, "_GRACE", 0.0)
    with serving(guard, max_body=1000, timeout=3.0) as server:
        kind = "Content-Type: application/json\r\n"
        told = raw(server, f"{kind}Content-Length: 1000000000000")
        assert b" 413 " in told
        assert b"request_too_large" in told
        chunk = b"400\r\n" + b" " * 0x400 + b"\r\n"
        assert b" 413 " in raw(server, f"{kind}Transfer-Encoding: chunked", chunk)
        # A body that never comes.
        assert b" 504 " in raw(server, f"{kind}Content-Length: 900", b"{")
        until(lambda: idle(server))
        assert server.post(ASK).status_code == 200


def test_loading_and_a_model_that_cannot_be_loaded(guard):
    ready = threading.Event()

    def load():
        assert ready.wait(20)
        return guard

    with serving(load) as server:
        health = requests.get(f"{server.url}/health", timeout=5)
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        refusal = server.post(ASK)
        assert refusal.status_code == 503
        assert refusal.json()["error"]["code"] == "not_ready"
        assert "loading" in refusal.json()["error"]["message"]
        ready.set()
        until(lambda: requests.get(f"{server.url}/health", timeout=5).status_code == 200)

    def broken():
        raise UsageError("no guard here")

    with serving(broken) as server:
        until(lambda: server.server.should_exit, 5)
        assert isinstance(server.engine.error, UsageError)


def test_draining_answers_what_is_in_the_house_and_takes_no_more(guard, brake):
    with serving(guard, max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        inside = [pool.submit(server.post, ASK) for _ in range(2)]
        until(lambda: brake.steps and server.metric("gazeguard_in_house_requests") == 2)
        server.engine.drain()
        assert requests.get(f"{server.url}/health", timeout=5).json() == {"status": "draining"}
        assert "draining" in server.post(ASK).json()["error"]["message"]
        brake.release()
        assert [one.result().status_code for one in inside] == [200, 200]


def test_addresses():
    with _bound("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(UsageError, match="in use: choose others with --host and --port"):
            _bound("127.0.0.1", port)
    with pytest.raises(UsageError, match="cannot be listened at"):
        _bound("203.0.113.1", 0)
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "example.org")] == [False] * 3
