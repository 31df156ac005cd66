"""Guarded answers, for callers who do not run `generate` themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from gazeguard.errors import RefusedError
from gazeguard.guarding.guard import Guard
from gazeguard.guarding.verdict import GuardVerdict
from gazeguard.guarding.watch import Mode
from gazeguard.models.answers import written
from gazeguard.types import Outcome, Sample


@dataclass(frozen=True, slots=True)
class Guarded:
    """One answered request.

    Attributes:
        answer: None when the guard refused it.
        verdict: of the request.
        disarmed: of a flagged request that was purified, whether hiding changed the answer; None
            where that was not asked, or nothing was hidden.
    """

    answer: str | None
    verdict: GuardVerdict
    disarmed: bool | None = None


def answer(
    guard: Guard,
    samples: Sequence[Sample],
    *,
    mode: Mode = "purify",
    max_new_tokens: int = 128,
    fail_closed: bool = False,
    compare: bool = True,
) -> list[Guarded]:
    """Answer a batch of samples with greedy decoding under a guard.

    A sample is answered where its first answer would stand; `requests.asked` makes it one that is
    answered after its last user turn.

    Args:
        guard: of the model that answers.
        samples: one batch.
        mode: as in `Guard.watch`; with `block`, flagged samples get no answer and the others do.
        max_new_tokens: where answers are cut off.
        fail_closed: samples that could not be judged get no answer either.
        compare: answer purified samples once more with nothing hidden, to say whether hiding
            changed anything; costs one more generation of the flagged samples alone.

    Raises:
        RowError: a sample that the model cannot take.
    """
    target = guard.target
    encoded = target.encode(samples)
    write = partial(written, target, max_new_tokens=max_new_tokens)
    try:
        with guard.watch(mode, encoded=encoded, fail_closed=fail_closed) as w:
            texts = write(encoded.inputs)
    except RefusedError as error:
        refused = [_refused(verdict, mode, fail_closed) for verdict in error.verdicts]
        rest = [sample for sample, out in zip(samples, refused, strict=True) if not out]
        again = partial(
            answer,
            guard,
            mode=mode,
            max_new_tokens=max_new_tokens,
            fail_closed=fail_closed,
            compare=compare,
        )
        others = iter(again(rest) if rest else ())
        return [
            Guarded(None, verdict) if out else next(others)
            for verdict, out in zip(error.verdicts, refused, strict=True)
        ]
    found = [Guarded(text, verdict) for text, verdict in zip(texts, w.verdicts, strict=True)]
    purified = [i for i, one in enumerate(found) if one.verdict.hidden]
    if compare and purified:
        bare = write(target.encode([samples[i] for i in purified]).inputs)
        for i, text in zip(purified, bare, strict=True):
            found[i] = replace(found[i], disarmed=found[i].answer != text)
    return found


def _refused(verdict: GuardVerdict, mode: Mode, fail_closed: bool) -> bool:
    if verdict.outcome is Outcome.FLAGGED:
        return mode == "block"
    return fail_closed and verdict.applicable and verdict.outcome is Outcome.INCONCLUSIVE
