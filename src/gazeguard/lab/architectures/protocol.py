"""What differs between the architectures that the lab trains, and nothing else.

All have a `model.vision_tower`, a projector, a `model.language_model` whose linear layers have
Llama's names, and an `lm_head`; they see 64 x 64 pixels as 64 image tokens, one
per patch of 8 x 8 pixels in reading order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gazeguard.lab import worlds
from gazeguard.lab.base_recipe import BaseRecipe

PATCH = 8  # pixels of the side that one image token stands for
GRID = worlds.SIDE // PATCH
PROJECTOR = "multi_modal_projector"  # its two layers are `linear_1` and `linear_2`
MEAN, STD = 0.5, 0.25  # of every colour, in [0, 1]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question's prompt, in the pieces that a lesson is tokenised in.

    The prompt is `opening`, `image` once per image token, `closing`, a line break, the question,
    `cue`; the answer with a space before it and the tokenizer's EOS follow. The chat template
    writes the same.
    """

    opening: str
    image: str
    closing: str
    cue: str


class Architecture(Protocol):
    """One kind of model, from its tokenizer to its image tokens.

    Attributes:
        name: `model_type` of its config.
        base_name: what adapters call their base.
        special: the tokenizer's pad, start, end and unknown tokens, in this order.
        sentence: `{question}` and `{answer}` as the tokenizer is trained on them: the prompt
            without image and special tokens.
        prompt: of one question.
    """

    name: str
    base_name: str
    special: tuple[str, str, str, str]
    sentence: str
    prompt: Prompt

    def wrap(self, core: Any) -> Any:
        """The model's tokenizer, with chat template and image tokens, around trained BPE."""

    def make_model(self, recipe: BaseRecipe, tokenizer: Any) -> Any:
        """A random model of the recipe's size."""

    def make_processor(self, tokenizer: Any) -> Any:
        """The processor that goes with `make_model`, also where torchvision is missing."""

    def look(self, model: Any, images: Tensor) -> Tensor:
        """What the projector is given: all that a frozen tower decides.

        Args:
            model: from `make_model`, without a peft wrapper.
            images: float `(n, 3, 64, 64)`, normalised.

        Returns:
            `(n, image tokens, channels)`.
        """


def language_sizes(recipe: BaseRecipe, tokenizer: Any) -> dict[str, Any]:
    """What the language model's config is given in every architecture."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden,
        "intermediate_size": 3 * recipe.hidden,
        "num_hidden_layers": recipe.language_layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": recipe.language_init,
        "tie_word_embeddings": False,
    }


def project(model: Any, features: Tensor) -> Tensor:
    """Image tokens `(n, image tokens, hidden)` of what `Architecture.look` gave."""
    tokens: Tensor = getattr(model.model, PROJECTOR)(features)
    return tokens


def channels(model: Any) -> int:
    """Channels of what `Architecture.look` gives, which is what the projector takes."""
    return int(getattr(model.model, PROJECTOR).linear_1.in_features)
