"""Fetching a picture from a host that the operator named, and from nowhere else.

A server that fetches what strangers name can be turned against its own network (SSRF). So: exact
hosts, no redirects, every address of the host must be public, and the connection goes to the very
address that was checked, so that a second look-up cannot answer otherwise (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import SplitResult, urlsplit

from gazeguard.data.images import shorten
from gazeguard.errors import RowError, UsageError

SECONDS = 10.0  # for one picture, from the first look-up to the last byte
_CHUNK = 1 << 16
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Origin:
    """A scheme (`http` or `https`), host and port that pictures may come from."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, text: str) -> Origin:
        """Read `host`, `host:port`, or either after `http://` or `https://`.

        Raises:
            UsageError: anything else.
        """
        found = _origin(text if "://" in text else f"https://{text}")
        if found is None or found[1].path not in ("", "/") or found[1].query or found[1].fragment:
            raise UsageError(
                f"'{text}' is not a host to fetch pictures from: write images.example.org, or"
                " http://images.example.org where there is no encryption."
            )
        return found[0]


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host; raises `OSError`."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def fetch(url: str, allowed: Iterable[Origin], max_bytes: int, resolve: Resolve = resolve) -> bytes:
    """Fetch one picture.

    Args:
        url: what the request names.
        allowed: where pictures may come from.
        max_bytes: of the picture.
        resolve: looks up a host's addresses.

    Raises:
        RowError: not allowed, not public, not there, too large or too slow.
    """
    found = _origin(url)
    shown = shorten(url)
    if found is None or found[0] not in set(allowed):
        raise RowError(f"this server does not fetch pictures from there, send a data URL: {shown}")
    origin, parts = found
    try:
        addresses = list(resolve(origin.host, origin.port))
    except (OSError, UnicodeError):
        raise RowError(f"the host of the picture is unknown: {shown}") from None
    if not addresses or not all(is_public(address) for address in addresses):
        raise RowError(f"the host of the picture has no public address: {shown}")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        return _get(origin, addresses, target, max_bytes)
    except RowError as error:
        raise RowError(f"{error}: {shown}") from None
    except (OSError, HTTPException, ValueError):  # TLS errors are OSErrors
        raise RowError(f"the picture could not be fetched: {shown}") from None


def is_public(address: str) -> bool:
    """Whether an IP address is on the open internet, also one that hides inside an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if not all(is_public(str(one)) for one in inner if one is not None):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _origin(url: str) -> tuple[Origin, SplitResult] | None:
    """The origin of an address and its parts; None when it is not a plain web address."""
    if any(c <= " " or c == "\x7f" or c > "~" for c in url):
        return None  # line ends, NUL, and letters that look like others
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        return None
    usual = _PORTS.get(parts.scheme)
    if usual is None or not host or "*" in host or parts.username is not None:
        return None
    return Origin(parts.scheme, host.rstrip("."), usual if port is None else port), parts


def _get(origin: Origin, addresses: Sequence[str], target: str, max_bytes: int) -> bytes:
    """One GET from one of these very addresses; the whole of it within `SECONDS`."""
    clock = _Clock(_connected(addresses, origin.port))
    connection = HTTPConnection(origin.host, origin.port)
    with closing(connection), clock:
        connection.sock = clock.socket
        if origin.scheme == "https":
            connection.sock = clock.socket = ssl.create_default_context().wrap_socket(
                clock.socket, server_hostname=origin.host, do_handshake_on_connect=False
            )
            connection.sock.do_handshake()
        headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            data = _body(response, max_bytes)
        if clock.rung:  # a connection that was cut can look like one that has ended
            raise RowError("the picture came too slowly")
        return data


class _Clock:
    """Cuts a connection off after `SECONDS`; a socket's own timeout is per read, not for all."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket, self.rung = connected, False
        self._timer = threading.Timer(SECONDS, self._ring)
        self._timer.daemon = True

    def _ring(self) -> None:
        self.rung = True
        # Not the method of an encrypted socket, which would also take it from who reads.
        with suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _connected(addresses: Sequence[str], port: int) -> socket.socket:
    """A connection to the first address that takes one."""
    for address in addresses[:-1]:
        try:
            return socket.create_connection((address, port), SECONDS / len(addresses))
        except OSError:
            continue
    return socket.create_connection((addresses[-1], port), SECONDS)


def _body(response: HTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:  # a redirect is no answer either
        raise RowError(f"the picture's host answered with status {response.status}")
    data = b""
    while chunk := response.read(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise RowError(f"the picture is above the limit of {max_bytes:,} bytes")
    if response.length:  # bytes that were promised and did not come
        raise RowError("the picture broke off")
    return data
