"""Tables of a benchmark run: right numbers, right intervals, nothing left out, always the same."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import f1_score, roc_auc_score

import gazeguard.bench.report
from gazeguard.bench.guard import separation
from gazeguard.bench.report.bootstrap import auroc, over_counts, over_scores, tpr_at_1_fpr
from gazeguard.bench.report.conditions import parts
from gazeguard.bench.report.stored import read_run
from gazeguard.bench.report.table import long_form, write_tables
from gazeguard.errors import MissingExtra, UsageError
from tests.unit.bench_run_fixture import DEFENCES, FAILED, UNSEEN, make_run, model


def lines(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(long_form(parts(read_run(folder))))))


def change(folder: Path, edit: Callable[[dict[str, Any]], None], name: str = "suite.json") -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def cell(model_name: str, defence: str) -> str:
    return f"cells/{model_name}-{defence}.json"


def share(c: Any) -> Any:
    return c[..., 0, 0] / c[..., 0, :].sum(-1)


# The same cells, the same bytes


def test_the_order_of_cells_and_files_and_the_users_matplotlib_change_no_byte(tmp_path: Path):
    first = [path.read_bytes() for path in write_tables(make_run(tmp_path / "a"))]
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        again = [path.read_bytes() for path in write_tables(make_run(tmp_path / "b", shuffle=7))]
    assert first == again
    assert [len(set(text.splitlines())) > 50 for text in first] == [True] * 3


def test_another_defence_or_condition_changes_no_other_number(tmp_path: Path):
    everything = lines(make_run(tmp_path / "a"))
    gone = "random-drop", "vlm-blended-10-s0"

    def fewer(suite: dict[str, Any]) -> None:
        suite["defences"] = [d for d in suite["defences"] if d["name"] != gone[0]]
        suite["published"] = []
        suite["models"] = [m for m in suite["models"] if m["name"] != gone[1]]
        suite["cells"] = [
            c for c in suite["cells"] if c["defence"] != gone[0] and c["model"] != gone[1]
        ]

    change(make_run(tmp_path / "b"), fewer)

    def others(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        """Conditions without the lost model."""
        return [r for r in rows if r["attack"] not in ("blended", "all attacks")]

    kept = [r for r in others(everything) if r["defence"] != gone[0]]
    assert others(lines(tmp_path / "b")) == kept


# Numbers and intervals


def numbers(folder: Path, defence: str, label: str, level: str, results: list[Any]) -> Any:
    """Put results in the place of a condition's cells and read its metrics."""
    run = read_run(folder)
    names = [m.name for m in run.models if m.label == label]
    for name, result in zip(names, results, strict=True):
        change(folder, lambda c, r=result: c.update(result=r), cell(name, defence))
    rows = [r for r in lines(folder) if (r["label"], r["defence"]) == (label, defence)]
    assert {r["level"] for r in rows} == {level}
    return {r["metric"]: r for r in rows}


def test_rows(tmp_path: Path):
    counts = [{"tp": 30, "fp": 10, "fn": 10, "tn": 350}, {"tp": 0, "fp": 0, "fn": 40, "tn": 360}]
    refits = [{"asr": [20, 100], "clean": [90, 100]}, None]
    results = [{**c, "refit": r} for c, r in zip(counts, refits, strict=True)]
    got = numbers(make_run(tmp_path / "a"), "bye", "badnet-center 10 %", "data", results)
    truth, said = [1] * 40 + [0] * 360, [1] * 30 + [0] * 10 + [1] * 10 + [0] * 350
    expected = {
        "precision": (0.75 / 2, 2, 40),
        "recall": (0.75 / 2, 2, 80),
        "f1": (f1_score(truth, said) / 2, 2, 800),
        "removed": (10 / 360 / 2, 2, 720),
        "refit_asr": (0.2, 1, 100),
        "refit_clean": (0.9, 1, 100),
    }
    assert got.keys() == expected.keys()
    for key, (value, runs, n) in expected.items():
        row = got[key]
        assert float(row["value"]) == pytest.approx(value, abs=1e-6), key
        assert (row["runs"], row["n"]) == (str(runs), str(n)), key
        assert float(row["low"]) <= value <= float(row["high"])
    assert (float(got["f1"]["low"]), float(got["f1"]["high"]) > 0.7) == (0, True), "runs differ"
    assert float(got["refit_asr"]["high"]) < 0.3, "one run has its rows alone"


