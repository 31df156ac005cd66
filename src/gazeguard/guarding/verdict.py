"""What the guard says about one request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.types import Finding, Outcome, Verdict

NO_IMAGE = "the prompt has no image, so no image trigger can be active"
NO_WORDS = "the prompt has no words of the user to compare the image with"
NOT_COMPARED = "it could not be compared with the model before its fine-tune: no finite logits"
NOT_FINITE = "the model's numbers for this prompt are not finite (NaN or infinity)"


@dataclass(frozen=True, slots=True, eq=False)
class GuardVerdict:
    """One request's verdict.

    Attributes:
        verdict: outcome, suspicion `1 - p_value` with its threshold `1 - alpha`, reason, evidence.
        score: distance of the input's attention from clean ones; None when it was not judged.
        threshold: the score above which an input is flagged.
        p_value: share of clean calibration inputs at least as far away (conformal); None like
            `score`.
        applicable: False for a prompt without an image, which is not a failure to judge.
        tokens: per image in prompt order, bool, its tokens that stand out in a flagged input:
            `(rows, columns)` of the image's grid where it is known, else `(count,)`. Images that
            cannot be told apart are one. None for inputs that are not flagged.
        heat: float32 arrays like `tokens`, how much each image token stands out: times the even
            share for a `tau`, times the head's clean level for `search` and `widen`.
        hidden: whether `tokens` were hidden from the model.
        divergence: nats, between what the model is about to say and what it would have said before
            its fine-tune; None where that was not asked.
        earlier: whether the model before the fine-tune answers instead.
        flagged_by: the witnesses that flag it, of `attention` and `base`.
    """

    verdict: Verdict
    score: float | None
    threshold: float
    p_value: float | None
    applicable: bool = True
    tokens: tuple[NDArray[np.bool_], ...] | None = None
    heat: tuple[NDArray[np.float32], ...] | None = None
    hidden: bool = False
    divergence: float | None = None
    earlier: bool = False
    flagged_by: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """Clean, flagged or inconclusive."""
        return self.verdict.outcome

    @property
    def reason(self) -> str:
        """One sentence a newcomer understands."""
        return self.verdict.reason

    def noting(self, what: str) -> GuardVerdict:
        """The same verdict with more said in its reason."""
        reason = f"{self.reason}; {what}"
        return replace(self, verdict=replace(self.verdict, reason=reason))

    def compared(self, divergence: float, most: float, p_value: float) -> GuardVerdict:
        """The same verdict with the word of the model before its fine-tune.

        Args:
            divergence: from what that model would say, nats.
            most: what is flagged is above it.
            p_value: of the divergence.
        """
        if self.outcome is Outcome.INCONCLUSIVE:  # nor was any input like it in the calibration
            return replace(self, divergence=divergence)
        how = f"divergence {divergence:.3g} against {most:.3g} nats, p = {p_value:.3g}"
        p = p_value if self.p_value is None else min(p_value, self.p_value)
        if divergence <= most:
            verdict = replace(self.verdict, suspicion=1.0 - p)
            found = replace(self, divergence=divergence, p_value=p, verdict=verdict)
            return found.noting(f"the model before its fine-tune begins the same answer ({how})")
        reason = f"before its fine-tune the model would not begin this answer ({how})"
        finding = Finding(reason, {"divergence": divergence, "p_value": p_value})
        said = f"{self.reason}; {reason}" if self.outcome is Outcome.FLAGGED else reason
        verdict = replace(
            self.verdict,
            outcome=Outcome.FLAGGED,
            suspicion=1.0 - p,
            reason=said,
            evidence=(*self.verdict.evidence, finding),
        )
        return replace(
            self,
            verdict=verdict,
            p_value=p,
            divergence=divergence,
            flagged_by=(*self.flagged_by, "base"),
        )

    def as_json(self) -> dict[str, Any]:
        """JSON types; token places count along an image's tokens, row by row of its grid."""
        images = self.tokens and [
            {
                "grid": list(tokens.shape) if tokens.ndim == 2 else None,
                "image_tokens": int(tokens.size),
                "tokens": np.flatnonzero(tokens).tolist(),
            }
            for tokens in self.tokens
        ]
        return {
            "outcome": str(self.outcome),
            "score": self.score,
            "threshold": self.threshold,
            "p_value": self.p_value,
            "suspicion": self.verdict.suspicion,
            "applicable": self.applicable,
            "hidden": self.hidden,
            "divergence": self.divergence,
            "flagged_by": list(self.flagged_by),
            "answered_by_earlier_model": self.earlier,
            "images": images,
            "reason": self.reason,
        }


def judged(
    score: float,
    p_value: float,
    threshold: float,
    alpha: float,
    source: str,
    provenance: dict[str, Any],
) -> GuardVerdict:
    """The verdict of a measured request; flagged when `score` is above `threshold`."""
    flagged = score > threshold
    how = f"distance {score:.3g} against {threshold:.3g}, p = {p_value:.3g}"
    if flagged:
        outcome = Outcome.FLAGGED
        reason = f"the image draws attention from the words as no clean input does ({how})"
    else:
        outcome = Outcome.CLEAN
        reason = f"attention is shared between image and words as in clean inputs ({how})"
    evidence = (Finding(reason, {"score": score, "p_value": p_value}),) if flagged else ()
    verdict = Verdict(outcome, 1.0 - p_value, 1.0 - alpha, source, reason, evidence, provenance)
    by = ("attention",) if flagged else ()
    return GuardVerdict(verdict, score, threshold, p_value, flagged_by=by)


def unjudged(
    reason: str,
    threshold: float,
    alpha: float,
    source: str,
    provenance: dict[str, Any],
    *,
    applicable: bool = True,
) -> GuardVerdict:
    """The verdict of a request that could not be judged."""
    verdict = Verdict(
        Outcome.INCONCLUSIVE, None, 1.0 - alpha, source, reason, provenance=provenance
    )
    return GuardVerdict(verdict, None, threshold, None, applicable)
