"""Pictures from addresses: only from named hosts, at public addresses, and not for long."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import trustme

from gazeguard.errors import RowError, UsageError
from gazeguard.server import images, remote
from gazeguard.server.remote import Origin, fetch, is_public
from tests.server.conftest import picture, png, serving

PICTURE = png(np.full((64, 64, 3), 90, np.uint8))
HOST = "pictures.example"


class Handler(BaseHTTPRequestHandler):
    """A picture, and all that can go wrong with one."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
        elif self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                time.sleep(0.05)
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
        else:
            size = len(PICTURE) + (5 if self.path == "/short" else 0)
            self.send_response(404 if self.path == "/none" else 200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(PICTURE)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module", params=["http", "https"])
def host(request: pytest.FixtureRequest) -> Iterator[ThreadingHTTPServer]:
    """A local server that calls itself `HOST`, with and without encryption."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.scheme, server.trust = [], request.param, None
    if request.param == "https":
        server.trust = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.trust.issue_cert(HOST).configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def trusted(host, monkeypatch) -> None:
    """The local server is taken for a public one with a good certificate."""
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    if host.trust is not None:
        context = ssl.create_default_context()
        host.trust.configure_trust(context)
        monkeypatch.setattr(remote.ssl, "create_default_context", lambda: context)


def got(host, path: str, name: str = HOST, looked_up=("127.0.0.1",), limit: int = 100_000) -> bytes:
    origin = Origin(host.scheme, name, host.server_port)
    url = f"{host.scheme}://{name}:{host.server_port}{path}"
    return fetch(url, [origin], limit, resolve=lambda *_: looked_up)


def test_a_picture_comes_from_the_address_that_was_checked(host, trusted):
    """The name exists nowhere: only the checked address can have been used."""
    assert got(host, "/a.png?size=1") == PICTURE
    assert host.seen[-1] == ("/a.png?size=1", f"{HOST}:{host.server_port}")


@pytest.mark.parametrize(
    ("path", "words"),
    [("/moved", "status 302"), ("/none", "status 404"), ("/short", "broke off|fetched")],
)
def test_answers_that_are_no_picture(host, trusted, path, words):
    before = len(host.seen)
    with pytest.raises(RowError, match=words):
        got(host, path)
    assert len(host.seen) == before + 1, "no redirect is followed"


def test_size_and_time(host, trusted, monkeypatch):
    with pytest.raises(RowError, match="above the limit of 50 bytes"):
        got(host, "/a.png", limit=50)
    monkeypatch.setattr(remote, "SECONDS", 0.4)
    began = time.monotonic()
    with pytest.raises(RowError, match="too slowly|could not be fetched"):
        got(host, "/drip")
    assert time.monotonic() - began < 3


def test_private_addresses_are_refused_before_anything_is_sent(host):
    before = len(host.seen)
    for addresses in (("127.0.0.1",), ("93.184.216.34", "10.0.0.1"), ()):
        with pytest.raises(RowError, match="no public address"):
            got(host, "/a.png", looked_up=addresses)
    assert len(host.seen) == before


@pytest.mark.parametrize("host", ["https"], indirect=True)
def test_a_certificate_for_another_name_or_by_nobody_is_refused(host, trusted, monkeypatch):
    with pytest.raises(RowError, match="could not be fetched"):
        got(host, "/a.png", name="other.example")
    monkeypatch.undo()
    monkeypatch.setattr(remote, "is_public", lambda _: True)
    with pytest.raises(RowError, match="could not be fetched"):
        got(host, "/a.png")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2002:a00:1::1",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example.org/a.png",
        "https://images.example.org:8443/a.png",
        "https://images.example.org.evil.net/a.png",
        "https://evil.net/https://images.example.org/a.png",
        "https://images.example.org@evil.net/a.png",
        "https://user:pass@images.example.org/a.png",
        "https://evil.net#@images.example.org/a.png",
        "https://images.example.org\\@evil.net/a.png",
        "https://sub.images.example.org/a.png",
        "https://images.example.org:99999/a.png",
        "https://im\u0430ges.example.org/a.png",
        "https://images.example.org/a b",
        "https://images.example.org/a\r\nX: y",
        "https://[::1/a.png",
        "//images.example.org/a.png",
    ],
)
def test_addresses_that_only_look_allowed(url):
    def never(*_: object):
        raise AssertionError("looked up")

    with pytest.raises(RowError, match="does not fetch"):
        fetch(url, [Origin.of("images.example.org")], 1000, resolve=never)


def test_hosts_as_they_are_written():
    assert Origin.of("a.org") == Origin("https", "a.org", 443)
    assert Origin.of("http://A.org") == Origin("http", "a.org", 80)
    assert Origin.of("a.org:8443") == Origin("https", "a.org", 8443)
    for wrong in ("", "ftp://a.org", "a.org/path", "https://u@a.org", "a.org?x", "a b", "*.a.org"):
        with pytest.raises(UsageError, match="is not a host"):
            Origin.of(wrong)


def test_unknown_hosts():
    def unknown(*_: object):
        raise OSError("no such host")

    with pytest.raises(RowError, match="is unknown"):
        fetch("https://a.org/x", [Origin.of("a.org")], 10, resolve=unknown)


def test_a_request_with_an_address(guard, monkeypatch):
    """Through the server: the picture is fetched and counted like any other."""
    taken = []

    def fetched(url: str, allowed: object, max_bytes: int) -> bytes:
        taken.append(url)
        return PICTURE

    monkeypatch.setattr(images, "fetch", fetched)
    with serving(guard, remote=(Origin.of("a.org"),), max_image_bytes=len(PICTURE)) as server:
        url = "https://a.org/x.png"
        parts = [picture(url), {"type": "text", "text": "what?"}]
        message = {"role": "user", "content": parts}
        assert server.ask([message]).usage.prompt_tokens > 64
        assert taken == [url]
        parts.insert(0, picture(url))
        refused = server.post({"model": "lab", "messages": [message]})
        assert refused.status_code == 400
        assert "limit" in refused.json()["error"]["message"]