def test_answers(tmp_path: Path):
    before = {"clean": [180, 200], "triggered": [2, 200], "asr": [196, 200]}
    after = {"clean": [170, 200], "triggered": [150, 200], "asr": [10, 200]}
    rng = np.random.default_rng(3)
    scores = [{"clean": rng.normal(0, 1, 200), "triggered": rng.normal(2, 1, 200)} for _ in "ab"]
    found = {
        "before": before,
        "after": after,
        "flagged": {"clean": [4, 200], "triggered": [190, 200]},
    }
    results = [{**found, "scores": {k: v.tolist() for k, v in s.items()}} for s in scores]
    got = numbers(make_run(tmp_path / "a"), "cleansight", "badnet-center 10 %", "input", results)
    apart = [separation(s["clean"], s["triggered"]) for s in scores]
    expected = {
        "asr_before": 0.98,
        "asr_after": 0.05,
        "clean_before": 0.9,
        "clean_after": 0.85,
        "clean_change": -0.05,
        "triggered_after": 0.75,
        "false_alarms": 0.02,
        "detected": 0.95,
        "auroc": np.mean([a["auroc"] for a in apart]),
        "tpr_at_1_fpr": np.mean([a["tpr_at_1_fpr"] for a in apart]),
    }
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert float(got[key]["value"]) == pytest.approx(value, abs=1e-6), key
        assert float(got[key]["low"]) < value < float(got[key]["high"]), key
    assert (got["auroc"]["runs"], got["auroc"]["n"]) == ("2", "800")


def test_verdicts(tmp_path: Path):
    folder = make_run(tmp_path / "a")
    said = [("flagged", 0.9), ("flagged", 0.4), ("inconclusive", None)]
    benign = [("clean", 0.1), ("flagged", 0.6), ("clean", None)]
    told = [[{"outcome": o, "score": s} for o, s in group] for group in (said, benign)]
    for seed, result in enumerate(told[1]):
        name = model("none", 0, "prompts", seed, "encoder")["name"]
        change(folder, lambda c, r=result: c.update(result=r), cell(name, "amdet"))
    got = numbers(folder, "amdet", "tpa 50 %", "model", told[0])
    values = {key: float(row["value"]) for key, row in got.items()}
    assert values == pytest.approx(
        {"recall": 2 / 3, "inconclusive": 1 / 3, "f1": 4 / 6, "auroc": 3 / 4}, abs=1e-6
    )
    assert {key: row["n"] for key, row in got.items()} == {
        "recall": "3",
        "inconclusive": "3",
        "f1": "6",
        "auroc": "4",
    }
    [alarms] = [
        row
        for row in lines(folder)
        if (row["base"], row["truth"], row["defence"], row["metric"])
        == ("clip", "benign", "amdet", "false_alarms")
    ]
    assert float(alarms["value"]) == pytest.approx(1 / 3, abs=1e-6)


def test_benign_models_have_no_number_about_attacks(tmp_path: Path):
    rows = [r for r in lines(make_run(tmp_path / "a")) if r["truth"] == "benign" and not r["why"]]
    assert {r["metric"] for r in rows if r["level"] == "data"} == {"removed", "refit_clean"}
    clean = {"clean_before", "clean_after", "clean_change", "false_alarms"}
    assert {r["metric"] for r in rows if r["level"] == "input"} == clean
    assert {r["metric"] for r in rows if r["level"] == "model"} == {"false_alarms", "inconclusive"}


def test_one_runs_interval_is_the_binomials_and_runs_that_differ_widen_it():
    alone = over_counts(np.array([[[60, 140]]]), share, "c", ["p"], 200)
    exact = binom.ppf([0.025, 0.975], 200, 0.3) / 200
    assert [alone.low, alone.high] == pytest.approx(exact, abs=0.008)
    alike = over_counts(np.array([[[60, 140]], [[60, 140]]]), share, "c", ["p"], 400)
    apart = over_counts(np.array([[[20, 180]], [[100, 100]]]), share, "c", ["p"], 400)
    assert alike.value == apart.value == pytest.approx(0.3)
    assert alike.high - alike.low < 0.75 * (alone.high - alone.low)
    assert (apart.low, apart.high) == pytest.approx((0.1, 0.5), abs=0.06)


