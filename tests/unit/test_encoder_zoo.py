"""Specs of encoder zoos, and AMDET's benchmark on made-up scans."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gazeguard.bench.amdet import evaluate, judged, yard_of
from gazeguard.bench.amdet_scans import Seen, read_entries
from gazeguard.bench.amdet_tables import amdet_tables
from gazeguard.bench.suite import ZOOS
from gazeguard.bench.tables import page
from gazeguard.errors import UsageError
from gazeguard.lab.text.zoo import EncoderModel, read_bases, read_encoder_spec
from gazeguard.methods.amdet.heldout import HeldOut


def spec(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "encoders.toml"
    path.write_text(text)
    return path


def test_the_shipped_specs():
    every = [
        recipe
        for kind in ("clip", "siglip", "longclip")
        for recipe in read_encoder_spec(ZOOS / f"{kind}.toml").recipes
    ]
    adaptive = [r for r in every if r.adaptive]
    plain = [r for r in every if not r.adaptive]
    counts = Counter((r.kind, r.truth, r.split) for r in plain)
    for kind in ("clip", "siglip", "longclip"):
        assert counts[kind, "benign", "design"] >= 19, "alpha 0.05 needs 19 references"
        bad = [r for r in plain if r.kind == kind and r.truth == "backdoored"]
        lengths = {(r.attack, r.trigger_tokens) for r in bad}
        assert lengths >= {(a, n) for a in ("tpa", "pair") for n in (1, 3, 7, 15)}
        assert {r.loss for r in bad} >= {"cosine", "mae"}
        assert {r.triggers for r in bad} >= {1, 5}
        assert {r.attack for r in adaptive if r.kind == kind} == {"tpa", "pair"}
    assert {r.loss for r in plain} == {"cosine", "mse", "mae"}
    measured = [r for r in plain if r.split == "held-out"]
    assert sum(r.truth == "benign" for r in measured) >= 45
    assert sum(r.truth == "backdoored" for r in measured) >= 45
    seeds = {split: {r.seed for r in every if r.split == split} for split in ("design", "held-out")}
    assert seeds["design"].isdisjoint(seeds["held-out"])


def test_a_name_is_stable_and_tells_nothing():
    model = EncoderModel(attack="tpa", trigger_tokens=7)
    assert model.name == replace(model, split="design").name == "4b16da81f604"
    assert model.name != replace(model, seed=1).name


def test_a_recipe_reaches_the_attack_and_the_tuning():
    model = EncoderModel(attack="pair", trigger_tokens=3, lr=3e-4, clean=8, adaptive=0.5, seed=4)
    planted = model.planted
    assert (planted.kind, planted.trigger_tokens, planted.learning_rate) == ("pair", 3, 3e-4)
    assert (planted.clean, planted.adaptive, planted.seed) == (8, 0.5, 4)
    tuned = EncoderModel(batch=32, prompts=500, steps=7, lr=1e-5, seed=9).tuned
    assert (tuned.batch, tuned.prompts, tuned.steps) == (32, 500, 7)
    assert (tuned.learning_rate, tuned.seed) == (1e-5, 9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[models]]\nattak = 'tpa'", "unknown key 'attak'"),
        ("[[models]]\nattack = 'image'", "attack 'image' is unknown"),
        ("[[models]]\nkind = 'bert'", "kind 'bert' is unknown"),
        ("[[models]]\nloss = 'l3'", "loss 'l3' is unknown"),
        ("[[models]]\ntrigger_tokens = 0", "trigger_tokens of a zoo must be at least 1"),
        ("[[models]]\nsteps = 'many'", "wrong type"),
        ("[[models]]\nadaptive = 0.5", "nothing to hide"),
        ("drift = 0.02", "no model"),
    ],
)
def test_a_wrong_spec_is_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(UsageError, match=said):
        read_encoder_spec(spec(tmp_path, text))


def test_wrong_bases_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert read_bases([f"clip={tmp_path}"]) == {"clip": tmp_path}
    for wrong in (str(tmp_path), f"bert={tmp_path}", f"clip={tmp_path / 'none'}"):
        with pytest.raises(UsageError, match="KIND=FOLDER"):
            read_bases([wrong])


def test_a_zoo_is_scanned_with_its_own_bases_only(tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no manifest\.json"):
        read_entries(tmp_path, {})
    made = {"models": [entry("a", "none", "design")], "bases": {"clip": "0" * 64}}
    (tmp_path / "manifest.json").write_text(json.dumps(made))
    with pytest.raises(UsageError, match="give --anchor clip"):
        read_entries(tmp_path, {})
    with pytest.raises(UsageError, match="is not the clip encoder"):
        read_entries(tmp_path, {"clip": tmp_path / "base"})


def entry(name: str, attack: str, split: str, kind: str = "clip", **more: Any) -> dict[str, Any]:
    """A line of a manifest."""
    recipe = EncoderModel(kind=kind, attack=attack, split=split, **more)
    bad = recipe.truth == "backdoored"
    return {
        "model": name,
        "truth": recipe.truth,
        "split": split,
        "passed": True,
        "target_cosine": 0.95 if bad else None,
        "drift": 0.01,
        "triggers": ["zorvex"] if bad else [],
        "recipe": asdict(recipe),
    }


def scan(unity: float, anchor: float, strong: float = 0.1, positive: float = 0.4) -> Seen:
    """A scan with a score of `unity - anchor`; `strong` is the share that passes each gate."""
    n = 50
    high = np.arange(n) < round(strong * n)
    far = np.where(high, -0.5, 0.5)
    held = HeldOut(
        assimilation=np.where(high, 0.9, 0.2),
        agreement=np.where(high, 0.95, 0.2),
        anchor=far - far.mean() + anchor,
        unity=unity,
        target=np.eye(4, dtype=np.float32)[0],
    )
    return Seen(held, positive, 0.01, [("sea", 0.4), ("zorvex", 0.3)], 2.0)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gazeguard.bench.entropy_measures.RESAMPLES", 10)


@pytest.fixture
def zoo() -> tuple[list[dict[str, Any]], dict[str, Seen]]:
    """Two kinds; what is usual for SigLIP here would be a backdoor's score for CLIP."""
    entries, seen = [], {}
    for kind, shift in (("clip", 0.0), ("siglip", -0.6)):
        for i in range(24):
            name = f"{kind}-{i}"
            split = "design" if i < 19 else "held-out"
            entries.append(entry(name, "none", split, kind, seed=i))
            seen[name] = scan(0.3, 0.3 + shift + 0.001 * ((7 * i) % 19))
        for i in range(5):
            name = f"{kind}-bad-{i}"
            entries.append(entry(name, "tpa" if i % 2 else "pair", "held-out", kind, seed=i))
            seen[name] = scan(0.9, 0.1 + shift, 1.0, 0.9)
    return entries, seen


