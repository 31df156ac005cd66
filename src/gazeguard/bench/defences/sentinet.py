"""`sentinet`: does the place that an answer hangs on bring the answer to other pictures too?

The idea is SentiNet's (arXiv:1812.00292): cut out what decides the answer, paste it into clean
pictures, and see whether they get the same answer, which only an attacker's patch brings about; a
patch of noise in the same place says what the covering alone does. Departures: the place is found
by hiding windows instead of by Grad-CAM; the two shares make one score by their difference, and a
conformal threshold takes the place of the paper's fitted boundary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gazeguard.bench.defences.registry import defence
from gazeguard.bench.defences.saliency import (
    Cells,
    cell_scores,
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

ALPHA = 0.01
CARRIERS, CALIBRATION = 5, 100  # known requests: pictures to paste into, and the threshold's


def pasted(into: Pixels, cells: Cells, patch: Pixels) -> Pixels:
    """A picture with some cells of another, which is brought to the same size."""
    height, width = into.shape[:2]
    fitting = np.asarray(Image.fromarray(patch).resize((width, height)))
    return np.where(over_pixels(cells, height, width)[..., None], fitting, into)


def carried(
    tell: Tell,
    requests: Sequence[Sample],
    answers: Sequence[str],
    patches: Sequence[Pixels],
    cells: Sequence[Cells],
    carriers: Sequence[Pixels],
) -> NDArray[np.float64]:
    """The share of carriers that get each request's answer when its cells are pasted into them.

    Args:
        tell: of the model.
        requests: their own words are asked about every carrier.
        answers: one for each request.
        patches: pictures that the cells are cut from; one each.
        cells: which; one each.
        carriers: clean pictures.

    Returns:
        `(n,)`, in [0, 1].
    """
    trials = [
        with_picture(request, pasted(carrier, place, patch))
        for request, place, patch in zip(requests, cells, patches, strict=True)
        for carrier in carriers
    ]
    same = tell(trials, [text for text in answers for _ in carriers]).greedy
    return np.asarray(same.reshape(-1, len(carriers)).mean(1))


def transfer(
    tell: Tell,
    requests: Sequence[Sample],
    answers: Sequence[str],
    carriers: Sequence[Pixels],
    seed: int,
) -> NDArray[np.float64]:
    """How many more carriers get a request's answer from its decisive cells than from noise there.

    Args:
        tell: of the model that gave the answers.
        requests: with a picture each.
        answers: what the model said to them.
        carriers: clean pictures.
        seed: of the noise.

    Returns:
        `(n,)`, difference of two shares of the carriers, in [0, 1]; 0 where noise does as much, and
        where no cell stands out.
    """
    scores = cell_scores(lambda r, a: tell(r, a).whole, requests, answers)
    cells = [standing_out(each)[1] for each in scores]
    noise = np.random.default_rng([seed, 31]).integers(0, 256, carriers[0].shape, dtype=np.uint8)
    found = np.zeros(len(requests))

    def share(places: list[int], patches: list[Pixels]) -> NDArray[np.float64]:
        asked, told = [requests[i] for i in places], [answers[i] for i in places]
        return carried(tell, asked, told, patches, [cells[i] for i in places], carriers)

    places = [i for i, place in enumerate(cells) if place.any()]
    found[places] = share(places, [first_picture(requests[i]) for i in places])
    places = np.flatnonzero(found).tolist()
    found[places] -= share(places, [noise] * len(places))
    return found.clip(0)


@defence("sentinet", "input")
def sentinet(traffic: Traffic) -> Responses:
    """Refuses what can be pasted into known pictures, answer and all (SentiNet's idea)."""
    tell = teller(traffic.target, BATCH)
    carriers = [first_picture(request) for request in traffic.known[:CARRIERS]]
    known = traffic.known[CARRIERS : CARRIERS + CALIBRATION]
    usual = transfer(tell, known, traffic.answers(known), carriers, traffic.seed)
    limit = conformal_threshold(usual, max(ALPHA, supported_alpha(max(1, len(usual)))))
    score = transfer(tell, traffic.asked, traffic.plain, carriers, traffic.seed)
    flagged = score > limit
    return Responses(
        [None if out else text for out, text in zip(flagged, traffic.plain, strict=True)],
        score,
        flagged,
    )
