"""Weights in a model's folder that were not read, though some loader could pick them.

transformers reads model.fp16.safetensors when asked for that variant and pytorch_model.bin when
told to; peft and LLaVA read files of their own, others every shard that they find. What differs
there from the files that were judged has not been judged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gazeguard.errors import ModelError
from gazeguard.models.files import tensor_names

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_WEIGHTS = _PICKLES | {".safetensors", ".h5", ".msgpack", ".gguf", ".onnx"}
# What trainers leave to go on with; no loader takes a model's weights from it.
_TRAINING = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)[\w-]*\.\w+"
)

_ELSEWHERE = (
    "it is in the hub's repository and is not read: use safetensors only, or scan a folder of them"
)


@dataclass(frozen=True, slots=True)
class Unread:
    """Something of a model that was not judged.

    Attributes:
        part: file or component, relative to the model's folder.
        why: it was not, and what to do.
    """

    part: str
    why: str

    def __str__(self) -> str:
        return f"{self.part}: {self.why}"


def beside(folder: Path, read: Sequence[Path]) -> list[Path]:
    """Files of a folder, without its subfolders, that hold weights and were not read."""
    own = {file.resolve() for file in read}
    return [
        file for file in sorted(folder.iterdir()) if _is_weights(file) and file.resolve() not in own
    ]


def unread(folder: Path, read: Sequence[Path]) -> tuple[Unread, ...]:
    """Those of them that hold something else than the files read.

    A safetensors file is compared: with the same tensors, up to the rounding of either number
    format, it has been judged too. One tensor of each is in memory at a time.

    Args:
        folder: of a model, encoder or adapter; its subfolders are not looked into. In the hub's
            cache also what the repository holds and was not fetched, when the hub can be reached.
        read: the files that were judged.
    """
    found = ((file, _why(file, read)) for file in beside(folder, read))
    here = [Unread(file.name, why) for file, why in found if why]
    return (*here, *(Unread(name, _ELSEWHERE) for name in _not_fetched(folder)))


def _not_fetched(folder: Path) -> list[str]:
    """Weights of a hub repository, at the commit that a folder of the cache is of, not in there."""
    from huggingface_hub import HfApi

    commit = folder if folder.parent.name == "snapshots" else folder.parent
    cached = commit.parent.parent.name
    if commit.parent.name != "snapshots" or not cached.startswith("models--"):
        return []
    hub_id = cached.removeprefix("models--").replace("--", "/")
    try:
        names = HfApi().list_repo_files(hub_id, revision=commit.name)
    except Exception:  # no connection, of any HTTP client: no loader here can fetch them either
        return []
    files = sorted(commit / name for name in names)
    return [f.name for f in files if f.parent == folder and _is_weights(f) and not f.exists()]


def _is_weights(file: Path) -> bool:
    return file.suffix.lower() in _WEIGHTS and not _TRAINING.fullmatch(file.name)


def _why(file: Path, read: Sequence[Path]) -> str:
    """Why a file has not been judged; empty where it has."""
    if file.suffix.lower() in _PICKLES:
        return (
            "pickled weights are not opened, as they can run code: remove it, or convert it in a"
            " sandbox"
        )
    if file.suffix.lower() != ".safetensors":
        return "weights in this format are not read: remove it, or convert it to safetensors"
    try:
        other, changed = _compared(file, read)
    except ModelError:
        return "it is not a readable safetensors file: remove it, or copy it again"
    if other:
        return f"it holds {other} tensors that no other file has: remove it, or scan it apart"
    if changed:
        return f"{changed} of its tensors hold other numbers: remove it, or scan it apart"
    return ""


def same_weights(file: Path, read: Sequence[Path]) -> bool:
    """Whether all tensors of a safetensors file are in others, up to rounding.

    Raises:
        ModelError: a file cannot be read.
    """
    return _compared(file, read) == (0, 0)


def _compared(file: Path, read: Sequence[Path]) -> tuple[int, int]:
    """How many tensors of a file are in none of those read, and how many differ there."""
    places = {name: place for place in read for name in tensor_names(place)}
    # Positions are no weights: some versions save them, and all make them anew.
    names = [name for name in tensor_names(file) if not name.endswith("position_ids")]
    known = [name for name in names if name in places]
    with ExitStack() as opened:
        mine: Any = opened.enter_context(safe_open(file, framework="pt"))
        others: dict[Path, Any] = {
            place: opened.enter_context(safe_open(place, framework="pt"))
            for place in dict.fromkeys(places[name] for name in known)
        }
        changed = sum(
            not alike(mine.get_tensor(name), others[places[name]].get_tensor(name))
            for name in known
        )
    return len(names) - len(known), changed


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers, each rounded to its own format; NaN never is."""
    if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
        return False
    if not a.is_floating_point() or a.dtype == b.dtype:
        return torch.equal(a, b)
    infos = [torch.finfo(tensor.dtype) for tensor in (a, b)]
    # Half a unit in the last place of each; below the smallest normal number units are constant.
    relative = sum(info.eps for info in infos) / 2
    absolute = sum(info.tiny * info.eps for info in infos)
    a, b = a.double(), b.double()
    return bool(((a - b).abs() <= relative * torch.maximum(a.abs(), b.abs()) + absolute).all())
