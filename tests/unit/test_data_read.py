"""Finding the format, and bad input: one sentence for the set, one reason for a row."""

from __future__ import annotations

import base64
import gzip
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gazeguard.data.columns import Columns
from gazeguard.data.images import ImageLimits
from gazeguard.data.read import FORMATS, open_dataset
from gazeguard.errors import DataError, UsageError
from gazeguard.types import ImagePart, Sample, SkipKind, SkippedRow, TextOnlyRow, TextPart

from . import shapes


@pytest.fixture(autouse=True)
def picture(tmp_path: Path) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(out, "PNG")
    (tmp_path / "1.png").write_bytes(out.getvalue())
    return out.getvalue()


def item(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yes"}]
    record = {"id": "a", "image": "1.png", "conversations": turns} | changes
    return {key: value for key, value in record.items() if value is not ...}


def said(*contents: Any, **more: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"messages": turns} | more


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def only_row(path: Path, record: Any, **options: Any) -> Sample | SkippedRow | TextOnlyRow:
    source = lines(path / "x.jsonl", record)
    (row,) = open_dataset(source, **options).rows()
    return row


def sample(row: Sample | SkippedRow | TextOnlyRow) -> Sample:
    assert isinstance(row, Sample), row
    return row


@pytest.mark.parametrize(
    ("record", "format"),
    [
        (item(), "llava"),
        (said("<image>hi", "yes", images=["1.png"]), "chat"),
        (said([{"type": "image"}, {"type": "text", "text": "hi"}], image="1.png"), "chat"),
        ({"prompt": "hi", "completion": "yes", "image": "1.png"}, "chat"),
        (said([{"type": "image_url", "image_url": {"url": "1.png"}}]), "openai"),
        (said("no image at all", "true"), "chat"),
    ],
)
@pytest.mark.parametrize("container", ["list", "lines"])
def test_format_is_found_by_content_not_by_suffix(
    tmp_path: Path, record: dict[str, Any], format: str, container: str
) -> None:
    path = tmp_path / "data.txt"
    path.write_text(json.dumps([record]) if container == "list" else json.dumps(record))
    dataset = open_dataset(path)
    assert (dataset.format, dataset.count()) == (format, 1)
    written = dataset.write([0], tmp_path / "kept")
    assert written.suffix == (".json" if container == "list" else ".jsonl")


def test_broken_first_rows_do_not_hide_the_format(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("oops\n[1]\n" + json.dumps(item()) + "\n")
    rows = list(open_dataset(path).rows())
    assert [getattr(row, "reason", None) for row in rows] == [
        "line 1, column 1 is not JSON: Expecting value",
        "line 2 is not an object",
        None,
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "holds no rows"),
        (b"[]", "holds no rows"),
        (b"\xff\xfe[\x00]\x00", "UTF-16"),
        (gzip.compress(b"[]", mtime=0), "unpack"),
        (bytes(range(256)), "binary file"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "binary file"),
        (b"id,question\n1,why\n", "no image column among id, question; name it with --image"),
        (b'{"a": 1}\n{"b": 2}\n', "rows with the keys a, b, and no conversation"),
        (b'[{"a": 1},]', "comma after the last item at line 1"),
        (b'[\n{"a": 1},\n{"a": 2},\n]\n', "comma after the last item at line 3"),
        (b'[\n{"a": 1}\n{"a": 2}]', "a comma or ] is missing at line 3"),
        (b'[\n{"a": 1},\n\n{"a": 2}', "a comma or ] is missing at line 4"),
        (b'[\n{"a": [1, 2}]', "closes nothing at line 2"),
        (b'[\n{"a": "1, 2}]\n', "a string does not end at line 2"),
        (b'[\n{"a": ', "ends too early"),
        (b"[", "an item is missing at line 1"),
        (b"[1,,2]", "an item is missing"),
        (b'[{"a": 1}]\n[]', "more after the end of the list at line 2"),
        (b"PAR1 and then nothing", "is broken"),
    ],
)
def test_a_file_that_is_no_data_set_is_one_sentence(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        open_dataset(path)
    assert message in str(error.value)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_mixed_rows_are_read_and_unknown_input_lists_what_is_supported(tmp_path: Path) -> None:
    mixed = lines(
        tmp_path / "mixed.jsonl",
        item(),
        said([{"type": "image_url", "image_url": {"url": "1.png"}}]),
    )
    dataset = open_dataset(mixed)
    assert dataset.format == "mixed"
    assert [type(row) for row in dataset.rows()] == [Sample, Sample]
    dataset = open_dataset(mixed, format="llava")
    assert [type(row) for row in dataset.rows()] == [Sample, SkippedRow]
    dataset = open_dataset(mixed, format="columns")
    assert [type(row) for row in dataset.rows()] == [SkippedRow, SkippedRow]
    (tmp_path / "x.bin").write_bytes(b"\x00\x01")
    with pytest.raises(DataError, match="binary file") as error:
        open_dataset(tmp_path / "x.bin")
    assert all(name in str(error.value) for name in FORMATS)


def test_folders_that_are_no_data_set_say_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder without metadata.jsonl"):
        open_dataset(tmp_path)
    lines(tmp_path / "train.json", item())
    with pytest.raises(DataError, match="perhaps you mean train.json"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(DataError, match="--images"):
        open_dataset(tmp_path / "train.json", images=tmp_path / "nothing")
    with pytest.raises(UsageError, match="no format 'csv'"):
        open_dataset(tmp_path / "train.json", format="csv")
    with pytest.raises(DataError, match="is not parquet but looks like llava"):
        open_dataset(tmp_path / "train.json", format="parquet")
    (tmp_path / "dataset_dict.json").write_text("{}")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/state.json").write_text("{}")
    with pytest.raises(DataError, match="name one of: train"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="save the set again"):
        open_dataset(tmp_path / "train")


def test_a_folder_of_two_kinds_needs_format(tmp_path: Path) -> None:
    lines(tmp_path / "metadata.jsonl", {"file_name": "1.png", "text": "red"})
    pq.write_table(pa.table({"image": ["1.png"], "question": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="more than one kind"):
        open_dataset(tmp_path)
    for format in ("imagefolder", "parquet"):
        dataset = open_dataset(tmp_path, format=format)
        assert dataset.format == format
        assert sample(next(dataset.rows())).images


def test_metadata_file_stands_for_its_folder(tmp_path: Path) -> None:
    path = lines(tmp_path / "metadata.jsonl", {"file_name": "1.png", "text": "a red square"})
    dataset = open_dataset(path)
    assert dataset.format == "imagefolder"
    row = sample(next(dataset.rows()))
    assert row.turns[0].parts == (ImagePart(0),), "a caption has no question, and needs none"
    assert row.answer == "a red square"


def test_tables_without_a_known_column_are_refused(tmp_path: Path) -> None:
    for table, what in (
        ({"img": ["1.png"], "question": ["x"]}, "no image column among img, question"),
        ({"image": ["1.png"], "frage": ["x"]}, "no text column among image, frage"),
        ({"image": pa.array([], pa.string()), "text": pa.array([], pa.string())}, "no rows"),
    ):
        pq.write_table(pa.table(table), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=what):
            open_dataset(tmp_path / "x.parquet")


def test_table_cells_that_cannot_be_read_are_skipped_rows(tmp_path: Path, picture: bytes) -> None:
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    cells = [
        [{"bytes": picture, "path": None}] * 2,
        [{"bytes": None, "path": "1.png"}],
        [{"bytes": None, "path": None}],
        [{"bytes": picture[:50], "path": "1.png"}],
        [],
        None,
    ]
    texts = [[{"user": "hi", "assistant": "yes"}]] * len(cells)
    table = pa.table({"pictures": pa.array(cells, kind), "texts": texts})
    pq.write_table(table, tmp_path / "x.parquet")
    dataset = open_dataset(tmp_path / "x.parquet")
    rows = list(dataset.rows())
    assert [len(sample(row).images) for row in rows[:2]] == [2, 1]
    assert [getattr(row, "reason", "") for row in rows[2:]] == [
        "an image of this row is neither a path nor bytes",
        "image is broken (image file is truncated): 1.png",
        "",
        "",
    ]
    assert [type(row) for row in rows[4:]] == [TextOnlyRow, TextOnlyRow]
    written = dataset.write([2, 3, 4, 5], tmp_path / "out/removed")
    assert pq.read_table(written).equals(table[2:])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (item(image=...), "no image in this row for its <image> marker; if there is one, add"),
        (item(image=None), "no image in this row for its <image> marker; if there is one, add"),
        (item(image="img/7.png"), "image not found: img/7.png"),
        (item(image="../1.png"), "image path leaves the image folder: ../1.png; --images names"),
        (item(image=["1.png", "1.png"]), "1 image markers but 2 images"),
        (item(image=7), "an image of this row is neither a path nor bytes"),
        (item(conversations=...) | {"messages": []}, "no 'conversations' in this row"),
        (item(conversations="hi"), "'conversations' is not a list of turns"),
        (item(conversations=[]), "no 'conversations' in this row (keys: id, image, conversations)"),
        (item(conversations=[{"from": "gpt", "value": "x"}]), "no user turn in this row"),
        (item(conversations=[{"from": "tool"}]), "unknown role 'tool' in 'conversations'"),
        (
            item(conversations=[{"from": "human", "value": {}}]),
            "a turn holds dict, not text or parts",
        ),
        (
            item(conversations=[{"from": "human", "value": "\ud83d"}]),
            "text holds a broken unicode character",
        ),
        ([1], "line 1 is not an object"),
        (None, "line 1 is not an object"),
    ],
)
def test_llava_rows_that_cannot_be_read_say_why(tmp_path: Path, record: Any, reason: str) -> None:
    row = only_row(tmp_path, record, format="llava")
    assert isinstance(row, SkippedRow)
    assert row.reason.startswith(reason)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (said("<image>hi", images=[]), "no image in this row"),
        (said("<image><image>hi", images=["1.png"]), "2 image markers but 1 images"),
        (
            said([{"type": "image_url", "image_url": {"url": "http://a.b/c.png"}}]),
            "image is a web address, download it first: http://a.b/c.png",
        ),
        (
            said([{"type": "video"}], images=["1.png"]),
            "a turn's part of type 'video' is not text or",
        ),
        (
            said([{"type": "image", "image": "1.png"}], images=["1.png"]),
            "0 image markers but 1 images",
        ),
        ({"images": ["1.png"]}, "no 'messages' or 'prompt' in this row"),
    ],
)
def test_chat_rows_that_cannot_be_read_say_why(tmp_path: Path, record: Any, reason: str) -> None:
    row = only_row(tmp_path, record, format="chat")
    assert isinstance(row, SkippedRow)
    assert row.reason.startswith(reason)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1,}', "line 3, column 9 is not JSON"),
        (b"\xff\xff", "line 3 is not UTF-8 text"),
        (b"[" * 200_000, "line 3 is nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", "line 3 cannot be read"),
    ],
)
def test_a_broken_line_is_one_skipped_row(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json.dumps(item()).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(good + b"\n\n" + line + b"\n" + good)  # the blank line is no row
    dataset = open_dataset(path)
    rows = list(dataset.rows())
    assert [row.row for row in rows] == [0, 1, 2]
    assert isinstance(rows[1], SkippedRow)
    assert rows[1].reason.startswith(reason)
    assert dataset.write([1], tmp_path / "out/removed").read_bytes() == line + b"\n"


def test_a_broken_item_in_a_list_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(f'[\n{json.dumps(item())},\n{{\n"id": 1,\n}}\n]\n')
    rows = list(open_dataset(path).rows())
    assert isinstance(rows[0], Sample)
    assert isinstance(rows[1], SkippedRow)
    assert rows[1].reason.startswith("line ")
    assert "is not JSON" in rows[1].reason


def test_a_row_that_is_too_long_is_skipped_unparsed(tmp_path: Path) -> None:
    record = item(id="x" * (17 << 20))
    rows = list(
        open_dataset(
            lines(tmp_path / "x.jsonl", item(), record), limits=ImageLimits(max_bytes=1000)
        ).rows()
    )
    assert isinstance(rows[0], Sample)
    assert isinstance(rows[1], SkippedRow)
    assert "longer than the limit" in rows[1].reason


def test_byte_order_mark_and_crlf_are_kept(tmp_path: Path) -> None:
    records = [json.dumps(item(id=i)).encode() for i in range(3)]
    path = tmp_path / "x.jsonl"
    for content, kept in (
        (b"\r\n".join(records), records[1] + b"\r\n" + records[2]),
        (b"[" + b",\r\n ".join(records) + b"]", b"[" + records[1] + b",\r\n " + records[2] + b"]"),
    ):
        path.write_bytes(b"\xef\xbb\xbf" + content)
        dataset = open_dataset(path)
        assert all(isinstance(row, Sample) for row in dataset.rows())
        assert dataset.write([1, 2], tmp_path / "kept").read_bytes() == b"\xef\xbb\xbf" + kept


def test_places_of_images_and_system_turns(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "left <image>\nright <image> ?"},
        {"from": "gpt", "value": "same"},
        {"from": "human", "value": "sure?"},
    ]
    row = sample(only_row(tmp_path, item(image=["1.png"] * 2, conversations=turns)))
    assert [turn.role for turn in row.turns] == ["system", "user", "assistant", "user"]
    assert row.turns[1].parts == (
        TextPart("left"),
        ImagePart(0),
        TextPart("right"),
        ImagePart(1),
        TextPart("?"),
    )
    turns[1]["value"] = "no marker"
    row = sample(only_row(tmp_path, item(image=["1.png"] * 2, conversations=turns)))
    assert row.turns[1].parts == (ImagePart(0), ImagePart(1), TextPart("no marker"))