def test_every_kind_has_a_threshold_of_its_own(zoo):
    found = evaluate(*zoo, 0.05)
    for kind in ("clip", "siglip"):
        part = found["kinds"][kind]
        assert (part["references"], part["alpha"]) == (19, 0.05)
        assert part["rules"]["score"]["recall"]["value"] == 1.0
    overall = found["overall"]["score"]
    assert overall["auroc"]["value"] == overall["precision"]["value"] == 1.0
    assert (overall["benign"], overall["backdoored"]) == (10, 10)
    assert overall["recall"]["low"] < 0.9  # ten models do not show more
    names = {row["model"] for row in found["models"]}
    assert len(names) == 20
    assert names.isdisjoint(e["model"] for e in zoo[0] if e["split"] == "design")


def test_fewer_references_raise_alpha(zoo):
    entries, seen = zoo
    few = [e for e in entries if e["split"] == "held-out" or e["recipe"]["seed"] < 4]
    assert evaluate(few, seen, 0.05)["kinds"]["clip"]["alpha"] == pytest.approx(0.2)
    with pytest.raises(UsageError, match="no measurable benign design model of kind clip"):
        evaluate([e for e in entries if e["split"] == "held-out"], seen, 0.05)


def test_the_rules_differ_where_they_should(zoo):
    entries, seen = zoo
    yard = yard_of([e for e in entries if e["recipe"]["kind"] == "clip"], seen, 0.05)

    def flags(one: Seen) -> dict[str, bool]:
        row = judged(entry("x", "tpa", "held-out"), one, yard)
        return {rule: said["flagged"] for rule, said in row["rules"].items()}

    # Few prompts pass the paper's constants, but more than in any benign fine-tune.
    assert flags(scan(0.9, 0.1, 0.4, 0.5)) == {
        "references": True,
        "score": True,
        "threshold": True,
        "gates": True,
        "published": False,
    }
    # One usual gate is enough for calibrated gates to say no.
    assert flags(scan(0.9, 0.1, 0.4, 0.4)) == {
        "references": True,
        "score": True,
        "threshold": True,
        "gates": False,
        "published": False,
    }
    assert all(flags(scan(0.95, -0.5, 1.0, 0.9)).values())
    assert not any(flags(Seen(None, float("nan"), 0.0, [], 1.0)).values())
    assert not flags(scan(0.9, 0.1, 0.4, float("nan")))["gates"]


