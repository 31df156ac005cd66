"""How rows become batches: sizes, blocks, refused rows, and reading ahead."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from gazeguard.cleaning.batches import ACCELERATOR_ROWS, CPU_TOKENS, NO_MEMORY, batches, one_ahead
from gazeguard.errors import RowError
from gazeguard.types import Sample, SkippedRow, TextPart, Turn

REFUSED = RowError("no")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def rows(n, broken=()):
    return iter(
        SkippedRow(i, "broken") if i in broken else Sample(i, str(i), (), ()) for i in range(n)
    )


def encoder(tokens=10, refused=(), error=REFUSED):
    """Stands for `Target.encode`: prompts of `tokens` tokens, or `tokens[row]`."""

    def encode(samples):
        if any(s.row in refused for s in samples):
            raise error
        length = max(tokens if isinstance(tokens, int) else tokens[s.row] for s in samples)
        return SimpleNamespace(key_kind=torch.ones(len(samples), length, dtype=torch.int8))

    return encode


def taken(stream):
    """Row numbers of every part, and where blocks end."""
    found = []
    for batch in stream:
        found += [[s.row for s in samples] for samples, _ in batch.parts]
        if batch.ends_block:
            found.append("end")
    return found


def test_no_batch_reaches_over_the_end_of_a_block():
    stream = batches(rows(7), [(0, 4), (4, 7)], encoder(), 3, CPU)
    assert taken(stream) == [[0, 1, 2], [3], "end", [4, 5, 6], "end"]


def test_a_resumed_block_is_batched_as_before():
    """Sizes learnt in one block are not carried into the next."""
    tokens = [CPU_TOKENS] * 4 + [CPU_TOKENS // 4] * 6
    whole = taken(batches(rows(10), [(0, 4), (4, 10)], encoder(tokens), None, CPU))
    assert whole == [[0], [1], [2], [3], "end", [4, 5, 6, 7], [8, 9], "end"]
    rest = (row for row in rows(10) if row.row >= 4)
    assert taken(batches(rest, [(4, 10)], encoder(tokens), None, CPU)) == whole[5:]


def test_batches_on_a_cpu_follow_the_longest_prompt_so_far():
    tokens = [CPU_TOKENS // 3, CPU_TOKENS // 3, CPU_TOKENS, *[CPU_TOKENS // 2] * 4]
    stream = batches(rows(7), [(0, 7)], encoder(tokens), None, CPU)
    assert taken(stream) == [[0, 1, 2], [3], [4, 5], [6], "end"]


def test_a_gpu_gets_a_fixed_number_of_rows():
    n = ACCELERATOR_ROWS
    stream = batches(rows(n + 1), [(0, n + 1)], encoder(9 * CPU_TOKENS), None, GPU)
    assert taken(stream) == [[*range(n)], [n], "end"]


def test_refused_rows_do_not_take_their_batch_along():
    stream = batches(rows(4, broken=(0,)), [(0, 4)], encoder(refused=(2,)), 8, CPU)
    (batch,) = stream
    assert [[s.row for s in samples] for samples, _ in batch.parts] == [[1], [3]]
    assert [(s.row, s.reason) for s in batch.unusable] == [(0, "broken"), (2, "no")]


def test_rows_too_large_to_encode_are_named_and_bugs_are_not_hidden():
    (batch,) = batches(rows(2), [(0, 2)], encoder(refused=(1,), error=MemoryError()), 8, CPU)
    assert [(s.row, s.reason) for s in batch.unusable] == [(1, NO_MEMORY)]
    with pytest.raises(RuntimeError, match="a bug"):
        list(batches(rows(2), [(0, 2)], encoder(refused=(1,), error=RuntimeError("a bug")), 8, CPU))


def test_a_block_without_usable_rows_still_ends():
    assert taken(batches(rows(2, broken=(0, 1)), [(0, 2)], encoder(), None, CPU)) == ["end"]


def test_one_ahead_makes_the_next_item_while_the_first_is_used():
    made, second = [], threading.Event()

    def items():
        for i in range(3):
            made.append((i, threading.current_thread()))
            if i == 1:
                second.set()
            yield i

    stream = one_ahead(items())
    assert next(stream) == 0
    assert second.wait(5), "the second is made before it is asked for"
    assert list(stream) == [1, 2]
    assert all(thread is not threading.current_thread() for _, thread in made)


def test_one_ahead_is_never_more_than_one_ahead():
    made = []
    stream = one_ahead(made.append(i) or i for i in range(10))
    next(stream)
    stream.close()
    assert len(made) == 2


def test_one_ahead_raises_where_the_item_would_have_come():
    def items():
        yield 1
        raise RowError("late")

    stream = one_ahead(items())
    assert next(stream) == 1
    with pytest.raises(RowError, match="late"):
        next(stream)


def long_row(number, words):
    return Sample(number, str(number), (), (Turn("user", (TextPart("word " * words),)),))


def test_rows_of_like_length_share_a_batch():
    mixed = [long_row(i, 100 if i % 2 else 1) for i in range(8)]
    stream = batches(iter(mixed), [(0, 8)], encoder(), 4, GPU, alike=True)
    assert taken(stream) == [[1, 3, 5, 7], [0, 2, 4, 6], "end"]
    stream = batches(iter(mixed), [(0, 8)], encoder(), 4, GPU)
    assert taken(stream) == [[0, 1, 2, 3], [4, 5, 6, 7], "end"]


def test_the_wait_for_rows_of_like_length_is_bounded_by_rows_and_by_pixels():
    mixed = [long_row(i, i) for i in range(9)]
    stream = batches(iter(mixed), [(0, 9)], encoder(), 2, GPU, alike=True)
    assert taken(stream) == [[7, 6], [5, 4], [3, 2], [1, 0], [8], "end"]

    drawn = []

    def large():
        for i in range(4):
            drawn.append(i)
            yield Sample(i, str(i), (Image.new("1", (4096, 4096)),), ())

    stream = batches(large(), [(0, 4)], encoder(), 2, GPU, alike=True)
    next(stream)
    assert drawn == [0, 1], "one batch of such pictures is all that is held"


def test_a_refused_first_row_does_not_make_one_batch_of_all():
    stream = batches(rows(5), [(0, 5)], encoder(CPU_TOKENS // 2, {0}), None, CPU)
    assert taken(stream) == [[1, 2], [3, 4], "end"]
