"""Tiny random text encoders of every supported kind, as complete folders.

For tests and trials without a download: byte-level tokenizer, three layers of 32; whole models have
an image side and its processor too. Their outputs are noise, but every token changes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from safetensors.torch import save_file

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_VISION = {**_TEXT, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
_SQUARE = {"height": 28, "width": 28}
_CROP = {"size": {"shortest_edge": 28}, "crop_size": _SQUARE}
_SHARED = 24  # features of text and image
_SCALE = 0.2  # of the weights; the default 0.02 makes all outputs alike


def build(kind: str, folder: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write a tiny random encoder.

    Args:
        kind: one of `KINDS`.
        folder: where to; created if missing.
        seed: of the weights.

    Returns:
        The folder that `load_encoder` takes.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _BUILDERS[kind](out)
    return out


def tokenizer(length: int, begins: bool = True) -> Any:
    """A byte-level tokenizer without merges; BOS is left out where `begins` is False."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<unk>", *symbols, "<s>", "</s>"]  # EOS highest, as in CLIP
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[])
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{'<s> ' if begins else ''}$A </s>",
        special_tokens=[("<s>", len(names) - 2), ("</s>", len(names) - 1)],
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=length,
    )


def _ids(words: Any) -> dict[str, int]:
    return {
        "vocab_size": len(words),
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }


def _save(model: Any, words: Any, out: Path, images: Any = None) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, _SCALE)
    model.save_pretrained(out)
    words.save_pretrained(out)
    if images is not None:
        images.save_pretrained(out)


def _clip(out: Path, length: int = 77) -> None:
    words = tokenizer(length)
    text = {"max_position_embeddings": length, **_ids(words), **_TEXT}
    config = hf.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=_SHARED)
    _save(hf.CLIPModel(config), words, out, hf.CLIPImageProcessorPil(**_CROP))


def _clip_text(out: Path) -> None:
    words = tokenizer(77)
    _save(hf.CLIPTextModel(hf.CLIPTextConfig(**_ids(words), **_TEXT)), words, out)


def _clip_projected(out: Path) -> None:
    words = tokenizer(77)
    config = hf.CLIPTextConfig(**_ids(words), **_TEXT, projection_dim=_SHARED)
    _save(hf.CLIPTextModelWithProjection(config), words, out)


def _siglip(out: Path, family: str = "Siglip") -> None:
    words = tokenizer(64, begins=False)
    text = {"max_position_embeddings": 64, "projection_size": 32, **_ids(words), **_TEXT}
    vision = _VISION
    size: dict[str, Any] = {"size": _SQUARE}
    if family == "Siglip2":
        vision, size = {**_VISION, "num_patches": 4}, {"patch_size": 14, "max_num_patches": 4}
    config = getattr(hf, f"{family}Config")(text_config=text, vision_config=vision)
    images = getattr(hf, f"{family}ImageProcessorPil")(**size)
    _save(getattr(hf, f"{family}Model")(config), words, out, images)


def _siglip_text(out: Path) -> None:
    words = tokenizer(64, begins=False)
    _save(hf.SiglipTextModel(hf.SiglipTextConfig(**_ids(words), **_TEXT)), words, out)


def _altclip(out: Path) -> None:
    words = tokenizer(77)
    text = {"max_position_embeddings": 80, "project_dim": 32, **_ids(words), **_TEXT}
    config = hf.AltCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=_SHARED)
    _save(hf.AltCLIPModel(config), words, out, hf.CLIPImageProcessorPil(**_CROP))


def _chinese_clip(out: Path) -> None:
    words = tokenizer(52)
    text = {"max_position_embeddings": 64, **_ids(words), **_TEXT}
    config = hf.ChineseCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=_SHARED)
    images = hf.ChineseCLIPImageProcessorPil(**_CROP)
    _save(hf.ChineseCLIPModel(config), words, out, images)


def _metaclip(out: Path) -> None:
    words = tokenizer(77)
    config = hf.MetaClip2Config(
        text_config={**_ids(words), **_TEXT}, vision_config=_VISION, projection_dim=_SHARED
    )
    _save(hf.MetaClip2Model(config), words, out, hf.CLIPImageProcessorPil(**_CROP))


def _pipeline(out: Path) -> None:
    _clip_text(out / "text_encoder")
    words = out / "text_encoder"
    (out / "tokenizer").mkdir(exist_ok=True)
    for file in (*words.glob("tokenizer*"), *words.glob("special_tokens*")):
        file.rename(out / "tokenizer" / file.name)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (out / "model_index.json").write_text(json.dumps(index))


def _open_clip(out: Path) -> None:
    words = tokenizer(77)
    width, layers = _TEXT["hidden_size"], _TEXT["num_hidden_layers"]
    shapes = {
        "token_embedding.weight": (len(words), width),
        "positional_embedding": (77, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, _SHARED),
        "visual.proj": (width, _SHARED),
        "logit_scale": (),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name, size, given in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            shapes |= {f"{block}{name}weight": (size, given), f"{block}{name}bias": (size,)}
    tensors = {name: torch.randn(shape) * _SCALE for name, shape in shapes.items()}
    save_file(tensors, out / "open_clip_model.safetensors")
    text = {
        "context_length": 77,
        "vocab_size": len(words),
        "width": width,
        "heads": _TEXT["num_attention_heads"],
        "layers": layers,
    }
    settings = {"embed_dim": _SHARED, "vision_cfg": {}, "text_cfg": text, "quick_gelu": True}
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    words.save_pretrained(out)


_BUILDERS: dict[str, Callable[[Path], None]] = {
    "clip": _clip,
    "clip-text": _clip_text,
    "clip-projected": _clip_projected,
    "longclip": lambda out: _clip(out, 248),
    "siglip": _siglip,
    "siglip-text": _siglip_text,
    "siglip2": lambda out: _siglip(out, "Siglip2"),
    "altclip": _altclip,
    "chinese_clip": _chinese_clip,
    "metaclip_2": _metaclip,
    "diffusers": _pipeline,
    "open_clip": _open_clip,
}

KINDS: tuple[str, ...] = tuple(_BUILDERS)
"""Kinds that `build` can make: those covered by contract tests."""
