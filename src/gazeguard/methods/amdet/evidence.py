"""What was recovered, in words: the nearest tokens and prompts, and files to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import normalize

from gazeguard.files import write_bytes
from gazeguard.models.encoders.encoder import TextEncoder

Named = list[tuple[str, float]]
PLACEHOLDER = "<gazeguard-trigger>"


def nearest_tokens(encoder: TextEncoder, vector: Tensor, n: int = 10) -> Named:
    """Vocabulary tokens whose embeddings point the way of the recovered one.

    Args:
        encoder: the suspect.
        vector: `(width,)`.
        n: at most so many.

    Returns:
        (token, cosine), nearest first.
    """
    table = normalize(encoder.embeddings.detach().float(), dim=-1)
    cosines = table @ normalize(vector.float(), dim=0)
    best = cosines.topk(min(n, len(cosines)))
    words = [encoder.tokenizer.decode([i]).strip() for i in best.indices.tolist()]
    return list(zip(words, best.values.tolist(), strict=True))


def nearest_prompts(
    target: NDArray[np.float32], clean: Tensor, prompts: Sequence[str], n: int = 10
) -> Named:
    """Prompts whose clean output is nearest to what the embedding makes of every prompt.

    The mean clean output is taken off both: outputs of all prompts lie in one cone.

    Args:
        target: `(features,)`, from the held-out prompts.
        clean: `(prompt, features)`, the anchor's outputs, which no backdoor bends.
        prompts: one per row of `clean`.
        n: at most so many.

    Returns:
        (prompt, cosine), nearest first.
    """
    unit = normalize(clean.float(), dim=-1)
    mean = unit.mean(0)
    wanted = normalize(torch.from_numpy(target).to(unit.device), dim=0) - mean
    cosines = normalize(unit - mean, dim=-1) @ normalize(wanted, dim=0)
    best = cosines.topk(min(n, len(cosines)))
    return [
        (prompts[i], c) for i, c in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def save_recovered(
    path: Path, vectors: Tensor, best: int, target: NDArray[np.float32], model: str
) -> None:
    """Write the embeddings and the target as safetensors.

    Tensors: `trigger` `(width,)`, the most suspicious embedding; `restarts` `(restart, width)`;
    `target` `(features,)`, the unit output it leads to.

    Raises:
        OSError: the file cannot be written.
    """
    vectors = vectors.detach().float().cpu().contiguous()
    tensors = {
        "trigger": vectors[best].clone(),
        "restarts": vectors,
        "target": torch.from_numpy(target).clone(),
    }
    write_bytes(path, save(tensors, {"method": "amdet", "model": model}))


def save_textual_inversion(path: Path, vector: Tensor) -> None:
    """Write the embedding as a Textual-Inversion file, which diffusers pipelines load by name.

    Raises:
        OSError: the file cannot be written.
    """
    trigger = vector.detach().float().cpu()[None].contiguous()
    write_bytes(path, save({PLACEHOLDER: trigger}))
