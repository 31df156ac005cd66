"""Open a data set of any supported format; which one is found by looking inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gazeguard.data.conversation import Draft, parse_chat, parse_llava
from gazeguard.data.dataset import Dataset
from gazeguard.data.images import ImageLimits, ImageRoot
from gazeguard.data.spans import Spans, index_csv, index_lines, index_list
from gazeguard.data.text import METADATA, ImageFolder, RowText, TextDataset
from gazeguard.errors import DataError, UsageError

FORMATS = ("llava", "chat", "openai", "parquet", "imagefolder")
SUPPORTED = (
    "llava (JSON list with conversations), chat (JSONL with messages and images), "
    "openai (JSONL with image_url parts), parquet (file, folder, or datasets save_to_disk folder), "
    "imagefolder (folder with metadata.jsonl or metadata.csv)"
)
_SNIFFED = 64  # rows looked at: the first ones may be broken
_PARSERS: Mapping[str, Callable[[Mapping[str, Any]], Draft]] = {
    "llava": parse_llava,
    "chat": parse_chat,
    "openai": parse_chat,
}
_FOREIGN = {
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"ARROW1": "a single Arrow file; name the datasets folder that holds it",
}


def open_dataset(
    path: Path,
    *,
    images: Path | None = None,
    format: str = "auto",
    limits: ImageLimits | None = None,
    need_answer: bool = False,
) -> Dataset:
    """Open a fine-tuning set for reading and writing back; no row is decoded yet.

    Args:
        path: a data file, or the folder of an image folder, Parquet or `datasets` set.
        images: the folder that image paths are relative to, and must stay in. By default the
            folder itself, or the one the data file lies in.
        format: one of `FORMATS`, or `auto` to look inside.
        limits: what one row's images may cost.
        need_answer: rows without an answer are skipped; without this they are samples too.

    Raises:
        UsageError: no such format name.
        DataError: missing, empty, unknown, ambiguous or broken as a whole.
    """
    path = Path(path)
    if format not in ("auto", *FORMATS):
        raise UsageError(f"no format '{format}'; choose auto or one of: {', '.join(FORMATS)}.")
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path of the data set.")
    if images is not None and not Path(images).is_dir():
        raise DataError(f"the image folder {images} does not exist; check --images.")
    if path.name in METADATA:
        path = path.parent
    folder = Path(images) if images is not None else path if path.is_dir() else path.parent
    root = ImageRoot(folder, limits or ImageLimits())
    try:
        opened = _open_folder if path.is_dir() else _open
        dataset = opened(path, root, format, need_answer)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its rights.") from error
    if dataset.count() == 0:
        raise DataError(f"{path} holds no rows; give a data set with at least one.")
    return dataset


def _open(path: Path, root: ImageRoot, format: str, need_answer: bool) -> Dataset:
    if not path.is_file():  # a pipe or device can be read only once
        raise DataError(f"{path} is not a regular file; save the data set to a file first.")
    with path.open("rb") as handle:
        head = handle.read(4096)
    if not head:
        raise DataError(f"{path} is empty; give a data set with at least one row.")
    if head.startswith(b"PAR1"):
        _check_format(path, format, ("parquet",))
        return _open_tables(path, root, [path], need_answer)
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}.")
    if b"\0" in head:
        raise _unknown(path, "is a binary file of no known kind")
    _check_format(path, format, ("llava", "chat", "openai"))
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    spans = index_list(path) if text.startswith(b"[") else index_lines(path)
    if format == "auto" and len(spans):
        format = _sniff_rows(path, spans, root.limits)
    return TextDataset(path, format, _PARSERS.get(format, parse_chat), root, spans, need_answer)


def _open_folder(path: Path, root: ImageRoot, format: str, need_answer: bool) -> Dataset:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in path.glob("*/state.json"))
        raise DataError(f"{path} holds several splits; name one of: {', '.join(splits)}.")
    metadata = [path / name for name in METADATA if (path / name).is_file()]
    state = path / "state.json"
    # Subfolders are only searched when nothing is found here: they may hold a million images.
    pattern = "*.parquet" if metadata or state.is_file() else "**/*.parquet"
    parquet = sorted(p for p in path.glob(pattern) if not _is_hidden(p.relative_to(path)))
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
        return ImageFolder(path, root, index(metadata[0]), need_answer)
    return _open_tables(path, root, parquet, need_answer, state if state.is_file() else None)


def _open_tables(
    path: Path, root: ImageRoot, files: list[Path], need_answer: bool, state: Path | None = None
) -> Dataset:
    from gazeguard.data import tables  # pyarrow is only loaded when it is needed

    if state is None:
        parquet = [tables.ParquetPart(file) for file in files]
        return tables.TableDataset(path, root, parquet, need_answer)
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        names = [Path(entry["filename"]).name for entry in content["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{state} is broken; save the set again with save_to_disk.") from None
    if content.get("_indices_data_files"):
        raise DataError(f"{path} has an index; call flatten_indices() and save it again.")
    parts = [tables.ArrowPart(path / name) for name in names]
    return tables.TableDataset(path, root, parts, need_answer)


def _sniff_rows(path: Path, spans: Spans, limits: ImageLimits) -> str:
    """Name the format of a JSON list or JSONL file by its first rows."""
    text = RowText(spans, limits.max_bytes * 4 // 3 + (16 << 20))
    kinds: set[str] = set()
    plain = False
    with path.open("rb") as handle:
        for row in range(min(len(spans), _SNIFFED)):
            record = text.record(handle, row)
            if isinstance(record, Mapping):
                kind = _kind(record)
                kinds |= kind
                plain = plain or bool(kind & {""})
    kinds.discard("")
    if len(kinds) > 1:
        raise _unknown(path, f"looks like {' and '.join(sorted(kinds))} at once", "pass --format")
    if not kinds and not plain:
        raise _unknown(path, "holds no row with conversations or messages")
    return kinds.pop() if kinds else "chat"


def _kind(record: Mapping[str, Any]) -> set[str]:
    """Return the formats a row speaks for; `""` is a conversation that fits chat and openai."""
    kinds = {"llava"} if record.get("conversations") is not None else set()
    turns = [record.get(key) for key in ("messages", "prompt", "completion")]
    if all(turn is None for turn in turns):
        return kinds
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
        kinds.add("openai")
    elif "image" in types or record.get("images") or record.get("image"):
        kinds.add("chat")
    return kinds or {""}


def _check_format(path: Path, format: str, fitting: tuple[str, ...] | list[str]) -> None:
    if format != "auto" and format not in fitting:
        options = " or ".join(fitting)
        raise DataError(f"{path} is not {format} but looks like {options}; leave --format auto.")


def _unknown(path: Path, what: str, cure: str = "convert it to one of the formats") -> DataError:
    return DataError(f"{path} {what}; {cure}. Supported: {SUPPORTED}.")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