def test_answer_and_question_text_may_be_missing(tmp_path: Path) -> None:
    row = sample(only_row(tmp_path, item(conversations=[{"from": "human", "value": "<image>"}])))
    assert (row.prompt, row.answer, len(row.images)) == ("", "", 1)


def test_ids_depend_on_content_only(tmp_path: Path, picture: bytes) -> None:
    (tmp_path / "copy.png").write_bytes(picture)
    (tmp_path / "other.png").write_bytes(picture + b"\0")
    path = lines(
        tmp_path / "x.jsonl",
        item(id=1),
        item(id=1),  # a duplicate id is no problem, nor is a number
        item(id="b", image="copy.png"),
        item(image="other.png"),
        item(conversations=[{"from": "human", "value": "<image>\nhi"}]),
    )
    ids = [sample(row).sample_id for row in open_dataset(path).rows()]
    assert len(set(ids[:3])) == 1, "place, id and file name do not enter"
    assert len(set(ids)) == 3, "other image bytes or other words give another id"


def test_an_outside_image_folder_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = lines(
        tmp_path / "lists/x.jsonl", item(image="1.png"), item(image=str(tmp_path / "1.png"))
    )
    assert all(isinstance(row, SkippedRow) for row in open_dataset(path).rows())
    assert all(isinstance(row, Sample) for row in open_dataset(path, images=tmp_path).rows())


