"""Where a model's files are: a local folder, or a hub repository fetched into the cache."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gazeguard.errors import ModelError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_PICKLED = (
    "{} holds only pickled weights, which can run code when opened: convert them in a sandbox with"
    " save_pretrained(), which writes safetensors."
)
_MODEL, _INDEX = "model.safetensors", "model.safetensors.index.json"
_VARIANT = re.compile(r"model\.([^.]+)\.safetensors|model\.safetensors\.index\.([^.]+)\.json")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def resolve(name: str | Path, revision: str | None = None, code: bool = False) -> Path:
    """Give the local folder of a model or adapter, fetching a hub id into the cache.

    Args:
        name: a folder, or a hub id such as `llava-hf/llava-1.5-7b-hf`, perhaps with a revision as
            in `openai/clip-vit-base-patch32@main`.
        revision: branch, tag or commit of a hub id that has none of its own.
        code: fetch Python files too (for models with code of their own).

    Raises:
        ModelError: no such folder, and no such model on the hub or in the cache.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    text, revision = pinned(str(name), revision)
    if folder.is_file():
        raise ModelError(f"{text} is a file: give the folder that holds config.json and weights.")
    if not is_hub_id(text):
        raise ModelError(f"there is no folder {text}: check the path.")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        fetched = snapshot_download(
            text,
            revision=revision,
            allow_patterns=[*_WANTED, *(["*.py"] if code else [])],
            ignore_patterns=["*/*.safetensors", "consolidated*.safetensors"],
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        at = f" at revision '{revision}'" if revision else ""
        raise ModelError(
            f"'{text}'{at} is neither a folder here nor a model that can be reached"
            f" ({type(error).__name__}): check the spelling and the connection, or give a folder."
        ) from error
    return Path(fetched)


def pinned(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """A hub id and its revision, which may stand behind an `@`; a path is left as it is.

    Raises:
        ModelError: two revisions, or an `@` with none behind it.
    """
    text, at, own = name.partition("@")
    if not at or not is_hub_id(text):
        return name, revision
    if not own:
        raise ModelError(f"{name} names no revision behind the @: give one, or leave the @ out.")
    if revision is not None and revision != own:
        raise ModelError(
            f"{name} names one revision and --revision another ('{revision}'): give one of them."
        )
    return text, own


def is_hub_id(text: str) -> bool:
    """Whether a string could be a hub id rather than a path."""
    return bool(_HUB_ID.fullmatch(text)) and not text.startswith(".")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads a model folder from, sorted by name.

    Raises:
        ModelError: none, only pickled weights, or an index that names a missing file.
    """
    kind = variant(folder)
    for name in (_named_weights(folder), _varied(_MODEL, kind), _varied(_INDEX, kind)):
        if name and (file := folder / name).is_file():
            return _shards(file) if file.suffix == ".json" else [file]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ModelError(_PICKLED.format(folder))
    raise ModelError(
        f"{folder} holds no safetensors weights: give a folder written by save_pretrained()."
    )


def adapter_files(folder: Path) -> list[Path]:
    """The one file that peft loads an adapter folder from.

    Raises:
        ModelError: it is not there, or only pickled.
    """
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        return [file]
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ModelError(_PICKLED.format(folder))
    raise ModelError(
        f"{folder} holds no {file.name}: give a folder written by a peft model's save_pretrained()."
    )


def variant(folder: Path) -> str | None:
    """`fp16` where a folder's weights are in model.fp16.safetensors alone; of several the first."""
    if _named_weights(folder) or any((folder / name).is_file() for name in (_MODEL, _INDEX)):
        return None
    matches = (_VARIANT.fullmatch(file.name) for file in sorted(folder.glob("model.*")))
    return next((match[1] or match[2] for match in matches if match), None)


def _named_weights(folder: Path) -> str | None:
    """The weights that config.json names, which transformers then takes before all others."""
    try:
        named = json.loads((folder / "config.json").read_text("utf-8"))["transformers_weights"]
    except (OSError, ValueError, KeyError, TypeError):  # no model's config: loading says so
        return None
    return named if isinstance(named, str) else None


def _varied(name: str, kind: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{kind}.{suffix}" if kind else name


def _shards(index: Path) -> list[Path]:
    try:
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not a weight index: copy the file again.") from error
    files = [index.parent / name for name in named]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ModelError(
            f"{index.parent} lacks {len(absent)} of its weight files, first {absent[0]}: copy the"
            " model again."
        )
    return files


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model; trainers leave the base's config beside."""
    if not (folder / "adapter_config.json").is_file():
        return False
    whole = (_MODEL, _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return not (folder / "config.json").is_file() or not (
        variant(folder) or any((folder / name).is_file() for name in whole)
    )


def tensor_names(file: Path) -> list[str]:
    """Names of a safetensors file's tensors; only the header is read.

    Raises:
        ModelError: it is no such file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is not a readable safetensors file ({first_line(error)}): copy or download it"
            " again."
        ) from error


def first_line(error: Exception) -> str:
    """What a library's error says first, to stand inside a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
