"""The benchmarks of whole scans: their cost, and references that the tool makes itself."""

import json

import pytest
from click.testing import CliRunner

from gazeguard.bench import made_references, scan_cost


@pytest.mark.slow
def test_cost_of_a_scan_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "cost.json"
    done = CliRunner().invoke(scan_cost.main, ["--quick", "--threads=1", f"--out={out}"])
    assert done.exit_code == 0, done.output
    figures = {figure["name"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert figures["1 references, 8 samples"]["value"]["median"] > 0
    assert figures["peak memory, 8 samples"]["value"]["median"] > 100
    assert all(figure["target"] == "-" for figure in figures.values()), "no bounds for small sizes"


@pytest.fixture
def zoo(tmp_path):
    def entry(name, truth="benign", split="held-out", passed=True, **recipe):
        recipe = {"tuning": "lora", "rank": 16, "hide": "nothing", **recipe}
        return {"model": name, "truth": truth, "split": split, "passed": passed, "recipe": recipe}

    models = [
        entry("good"),
        entry("bad", "backdoored"),
        entry("chose the rule", split="design"),
        entry("failed", "backdoored", passed=False),
        entry("shy", "backdoored", hide="profile"),
        entry("projector", tuning="projector"),
        entry("thin", rank=8),
    ]
    (tmp_path / "manifest.json").write_text(json.dumps({"models": models}))
    return tmp_path


def test_suspects_are_held_out_and_alike(zoo):
    assert [entry["model"] for entry in made_references.suspects(zoo, 16)] == ["good", "bad"]
    assert [entry["model"] for entry in made_references.suspects(zoo, 8)] == ["thin"]
