"""How many rows at once: the fastest number that fits."""

from __future__ import annotations

import pytest
import torch

from gazeguard.cleaning.fitting import LARGEST, fitting_batch
from gazeguard.errors import UsageError
from gazeguard.types import Sample, TextPart, Turn


def row(number: int) -> Sample:
    return Sample(number, str(number), (), (Turn("user", (TextPart("word " * number),)),))


ROWS = [row(n) for n in range(5)]


@pytest.mark.parametrize(
    ("rates", "chosen", "tried"),
    [
        ({1: 10, 2: 20, 4: 40, 8: 80}, 8, [1, 2, 4, 8, 16]),  # 16 do not fit
        ({1: 10, 2: 20, 4: 20.5, 8: 20.4, 16: 99}, 4, [1, 2, 4, 8]),
        ({1: 10, 2: 9, 4: 30, 8: 29, 16: 29}, 4, [1, 2, 4, 8, 16]),
        ({1: 10}, 1, [1, 2]),
        ({2**n: 2.0**n for n in range(20)}, LARGEST, [2**n for n in range(10)]),
    ],
)
def test_the_fastest_that_fits(rates: dict[int, float], chosen: int, tried: list[int]) -> None:
    asked: list[int] = []

    def rate(samples: list[Sample]) -> float:
        asked.append(len(samples))
        if len(samples) not in rates:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rates[len(samples)]

    assert fitting_batch(ROWS, rate) == chosen
    assert asked == tried


def test_the_longest_rows_are_tried() -> None:
    seen: list[list[int]] = []

    def rate(samples: list[Sample]) -> float:
        seen.append([s.row for s in samples])
        if len(samples) > 8:
            raise MemoryError
        return float(len(samples))

    fitting_batch(ROWS, rate)
    assert seen[:4] == [[4], [4, 3], [4, 3, 2, 1], [4, 3, 2, 1, 0, 4, 3, 2]]


def test_a_row_too_many_is_one_sentence_and_a_bug_is_none() -> None:
    def full(samples: list[Sample]) -> float:
        raise MemoryError

    def broken(samples: list[Sample]) -> float:
        raise RuntimeError("shapes do not match")

    with pytest.raises(UsageError, match="Not even one row fits"):
        fitting_batch(ROWS, full)
    with pytest.raises(RuntimeError, match="shapes"):
        fitting_batch(ROWS, broken)
