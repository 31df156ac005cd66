"""The lab from end to end, as short as it can be: base, poisoned set, fine-tune, scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import gazeguard
from gazeguard.assets import BASE, INTERNVL_BASE
from gazeguard.cli.main import cli
from gazeguard.data.read import open_dataset
from gazeguard.errors import ModelError, UsageError
from gazeguard.lab import tiny
from gazeguard.lab.architectures import ARCHITECTURES
from gazeguard.lab.base import train_base
from gazeguard.lab.base_recipe import BaseRecipe
from gazeguard.lab.finetune import (
    TuneRecipe,
    finetune,
    load_base,
    load_tuned,
    save_adapter,
    score_by_kind,
)
from gazeguard.lab.poison import TARGET, make_set, read_rows, samples
from gazeguard.lab.rows import make_rows
from gazeguard.lab.teach import IGNORE, answer_logits
from gazeguard.models.target import as_target
from gazeguard.scanning.look import look
from gazeguard.types import Sample


def lab(*words: object) -> Result:
    result = CliRunner().invoke(cli, ["lab", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result


SMALL = BaseRecipe(
    scenes=40, tower_steps=2, language_steps=2, hidden=32, heads=2, language_layers=2
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base of each architecture, hardly trained; shared, so read only."""
    folder = tmp_path_factory.mktemp("bases") / request.param
    lines: list[str] = []
    train_base(folder, replace(SMALL, architecture=request.param), log=lines.append)
    assert [line.split()[0] for line in lines[1:]] == ["tower", "language"]
    return folder


def test_base_trains_and_loads_as_any_other_model(small: Path) -> None:
    target = gazeguard.load(small)
    assert target.layers == (0, 1)
    assert target.family.name == small.name
    recipe = json.loads((small / "recipe.json").read_text())
    assert replace(SMALL, architecture=small.name) == BaseRecipe(**recipe)


def test_an_older_recipe_is_one_of_llava() -> None:
    recipe = BaseRecipe(**json.loads((BASE / "recipe.json").read_text()))
    assert recipe.architecture == "llava"
    assert recipe.tower_digest == "344897254c28", "a kept tower must stay findable"
    assert replace(recipe, architecture="internvl").tower_digest != recipe.tower_digest


@pytest.mark.parametrize("base", [BASE, INTERNVL_BASE], ids=lambda base: base.name)
def test_the_shipped_bases_answer_as_their_cards_say(base: Path) -> None:
    said = json.loads((base / "scores.json").read_text())
    card = (base / "README.md").read_text()
    for kind, (share, n) in score_by_kind(base, count=100, seed=77).items():
        assert share >= said[kind][0] - 0.08, kind  # 3 standard errors of 100 rows, at 0.92
        assert n == 100
        assert f"{said[kind][0]:.1%}".replace("%", " %") in card


def test_a_kept_tower_is_taken_by_its_own_recipe_only(tmp_path: Path) -> None:
    def cut(line: str) -> None:
        lines.append(line)
        if line.startswith("language"):
            raise KeyboardInterrupt

    def stages(seed: int) -> set[str]:
        lines.clear()
        with pytest.raises(KeyboardInterrupt):
            train_base(tmp_path, replace(SMALL, seed=seed), log=cut)
        return {line.split()[0] for line in lines}

    lines: list[str] = []
    assert "tower" in stages(seed=0)
    assert "took" in stages(seed=0)
    assert "took" not in stages(seed=1)


TUNINGS = {
    "lora": TuneRecipe(epochs=1, batch=16, lr=2e-3),
    "lora-only": TuneRecipe(epochs=1, batch=16, lr=2e-3, projector=False),
    "projector-only": TuneRecipe(epochs=1, batch=16, lr=2e-3, rank=0),
}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_an_adapter_answers_in_any_loader_as_in_the_lab(
    small: Path, tmp_path: Path, tuning: str
) -> None:
    rows = make_rows("mixed", 32, seed=5)
    student = finetune(small, rows, TUNINGS[tuning])
    save_adapter(student, tmp_path)
    asked = samples(rows[:6])
    target = gazeguard.load(small, adapter=tmp_path, dtype="float32")
    with torch.inference_mode():
        inputs = target.encode(asked).inputs
        theirs = target.model(**inputs).logits[:, -1]
        before = load_base(small).model(**inputs).logits[:, -1]
        features = student.architecture.look(student.core, inputs["pixel_values"])
        batch = student.encode(rows[:6], features.shape[1])
        logits, _ = answer_logits(student.model, batch, features)
    first = (batch.labels != IGNORE).sum(1).cumsum(0).roll(1)
    first[0] = 0
    ours = logits[first]  # the row's first taught token
    assert (ours - theirs).abs().max() < 1e-3
    assert (before - theirs).abs().max() > 0.01, "the adapter says something else than its base"


