"""What was not looked at is never clean, and no row is lost: any set, measured without a model.

Reading, batching, judging and writing are the real ones; only the forward pass and the method's
answer are made up, so that every example takes milliseconds.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gazeguard.cleaning import clean
from gazeguard.cleaning.measure import NOT_FINITE, SIGNALS, _failed, measure
from gazeguard.cleaning.reader import About
from gazeguard.data.dataset import Dataset
from gazeguard.data.spans import Spans, index_lines, index_list
from gazeguard.methods.bye.detector import abstain
from gazeguard.report.model import Proof
from gazeguard.types import CleaningResult, Finding, Outcome, Profile, Sample, Verdict

LAYERS = (0, 1)
UNREAD = ("missing", "broken", "silent", "role", "junk", "nan")


class Look:
    """Numbers without a model; rows that ask about NaN have none."""

    target = SimpleNamespace(device=torch.device("cpu"))

    def encode(self, samples: Sequence[Sample]) -> Any:
        return SimpleNamespace(key_kind=np.zeros((len(samples), 10)))

    def __call__(self, samples: list[Sample], encoded: Any) -> list[dict[str, Any]]:
        return [
            _failed(sample, NOT_FINITE)
            if "nan" in sample.prompt
            else {
                "row": sample.row,
                "turn": 1,
                "sample_id": sample.sample_id,
                "prompt": sample.prompt,
                "answer": sample.answer,
                "image_tokens": 4,
                **{name: np.full(len(LAYERS), 0.5, np.float32) for name in SIGNALS},
            }
            for sample in samples
        ]


class Reader:
    """`Here` without a model."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def about(self) -> About:
        record = {
            "model": {"id": "none"},
            "data": {"fingerprint": self._dataset.fingerprint()},
            "dtype": "float32",
            "attention": "none",
            "packages": {},
        }
        return About(record, LAYERS, "cpu", ())

    def blocks(self, spans: Any, batch_size: Any, rows: Any) -> Iterator[tuple[Any, pa.Table]]:
        return measure(Look(), self._dataset, spans, batch_size, rows)  # type: ignore[arg-type]

    def gallery(self, suspicion: Mapping[int, float]) -> dict[int, Any]:
        return {}

    def prove(self, groups: Any) -> list[Any]:
        return [Proof(group.phrase, "there is no model to ask") for group in groups]


def row_of(kind: str, number: int) -> Any:
    question = {"from": "human", "value": f"<image>\n{kind}?"}
    row: dict[str, Any] = {"id": number, "image": "there.png"}
    row["conversations"] = [question, {"from": "gpt", "value": "red"}]
    if kind == "missing":
        row["image"] = f"gone{number}.png"
    elif kind == "broken":
        row["image"] = "broken.png"
    elif kind == "silent":
        row["conversations"][1] = {"from": "gpt", "reply": "red"}
    elif kind == "role":
        question["from"] = "stranger"
    elif kind == "junk":
        row = {"id": number}
    elif kind == "text":
        del row["image"]
        question["value"] = "hello?"
    return row


def pieces(path: Path) -> list[bytes]:
    data = path.read_bytes()
    spans: Spans = index_list(path) if path.suffix == ".json" else index_lines(path)
    return [data[a:b].strip() for a, b in zip(spans.start, spans.stop, strict=True)]


@contextmanager
def without_model(flagged: frozenset[int]) -> Iterator[Path]:
    """Patches inside an example: hypothesis and fixtures of a function do not mix."""

    class Chosen:
        def __init__(self, rule: str, random_state: int) -> None:
            self._rule = rule

        def fit(self, profile: Profile) -> Chosen:
            result: CleaningResult = abstain(profile, self._rule, "chosen")
            result.is_flagged = np.isin(profile.row, sorted(flagged))
            any_flagged = bool(result.is_flagged.any())
            outcome = Outcome.FLAGGED if any_flagged else Outcome.CLEAN
            found = (Finding("chosen"),) if any_flagged else ()
            result.verdict = Verdict(outcome, float(any_flagged), 0.5, "test", "Chosen.", found)
            result.suspicion = result.is_flagged.astype(np.float64)
            self.result_ = result
            return self

    @contextmanager
    def reader(job: Any, dataset: Dataset, ray: Any) -> Iterator[Reader]:
        yield Reader(dataset)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr("gazeguard.cleaning.judge.BYE", Chosen)
        patch.setattr("gazeguard.cleaning.run._reader", reader)
        folder = Path(name)
        Image.new("RGB", (8, 8), "red").save(folder / "there.png")
        (folder / "broken.png").write_bytes(b"no picture")
        yield folder


