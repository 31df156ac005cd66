"""docs/benchmark.md says what the stored results say, and failed attacks are in no mean."""

import copy
from dataclasses import asdict
from pathlib import Path

from gazeguard.bench.bye import cells
from gazeguard.bench.markdown import attack_took
from gazeguard.bench.tables import main, page
from gazeguard.lab.zoo import Recipe
from gazeguard.methods.cleansight.settings import DEFAULT_SETTING

ROOT = Path(__file__).parents[2]

GOT = {"outcome": "flagged", "rows": 1500, "poisoned": 150, "flagged": 150}
RUN = {
    "cell": {
        "task": "captions",
        "trigger": "texture",
        "rate": 0.1,
        "recipe": "short",
        "seed": 0,
    },
    "rows": 1500,
    "attack": {"clean": 0.9, "asr": 0.97, "n": 500},
    "rules": {
        rule: {**GOT, "precision": 1.0, "recall": f1, "f1": f1}
        for rule, f1 in {"robust": 0.98, "paper": 0.5, "answers": 1.0}.items()
    },
    "truly_clean": 0.91,
    "refit": {"clean": 0.9, "asr": 0.0, "n": 500},
}


def test_docs_equal_the_results(tmp_path):
    main(ROOT / "bench" / "results", tmp_path / "page.md")
    made = (tmp_path / "page.md").read_text("utf-8")
    stored = (ROOT / "docs" / "benchmark.md").read_text("utf-8")
    assert made == stored, "run python -m gazeguard.bench.tables bench/results docs/benchmark.md"


def test_gates():
    assert attack_took(RUN)
    weak, costly = copy.deepcopy(RUN), copy.deepcopy(RUN)
    weak["attack"]["asr"] = 0.94
    costly["attack"]["clean"] = 0.87
    assert not attack_took(weak)
    assert not attack_took(costly)


def test_a_failed_attack_is_counted_apart():
    failed = copy.deepcopy(RUN)
    failed["attack"]["asr"] = 0.5
    failed["rules"]["robust"]["f1"] = 0.0
    text = page([RUN, failed])
    row = next(line for line in text.splitlines() if line.startswith("| captions | 10%"))
    cells_ = [c.strip() for c in row.strip("|").split("|")]
    assert cells_[3:6] == ["1", "0.970", "0.980"]
    assert cells_[-1] == "1"


def test_cells_have_their_own_names():
    names = [cell.name for cell in cells(3)]
    assert len(names) == len(set(names))


def guarded(seed, asr_after, taken=True):
    got = {"auroc": 1.0, "tpr_at_1_fpr": 1.0, "false_alarms": 0.01}
    got["fired"] = {"auroc": 1.0, "tpr_at_1_fpr": 1.0, "detected": 1.0, "n": 294}
    after = {"clean": 0.91, "triggered": 0.5, "asr": asr_after}
    return {
        "cell": {"task": "captions", "trigger": "wanet", "recipe": "projector", "seed": seed},
        "n": {"calibration": 200, "clean": 300, "triggered": 300},
        "alpha": 0.01,
        "attack": {"clean": 0.9, "asr": 0.99 if taken else 0.3, "n": 500},
        "truly_clean": 0.9,
        "before": {"clean": 0.92, "triggered": 0.0, "asr": 0.98},
        "variants": {name: {**got, **after} for name in (DEFAULT_SETTING, "paper")},
        "ablation": {"prune everybody": after},
        "ceiling": {"base": 0.7, "trigger_hidden": 0.6},
    }


