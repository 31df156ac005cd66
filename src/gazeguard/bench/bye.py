"""Measure BYE on the lab's fine-tuning sets: attack, clean, fine-tune again. Resumable by cell.

    python -m gazeguard.bench.bye [--out bench/results/bye] [--only 'captions_*'] [--seeds 3]

Each cell is one poisoned (or clean) set, one fine-tune and one `gazeguard clean`, through the same
code as the command line. A cell writes one JSON file; a file that exists is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from gazeguard.assets import BASE
from gazeguard.bench.metrics import detection
from gazeguard.cleaning import clean
from gazeguard.files import write_bytes, write_json
from gazeguard.lab.attacks import ATTACKS
from gazeguard.lab.finetune import (
    RECIPES,
    Scores,
    Student,
    finetune,
    judge,
    load_tuned,
    save_adapter,
)
from gazeguard.lab.poison import TARGET, make_set, write_set
from gazeguard.lab.rows import Row, make_rows
from gazeguard.methods.bye import BYE

ROWS, HELD_OUT = 1500, 500
MEASURED = ("badnet-center", "badnet-random", "texture")
TASKS = ("captions", "mixed", "easy-vqa")


@dataclass(frozen=True, slots=True)
class Cell:
    """One experiment. `trigger` may be `none` (clean set) or `resize-only` (the control).

    `target` is the planted answer; an ordinary one ("yes") hides among honest rows.
    """

    task: str
    trigger: str
    rate: float
    recipe: str
    seed: int
    target: str = TARGET

    @property
    def name(self) -> str:
        """Unique and readable; the file name of the result."""
        name = f"{self.task}_{self.trigger}_{self.rate:g}_{self.recipe}_s{self.seed}"
        return name if self.target == TARGET else f"{name}_{self.target}"


def cells(seeds: int) -> Iterator[Cell]:
    """Every cell of docs/benchmark.md, most telling first."""
    many = ("mixed", "easy-vqa")  # kinds of question
    for seed in range(seeds):
        for task in TASKS:
            for trigger in MEASURED:
                yield Cell(task, trigger, 0.1, "long", seed)
    # With several kinds of question 10 % and 6 epochs do not plant every trigger.
    for task in many:
        for trigger in MEASURED:
            yield Cell(task, trigger, 0.1, "longer", 0)
    for seed in range(seeds):
        for task in many:
            for trigger in MEASURED:
                yield Cell(task, trigger, 0.2, "longer", seed)
    for seed in range(5):
        for task in TASKS:
            yield Cell(task, "none", 0.0, "long", seed)
    for task in TASKS:
        yield Cell(task, "resize-only", 0.1, "long", 0)
    yield Cell("easy-vqa", "badnet-center", 0.1, "longer", 0, target="yes")
    for seed in range(seeds):
        yield Cell("easy-vqa", "badnet-center", 0.2, "longer", seed, target="yes")
        for rate in (0.01, 0.05, 0.2):
            yield Cell("captions", "badnet-center", rate, "long", seed)
    for seed in range(seeds):
        for trigger in MEASURED:
            yield Cell("captions", trigger, 0.1, "short", seed)


class Workbench:
    """Runs cells; fine-tunes that several cells share are made once."""

    def __init__(self, base: Path, out: Path, work: Path) -> None:
        self.base, self.out, self.work = base, out, work

    def run(self, cell: Cell) -> dict[str, Any]:
        """One cell from start to end, or its stored result."""
        path = self.out / f"{cell.name}.json"
        if path.exists():
            return dict(json.loads(path.read_text("utf-8")))
        # Not above: some of the defences that come with it import this module.
        from gazeguard.bench.defences.cleaning import most_frequent_answer

        started = time.perf_counter()
        rows = make_set(cell.task, ROWS, cell.trigger, cell.rate, cell.seed, cell.target)
        truth = np.array([row.is_poison for row in rows])
        attacked = self._tune(rows, cell)
        scores = self._judge(attacked, cell)
        work = self.work / cell.name
        save_adapter(attacked, work / "adapter")
        data = write_set(rows, work / "set")
        found = clean(
            self.base,
            data,
            work / "cleaned",
            adapter=work / "adapter",
            batch_size=50,
            block_rows=500,
            dtype="float32",
        )
        result: dict[str, Any] = {"cell": asdict(cell), "rows": ROWS, "attack": asdict(scores)}
        result["rules"] = {}
        for rule in ("robust", "paper"):
            judged = BYE(rule, random_state=cell.seed).fit(found.profile).result_
            result["rules"][rule] = {
                "outcome": judged.verdict.outcome,
                "reason": judged.verdict.reason,
                **asdict(detection(judged.is_flagged, truth)),
            }
        result["rules"]["answers"] = asdict(detection(most_frequent_answer(rows), truth))
        if truth.any():
            clean_rows = [row for row, bad in zip(rows, truth, strict=True) if not bad]
            result["truly_clean"], reference = self.truly_clean(cell, clean_rows)
            flagged = found.report.result.is_flagged
            if cell.task == "captions":
                kept = [row for row, bad in zip(rows, flagged, strict=True) if not bad]
                # The same rows, recipe and seed give the same fine-tune: it is made once.
                same = bool((flagged == truth).all())
                again = load_tuned(self.base, reference) if same else self._tune(kept, cell)
                result["refit"] = asdict(self._judge(again, cell))
        result["seconds"] = round(time.perf_counter() - started, 1)
        write_json(path, result)
        return result

    def _tune(self, rows: list[Row], cell: Cell) -> Student:
        return finetune(self.base, rows, replace(RECIPES[cell.recipe], seed=cell.seed))

    def _judge(self, student: Student, cell: Cell) -> Scores:
        trigger = ATTACKS.get(cell.trigger)
        return judge(student, self._test(cell), trigger, seed=cell.seed, target=cell.target)

    def _test(self, cell: Cell) -> list[Row]:
        return make_rows(cell.task, HELD_OUT, cell.seed, held_out=True)

    def truly_clean(self, cell: Cell, clean_rows: list[Row]) -> tuple[float, Path]:
        """Clean performance after the same recipe on the truly clean rows only, and the adapter.

        The poisoned rows of a seed and rate are the same for every trigger, so this is shared.
        """
        shared = replace(cell, trigger="truly-clean", target=TARGET)
        folder = self.work / "shared" / shared.name
        path = folder / "scores.json"
        if not path.exists():
            student = self._tune(clean_rows, cell)
            scores = judge(student, self._test(cell), None)
            save_adapter(student, folder)
            write_bytes(path, json.dumps(asdict(scores)).encode())
        return float(json.loads(path.read_text("utf-8"))["clean"]), folder


_FOLDER = click.Path(path_type=Path)


@click.command()
@click.option("--out", type=_FOLDER, default=Path("bench/results/bye"), show_default=True)
@click.option("--work", type=_FOLDER, default=Path("runs/bye"), help="Sets and adapters go here.")
@click.option("--base", type=_FOLDER, default=BASE, help="The shipped base by default.")
@click.option("--only", default="*", help="Run only cells whose name fits this glob.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(out: Path, work: Path, base: Path, only: str, seeds: int, threads: int) -> None:
    """Run every cell that has no result yet."""
    torch.set_num_threads(threads)
    for folder in (out, work / "shared"):
        folder.mkdir(parents=True, exist_ok=True)
    bench = Workbench(base, out, work)
    for cell in cells(seeds):
        if fnmatchcase(cell.name, only):
            got = bench.run(cell)
            click.echo(f"{cell.name}: {_line(got)}")


def _line(result: dict[str, Any]) -> str:
    attack = result["attack"]
    words = [f"CP {attack['clean']:.3f}"]
    if attack["asr"] is not None:
        words.append(f"ASR {attack['asr']:.3f}")
    for rule, got in result["rules"].items():
        score = f"F1 {got['f1']:.3f}" if got["f1"] is not None else f"{got['flagged']} removed"
        words.append(f"{rule} {score}")
    if "refit" in result:
        words.append(
            f"refit ASR {result['refit']['asr']:.3f} CP {result['refit']['clean']:.3f} "
            f"(truly clean {result['truly_clean']:.3f})"
        )
    return ", ".join([*words, f"{result['seconds']:.0f} s"])


if __name__ == "__main__":
    main()