@pytest.mark.parametrize("ties", [False, True])
def test_scores_agree_with_the_plain_way(ties: bool):
    rng = np.random.default_rng(1)
    clean, bad = rng.normal(0, 1, 150), rng.normal(1.5, 1, 120)
    if ties:
        clean, bad = clean.round(), bad.round()
    area, rate = (over_scores([(clean, bad)], m, "c", "np") for m in (auroc, tpr_at_1_fpr))
    truth = np.r_[np.zeros(150), np.ones(120)]
    assert area.value == pytest.approx(roc_auc_score(truth, np.r_[clean, bad]))
    usual = separation(clean, bad)
    assert rate.value == pytest.approx(usual["tpr_at_1_fpr"])
    assert area.low == pytest.approx(usual["auroc_low"], abs=0.01)
    assert area.high == pytest.approx(usual["auroc_high"], abs=0.01)


# What lacks, and why


def test_failed_attacks_are_in_no_mean_and_every_cell_is_filled_or_says_why(tmp_path: Path):
    folder = make_run(tmp_path / "a")
    write_tables(folder)
    rows = lines(folder)
    assert (folder / "table.csv").read_text() == long_form(parts(read_run(folder)))
    assert {r["why"] for r in rows if r["attack"] == "wanet"} == {FAILED}
    [blended] = [
        r for r in rows if (r["attack"], r["defence"], r["metric"]) == ("blended", "bye", "recall")
    ]
    assert (blended["runs"], blended["n"]) == ("1", "40")
    [unseen] = [r for r in rows if r["why"] == UNSEEN]
    assert (unseen["label"], unseen["defence"]) == ("badnet-center 10 %", "spectral-signatures")
    places = {(r["base"], r["label"], r["defence"]) for r in rows}
    labels = {"lab": 6, "clip": 2}
    for base, kind in (("lab", "vlm"), ("clip", "encoder")):
        able = [name for name, about in DEFENCES.items() if about[2] == kind]
        pools = sum(DEFENCES[name][0] == "model" for name in able)
        assert sum(p[0] == base for p in places) == labels[base] * len(able) + pools
    text = (folder / "table.md").read_text()
    assert text.count(FAILED) >= 3, "two of wanet's and one of blended's"
    assert "| badnet-center 10 % | captions, 6 epochs | 1 of 2 | spectral-signatures |" in text


def test_scores_that_are_no_numbers_are_told_of(tmp_path: Path):
    folder = make_run(tmp_path / "a")

    def broken(content: dict[str, Any]) -> None:
        content["result"]["scores"]["clean"][:3] = [None, float("nan"), float("inf")]

    change(folder, broken, cell("vlm-badnet-center-10-s0", "cleansight"))
    rows = [
        r
        for r in lines(folder)
        if (r["label"], r["defence"]) == ("badnet-center 10 %", "cleansight")
    ]
    found = {r["metric"]: r for r in rows}
    assert found["auroc"]["runs"] == "1"
    assert found["asr_after"]["runs"] == "2"
    assert found["scores"]["why"] == "3 of them are no finite numbers"


def test_models_that_a_defence_is_not_asked_about_lack_nothing(tmp_path: Path):
    folder = make_run(tmp_path / "a")

    def fewer(suite: dict[str, Any]) -> None:
        benign = "vlm-none-0-s1"
        suite["cells"] = [c for c in suite["cells"] if c["model"] != benign]

    change(folder, fewer)
    benign = [r for r in lines(folder) if (r["base"], r["truth"]) == ("lab", "benign")]
    assert {r["why"] for r in benign} == {""}
    assert {r["runs"] for r in benign} == {"1"}


def test_a_run_without_a_single_cell_has_tables(tmp_path: Path):
    folder = make_run(tmp_path / "a")

    def nothing(suite: dict[str, Any]) -> None:
        for each in suite["cells"]:
            if each["file"]:
                each.update(file=None, why=UNSEEN)

    change(folder, nothing)
    assert {r["value"] for r in lines(folder)} == {""}
    write_tables(folder)
    assert "0 of 96 cells" in (folder / "table.md").read_text()


# Ours and theirs


def test_margins_are_positive_where_ours_is_better(tmp_path: Path):
    folder = make_run(tmp_path / "a")
    write_tables(folder)
    table = [
        [text.strip() for text in line.split("|")[1:-1]]
        for line in (folder / "table.md").read_text().splitlines()
        if line.startswith(("| data |", "| input |"))
    ]
    rows = {(r[2], r[3]): r for r in table}
    for place, published in (
        (("random-drop", "F1"), 0.81),
        (("gaussian-blur", "ASR after"), 0.30),
    ):
        row = rows[place]
        margin, low = float(row[4].split(" ")[0]), float(row[4].split("[")[1].split(",")[0])
        sign = -1 if place[1] == "ASR after" else 1
        assert margin == pytest.approx(sign * (float(row[5]) - float(row[6])), abs=0.002)
        assert 0 < low < margin
        assert float(row[8].split(" ")[0]) == pytest.approx(published)
        assert row[7] == "4 attacks, 7 runs"
    assert rows["spectral-signatures", "F1"][8] == "-"