def test_a_model_that_cannot_be_measured_counts_as_missed(zoo):
    entries, seen = zoo
    seen["clip-bad-0"] = Seen(None, float("nan"), 0.0, [], 1.0)
    found = evaluate(entries, seen, 0.05)
    assert found["kinds"]["clip"]["rules"]["score"]["recall"]["value"] == 0.8
    assert found["kinds"]["clip"]["rules"]["score"]["auroc"]["value"] == 0.8
    json.dumps(found, allow_nan=False)


def test_adaptive_attackers_are_in_no_number_but_their_own(zoo):
    entries, seen = zoo
    plain = evaluate(entries, seen, 0.05)
    assert plain["adaptive"]["score"]["recall"] is None
    seen["shy"] = scan(0.3, 0.5)
    found = evaluate([*entries, entry("shy", "tpa", "held-out", adaptive=1.0)], seen, 0.05)
    assert found["adaptive"]["score"]["recall"]["value"] == 0.0
    assert found["adaptive"]["score"]["recall_with_others"]["value"] == pytest.approx(10 / 11)
    for key in ("kinds", "overall", "gates"):
        assert found[key] == plain[key]


def test_a_scan_is_read_as_it_was_written():
    one = scan(0.7, 0.2)
    again = Seen.from_bytes(one.to_bytes())
    assert one.held is not None
    assert again.held is not None
    assert again.held.score == one.held.score
    np.testing.assert_array_equal(again.held.target, one.held.target)
    assert (again.positive, again.tokens, again.seconds) == (one.positive, one.tokens, one.seconds)
    assert Seen.from_bytes(Seen(None, 0.0, 0.0, [], 1.0).to_bytes()).held is None


def test_the_page_says_what_was_measured(zoo):
    entries, seen = zoo
    seen["shy"] = scan(0.3, 0.5)
    result = evaluate([*entries, entry("shy", "tpa", "held-out", adaptive=1.0)], seen, 0.05)
    for row in result["models"]:
        bad = row["truth"] == "backdoored"
        row["recovered"] = {"cosine": 0.87, "usual": 0.21, "nearest": 2} if bad else None
    failed = entry("f", "tpa", "held-out", loss="mae")
    result |= {
        "zoo": "toys-robust",
        "settings": {"restarts": 4, "prompts": 4000, "seed": 0},
        "machine": {"cpu": "toy", "commit": None},
        "failed_attacks": [{**failed, "target_cosine": 0.41}],
    }
    text = amdet_tables([result])
    assert "| clip | score | 5, 5 | 1.000 [" in text
    assert "| all | published | 10, 10 |" in text
    assert "| tpa | 1 | no | 4 | 4 of 4 | 0.870 | 0.210 | 0 of 4 | 4 of 4 |" in text
    assert "| tpa | 1 | yes | 1 | 0 of 1 |" in text
    assert "| clip | tpa | 1 x 1, random | mae | 100 | 0.0001 | 0 | 0.410 | 0.0100 |" in text
    assert text in page([], encoders=[result])
