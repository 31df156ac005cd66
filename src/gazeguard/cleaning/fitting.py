"""`--batch-size auto`: try, on the data's own rows, how many at once are fastest and still fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import cycle, islice

from gazeguard.cleaning.batches import bulk, out_of_memory
from gazeguard.errors import UsageError
from gazeguard.types import Sample

log = logging.getLogger(__name__)

TRIED_ROWS = 32  # of the data set, the longest of them first
LARGEST = 512
WORTH = 1.05  # rows/s of twice as many rows, over those of the best so far, to go on for


def fitting_batch(samples: Sequence[Sample], rate: Callable[[list[Sample]], float]) -> int:
    """Rows per forward pass.

    Doubles the number until memory runs out or two doublings in a row bring nothing.

    Args:
        samples: readable rows; the longest are used, again and again where there are too few.
        rate: measures rows and gives rows/s; raises as an allocator does.

    Raises:
        UsageError: not even one row fits.
    """
    longest = sorted(samples, key=bulk, reverse=True)
    best, most, size, idle = 0, 0.0, 1, 0
    while size <= LARGEST and idle < 2:
        try:
            found = rate(list(islice(cycle(longest), size)))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            log.info("%d rows at once do not fit into memory.", size)
            break
        log.info("%d rows at once: %.1f rows/s.", size, found)
        idle = 0 if found >= WORTH * most else idle + 1
        if found > most:
            best, most = size, found
        size *= 2
    if not best:
        raise UsageError(
            "Not even one row fits into the device's memory: use a larger one, --device balanced"
            " or --dtype bfloat16."
        )
    return best
