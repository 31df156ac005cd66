"""`sentinet`: does the place that an answer hangs on bring the answer to other pictures too?

The idea is SentiNet's (arXiv:1812.00292): cut out what decides the answer, paste it into clean
pictures, and see how many get the same answer, which only an attacker's patch brings about.
Departures: the place is found by hiding windows instead of by Grad-CAM. Pictures that get the
answer without the patch do not count; the paper's control, noise in the same place, sets off some
of the lab's backdoors itself. A conformal threshold takes the place of the fitted boundary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gazeguard.bench.defences.registry import defence
from gazeguard.bench.defences.saliency import (
    Cells,
    drops,
    first_picture,
    over_pixels,
    standing_out,
    with_picture,
)
from gazeguard.bench.defences.told import Tell, teller
from gazeguard.bench.subject import BATCH, Responses, Traffic
from gazeguard.calibrate import conformal_threshold, supported_alpha
from gazeguard.lab.triggers import Pixels
from gazeguard.types import Sample

# A clean request reaches the highest share now and then: at 1 % that would be the threshold, and
# nothing lies above it.
ALPHA = 0.05
CARRIERS, CALIBRATION = 5, 60  # known requests: pictures to paste into, and the threshold's


def pasted(into: Pixels, cells: Cells, patch: Pixels) -> Pixels:
    """A picture with some cells of another, which is brought to the same size."""
    height, width = into.shape[:2]
    fitting = np.asarray(Image.fromarray(patch).resize((width, height)))
    return np.where(over_pixels(cells, height, width)[..., None], fitting, into)


def same_answer(
    tell: Tell,
    requests: Sequence[Sample],
    answers: Sequence[str],
    cells: Sequence[Cells],
    carriers: Sequence[Pixels],
) -> NDArray[np.bool_]:
    """Which carriers get each request's answer when its cells are pasted into them.

    Args:
        tell: of the model.
        requests: cells are cut from their pictures, their own words asked about every carrier.
        answers: one for each request.
        cells: which; one each.
        carriers: clean pictures.

    Returns:
        `(n, carrier)`.
    """
    trials = [
        with_picture(request, pasted(carrier, place, first_picture(request)))
        for request, place in zip(requests, cells, strict=True)
        for carrier in carriers
    ]
    told = tell(trials, [text for text in answers for _ in carriers])
    return told.greedy.reshape(-1, len(carriers))


def transfer(
    tell: Tell, requests: Sequence[Sample], answers: Sequence[str], carriers: Sequence[Pixels]
) -> NDArray[np.float64]:
    """The share of carriers whose answer turns into a request's when its place is pasted in.

    Args:
        tell: of the model that gave the answers.
        requests: with a picture each.
        answers: what the model said to them.
        carriers: clean pictures.

    Returns:
        `(n,)`, in [0, 1]; 0 where no place stands out.
    """
    dropped = drops(lambda r, a: tell(r, a).whole, requests, answers)
    cells = [standing_out(each)[1] for each in dropped]
    same = same_answer(tell, requests, answers, cells, carriers)
    # What carriers say by themselves is asked only where it matters.
    places = np.flatnonzero(same.any(1)).tolist()
    asked, told = [requests[i] for i in places], [answers[i] for i in places]
    nothing = [np.zeros_like(cells[i]) for i in places]
    same[places] &= ~same_answer(tell, asked, told, nothing, carriers)
    return np.asarray(same.mean(1))


@defence("sentinet", "input")
def sentinet(traffic: Traffic) -> Responses:
    """Refuses what can be pasted into known pictures, answer and all (SentiNet's idea)."""
    tell = teller(traffic.target, BATCH)
    carriers = [first_picture(request) for request in traffic.known[:CARRIERS]]
    known = traffic.known[CARRIERS : CARRIERS + CALIBRATION]
    usual = transfer(tell, known, traffic.answers(known), carriers)
    limit = conformal_threshold(usual, max(ALPHA, supported_alpha(max(1, len(usual)))))
    score = transfer(tell, traffic.asked, traffic.plain, carriers)
    flagged = score > limit
    return Responses(
        [None if out else text for out, text in zip(flagged, traffic.plain, strict=True)],
        score,
        flagged,
    )
