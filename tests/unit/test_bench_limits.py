"""What is stored of the suites is what their tables and docs/limits.md say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gazeguard.bench.report.limits import main, page
from gazeguard.bench.report.stored import read_run
from gazeguard.bench.report.table import write_tables
from tests.unit.bench_run_fixture import make_run

ROOT = Path(__file__).parents[2]
SUITES = ROOT / "bench" / "results" / "suites"
STORED = sorted(path.parent.name for path in SUITES.glob("*/suite.json"))


def test_limits_are_what_the_results_say(tmp_path: Path) -> None:
    main(SUITES, tmp_path / "limits.md")
    made = (tmp_path / "limits.md").read_text("utf-8")
    stored = (ROOT / "docs" / "limits.md").read_text("utf-8")
    assert made == stored, (
        "run python -m gazeguard.bench.report.limits bench/results/suites docs/limits.md"
    )


@pytest.mark.parametrize("name", STORED)
def test_tables_are_what_the_cells_say(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(SUITES / name, folder)
    stored = {path.name: path.read_bytes() for path in folder.glob("table.*")}
    write_tables(folder)
    for file in ("table.md", "table.csv"):
        assert (folder / file).read_bytes() == stored[file], f"run gazeguard bench table on {name}"


def test_a_failed_attack_shows_nothing_and_a_miss_is_said(tmp_path: Path) -> None:
    lines = page(read_run(make_run(tmp_path / "run"))).splitlines()
    [failed] = [line for line in lines if line.startswith("| wanet")]
    assert "attack failed" in failed
    assert "`clean`" not in failed
    [took] = [line for line in lines if line.startswith("| badnet-center 10 %")]
    assert "`clean`" in took.split("|")[-2]
    assert "`guard`" in took.split("|")[-2]
    assert "| 0.9" in took, "its F1 and its prevented answers"


def test_the_readme_counts_what_the_page_of_limits_lists() -> None:
    limits = (ROOT / "docs" / "limits.md").read_text("utf-8").split("## Why")[0]
    rows = [line.split("|")[-2] for line in limits.splitlines() if " % |" in line]
    took = [row for row in rows if "failed" not in row]
    caught = {
        verb: sum(f"`{verb}`" in row and f"`{verb}` in part" not in row for row in took)
        for verb in ("clean", "guard", "scan")
    }
    part = sum("`guard` in part" in row for row in took)
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"{len(took)} that took" in readme
    assert f"`clean` finds the rows of {caught['clean']}, `guard` stops {caught['guard']}" in readme
    assert {2: "two"}[part] + f" in part, `scan` flags {caught['scan']}." in readme
