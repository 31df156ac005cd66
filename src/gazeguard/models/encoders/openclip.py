"""open_clip checkpoints, read without the open_clip package.

The text tower of open_clip's CLIP is the transformers one under other names, with query, key and
value in one matrix. Renaming it spares users a dependency that brings torchvision along.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from gazeguard.errors import ModelError
from gazeguard.models.files import tensor_names

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
_BLOCK = "transformer.resblocks."
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
# Settings of a text tower that the transformers class can follow.
_FOLLOWED = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_IRRELEVANT = {"hf_tokenizer_name", "tokenizer_kwargs"}


def is_open_clip(folder: Path) -> bool:
    """Whether a folder holds an open_clip model that is not in transformers' form as well."""
    return (folder / _CONFIG).is_file() and not (folder / "config.json").is_file()


def weights(folder: Path, name: str) -> Path:
    """The file that is read.

    Raises:
        ModelError: there is none in safetensors.
    """
    file = next((folder / w for w in _WEIGHTS if (folder / w).is_file()), None)
    if file is None:
        raise ModelError(
            f"{name} has no {_WEIGHTS[0]}, and pickled weights are not opened: save the model with"
            " safetensors."
        )
    return file


def load(folder: Path, name: str) -> tuple[Any, Any]:
    """The text tower and its projection as transformers modules, float32.

    Raises:
        ModelError: a tower of another design, pickled weights, or tensors that do not fit.
    """
    settings = _settings(folder, name)
    file = weights(folder, name)
    tensor_names(file)  # its header can be read
    stored = load_file(file)
    prefix = "text." if "text.token_embedding.weight" in stored else ""
    tower = {
        key.removeprefix(prefix): value
        for key, value in stored.items()
        if key.startswith(prefix) and not key.startswith("visual.")
    }
    text = settings["text_cfg"]
    width = int(text["width"])
    config = transformers.CLIPTextConfig(
        vocab_size=int(text["vocab_size"]),
        hidden_size=width,
        intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
        num_hidden_layers=int(text["layers"]),
        num_attention_heads=int(text["heads"]),
        max_position_embeddings=int(text["context_length"]),
        hidden_act="quick_gelu" if settings.get("quick_gelu") else "gelu",
        projection_dim=int(settings["embed_dim"]),
        # 2 makes transformers pool at the highest id, as open_clip does.
        eos_token_id=2,
    )
    model = transformers.CLIPTextModelWithProjection(config)
    try:
        model.text_model.load_state_dict(_renamed(tower), strict=True)
        model.text_projection.weight.data.copy_(tower["text_projection"].T)
    except (RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"the weights of {name} do not fit its {_CONFIG} ({first}): copy both from the same"
            " model."
        ) from error
    return model.text_model, model.text_projection


def _settings(folder: Path, name: str) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / _CONFIG).read_text("utf-8"))["model_cfg"]
        text = settings["text_cfg"]
        needed = [text[key] for key in ("context_length", "vocab_size", "width", "heads", "layers")]
        sized = all(isinstance(value, int) for value in [*needed, settings["embed_dim"]])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / _CONFIG} is no open_clip config: copy it again.") from error
    other = sorted(set(text) - _FOLLOWED - _IRRELEVANT)
    if other or not sized:
        raise ModelError(
            f"the text tower of {name} has settings that only open_clip follows"
            f" ({', '.join(other) or 'sizes'}): give the same model in transformers' form."
        )
    return settings


def _renamed(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, value in tower.items():
        if key in _OUTSIDE:
            named[_OUTSIDE[key]] = value
        elif key.startswith(_BLOCK):
            layer, _, rest = key.removeprefix(_BLOCK).partition(".")
            home = f"encoder.layers.{layer}."
            part, _, leaf = rest.rpartition(".")
            if leaf in ("in_proj_weight", "in_proj_bias"):
                kind = leaf.removeprefix("in_proj_")
                for name, piece in zip("qkv", torch.chunk(value, 3), strict=True):
                    named[f"{home}self_attn.{name}_proj.{kind}"] = piece
            else:
                named[f"{home}{_IN_BLOCK.get(part, part)}.{leaf}"] = value
    return named
