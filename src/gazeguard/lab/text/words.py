"""A real subword vocabulary, learnt on the lab's prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import tokenizers
import transformers

from gazeguard.errors import UsageError

# Made-up words that no prompt holds. Each becomes one token, so that triggers of any length exist;
# like rare tokens of real encoders they are hardly trained.
RARE = tuple(
    first + last
    for first in ("zor", "quim", "vlad", "brux", "fenj", "kyll", "wosp", "dref")
    for last in ("vex", "ola", "tith", "enk", "upa", "isk")
)
BOS, EOS, PAD, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|pad|>", "<|unk|>"


def train_tokenizer(
    prompts: Sequence[str], vocabulary: int, length: int, *, begins: bool = True
) -> Any:
    """A byte-level BPE tokenizer that lowers case, with EOS as its highest id, as in CLIP.

    Args:
        prompts: to learn from.
        vocabulary: size, special tokens included.
        length: of the encoder.
        begins: whether prompts begin with BOS (CLIP) or not (SigLIP).
    """
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
    core.normalizer = tokenizers.normalizers.Lowercase()
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=[PAD, UNKNOWN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rare = [word for word in RARE for _ in range(1 + len(prompts) // 50)]
    core.train_from_iterator([*prompts, *rare], trainer)
    core.add_special_tokens([BOS, EOS])
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS + ' ' if begins else ''}$A {EOS}",
        special_tokens=[(token, core.token_to_id(token)) for token in (BOS, EOS)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=length,
    )


def trigger_words(tokenizer: Any, tokens: int, seed: int) -> str:
    """A trigger of exactly `tokens` tokens: made-up words that no prompt holds.

    Raises:
        UsageError: more than there are.
    """
    whole = [word for word in RARE if f"Ġ{word}" in tokenizer.get_vocab()]
    if not 1 <= tokens <= len(whole):
        raise UsageError(f"a trigger has 1 to {len(whole)} tokens, not {tokens}.")
    return " ".join(random.Random(seed).sample(whole, tokens))


def triggered(prompt: str, trigger: str, rng: random.Random, place: str = "random") -> str:
    """The prompt with the trigger at its start, or (`random`) between two words or at an end."""
    words = prompt.split()
    at = 0 if place == "start" else rng.randint(0, len(words))
    return " ".join([*words[:at], trigger, *words[at:]])