def test_limits_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", item())
    small = ImageLimits(max_pixels=3)
    dataset = open_dataset(path, limits=small)
    assert dataset.fingerprint() != open_dataset(path).fingerprint()
    assert isinstance(next(dataset.rows()), SkippedRow)


def test_reading_does_not_import_torch_or_datasets() -> None:
    code = (
        "import sys, gazeguard.data.read, gazeguard.data.tables\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_examples_in_the_docs_are_read(tmp_path: Path, picture: bytes) -> None:
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    for name in ("img/1.png", "img/2.png", "img/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    examples = {}
    for format in ("llava", "chat", "openai"):
        section = text.split(f"\n## {format}\n")[1].split("\n## ")[0]
        blocks = [block.split("```")[0] for block in section.split("```json\n")[1:]]
        path = tmp_path / f"{format}.txt"
        path.write_text(blocks[0].replace("iVBORw0...", base64.b64encode(picture).decode()))
        dataset = open_dataset(path)
        assert dataset.format == format
        assert all(isinstance(row, Sample) for row in dataset.rows())
        examples[format] = (dataset, blocks)
    dataset, blocks = examples["llava"]
    assert dataset.write([1], tmp_path / "kept").read_text() == blocks[1]
    first, second = (sample(row) for row in examples["chat"][0].rows())
    assert first.sample_id == second.sample_id, "the docs say that both lines mean the same"


def test_the_shapes_in_the_docs_are_what_happens() -> None:
    """The right value of every shape stands in the docs, where people check it."""
    told = shapes.documented(shapes.DOCS.read_text("utf-8"))
    assert sum(map(len, told.values())) > 100
    for title, rows in shapes.lines().items():
        assert told[title] == rows, "run `python -m tests.unit.shapes` and read the difference"


def test_rows_without_an_answer_are_samples_only_where_none_is_needed(tmp_path: Path) -> None:
    record = {"images": ["1.png"], "messages": [{"role": "user", "content": "<image>hi"}], "a": "b"}
    assert sample(only_row(tmp_path, record)).answer == ""
    row = only_row(tmp_path, record, need_answer=True)
    assert isinstance(row, SkippedRow)
    assert row.kind is SkipKind.NO_ANSWER
    assert "images, messages, a" in row.reason
    mapped = only_row(tmp_path, record, need_answer=True, columns=Columns(answer="a"))
    assert sample(mapped).answer == "b"


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"bild": "1.png", "frage": "hi", "antwort": "yes"}, Columns("antwort", "frage", "bild")),
        (
            {"image": "1.png", "dialog": [{"role": "user", "content": "hi"}], "text": "yes"},
            Columns("text", "dialog"),
        ),
        (
            {
                "image": "1.png",
                "conversations": [
                    {"from": "Human", "value": "hi"},
                    {"from": "Bot", "value": "yes"},
                ],
            },
            Columns(roles=(("Human", "user"), ("Bot", "assistant"))),
        ),
        (
            {"image": "1.png", "question": "no", "frage": "hi", "answer": "yes"},
            Columns(None, "frage"),
        ),
    ],
)
@pytest.mark.parametrize("container", ["lines", "parquet", "imagefolder"])
def test_columns_and_roles_that_the_user_names(
    tmp_path: Path, record: dict[str, Any], columns: Columns, container: str
) -> None:
    if container == "lines":
        path = lines(tmp_path / "x.jsonl", record)
    elif container == "parquet":
        path = tmp_path / "x.parquet"
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        named = {"file_name" if key == "image" else key: value for key, value in record.items()}
        path = lines(tmp_path / "metadata.jsonl", named)
    dataset = open_dataset(path, columns=columns, need_answer=True)
    row = sample(next(dataset.rows()))
    assert (row.prompt, row.answer, len(row.images)) == ("hi", "yes", 1)