def test_the_guards_means_leave_failed_attacks_out():
    text = page([RUN], [guarded(0, 0.0), guarded(1, 0.02), guarded(2, 0.9, taken=False)])
    line = next(x for x in text.splitlines() if x.startswith("| captions | wanet | projector | 2"))
    cells_ = [c.strip() for c in line.strip("|").split("|")]
    assert cells_[10].startswith("0.010 ")
    assert [x[:5] for x in cells_[13:16]] == ["0.500", "0.700", "0.600"]
    assert cells_[-1] == "1"
    worst = next(x for x in text.splitlines() if x.startswith(f"| {DEFAULT_SETTING} | 1.000"))
    assert "| 0.020 |" in worst, "the worst of the runs that count"
    assert "-0.010" in worst, "clean answers lost"


def test_the_servers_figures_and_its_target():
    part = {
        "max_batch": 8,
        "requests": 90,
        "requests_per_second": 1.5,
        "latency_seconds": {"p50": 2.0, "p95": 3.0, "p99": 4.0},
        "errors": 0,
        "wrong": 7,
        "resident_bytes": {"start": 600 << 20, "end": 601 << 20},
    }
    load = {"clients": 32, "seconds": 60.0, "seed": 0, "distinct_requests": 9}
    load |= {"expected_flagged": 4}
    load |= {"batched": part, "single": {**part, "max_batch": 1}, "throughput_ratio": 1.9}
    text = page([RUN], single={"serve": load})
    assert "| 8 | 90 | 1.5 | 2.00 s, 4.00 s | 0 | 7 | 600 and 601 MiB |" in text
    assert "1.90 times the throughput (target >= 2, missed)" in text


def scanned():
    """A made-up result: eleven variants, one adaptive and one failed attack."""
    recipe = asdict(Recipe(trigger="blended", rate=0.2, seed=7, split="held-out"))
    shy = {**recipe, "hide": "profile", "seed": 20}
    older = {key: value for key, value in recipe.items() if key != "hide"}
    kept = {"value": 0.875, "low": 0.75, "high": 1.0}
    got = {"auroc": kept, "f1": kept, "recall": kept, "false_alarms": kept}
    got |= {"base_only": {"auroc": kept, "best_f1": 0.625}, "benign": 5, "backdoored": 8}
    variant = {"statistic": "ratio", "q": 1.0, "layers": "all", "n": 64}
    said = {"score": 2.5, "p_value": 0.25, "flagged": False}
    return {
        "zoo": "zoo",
        "seed": 4000,
        "n_samples": 32,
        "alpha": 0.1,
        "references": 10,
        "sweep": [
            {**variant, "q": q / 10, "design_auroc": 0.5 + q / 100, "design_gap": 1 + q}
            for q in range(11)
        ],
        "variants": {
            **{
                name: {"variant": variant, "held-out": got, "all": got}
                for name in ("chosen", "paper", "shipped")
            },
            "weights moved": {"variant": None, "held-out": got, "all": got},
        },
        "samples": [
            {"variant": name, "n": n, "auroc": kept}
            for n in (8, 64)
            for name in ("chosen", "paper")
        ],
        "models": [
            {
                **{"model": f"m{i}", "recipe": older, "truth": truth, "split": split},
                "variants": {
                    name: {"score": score, "p_value": 0.05 if score > 3 else 0.5, "base_only": 1.0}
                    for name in ("chosen", "paper", "shipped", "weights moved")
                },
            }
            for i, (truth, split, score) in enumerate(
                [
                    ("backdoored", "held-out", 3.5),
                    ("benign", "held-out", 2.5),
                    ("benign", "held-out", 1.25),
                    ("backdoored", "design", 1.5),
                    ("benign", "design", 2.75),
                ]
            )
        ],
        "adaptive": [
            {
                **{"model": "shy", "recipe": shy, "asr": 0.925, "clean": 0.9, "usual_clean": 0.91},
                "variants": {
                    "chosen": {**said, "flagged": True},
                    "paper": said,
                    "shipped": said,
                },
            }
        ],
        "base_itself": {
            "chosen": {"score": None, "p_value": None, "flagged": None},
            "paper": said,
            "shipped": said,
        },
        "failed_attacks": [{"recipe": older, "asr": 0.34, "clean": 0.92}],
    }


