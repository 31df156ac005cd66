"""Loading a vision-language model, its processor and an optional LoRA adapter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from gazeguard.errors import ModelError
from gazeguard.models.adapters import attach, read_adapter
from gazeguard.models.files import (
    adapter_files,
    first_line,
    is_adapter,
    resolve,
    tensor_names,
    weight_files,
)
from gazeguard.models.offload import check_device_map, fetch_whole
from gazeguard.models.processor import load_processor
from gazeguard.models.target import Target, as_target
from gazeguard.models.unread import beside
from gazeguard.models.weights import load_weights

log = logging.getLogger(__name__)


def load(
    model: str | Path,
    adapter: str | Path | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> Target:
    """Load a model to be watched, in eval mode.

    Only safetensors weights are read. Weights that are NaN load; the probe reports them.

    Args:
        model: hub id or folder.
        adapter: hub id or folder of a LoRA adapter trained on this model.
        revision: branch, tag or commit of the hub model.
        dtype: `auto` for the stored one (float32 instead of float16 on a CPU, which computes
            float16 slowly), or a name such as `bfloat16`.
        device_map: as in transformers: None (CPU), a device, `balanced` or `auto` (all GPUs, and
            main memory and disk for layers that do not fit), or a mapping of modules to devices,
            `cpu` and `disk`, in which no module lies inside another.
        trust_remote_code: run the model's own Python files. Only for code you have read.

    Raises:
        ModelError: the model, its processor or the adapter cannot be used; says what would.
        UsageError: a `device_map` that gives a module no place, or two.
    """
    check_device_map(device_map)
    folder = resolve(model, revision, trust_remote_code)
    config = _config(folder, str(model), trust_remote_code)
    for file in weight_files(folder):
        tensor_names(file)  # its header can be read
    _tell(folder, weight_files(folder))
    adapter_folder = adapter_config = None
    if adapter is not None:
        adapter_folder = resolve(adapter)
        adapter_config = read_adapter(adapter_folder, str(model), folder)
        _tell(adapter_folder, adapter_files(adapter_folder))
    processor = load_processor(folder, config, trust_remote_code)
    loaded = load_weights(
        transformers.AutoModelForImageTextToText,
        folder,
        config=config,
        dtype=_dtype(dtype, config, device_map),
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    fetch_whole(loaded)
    if adapter_folder is not None:
        loaded = attach(loaded, adapter_folder, adapter_config, str(model))
    loaded.requires_grad_(False)
    return as_target(
        loaded,
        processor,
        name=str(model),
        folder=folder,
        revision=_commit(folder) or revision,
        adapter=adapter_folder,
    )


def _tell(folder: Path, read: Sequence[Path]) -> None:
    """Say which weights another loader could pick; what is judged here comes from those read."""
    if names := [file.name for file in beside(folder, read)]:
        log.warning("%s: not loaded, and so not looked at: %s.", folder, ", ".join(names))


def _config(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """Read config.json and refuse models of the wrong kind before reading weights."""
    if is_adapter(folder):
        raise ModelError(
            f"{name} is a LoRA adapter: give its base model first and this as the adapter."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} has no config.json: give a folder written by save_pretrained().")
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the config.json of {name} cannot be used ({first_line(error)}): use a model"
            f" that transformers {transformers.__version__} knows."
        ) from error
    mapped = getattr(config, "auto_map", None) or {}
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or (
        trust_remote_code and "AutoModelForImageTextToText" in mapped
    ):
        return config
    if hasattr(config, "vision_config"):
        what = "an image encoder without a language model that answers"
    elif hasattr(config, "vocab_size"):
        what = "a text-only model that sees no images"
    else:
        what = "not a vision-language model"
    raise ModelError(
        f"{name} is a '{config.model_type}' model, {what}: give a vision-language model such as"
        " LLaVA, Qwen2.5-VL, InternVL, Idefics3, PaliGemma or Gemma 3."
    )


def _dtype(dtype: str | torch.dtype, config: Any, device_map: Any) -> str | torch.dtype:
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise ModelError(
                f"'{dtype}' is not a number format: use auto, float32, bfloat16 or float16."
            )
        return named
    on_cpu = device_map is None or str(device_map) == "cpu" or not torch.accelerator.is_available()
    if dtype == "auto" and on_cpu and getattr(config, "dtype", None) == torch.float16:
        return torch.float32
    return dtype


def _commit(folder: Path) -> str | None:
    """The commit of a folder in the hub cache, which is named after it."""
    return folder.name if folder.parent.name == "snapshots" else None