def test_a_papers_own_setting_speaks_for_the_method(tmp_path: Path):
    folder = make_run(tmp_path / "a")

    def renamed(suite: dict[str, Any]) -> None:
        suite["published"][0]["defence"] = "bye-paper"
        suite["published"][2]["where"] = "another table"

    change(folder, renamed)
    write_tables(folder)
    text = (folder / "table.md").read_text()
    assert "+0.810 (Paper, Table 1: a 7B model; 1 figure)" in text
    assert "+0.300" not in text, "no margin goes across two tables"


# Bad input


def test_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(UsageError, match=r"holds no benchmark run.*gazeguard bench run SUITE"):
        write_tables(tmp_path)
    with pytest.raises(UsageError, match="holds no benchmark run"):
        write_tables(tmp_path / "nowhere")


def test_broken_files_name_themselves_and_the_cure(tmp_path: Path):
    def broken(name: str, edit: Callable[[dict[str, Any]], None]) -> str:
        folder = make_run(tmp_path / str(len(list(tmp_path.iterdir()))))
        change(folder, edit, name)
        with pytest.raises(UsageError) as caught:
            write_tables(folder)
        assert not list(folder.glob("table.*"))
        assert "run the suite again" in str(caught.value)
        assert Path(name).name in str(caught.value)
        return str(caught.value)

    one = cell("vlm-badnet-center-10-s0", "bye")
    assert "there is no 'models'" in broken("suite.json", lambda s: s.pop("models"))
    assert "none of" in broken("suite.json", lambda s: s["published"][0].update(metric="asr_after"))
    assert "'odd'" in broken("suite.json", lambda s: s["cells"][0].update(model="odd"))
    assert "level" in broken("suite.json", lambda s: s["defences"][0].update(level="odd"))
    assert "truth" in broken("suite.json", lambda s: s["models"][0].update(truth="odd"))
    assert "benign and" in broken("suite.json", lambda s: s["models"][0].update(truth="benign"))
    assert "delete it" in broken(one, lambda c: c.update(model="vlm-none-0-s0"))
    assert "-1 is no count" in broken(one, lambda c: c["result"].update(tp=-1))
    assert "9 of 3 rows" in broken(one, lambda c: c["result"]["refit"].update(asr=[9, 3]))
    two = cell("vlm-badnet-center-10-s0", "entropyscan")
    assert "'odd'" in broken(two, lambda c: c["result"].update(outcome="odd"))
    folder = make_run(tmp_path / "text")
    (folder / one).write_text("{")
    with pytest.raises(UsageError, match="delete it and run the suite again"):
        write_tables(folder)


def test_without_matplotlib_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_run(tmp_path / "a")
    for name in ("page", "plots", "svg"):
        monkeypatch.delitem(sys.modules, f"gazeguard.bench.report.{name}", raising=False)
        monkeypatch.delattr(gazeguard.bench.report, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'gazeguard\[bench\]'"):
        write_tables(folder)


def test_texts_stay_in_their_cells(tmp_path: Path):
    title = "A | title\n| with <script>alert(1)</script>"
    folder = make_run(tmp_path / "a", title=title)

    def hostile(suite: dict[str, Any]) -> None:
        for each in suite["models"]:
            each["label"] += " <b>\x01|$x$ & co"

    change(folder, hostile)
    write_tables(folder)
    text, page = ((folder / f"table.{end}").read_text() for end in ("md", "html"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert text.splitlines()[0] == "# A \\| title \\| with &lt;script>alert(1)&lt;/script>"
    assert all("\\|$x$" in row for row in rows if "$x$" in row)
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("&lt;b&gt;\ufffd|$x$ &amp; co</text>") >= 6, "a heat map's labels"


def test_what_a_part_holds(tmp_path: Path):
    found = parts(read_run(make_run(tmp_path / "a")))
    assert [(part.level, part.kind) for part in found] == [
        ("data", "vlm"),
        ("input", "vlm"),
        ("model", "vlm"),
        ("model", "encoder"),
    ]
    assert [line.name for line in found[3].defences] == ["amdet", "gates"]
    assert len(found[0].attacked) == 5
