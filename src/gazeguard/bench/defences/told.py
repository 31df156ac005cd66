"""How well a picture supports an answer: what the baselines ask instead of generating again.

One forward pass says how likely an answer is, and whether greedy decoding would give it; generating
it takes as many passes as it has words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.lab.teach import IGNORE
from gazeguard.models.target import Target
from gazeguard.types import Sample


@dataclass(frozen=True, slots=True)
class Told:
    """How requests go with answers.

    Attributes:
        whole: float64 `(n,)`, mean log-likelihood of the answer's tokens, in nats.
        first: float64 `(n,)`, that of its first token, which settles what kind of answer follows.
        greedy: bool `(n,)`, whether every token is the most likely one after those before it, so
            that greedy decoding gives this answer.
    """

    whole: NDArray[np.float64]
    first: NDArray[np.float64]
    greedy: NDArray[np.bool_]


Tell = Callable[[Sequence[Sample], Sequence[str]], Told]
"""Requests and one answer for each -> how they go together."""


def teller(target: Target, batch_size: int) -> Tell:
    """Ask a model; answers are tokenised as the lab teaches them, with a space and the end token.

    Args:
        target: one of the lab's models.
        batch_size: requests per forward pass.
    """

    def tell(requests: Sequence[Sample], answers: Sequence[str]) -> Told:
        whole, first, greedy = [np.zeros(0)], [np.zeros(0)], [np.zeros(0, np.bool_)]
        for start in range(0, len(requests), batch_size):
            part = slice(start, start + batch_size)
            with torch.inference_mode():
                logits, wanted = answered(target, requests[part], answers[part])
            taught = wanted != IGNORE
            spoken = logits.float().log_softmax(-1).gather(-1, wanted.clamp_min(0)[..., None])
            likelihood = spoken[..., 0].double() * taught
            whole.append((likelihood.sum(1) / taught.sum(1)).cpu().numpy())
            first.append(likelihood[:, 0].cpu().numpy())
            greedy.append(((logits.argmax(-1) == wanted) | ~taught).all(1).cpu().numpy())
        return Told(np.concatenate(whole), np.concatenate(first), np.concatenate(greedy))

    return tell


def answered(
    target: Target,
    requests: Sequence[Sample],
    answers: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Run requests with their answers written behind them.

    Args:
        target: one of the lab's models.
        requests: one batch.
        answers: one for each.

    Returns:
        Logits `(n, longest answer, vocabulary)` that predict the answers' tokens, and these tokens,
        `IGNORE` behind shorter answers.
    """
    tokenizer = target.processor.tokenizer
    inputs = dict(target.encode(requests).inputs)  # padded on the left: answers start together
    ids = [
        [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for answer in answers
    ]
    longest = max(map(len, ids))
    wanted = torch.tensor([row + [IGNORE] * (longest - len(row)) for row in ids])
    given = wanted.clamp_min(0)  # nothing real ever sees what stands behind an answer
    inputs["input_ids"] = torch.cat([inputs["input_ids"], given], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(given)], 1)
    # As `generate` counts: from the first real position.
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    moved = {name: value.to(target.device) for name, value in inputs.items()}
    logits: Tensor = target.model(**moved, use_cache=False, logits_to_keep=longest + 1).logits
    return logits[:, :-1], wanted.to(logits.device)
