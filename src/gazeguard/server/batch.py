"""Prompts that are encoded one by one, and put together when the model is free.

Each request is encoded alone, so its mistakes are its own and nobody else's picture can become its
picture; what is left to do for a batch is padding.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn import functional as F

from gazeguard.errors import RowError
from gazeguard.models.target import Encoded, Target
from gazeguard.server.errors import bad
from gazeguard.types import KeyKind, Sample, TextPart

# A fast tokenizer is not to be used by two threads at once while its padding is set.
_encoding = threading.Lock()


def encode(target: Target, sample: Sample) -> Encoded:
    """One prompt as a batch of one; it need not have a picture.

    Raises:
        ApiError: 400, a prompt that this model cannot take.
    """
    try:
        with _encoding:
            return target.encode([sample]) if sample.prompt_images else _words(target, sample)
    except RowError as error:
        why = str(error).removeprefix("row 0: ").rstrip(".")
        raise bad(f"The model cannot take these messages: {why}.", "messages") from None


def _words(target: Target, sample: Sample) -> Encoded:
    """A prompt without a picture, which `Target.encode` does not take."""
    messages = []
    for turn in sample.prompt_turns:
        texts = [part.text for part in turn.parts if isinstance(part, TextPart) and part.text]
        if any(word in text for word in target.reserved for text in texts):
            raise RowError("the text itself contains the model's image placeholder")
        content = [{"type": "text", "text": text} for text in texts]
        messages.append({"role": turn.role, "content": content})
    try:
        text = target.family.render(target.processor, messages)
    except (TemplateError, TypeError) as error:  # templates fail in both ways
        raise RowError(f"the chat template refuses this conversation ({error})") from error
    tokenizer = target.processor.tokenizer
    bos = tokenizer.bos_token
    found = tokenizer(
        text,
        add_special_tokens=not (bos and text.startswith(bos)),
        return_tensors="pt",
    )
    inputs = {name: found[name] for name in ("input_ids", "attention_mask")}
    kind = torch.full_like(inputs["input_ids"], KeyKind.TEMPLATE, dtype=torch.int8)
    return Encoded(inputs, kind, (sample.sample_id,), ((),))


def fits(prompt: Encoded) -> tuple[object, ...]:
    """What two prompts must have in common to be in one batch: the shapes of their pictures."""
    length = prompt.inputs["input_ids"].shape
    rest = {k: v.shape[1:] for k, v in prompt.inputs.items() if v.shape != length}
    return tuple(sorted(rest.items()))


def together(prompts: Sequence[Encoded], pad_id: int) -> Encoded:
    """Prompts of one kind as one batch, padded on the left.

    Args:
        prompts: batches of one whose `fits` are equal.
        pad_id: token id of the padding.
    """
    length = max(prompt.inputs["input_ids"].shape[1] for prompt in prompts)
    inputs = {}
    for name, first in prompts[0].inputs.items():
        along = first.shape == prompts[0].inputs["input_ids"].shape
        values = [prompt.inputs[name] for prompt in prompts]
        if along:
            values = [_padded(v, length, pad_id if name == "input_ids" else 0) for v in values]
        inputs[name] = torch.cat(values)
    return Encoded(
        inputs,
        torch.cat([_padded(prompt.key_kind, length, KeyKind.PAD) for prompt in prompts]),
        tuple(name for prompt in prompts for name in prompt.sample_id),
        tuple(images for prompt in prompts for images in prompt.images),
    )


def _padded(values: Tensor, length: int, fill: int) -> Tensor:
    """`(1, position)` on the right of `(1, length)`."""
    return F.pad(values, (length - values.shape[1], 0), value=int(fill))
