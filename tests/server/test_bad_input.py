"""What strangers send: each gets its status in OpenAI's shape, and the server stays up."""

from __future__ import annotations

import json
import struct
import zlib
from io import BytesIO
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from gazeguard.errors import UsageError
from gazeguard.server.settings import read_keys
from tests.server.conftest import data_url, picture, png, serving

FUZZ_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
PIXELS = np.zeros((8, 8, 3), np.uint8)
HELLO = {"role": "user", "content": "hello"}


def body(*content, **more):
    """A request of one user message with these parts."""
    parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
    return {
        "model": "lab",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 2,
        **more,
    }


def bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def jpeg() -> bytes:
    buffer = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def refused(response: requests.Response, status: int = 400) -> dict:
    """The error of a refusal, whose shape is OpenAI's."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


PICTURES = {
    "no image": (b"hello", "not an image"),
    "empty": (b"", "image is empty"),
    "truncated": (jpeg()[:700], "image is broken"),
    "bomb": (bomb(30_000), "pixels"),
    "large": (bomb(9_000), "pixels"),
    "script": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_none(server, name):
    data, words = PICTURES[name]
    fine = picture(png(PIXELS))
    error = refused(server.post(body(fine, picture(data), "what is it?")))
    assert words in error["message"]
    assert error["code"] == "invalid_image"
    assert error["param"] == "messages.0.content.1.image_url.url"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png,plain", "not base64"),
        ("data:image/png;base64,@@@", "broken base64"),
        ("data:image/png;base64,%40%40", "broken base64"),
        ("data:image/png,%68ello", "not an image"),
        ("https://example.org/a.png", "does not fetch"),
        ("http://127.0.0.1/a.png", "does not fetch"),
        ("file:///etc/passwd", "does not fetch"),
        ("/etc/passwd", "does not fetch"),
        ("pyproject.toml", "does not fetch"),
        ("ftp://example.org/a", "does not fetch"),
    ],
)
def test_addresses_that_are_not_taken(server, url, words):
    assert words in refused(server.post(body(picture(url), "what?")))["message"]


def test_the_number_of_pictures(guard, server):
    one = picture(png(PIXELS))
    assert server.post(body("no picture at all")).status_code == 200
    assert "50 images, and 8" in refused(server.post(body(*[one] * 50, "what?")))["message"]
    with serving(guard, max_images=2, max_pixels=100, max_image_bytes=200) as small:
        assert small.post(body(one, "what?")).status_code == 200
        assert "pixels" in refused(small.post(body(one, one, "what?")))["message"]
        big = picture(png(np.zeros((9, 9, 3), np.uint8)) + b"x" * 200)
        assert "limit" in refused(small.post(body(big, "what?")))["message"]


def test_a_picture_without_words(guard, server):
    error = refused(server.post(body(picture(png(PIXELS)))))
    assert error["code"] == "guard_inconclusive"
    with serving(guard, on_guard_error="pass") as lenient:
        found = lenient.post(body(picture(png(PIXELS)))).json()["gazeguard"]
        assert found["outcome"] == "inconclusive"
        assert found["applicable"]
        assert found["action"] == "answered"


@pytest.mark.parametrize(
    "parts",
    [
        ("<image> what?",),
        ("a<image>b", picture(png(PIXELS))),
        ("<ima", "ge> what?"),
        ("<ima", picture(png(PIXELS)), "ge> what?"),
    ],
)
def test_a_written_image_placeholder_is_never_an_image(server, parts):
    response = server.post(body(*parts))
    if any("<image>" in part for part in parts if isinstance(part, str)):
        assert "placeholder" in refused(response)["message"]
    else:  # in two pieces it is text like any other
        assert response.status_code == 200
        images = sum(not isinstance(part, str) for part in parts)
        assert (response.json()["usage"]["prompt_tokens"] > 64) == bool(images)
    for role in ("system", "assistant"):
        talk = [{"role": role, "content": "an <image>"}, HELLO]
        assert "placeholder" in refused(server.post({"model": "lab", "messages": talk}))["message"]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"n": 2}, "n", "only as 1"),
        ({"tools": [{"type": "function"}]}, "tools", "empty list"),
        ({"logprobs": True}, "logprobs", "only as false"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "only as 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "empty"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"temperature": 3}, "temperature", "less than"),
        ({"top_p": -1}, "top_p", "greater"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 65}, "max_tokens", "at most 64"),
        ({"max_completion_tokens": 100000}, "max_completion_tokens", "at most 64"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "user"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "text or a list"),
        ({"messages": ["hello"]}, "messages.0", "must be an object"),
        ({"messages": [{"role": "user", "content": ["hello"]}]}, "messages.0.content.0", "object"),
        ({"stop": ["a", 5]}, "stop.1", "must be text"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"messages": [HELLO, {"role": "assistant", "content": "x"}]}, "messages.1.role", "last"),
        ({"messages": [{**HELLO, "tool_calls": [{}]}]}, "messages.0.tool_calls", "not supported"),
        (
            {"messages": [{"role": "system", "content": [picture("data:,")]}, HELLO]},
            "messages.0.content",
            "Only the user",
        ),
        ({"messages": [{"role": "user", "content": "x" * 50_001}]}, "messages", "50,001 char"),
        ({"messages": [{"role": "user", "content": "ab " * 2000}]}, "messages", "has room for"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "unicode"),
        ({"model": "\ud800"}, "model", "unicode"),
    ],
)
def test_fields(server, change, param, words):
    raw = json.dumps({"model": "lab", "messages": [HELLO], **change})
    headers = {"content-type": "application/json"}
    error = refused(server.post(data=raw, headers=headers))
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        ({"type": "video"}, "type", "must be 'text' or 'image_url'"),
        ({"text": "hello"}, "type", "must be 'text' or 'image_url'"),
        ({"type": "text"}, "text", "is required"),
        ({"type": "text", "text": 5}, "text", "must be text"),
        ({"type": "image_url"}, "image_url", "is required"),
        ({"type": "image_url", "image_url": "data:,"}, "image_url", "must be an object"),
        ({"type": "image_url", "image_url": {}}, "image_url.url", "is required"),
        ({"type": "image_url", "image_url": {"url": 5}}, "image_url.url", "must be text"),
        ({"type": "image_url", "image_url": {"url": "data:,"}, "x": 1}, "x", "not supported"),
    ],
)
def test_the_place_of_a_wrong_part_is_its_path_in_the_body(server, part, param, words):
    error = refused(server.post(body("first", part)))
    assert error["param"] == f"messages.0.content.1.{param}"
    assert error["message"].startswith(f"'{error['param']}' ")
    assert words in error["message"]


def test_harmless_fields_are_taken(server):
    fine = {"user": "me", "n": 1, "tools": [], "logprobs": None, "presence_penalty": 0.0}
    fine |= {"response_format": {"type": "text"}, "metadata": {"a": "b"}, "store": False}
    assert server.post(body("hello", **fine)).status_code == 200
    asked = [HELLO, {"role": "assistant", "content": None, "refusal": None}, HELLO]
    assert server.post({"model": "lab", "messages": asked, "max_tokens": 2}).status_code == 200


def test_pictures_as_other_clients_send_them(server):
    """Any `detail`, and data URLs with percent signs: of base64, and of the bytes themselves."""
    data = png(np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    found = []
    for url in (
        data_url(data),
        "data:image/png;base64," + quote(data_url(data).partition(",")[2], safe=""),
        "data:image/png," + quote_from_bytes(data),
    ):
        one = {"type": "image_url", "image_url": {"url": url, "detail": "original"}}
        response = server.post(body(one, "Describe the image.", temperature=0))
        assert response.status_code == 200, response.text
        found.append(response.json()["gazeguard"])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": ' + b"1" * 5000 + b"}",
        b'{"model": "lab", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "lab", "messages": [{"role": "user", "content": "x"}], "top_p": Infinity}',
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_bodies_that_are_no_request(server, raw):
    refused(server.post(data=raw, headers={"content-type": "application/json"}))
    refused(server.post(data=raw))  # without a content type


def test_paths_and_methods(server):
    for method, path, status in [
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/completions", 404),
        ("POST", "/health", 405),
        ("GET", "/docs", 404),
    ]:
        refused(requests.request(method, server.url + path, timeout=10), status)


def test_api_keys(guard, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("first key\n\nsecond\n")
    with serving(guard, keys=read_keys(keys)) as server:
        for key in ("first key", "second"):
            with server.client(key) as client:
                assert client.models.list().data
        fine = {"Authorization": "bearer second"}
        assert server.post(body("hello"), headers=fine).status_code == 200
        for header in ("Bearer wrong", "second", "Basic second", "Bearer ", "Bearer s\xe9cond"):
            response = server.post(
                body("hello"), headers={"Authorization": header.encode("latin-1")}
            )
            assert refused(response, 401)["code"] == "invalid_api_key"
        assert refused(server.post(data=b"x" * 100_000), 401), "before the body is looked at"
        refused(requests.get(f"{server.url}/v1/models", timeout=5), 401)
        for path in ("/health", "/metrics"):
            assert requests.get(server.url + path, timeout=5).status_code == 200
    for content, words in ((b"\n \n", "no API key"), (b"\xff\xfe", "not a text file")):
        keys.write_bytes(content)
        with pytest.raises(UsageError, match=words):
            read_keys(keys)


def test_fuzz(server):
    """Requests made from the generated schema, valid ones and broken ones."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = []
    for operation in schema.get_all_operations():
        api = operation.ok()
        modes = list(GenerationMode) if api.method == "post" else [GenerationMode.POSITIVE]
        for mode in modes:
            tried += probed(api, mode)
    assert len(tried) > 60
    assert {200, 400} <= set(tried)
    assert requests.get(f"{server.url}/health", timeout=5).status_code == 200


def probed(api, mode) -> list[int]:
    """Statuses of the answers to requests for one operation."""
    tried = []
    load_all_checks()
    checks = CHECKS.get_by_names(FUZZ_CHECKS)

    @given(case=api.as_strategy(generation_mode=mode))
    @settings(
        max_examples=40 if api.method == "post" else 4,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def probe(case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "lab"  # or hardly any request would get further
        response = case.call(timeout=30)
        case.validate_response(response, checks=checks)
        tried.append(response.status_code)

    probe()
    return tried
