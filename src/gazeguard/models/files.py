"""Where a model's files are: a local folder, or a hub repository fetched into the cache."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gazeguard.errors import ModelError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
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
    """The safetensors files a model or adapter folder is loaded from, sorted by name.

    Raises:
        ModelError: none, only pickled weights, or an index that names a missing file.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not a weight index: copy the file again.") from error
        files = [folder / name for name in named]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ModelError(
                f"{folder} lacks {len(absent)} of its weight files, first {absent[0]}: copy the"
                " model again."
            )
        return files
    files = sorted(folder.glob("*.safetensors"))
    if files:
        single = [f for f in files if f.name in ("model.safetensors", "adapter_model.safetensors")]
        return single or files
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ModelError(
            f"{folder} holds only pickled weights, which can run code when opened: convert them in"
            " a sandbox with save_pretrained(), which writes safetensors."
        )
    raise ModelError(
        f"{folder} holds no safetensors weights: give a folder written by save_pretrained()."
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
