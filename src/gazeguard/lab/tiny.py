"""Tiny random models of every supported family, as complete folders that reload with Auto classes.

For tests and trials without a download: about 0.1 M parameters each, byte-level tokenizer, the
family's own processor and a chat template with the family's habits (BOS in the template, trimmed
text, a default system prompt, no template at all). Their answers are noise; their attention is not
uniform.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf

_SIDE = 28  # pixels of one image tile
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": _SIDE,
}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
_SQUARE = {"height": _SIDE, "width": _SIDE}

_PARTS = (
    "{%% for c in m['content'] %%}{%% if c['type'] == 'image' %%}%s{%% else %%}%s"
    "{%% endif %%}{%% endfor %%}"
)


def _template(
    image: str, text: str, before: str, after: str, start: str = "", answer: str = ""
) -> str:
    """A chat template: `before` parts `after` for each message, then `answer`."""
    # Inside quotes, because jinja drops a line end that follows a block.
    after = f"{{{{ '{after}' }}}}"
    return (
        f"{start}{{% for m in messages %}}{before}{_PARTS % (image, text)}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )


_LLAVA_CHAT = _template(
    "<image>\n",
    "{{ c['text'] }}",
    "{{ m['role'] | upper }}: ",
    "\n",
    answer="ASSISTANT:",
)
_QWEN_CHAT = _template(
    "<|vision_start|><|image_pad|><|vision_end|>",
    "{{ c['text'] }}",
    "<|im_start|>{{ m['role'] }}\n",
    "<|im_end|>\n",
    start="{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}",
    answer="<|im_start|>assistant\n",
)
_INTERN_CHAT = _template(
    "<IMG_CONTEXT>\n",
    "{{ c['text'] }}",
    "<|im_start|>{{ m['role'] }}\n",
    "<|im_end|>\n",
    answer="<|im_start|>assistant\n",
)
_IDEFICS_CHAT = _template(
    "<image>",
    "{{ c['text'] }}",
    "{{ m['role'] | capitalize }}: ",
    "<end_of_utterance>\n",
    start="{{ bos_token }}",
    answer="Assistant:",
)
_GEMMA_CHAT = _template(
    "<start_of_image>",
    "{{ c['text'] | trim }}",
    "<start_of_turn>{{ m['role'] }}\n",
    "<end_of_turn>\n",
    start="{{ bos_token }}",
    answer="<start_of_turn>model\n",
)


def build(family: str, folder: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write a tiny random model of a family.

    Args:
        family: one of `FAMILIES`.
        folder: where to; created if missing.
        seed: of the weights.

    Returns:
        The folder, with config, safetensors weights, tokenizer, processor and chat template.
    """
    make = _BUILDERS[family]
    out = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor, video = make()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0.0, 0.15)  # the default 0.02 gives flat attention
    model.generation_config = hf.GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    if video:  # part of the family's processor, though made without torchvision
        file = out / "processor_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "video_processor": video}, indent=2) + "\n")
    return out


Built = tuple[Any, Any, dict[str, Any] | None]


