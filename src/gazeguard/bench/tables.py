"""Turn result files into docs/benchmark.md; a test keeps the two equal.

python -m gazeguard.bench.tables bench/results docs/benchmark.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gazeguard.bench.amdet_tables import amdet_tables
from gazeguard.bench.entropy_tables import entropy_tables, made_table
from gazeguard.bench.guard_tables import depth_table, guard_tables
from gazeguard.bench.markdown import Result, attack_took, by, figures, head, mean, row
from gazeguard.lab.poison import TARGET

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


BATCHING = 2.0  # times the throughput of one request at a time


def read(folder: Path) -> list[Result]:
    """Every cell in a folder of results, sorted by name."""
    return [json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*.json"))]


def page(
    bye: Sequence[Result],
    guard: Sequence[Result] = (),
    scans: Sequence[Result] = (),
    encoders: Sequence[Result] = (),
    single: Mapping[str, Result] | None = None,
) -> str:
    """The document.

    Args:
        bye: results of its cells.
        guard: results of its cells.
        scans: of zoos, by EntropyScan.
        encoders: of zoos, by AMDET.
        single: what one file holds, by its name: one of `SINGLE`. What is not there is left out.
    """
    single = single or {}
    results = list(bye)
    poisoned = [r for r in results if r["cell"]["trigger"] not in ("none", "resize-only")]
    parts = [HEAD, "## BYE on poisoned sets: are the rows found?\n", _detection(poisoned)]
    parts += ["## After cleaning: fine-tune again on the kept rows\n", _refit(poisoned)]
    parts += ["## BYE on clean sets and the control: is anything lost?\n", _clean(results)]
    parts += ["## BYE, every run\n", _runs(results)]
    if guard:
        parts.append(guard_tables(list(guard)))
    about_guard = ("depth", "guard_cost", "guard_start", "serve")
    parts += [SINGLE[name](single[name]) for name in about_guard if name in single]
    if scans:
        parts.append(entropy_tables(scans))
    parts += [SINGLE[n](single[n]) for n in ("made_references", "scan_cost") if n in single]
    if encoders:
        parts.append(amdet_tables(encoders))
    parts += [SINGLE[name](single[name]) for name in ("amdet_speed", "speed") if name in single]
    return "\n".join(parts).rstrip() + "\n"


def _detection(results: list[Result]) -> str:
    groups = by(results, _what)
    lines = [
        "| set | poison | recipe | runs | ASR | F1 robust | F1 paper | F1 answers only | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, rate, recipe), found in groups:
        took = [r for r in found if attack_took(r)]
        cells = [task, f"{rate:.0%}", recipe, str(len(took))]
        cells.append(mean(r["attack"]["asr"] for r in took))
        for rule in ("robust", "paper", "answers"):
            cells.append(mean(r["rules"][rule]["f1"] for r in took))
        lines.append(row([*cells, str(len(found) - len(took))]))
    return "\n".join(lines) + "\n\n" + ANSWERS_NOTE


ANSWERS_NOTE = """`answers only` is the trivial baseline that looks at no model: it flags the rows of
the most frequent whole answer of two or more words. A fixed target gives itself away in this way;
an ordinary answer as target ("yes") does not.
"""


def _refit(results: list[Result]) -> str:
    done = [r for r in results if "refit" in r and attack_took(r)]
    groups = by(done, _what)
    lines = [
        "| set | poison | recipe | runs | ASR before | ASR after | CP after | CP truly clean rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, rate, recipe), found in groups:
        cells = [task, f"{rate:.0%}", recipe, str(len(found))]
        cells.append(mean(r["attack"]["asr"] for r in found))
        cells.append(mean(r["refit"]["asr"] for r in found))
        cells.append(mean(r["refit"]["clean"] for r in found))
        cells.append(mean(r["truly_clean"] for r in found))
        lines.append(row(cells))
    return "\n".join(lines) + "\n"


def _clean(results: list[Result]) -> str:
    quiet = [r for r in results if r["cell"]["trigger"] in ("none", "resize-only")]
    groups = by(quiet, lambda r: (r["cell"]["task"], r["cell"]["trigger"]))
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
        lines.append(row(cells))
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
            row(
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


COST_HEAD = """## What the guard costs

