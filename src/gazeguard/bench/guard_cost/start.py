"""What the guard's self-check adds to the start of a process that serves a model.

python -m gazeguard.bench.guard_cost.start --out FILE [--quick]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gazeguard.bench.speed.instruments import Figure, Part, Spread, in_child, ratio
from gazeguard.bench.speed.run import benchmark

SHARE = 0.05  # target
_REPEATS = 7


def started(folder: Path) -> dict[str, float]:
    """Seconds of each step from an empty process to a proven model."""
    began = time.perf_counter()
    from gazeguard.guarding.selfcheck import prove
    from gazeguard.models.fingerprint import fingerprint
    from gazeguard.models.load import load

    imported = time.perf_counter()
    target = load(folder)
    fingerprint(target)  # by which a saved guard knows its model
    loaded = time.perf_counter()
    prove(target)
    proven = time.perf_counter()
    return {"import": imported - began, "load": loaded - imported, "check": proven - loaded}


def measured(work: Path, quick: bool, threads: int) -> Iterator[tuple[str, Part]]:
    """Whole processes, one after the other; later ones find the model in the page cache."""
    from gazeguard.bench.speed.forward import Size, random_llava

    # SmolLM2-135M's depth, and about its size.
    small = Size(grid=4, layers=2, hidden=64, heads=4)
    folder = random_llava(
        work / "llava", small if quick else Size(grid=8, layers=30, hidden=640, heads=10)
    )
    module, asked = "gazeguard.bench.guard_cost.start", {"folder": str(folder)}
    runs = [in_child(module, asked, threads) for _ in range(2 if quick else _REPEATS + 1)][1:]
    check, load, imports = ([run[name] for run in runs] for name in ("check", "load", "import"))
    whole = [a + b for a, b in zip(load, imports, strict=True)]
    figures = [
        Figure("self-check", "s", Spread.of(check)),
        Figure("self-check, share of loading", "of it", ratio(check, load), at_most=SHARE),
        Figure("self-check, share of the start", "of it", ratio(check, whole), at_most=SHARE),
    ]
    yield "start", (figures, {"seconds": runs})


main = benchmark(measured, "Measure what the guard's self-check adds to a start")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        print(json.dumps(started(Path(json.loads(sys.argv[1])["folder"]))))
    else:
        main()