def test_columns_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", item(more="well"))
    mapped = open_dataset(path, columns=Columns(answer="more"))
    assert sample(next(mapped.rows())).answer == "well", "it takes the place of the turn's answer"
    assert mapped.fingerprint() != open_dataset(path).fingerprint()


def test_a_column_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", item())
    for columns, option in (
        (Columns(answer="foo"), "--answer"),
        (Columns(prompt="foo"), "--prompt"),
        (Columns(image="foo"), "--image"),
    ):
        with pytest.raises(DataError, match=f"no column 'foo' for {option}; it has id, image"):
            open_dataset(path, columns=columns)


def test_one_wrong_image_folder_is_one_trouble(tmp_path: Path) -> None:
    rows = [item(image=f"pictures/{i}.png") for i in range(250)]
    path = lines(tmp_path / "x.jsonl", *rows)
    with pytest.raises(DataError, match=r"none of 12\d pictures .* with --images\.$"):
        open_dataset(path)
    (tmp_path / "deep/pictures").mkdir(parents=True)
    (tmp_path / "1.png").rename(tmp_path / "deep/pictures/0.png")
    with pytest.raises(DataError, match=r"with --images, perhaps .*/deep\.$"):
        open_dataset(path, images=tmp_path / "deep/pictures")
    (tmp_path / "deep/pictures/0.png").rename(tmp_path / "1.png")
    # A single picture that is there, anywhere, and others are simply missing.
    (tmp_path / "pictures").mkdir()
    (tmp_path / "1.png").rename(tmp_path / "pictures/249.png")
    dataset = open_dataset(path)
    assert dataset.survey().skipped == {SkipKind.NO_IMAGE_FILE: 249}
    kinds = {row.kind for row in dataset.rows() if isinstance(row, SkippedRow)}
    assert kinds == {SkipKind.NO_IMAGE_FILE}
    far = lines(tmp_path / "y.jsonl", *(item(image=f"https://a.b/{i}.png") for i in range(20)))
    with pytest.raises(DataError, match="web addresses, and nothing is fetched; download"):
        open_dataset(far)


