"""`gazeguard clean` end to end on a tiny random model: files, counts, exit codes, output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from gazeguard.cleaning import clean, measure
from gazeguard.cli.main import run
from gazeguard.errors import ModelError
from gazeguard.lab import tiny

from .conftest import MakeData


def command(model: Path, data: Path, out: Path, *options: str) -> list[str]:
    return ["clean", str(model), str(data), "--out", str(out), *options]


def test_every_file_is_written_and_every_row_is_somewhere(
    llava: Path, make_data: MakeData, tmp_path: Path, decide: Callable[..., None]
) -> None:
    data, out = make_data(12, broken=(4,)), tmp_path / "out"
    decide(2, 7)
    outcome = clean(llava, data, out, batch_size=5)

    assert outcome.counts == {
        "rows": 12,
        "kept": 9,
        "removed": 2,
        "suspected": 0,
        "skipped": 1,
        "text_only": 0,
    }
    rows = json.loads(data.read_text())
    kept = json.loads((out / "kept.json").read_text())
    removed = json.loads((out / "removed.json").read_text())
    assert removed == [rows[2], rows[7]]
    assert kept == [row for i, row in enumerate(rows) if i not in (2, 4, 7)]
    (skipped,) = map(json.loads, (out / "reasons.jsonl").read_text().splitlines())
    assert skipped["row"] == 4
    assert json.loads((out / "skipped.json").read_text()) == [rows[4]]
    assert skipped["reason"]

    verdicts = pq.read_table(out / "verdicts.parquet").to_pylist()
    assert list(verdicts[0]) == [
        "row",
        "turn",
        "sample_id",
        "is_flagged",
        "is_suspected",
        "suspicion",
        "reason",
        "method",
    ]
    assert [v["row"] for v in verdicts] == list(range(12))
    assert [v["row"] for v in verdicts if v["is_flagged"]] == [2, 7]
    assert verdicts[4]["suspicion"] is None, "a row that was not judged has no suspicion"
    assert verdicts[4]["reason"] == skipped["reason"]
    assert {v["method"] for v in verdicts} == {"bye/robust"}

    profile = pq.read_table(out / "profile.parquet")
    assert profile.column_names[:5] == ["row", "turn", "sample_id", "image_tokens", "layer"]
    n_layers = len(outcome.profile.layers)
    assert profile.num_rows == 11 * n_layers
    first = profile.slice(0, n_layers).to_pydict()
    assert first["layer"] == list(outcome.profile.layers)
    assert first["entropy"] == pytest.approx(outcome.profile.entropy[0].tolist())

    report = json.loads((out / "report.json").read_text())
    assert report["outcome"] == "flagged"
    assert report["counts"] == outcome.counts
    assert all((out / name).exists() for name in report["files"].values())
    assert report["provenance"]["model"]["id"]
    assert report["provenance"]["data"]["fingerprint"]
    assert report["provenance"]["arguments"]["batch_size"] == 5


def test_profile_is_what_the_probe_measures(
    llava: Path, make_data: MakeData, tmp_path: Path, decide: Callable[..., None]
) -> None:
    from gazeguard.data.read import open_dataset
    from gazeguard.models.load import load
    from gazeguard.probe.attention import probe
    from gazeguard.signals.entropy import visual_entropy

    decide()
    data = make_data(6)
    outcome = clean(llava, data, tmp_path / "out", batch_size=4)
    rows = list(probe(load(llava), open_dataset(data).rows(), batch_size=1))
    alone = torch.cat([visual_entropy(r.weights, r.key_kind) for r in rows])
    difference = (torch.from_numpy(outcome.profile.entropy.copy()) - alone).abs().max()
    assert difference < 1e-5, f"batched and single rows differ by {difference}"


@pytest.mark.parametrize(
    ("flagged", "options", "code"),
    [
        ((), (), 0),
        ((3,), (), 1),
        ((3,), ("--fail-on", "inconclusive"), 0),
        ((3,), ("--fail-on", "never"), 0),
    ],
)
def test_exit_code_follows_the_verdict(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    decide: Callable[..., None],
    flagged: tuple[int, ...],
    options: tuple[str, ...],
    code: int,
) -> None:
    decide(*flagged)
    assert run(command(llava, make_data(6), tmp_path / "out", "-q", *options)) == code


def test_the_real_rule_ends_with_a_verdict_and_complete_counts(
    llava: Path, make_data: MakeData, tmp_path: Path
) -> None:
    outcome = clean(llava, make_data(90), tmp_path / "out", rule="paper")
    assert outcome.outcome in ("clean", "flagged")
    counts = outcome.counts
    assert counts["kept"] + counts["removed"] + counts["skipped"] == counts["rows"] == 90


def test_json_is_alone_on_stdout(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    decide: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    decide(1)
    out = tmp_path / "out"
    assert run(command(llava, make_data(6), out, "--json")) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((out / "report.json").read_text())
    assert "attention sdpa" in printed.err, "device, dtype and backend are said on stderr"
    assert "Loading weights" not in printed.err, "transformers' bars must not show"


def test_quiet_prints_nothing(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    decide: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    decide()
    assert run(command(llava, make_data(4), tmp_path / "out", "-q")) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_how_rows_are_read_is_told_before_a_model_is_loaded(
    make_data: MakeData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data(4)
    rows = json.loads(data.read_text())
    rows[1]["conversations"].pop()
    rows[2] = {"conversations": [{"from": "human", "value": "hi"}]}
    data = data.with_name("mixed.json")
    data.write_text(json.dumps(rows))
    with caplog.at_level("INFO", "gazeguard"), pytest.raises(ModelError):
        clean(tmp_path / "nowhere", data, tmp_path / "out")
    assert caplog.messages[0] == (
        f"{data} (llava): 4 rows: 2 with 2 pictures and 4 turns, 1 of text alone, 1 that cannot be"
        " used (no answer 1). Columns that are not read: id."
    )


def test_files_of_the_users_stay_as_they_are(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    decide: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    decide()
    data, out = make_data(6), tmp_path / "out"
    out.mkdir()
    (out / "kept.json").write_text("mine")
    (out / "report.json").write_text('{"files": {"kept": "kept.json"}}')
    assert run(command(llava, data, out)) == 2
    assert "kept.json, report.json that no earlier run" in capsys.readouterr().err
    assert (out / "kept.json").read_text() == "mine"
    (out / "kept.json").rename(out / "kept.parquet")  # no name that this run uses
    (out / "report.json").unlink()
    assert run(command(llava, data, out, "-q")) == 0
    assert run(command(llava, data, out, "-q")) == 0, "its own files are replaced"
    (out / "report.json").unlink()  # as if the run had been killed before its end
    assert run(command(llava, data, out, "-q")) == 0
    assert (out / "kept.parquet").read_text() == "mine"


def test_limit_looks_at_the_first_rows_only(
    llava: Path, make_data: MakeData, tmp_path: Path, decide: Callable[..., None]
) -> None:
    decide()
    outcome = clean(llava, make_data(8), tmp_path / "out", limit=3)
    assert outcome.counts == {
        "rows": 3,
        "kept": 3,
        "removed": 0,
        "suspected": 0,
        "skipped": 0,
        "text_only": 0,
    }
    assert len(json.loads((tmp_path / "out" / "kept.json").read_text())) == 3


def test_out_of_memory_halves_the_batch_and_gives_up_one_row_only(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    decide: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decide()
    data = make_data(8)
    roomy = clean(llava, data, tmp_path / "roomy").profile
    too_big = roomy.sample_id[5]
    sizes = []

    def small_memory(target, encoded, **options):  # type: ignore[no-untyped-def]
        sizes.append(len(encoded.sample_id))
        if len(encoded.sample_id) > 2 or too_big in encoded.sample_id:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attend(target, encoded, **options)

    attend = measure.attend
    monkeypatch.setattr(measure, "attend", small_memory)
    tight = clean(llava, data, tmp_path / "tight", batch_size=8, max_skipped=0.2)
    assert sizes[:3] == [8, 4, 2], "the batch is halved until it fits"
    assert tight.counts == {
        "rows": 8,
        "kept": 7,
        "removed": 0,
        "suspected": 0,
        "skipped": 1,
        "text_only": 0,
    }
    assert tight.report.skipped[0].row == 5
    assert "memory" in tight.report.skipped[0].reason
    others = [i for i in range(8) if i != 5]
    assert tight.profile.entropy == pytest.approx(roomy.entropy[others], abs=1e-5)


def test_a_row_that_cannot_be_encoded_does_not_take_its_batch_along(
    make_data: MakeData, tmp_path: Path, decide: Callable[..., None]
) -> None:
    decide()
    folder = make_data(6).parent
    data = tmp_path / "data.jsonl"
    with data.open("w") as handle:
        for i in range(6):
            # The model's own image token among the words: only the encoder can see that.
            text = "a smuggled <|image_pad|> here" if i == 2 else "what colour?"
            content = [{"type": "image"}, {"type": "text", "text": text}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
            row = {"images": [f"{i}.png"], "messages": turns}
            handle.write(json.dumps(row) + "\n")
    qwen = tiny.build("qwen2_5_vl", tmp_path / "qwen")
    outcome = clean(qwen, data, tmp_path / "out", images=folder)
    assert [s.row for s in outcome.report.skipped] == [2]
    assert outcome.report.skipped[0].sample_id, "it was read: only the model cannot take it"
    assert outcome.profile.row.tolist() == [0, 1, 3, 4, 5]