def _tokenizer(
    special: Sequence[str] = (), named: dict[str, str] | None = None, chat: str | None = None
) -> Any:
    """Byte-level tokenizer without merges: 256 byte symbols and special tokens, lossless."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {s: i for i, s in enumerate(["<pad>", "<s>", "</s>", "<unk>", *symbols])}
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=named or {},
    )
    if special:
        fast.add_tokens(list(special), special_tokens=True)
    fast.chat_template = chat
    return fast


def _image_processor(name: str, **settings: Any) -> Any:
    """An image processor on Pillow, the same with and without torchvision."""
    return getattr(hf, f"{name}Pil")(**settings)


def _llava() -> Built:
    tokenizer = _tokenizer(["<image>"], chat=_LLAVA_CHAT)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION, patch_size=14, projection_dim=32),
        text_config=hf.LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=4,
    )
    processor = hf.LlavaProcessor(
        image_processor=_image_processor(
            "CLIPImageProcessor", size={"shortest_edge": _SIDE}, crop_size=_SQUARE
        ),
        tokenizer=tokenizer,
        chat_template=_LLAVA_CHAT,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return hf.LlavaForConditionalGeneration(config), processor, None


def _llava_next() -> Built:
    tokenizer = _tokenizer(["<image>"], chat=_LLAVA_CHAT)
    pinpoints = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION, patch_size=14, projection_dim=32),
        text_config=hf.MistralConfig(vocab_size=len(tokenizer), sliding_window=None, **_TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=pinpoints,
        image_seq_length=4,
    )
    processor = hf.LlavaNextProcessor(
        image_processor=_image_processor(
            "LlavaNextImageProcessor",
            size={"shortest_edge": _SIDE},
            crop_size=_SQUARE,
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=tokenizer,
        chat_template=_LLAVA_CHAT,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor, None


def _qwen(
    config_class: Any, model_class: Any, processor_class: Any, patch: int, video: str
) -> Built:
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = _tokenizer([*marks, "<|im_start|>", "<|im_end|>"], chat=_QWEN_CHAT)
    image, movie, start, end = tokenizer.convert_tokens_to_ids(list(marks))
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text: dict[str, Any] = {"vocab_size": len(tokenizer), **_TEXT}
    if patch == 16:  # Qwen3-VL
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        text["rope_parameters"] = {**_MROPE, "mrope_interleaved": True}
    else:
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        text["rope_parameters"] = _MROPE
        del text["head_dim"]
    config = config_class(
        vision_config=vision,
        text_config=text,
        image_token_id=image,
        video_token_id=movie,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    area = (2 * patch) ** 2
    cut: dict[str, Any] = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    processor = _images_only(
        processor_class,
        image_processor=_image_processor(
            "Qwen2VLImageProcessor", **cut, size={"shortest_edge": area, "longest_edge": 16 * area}
        ),
        tokenizer=tokenizer,
        chat_template=_QWEN_CHAT,
    )
    return model_class(config), processor, {"video_processor_type": video, **cut}


def _qwen2_5_vl() -> Built:
    return _qwen(
        hf.Qwen2_5_VLConfig,
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLProcessor,
        14,
        "Qwen2VLVideoProcessor",
    )


def _qwen3_vl() -> Built:
    return _qwen(
        hf.Qwen3VLConfig,
        hf.Qwen3VLForConditionalGeneration,
        hf.Qwen3VLProcessor,
        16,
        "Qwen3VLVideoProcessor",
    )


def _internvl() -> Built:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(["<|im_start|>", "<|im_end|>"], named, _INTERN_CHAT)
    config = hf.InternVLConfig(
        vision_config={**_VISION, "image_size": [_SIDE, _SIDE], "patch_size": [7, 7]},
        text_config=hf.Qwen2Config(vocab_size=len(tokenizer), **_TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    processor = _images_only(
        hf.InternVLProcessor,
        image_processor=_image_processor(
            "GotOcr2ImageProcessor",
            size=_SQUARE,
            crop_to_patches=True,
            min_patches=1,
            max_patches=2,
        ),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=_INTERN_CHAT,
    )
    video = {"video_processor_type": "InternVLVideoProcessor", "size": _SQUARE}
    return hf.InternVLForConditionalGeneration(config), processor, video


def _idefics(config_class: Any, model_class: Any, image_processor: str) -> tuple[Any, Any, Any]:
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    tokenizer = _tokenizer([*marks, *cells], chat=_IDEFICS_CHAT)
    config = config_class(
        vision_config={**_VISION, "patch_size": 7},
        text_config=hf.LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    images = _image_processor(
        image_processor,
        size={"longest_edge": 2 * _SIDE},
        max_image_size={"longest_edge": _SIDE},
        do_image_splitting=True,
    )
    return model_class(config), tokenizer, images


def _idefics3() -> Built:
    model, tokenizer, images = _idefics(
        hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, "Idefics3ImageProcessor"
    )
    processor = hf.Idefics3Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_len=4, chat_template=_IDEFICS_CHAT
    )
    return model, processor, None


def _smolvlm() -> Built:
    model, tokenizer, images = _idefics(
        hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, "SmolVLMImageProcessor"
    )
    processor = _images_only(
        hf.SmolVLMProcessor,
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=_IDEFICS_CHAT,
    )
    video = {
        "video_processor_type": "SmolVLMVideoProcessor",
        "size": {"longest_edge": _SIDE},
        "max_image_size": {"longest_edge": _SIDE},
    }
    return model, processor, video


def _paligemma() -> Built:
    tokenizer = _tokenizer(named={"image_token": "<image>"})
    images = _image_processor("SiglipImageProcessor", size=_SQUARE)
    images.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
    words = len(tokenizer)  # the processor has added location and segmentation tokens
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**_VISION, patch_size=14),
        text_config=hf.GemmaConfig(vocab_size=words, **_TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vocab_size=words,
        projection_dim=32,
        hidden_size=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor, None


def _gemma3() -> Built:
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = _tokenizer(["<start_of_turn>", "<end_of_turn>"], named, _GEMMA_CHAT)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**_VISION, patch_size=7, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(
            vocab_size=len(tokenizer),
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"] * 2,
            **_TEXT,
        ),
        mm_tokens_per_image=4,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
    )
    processor = hf.Gemma3Processor(
        image_processor=_image_processor("Gemma3ImageProcessor", size=_SQUARE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=_GEMMA_CHAT,
    )
    return hf.Gemma3ForConditionalGeneration(config), processor, None


def _images_only(processor_class: Any, **parts: Any) -> Any:
    """Make a processor without its video part, which needs torchvision to exist."""
    from gazeguard.models.processor import NoVideo, images_only

    return images_only(processor_class)(**parts, video_processor=NoVideo())


_BUILDERS: dict[str, Callable[[], Built]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
}

FAMILIES: tuple[str, ...] = tuple(_BUILDERS)
"""Families that `build` can make: those covered by contract tests."""
