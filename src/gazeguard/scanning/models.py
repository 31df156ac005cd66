"""Which models to scan, and what kind each is."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from gazeguard.errors import ModelError, UsageError
from gazeguard.models.adapters import TEXT_ENCODER as FOR_TEXT_ENCODER
from gazeguard.models.encoders import openclip
from gazeguard.models.encoders.load import encoder_folder, place_in_pipeline, read_config
from gazeguard.models.files import adapter_files, is_adapter, tensor_names
from gazeguard.models.layout import for_text_encoder

TEXT_ENCODER = "text-encoder"
VISION_LANGUAGE = "vision-language-model"
_NOT_LISTS = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors"}


def expand(given: Sequence[str]) -> list[str]:
    """Models from what the user typed: ids, folders, globs, and files with one model a line.

    Lines that are empty or begin with `#` are left out; a relative folder in a file is looked for
    beside the file first. Every model once, in order.

    Raises:
        UsageError: a glob that matches nothing, a list that is empty or no text.
    """
    found: list[str] = []
    for text in given:
        path = Path(text).expanduser()
        if path.is_file() and path.suffix not in _NOT_LISTS:
            found += _listed(path)
        elif any(sign in text for sign in "*?[") and not path.exists():
            matched = sorted(name for name in glob.glob(str(path)) if Path(name).is_dir())
            if not matched:
                raise UsageError(f"no folder matches {text}: check the pattern.")
            found += matched
        else:
            found.append(text)
    if not found:
        raise UsageError("there is no model to scan: give an id, a folder, a glob or a list file.")
    return list(dict.fromkeys(found))


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no text file: give a folder, or a file with one model a line."
        ) from error
    names = [line.strip() for line in lines]
    names = [name for name in names if name and not name.startswith("#")]
    if not names:
        raise UsageError(f"{path} names no model: write one model a line.")
    beside = [path.parent / name for name in names]
    return [str(b) if b.is_dir() else name for name, b in zip(names, beside, strict=True)]


def kind_of(model: str) -> str:
    """`TEXT_ENCODER` or `VISION_LANGUAGE`; an adapter is one of the latter.

    All encoders of a pipeline are of the former, whatever model they are.

    Raises:
        ModelError: it is neither; says what works.
    """
    folder = encoder_folder(model)
    if openclip.is_open_clip(folder):
        return TEXT_ENCODER
    if place_in_pipeline(folder):
        read_config(folder, model)
        return TEXT_ENCODER
    if is_adapter(folder):
        if for_text_encoder(folder, (n for f in adapter_files(folder) for n in tensor_names(f))):
            raise ModelError(FOR_TEXT_ENCODER.format(model))
        return VISION_LANGUAGE
    config = read_config(folder, model)
    if config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return VISION_LANGUAGE
    return TEXT_ENCODER  # what no encoder is, loading refuses with what is supported