def test_splits_of_a_folder_are_read_one_at_a_time(tmp_path: Path) -> None:
    row = {"image": "1.png", "question": "hi", "answer": "yes"}
    names = ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/mine-00000-of-00001"]
    for i, name in enumerate([*names, "data/validation", "extra"]):
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([row | {"id": i}])
        pq.write_table(table, tmp_path / "hub" / f"{name}.parquet")
    with pytest.raises(DataError, match="name one: .*hub/extra or .*hub/mine or .*hub/train or"):
        open_dataset(tmp_path / "hub")
    dataset = open_dataset(tmp_path / "hub/train", images=tmp_path)
    assert dataset.count() == 2
    kept = dataset.write([1], tmp_path / "out/kept")
    assert [p.name for p in sorted(kept.rglob("*.parquet"))] == [
        f"{n[5:]}.parquet" for n in names[:2]
    ]
    with pytest.raises(UsageError, match="another --out"):
        dataset.write([1], tmp_path / "hub/out/kept")
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "hub/nothing")


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        ('{"v": 1, "data": [\n%s,\n %s\n, %s ], "n": 2}\n', ".json"),
        ("%s\n\n%s %s", ".jsonl"),
    ],
)
def test_objects_and_wrapped_lists_are_written_back_byte_by_byte(
    tmp_path: Path, content: str, suffix: str
) -> None:
    rows = [json.dumps(item(id=i), indent=1) for i in range(3)]
    path = tmp_path / "x.data"
    path.write_text(content % tuple(rows))
    dataset = open_dataset(path)
    assert all(isinstance(row, Sample) for row in dataset.rows())
    written = dataset.write(range(3), tmp_path / "out/kept")
    assert written.suffix == suffix
    assert written.read_bytes() == path.read_bytes()
    again = open_dataset(dataset.write([0, 2], tmp_path / "out/kept"), images=tmp_path)
    assert again.count() == 2
    empty = dataset.write([], tmp_path / "out/removed").read_text()
    assert json.loads(empty or "{}").get("data", []) == []


def test_the_survey_counts_what_the_rows_are(tmp_path: Path) -> None:
    text = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    path = lines(
        tmp_path / "x.jsonl",
        item(),
        item(id=...),
        item(image=..., conversations=text),
        item(image="no.png"),
        item(conversations=text[:1]),
        [1],
    )
    dataset = open_dataset(path, need_answer=True)
    survey = dataset.survey()
    found = list(dataset.rows())
    assert (survey.rows, survey.with_pictures, survey.pictures, survey.turns) == (6, 2, 2, 4)
    assert survey.text_only == sum(isinstance(row, TextOnlyRow) for row in found) == 1
    assert survey.skipped == Counter(row.kind for row in found if isinstance(row, SkippedRow))
    assert survey.ignored == {"id": 4}
    assert not survey.is_enough
    assert survey.sentence() == (
        "6 rows: 2 with 2 pictures and 4 turns, 1 of text alone, 3 that cannot be used (picture"
        " not found 1, no answer 1, row cannot be read 1). Columns that are not read: id."
    )
