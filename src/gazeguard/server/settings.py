"""What can be set about a server; one object, made once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gazeguard.errors import UsageError
from gazeguard.server.remote import Origin

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server judges, batches and limits.

    Attributes:
        name: what the model is called in requests and answers.
        mode: what happens to flagged requests: `purify` answers them with the trigger's tokens
            hidden, `detect` as they are, `block` not at all.
        on_guard_error: what happens to requests that the guard cannot judge though it should.
        tell: what clients learn of a verdict: `full`, or only its `outcome` and what followed.
        max_batch: requests that are answered together.
        max_wait: seconds that a request waits for others to join its batch.
        max_queue: requests in the house beyond `max_batch`; more are turned away.
        timeout: seconds from the first byte of a request to the last of its answer.
        max_tokens: the longest answer, and its length where a request does not say.
        max_body: bytes of a request.
        max_images: pictures of a request.
        max_image_bytes: encoded bytes of all pictures of a request.
        max_pixels: pixels of all pictures of a request.
        max_chars: characters of all texts of a request.
        remote: where pictures may be fetched from; nowhere when empty.
        keys: SHA-256 digests of the API keys; empty for a server that is open to all.
    """

    name: str
    mode: Literal["purify", "detect", "block"] = "purify"
    on_guard_error: Literal["refuse", "pass"] = "refuse"
    tell: Literal["full", "outcome"] = "full"
    max_batch: int = 8
    max_wait: float = 0.005
    max_queue: int = 64
    timeout: float = 120.0
    max_tokens: int = 512
    max_body: int = 16 * MIB
    max_images: int = 8
    max_image_bytes: int = 12 * MIB
    max_pixels: int = 32 * MIB
    max_chars: int = 50_000
    remote: tuple[Origin, ...] = ()
    keys: tuple[bytes, ...] = ()


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Digests of the API keys in a file, one key a line.

    Raises:
        UsageError: no key in it, or not a text file.
        OSError: the file cannot be read.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text file: write one API key a line.") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UsageError(f"{path} holds no API key: write one a line, or leave the option out.")
    return tuple(digest(key.encode()) for key in keys)


def digest(key: bytes) -> bytes:
    """What is kept of a key, and compared."""
    return hashlib.sha256(key).digest()
