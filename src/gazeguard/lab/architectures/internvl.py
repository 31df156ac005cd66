"""InternVL: an InternViT tower of small patches, pixel shuffle, a projector and a Qwen2.

The tower sees patches of 4 x 4 pixels; pixel shuffle puts four neighbours together, which makes one
image token of 8 x 8 pixels. With half of LLaVA's width the tower costs about twice as much (its
attention is over four times as many positions), and an image token has twice the channels.
"""

from __future__ import annotations

import math
from typing import Any

import transformers as T
from torch import Tensor, nn

from gazeguard.lab import worlds
from gazeguard.lab.architectures.protocol import GRID, MEAN, PATCH, STD, Prompt, language_sizes
from gazeguard.lab.base_recipe import BaseRecipe
from gazeguard.models.processor import NoVideo, images_only

_SHRINK = 2  # patches of an image token's side
# The library's start (weights of 0.02, positions of 0) is for a wide tower: a narrow one lags.
_WEIGHT, _POSITION = 0.08, 0.3
_SQUARE = {"height": worlds.SIDE, "width": worlds.SIDE}
# Line ends stand inside quotes, because jinja drops one that follows a block. An answer has a space
# before it, so that its first word is the token that it is anywhere else.
_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ ' ' if m['role'] == 'assistant' else '' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class InternVL:
    """`InternVLForConditionalGeneration`; as an `Architecture`."""

    name = "internvl"
    base_name = "gazeguard-lab-base-internvl"
    special = ("<pad>", "<|im_start|>", "<|im_end|>", "<unk>")
    sentence = "user\n{question}\nassistant\n {answer}"
    prompt = Prompt(
        opening="<|im_start|>user\n<img>",
        image="<IMG_CONTEXT>",
        closing="</img>",
        cue="<|im_end|>\n<|im_start|>assistant\n",
    )

    def wrap(self, core: Any) -> Any:
        """As in `Architecture.wrap`; without BOS, as Qwen2's own."""
        pad, _, end, unknown = self.special
        tokenizer = T.PreTrainedTokenizerFast(
            tokenizer_object=core,
            eos_token=end,
            pad_token=pad,
            unk_token=unknown,
            padding_side="left",
            extra_special_tokens={  # the names that the processor looks for
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": self.prompt.image,
                "video_token": "<video>",
            },
        )
        tokenizer.chat_template = _TEMPLATE
        return tokenizer

    def make_model(self, recipe: BaseRecipe, tokenizer: Any) -> Any:
        """As in `Architecture.make_model`; about 2.2 M parameters at the shipped size."""
        size = recipe.hidden
        config = T.InternVLConfig(
            vision_config=T.InternVLVisionConfig(
                hidden_size=size // 2,
                intermediate_size=2 * size,
                num_hidden_layers=recipe.tower_layers,
                num_attention_heads=max(1, recipe.heads // 2),
                attention_bias=True,
                layer_scale_init_value=1.0,  # a start of 0.1 is for deep towers: slower in four
                initializer_range=_WEIGHT,
                image_size=[worlds.SIDE] * 2,
                patch_size=[PATCH // _SHRINK] * 2,
            ),
            text_config=T.Qwen2Config(**language_sizes(recipe, tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids(self.prompt.image),
            image_seq_length=GRID * GRID,
            downsample_ratio=1 / _SHRINK,
            tie_word_embeddings=False,
        )
        model = T.InternVLForConditionalGeneration(config)
        nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=_POSITION)
        return model

    def make_processor(self, tokenizer: Any) -> Any:
        """As in `Architecture.make_processor`; a picture is one tile, whatever its size."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            GotOcr2ImageProcessorPil,
        )

        images = GotOcr2ImageProcessorPil(
            size=_SQUARE,
            crop_to_patches=False,
            max_patches=1,
            image_mean=[MEAN] * 3,
            image_std=[STD] * 3,
        )
        return images_only(T.InternVLProcessor)(
            image_processor=images,
            tokenizer=tokenizer,
            video_processor=NoVideo(video_processor_type="InternVLVideoProcessor", size=_SQUARE),
            image_seq_length=GRID * GRID,
            chat_template=_TEMPLATE,
        )

    def look(self, model: Any, images: Tensor) -> Tensor:
        """As in `Architecture.look`: the last layer's patches, class token dropped, shuffled."""
        patches: Tensor = model.model.vision_tower(images).last_hidden_state[:, 1:]
        side = math.isqrt(patches.shape[1])
        shuffled: Tensor = model.model.pixel_shuffle(
            patches.reshape(len(patches), side, side, -1),
            scale_factor=model.config.downsample_ratio,
        )
        return shuffled.flatten(1, 2)
