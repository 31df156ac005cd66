"""Which prompt tokens are image, which are the user's own words, which are the template's.

The template is rendered twice, once with markers in place of the user's words; what stands between
the markers is the template's. That gives each user text's place in the prompt; the processor's
record of how it stretched the image placeholders, and the tokenizer's offsets, carry it to tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from jinja2 import TemplateError

from gazeguard.errors import ModelError, RowError
from gazeguard.models.family import Family, Message
from gazeguard.types import ImagePart, Sample, TextPart

Span = tuple[int, int]

# Private-use characters: no template trims them, no user writes them.
_OPEN, _CLOSE = "\ue1f0", "\ue1f1"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sample's prompt as text, before image placeholders are stretched.

    Attributes:
        text: what goes to the processor.
        laid_out: the same text after the processor's own rearrangement, to which spans refer.
        user: character spans of the user's words in `laid_out`.
        images: places in `Sample.images`, in prompt order.
        earlier: per answer inside of the prompt, where it begins in `laid_out` and whether it is
            looked at as well; the user's words are then told apart by answer.
    """

    text: str
    laid_out: str
    user: tuple[Span, ...]
    images: tuple[int, ...]
    earlier: tuple[tuple[int, bool], ...] = ()


def write_prompt(family: Family, processor: Any, sample: Sample, reserved: Sequence[str]) -> Prompt:
    """Render a sample's prompt and find the user's words in it.

    Args:
        family: how conversations become text.
        processor: the model's processor.
        sample: turns and images; only `prompt_turns` are used.
        reserved: strings that stand for images; user text must not contain them.

    Raises:
        RowError: no image in the prompt, a placeholder written in the text, or a conversation
            that the chat template refuses or rewrites.
    """
    images = sample.prompt_images
    if not images:
        raise RowError("the prompt has no image: put the image in the first user turn.")
    if not all(0 <= index < len(sample.images) for index in images):
        raise RowError("the prompt refers to an image that the row lacks: add the missing image.")
    texts = [text for turn in sample.prompt_turns for text in _texts(turn.parts)]
    for word in reserved:
        if any(word in text for text in texts):
            raise RowError(
                f"the text itself contains the model's image placeholder '{word}': remove it from"
                " the row."
            )

    words = [text for t in sample.prompt_turns if t.role == "user" for text in _texts(t.parts)]
    text = _rendered(family, processor, sample)
    marked = _rendered(family, processor, sample, marked=True)
    picture = sample.images[images[0]]
    laid_out = _laid_out(processor, text, picture)
    user = _locate(laid_out, _laid_out(processor, marked, picture), words)
    return Prompt(text, laid_out, user, images)


def write_answers(
    family: Family, processor: Any, sample: Sample, reserved: Sequence[str]
) -> Prompt | None:
    """The prompt of a conversation's last answer, with the places of all answers inside of it.

    Returns:
        None where one prompt cannot stand for all: the template writes an earlier turn otherwise
        once it is answered, or in this family every token sees the whole prompt.

    Raises:
        RowError: as `write_prompt`.
    """
    asked = sample.asked
    prompt = write_prompt(family, processor, asked[-1], reserved)
    looked_at = {each.place for each in asked}
    turns = asked[-1].prompt_turns
    places = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if places and family.sees_ahead:
        return None
    picture = sample.images[prompt.images[0]]
    earlier = []
    for place in places:
        before = _rendered(family, processor, replace(asked[-1], place=place))
        before = _laid_out(processor, before, picture)
        if not prompt.laid_out.startswith(before):
            return None
        earlier.append((len(before), place in looked_at))
    return replace(prompt, earlier=tuple(earlier))


def write_apart(
    family: Family, processor: Any, sample: Sample, reserved: Sequence[str]
) -> tuple[Prompt, ...]:
    """A prompt for each of a conversation's answers; raises as `write_prompt`."""
    found = []
    for each in sample.asked:
        prompt = write_prompt(family, processor, each, reserved)
        own = 0  # words since the answer before
        for turn in each.prompt_turns:
            if turn.role == "assistant":
                own = 0
            elif turn.role == "user":
                own += len(_texts(turn.parts))
        found.append(replace(prompt, user=prompt.user[len(prompt.user) - own :]))
    return tuple(found)


def user_tokens(
    prompt: Prompt, replacements: Sequence[dict[str, Any]], offsets: Sequence[Span]
) -> list[bool]:
    """For each token, whether it covers any character of the user's words.

    Args:
        prompt: from `write_prompt`.
        replacements: the processor's `text_replacement_offsets` of this sample.
        offsets: per token, character span in the stretched prompt; empty for added tokens.

    Raises:
        ModelError: the processor's record does not match the prompt.
    """
    stretched = _stretching(prompt, replacements)
    spans = [(stretched(start), stretched(end)) for start, end in prompt.user]
    return [
        any(start < span[1] and end > span[0] for span in spans) and end > start
        for start, end in offsets
    ]