"Plain" is the same call without the guard, its neighbour in time. The settings in brackets run with
a threshold that flags nothing; requests that are flagged have lines of their own: such a prompt is
looked at again until hiding tokens calms the guard ("never calm": until every trial was in vain); a
pass is a run of the decoder, most of them on flagged requests alone. Ratios are medians over pairs,
in brackets their 95 % interval (by order statistics; below six pairs, and for what is no ratio, the
range). Added memory leaves out weights and inputs.
"""


def _server(measured: Result) -> str:
    """The load test, with batching and without."""
    kept = f"{measured['clients']} clients for {measured['seconds']:g} s, kept busy"
    asked = f"{measured['distinct_requests']} distinct requests of seed {measured['seed']}"
    lines = [
        "## The server under load\n",
        f"`python -m gazeguard.bench.serve`: the shipped poisoned model, {kept} with {asked}, of which"
        f" the guard flags {measured['expected_flagged']} (a flagged one costs some 25 looks at"
        " its prompt). Wrong: an answer or an outcome that is not the one of the same request asked"
        " alone through the library.\n",
        *head(
            "`--max-batch` | requests | a second | median, 99 % latency | errors | wrong | memory,"
            " start and end"
        ),
    ]
    for part in ("batched", "single"):
        got = measured[part]
        late, memory = got["latency_seconds"], got["resident_bytes"]
        mib = [f"{memory[k] / (1 << 20):.0f}" for k in ("start", "end") if memory[k]]
        cells = [str(got["max_batch"]), str(got["requests"]), f"{got['requests_per_second']:.1f}"]
        cells += [f"{late['p50']:.2f} s, {late['p99']:.2f} s", str(got["errors"])]
        lines.append(row([*cells, str(got["wrong"]), " and ".join(mib) + " MiB" if mib else "?"]))
    gain = measured["throughput_ratio"]
    goal = "met" if gain >= BATCHING else "missed"
    lines.append(f"\nBatching: {gain:.2f} times the throughput (target >= {BATCHING:g}, {goal}).")
    return "\n".join(lines) + "\n"


def _what(result: Result) -> tuple[str, float, str]:
    """What a row of the tables is about: the set (and an unusual target), rate and recipe."""
    cell = result["cell"]
    target = cell.get("target", TARGET)
    name = cell["task"] if target == TARGET else f"{cell['task']}, target “{target}”"
    return name, cell["rate"], cell["recipe"]


SINGLE: dict[str, Callable[[Result], str]] = {
    "depth": depth_table,
    "guard_cost": lambda found: f"{COST_HEAD}\n{figures(found, 'guard_cost')}",
    "guard_start": lambda found: (
        f"### What the self-check adds to a start\n\n{figures(found, 'guard_cost.start')}"
    ),
    "serve": _server,
    "made_references": made_table,
    "scan_cost": lambda found: f"### What a scan costs\n\n{figures(found, 'scan_cost')}",
    "amdet_speed": lambda found: (
        f"## What a scan of a text encoder costs\n\n{figures(found, 'amdet_speed')}"
    ),
    "speed": lambda found: f"## Speed and memory\n\n{figures(found, 'speed')}",
}


def main(results: Path, out: Path) -> None:
    """Write the page."""
    bye, guard, scans, encoders = (
        read(results / name) for name in ("bye", "guard", "entropyscan", "amdet")
    )
    files = {name: results / f"{name}.json" for name in SINGLE}
    single = {
        name: json.loads(path.read_text("utf-8")) for name, path in files.items() if path.exists()
    }
    made = page(bye, guard, scans, encoders, single)
    out.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
