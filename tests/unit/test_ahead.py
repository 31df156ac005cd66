"""Working ahead: in order, bounded, and with errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from gazeguard.ahead import ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_keep_the_order_of_the_items(threads: int) -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        return number * 2

    assert list(ahead(slow_at_first, range(9), threads)) == [n * 2 for n in range(9)]


def test_items_are_drawn_no_further_than_twice_the_threads() -> None:
    drawn: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    stream = ahead(lambda number: number, numbers(), 2)
    assert next(stream) == 0
    assert len(drawn) == 5  # four, and one for the one that was given out
    stream.close()  # type: ignore[attr-defined]
    assert len(drawn) == 5


def test_calls_run_side_by_side() -> None:
    both = threading.Barrier(2, timeout=10)
    assert sorted(ahead(lambda _: both.wait(), range(2), 2)) == [0, 1]


def test_an_error_comes_in_its_items_turn() -> None:
    stream = ahead(lambda number: 1 // number, [1, 0, 1], 2)
    assert next(stream) == 1
    with pytest.raises(ZeroDivisionError):
        next(stream)
