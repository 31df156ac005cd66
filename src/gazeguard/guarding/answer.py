"""Guarded answers, for callers who do not run `generate` themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gazeguard.errors import RefusedError
from gazeguard.guarding.guard import Guard
from gazeguard.guarding.verdict import GuardVerdict
from gazeguard.guarding.watch import Mode
from gazeguard.types import Outcome, Sample


@dataclass(frozen=True, slots=True)
class Guarded:
    """One answered request. `answer` is None when the guard refused it."""

    answer: str | None
    verdict: GuardVerdict


def answer(
    guard: Guard,
    samples: Sequence[Sample],
    *,
    mode: Mode = "purify",
    max_new_tokens: int = 128,
    fail_closed: bool = False,
) -> list[Guarded]:
    """Answer a batch of samples with greedy decoding under a guard.

    Args:
        guard: of the model that answers.
        samples: one batch.
        mode: as in `Guard.watch`; with `block`, flagged samples get no answer and the others do.
        max_new_tokens: where answers are cut off.
        fail_closed: samples that could not be judged get no answer either.

    Raises:
        RowError: a sample that the model cannot take.
    """
    target = guard.target
    encoded = target.encode(samples)
    inputs = {name: value.to(target.device) for name, value in encoded.inputs.items()}
    try:
        with guard.watch(mode, encoded=encoded, fail_closed=fail_closed) as w:
            written = target.base.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    except RefusedError as error:
        refused = [_refused(verdict, mode, fail_closed) for verdict in error.verdicts]
        rest = [sample for sample, out in zip(samples, refused, strict=True) if not out]
        again = partial(
            answer, guard, mode=mode, max_new_tokens=max_new_tokens, fail_closed=fail_closed
        )
        others = iter(again(rest) if rest else ())
        return [
            Guarded(None, verdict) if out else next(others)
            for verdict, out in zip(error.verdicts, refused, strict=True)
        ]
    prompt = encoded.inputs["input_ids"].shape[1]
    texts = target.processor.tokenizer.batch_decode(written[:, prompt:], skip_special_tokens=True)
    return [Guarded(text.strip(), v) for text, v in zip(texts, w.verdicts, strict=True)]


def _refused(verdict: GuardVerdict, mode: Mode, fail_closed: bool) -> bool:
    if verdict.outcome is Outcome.FLAGGED:
        return mode == "block"
    return fail_closed and verdict.applicable and verdict.outcome is Outcome.INCONCLUSIVE
