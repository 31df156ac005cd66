"""Open a data set of any supported format; which one is found by looking inside."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gazeguard.data.columns import READ_COLUMNS, TEXT_COLUMNS, Columns
from gazeguard.data.dataset import Dataset, ReadOptions, RecordDataset
from gazeguard.data.images import ImageLimits, ImageRoot, shorten
from gazeguard.data.spans import (
    Spans,
    index_csv,
    index_lines,
    index_list,
    index_objects,
    index_wrapped,
)
from gazeguard.data.text import METADATA, ImageFolder, RowText, TextDataset, csv_names
from gazeguard.errors import DataError, RowError, UsageError

FORMATS = ("llava", "chat", "openai", "columns", "parquet", "imagefolder")
SUPPORTED = (
    "llava (conversations), chat (messages and images), openai (image_url parts) and columns"
    " (question and answer) in JSON, JSON lines or CSV; parquet (file, folder, or datasets"
    " save_to_disk folder); imagefolder (folder with metadata.jsonl or metadata.csv)"
)
_TEXT = ("llava", "chat", "openai", "columns")
_SNIFFED = 64  # rows looked at: the first ones may be broken
_FEW = 8  # names told at once, and pictures missing before their folder is called wrong
_FOREIGN = {
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"ARROW1": "a single Arrow file; name the datasets folder that holds it",
}
# What text that is no JSON begins with, and what that means.
_NOT_JSON = (
    (re.compile(r"[\[{]\s*'"), "Python's own text for objects; write rows with json.dumps"),
    (re.compile(r"//|/\*|#"), "a comment, which JSON has not; take comments out"),
    (re.compile(r"---|- |[\w-]+:(\s|$)"), "YAML; convert it to JSON lines"),
    (re.compile(r"<"), "HTML or XML; convert it to JSON lines"),
)
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}.*")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def open_dataset(
    path: Path,
    *,
    images: Path | None = None,
    format: str = "auto",
    columns: Columns | None = None,
    limits: ImageLimits | None = None,
    need_answer: bool = False,
) -> Dataset:
    """Open a fine-tuning set for reading and writing back; no row is decoded yet.

    Args:
        path: a data file, or the folder of an image folder, Parquet or `datasets` set, or
            `FOLDER/SPLIT` for one of the splits that a folder of Parquet files holds.
        images: the folder that image paths are relative to, and must stay in. By default the
            folder itself, or the one the data file lies in.
        format: one of `FORMATS`, or `auto` to look inside.
        columns: names that replace the usual ones.
        limits: what one row's images may cost.
        need_answer: rows without an answer are skipped; without this they are samples too.

    Raises:
        UsageError: no such format name.
        DataError: missing, empty, unknown, or broken as a whole; none of its pictures is there.
    """
    path = Path(path)
    if format not in ("auto", *FORMATS):
        raise UsageError(f"no format '{format}'; choose auto or one of: {', '.join(FORMATS)}.")
    if images is not None and not Path(images).is_dir():
        raise DataError(f"the image folder {images} does not exist; check --images.")
    split = None
    if not path.exists():
        path, split = path.parent, path
        if split.name not in _splits(path):
            raise DataError(f"{split} does not exist; check the path of the data set.")
    if path.name in METADATA:
        path = path.parent
    folder = Path(images) if images is not None else path if path.is_dir() else path.parent
    root = ImageRoot(folder, limits or ImageLimits())
    options = ReadOptions(root, columns or Columns(), need_answer, format)
    dataset: RecordDataset
    try:
        if split is not None:
            dataset = _open_tables(path, options, _splits(path)[split.name])
        elif path.is_dir():
            dataset = _open_folder(path, options)
        else:
            dataset = _open(path, options)
        if dataset.count() == 0:
            raise DataError(f"{path} holds no rows; give a data set with at least one.")
        _check_pictures(dataset, root.folder)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its rights.") from error
    return dataset


def _open(path: Path, options: ReadOptions) -> RecordDataset:
    format = options.format
    if not path.is_file():  # a pipe or device can be read only once
        raise DataError(f"{path} is not a regular file; save the data set to a file first.")
    with path.open("rb") as handle:
        head = handle.read(4096)
    if not head:
        raise DataError(f"{path} is empty; give a data set with at least one row.")
    if head.startswith(b"PAR1"):
        _check_format(path, format, ("parquet",))
        return _open_tables(path, options, [path])
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}.")
    if b"\0" in head:
        raise _unknown(path, "is a binary file of no known kind")
    _check_format(path, format, _TEXT)
    start = head.decode("utf-8-sig", "replace").lstrip()
    spans = _index(path, start, options)
    if format == "auto" and len(spans):
        format = _sniff_rows(path, start, spans, options)
    return TextDataset(path, format, options, spans)


def _index(path: Path, start: str, options: ReadOptions) -> Spans:
    """Find the rows of a text file: a JSON list, objects, lines, or a table in CSV.

    Raises:
        DataError: it is JSON that is broken as a whole, or holds no list of rows.
    """
    if start.startswith("["):
        return index_list(path)
    lines = index_lines(path)
    if not start.startswith("{"):
        mapped = (options.columns.prompt, options.columns.answer)
        names = csv_names(start.partition("\n")[0])
        if len(names) > 1 and not {*TEXT_COLUMNS, *mapped}.isdisjoint(names):
            _check_csv(path, names, options.columns)
            return index_csv(path)
        return lines
    first = next(_first_records(path, lines, options.images.limits.max_row_bytes))
    if isinstance(first, Mapping):  # one object a line, the usual case
        one = len(lines) == 1 and not _is_row(first, options.columns)
        return _wrapped(path, lines, options.columns) if one else lines
    try:
        objects = index_objects(path)
        with path.open("rb") as handle:
            for begin in objects.start:
                handle.seek(int(begin))
                if handle.read(1) != b"{":
                    return lines
    except DataError:
        if len(lines) > 1:
            return lines  # a broken line is one skipped row
        raise
    return objects if len(objects) > 1 else _wrapped(path, objects, options.columns)


def _wrapped(path: Path, whole: Spans, columns: Columns) -> Spans:
    """The rows of the one list that a file's only object holds; the object itself if it is a row.

    Raises:
        DataError: it holds several lists, or is no set of rows at all.
    """
    if whole.stop[0] - whole.start[0] <= 1 << 20:
        record = next(_first_records(path, whole))
        if isinstance(record, Mapping) and _is_row(record, columns):
            return whole
        for value in record.values() if isinstance(record, Mapping) else ():
            if not isinstance(value, Mapping):
                continue
            named = value.get("file_name") or value.get("annotation")
            if isinstance(named, str):
                raise DataError(
                    f"{path} is a list of data sets and none itself; give the file that it names,"
                    f" such as {shorten(named)}."
                )
    lists = {
        name: spans
        for name, spans in index_wrapped(path).items()
        if name not in READ_COLUMNS
        and any(_is_row(r, columns) for r in _first_records(path, spans) if isinstance(r, Mapping))
    }
    if len(lists) > 1:
        raise DataError(
            f"{path} is one object with several lists ({shorten(', '.join(lists))}); save the list"
            " of rows as a file of its own."
        )
    return next(iter(lists.values()), whole)


def _is_row(record: Mapping[str, Any], columns: Columns) -> bool:
    return not {*READ_COLUMNS, columns.prompt, columns.answer}.isdisjoint(record)


def _check_csv(path: Path, names: Iterable[str], columns: Columns) -> None:
    """Check that a table in text has the columns of rows with pictures.

    Raises:
        DataError: it has not.
    """
    if missing := columns.missing(names):
        raise _no_column(path, missing, names)
    if columns.image is None and {"image", "images"}.isdisjoint(names):
        raise DataError(
            f"{path} has no image column among {shorten(', '.join(names), 200)}; name it with"
            " --image."
        )


def _no_column(path: Path, missing: tuple[str, str], names: Iterable[str]) -> DataError:
    option, column = missing
    return DataError(
        f"{path} has no column '{shorten(column)}' for {option}; it has"
        f" {shorten(', '.join(map(str, names)), 200)}."
    )


def _open_folder(path: Path, options: ReadOptions) -> RecordDataset:
    format = options.format
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in path.glob("*/state.json"))
        raise DataError(f"{path} holds several splits; name one of: {', '.join(splits)}.")
    metadata = [path / name for name in METADATA if (path / name).is_file()]
    state = path / "state.json"
    # Subfolders are only searched when nothing is found here: they may hold a million images.
    deep = not metadata and not state.is_file()
    parquet = _parquet_files(path, deep)
    found = {"imagefolder": bool(metadata), "parquet": state.is_file() or bool(parquet)}
    kinds = [name for name, there in found.items() if there and format in ("auto", name)]
    if not kinds:
        if any(found.values()):
            _check_format(path, format, [name for name, there in found.items() if there])
        files = [p.name for p in sorted(path.iterdir()) if p.suffix in (".json", ".jsonl")][:5]
        inner = sorted(str(p.parent) for name in METADATA for p in path.glob(f"*/{name}"))[:5]
        hint = f"; perhaps you mean {' or '.join(files + inner)}" if files or inner else ""
        raise _unknown(path, f"is a folder without metadata.jsonl or Parquet files{hint}")
    if len(kinds) > 1 or len(metadata) > 1 or (state.is_file() and parquet):
        raise _unknown(path, "holds more than one kind of data set", "pass --format or one file")
    if kinds == ["imagefolder"]:
        index = index_csv if metadata[0].suffix == ".csv" else index_lines
        return ImageFolder(path, options, index(metadata[0]))
    splits = sorted(_splits(path)) if deep else []
    if len(splits) > 1:
        named = " or ".join(str(path / split) for split in splits[:_FEW])
        more = f" or one of {len(splits) - _FEW} more" if len(splits) > _FEW else ""
        raise DataError(f"{path} holds several splits; name one: {named}{more}.")
    return _open_tables(path, options, parquet, state if state.is_file() else None)


def _parquet_files(path: Path, deep: bool = True) -> list[Path]:
    files = path.glob("**/*.parquet" if deep else "*.parquet")
    return sorted(p for p in files if not _is_hidden(p.relative_to(path)))


def _splits(path: Path) -> dict[str, list[Path]]:
    """Parquet files below a folder by the split that their names say, as the hub's loader does.

    Without such a name, all files are one set.
    """
    if not path.is_dir():
        return {}
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for file in _parquet_files(path):
        found[_split_of(file.relative_to(path))].append(file)
    if "" in found and len(found) > 1:
        for file in found.pop(""):
            found[file.stem].append(file)
    return {} if "" in found else dict(found)


def _split_of(file: Path) -> str:
    words = re.split(r"[^a-z]+", str(file).lower())
    for split, names in _SPLITS.items():
        if not set(names).isdisjoint(words):
            return split
    shard = _SHARD.fullmatch(file.stem)
    return shard.group(1) if shard else ""


def _open_tables(
    path: Path, options: ReadOptions, files: list[Path], state: Path | None = None
) -> RecordDataset:
    from gazeguard.data import tables  # pyarrow is only loaded when it is needed

    if state is None:
        return tables.TableDataset(path, options, [tables.ParquetPart(file) for file in files])
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        names = [Path(entry["filename"]).name for entry in content["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{state} is broken; save the set again with save_to_disk.") from None
    if content.get("_indices_data_files"):
        raise DataError(f"{path} has an index; call flatten_indices() and save it again.")
    return tables.TableDataset(path, options, [tables.ArrowPart(path / name) for name in names])


def _check_pictures(dataset: RecordDataset, folder: Path) -> None:
    """Tell a wrong image folder from pictures that are missing here and there.

    Raises:
        DataError: no picture of the rows looked at, from the whole set, is there.
    """
    total = dataset.count()
    missing, there = dataset.absent_images([range(min(total, _SNIFFED))])
    if there or not missing:
        return
    spread = np.unique(np.linspace(0, total - 1, 2 * _SNIFFED, dtype=np.int64)).tolist()
    missing, there = dataset.absent_images(range(row, row + 1) for row in spread)
    if there or len(missing) < _FEW:
        return
    name, why = next(iter(missing.items()))
    if all("web address" in why for why in missing.values()):
        raise DataError(
            f"pictures of {dataset.path} are web addresses, and nothing is fetched; download them"
            f" and name the files ({why})."
        )
    near = {folder.parent, dataset.path.resolve().parent, Path.cwd()} - {folder.resolve()}
    found = next((place for place in sorted(near) if (place / name).is_file()), None)
    raise DataError(
        f"none of {len(missing)} pictures looked at, from all parts of {dataset.path}, is in"
        f" {folder} ({why}); give the folder that its paths start from with --images"
        f"{f', perhaps {found}' if found else ''}."
    )


def _sniff_rows(path: Path, start: str, spans: Spans, options: ReadOptions) -> str:
    """Name the format of the rows in a text file by its first ones.

    Raises:
        DataError: none of them can be read; says what they hold instead.
    """
    kinds: set[str] = set()
    keys: dict[str, None] = {}
    broken = ""
    for record in _first_records(path, spans, options.images.limits.max_row_bytes):
        if isinstance(record, RowError):
            broken = broken or str(record)
            continue
        keys |= dict.fromkeys(map(str, record))
        kinds |= _kind(record, options.columns)
    if keys and (missing := options.columns.missing(keys)):
        raise _no_column(path, missing, keys)
    if not kinds:
        raise _no_rows(path, start, list(keys), broken)
    kinds.discard("" if len(kinds) > 1 else "-")
    return "mixed" if len(kinds) > 1 else kinds.pop() or "chat"


def _first_records(
    path: Path, spans: Spans, max_bytes: int = 1 << 20
) -> Iterator[Mapping[str, Any] | RowError]:
    text = RowText(spans, max_bytes)
    with path.open("rb") as handle:
        for row in range(min(len(spans), _SNIFFED)):
            yield text.record(handle, row)


def _no_rows(path: Path, start: str, keys: list[str], broken: str) -> DataError:
    """What a text file holds that cannot be read, in one sentence with its cure."""
    if keys:
        return DataError(
            f"{path} has rows with the keys {shorten(', '.join(keys), 120)}, and no conversation,"
            " question or answer among them; name yours with --prompt, --answer and --image."
        )
    first = shorten(start.partition("\n")[0].strip(), 40)
    for begins, what in _NOT_JSON:
        if begins.match(start):
            return DataError(f"{path} begins with {first!r}: that looks like {what}.")
    names = csv_names(start.partition("\n")[0])
    if not start.startswith(("{", "[")) and len(names) > 1:
        return DataError(
            f"{path} looks like CSV with the columns {shorten(', '.join(names), 120)}; name yours"
            " with --prompt, --answer and --image."
        )
    return DataError(f"{path} has no row that can be read ({broken}); repair or convert the file.")


def _kind(record: Mapping[str, Any], columns: Columns) -> set[str]:
    """Return the format a row speaks for; `""` is a conversation that fits chat and openai."""
    if columns.prompt is not None or columns.answer is not None:
        return {"columns"}
    if record.get("conversations") is not None or record.get("conversation") is not None:
        return {"llava"}
    turns = [record.get(key) for key in ("messages", "prompt", "completion")]
    if all(turn is None for turn in turns):
        return set() if set(TEXT_COLUMNS).isdisjoint(record) else {"columns"}
    parts = [
        part
        for turn in turns
        if isinstance(turn, list)
        for message in turn
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, Mapping)
    ]
    types = {part["type"] for part in parts if isinstance(part.get("type"), str)}
    if "image_url" in types:
        return {"openai"}
    return {"chat"} if "image" in types or record.get("images") or record.get("image") else {""}


def _check_format(path: Path, format: str, fitting: tuple[str, ...] | list[str]) -> None:
    if format != "auto" and format not in fitting:
        options = " or ".join(fitting)
        raise DataError(f"{path} is not {format} but looks like {options}; leave --format auto.")


def _unknown(path: Path, what: str, cure: str = "convert it to one of the formats") -> DataError:
    return DataError(f"{path} {what}; {cure}. Supported: {SUPPORTED}.")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
