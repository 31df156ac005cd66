"""For any rows and any choice: nothing is lost, kept rows are the input's bytes, no row crashes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from gazeguard.data.read import open_dataset
from gazeguard.data.spans import Spans, index_csv, index_lines, index_list
from gazeguard.errors import DataError
from gazeguard.types import Sample, SkippedRow, TextOnlyRow

BOM = b"\xef\xbb\xbf"
COMMON = settings(max_examples=60, deadline=None)

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | words | st.sampled_from(['"', "\\", "[{]}", ",\n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
lines = st.one_of(
    json_values.map(lambda v: json.dumps(v, ensure_ascii=False).encode()),
    st.binary(min_size=1, max_size=20).map(lambda b: b.replace(b"\n", b".")),
)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Give one example its own folder: `tmp_path` would be shared by all examples."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2)).save(out, "PNG")
    return out.getvalue()


def pieces(spans: Spans) -> list[bytes]:
    data = spans.path.read_bytes()
    return [data[a:b] for a, b in zip(spans.start, spans.stop, strict=True)]


def copied(spans: Spans, rows: list[int]) -> bytes:
    out = io.BytesIO()
    spans.copy(np.array(rows, dtype=np.int64), out)
    return out.getvalue()


def split(draw: st.DrawFn, count: int) -> tuple[list[int], list[int]]:
    keep = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return [i for i in range(count) if keep[i]], [i for i in range(count) if not keep[i]]


@COMMON
@given(
    st.data(),
    st.lists(lines, max_size=12),
    st.sampled_from([b"\n", b"\r\n", b"\n \n"]),
    st.booleans(),
    st.booleans(),
)
def test_lines_are_kept_byte_by_byte(
    data: st.DataObject, rows: list[bytes], ending: bytes, mark: bool, ends: bool
) -> None:
    # A row that begins with the mark is not JSON, and as the first of a file it is the file's mark.
    assume(not any(row.lstrip().startswith(BOM) for row in rows))
    with folder() as place:
        path = place / "x.jsonl"
        path.write_bytes(BOM * mark + ending.join(rows) + ending * ends)
        spans = index_lines(path)
        kept_bytes = pieces(spans)
        assert [p.strip() for p in kept_bytes] == [r.strip() for r in rows if r.strip()]
        kept, removed = split(data.draw, len(spans))
        for chosen in (kept, removed):
            (place / "out.jsonl").write_bytes(copied(spans, chosen))
            assert pieces(index_lines(place / "out.jsonl")) == [kept_bytes[i] for i in chosen]
        assert copied(spans, list(range(len(spans)))) == (path.read_bytes() if len(spans) else b"")


@COMMON
@given(
    st.data(),
    st.lists(json_values, max_size=10),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([(",", ":"), (" ,\r\n\t", " : ")]),
    st.booleans(),
    st.booleans(),
)
def test_list_items_are_kept_byte_by_byte(
    data: st.DataObject,
    items: list[Any],
    indent: int | None,
    separators: tuple[str, str],
    ascii_only: bool,
    mark: bool,
) -> None:
    text = json.dumps(items, indent=indent, separators=separators, ensure_ascii=ascii_only)
    with folder() as place:
        path = place / "x.json"
        path.write_bytes(BOM * mark + text.encode() + b"\n")
        spans = index_list(path)
        original = pieces(spans)
        assert [json.loads(p) for p in original] == items
        kept, removed = split(data.draw, len(spans))
        assert len(kept) + len(removed) == len(items)
        for chosen in (kept, removed):
            (place / "out.json").write_bytes(copied(spans, chosen))
            again = index_list(place / "out.json")
            assert pieces(again) == [original[i] for i in chosen]
            assert json.loads((place / "out.json").read_text("utf-8-sig")) == [
                items[i] for i in chosen
            ]
        if items:
            assert copied(spans, list(range(len(items)))) == path.read_bytes()


@COMMON
@given(st.lists(st.sampled_from(list('[]{},:"\\ \n1ax')), max_size=14).map("".join))
def test_the_list_scanner_agrees_with_json(tail: str) -> None:
    with folder() as place:
        path = place / "x.json"
        path.write_text("[" + tail)
        try:
            expected = json.loads("[" + tail)
        except ValueError:
            expected = None
        if expected is not None:
            assert [json.loads(p) for p in pieces(index_list(path))] == expected
        else:  # what is broken inside an item is found later, and skips that row only
            with contextlib.suppress(DataError):
                index_list(path)


@COMMON
@given(
    st.data(),
    st.lists(st.tuples(words, words.filter(bool)), max_size=8),
    st.sampled_from(["\n", "\r\n"]),
)
def test_csv_records_are_kept_byte_by_byte(
    data: st.DataObject, rows: list[tuple[str, str]], ending: str
) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerows([("file_name", "text"), *rows])
    with folder() as place:
        path = place / "metadata.csv"
        path.write_bytes(out.getvalue().encode())
        spans = index_csv(path)
        assert len(spans) == len(rows)
        kept, removed = split(data.draw, len(spans))
        for chosen in (kept, removed):
            text = copied(spans, chosen).decode()
            read = list(csv.reader(io.StringIO(text, newline="")))
            assert read == [["file_name", "text"], *(list(rows[i]) for i in chosen)]


@settings(max_examples=25, deadline=None)
@given(st.data(), st.lists(st.tuples(words, st.none() | st.floats()), max_size=40))
def test_parquet_rows_keep_schema_and_values(
    data: st.DataObject, rows: list[tuple[str, float | None]]
) -> None:
    schema = pa.schema(
        [("image", pa.string()), ("question", pa.string()), ("x", pa.float32())],
        metadata={"huggingface": "{}"},
    )
    values = [{"image": "a.png", "question": q, "x": x} for q, x in rows] or [{"x": 1.0}]
    table = pa.Table.from_pylist(values, schema)
    with folder() as place:
        (place / "a.png").write_bytes(png())
        pq.write_table(table, place / "in.parquet", row_group_size=data.draw(st.integers(1, 50)))
        dataset = open_dataset(place / "in.parquet")
        kept, removed = split(data.draw, dataset.count())
        total = 0
        for name, chosen in (("kept", kept), ("removed", removed)):
            after = pq.read_table(dataset.write(chosen, place / "out" / name))
            assert after.schema.equals(table.schema, check_metadata=True)
            # NaN is not equal to itself: compare the stored form.
            assert repr(after.to_pylist()) == repr(
                table.take(pa.array(chosen, pa.int64())).to_pylist()
            )
            total += after.num_rows
        assert total == table.num_rows


names = st.sampled_from(["1.png", "../1.png", "no.png", "", "data:,x", "file://", "http://a"])
cells = json_values | names | st.lists(names, max_size=2)
parts = st.dictionaries(
    st.sampled_from(["type", "text", "image", "image_url", "url"]),
    st.sampled_from(["text", "image", "image_url", "<image>", "1.png"]) | json_values,
    max_size=3,
)
turns = st.dictionaries(
    st.sampled_from(["from", "value", "role", "content"]),
    st.sampled_from(["human", "user", "gpt", "system", "<image>hi"])
    | st.lists(parts | words, max_size=3)
    | json_values,
    max_size=4,
)
records = st.dictionaries(
    st.sampled_from(
        ["id", "image", "images", "conversations", "messages", "prompt", "completion", "chosen"]
        + ["answers", "history", "system", "input", "label", "video", "text", "img"]
    ),
    st.lists(turns, max_size=3) | cells,
    max_size=4,
)


@COMMON
@given(
    st.lists(records | json_values, min_size=1, max_size=8),
    st.sampled_from(["llava", "chat", "openai", "imagefolder"]),
    st.booleans(),
)
def test_any_json_gives_each_row_exactly_once(rows: list[Any], format: str, as_list: bool) -> None:
    with folder() as place:
        (place / "1.png").write_bytes(png())
        text = "\n".join(json.dumps(row) for row in rows)
        path = place / "x.json"
        if format == "imagefolder":
            path = place / "metadata.jsonl"
            text = text.replace('"images"', '"file_names"').replace('"image"', '"file_name"')
        elif as_list or text.startswith("["):
            text = json.dumps(rows)
        path.write_text(text)
        dataset = open_dataset(path, format=format)
        read = list(dataset.rows())
        assert [row.row for row in read] == list(range(len(rows)))
        for row in read:
            if isinstance(row, SkippedRow):
                assert row.reason
                assert row.reason.isprintable()
                assert len(row.reason) < 250
            elif not isinstance(row, TextOnlyRow):
                assert isinstance(row, Sample)
                assert row.images
                assert any(turn.role == "user" for turn in row.turns)
        assert dataset.fingerprint() == open_dataset(path, format=format).fingerprint()
        survey = dataset.survey()
        assert survey.rows == len(rows)
        assert survey.text_only == sum(isinstance(row, TextOnlyRow) for row in read)
        assert survey.with_pictures >= sum(isinstance(row, Sample) for row in read)
        with tempfile.TemporaryDirectory() as target:
            written = dataset.write(range(len(rows)), Path(target) / "kept")
            file = written / "metadata.jsonl" if written.is_dir() else written
            assert file.read_text() == text


READABLE = {
    "sample": {"image": "1.png", "conversations": [{"from": "human", "value": "hi"}]},
    "text": {"messages": [{"role": "user", "content": "hi"}]},
    "missing": {"image": "no.png", "question": "hi", "answer": "yes"},
    "unanswered": {"image": "1.png", "question": "hi"},
    "answered": {"image": "1.png", "question": "hi", "answer": "yes"},
    "role": {"image": "1.png", "conversations": [{"from": "Human", "value": "hi"}]},
    "broken": None,
}


@COMMON
@given(
    st.lists(st.sampled_from(sorted(READABLE)), min_size=1, max_size=10),
    st.sampled_from(["list", "lines", "pretty", "wrapped"]),
    st.booleans(),
    st.data(),
)
def test_a_mix_of_rows_comes_out_as_what_each_row_is(
    kinds: list[str], container: str, need_answer: bool, data: st.DataObject
) -> None:
    assume("answered" in kinds)  # else there may be nothing that looks like a data set
    bodies = ["{oops}" if k == "broken" else json.dumps(READABLE[k]) for k in kinds]
    if container == "pretty":
        kinds = [k for k in kinds if k != "broken"]
        bodies = [json.dumps(READABLE[k], indent=1) for k in kinds]
    text = "\n".join(bodies)
    if container in ("list", "wrapped"):
        text = f"[{','.join(bodies)}]"
    if container == "wrapped":
        text = f'{{"v": 1, "data": {text}}}'
    with folder() as place:
        (place / "1.png").write_bytes(png())
        (place / "x.json").write_text(text)
        dataset = open_dataset(place / "x.json", need_answer=need_answer)
        found = list(dataset.rows())
        assert [row.row for row in found] == list(range(len(kinds)))
        for kind, row in zip(kinds, found, strict=True):
            if kind == "text":
                assert isinstance(row, TextOnlyRow)
            elif kind == "answered" or (kind in ("sample", "unanswered") and not need_answer):
                assert isinstance(row, Sample)
            else:
                assert isinstance(row, SkippedRow)
        chosen = data.draw(st.sets(st.sampled_from(range(len(kinds)))))
        written = dataset.write(chosen, place / "out/kept").read_text()
        rest = dataset.write(set(range(len(kinds))) - chosen, place / "out/removed").read_text()
        for body in {*bodies}:
            assert written.count(body) + rest.count(body) == bodies.count(body)
        assert dataset.write(range(len(kinds)), place / "out/all").read_text() == text
