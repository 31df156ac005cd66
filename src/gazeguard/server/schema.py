"""Requests and answers in the shape of OpenAI's chat completions API.

A field that would change the answer and is not supported is refused, never ignored; fields that
only label a request are taken and forgotten.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

# Fields that exist for clients which always send them: anything but this value is refused.
NEUTRAL = {
    "n": "1",
    "tools": "an empty list",
    "tool_choice": "'none' or 'auto'",
    "functions": "an empty list",
    "function_call": "'none' or 'auto'",
    "logprobs": "false",
    "top_logprobs": "0",
    "response_format": '{"type": "text"}',
    "frequency_penalty": "0",
    "presence_penalty": "0",
    "logit_bias": "an empty object",
    "modalities": '["text"]',
}


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer takes it
        raise ValueError("holds a broken unicode character") from None
    return text


_Str = Annotated[str, AfterValidator(_whole)]
_Empty = Annotated[list[Any], Field(max_length=0)]
_Zero = Annotated[float, Field(ge=0, le=0)]
_Text = Annotated[_Str, Tag("(text)")]


def _text_or_list(value: Any) -> str:
    return "(text)" if isinstance(value, str) else "(list)"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ImageUrl(_Strict):
    """Where a picture is: a data URL, or an address on a host that the server allows."""

    url: Annotated[_Str, Field(min_length=1)]
    detail: str | None = None  # ignored: pictures are never scaled


class TextContent(_Strict):
    """Words inside a message."""

    type: Literal["text"]
    text: _Str


class ImageContent(_Strict):
    """A picture inside a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _part_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})"


# In brackets: names of branches, which are no fields of the request.
_TextPart = Annotated[TextContent, Tag("(text)")]
_ImagePart = Annotated[ImageContent, Tag("(image_url)")]
Part = Annotated[_TextPart | _ImagePart, Discriminator(_part_kind)]
_Parts = Annotated[list[Part], Field(max_length=256), Tag("(list)")]
Content = Annotated[_Text | _Parts, Discriminator(_text_or_list)]


class Message(_Strict):
    """One message of the conversation so far; an earlier answer may be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Content | None, Field(validate_default=True)] = None
    name: str | None = None  # ignored

    @field_validator("content")
    @classmethod
    def _said(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role", "assistant") != "assistant":
            raise ValueError("is required: text, or a list of parts")
        return value

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, value: Any) -> Any:
        """Answers that are sent back as history bring empty fields: `refusal`, `tool_calls`."""
        if not isinstance(value, dict):
            return value
        return {key: held for key, held in value.items() if held is not None and held != []}


class TextFormat(_Strict):
    """The only format of answers."""

    type: Literal["text"]


class StreamOptions(_Strict):
    """What a stream contains besides the answer."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None  # ignored


_Word = Annotated[_Str, Field(min_length=1, max_length=256)]
_Words = Annotated[list[_Word], Field(max_length=4), Tag("(list)")]
_Stop = Annotated[Annotated[_Word, Tag("(text)")] | _Words, Discriminator(_text_or_list)]
_Length = Annotated[StrictInt, Field(ge=1)]
_Seed = Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)]


class ChatRequest(_Strict):
    """Body of `POST /v1/chat/completions`."""

    model: _Str
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Length | None = None
    max_completion_tokens: _Length | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: _Seed | None = None
    stop: _Stop | None = None
    # As in NEUTRAL.
    n: Literal[1] | None = None
    tools: _Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: _Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: TextFormat | None = None
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    # Ignored: labels of the request, and what is moot without tools.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    store: StrictBool | None = None
    parallel_tool_calls: StrictBool | None = None


class GuardImage(BaseModel):
    """What stands out in one image of a flagged request."""

    grid: list[int] | None
    image_tokens: int
    tokens: list[int]


class GuardField(BaseModel):
    """The guard's verdict on a request, an extra field of every answer.

    With `--verdict outcome` only the first three are there.
    """

    outcome: Literal["clean", "flagged", "inconclusive"]
    action: Literal["answered", "purified", "blocked", "refused"]
    applicable: bool
    suspicion: float | None = None
    score: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    hidden: bool | None = None
    images: list[GuardImage] | None = None
    reason: str | None = None


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens of a request; the end-of-answer token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """Body of an answer that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    gazeguard: GuardField


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gazeguard"


class ModelList(BaseModel):
    """Body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Body of `GET /health`."""

    status: Literal["loading", "ready", "draining", "failed"]


class ErrorContent(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Body of every refusal; with the verdict when the guard is the reason."""

    error: ErrorContent
    gazeguard: GuardField | None = None
