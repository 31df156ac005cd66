"""What a tuned model differs in from the model it was made from, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from gazeguard.errors import ModelError
from gazeguard.models.files import adapter_files, tensor_names, weight_files
from gazeguard.models.layout import Layout

Place = tuple[Path, str]  # a file and the tensor's name there
Kind = Literal["none", "adapter", "projector", "full"]

# Bookkeeping of config.json, which says nothing about what the model computes.
_NOTES = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "image_processor_type",
        "processor_class",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
# Of what turns a picture and words into inputs; what is absent in one folder is not compared.
_INPUTS = ("preprocessor_config.json", "processor_config.json", "tokenizer.json")
_PROJECTORS = ("projector", "connector", "merger", "mlp1", "aligner", "modality_projection")


@dataclass(frozen=True, slots=True)
class Difference:
    """What was tuned.

    Attributes:
        kind: `none` (the same weights), `adapter` (the base's weights and an adapter), `projector`
            (only tensors between picture encoder and language model), or `full`.
        changed: names of tensors that differ, or that the adapter adds; sorted.
        total: number of tensors of the base.
    """

    kind: Kind
    changed: tuple[str, ...]
    total: int

    def __str__(self) -> str:
        if self.kind == "none":
            return "the base's own weights"
        if self.kind == "adapter":
            return f"an adapter of {len(self.changed)} tensors"
        where = "all in the projector" if self.kind == "projector" else "a full fine-tune"
        return f"{len(self.changed)} of {self.total} tensors, {where}"


def adapter_difference(adapter: Path, base: Path) -> Difference:
    """What an adapter adds to its base; only headers are read."""
    names = sorted(name for file in adapter_files(adapter) for name in tensor_names(file))
    total = sum(len(tensor_names(file)) for file in weight_files(base))
    return Difference("adapter", tuple(names), total)


def compare(suspect: Path, base: Path, name: str) -> Difference:
    """Compare two whole models; one tensor of each is in memory at a time.

    Args:
        suspect: folder of the tuned model.
        base: folder of the model it should have been made from.
        name: what the user called the suspect.

    Raises:
        ModelError: another architecture, tokenizer or image processing, or other tensors.
    """
    _same_settings(suspect, base, name)
    mine, theirs = _places(suspect), _places(base)
    if mine.keys() != theirs.keys():
        layout = _layout(base)
        mine, theirs = ({layout.moved(k): at for k, at in p.items()} for p in (mine, theirs))
    if mine.keys() != theirs.keys():
        odd = mine.keys() ^ theirs.keys()
        raise ModelError(
            f"{name} and its reference do not have the same tensors (one of them lacks"
            f" {in_words(odd)}): give the model that it was made from as --reference."
        )
    changed = tuple(key for key, same in _compared(mine, theirs, name) if not same)
    if not changed:
        kind: Kind = "none"
    elif all(any(part in key for part in _PROJECTORS) for key in changed):
        kind = "projector"
    else:
        kind = "full"
    return Difference(kind, changed, len(theirs))


def _places(folder: Path) -> dict[str, Place]:
    """Where every tensor is."""
    return {name: (file, name) for file in weight_files(folder) for name in tensor_names(file)}


def _layout(folder: Path) -> Layout:
    """Of the model that a config describes, without its weights."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return Layout(transformers.AutoModelForImageTextToText.from_config(config))


def _compared(
    mine: dict[str, Place], theirs: dict[str, Place], name: str
) -> Iterator[tuple[str, bool]]:
    import torch

    opened: dict[Path, Any] = {}

    def tensor(place: Place) -> torch.Tensor:
        file, key = place
        if file not in opened:
            opened[file] = safe_open(file, framework="pt")
        return opened[file].get_tensor(key)  # type: ignore[no-any-return]

    for key in sorted(mine):
        a, b = tensor(mine[key]), tensor(theirs[key])
        if a.shape != b.shape:
            raise ModelError(
                f"{name} and its reference differ in the shape of {in_words([key])}"
                f" ({list(a.shape)}, {list(b.shape)}): give the model that it was made from as"
                " --reference."
            )
        if a.dtype != b.dtype:  # saved again in another number format
            narrow = min((a.dtype, b.dtype), key=lambda dtype: dtype.itemsize)
            a, b = a.to(narrow), b.to(narrow)
        yield key, torch.equal(a, b)


def _same_settings(suspect: Path, base: Path, name: str) -> None:
    mine, theirs = (_bare(_json(folder / "config.json", name)) for folder in (suspect, base))
    if mine != theirs:
        keys = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
        raise ModelError(
            f"{name} has another architecture than its reference (config.json differs in"
            f" {', '.join(keys[:3])}): give the model that it was made from as --reference."
        )
    for file in _INPUTS:
        pair = [folder / file for folder in (suspect, base)]
        if not all(path.is_file() for path in pair):
            continue
        a, b = (path.read_bytes() for path in pair)
        if a != b and _bare(_json(pair[0], name)) != _bare(_json(pair[1], name)):
            what = "tokenizer" if file.startswith("tokenizer") else "image processing"
            raise ModelError(
                f"{name} has another {what} than its reference ({file} differs): give the model"
                " that it was made from as --reference."
            )


def _json(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} has no readable {path.name}: copy the model again.") from error


def _bare(value: Any) -> Any:
    """Without bookkeeping, at any depth."""
    if isinstance(value, dict):
        return {k: _bare(v) for k, v in value.items() if k not in _NOTES}
    return [_bare(v) for v in value] if isinstance(value, list) else value


def tuned_parts(changed: Collection[str]) -> dict[str, int]:
    """How many of the changed tensors lie in the projector, the vision part and elsewhere."""
    parts = {"projector": 0, "vision": 0, "language": 0}
    for name in changed:
        if any(part in name for part in _PROJECTORS):
            parts["projector"] += 1
        elif "vision" in name or "visual" in name:
            parts["vision"] += 1
        else:
            parts["language"] += 1
    return parts


def in_words(names: Collection[str]) -> str:
    """How many tensors, and of which part of a model: `4 tensors (of the projector)`."""
    parts = tuned_parts(names)
    told = {
        "projector": "the projector",
        "vision": "the vision part",
        "language": "the language model",
    }
    where = [told[part] for part, count in parts.items() if count]
    if len(where) > 1:
        where = [f"{parts[part]} of {told[part]}" for part, count in parts.items() if count]
        return f"{len(names)} tensors ({', '.join(where)})"
    plural = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {plural} of {where[0]}"
