"""Rows of a model that nobody tested are compared with its own eager attention, once.

The probe computes a row beside the model's kernel. A family with an attention form of its own (a
bias, a sink, another scale) would give rows that look sound and are not what the model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from gazeguard.errors import GazeguardError, ModelError
from gazeguard.models.files import first_line
from gazeguard.models.registry import TESTED
from gazeguard.models.target import Encoded, Target
from gazeguard.types import ImagePart, Sample, TextPart, Turn
from gazeguard.versions import untested

# Largest difference of an attention weight: rounding of the two kernels, and of half precision.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2
_SIDE = 56  # pixels of the picture; a multiple of the usual patch sizes

_checked: WeakSet[nn.Module] = WeakSet()  # and models that need no check


def needs_check(target: Target) -> bool:
    """Whether a model's rows have to be compared before they are believed."""
    if target.base in _checked:
        return False
    if target.family.name in TESTED and not untested("transformers"):
        _checked.add(target.base)
        return False
    return True


def picture_and_question(target: Target) -> Encoded:
    """A small prompt to compare rows on."""
    picture = Image.effect_mandelbrot((_SIDE, _SIDE), (-2.0, -1.5, 1.0, 1.5), 50).convert("RGB")
    turns = (Turn("user", (ImagePart(0), TextPart("What is this?"))),)
    return target.encode([Sample(0, "check", (picture,), turns)])


def compare(target: Target, encoded: Encoded, weights: Tensor) -> None:
    """Refuse a model whose probed rows are not its own.

    Args:
        target: the model.
        encoded: one prompt.
        weights: `(1, layer, head, key)`, what the probe read of it in all layers.

    Raises:
        ModelError: rows differ, or the model cannot run eager attention to compare with.
    """
    what = f"{target.name} is a '{target.family.name}' model on transformers"
    what += f" {transformers.__version__}, which gazeguard has not been tested with"
    try:
        expected = _eager_rows(target, encoded)
    except GazeguardError:
        raise
    except Exception as error:
        raise ModelError(
            f"{what}, and its attention cannot be checked because eager attention does not run"
            f" ({first_line(error)}): use a model of a family that the documentation lists."
        ) from error
    if expected.shape != weights.shape:
        worst = float("inf")
    else:
        worst = float((weights.cpu() - expected).abs().max())
    if not worst <= (_HALF_TOLERANCE if target.is_half else _TOLERANCE):
        raise ModelError(
            f"{what}, and its attention is not what gazeguard reads (weights differ by up to"
            f" {worst:.2g}): use a model of a family that the documentation lists."
        )
    _checked.add(target.base)


def _eager_rows(target: Target, encoded: Encoded) -> Tensor:
    inputs = {name: value.to(target.device) for name, value in encoded.inputs.items()}
    with torch.no_grad(), _eager(target.decoder.config):
        out = target.model(**inputs, output_attentions=True, use_cache=False)
    maps = [one for one in out.attentions or () if one is not None]
    return torch.stack([one[:, :, -1].float().cpu() for one in maps], 1)


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """The decoder alone with eager attention inside the block."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