def answer_tokens(
    prompt: Prompt, replacements: Sequence[dict[str, Any]], offsets: Sequence[Span]
) -> list[int] | None:
    """The first token of each of `prompt.earlier`; arguments as in `user_tokens`.

    Returns:
        None where an answer begins inside of a token: it is not what the prompt alone ends with.
    """
    stretched = _stretching(prompt, replacements)
    ends = list(accumulate((end for _, end in offsets), max))
    found = []
    for place, _ in prompt.earlier:
        start = stretched(place)
        token = bisect_right(ends, start)
        if token == len(ends) or offsets[token][0] < start:
            return None
        found.append(token)
    return found


def _stretching(prompt: Prompt, replacements: Sequence[dict[str, Any]]) -> Callable[[int], int]:
    """From a place in `prompt.laid_out` to the same once the placeholders are stretched."""
    for item in replacements:
        start, end = item["span"]
        if prompt.laid_out[start:end] != item["text"]:
            raise ModelError(
                "the model's processor rearranges prompts in a way that cannot be followed: use a"
                " model of a family listed in the documentation."
            )
    ends = [item["span"][1] for item in replacements]
    gained = [0, *(item["new_span"][1] - item["span"][1] for item in replacements)]
    return lambda place: place + gained[bisect_right(ends, place)]


def placeholder_tokens(
    replacements: Sequence[dict[str, Any]], offsets: Sequence[Span]
) -> list[int]:
    """How many of a prompt's image tokens each image placeholder was stretched to.

    Args:
        replacements: the processor's `text_replacement_offsets` of this sample.
        offsets: per image token, in their order, its character span in the stretched prompt.
    """
    starts, ends = ([span[side] for span in offsets] for side in (0, 1))
    spans = (item["new_span"] for item in replacements)
    return [bisect_left(starts, end) - bisect_right(ends, start) for start, end in spans]


def _texts(parts: Sequence[TextPart | ImagePart]) -> list[str]:
    return [part.text for part in parts if isinstance(part, TextPart) and part.text]


def _messages(sample: Sample, *, marked: bool) -> list[Message]:
    """Chat messages of the prompt turns; when `marked`, user words become numbered marks."""
    messages, number = [], 0
    for turn in sample.prompt_turns:
        content: list[dict[str, str]] = []
        for part in turn.parts:
            if isinstance(part, ImagePart):
                content.append({"type": "image"})
            elif part.text:
                text = part.text
                if marked and turn.role == "user":
                    text, number = _mark(number), number + 1
                content.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": content})
    return messages


def _rendered(family: Family, processor: Any, sample: Sample, *, marked: bool = False) -> str:
    try:
        return family.render(processor, _messages(sample, marked=marked))
    except (TemplateError, TypeError) as error:  # templates fail in both ways
        raise RowError(
            f"the model's chat template refuses this conversation ({error}): use roles and turns"
            " that it allows."
        ) from error


def _mark(number: int) -> str:
    return f"{_OPEN}{number}{_CLOSE}"


def _laid_out(processor: Any, text: str, picture: Any) -> str:
    """The text as the processor rearranges it before it stretches placeholders (PaliGemma)."""
    arrange = getattr(processor, "prepare_inputs_layout", None)  # remote code may lack it
    return str(arrange(images=[picture], text=[text])[1][0]) if arrange else text


def _locate(text: str, marked: str, words: Sequence[str]) -> tuple[Span, ...]:
    """Spans of `words` in `text`, which is `marked` with the marks replaced by the words."""
    pieces = [marked]
    for number in range(len(words)):
        before, mark, after = pieces[-1].partition(_mark(number))
        if not mark:
            raise RowError("the chat template drops or reorders the user's words: check the row.")
        pieces[-1:] = [before, after]
    spans: list[Span] = []
    at = len(pieces[0])
    matched = text.startswith(pieces[0])
    for word, piece in zip(words, pieces[1:], strict=True):
        # Templates may trim what the user wrote.
        forms = dict.fromkeys((word, word.strip(), word.lstrip(), word.rstrip()))
        form = next((form for form in forms if text.startswith(form + piece, at)), None)
        if form is None:
            matched = False
            break
        spans.append((at, at + len(form)))
        at += len(form) + len(piece)
    if not matched or at != len(text):
        raise RowError("the chat template rewrites the user's words: simplify the row's text.")
    return tuple(spans)
