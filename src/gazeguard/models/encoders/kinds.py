"""What text encoders of different families ask for, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of text encoders.

    Attributes:
        name: as shown to people.
        classes: names of the transformers classes, the whole model first, then the text part alone.
        masked: whether padding is hidden by an attention mask. The others were trained without
            one: in a causal encoder padding comes after every word, and SigLIP looks at it.
        full_length: whether every prompt is padded to the encoder's length, because the output is
            read at the last position or padding is looked at.
    """

    name: str
    classes: tuple[str, ...]
    masked: bool = False
    full_length: bool = False


KINDS = {
    "clip": Kind("CLIP", ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection")),
    "metaclip_2": Kind(
        "MetaCLIP 2",
        ("MetaClip2Model", "MetaClip2TextModel", "MetaClip2TextModelWithProjection"),
    ),
    "siglip": Kind("SigLIP", ("SiglipModel", "SiglipTextModel"), full_length=True),
    "siglip2": Kind("SigLIP 2", ("Siglip2Model", "Siglip2TextModel"), full_length=True),
    "altclip": Kind("AltCLIP", ("AltCLIPModel", "AltCLIPTextModel"), masked=True),
    "chinese_clip": Kind("Chinese-CLIP", ("ChineseCLIPModel", "ChineseCLIPTextModel"), masked=True),
}
"""`model_type` of the whole model -> its kind."""

SUPPORTED = ", ".join(kind.name for kind in KINDS.values()) + " or an open_clip CLIP"


def class_of(model_type: str, architectures: list[str]) -> tuple[Kind, str] | None:
    """The kind and class name that a config.json asks for, or None when it is no text encoder.

    Args:
        model_type: of the config.
        architectures: of the config; may be empty.
    """
    for key, kind in KINDS.items():
        for name in architectures:
            if name in kind.classes:
                return kind, name
        if not architectures and model_type == key:
            return kind, kind.classes[0]
        if not architectures and model_type == f"{key}_text_model":
            return kind, kind.classes[1]
    return None
