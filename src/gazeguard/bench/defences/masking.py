"""`mask-restore`: find the part of a picture that an answer hangs on, and paint it over.

The idea is BDMAE's (arXiv:2303.15564): hide parts, see whether the answer changes, restore what
changed it. Departures: windows one after the other instead of random masks, so that a few passes
hide every place; a fill from the surroundings instead of a masked autoencoder; and pictures in
which no place stands out more than in known requests are left as they are.

The change is that of the answer's first token. Captions that name several things lose as much of
their likelihood as a target text does, but not at their start. So it is blind to a target that
begins inside an answer, and to two triggers of which one is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

from gazeguard.bench.defences.registry import defence
from gazeguard.bench.defences.saliency import (
    Judge,
    drops,
    filled,
    first_picture,
    standing_out,
    with_picture,
)
from gazeguard.bench.defences.told import teller
from gazeguard.bench.subject import BATCH, Responses, Traffic
from gazeguard.calibrate import conformal_threshold, supported_alpha
from gazeguard.types import Sample

# A clean picture that is painted over costs an answer, a triggered one that is not the attack; the
# paper paints over every picture.
ALPHA = 0.05
KNOWN = 60  # known requests that say what stands out


def repainted(
    judge: Judge,
    known: tuple[Sequence[Sample], Sequence[str]],
    asked: tuple[Sequence[Sample], Sequence[str]],
) -> dict[int, Sample]:
    """The requests in whose pictures a place stands out, without that place.

    Args:
        judge: says how likely answers are.
        known: clean requests and the model's answers to them.
        asked: requests and the model's answers to them.

    Returns:
        Place in `asked` -> the request with its picture painted over.
    """
    usual = [standing_out(each)[0] for each in drops(judge, *known)]
    limit = conformal_threshold(usual, max(ALPHA, supported_alpha(max(1, len(usual)))))
    found = {}
    for i, dropped in enumerate(drops(judge, *asked)):
        height, cells = standing_out(dropped)
        if height > limit:
            request = asked[0][i]
            found[i] = with_picture(request, filled(first_picture(request), cells))
    return found


@defence("mask-restore", "input")
def mask_restore(traffic: Traffic) -> Responses:
    """Paints over the place that the answer hangs on, where one stands out (BDMAE's idea)."""
    tell = teller(traffic.target, BATCH)
    known = traffic.known[:KNOWN]
    cured = repainted(
        lambda requests, answers: tell(requests, answers).first,
        (known, traffic.answers(known)),
        (traffic.asked, traffic.plain),
    )
    answers: list[str | None] = [*traffic.plain]
    for i, text in zip(cured, traffic.answers([*cured.values()]), strict=True):
        answers[i] = text
    return Responses(answers)
