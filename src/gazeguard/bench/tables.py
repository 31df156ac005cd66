"""Turn result files into docs/benchmark.md; a test keeps the two equal.

python -m gazeguard.bench.tables bench/results docs/benchmark.md
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gazeguard.bench.metrics import mean_interval
from gazeguard.lab.poison import TARGET

Result = dict[str, Any]
ASR_GATE, CP_GATE = 0.95, 0.03

HEAD = """# Benchmark

Generated from `bench/results/` by `python -m gazeguard.bench.tables bench/results docs/benchmark.md`;
the results come from `make bench` (hours on two cores; it skips what is there). Do not edit by hand.

Everything here is measured on the lab's own small models (a LLaVA of 2.8 M parameters trained from
scratch, 64 image tokens) and says nothing by itself about a 7 B model. Intervals are 95 % t intervals
over runs; a run is one seed of one attack.

**How to read an attack.** A run counts only when the attack took: attack success rate (ASR, exact
target on held-out triggered pictures) at least 95 %, and clean performance (CP, exact answers on
held-out clean pictures) within 3 points of the fine-tune on the truly clean rows. The others are
listed as "attack failed" and are in no mean.

The robust rule was made while looking at cells of seed 0; those of later seeds and the clean sets of
seeds 3 and 4 confirm it (docs/LOG.md says what was changed, and why).
"""


def attack_took(result: Result) -> bool:
    """Both quality gates of an attack."""
    attack = result["attack"]
    close = attack["clean"] >= result["truly_clean"] - CP_GATE
    return bool(attack["asr"] >= ASR_GATE and close)


def read(folder: Path) -> list[Result]:
    """Every cell of BYE's benchmark, sorted by name."""
    return [json.loads(p.read_text("utf-8")) for p in sorted((folder / "bye").glob("*.json"))]


def page(results: list[Result], speed: Result | None) -> str:
    """The whole document."""
    poisoned = [r for r in results if r["cell"]["trigger"] not in ("none", "resize-only")]
    parts = [HEAD, "## Poisoned sets: are the rows found?\n", _detection(poisoned)]
    parts += ["## After cleaning: fine-tune again on the kept rows\n", _refit(poisoned)]
    parts += ["## Clean sets and the control: is anything lost?\n", _clean(results)]
    parts += ["## Every run\n", _runs(results)]
    if speed is not None:
        parts += ["## Speed and memory\n", _speed(speed)]
    return "\n".join(parts).rstrip() + "\n"


def _detection(results: list[Result]) -> str:
    groups = _by(results, _what)
    lines = [
        "| set | poison | recipe | runs | ASR | F1 robust | F1 paper | F1 answers only | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, rate, recipe), found in groups:
        took = [r for r in found if attack_took(r)]
        cells = [task, f"{rate:.0%}", recipe, str(len(took))]
        cells.append(_mean(r["attack"]["asr"] for r in took))
        for rule in ("robust", "paper", "answers"):
            cells.append(_mean(r["rules"][rule]["f1"] for r in took))
        lines.append(_row([*cells, str(len(found) - len(took))]))
    return "\n".join(lines) + "\n\n" + ANSWERS_NOTE


ANSWERS_NOTE = """`answers only` is the trivial baseline that looks at no model: it flags the rows of
the most frequent whole answer of two or more words. A fixed target gives itself away in this way;
an ordinary answer as target ("yes") does not.
"""


def _refit(results: list[Result]) -> str:
    done = [r for r in results if "refit" in r and attack_took(r)]
    groups = _by(done, _what)
    lines = [
        "| set | poison | recipe | runs | ASR before | ASR after | CP after | CP truly clean rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, rate, recipe), found in groups:
        cells = [task, f"{rate:.0%}", recipe, str(len(found))]
        cells.append(_mean(r["attack"]["asr"] for r in found))
        cells.append(_mean(r["refit"]["asr"] for r in found))
        cells.append(_mean(r["refit"]["clean"] for r in found))
        cells.append(_mean(r["truly_clean"] for r in found))
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _clean(results: list[Result]) -> str:
    quiet = [r for r in results if r["cell"]["trigger"] in ("none", "resize-only")]
    groups = _by(quiet, lambda r: (r["cell"]["task"], r["cell"]["trigger"]))
    lines = [
        "| set | pictures | runs | outcome clean, robust | rows removed, robust | paper: clean | paper: removed |",
        "|---|---|---|---|---|---|---|",
    ]
    for (task, trigger), found in groups:
        cells = [task, {"none": "clean", "resize-only": "10 % resized"}[trigger], str(len(found))]
        for rule in ("robust", "paper"):
            got = [r["rules"][rule] for r in found]
            cells.append(f"{sum(g['outcome'] == 'clean' for g in got)} of {len(got)}")
            cells.append(f"{sum(g['flagged'] for g in got) / sum(g['rows'] for g in got):.2%}")
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _runs(results: list[Result]) -> str:
    lines = [
        "| set | trigger | poison | recipe | seed | CP | CP truly clean | ASR | took | robust P / R / F1 | paper F1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        c, a, robust = r["cell"], r["attack"], r["rules"]["robust"]
        poisoned = robust["f1"] is not None
        lines.append(
            _row(
                [
                    _what(r)[0],
                    c["trigger"],
                    f"{c['rate']:.0%}",
                    c["recipe"],
                    str(c["seed"]),
                    f"{a['clean']:.3f}",
                    f"{r['truly_clean']:.3f}" if "truly_clean" in r else "",
                    f"{a['asr']:.3f}" if a["asr"] is not None else "",
                    ("yes" if attack_took(r) else "no") if poisoned else "",
                    " / ".join(f"{robust[k]:.3f}" for k in ("precision", "recall", "f1"))
                    if poisoned
                    else f"{robust['flagged']} removed",
                    f"{r['rules']['paper']['f1']:.3f}"
                    if poisoned
                    else f"{r['rules']['paper']['flagged']} removed",
                ]
            )
        )
    rows = {r["rows"] for r in results}
    held = {r["attack"]["n"] for r in results}
    note = f"Rows per set: {sorted(rows)}; held-out rows per score: {sorted(held)}.\n"
    return "\n".join(lines) + "\n\n" + note


def _speed(speed: Result) -> str:
    machine = speed["machine"]
    words = ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None)
    lines = [f"One run of `python -m gazeguard.bench.speed` ({words}).\n"]
    lines += ["| figure | value | target |", "|---|---|---|"]
    lines += [_row([f["name"], f["text"], f["target"]]) for f in speed["figures"]]
    return "\n".join(lines) + "\n"


def _what(result: Result) -> tuple[str, float, str]:
    """What a row of the tables is about: the set (and an unusual target), rate and recipe."""
    cell = result["cell"]
    target = cell.get("target", TARGET)
    name = cell["task"] if target == TARGET else f"{cell['task']}, target “{target}”"
    return name, cell["rate"], cell["recipe"]


def _by(results: list[Result], key: Callable[[Result], Any]) -> list[tuple[Any, list[Result]]]:
    groups: dict[Any, list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return sorted(groups.items())


def _mean(values: Iterable[float]) -> str:
    numbers = list(values)
    if not numbers:
        return "-"
    mean, half = mean_interval(numbers)
    return f"{mean:.3f}" if len(numbers) < 2 else f"{mean:.3f} ± {half:.3f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(results: Path, out: Path) -> None:
    """Write the page."""
    speed = results / "speed.json"
    made = page(read(results), json.loads(speed.read_text("utf-8")) if speed.exists() else None)
    out.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
