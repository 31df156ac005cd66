"""Work done ahead of its use, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def ahead(call: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """`map(call, items)` with up to twice `threads` calls under way; items are drawn here.

    Args:
        call: what a thread does; its error is raised in its item's turn.
        items: read no further ahead than calls are.
        threads: 0 for none, which is `map` itself.
    """
    if not threads:
        yield from map(call, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(threads, "gazeguard-ahead") as pool:
        coming: deque[Future[T]] = deque(pool.submit(call, x) for x in islice(rest, 2 * threads))
        try:
            while coming:
                found = coming.popleft().result()
                coming.extend(pool.submit(call, item) for item in islice(rest, 1))
                yield found
        finally:
            for future in coming:
                future.cancel()
