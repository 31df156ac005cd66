"""Loading a text encoder from any of the places where people keep one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from gazeguard.errors import ModelError
from gazeguard.models.encoders import openclip
from gazeguard.models.encoders.encoder import TextEncoder
from gazeguard.models.encoders.kinds import KINDS, SUPPORTED, Kind, class_of
from gazeguard.models.files import (
    first_line,
    is_hub_id,
    pinned,
    resolve,
    tensor_names,
    weight_files,
)
from gazeguard.models.unread import Unread, unread
from gazeguard.models.weights import load_weights

_INDEX = "model_index.json"
_ENCODER = re.compile(r"(\w+_)?(text|image|vision)_encoder(_\d+)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_encoder(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> TextEncoder:
    """Load the text encoder of a model, frozen, in eval mode.

    Only safetensors weights are read. Weights that are NaN load; `TextEncoder.check_finite` tells.

    Args:
        model: hub id (or `ID@REVISION`) or folder: a whole image-text model, its text model
            alone, a diffusers pipeline (its `text_encoder` is taken), one of its encoders as in
            `PIPELINE/text_encoder_2`, or an open_clip model.
        revision: branch, tag or commit of a hub id.
        dtype: a floating-point type or its name.
        device: where to.

    Raises:
        ModelError: it cannot be used; says what would.
    """
    name = str(model)
    folder = encoder_folder(model, revision)
    if openclip.is_open_clip(folder):
        text, projection = openclip.load(folder, name)
        kind = KINDS["clip"]
    else:
        kind, class_name = _recognised(folder, name)
        for file in weight_files(folder):
            tensor_names(file)  # its header can be read
        model_class = getattr(transformers, class_name)
        text, projection = _parts(load_weights(model_class, folder, dtype=torch.float32))
    number = _number_format(dtype)
    for part in (text, projection):
        if part is not None:
            part.to(device=device, dtype=number).eval().requires_grad_(False)
    return TextEncoder(text, projection, _tokenizer(folder, name), kind, name=name, folder=folder)


def encoder_folder(model: str | Path, revision: str | None = None) -> Path:
    """The local folder that holds the encoder's weights.

    Raises:
        ModelError: there is none.
    """
    if Path(model).suffix in _PICKLED and Path(model).is_file():
        raise ModelError(
            f"{model} is a pickle, which can run code when opened: convert it in a sandbox with"
            " save_pretrained(), which writes safetensors."
        )
    pipeline, _, part = str(model).rpartition("/")
    if Path(model).expanduser().is_dir() or not _is_hub_pipeline(pipeline, part):
        pipeline, part = str(model), "text_encoder"
    folder = resolve(pipeline, revision)
    if not (folder / _INDEX).is_file():
        return folder
    inner = folder / part
    if not (inner / "config.json").is_file():
        raise ModelError(f"the pipeline {pipeline} has no {part} folder: give the encoder.")
    if not any(inner.glob("*.safetensors")) and not Path(pipeline).expanduser().is_dir():
        _fetch_encoder(*pinned(pipeline, revision), part)
    return inner


def encoders_of(model: str) -> list[str]:
    """The encoders of a diffusers pipeline, as in `PIPELINE/text_encoder_2`; else the model itself.

    Raises:
        ModelError: there is no such model, or a pipeline without an encoder.
    """
    if Path(model).is_file():
        return [model]
    folder = resolve(model)
    if not (folder / _INDEX).is_file():
        return [model]
    try:
        named = json.loads((folder / _INDEX).read_text("utf-8"))
        listed = {name for name, value in named.items() if isinstance(value, list) and any(value)}
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{folder / _INDEX} is not a pipeline's index: copy it again.") from error
    listed |= {config.parent.name for config in folder.glob("*/config.json")}
    found = sorted(name for name in listed if _ENCODER.fullmatch(name))
    if not any("text" in name for name in found):
        raise ModelError(f"the pipeline {model} has no text_encoder folder: give the encoder.")
    return [f"{model.rstrip('/')}/{name}" for name in found]


def place_in_pipeline(folder: Path) -> str:
    """`text_encoder_2` for a pipeline's folder of this name; empty for an encoder alone."""
    return folder.name if (folder.parent / _INDEX).is_file() else ""


