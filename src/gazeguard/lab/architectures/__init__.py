"""The architectures that the lab trains from scratch, by their config's `model_type`.

A new one is a class with what `Architecture` lists, and a line here; no stage of the training
knows which one it works on.
"""

from __future__ import annotations

from typing import Any

from gazeguard.errors import ModelError
from gazeguard.lab.architectures.internvl import InternVL
from gazeguard.lab.architectures.llava import Llava
from gazeguard.lab.architectures.protocol import Architecture, Prompt
from gazeguard.lab.architectures.smollm import MARK, SmolLM

__all__ = ["ARCHITECTURES", "Architecture", "Prompt", "architecture_in", "architecture_of"]

ARCHITECTURES: dict[str, Architecture] = {made.name: made for made in (Llava(), InternVL())}
# Not trained from scratch: its language model comes pretrained (`lab/smollm.py`).
_PRETRAINED: dict[str, Architecture] = {SmolLM.name: SmolLM()}


def architecture_of(name: str) -> Architecture:
    """The architecture of this name; raises `ModelError` for one that the lab lacks."""
    known = {**ARCHITECTURES, **_PRETRAINED}
    if name not in known:
        raise ModelError(
            f"the lab cannot teach a '{name}' model: give one of its own, made by"
            f" `gazeguard lab base` ({', '.join(ARCHITECTURES)})."
        )
    return known[name]


def architecture_in(config: Any) -> Architecture:
    """The architecture of a model's config: its mark, or else its `model_type`."""
    return architecture_of(str(getattr(config, MARK, config.model_type)))
