"""Conversations: every answer is measured and judged, and a poisoned one removes its row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gazeguard.cleaning import clean, gallery
from gazeguard.data.read import open_dataset
from gazeguard.methods.bye.detector import abstain
from gazeguard.models.load import load
from gazeguard.probe.attention import probe
from gazeguard.signals.entropy import visual_entropy
from gazeguard.types import Finding, Outcome, Profile, Sample, Verdict

TURNS = (1, 3, 2, 1, 3, 2)  # answers of each row
WITHOUT = 5  # this row's picture comes with its second question


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Conversations with one to three answers."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i, answers in enumerate(TURNS):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        talk = []
        for k in range(answers):
            image = "<image>\n" if k == (i == WITHOUT) else ""
            talk.append({"from": "human", "value": f"{image}question {k} of {i}?"})
            talk.append({"from": "gpt", "value": f"answer {k} of {i}"})
        rows.append({"id": i, "image": f"{i}.png", "conversations": talk})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def flag(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`flag((row, turn), ...)` makes the detector flag exactly these answers."""

    def install(*answers: tuple[int, int]) -> None:
        class Chosen:
            def __init__(self, rule: str, random_state: int) -> None:
                self.rule = rule

            def fit(self, profile: Profile) -> Chosen:
                named = zip(profile.row.tolist(), profile.turn.tolist(), strict=True)
                result = abstain(profile, self.rule, "chosen")
                result.is_flagged = np.array([one in answers for one in named])
                result.suspicion = np.where(result.is_flagged, 0.9, 0.1)
                result.verdict = Verdict(
                    Outcome.FLAGGED, 0.9, 0.5, "test", "Chosen.", (Finding("chosen"),)
                )
                self.result_ = result
                return self

        monkeypatch.setattr("gazeguard.cleaning.judge.BYE", Chosen)

    return install


def test_a_poisoned_second_answer_removes_its_row(
    llava: Path, talks: Path, tmp_path: Path, flag: Callable[..., None]
) -> None:
    flag((1, 2), (1, 3), (4, 1))
    outcome = clean(llava, talks, tmp_path / "out", batch_size=4)
    rows = json.loads(talks.read_text())
    out = tmp_path / "out"
    assert json.loads((out / "removed.json").read_text()) == [rows[1], rows[4]]
    assert outcome.counts["removed"] == 2
    assert outcome.counts["kept"] == 4
    expected = [(0, 1), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 3)]
    expected.append((WITHOUT, 2))
    profile = outcome.profile
    assert list(zip(profile.row.tolist(), profile.turn.tolist(), strict=True)) == expected
    assert profile.answer == [f"answer {turn - 1} of {row}" for row, turn in expected]
    assert profile.prompt == [f"question {turn - 1} of {row}?" for row, turn in expected]

    verdicts = pq.read_table(out / "verdicts.parquet").to_pylist()
    assert [v["row"] for v in verdicts] == list(range(len(TURNS)))
    assert [v["row"] for v in verdicts if v["is_flagged"]] == [1, 4]
    assert [v["turn"] for v in verdicts] == [1, 2, 1, 1, 1, 2]
    lines = pq.read_table(out / "profile.parquet").to_pydict()
    layers = len(profile.layers)
    assert list(zip(lines["row"], lines["turn"], strict=True))[::layers] == expected
    assert [item.key for item in outcome.report.gallery] == ["1.2", "1.3", "4.1"]
    page = (out / "report.html").read_text()
    assert "Row 1, turn 2" in page
    assert "Row 4, turn 1" in page
    assert "2 of 6 rows look poisoned and were removed" in page


def test_numbers_of_every_answer_are_those_of_a_pass_of_its_own(
    llava: Path, talks: Path, tmp_path: Path, flag: Callable[..., None]
) -> None:
    flag((0, 1))
    profile = clean(llava, talks, tmp_path / "out", batch_size=4).profile
    samples = [row for row in open_dataset(talks).rows() if isinstance(row, Sample)]
    asked = [each for sample in samples for each in sample.asked]
    for i, (rows,) in enumerate([list(probe(load(llava), [each])) for each in asked]):
        alone = visual_entropy(rows.weights, rows.key_kind)[0].numpy()
        np.testing.assert_allclose(profile.entropy[i], alone, atol=1e-5)
        assert profile.image_tokens[i] == rows.key_kind.eq(1).sum()


def test_shown_attention_is_that_of_the_answer(llava: Path, talks: Path) -> None:
    shown = gallery.look_again(load(llava), open_dataset(talks), {(1, 1): 0.5, (1, 3): 0.5})
    assert list(shown) == [(1, 1), (1, 3)]
    first, third = (shown[1, turn] for turn in (1, 3))
    assert (first.prompt, third.answer) == ("question 0 of 1?", "answer 2 of 1")
    (one,), (other,) = first.pictures, third.pictures
    assert one.heat
    assert other.heat
    assert any(not np.array_equal(one.heat[layer], other.heat[layer]) for layer in one.heat)


def test_an_answer_without_numbers_leaves_its_row_unmeasured(
    llava: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gazeguard.cleaning import measure

    attend = measure.attend

    def broken(target: Any, encoded: Any, **options: Any) -> Any:
        rows = attend(target, encoded, **options)
        for i, sample_id in enumerate(rows.sample_id):
            if rows.sample_id[:i].count(sample_id) == 1:  # every second answer
                rows.finite[i] = False
        return rows

    monkeypatch.setattr(measure, "attend", broken)
    outcome = clean(llava, talks, tmp_path / "out", batch_size=6)
    assert sorted(set(outcome.profile.row.tolist())) == [0, 3, WITHOUT]
    assert outcome.outcome is Outcome.INCONCLUSIVE
    assert outcome.counts["kept"] == 6