def unreadable(folder: Path, name: str) -> str:
    """Why a pipeline's encoder is of no kind that can be read; empty where it is of one.

    Raises:
        ModelError: its config cannot be read.
    """
    config = read_config(folder, name)
    kind = str(config.get("model_type", "")) or "nameless"
    if "text" not in folder.name:
        return f"{folder.name} is an image encoder, and only text encoders are scanned"
    if class_of(kind, list(config.get("architectures") or [])) is None:
        return f"{folder.name} is a '{kind}' model, and only encoders of {SUPPORTED} are scanned"
    return ""


def unread_weights(folder: Path) -> tuple[Unread, ...]:
    """Weights beside an encoder's that were not read; in a pipeline also those of its own folder.

    Raises:
        ModelError: it has no weights.
    """
    read: Sequence[Path]
    if openclip.is_open_clip(folder):
        read = [openclip.weights(folder, folder.name)]
    else:
        read = weight_files(folder)
    found = unread(folder, read)
    if place_in_pipeline(folder):
        found += tuple(Unread(f"../{u.part}", u.why) for u in unread(folder.parent, read))
    return found


def _is_hub_pipeline(name: str, part: str) -> bool:
    """Whether `NAME/PART` is an encoder of a hub pipeline."""
    hub_id = name.partition("@")[0]
    return bool(_ENCODER.fullmatch(part)) and "/" in hub_id and is_hub_id(hub_id)


def _fetch_encoder(name: str, revision: str | None, part: str) -> None:
    """Fetch a hub pipeline's encoder, which `resolve` leaves out as it does all subfolders."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot_download(name, revision=revision, allow_patterns=[f"{part}/*.safetensors"])
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"the {part} of '{name}' cannot be fetched ({type(error).__name__}): check the"
            " connection, or give a folder."
        ) from error


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The raw config.json of a model folder.

    Raises:
        ModelError: missing or not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{name} has no config.json: give a folder written by save_pretrained().")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: copy the file again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a model config: copy the file again.")
    return config


def _recognised(folder: Path, name: str) -> tuple[Kind, str]:
    config = read_config(folder, name)
    model_type = str(config.get("model_type", ""))
    found = class_of(model_type, list(config.get("architectures") or []))
    if found is not None:
        return found
    if "vision" in model_type or "image_size" in config:
        what = "sees images only"
    elif "vision_config" in config:
        what = "is no pair of text and image encoder"
    elif "vocab_size" in config:
        what = "is a language model"
    else:
        what = "has no text encoder that is known here"
    raise ModelError(f"{name} ('{model_type}') {what}: give a text encoder of {SUPPORTED}.")


def _parts(model: Any) -> tuple[Any, Any]:
    """The text module and its projection (or None) of whatever was loaded; the rest is let go."""
    inner = getattr(model, "text_model", None)
    if inner is None or not hasattr(inner, "get_input_embeddings"):
        return model, None
    return inner, getattr(model, "text_projection", None)


def _tokenizer(folder: Path, name: str) -> Any:
    places = [folder]
    if folder.name.startswith("text_encoder"):  # a diffusers pipeline keeps it next door
        places.append(folder.with_name(folder.name.replace("text_encoder", "tokenizer")))
    for place in places:
        if any((place / file).is_file() for file in _TOKENIZER_FILES):
            try:
                return transformers.AutoTokenizer.from_pretrained(place)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(
                    f"the tokenizer in {place} cannot be used ({first_line(error)}): copy its"
                    " files again."
                ) from error
    raise ModelError(
        f"{name} has no tokenizer: copy tokenizer.json (or vocab.json and merges.txt) of the model"
        " it was made from into its folder."
    )


def _number_format(dtype: str | torch.dtype) -> torch.dtype:
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ModelError(f"'{dtype}' is not a number format: use float32, bfloat16 or float16.")
    return named
