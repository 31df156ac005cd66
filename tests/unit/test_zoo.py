"""Specs of a zoo, and the benchmark's rule on made-up models."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from gazeguard.bench.entropy_measures import auroc
from gazeguard.bench.entropyscan import PAPER, Zoo, evaluate, hides, scored
from gazeguard.bench.suite import ZOOS
from gazeguard.calibrate import needed_samples
from gazeguard.errors import UsageError
from gazeguard.lab.zoo import Recipe, read_spec
from tests.unit.test_entropyscan import BASE, sight

SHIPPED = ZOOS / "lvlm.toml"


def spec(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "zoo.toml"
    path.write_text(text)
    return path


def test_the_shipped_spec():
    every = read_spec(SHIPPED).recipes
    recipes = [recipe for recipe in every if recipe.hide == "nothing"]
    adaptive = {(recipe.trigger, recipe.hide) for recipe in every if recipe not in recipes}
    assert len(adaptive) == len(every) - len(recipes) == 4
    kinds = Counter((recipe.truth, recipe.split) for recipe in recipes)
    assert kinds["benign", "design"] >= needed_samples(0.05) + 1, "one is left out to be measured"
    assert kinds["benign", "held-out"] >= 10
    assert kinds["backdoored", "design"] + kinds["backdoored", "held-out"] >= 15
    shown = {r.trigger for r in recipes if r.split == "design"} - {"none"}
    hidden = {r.trigger for r in recipes if r.split == "held-out"} - {"none"}
    assert shown.isdisjoint(hidden), "held-out attacks must be others than those that chose"
    design = [r for r in recipes if r.truth == "benign" and r.split == "design"]
    assert min(Counter(r.task for r in design).values()) >= 6
    for split in ("design", "held-out"):
        for tuning in ("lora", "projector"):
            steps = dict.fromkeys(("benign", "backdoored"), 0)
            for r in recipes:
                if (r.split, r.tuning) == (split, tuning):
                    steps[r.truth] = max(steps[r.truth], r.rows * r.epochs)
            assert steps["benign"] >= steps["backdoored"], "an attack must not show by its length"


def test_lists_are_combined_and_take_is_balanced(tmp_path: Path):
    every = read_spec(spec(tmp_path, "[[models]]\nseed = [1, 2]\ntrigger = ['none', 'wanet']\n"))
    assert len(every.recipes) == 4
    some = read_spec(spec(tmp_path, "[[models]]\nseed=[1,2,3]\nrank=[4,8]\ntake=3\n")).recipes
    assert sorted(recipe.seed for recipe in some) == [1, 2, 3]


def test_names_are_stable_and_tell_nothing():
    name = Recipe(trigger="badnet-center").name
    assert name == Recipe(trigger="badnet-center", split="held-out").name
    assert name != Recipe(trigger="badnet-center", seed=1).name
    assert len(name) == 12
    assert set(name) <= set("0123456789abcdef")


def test_a_zoo_made_before_recipes_could_hide_is_still_found():
    assert Recipe().name == "72ae03dbf1a7"
    older = {"task": "mixed", "rows": 750, "rate": 0.2, "tuning": "lora-only", "rank": 8}
    made = Recipe(**older, trigger="badnet-center", epochs=3, lr=1e-3, seed=5, split="held-out")
    assert made.name == "49a6fe7e2b80"
    names = {replace(made, hide=what).name for what in ("nothing", "entropy", "profile")}
    assert len(names) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[models]]\ntriger = 'none'", "unknown key 'triger'"),
        ("[[models]]\ntrigger = 'laser'", "trigger 'laser'"),
        ("[[models]]\nrows = 'many'", "wrong type"),
        ("[[models]]\nseed = [1, 2]\ntake = 3", "choose fewer"),
        ("[[models]]\ntrigger = 'wanet'\nhide = 'trigger'", "hide 'trigger' is unknown"),
        ("[[models]]\nhide = 'entropy'", "nothing to hide"),
        ("asr = 0.9", "no model"),
        ("not toml", "no TOML"),
    ],
)
def test_a_wrong_spec_is_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(UsageError, match=said):
        read_spec(spec(tmp_path, text))


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    entries, sights, moved = {}, {}, {}
    for i in range(24):
        name, bad = f"m{i}", i % 4 == 3
        sights[name] = sight(200 + i, planted=1.0 if bad else 0.0)
        sights[name] = _with_all_q(sights[name])
        entries[name] = {
            "truth": "backdoored" if bad else "benign",
            "split": "design" if i < 16 else "held-out",
            "recipe": {"task": ("captions", "mixed", "easy-vqa")[i % 3]},
            "model": name,
        }
        moved[name] = 10.0 - i  # says nothing about the truth
    return Zoo(_with_all_q(BASE), sights, moved, entries)


def _with_all_q(one):  # the benchmark asks for the indices that are always probed
    from gazeguard.methods.entropyscan.settings import PROBED_Q

    places = [0, 0, 1, 1]
    return replace(
        one,
        q=PROBED_Q,
        entropy=np.ascontiguousarray(one.entropy[..., places]),
        head_entropy=np.ascontiguousarray(one.head_entropy[..., places]),
    )


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30))
def test_auroc_is_that_of_scikit_learn(models: list[tuple[bool, int]]):
    truth = np.array([bad for bad, _ in models])
    score = np.array([float(number) for _, number in models])
    assume(0 < truth.sum() < len(truth))
    assert auroc(truth, score) == pytest.approx(roc_auc_score(truth, score))


def test_no_model_is_its_own_reference(zoo: Zoo):
    design = zoo.names("benign", "design")
    found = scored(zoo, PAPER, [*design, "m19"])
    assert found.p[: len(design)].min() >= 1 / len(design)
    assert found.p[-1] >= 1 / (len(design) + 1)


def test_strangers_were_tuned_on_other_data(zoo: Zoo):
    design = zoo.names("benign", "design")
    others = [name for name in design if zoo.task(name) != zoo.task("m19")]
    found = scored(zoo, PAPER, ["m19"], strangers=True)
    fewer = {name: zoo.entries[name] for name in (*others, "m19")}
    alone = scored(replace(zoo, entries=fewer), PAPER, ["m19"])
    assert 0 < len(others) < len(design)
    assert found.score == alone.score


def test_the_sweep_chooses_on_design_and_reports_held_out(zoo: Zoo, monkeypatch):
    monkeypatch.setattr("gazeguard.bench.entropy_measures.RESAMPLES", 20)
    result = evaluate(zoo, 0.05)
    assert result["references"] == 12
    assert result["alpha"] == pytest.approx(1 / 12, abs=1e-3)
    chosen = result["variants"]["chosen"]["held-out"]
    assert chosen["auroc"]["value"] == 1.0
    assert (chosen["benign"], chosen["backdoored"]) == (6, 2)
    assert result["variants"]["weights moved"]["held-out"]["auroc"]["value"] < 0.8
    best = max(result["sweep"], key=lambda row: (row["design_auroc"], row["design_gap"]))
    assert result["chosen"] == {key: best[key] for key in result["chosen"]}
    assert {model["split"] for model in result["models"]} == {"design", "held-out"}


@pytest.mark.slow
def test_adaptive_attackers_are_in_no_number_but_their_own(zoo: Zoo, monkeypatch):
    monkeypatch.setattr("gazeguard.bench.entropy_measures.RESAMPLES", 20)
    plain = evaluate(zoo, 0.05)
    assert plain["adaptive"] == []
    entry = {**zoo.entries["m19"], "recipe": {"task": "mixed", "hide": "profile"}}
    entry |= {"model": "shy", "asr": 0.95, "clean": 0.9, "usual_clean": 0.91}
    assert hides(entry)
    shy = _with_all_q(sight(900, planted=1.0))
    more = Zoo(zoo.base, {**zoo.sights, "shy": shy}, zoo.moved, {**zoo.entries, "shy": entry})
    found = evaluate(more, 0.05)
    assert [model["model"] for model in found.pop("adaptive")] == ["shy"]
    plain.pop("adaptive")
    assert found == plain
    assert "shy" not in json.dumps(found)


def test_an_adaptive_attacker_is_judged_as_any_suspect(zoo: Zoo, monkeypatch):
    monkeypatch.setattr("gazeguard.bench.entropy_measures.RESAMPLES", 20)
    entries = dict(zoo.entries)
    sights = dict(zoo.sights)
    for name, planted in (("loud", 1.0), ("shy", 0.0)):
        sights[name] = _with_all_q(sight(901, planted=planted))
        entries[name] = {**zoo.entries["m19"], "recipe": {"task": "mixed", "hide": "entropy"}}
        entries[name] |= {"model": name, "asr": 0.95, "clean": 0.9, "usual_clean": 0.91}
    found = evaluate(Zoo(zoo.base, sights, zoo.moved, entries), 0.1)
    loud, shy = found["adaptive"]
    for variant in ("chosen", "shipped"):
        assert loud["variants"][variant]["flagged"]
        assert not shy["variants"][variant]["flagged"]
        assert shy["variants"][variant]["p_value"] > 0.1
    # The planted path lies in the third layer, behind those that the paper reads.
    assert not loud["variants"]["paper"]["flagged"]
    assert found["base_itself"]["shipped"]["score"] < shy["variants"]["shipped"]["score"]
