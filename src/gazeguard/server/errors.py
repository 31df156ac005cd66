"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gazeguard.data.images import shorten
from gazeguard.server.schema import NEUTRAL

log = logging.getLogger("gazeguard.server")

# What the validator calls a mistake -> the rest of a sentence that begins with the field's name.
_WORDS = {
    "missing": "is required",
    "value_error": "{error}",
    "string_type": "must be text",
    "int_type": "must be a whole number, an integer",
    "int_parsing": "must be a whole number, an integer",
    "int_parsing_size": "must be a smaller whole number",
    "int_from_float": "must be a whole number, an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "must be 'text' or 'image_url'",
    "greater_than_equal": "must be greater than or equal to {ge:,}",
    "less_than_equal": "must be less than or equal to {le:,}",
    "too_long": "must have at most {max_length} {unit}",
    "too_short": "must have at least {min_length} {unit}",
}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_NOT_AGAIN = {"x-should-retry": "false"}  # OpenAI's clients obey it; 5xx is tried again else


class ApiError(HTTPException):
    """A request that is refused, with its HTTP status.

    Args:
        status: HTTP status.
        code: a word for programs, such as `model_not_found`.
        message: one sentence for people.
        param: the field of the request that is to blame.
        headers: to be sent along.
        verdict: the guard's verdict, when it is the reason.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        verdict: dict[str, Any] | None = None,
    ) -> None:
        about = verdict_headers(verdict) if verdict else {}
        super().__init__(status, message, about | dict(headers or {}))
        self.code, self.param, self.verdict = code, param, verdict

    @property
    def content(self) -> dict[str, Any]:
        """The body, as JSON types."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        error = {
            "message": self.detail,
            "type": _TYPES.get(self.status_code, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error} | ({"gazeguard": self.verdict} if self.verdict else {})

    def response(self) -> JSONResponse:
        """The error as an answer."""
        return JSONResponse(self.content, self.status_code, self.headers)


def verdict_headers(verdict: Mapping[str, Any]) -> dict[str, str]:
    """The verdict in short."""
    headers = {
        "x-gazeguard-outcome": verdict["outcome"],
        "x-gazeguard-action": verdict["action"],
    }
    if verdict.get("suspicion") is not None:
        headers["x-gazeguard-suspicion"] = f"{verdict['suspicion']:.6g}"
    return headers


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that asks for what cannot be done."""
    return ApiError(400, code, message, param=param)


def internal() -> ApiError:
    """A failure of the server itself; called where it was caught, it logs the traceback."""
    log.error("A request failed.\n%s", traceback.format_exc())
    return ApiError(500, "internal_error", "The server failed at this request: see its log.")


def timed_out(seconds: float) -> ApiError:
    """A request that took too long."""
    return ApiError(504, "timeout", f"The answer was not complete after {seconds:g} seconds.")


def unjudged(reason: str, verdict: dict[str, Any]) -> ApiError:
    """A request that the guard should judge and cannot."""
    message = f"The guard could not judge this request, so it is not answered: {reason}."
    return ApiError(500, "guard_inconclusive", message, headers=_NOT_AGAIN, verdict=verdict)


def blocked(reason: str, verdict: dict[str, Any]) -> ApiError:
    """A flagged request of a server that does not answer such."""
    message = f"The guard blocked this request: {reason}."
    return ApiError(400, "content_filter", message, param="messages", verdict=verdict)


def install(app: FastAPI) -> None:
    """Make an application answer every error in OpenAI's shape."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError), "registered for it"
    return error.response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What the frameworks below refuse: unknown paths and methods, bodies that are no JSON."""
    assert isinstance(error, HTTPException), "registered for it"
    code = {400: "invalid_json", 404: "unknown_url", 405: "method_not_allowed"}
    found = code.get(error.status_code, "invalid_request")
    message = f"{error.detail}: {request.method} {shorten(request.url.path)}."
    return ApiError(error.status_code, found, message, headers=error.headers).response()


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not what the schema says: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError), "registered for it"
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return bad(f"The body is not valid JSON ({why}).", code="invalid_json").response()
    param = _param(first["loc"])
    if param is None:
        message = "The body must be a JSON object, sent with content-type application/json."
        return bad(message, code="invalid_json").response()
    field = param.partition(".")[0]
    if field in NEUTRAL:
        message = f"'{field}' is supported only as {NEUTRAL[field]}."
        return bad(message, field, "unsupported_parameter").response()
    if first["type"] == "extra_forbidden":
        message = f"'{param}' is not supported by this server: leave it out."
        return bad(message, param, "unsupported_parameter").response()
    if first["type"] == "union_tag_invalid" and isinstance(first["input"], dict):
        param += ".type"  # of a message's part: the only union by a field
    return bad(f"'{param}' {_said(first)}.", param).response()


def _said(error: Mapping[str, Any]) -> str:
    """What is wrong with a field, in plain words."""
    context = dict(error.get("ctx", {}))
    unit = "character" if isinstance(error["input"], str) else "item"
    one = 1 in (context.get("max_length"), context.get("min_length"))
    context["unit"] = unit if one else f"{unit}s"
    if error["type"] == "union_tag_invalid" and not isinstance(error["input"], dict):
        return 'must be an object such as {"type": "text", "text": "..."}'
    if error["type"] == "list_type" and error["loc"][-1] == "(list)":
        return "must be text or a list"
    words = _WORDS.get(error["type"])
    return shorten(words.format(**context) if words else f"cannot be used: {error['msg']}", 300)


def _param(loc: Sequence[Any]) -> str | None:
    """`("body", "messages", 0, "content", "(text)")` as `messages.0.content`."""
    # In brackets: the branch of a union, which is no field of the request.
    names = [shorten(str(part), 60) for part in loc[1:] if not str(part).startswith("(")]
    return ".".join(names) or None
