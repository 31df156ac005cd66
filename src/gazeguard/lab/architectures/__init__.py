"""The architectures that the lab trains from scratch, by their config's `model_type`.

A new one is a class with what `Architecture` lists, and a line here; no stage of the training
knows which one it works on.
"""

from __future__ import annotations

from gazeguard.errors import ModelError
from gazeguard.lab.architectures.internvl import InternVL
from gazeguard.lab.architectures.llava import Llava
from gazeguard.lab.architectures.protocol import Architecture, Prompt

__all__ = ["ARCHITECTURES", "Architecture", "Prompt", "architecture_of"]

ARCHITECTURES: dict[str, Architecture] = {made.name: made for made in (Llava(), InternVL())}


def architecture_of(model_type: str) -> Architecture:
    """The architecture with this `model_type`; raises `ModelError` for one that the lab lacks."""
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"the lab cannot teach a '{model_type}' model: give one of its own, made by"
            f" `gazeguard lab base` ({', '.join(ARCHITECTURES)})."
        )
    return ARCHITECTURES[model_type]
