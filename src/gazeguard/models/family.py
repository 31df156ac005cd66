"""What differs between model families, as little as it is: one small class per exception.

A family knows how a conversation becomes prompt text and how its image tokens lie in a grid. It
knows nothing of methods. Most families need only `Family` itself; a family that differs has a file
of its own and a line in `registry.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gazeguard.errors import ModelError

Message = dict[str, Any]


class Family:
    """The generic vision-language model: one decoder, image tokens among its input ids.

    Attributes:
        answer_type: `token_type_ids` of an answer's tokens, where the model has such.
        sees_ahead: whether a prompt's words see those after them.
    """

    answer_type = 0
    sees_ahead = False

    def __init__(self, name: str) -> None:
        self.name = name

    def render(self, processor: Any, messages: Sequence[Message]) -> str:
        """Write a conversation as prompt text, ready for the answer.

        Args:
            processor: the model's processor.
            messages: chat messages whose `content` is a list of `image` and `text` parts.

        Raises:
            ModelError: the processor has no chat template.
        """
        if getattr(processor, "chat_template", None) is None:
            raise ModelError(
                f"this {self.name} model has no chat template, so its prompts cannot be written:"
                " put the template it was trained with into its folder as chat_template.jinja."
            )
        text: str = processor.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
        return text

    def grid(
        self, processor: Any, config: Any, inputs: Mapping[str, Tensor], image: int, tokens: int
    ) -> tuple[int, int] | None:
        """Rows and columns of one image's tokens, or None when they are not one plain grid.

        Args:
            processor: the model's processor.
            config: the model's config.
            inputs: the processor's output for the batch.
            image: place of the image among all images of the batch.
            tokens: number of image tokens of this image, all next to each other.
        """
        shape = inputs.get("image_grid_thw")
        if shape is not None:
            merge = int(processor.image_processor.merge_size)
            _, rows, columns = (int(n) for n in shape[image])
            return _if_full(rows // merge, columns // merge, tokens)
        for attribute in ("image_seq_length", "image_seq_len"):
            per_tile = getattr(processor, attribute, None)
            if per_tile is not None:  # more tokens than one tile has: the image was cut up
                side = math.isqrt(tokens)
                return _if_full(side, side, tokens) if tokens == int(per_tile) else None
        pixels, patch = inputs.get("pixel_values"), getattr(processor, "patch_size", None)
        if pixels is None or pixels.ndim != 4 or patch is None:
            return None
        return _if_full(pixels.shape[-2] // patch, pixels.shape[-1] // patch, tokens)


def _if_full(rows: int, columns: int, tokens: int) -> tuple[int, int] | None:
    return (rows, columns) if rows * columns == tokens else None
