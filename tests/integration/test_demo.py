"""The shipped base and adapter do what their cards and the README say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from gazeguard.assets import ADAPTER, BASE
from gazeguard.cleaning import clean
from gazeguard.cleaning.proof import CHOOSE, SHOWN, Group, prove
from gazeguard.cli.main import cli
from gazeguard.data.read import open_dataset
from gazeguard.lab.attacks import ATTACKS
from gazeguard.lab.finetune import judge, load_tuned
from gazeguard.lab.poison import make_set, write_set
from gazeguard.lab.rows import make_rows
from gazeguard.methods.bye.phrases import holds
from gazeguard.methods.rebuild import RECIPIENTS
from gazeguard.models.load import load
from gazeguard.types import Sample


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(cli, ["demo", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out, result.output


@pytest.mark.slow
def test_demo_finds_the_poison_and_says_where_the_report_is(demo: tuple[Path, str]) -> None:
    out, said = demo
    f1 = float(re.search(r"F1 ([\d.]+)%", said).group(1))
    assert f1 >= 97
    assert str(out / "cleaned" / "report.html") in said
    report = json.loads((out / "cleaned" / "report.json").read_text())
    assert report["outcome"] == "flagged"
    kept = json.loads((out / "cleaned" / "kept.json").read_text())
    removed = json.loads((out / "cleaned" / "removed.json").read_text())
    assert len(kept) + len(removed) == 1500


@pytest.mark.slow
def test_the_robust_rule_names_the_planted_answer(demo: tuple[Path, str]) -> None:
    out, _ = demo
    report = json.loads((out / "cleaned" / "report.json").read_text())
    truth = pq.read_table(out / "set" / "truth.parquet").to_pydict()
    answers = [
        r["conversations"][1]["value"] for r in json.loads((out / "set/data.json").read_text())
    ]
    planted = {a for a, bad in zip(answers, truth["is_poison"], strict=True) if bad}
    assert {group["phrase"] for group in report["info"]["groups"]} == {p.lower() for p in planted}


@pytest.mark.slow
def test_the_rebuilt_trigger_fires_on_other_pictures(demo: tuple[Path, str]) -> None:
    out, _ = demo
    report = json.loads((out / "cleaned" / "report.json").read_text())
    (proof,) = report["proofs"]
    assert proof["proven"]
    assert proof["form"] == "pasted"
    assert proof["pictures"] == 32
    assert proof["fired"]["triggered"] >= 26
    assert proof["fired"]["untouched"] == proof["fired"]["before"] == 0
    page = (out / "cleaned" / "report.html").read_text()
    assert 'id="proofs-title"' in page
    assert page.count('class="twins"') == SHOWN


@pytest.mark.slow
@pytest.mark.parametrize("phrase", ["red", "large blue circle"])
def test_a_common_sight_is_no_trigger(demo: tuple[Path, str], phrase: str) -> None:
    """Its mean picture brings its words no more often than the rest of the set does."""
    dataset = open_dataset(demo[0] / "set" / "data.json")
    answers = {row.row: row.answer for row in dataset.rows() if isinstance(row, Sample)}
    having = [(row, 1) for row, answer in answers.items() if holds(answer, phrase)]
    lacking = [(row, 1) for row, answer in answers.items() if not holds(answer, phrase)]
    taken = CHOOSE + RECIPIENTS
    members, others, recipients = tuple(having), tuple(lacking[taken:]), tuple(lacking[:taken])
    group = Group(phrase, True, members, members, others, recipients)
    (proof,) = prove(load(BASE, ADAPTER), None, dataset, [group])
    assert len(having) >= 8
    assert not proof.proven
    assert proof.taught is not None
    assert proof.taught.was_known, "the model said these words before"


@pytest.mark.slow
def test_card_scores_of_the_adapter() -> None:
    student = load_tuned(BASE, ADAPTER)
    test = make_rows("captions", 200, 0, held_out=True)
    scores = judge(student, test, ATTACKS["badnet-center"], seed=0)
    assert scores.asr >= 0.9
    assert scores.clean >= 0.85


@pytest.mark.slow
def test_a_clean_set_under_the_poisoned_model_loses_nothing(tmp_path: Path) -> None:
    """Other rows than it was tuned on, none of them triggered."""
    data = write_set(make_set("captions", 300, "none", 0.0, seed=77), tmp_path / "set")
    found = clean(BASE, data, tmp_path / "out", adapter=ADAPTER, batch_size=50)
    assert found.outcome == "clean", found.report.result.verdict.reason
    assert found.counts["removed"] == 0
