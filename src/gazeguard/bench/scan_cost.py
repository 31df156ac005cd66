"""Time and memory of `gazeguard scan` on the lab's base: whole processes, start to end.

    python -m gazeguard.bench.scan_cost --out bench/results/scan_cost.json

Suspect and references are adapters with random weights, which cost as much as trained ones. No run
finds anything of an earlier one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from gazeguard.assets import BASE
from gazeguard.bench.speed.instruments import MIB, Figure, Part, Spread
from gazeguard.bench.speed.run import benchmark
from gazeguard.lab.poison import make_set, write_set
from gazeguard.models.load import load

_ENTRY = "from gazeguard.cli.main import main; main()"
USUAL_REFERENCES, USUAL_SAMPLES = 5, 64


def random_adapters(out: Path, count: int, rank: int = 16) -> list[Path]:
    """LoRA adapters of the base with small random weights."""
    from peft import LoraConfig, get_peft_model

    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        )
        model = get_peft_model(load(BASE).base, config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.01)
        made.append(out / str(seed))
        model.save_pretrained(made[-1], save_embedding_layers=False)
    return made


def scan_once(adapters: list[Path], data: Path, samples: int, threads: int) -> tuple[float, float]:
    """Seconds and peak resident MiB of one scan in a process of its own.

    Args:
        adapters: the suspect, then the references beside the base.
        data: samples.
        samples: how many of them are used.
        threads: of the process.
    """
    suspect, *others = adapters
    known = [f"--reference={path}" for path in (BASE, *others)]
    options = [f"--samples={data}", f"--limit={samples}", "--quiet", "--fail-on=never", *known]
    command = [sys.executable, "-c", _ENTRY, "scan", str(suspect), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    return seconds, usage.ru_maxrss * 1024 / MIB


def measured(work: Path, quick: bool, threads: int) -> Iterator[tuple[str, Part]]:
    """The usual scan, then more samples, then more references."""
    repeats = 1 if quick else 3
    counts = (8, 16) if quick else (32, 64, 128, 256, 512)
    models = (1,) if quick else (2, 5, 10, 19)
    data = write_set(make_set("mixed", max(counts), "none", 0.0, 7), work / "samples")
    adapters = random_adapters(work / "adapters", 1 + max(models))

    def run(references: int, samples: int) -> tuple[list[float], list[float]]:
        kept = adapters[: 1 + references]
        found = [scan_once(kept, data, samples, threads) for _ in range(repeats)]
        return [seconds for seconds, _ in found], [peak for _, peak in found]

    usual = min(USUAL_REFERENCES, max(models))
    times, peaks = {}, {}
    for samples in counts:
        times[samples], peaks[samples] = run(usual, samples)
    limit = 60 if USUAL_SAMPLES in counts else None
    figures = [
        Figure(
            f"{usual} references, {n} samples",
            "s",
            Spread.of(times[n]),
            at_most=limit if n == USUAL_SAMPLES else None,
        )
        for n in counts
    ]
    few, many = counts[0], counts[-1]
    growth = [above / below for above, below in zip(peaks[many], peaks[few], strict=True)]
    figures += [
        Figure(f"peak memory, {n} samples", "MiB", Spread.of(peaks[n])) for n in (few, many)
    ]
    figures.append(
        Figure(f"peak memory, {many} samples over {few}", "x", Spread.of(growth), at_most=1.05)
    )
    yield "samples", (figures, {"seconds": times, "peak_mib": peaks})

    more = {n: run(n, few)[0] for n in models if n != usual}
    figures = [
        Figure(f"{n} references, {few} samples", "s", Spread.of(seconds))
        for n, seconds in more.items()
    ]
    yield "references", (figures, {"seconds": more})


main = benchmark(measured, "Measure what a scan costs", threads=2)


if __name__ == "__main__":
    main()