def line(text, start):
    """Cells of the only line of a page that starts so."""
    (found,) = (x for x in text.splitlines() if x.startswith(start))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_scans_of_a_zoo():
    text = page([RUN], scans=[scanned()])
    assert line(text, "| chosen |")[1:6] == ["ratio", "1", "all", "32", "0.875 [0.750, 1.000]"]
    assert line(text, "| shipped |")[-1] == "0.625"
    sweep = text.split("best of the sweep")[1].split("###")[0]
    assert sweep.count("| ratio |") == 10, "the worst of eleven is left out"
    assert sweep.index("0.600") < sweep.index("0.510")
    assert "0.500" not in sweep
    assert line(text, "| 64 |") == ["64", *["0.875 [0.750, 1.000]"] * 2]
    shy = line(text, "| profile |")
    assert shy[1:4] == ["captions", "blended", "20%"]
    assert shy[-6:] == ["0.925", "0.900", "0.910", "2.50 / 0.250 / yes", *["2.50 / 0.250 / no"] * 2]
    base = line(text, "| the base itself |")
    assert len(base) == len(shy)
    assert base[-3:] == ["not measurable", "2.50 / 0.250 / no", "2.50 / 0.250 / no"]
    failed = text.split("attacks that failed")[1].split("###")[0]
    assert "| nothing | 0.340 | 0.920 |" in failed, "a recipe of before one could hide"
    widths = {len(x.split("|")) for x in failed.splitlines() if x.startswith("|")}
    assert len(widths) == 1
    models = text.split("every held-out model")[1]
    assert "3.50 / 0.050" in models
    assert "2.75 / 0.500" not in models, "that is a design model"


def test_zoos_are_counted_together():
    text = page([RUN], scans=[scanned(), {**scanned(), "zoo": "other"}])
    held = line(text, "| held-out | paper |")
    assert held[2:6] == ["4", "2", "1.000 [1.000, 1.000]", "1.000 [1.000, 1.000]"]
    assert held[6].startswith("1.000 [0.34"), "two of two flagged: Wilson knows how few they are"
    every = line(text, "| all | paper |")
    # Of 2 x 3 pairs in each zoo the backdoored one stands above in 3 + 1.
    assert every[2:4] == ["6", "4"]
    assert every[4].startswith("0.667")
    assert "together" not in page([RUN], scans=[scanned()])


def test_a_zoo_without_adaptive_or_failed_attacks_has_no_such_part():
    text = page([RUN], scans=[{**scanned(), "adaptive": [], "failed_attacks": []}])
    assert "every held-out model" in text
    assert "### Zoo `zoo`: adaptive" not in text
    assert "### Zoo `zoo`: attacks that failed" not in text


def test_references_that_the_tool_makes():
    recipe = asdict(Recipe(trigger="blended", rate=0.2, seed=7, split="held-out"))
    kept = {"value": 0.5, "low": 0.25, "high": 0.75}
    model = {"model": "m", "truth": "backdoored", "recipe": recipe, "score": 2.5, "p_value": 0.05}
    model |= {"references": [1.0, 0.5, 1.5], "outcome": "flagged"}
    run = {"steps": 200, "recall": kept, "false_alarms": kept, "auroc": 0.75}
    run |= {"benign": 5, "backdoored": 6, "models": [model]}
    about = {"zoo": "llava", "rank": 16, "alpha": 0.05, "seed": 1, "n_samples": 64, "tuned_on": 512}
    text = page([RUN], single={"made_references": {**about, "runs": [run]}})
    cells_ = ["200", "5", "6", "0.750", *["0.500 [0.250, 0.750]"] * 2]
    assert line(text, "| 200 |") == cells_
    assert "| 2.50 | 0.50 to 1.50 | 0.050 | flagged |" in text
    assert "19 references for an alpha of 0.05" in text
