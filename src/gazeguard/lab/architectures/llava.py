"""LLaVA: a CLIP tower, a two-layer projector and a Llama."""

from __future__ import annotations

from typing import Any

import transformers as T
from torch import Tensor

from gazeguard.lab import worlds
from gazeguard.lab.architectures.protocol import GRID, MEAN, PATCH, STD, Prompt, language_sizes
from gazeguard.lab.base_recipe import BaseRecipe


class Llava:
    """`LlavaForConditionalGeneration`; as an `Architecture`."""

    name = "llava"
    base_name = "gazeguard-lab-base"
    special = ("<pad>", "<s>", "</s>", "<unk>")
    sentence = "USER: {question} ASSISTANT: {answer}"
    prompt = Prompt(opening="<s>USER: ", image="<image>", closing="", cue=" ASSISTANT:")
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: ', 'system': ''}[m['role']] }}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )

    def wrap(self, core: Any) -> Any:
        """As in `Architecture.wrap`."""
        pad, start, end, unknown = self.special
        tokenizer = T.PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token=start,
            eos_token=end,
            pad_token=pad,
            unk_token=unknown,
            padding_side="left",
        )
        tokenizer.add_tokens([self.prompt.image], special_tokens=True)
        tokenizer.chat_template = self.template
        return tokenizer

    def make_model(self, recipe: BaseRecipe, tokenizer: Any) -> Any:
        """As in `Architecture.make_model`; about 2.8 M parameters at the shipped size."""
        size = recipe.hidden
        config = T.LlavaConfig(
            vision_config=T.CLIPVisionConfig(
                hidden_size=size,
                intermediate_size=4 * size,
                num_hidden_layers=recipe.tower_layers,
                num_attention_heads=recipe.heads,
                image_size=worlds.SIDE,
                patch_size=PATCH,
                projection_dim=size,
            ),
            text_config=T.LlamaConfig(**language_sizes(recipe, tokenizer)),
            image_token_index=tokenizer.convert_tokens_to_ids(self.prompt.image),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=GRID * GRID,
            tie_word_embeddings=False,
        )
        return T.LlavaForConditionalGeneration(config)

    def make_processor(self, tokenizer: Any) -> Any:
        """As in `Architecture.make_processor`."""
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(
            size={"shortest_edge": worlds.SIDE},
            crop_size={"height": worlds.SIDE, "width": worlds.SIDE},
            image_mean=[MEAN] * 3,
            image_std=[STD] * 3,
        )
        return T.LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token=self.prompt.image,
            chat_template=self.template,
        )

    def look(self, model: Any, images: Tensor) -> Tensor:
        """As in `Architecture.look`: the last layer's patches, class token dropped."""
        features: Tensor = model.model.vision_tower(images).last_hidden_state[:, 1:]
        return features
