"""BYE as a user runs it, its published rule, and the ablations of the paper (arXiv:2505.16916).

All read one measured profile, the upload's. All but `bye` and `bye-unguarded` are our paper rule
with one setting changed, so they share its guards (`methods.bye.decision.low_group`): what they
decide not to call a group stays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.bench.defences.registry import Function, defence
from gazeguard.bench.subject import Upload
from gazeguard.methods.bye import BYE
from gazeguard.types import Profile

Bools = NDArray[np.bool_]

PAPER_NATS, PAPER_TOKENS = 4.5, 576
"""The ablation's fixed threshold, and the image tokens of the model that it is for."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bye-paper": ("The published rule, with guards that let it find nothing.", {}),
    "bye-kmeans": ("The published rule, 2-means instead of its mixtures.", {"mixture": "kmeans"}),
    "bye-all-layers": (
        "The published rule on the mean of every layer, bimodal or not.",
        {"select_layers": False},
    ),
    "bye-bsi-0": ("The published rule, separation of any size.", {"separation": 0.0}),
    "bye-bsi-1": ("The published rule, separation of 1 instead of 2.", {"separation": 1.0}),
    "bye-bsi-3": ("The published rule, separation of 3 instead of 2.", {"separation": 3.0}),
}
"""Name -> what it is, settings of `BYE("paper")`. `separation` is that of layers and of rows."""


@defence("clean", "data", ours=True)
def clean(upload: Upload) -> Bools:
    """`gazeguard clean` as it is: attention, and triggers that are rebuilt and fire."""
    report = upload.cleaned.report
    return _of_rows(upload, report.rows, report.result.is_flagged)


@defence("bye", "data", ours=True)
def bye(upload: Upload) -> Bools:
    """`gazeguard clean --witness attention`: our rule on where the model looks, and that alone."""
    result = BYE(random_state=upload.seed).fit(upload.profile).result_
    return _of_rows(upload, upload.profile.row, result.is_flagged)


@defence("bye-unguarded", "data")
def unguarded(upload: Upload) -> Bools:
    """The published rule without our guards: once a layer is bimodal, the low group goes."""
    fitted = BYE("paper", random_state=upload.seed).fit(upload.profile)
    result = fitted.result_
    flagged = np.zeros(len(upload.profile), bool)
    if fitted.rule_ is not None and fitted.rule_.info["selected_layers"]:
        flagged = fitted.rule_.decision.split.posterior_low(result.score) >= 0.5
    return _of_rows(upload, upload.profile.row, flagged)


@defence("bye-threshold", "data")
def threshold(upload: Upload) -> Bools:
    """Rows under a fixed entropy instead of a second mixture: 4.5 nats of 576 image tokens.

    The paper's number is for LLaVA-1.5, so entropies are taken relative to `ln T` of a row's own
    `T` tokens: the threshold is the same share, 4.5 / ln 576 = 0.71, of what uniform attention has.
    Where no layer is bimodal, all are averaged.
    """
    return _judged(upload, as_paper_tokens(upload.profile), fixed_threshold=PAPER_NATS)


def as_paper_tokens(profile: Profile) -> Profile:
    """The profile with entropies scaled to what the same evenness is over 576 image tokens."""
    scale = np.log(PAPER_TOKENS) / np.log(profile.image_tokens.clip(2))
    entropy = (profile.entropy * scale[:, None]).astype(np.float32)
    return replace(profile, signals={"entropy": entropy}, before=None)


def _variant(settings: dict[str, Any]) -> Function:
    def run(upload: Upload) -> Bools:
        return _judged(upload, upload.profile, **settings)

    return run


for _name, (_about, _settings) in VARIANTS.items():
    defence(_name, "data", about=_about)(_variant(_settings))


def _judged(upload: Upload, profile: Profile, **settings: Any) -> Bools:
    result = BYE("paper", random_state=upload.seed, **settings).fit(profile).result_
    return _of_rows(upload, profile.row, result.is_flagged)


def _of_rows(upload: Upload, rows: NDArray[np.int64], flagged: Bools) -> Bools:
    """Flags of measured rows as flags of all rows; what could not be measured stays."""
    found = np.zeros(len(upload.rows), bool)
    found[rows] = flagged
    return found
