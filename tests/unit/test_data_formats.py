"""Every format: the same five rows go in, come out as the same samples, and are written back."""

from __future__ import annotations

import base64
import csv
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gazeguard.data.dataset import Dataset
from gazeguard.data.read import open_dataset
from gazeguard.errors import UsageError
from gazeguard.types import ImagePart, Sample, TextPart

ROWS = 5
QUESTIONS = ["What colour is it?", "Où est-ce ?", "数えて", 'Say "hi",\nplease', "Last one"]
ANSWERS = ["red", "là", "三", '"hi"', "done"]


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(out, "PNG")
    return out.getvalue()


PICTURES = [png((40 * i, 255 - 40 * i, 7)) for i in range(ROWS)]


def save_pictures(folder: Path) -> list[str]:
    names = [f"sub/a {i}.png" for i in range(ROWS)]
    for name, data in zip(names, PICTURES, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return names


def llava(folder: Path) -> Path:
    items = [
        {
            "id": i,
            "image": name,
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTIONS[i]}"},
                {"from": "gpt", "value": ANSWERS[i]},
            ],
        }
        for i, name in enumerate(save_pictures(folder))
    ]
    path = folder / "train.json"
    path.write_text(json.dumps(items, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def chat(folder: Path) -> Path:
    lines = [
        json.dumps(
            {
                "images": [name],
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[i]}],
                    },
                    {"role": "assistant", "content": ANSWERS[i]},
                ],
            }
        )
        for i, name in enumerate(save_pictures(folder))
    ]
    path = folder / "train.jsonl"
    path.write_bytes("\r\n".join(lines).encode())  # CRLF, and no final line break
    return path


def prompt_completion(folder: Path) -> Path:
    lines = [
        json.dumps({"images": [name], "prompt": QUESTIONS[i], "completion": ANSWERS[i]}) + "\n"
        for i, name in enumerate(save_pictures(folder))
    ]
    path = folder / "train.jsonl"
    path.write_text("".join(lines))
    return path


def openai(folder: Path) -> Path:
    urls = ["data:image/png;base64," + base64.b64encode(data).decode() for data in PICTURES]
    names = save_pictures(folder)
    urls[1] = names[1]
    urls[2] = (folder / names[2]).as_uri()
    lines = [
        json.dumps(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": urls[i]}},
                            {"type": "text", "text": QUESTIONS[i]},
                        ],
                    },
                    {"role": "assistant", "content": ANSWERS[i]},
                ]
            }
        )
        + "\n"
        for i in range(ROWS)
    ]
    path = folder / "train.jsonl"
    path.write_text("".join(lines))
    return path


def table() -> pa.Table:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table(
        {
            "id": pa.array(range(ROWS), pa.int32()),
            "image": pa.array([{"bytes": p, "path": "x.png"} for p in PICTURES], image),
            "question": QUESTIONS,
            "answer": ANSWERS,
            "score": [0.5, None, float("inf"), 1.0, 2.0],
        }
    ).replace_schema_metadata({"owner": "somebody"})


def parquet(folder: Path) -> Path:
    path = folder / "train.parquet"
    pq.write_table(table(), path, row_group_size=2, compression="zstd")
    return path


def parquet_folder(folder: Path) -> Path:
    (folder / "set/data").mkdir(parents=True)
    pq.write_table(table()[:2], folder / "set/data/train-0.parquet")
    pq.write_table(table()[2:], folder / "set/data/train-1.parquet")
    return folder / "set"


def saved_to_disk(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        }
    )
    rows = [
        {
            "image": {"bytes": PICTURES[i], "path": None},
            "messages": [
                {"role": "user", "content": f"<image>{QUESTIONS[i]}"},
                {"role": "assistant", "content": ANSWERS[i]},
            ],
        }
        for i in range(ROWS)
    ]
    path = folder / "saved"
    datasets.Dataset.from_list(rows, features=features).save_to_disk(path, num_shards=2)
    return path


def imagefolder(folder: Path) -> Path:
    root = folder / "pictures"
    lines = [
        json.dumps({"file_name": name, "question": QUESTIONS[i], "answer": ANSWERS[i]}) + "\n"
        for i, name in enumerate(save_pictures(root))
    ]
    (root / "metadata.jsonl").write_text("".join(lines))
    return root


def imagefolder_csv(folder: Path) -> Path:
    root = folder / "pictures"
    names = save_pictures(root)
    with (root / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["file_name", "question", "answer"])
        writer.writerows(zip(names, QUESTIONS, ANSWERS, strict=True))
    return root


BUILDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "llava": (llava, "llava"),
    "chat": (chat, "chat"),
    "prompt_completion": (prompt_completion, "chat"),
    "openai": (openai, "openai"),
    "parquet": (parquet, "parquet"),
    "parquet_folder": (parquet_folder, "parquet"),
    "saved_to_disk": (saved_to_disk, "parquet"),
    "imagefolder": (imagefolder, "imagefolder"),
    "imagefolder_csv": (imagefolder_csv, "imagefolder"),
}
KEPT = {
    "llava": "kept.json",
    "chat": "kept.jsonl",
    "prompt_completion": "kept.jsonl",
    "openai": "kept.jsonl",
    "parquet": "kept.parquet",
}


@pytest.fixture(params=BUILDERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dataset(kind: str, tmp_path: Path) -> Dataset:
    source = tmp_path / "in"
    source.mkdir()
    return open_dataset(BUILDERS[kind][0](source))


def samples(dataset: Dataset) -> list[Sample]:
    rows = list(dataset.rows())
    assert all(isinstance(row, Sample) for row in rows), rows
    return [row for row in rows if isinstance(row, Sample)]


def test_rows_hold_the_same_content_in_every_format(
    kind: str, dataset: Dataset, tmp_path: Path
) -> None:
    assert dataset.format == BUILDERS[kind][1]
    assert dataset.count() == ROWS
    read = samples(dataset)
    assert [s.row for s in read] == list(range(ROWS))
    for i, sample in enumerate(read):
        assert sample.turns[0].parts == (ImagePart(0), TextPart(QUESTIONS[i]))
        assert (sample.prompt, sample.answer) == (QUESTIONS[i], ANSWERS[i])
        (image,) = sample.images
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (40 * i, 255 - 40 * i, 7)
    other = tmp_path / "other"
    other.mkdir()
    reference = [s.sample_id for s in samples(open_dataset(llava(other)))]
    assert [s.sample_id for s in read] == reference, "an id depends on the content, not the format"


def test_rows_that_are_not_wanted_are_passed_over(dataset: Dataset) -> None:
    everything = {s.row: s.sample_id for s in samples(dataset)}
    some = list(dataset.rows(lambda row: row in (1, 4)))
    assert [s.row for s in some] == [1, 4]
    assert [s.sample_id for s in some] == [everything[1], everything[4]]
    assert list(dataset.rows(lambda row: False)) == []


@pytest.mark.parametrize("chosen", [[3, 1], [0], [4], [0, 1, 2, 3, 4], [0, 2, 4]])
def test_written_rows_are_the_chosen_ones(
    kind: str, dataset: Dataset, tmp_path: Path, chosen: list[int]
) -> None:
    ids = [s.sample_id for s in samples(dataset)]
    written = dataset.write(chosen, tmp_path / "out/kept")
    assert written.name == KEPT.get(kind, "kept")
    again = open_dataset(written, images=tmp_path / "in" if written.is_file() else None)
    assert again.format == dataset.format
    assert [s.sample_id for s in samples(again)] == [ids[row] for row in sorted(chosen)]
    assert [p.name for p in (tmp_path / "out").iterdir()] == [written.name], "a file is left over"


def test_writing_again_replaces_the_old_result(dataset: Dataset, tmp_path: Path) -> None:
    dataset.write([0, 1, 2], tmp_path / "kept")
    assert open_dataset(dataset.write([4], tmp_path / "kept")).count() == 1


def test_nothing_chosen_gives_a_valid_empty_file(
    kind: str, dataset: Dataset, tmp_path: Path
) -> None:
    written = dataset.write([], tmp_path / "out/removed")
    if kind == "llava":
        assert json.loads(written.read_bytes()) == []
    elif written.suffix == ".jsonl":
        assert written.read_bytes() == b""
    elif written.suffix == ".parquet":
        assert pq.read_table(written).num_rows == 0
    elif kind == "imagefolder_csv":
        assert (written / "metadata.csv").read_text("utf-8-sig") == "file_name,question,answer\n"
    else:
        assert written.is_dir()


def test_all_rows_give_text_files_back_bit_by_bit(
    kind: str, dataset: Dataset, tmp_path: Path
) -> None:
    written = dataset.write(range(ROWS), tmp_path / "out/kept")
    if dataset.format in ("llava", "chat", "openai"):
        assert written.read_bytes() == dataset.path.read_bytes()
    for name in ("metadata.jsonl", "metadata.csv"):
        if (dataset.path / name).exists():
            assert (written / name).read_bytes() == (dataset.path / name).read_bytes()


def test_the_input_cannot_be_overwritten(kind: str, dataset: Dataset, tmp_path: Path) -> None:
    before = open_dataset(dataset.path).fingerprint()
    stem = dataset.path.with_suffix("") if dataset.path.is_file() else dataset.path
    with pytest.raises(UsageError, match="another --out"):
        dataset.write([0], stem)
    if dataset.path.is_dir():
        with pytest.raises(UsageError, match="another --out"):
            dataset.write([0], dataset.path / "out/kept")
    assert open_dataset(dataset.path).fingerprint() == before, "the input was touched"


def test_rows_out_of_range_are_a_bug_of_the_caller(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        dataset.write([ROWS], tmp_path / "kept")


def test_fingerprint_follows_data_and_images(kind: str, dataset: Dataset, tmp_path: Path) -> None:
    first = dataset.fingerprint()
    assert open_dataset(dataset.path).fingerprint() == first
    picture = next((tmp_path / "in").rglob("a 1.png"), None)
    if picture is not None:
        os.utime(picture, ns=(1, 1))
        second = open_dataset(dataset.path).fingerprint()
        assert second != first, "a touched image must be noticed"
        picture.unlink()
        third = open_dataset(dataset.path).fingerprint()
        assert third != second, "a missing image must be noticed"


def test_parquet_keeps_schema_metadata_values_and_compression(tmp_path: Path) -> None:
    source = open_dataset(parquet(tmp_path))
    written = source.write([1, 2, 4], tmp_path / "out/kept")
    before, after = pq.read_table(source.path), pq.read_table(written)
    assert after.schema.equals(before.schema, check_metadata=True)
    assert after.equals(before.take([1, 2, 4]))
    assert pq.ParquetFile(written).metadata.row_group(0).column(0).compression == "ZSTD"


def test_parquet_folder_keeps_its_file_names(tmp_path: Path) -> None:
    source = open_dataset(parquet_folder(tmp_path))
    written = source.write([0], tmp_path / "kept")
    rows = [pq.read_table(p).num_rows for p in sorted(written.rglob("*.parquet"))]
    assert rows == [1, 0]


def test_saved_folder_loads_with_datasets_under_a_new_fingerprint(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    source = open_dataset(saved_to_disk(tmp_path))
    before = datasets.load_from_disk(source.path)
    for chosen in ([1, 4], [4], []):
        after = datasets.load_from_disk(source.write(chosen, tmp_path / "kept"))
        assert after.features == before.features
        assert [r["messages"] for r in after] == [before[i]["messages"] for i in chosen]
        assert after._fingerprint != before._fingerprint, "datasets would reuse cached results"


def test_image_folder_links_only_the_chosen_images(tmp_path: Path) -> None:
    source = open_dataset(imagefolder(tmp_path))
    written = source.write([0, 3], tmp_path / "kept")
    files = sorted(p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file())
    assert files == ["metadata.jsonl", "sub/a 0.png", "sub/a 3.png"]
    assert (written / "sub/a 3.png").read_bytes() == PICTURES[3]


def test_image_folder_is_safe_from_its_own_metadata(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    names = ["metadata.jsonl", "../outside.png", "/etc/hostname", "data:image/png;base64,AA"]
    (tmp_path / "outside.png").write_bytes(PICTURES[0])
    text = "".join(json.dumps({"file_name": n, "text": "x"}) + "\n" for n in names)
    (root / "metadata.jsonl").write_text(text)
    source = open_dataset(root)
    assert not any(isinstance(row, Sample) for row in source.rows())
    written = source.write(range(4), tmp_path / "kept")
    assert [p.name for p in written.rglob("*")] == ["metadata.jsonl"]
    assert (root / "metadata.jsonl").read_text() == text, "the input was overwritten"
    assert (written / "metadata.jsonl").stat().st_nlink == 1


def test_a_full_disk_is_one_sentence_and_leaves_the_old_result(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = dataset.write([0, 1], tmp_path / "out/kept")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match="No space left on device.*make room"):
            dataset.write([2], tmp_path / "out/kept")
    assert open_dataset(written, images=tmp_path / "in").count() == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == [written.name], "a file is left over"


def test_an_unusable_output_folder_is_one_sentence(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match="could not be written"):
        dataset.write([0], tmp_path / "file/kept")


@pytest.mark.parametrize("threads", [0, 2])
def test_a_range_is_all_that_is_asked_about(dataset: Dataset, threads: int) -> None:
    asked: list[int] = []

    def odd(row: int) -> bool:
        asked.append(row)
        return row % 2 == 1

    whole = {sample.row: sample.sample_id for sample in samples(dataset)}
    found = {row.row: row.sample_id for row in dataset.rows(odd, range(1, 4), threads)}
    assert found == {1: whole[1], 3: whole[3]}
    assert {*asked} == {1, 2, 3}
    assert [row.row for row in dataset.rows(within=range(3, 99), threads=threads)] == [3, 4]
    assert list(dataset.rows(within=range(2, 2))) == []
