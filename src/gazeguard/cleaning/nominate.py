"""Which words are worth a proof: the pictures of some rows, looked at without any model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from gazeguard.cleaning.proof import picture_of, with_one_picture
from gazeguard.methods.bye.decision import FEWEST
from gazeguard.methods.bye.phrases import shared_phrases
from gazeguard.methods.nominate import contrasted, repeated
from gazeguard.types import Profile

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
    names = set(zip(profile.row[drawn].tolist(), profile.turn[drawn].tolist(), strict=True))
    small, answers = [], []
    for asked in with_one_picture(dataset, names, _READERS):
        picture = picture_of(asked).resize((_SIDE, _SIDE), Image.Resampling.BOX)
        small.append(np.asarray(picture))
        answers.append(asked.answer)
    differ: list[str] = []
    if len(small) >= 2 * FEWEST:
        phrases, held = shared_phrases(answers, FEWEST, len(answers) - FEWEST)
        differ = contrasted(np.stack(small), phrases, held)
    return list(dict.fromkeys([*differ, *repeated(profile.answer)]))