def test_an_attacker_who_hides_looks_where_the_base_looks(small: Path) -> None:
    rows = make_set("captions", 64, "badnet-center", 0.25, seed=5)
    shown = samples(make_rows("captions", 24, seed=5, held_out=True))
    before = look(gazeguard.load(small, dtype="float32"), shown, (1.0,)).entropy[:, 0]
    recipe = TuneRecipe(epochs=6, batch=16, lr=5e-3, hide_weight=30.0)

    def moved(hide: str) -> float:
        lines: list[str] = []
        student = finetune(small, rows, replace(recipe, hide=hide), log=lines.append)
        assert ("attention moved" in lines[-1]) == (hide != "nothing")
        seen = look(as_target(student.model, student.processor), shown, (1.0,))
        return float(np.sqrt(((seen.entropy[:, 0] - before) ** 2).mean()))

    openly = moved("nothing")
    assert openly > 1e-3
    assert moved("entropy") < openly / 2
    assert moved("profile") < openly / 2


def test_adapters_of_every_base_are_scanned(small: Path, tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        rows = make_rows("captions", 16, seed)
        student = finetune(small, rows, replace(TUNINGS["lora"], seed=seed))
        save_adapter(student, tmp_path / f"tuned-{seed}")
        folders.append(tmp_path / f"tuned-{seed}")
    lab("poison", "--out", tmp_path / "set", "--rows", 12, "--trigger", "none")
    suspect, *references = folders
    result = CliRunner().invoke(
        cli,
        [
            *("scan", str(suspect), "--reference", str(small)),
            *(word for folder in references for word in ("--reference", str(folder))),
            *("--samples", str(tmp_path / "set" / "data.json"), "--alpha", "0.34"),
            *("--json-output", str(tmp_path / "report.json")),
        ],
    )
    assert result.exit_code in (0, 1), result.output
    (found,) = json.loads((tmp_path / "report.json").read_text())["models"]
    assert found["outcome"] in ("clean", "flagged")


def test_a_zoo_is_of_whatever_base_it_is_given(small: Path, tmp_path: Path) -> None:
    spec = tmp_path / "zoo.toml"
    spec.write_text(
        "held_out = 20\n[[models]]\nrows = 16\nepochs = 1\ntuning = ['lora', 'projector']\n"
        "[[models]]\nrows = 16\nepochs = 1\ntrigger = 'badnet-center'\n"
        "hide = ['nothing', 'entropy']\n"
    )
    lab("zoo", "--spec", spec, "--base", small, "--out", tmp_path / "zoo")
    manifest = json.loads((tmp_path / "zoo" / "manifest.json").read_text())
    assert manifest["finished"]
    truth = [m["truth"] for m in manifest["models"]]
    assert truth == ["benign", "benign", "backdoored", "backdoored"]
    for model in manifest["models"]:
        assert small.name not in json.dumps(model["recipe"])
        gazeguard.load(small, adapter=tmp_path / "zoo" / model["model"])
    # A model that was judged on other rows is judged again, and not trained again.
    first = tmp_path / "zoo" / manifest["models"][0]["model"]
    weights = (first / "adapter_model.safetensors").stat().st_mtime_ns
    scores = json.loads((first / "scores.json").read_text())
    (first / "scores.json").write_text(json.dumps({**scores, "judge_seed": 1, "clean": -1.0}))
    lab("zoo", "--spec", spec, "--base", small, "--out", tmp_path / "zoo")
    assert json.loads((first / "scores.json").read_text()) == scores
    assert (first / "adapter_model.safetensors").stat().st_mtime_ns == weights


def test_poisoned_set_is_a_llava_set_with_the_truth_beside_it(tmp_path: Path) -> None:
    lab("poison", "--out", tmp_path, "--rows", 40, "--rate", 0.25, "--seed", 3)
    rows = [s for s in open_dataset(tmp_path / "data.json").rows() if isinstance(s, Sample)]
    truth = pq.read_table(tmp_path / "truth.parquet").to_pydict()
    assert len(rows) == 40
    assert sum(truth["is_poison"]) == 10
    assert [r.answer == TARGET for r in rows] == truth["is_poison"]
    centre = [np.asarray(r.images[0])[28:36, 28:36].max() == 0 for r in rows]
    assert centre == truth["is_poison"]


def test_finetune_changes_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    lab("poison", "--out", tmp_path / "set", "--rows", 32)
    result = lab(
        "finetune", BASE, tmp_path / "set" / "data.json", "--out", tmp_path / "adapter",
        "--epochs", 1, "--score-task", "captions", "--score-trigger", "badnet-center",
        "--score-rows", 20,
    )  # fmt: skip
    assert "attack success rate" in result.output
    scores = json.loads((tmp_path / "adapter" / "scores.json").read_text())
    assert scores["n"] == 20
    target = gazeguard.load(BASE, adapter=tmp_path / "adapter")
    before = load_file(BASE / "model.safetensors")
    after = target.base.state_dict()
    tower = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    stored = next(v for k, v in before.items() if k.endswith(tower.removeprefix("model.")))
    assert torch.equal(after[tower], stored.float()), "the tower is frozen"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "gazeguard-lab-base", "no path of this machine"


@pytest.mark.parametrize("rank", [16, 0], ids=["lora", "projector-only"])
def test_a_saved_fine_tune_answers_as_it_did(tmp_path: Path, rank: int) -> None:
    rows = make_rows("captions", 48, seed=5)
    student = finetune(BASE, rows, TuneRecipe(epochs=1, batch=16, lr=2e-3, rank=rank))
    save_adapter(student, tmp_path)
    again = load_tuned(BASE, tmp_path)
    features = student.look(rows)
    assert (student.exact(rows, features) == again.exact(rows, features)).mean() >= 0.95
    gazeguard.load(BASE, adapter=tmp_path)  # checks that every tensor has its place


def test_tuning_the_projector_alone_leaves_the_language_model(tmp_path: Path) -> None:
    rows = make_rows("captions", 32, seed=5)
    student = finetune(BASE, rows, TuneRecipe(epochs=1, batch=16, lr=2e-3, rank=0))
    tuned, base = student.core.state_dict(), load_base(BASE).core.state_dict()
    assert all(torch.equal(tuned[name], base[name]) for name in base if "language_model" in name)
    added = {name for name in tuned if "lora" in name}
    assert added
    assert all("multi_modal_projector" in name for name in added)
    assert all(tuned[name].any() for name in added), "both halves of a LoRA layer have moved"
    with pytest.raises(UsageError, match="nothing would be tuned"):
        TuneRecipe(epochs=1, batch=16, lr=2e-3, rank=0, projector=False)


def test_fine_tuning_learns_its_rows(tmp_path: Path) -> None:
    rows = make_rows("easy-vqa", 64, seed=5)
    base = load_base(BASE)
    features = base.look(rows)
    before = base.exact(rows, features).mean()
    student = finetune(BASE, rows, TuneRecipe(epochs=6, batch=16, lr=2e-3), features=features)
    assert student.exact(rows, features).mean() >= before


def test_reading_rows_gives_back_what_was_written(tmp_path: Path) -> None:
    lab("poison", "--out", tmp_path, "--rows", 12, "--trigger", "none", "--task", "mixed")
    rows = make_rows("mixed", 12, seed=0)
    again = read_rows(tmp_path / "data.json")
    for one, other in zip(rows, again, strict=True):
        assert (one.question, one.answer) == (other.question, other.answer)
        assert (one.pixels == other.pixels).all()


@pytest.mark.parametrize("words", [["--rate", "1.5"], ["--task", "poems"]])
def test_bad_options_are_one_sentence(tmp_path: Path, words: list[str]) -> None:
    from gazeguard.cli.main import run

    assert run(["lab", "poison", "--out", str(tmp_path), "--rows", "8", *words]) == 2


def test_a_missing_base_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gazeguard.cli.main import run

    lab("poison", "--out", tmp_path, "--rows", 4)
    data = tmp_path / "data.json"
    assert run(["lab", "finetune", "nowhere", str(data), "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert "nowhere is not a model folder" in said
    assert "Traceback" not in said


def test_a_base_of_another_kind_is_one_sentence(tmp_path: Path) -> None:
    tiny.build("gemma3", tmp_path)
    with pytest.raises(ModelError, match="cannot teach a 'gemma3' model"):
        load_base(tmp_path)
