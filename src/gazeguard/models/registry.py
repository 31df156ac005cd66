"""Which class stands for which model family."""

from __future__ import annotations

from gazeguard.models.family import Family
from gazeguard.models.paligemma import PaliGemma

# The families that the contract tests run, on tiny random models. Others are checked when they are
# first watched, see `probe/check.py`.
TESTED = (
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "paligemma",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
)

_families: dict[str, type[Family]] = {"paligemma": PaliGemma}


def register(model_type: str, family: type[Family]) -> None:
    """Use `family` for models whose config has this `model_type`.

    Raises:
        ValueError: the type has a family already.
    """
    if model_type in _families:
        raise ValueError(f"the model family '{model_type}' is already registered")
    _families[model_type] = family


def family_of(model_type: str) -> Family:
    """The family of a `model_type`: its own, or the generic one."""
    return _families.get(model_type, Family)(model_type)
