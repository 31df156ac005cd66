"""Sentences about a guarded run that its formats share."""

from __future__ import annotations

from gazeguard.report import words
from gazeguard.report.guard.model import GuardReport, chance_if_clean, flagged_interval
from gazeguard.types import Outcome

_TREATED = {
    "purify": "answered with the image parts that stood out hidden",
    "detect": "answered like all others",
    "block": "not answered",
}

_DOUBTFUL = 0.05  # so probable a number of false alarms is nothing to conclude from


def headline(report: GuardReport) -> str:
    """The whole run as one plain sentence, without its full stop."""
    counts = report.counts
    if not counts.requests:
        return f"No request was answered, mode {report.mode}"
    start = "" if report.finished else "The run did not finish: "
    asked = f"{start}{words.plural(counts.requests, 'request')}, mode {report.mode}"
    if not counts.judged:
        return f"{asked}: none could be judged"
    parts = ["none flagged"]
    if counts.flagged:
        parts = [f"{words.count(counts.flagged)} flagged and {_treated(report)}"]
    if counts.not_judged:
        parts.append(f"{words.count(counts.not_judged)} not judged")
    return f"{asked}: {', '.join(parts)}"


def _treated(report: GuardReport) -> str:
    """What became of flagged requests."""
    earlier = report.counts.earlier
    if not earlier:
        return _TREATED[report.mode]
    by = "answered by the model before its fine-tune"
    if earlier == report.counts.flagged:
        return by
    return f"{by} ({words.count(earlier)}) or with the image parts that stood out hidden"


def lede(report: GuardReport) -> str:
    """What the headline needs to be understood rightly; may be empty."""
    counts, parts = report.counts, []
    if not report.finished:
        parts.append("What was still to come has not been looked at.")
    if counts.not_judged:
        one = counts.not_judged == 1
        parts.append(
            f"{words.plural(counts.not_judged, 'request')} {'was' if one else 'were'} not judged,"
            f" which is no all-clear; {_unjudged(counts.not_judged, counts.unguarded)}."
        )
    if counts.flagged:
        parts.append(chance(report))
    if counts.blinded:
        one = counts.blinded == 1
        parts.append(
            f"From {words.count(counts.blinded)} flagged {'request' if one else 'requests'} the"
            f" whole picture was hidden, so {'that answer is' if one else 'those answers are'}"
            " blind."
        )
    if counts.unchanged:
        one = counts.unchanged == 1
        parts.append(
            f"{words.plural(counts.unchanged, 'flagged request')} got the same answer as with"
            f" nothing hidden: if {'it has' if one else 'they have'} a trigger,"
            f" {'it is' if one else 'they are'} not disarmed."
        )
    return " ".join(parts)


def promise(report: GuardReport) -> str:
    """What the calibration says of false alarms."""
    text = (
        f"at most {words.plain(100 * report.alpha)} % of clean inputs, on average over"
        f" calibrations; at most {words.plain(round(100 * report.rate_bound, 2))} % for 95 of 100"
        f" calibrations with {words.plural(len(report.calibration), 'score')}"
    )
    if report.spread is None:
        return text
    low, high = (words.number(end) for end in report.spread)
    return f"{text}; split otherwise, the same inputs give thresholds from {low} to {high}"


def seen(report: GuardReport) -> str:
    """The share of flagged requests with its interval."""
    counts, interval = report.counts, flagged_interval(report.counts)
    if interval is None:
        return "no request was judged"
    low, high = (f"{100 * end:.1f}" for end in interval)
    return (
        f"{words.count(counts.flagged)} of {words.plural(counts.judged, 'judged request')} flagged,"
        f" {words.share(counts.flagged, counts.judged)} (95 % interval {low} to {high} %)"
    )


def chance(report: GuardReport) -> str:
    """Whether clean inputs alone would give so many alarms; empty without any."""
    found = chance_if_clean(report)
    if found is None or not report.counts.flagged:
        return ""
    shown = "less than 0.001" if found < 0.001 else f"at most {found:.2g}"
    alarms = "an alarm" if report.counts.flagged == 1 else "so many alarms"
    doubt = "By number alone this could be chance; see how far beyond the threshold they lie. "
    return (
        f"{doubt if found > _DOUBTFUL else ''}Were all requests clean and like the calibration"
        f" inputs, {alarms} would have a probability of {shown}."
    )


def next_step(report: GuardReport) -> str:
    """What to do about it."""
    if report.outcome is Outcome.FLAGGED:
        start = "Look through the flagged requests below. "
        if report.mode == "detect":
            start += "Their answers are the unprotected model's: do not use them. "
        return start + (
            "Outlines on the same small mark in picture after picture mean a planted trigger: find"
            " out who sends it, and clean the model's fine-tuning set with gazeguard clean."
            " Outlines all over mean that the traffic differs from the calibration inputs:"
            " calibrate on inputs like it."
        )
    if report.outcome is Outcome.CLEAN:
        return (
            "The answers can be used as they are, within the limits named at the end of this page."
        )
    return (
        "Mend what the reasons below name and ask again; until then these requests are unchecked."
    )


def _unjudged(total: int, unguarded: int) -> str:
    if not unguarded:
        return "it was not answered" if total == 1 else "they were not answered"
    if unguarded == total:
        return f"{'it was' if total == 1 else 'they were'} answered without protection"
    return f"{words.count(unguarded)} of them answered without protection, the others not at all"
