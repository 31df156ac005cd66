"""Which words are worth a proof: the pictures of some rows, looked at without any model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from gazeguard.methods.bye.decision import FEWEST
from gazeguard.methods.bye.phrases import shared_phrases
from gazeguard.methods.nominate import contrasted, repeated
from gazeguard.types import Profile, Sample

if TYPE_CHECKING:
    from gazeguard.data.dataset import Dataset

MAX_ROWS = 2048
_SIDE = 32  # pixels: enough to see where rows differ
_READERS = 4  # threads that decode


def nominate(profile: Profile, dataset: Dataset, seed: int) -> list[str]:
    """Phrases that may be what an attacker taught, each at most once.

    Args:
        profile: the measured rows.
        dataset: where their pictures are.
        seed: of the rows that are looked at.
    """
    drawn = np.random.default_rng(seed).permutation(len(profile))[:MAX_ROWS]
    places = {(int(profile.row[i]), int(profile.turn[i])): i for i in drawn.tolist()}
    rows = {row for row, _ in places}
    small, answers = [], []
    for sample in dataset.rows(rows.__contains__, threads=_READERS):
        for asked in sample.asked if isinstance(sample, Sample) else ():
            if (asked.row, asked.turn) in places and len(asked.prompt_images) == 1:
                picture = asked.images[asked.prompt_images[0]]
                small.append(np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX)))
                answers.append(asked.answer)
    differ: list[str] = []
    if len(small) >= 2 * FEWEST:
        phrases, held = shared_phrases(answers, FEWEST, len(answers) - FEWEST)
        differ = contrasted(np.stack(small), phrases, held)
    return list(dict.fromkeys([*differ, *repeated(profile.answer)]))
