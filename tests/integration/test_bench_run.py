"""`gazeguard bench run`: what a suite brings along, what is done once, what a stopped run keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gazeguard.bench.bases import BASES
from gazeguard.bench.defences import DEFENCES
from gazeguard.bench.run import run_suite
from gazeguard.bench.suite import read_suite, shipped
from gazeguard.cli.main import run
from gazeguard.lab.attacks import ATTACKS

PLUGIN = '''
"""An attack, a defence and a model: one function each."""
import numpy as np

from gazeguard.assets import BASE
from gazeguard.bench.bases import BASES, Base
from gazeguard.bench.defences import defence
from gazeguard.lab.attacks import ATTACKS, ImageAttack


def red(pixels, rng):
    """The whole picture turns red."""
    out = pixels.copy()
    out[..., 0] = 255
    return out


ATTACKS["toy-red"] = ImageAttack(red)
BASES["toy-base"] = Base("vlm", shipped=BASE)


@defence("toy-eye", "data")
def eye(upload):
    """Removes red pictures."""
    return np.array([bool((row.pixels[..., 0] == 255).all()) for row in upload.rows])
'''

SUITE = """
title = "Toys"
plugins = ["toy.py"]
held_out = 20
calibration = 20
test = 6
asr = 0.0
drop = 1.0

[[models]]
base = "toy-base"
trigger = "toy-red"
rows = 40
epochs = 1
rate = 0.25
refit = true
defences = ["toy-eye", "none", "random-drop"]

[[models]]
base = "toy-base"
rows = 40
epochs = 1
defences = ["toy-eye", "amdet"]
"""


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Path]:
    registries = (ATTACKS, BASES, DEFENCES, sys.modules)
    before = [set(registry) for registry in registries]
    (tmp_path / "toy.py").write_text(PLUGIN)
    path = tmp_path / "toys.toml"
    path.write_text(SUITE)
    yield path
    for registry, names in zip(registries, before, strict=True):
        for name in [n for n in registry if n not in names and "toy" in n]:
            del registry[name]


def cells(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "cells").glob("*.json"))}


def told(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    content = json.loads((out / "suite.json").read_text("utf-8"))
    labels = {model["name"]: model["label"] for model in content["models"]}
    return {(labels[cell["model"]], cell["defence"]): cell for cell in content["cells"]}


@pytest.mark.slow
def test_an_attack_a_defence_and_a_model_are_a_function_and_a_line_each(
    suite: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_suite(read_suite(str(suite)), out, tmp_path / "work", workers=2) == []
    found = told(out)
    result = json.loads((out / found["toy-red 25 %", "toy-eye"]["file"]).read_text("utf-8"))
    assert (result["result"]["tp"], result["result"]["fn"]) == (10, 0)
    assert result["result"]["fp"] == 0
    assert result["result"]["refit"]["clean"][1] == 20
    untouched = json.loads((out / found["toy-red 25 %", "none"]["file"]).read_text("utf-8"))
    scores = next((tmp_path / "work" / "models" / "toy-base").glob("*/scores.json"))
    assert scores.is_file()
    assert untouched["result"]["fn"] == 10
    assert found["benign", "amdet"]["file"] is None
    assert "takes no vlm" in found["benign", "amdet"]["why"]


@pytest.mark.slow
def test_a_second_run_makes_what_is_missing_and_nothing_else(suite: Path, tmp_path: Path) -> None:
    asked = read_suite(str(suite))
    out, work = tmp_path / "out", tmp_path / "work"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run_suite(asked, out, work, workers=1)
        assert torch.get_num_threads() == 2, "work done in this process leaves it as it was"
    finally:
        torch.set_num_threads(threads)
    before = cells(out)
    lost = next(name for name in before if "toy-eye" in name)
    (out / "cells" / lost).unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    models = {path: path.stat().st_mtime_ns for path in work.glob("models/*/*/scores.json")}
    assert models
    run_suite(asked, out, work, workers=1)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert {p: p.stat().st_mtime_ns for p in models} == models
    again, first = json.loads(cells(out)[lost]), json.loads(before[lost])
    assert again["result"] == first["result"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("toy-eye", "toy-ear"), "no defence 'toy-ear'"),
        (("toy-red", "toy-blue"), "trigger 'toy-blue' is unknown"),
        (('base = "toy-base"', 'base = "toy-land"'), "no base 'toy-land'"),
        (("toy.py", "gone.py"), "is no Python file"),
        (("rows = 40", "lines = 40"), "unknown key 'lines'"),
        (("held_out", "heldout"), "unknown key 'heldout'"),
        (("[[models]]", "[[models]"), "is no TOML suite"),
    ],
)
def test_a_mistake_in_a_suite_is_one_sentence(
    suite: Path,
    tmp_path: Path,
    change: tuple[str, str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite.write_text(SUITE.replace(*change))
    assert run(["bench", "run", str(suite), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_no_such_suite_names_those_that_ship(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "run", "nothing", "--out", str(tmp_path)]) == 2
    assert "smoke" in capsys.readouterr().err


@pytest.mark.parametrize("name", shipped())
def test_shipped_suites_can_be_read(name: str) -> None:
    assert read_suite(name).entries


@pytest.mark.slow
def test_workers_end_with_a_run_that_was_killed(tmp_path: Path) -> None:
    """They would go on with their task, and keep every core busy, with nobody to report to."""
    script = tmp_path / "bench.py"
    script.write_text(
        "import os, time\n"
        "from gazeguard.bench.run import _pool\n"
        "if __name__ == '__main__':\n"
        "    with _pool(2, ()) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 600).result()\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    worker.wait(timeout=30)