def outcome_of(kinds: Sequence[str], flagged: frozenset[int], lines: bool, most: float) -> None:
    with without_model(flagged) as folder:
        rows = [json.dumps(row_of(kind, i)) for i, kind in enumerate(kinds)]
        data = folder / ("data.jsonl" if lines else "data.json")
        data.write_text("\n".join(rows) if lines else "[" + ",\n ".join(rows) + "]")
        found = clean("none", data, folder / "out", format="llava", max_skipped=most)

        counts = Counter(kinds)
        unread = sum(counts[kind] for kind in UNREAD)
        pictures = len(kinds) - counts["text"]
        if found.outcome is Outcome.CLEAN:
            assert pictures
            assert pictures - unread >= (1 - most) * pictures - 1e-9
        if counts["good"] and not flagged:
            assert (found.outcome is Outcome.CLEAN) == (
                unread <= most * pictures and counts["silent"] <= 0.1 * pictures
            ), found.report.result.verdict.reason
        files = found.report.files
        out = {
            what: pieces(folder / "out" / files[what]) for what in ("kept", "removed", "skipped")
        }
        assert sorted(sum(out.values(), [])) == sorted(row.encode() for row in rows)
        assert found.counts == {
            "rows": len(kinds),
            **{what: len(rows) for what, rows in out.items()},
            "suspected": 0,
            "text_only": counts["text"],
        }
        texts = [row.encode() for row, kind in zip(rows, kinds, strict=True) if kind == "text"]
        assert set(texts) <= set(out["kept"])
        if found.outcome is Outcome.INCONCLUSIVE:
            assert not out["removed"], "without a verdict nobody loses a row"
        reasons = (folder / "out" / files["reasons"]).read_text().splitlines()
        assert len(reasons) == len(out["skipped"])
        if unread:
            assert (
                f"{unread:,} of {pictures:,} rows with pictures w"
                in json.loads((folder / "out" / "report.json").read_text())["summary"]
            )


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_clean_set_was_looked_at_and_no_row_is_lost(data: st.DataObject) -> None:
    good = data.draw(st.integers(0, 120), "good")
    others = data.draw(
        st.lists(st.sampled_from([*UNREAD, "text"]), min_size=0 if good else 1, max_size=6),
        "others",
    )
    kinds = (
        data.draw(st.permutations(["good"] * good + others), "kinds")
        if good < 30
        else (["good"] * good + others)
    )
    readable = [i for i, kind in enumerate(kinds) if kind == "good"]
    picked = (
        st.frozensets(st.sampled_from(readable), max_size=3) if readable else st.just(frozenset())
    )
    flagged = data.draw(picked, "flagged")
    most = data.draw(st.sampled_from([0.0, 0.01, 0.05, 0.5]), "most")
    outcome_of(kinds, flagged, data.draw(st.booleans(), "lines"), most)


@pytest.mark.parametrize("unread", UNREAD)
def test_one_in_a_hundred_may_be_unread_and_no_more(unread: str) -> None:
    outcome_of([unread] + ["good"] * 99, frozenset(), lines=False, most=0.01)
    outcome_of([unread] * 2 + ["good"] * 99, frozenset(), lines=False, most=0.01)


def test_rows_of_text_alone_count_neither_for_nor_against() -> None:
    outcome_of(["text"] * 50 + ["good"] * 99 + ["missing"], frozenset(), lines=True, most=0.01)
    outcome_of(["text"] * 5, frozenset(), lines=True, most=0.01)
    outcome_of(["text"] * 5 + ["silent"] * 12 + ["good"] * 90, frozenset(), lines=True, most=0.5)
