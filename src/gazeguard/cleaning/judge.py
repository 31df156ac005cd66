"""From what was measured, and what could not be, to an answer: what was not read is never clean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gazeguard.cleaning.measure import NOT_FINITE
from gazeguard.methods.bye import BYE
from gazeguard.methods.bye.detector import Rule, abstain
from gazeguard.report.model import not_looked_at
from gazeguard.types import CleaningResult, Outcome, Profile, SkipKind, SkippedRow, Verdict

MAX_UNANSWERED = 0.1  # more looks like a format that was not understood, not like broken rows


def judge(
    profile: Profile, failed: Sequence[SkippedRow], rule: Rule, seed: int, max_skipped: float
) -> CleaningResult:
    """What the method says, and whether enough rows were looked at to believe it.

    Poison that was found stays found, however many other rows could not be looked at.

    Args:
        profile: the measured rows.
        failed: all other rows with pictures.
        rule: which form of BYE decides.
        seed: of the statistics.
        max_skipped: largest share of rows with pictures that may be unread in a clean set.
    """
    result = _measured(profile, failed, rule, seed)
    pictures = profile.rows + len(failed)
    if result.verdict.outcome is Outcome.FLAGGED or not failed:
        return result
    unread = not_looked_at(failed, pictures)
    if result.verdict.outcome is Outcome.INCONCLUSIVE:
        why = f"{result.verdict.reason.rstrip('.')}; {unread}."
        return replace(result, verdict=replace(result.verdict, reason=why))
    unanswered = [skip for skip in failed if skip.kind is SkipKind.NO_ANSWER]
    if len(unanswered) > MAX_UNANSWERED * pictures:
        why = f"{unread}; row {unanswered[0].row:,}: {unanswered[0].reason.rstrip('.')}"
    elif len(failed) > max_skipped * pictures:
        why = (
            f"{unread}, and at most {100 * max_skipped:g} % may be in a clean set: repair them, or"
            " allow more with --max-skipped"
        )
    else:
        return result
    verdict = Verdict(Outcome.INCONCLUSIVE, None, None, "too few rows looked at", f"{why}.")
    return replace(result, verdict=verdict)


def _measured(
    profile: Profile, failed: Sequence[SkippedRow], rule: Rule, seed: int
) -> CleaningResult:
    broken = sum(skip.reason == NOT_FINITE for skip in failed)
    if broken > profile.rows:
        why = (
            f"the model's numbers are not finite for {broken:,} of {broken + profile.rows:,} rows,"
            " so its weights or its number format are broken: try --dtype float32 or another copy"
        )
        return abstain(profile, rule, why, "not measured")
    if not len(profile):
        why = (
            "no row could be measured: see reasons.jsonl for why"
            if failed
            else "no row has a picture, and only rows with pictures can be judged"
        )
        return abstain(profile, rule, why, "not measured")
    return BYE(rule=rule, random_state=seed).fit(profile).result_
