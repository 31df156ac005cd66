"""What the benchmark's tables report at each level, by the names that files and suites use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of the tables.

    Attributes:
        key: as in `table.csv` and in a suite's `published`.
        title: for people.
        more: whether more of it is better.
        rows: what `n` counts.
    """

    key: str
    title: str
    more: bool
    rows: str


METRICS: dict[str, tuple[Metric, ...]] = {
    "data": (
        Metric("precision", "precision", True, "removed rows"),
        Metric("recall", "recall", True, "poisoned rows"),
        Metric("f1", "F1", True, "rows"),
        Metric("removed", "clean rows removed", False, "clean rows"),
        Metric("refit_asr", "ASR after refit", False, "held-out rows"),
        Metric("refit_clean", "clean right after refit", True, "held-out rows"),
    ),
    "input": (
        Metric("asr_before", "ASR before", False, "triggered rows"),
        Metric("asr_after", "ASR after", False, "triggered rows"),
        Metric("clean_before", "clean right before", True, "clean rows"),
        Metric("clean_after", "clean right after", True, "clean rows"),
        Metric("clean_change", "change of clean right", True, "clean rows"),
        Metric("triggered_after", "triggered right after", True, "triggered rows"),
        Metric("false_alarms", "false alarms", False, "clean rows"),
        Metric("detected", "detected", True, "triggered rows"),
        Metric("auroc", "AUROC", True, "rows"),
        Metric("tpr_at_1_fpr", "TPR at 1 % FPR", True, "rows"),
    ),
    "model": (
        Metric("recall", "recall", True, "models"),
        Metric("false_alarms", "false alarms", False, "models"),
        Metric("inconclusive", "inconclusive", False, "models"),
        Metric("f1", "F1", True, "models, benign ones too"),
        Metric("auroc", "AUROC", True, "models, benign ones too"),
    ),
}
KINDS = {"vlm": "vision-language models", "encoder": "text encoders"}
"""Kinds of models, in words."""
LEAD = {"data": "f1", "input": "asr_after", "model": "recall"}
"""What a heat map shows."""
COMPARED = {
    "data": ("f1", "refit_asr", "refit_clean"),
    "input": ("asr_after", "clean_after"),
    "model": ("recall", "f1"),
}
"""What ours and baselines are compared by: never the attack alone where answers can suffer."""


def metric(level: str, key: str) -> Metric:
    """A level's metric by its key.

    Raises:
        KeyError: it has none of this name.
    """
    return {each.key: each for each in METRICS[level]}[key]
