"""What exactly was measured: content hashes of a target's weights and settings."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from gazeguard.models.files import adapter_files, weight_files
from gazeguard.models.offload import weight
from gazeguard.models.target import Target

# Everything beside the weights that changes what the model sees or computes.
_SETTINGS = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_ADAPTER_SETTINGS = ("adapter_config.json",)


def fingerprint(target: Target) -> dict[str, Any]:
    """Identify a target by content.

    Returns:
        A JSON-ready dict: `id` (hex SHA-256 over all hashes below, the same for the same content
        at another path), `model`, `revision`, `family`, `dtype`, `weights` and `settings` (file
        name -> SHA-256), `adapter` (the same two and its path, or None). For a model made in
        memory, `weights` has one hash over its tensors.
    """
    adapter = None
    if target.adapter is not None:
        adapter = {
            "path": str(target.adapter),
            "weights": _hashed(adapter_files(target.adapter)),
            "settings": _hashed(_present(target.adapter, _ADAPTER_SETTINGS)),
        }
    if target.folder is None:
        weights = {"state_dict": _in_memory(target.model)}
        settings = {"config": _text(target.base.config.to_json_string())}
    else:
        weights = _hashed(weight_files(target.folder))
        settings = _hashed(_present(target.folder, _SETTINGS))
    dtype = str(target.base.dtype).removeprefix("torch.")
    content = [dtype, weights, settings, adapter and [adapter["weights"], adapter["settings"]]]
    return {
        "id": _text(json.dumps(content, sort_keys=True)),
        "model": target.name,
        "revision": target.revision,
        "family": target.family.name,
        "dtype": dtype,
        "weights": weights,
        "settings": settings,
        "adapter": adapter,
    }


def sha256(file: Path) -> str:
    """Hex SHA-256 of a file; read once per process for the same size and time of change."""
    stat = file.stat()
    return _sha256(str(file.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hashed(files: list[Path]) -> dict[str, str]:
    return {file.name: sha256(file) for file in files}


def _present(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _in_memory(model: Any) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        numbers: Any = weight(model, name, tensor)
        digest.update(numbers.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
