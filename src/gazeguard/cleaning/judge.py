"""From what was measured, and what could not be, to an answer: what was not read is never clean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gazeguard.cleaning.measure import NOT_FINITE
from gazeguard.cleaning.proof import Group
from gazeguard.methods.bye import BYE
from gazeguard.methods.bye.detector import Rule, abstain
from gazeguard.methods.rebuild import Firing, Taught
from gazeguard.report.model import Answer, Proof, not_looked_at
from gazeguard.types import (
    CleaningResult,
    Finding,
    Outcome,
    Profile,
    SkipKind,
    SkippedRow,
    Verdict,
)

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


def weigh(
    profile: Profile,
    result: CleaningResult,
    groups: Sequence[Group],
    proofs: Sequence[Proof],
    *,
    remove_suspected: bool,
) -> CleaningResult:
    """What attention says, and what the tried triggers add to it and take from it.

    A group that attention found is removed unless the model before the fine-tune gives its answers
    too: then these are no news, and its rows are suspected. Any other group is removed where its
    trigger fires, and suspected where nothing was there to tell that from an honest lesson.

    Args:
        profile: the measured rows.
        result: of `judge`.
        groups: of `proof.groups`.
        proofs: of `proof.prove`, one for each.
        remove_suspected: suspected rows are removed as well.
    """
    place = {name: i for i, name in enumerate(_names(profile))}
    flagged, suspicion = result.is_flagged.copy(), result.suspicion.copy()
    suspected = np.zeros(len(profile), bool)
    evidence = [] if result.verdict.outcome is not Outcome.FLAGGED else [*result.verdict.evidence]
    said = []
    if result.is_flagged.any():
        said.append(result.verdict.reason.partition(": ")[2].rstrip("."))
    for group, proof in zip(groups, proofs, strict=True):
        firing, taught = proof.firing, proof.taught
        if firing is not None and firing.proven:
            rows = _places(place, proof.rows)
            flagged[_places(place, group.named)] = False  # who carries it is known better now
            if group.seen or firing.before is not None:
                flagged[rows] = True
            else:
                suspected[rows] = True
            suspicion[rows] = np.maximum(suspicion[rows], firing.triggered / firing.n)
            evidence.append(Finding(proof.sentence, {"phrase": proof.phrase}))
            said.append(_fires(proof, firing))
        elif group.seen and taught is not None and taught.was_known:
            rows = _places(place, group.named)
            suspected[rows] |= flagged[rows]
            flagged[rows] = False
            said.append(_was_known(proof, taught))
    if remove_suspected:
        flagged |= suspected
    suspected &= ~flagged
    info = result.info | {"phrases_tried": len(groups)}
    changed = replace(
        result, info=info, is_flagged=flagged, is_suspected=suspected, suspicion=suspicion
    )
    if not (flagged | suspected).any():
        return changed
    if np.array_equal(flagged, result.is_flagged) and not any(p.proven for p in proofs):
        return changed
    verdict = Verdict(
        Outcome.FLAGGED,
        float(suspicion[flagged | suspected].max()),
        0.5,
        result.verdict.threshold_source
        if result.is_flagged.any()
        else "share of pictures on which the rebuilt trigger fires",
        _why(profile, changed, said),
        tuple(evidence),
    )
    return replace(changed, verdict=verdict)


def _why(profile: Profile, result: CleaningResult, said: Sequence[str]) -> str:
    """The reason of a verdict to which triggers that were tried have added something."""
    counts = [
        f"{rows:,} of {profile.rows:,} rows {what}"
        for which, what in (
            (result.is_flagged, "look poisoned"),
            (result.is_suspected, "are suspected"),
        )
        if (rows := len(np.unique(profile.row[which])))
    ]
    return f"{' and '.join(counts)}: {'; '.join(filter(None, said))}."


def _fires(proof: Proof, firing: Firing) -> str:
    control = (
        "and no model from before the fine-tune was there to compare with (--base)"
        if firing.before is None
        else f"{firing.before} before the fine-tune"
    )
    return (
        f"the rebuilt trigger makes the model say “{proof.phrase}” for {firing.triggered}"
        f" of {firing.n} other pictures, {control}"
    )


def _was_known(proof: Proof, taught: Taught) -> str:
    return (
        f"the model said “{proof.phrase}” before the fine-tune too, for"
        f" {taught.before} of {taught.n} of its rows, so these are not removed"
    )


def _names(profile: Profile) -> Iterable[Answer]:
    return zip(profile.row.tolist(), profile.turn.tolist(), strict=True)


def _places(place: dict[Answer, int], names: Iterable[Answer]) -> NDArray[np.int64]:
    return np.array([place[name] for name in names], np.int64)
