"""Shapes of rows and files that people have: each is built here, opened, and said in one line.

The tables in `docs/formats.md` are these lines. `python -m tests.unit.shapes` writes them anew.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gazeguard.data.read import open_dataset
from gazeguard.errors import DataError
from gazeguard.types import Sample, SkippedRow

DOCS = Path(__file__).parents[2] / "docs/formats.md"
Q, A = "What is it?", "A cat."


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(out, "PNG")
    return out.getvalue()


RED, BLUE = png("red"), png("blue")
B64 = base64.b64encode(RED + bytes(400)).decode()  # what follows the picture does no harm


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


ASK = [human(f"<image>\n{Q}"), gpt(A)]
PARTS = [{"type": "image"}, {"type": "text", "text": Q}]


def llava(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"image": "1.png", "conversations": list(turns) or ASK} | more


ROWS: dict[str, dict[str, Any]] = {
    "`conversations` of `from` and `value`": llava(),
    "turns with `text` instead of `value`": llava(
        human(f"<image>\n{Q}"), {"from": "gpt", "text": A}
    ),
    "turns with `content` instead of `value`": llava(
        human(f"<image>\n{Q}"), {"from": "gpt", "content": A}
    ),
    "`conversations` as JSON text": llava(conversations=json.dumps(ASK)),
    "an answer under an unknown key of its turn": llava(
        human(f"<image>\n{Q}"), {"from": "gpt", "said": A}
    ),
    "a question under an unknown key of its turn": llava({"from": "human", "said": Q}, gpt(A)),
    "turns without a role": llava({"who": "human", "value": Q}),
    "several turns": llava(human(f"<image>\n{Q}"), gpt(A), human("Sure?"), gpt("Yes.")),
    "no `image` key": {"conversations": [human("Say hi."), gpt("Hi.")]},
    "`image` null": llava(human("Say hi."), gpt("Hi."), image=None),
    "`image` an empty text": llava(human("Say hi."), gpt("Hi."), image=""),
    "`images` an empty list": {"images": [], "conversations": [human("Say hi."), gpt("Hi.")]},
    "no marker": llava(human(Q), gpt(A)),
    "more markers than images": llava(human(f"<image>\n{Q}"), gpt(A), human("<image>"), gpt(A)),
    "fewer markers than images": llava(image=["1.png", "2.png"]),
    "a marker and no image": llava(image=None),
    "numbered markers": llava(human(f"<image1> <image2> {Q}"), gpt(A), image=["1.png", "2.png"]),
    "`<image_1>`": llava(human(f"<image_1> {Q}"), gpt(A)),
    "`<img>PATH</img>` in the text": {"conversations": [human(f"<img>1.png</img> {Q}"), gpt(A)]},
    "a model's own picture token (that model refuses the row)": llava(
        human(f"<|vision_start|><|image_pad|>{Q}"), gpt(A)
    ),
    "a video": {"video": "v.mp4", "conversations": [human(f"<video>\n{Q}"), gpt(A)]},
    "an image and a video": llava(video="v.mp4"),
    "an empty `images` beside `image`": llava(images=[]),
    "a picture under another key": {"img": "1.png", "conversations": [human(Q), gpt(A)]},
    "an answer first": llava(gpt("Hello."), human(f"<image>\n{Q}"), gpt(A)),
    "an answer alone": llava(gpt(A)),
    "a system turn": llava({"from": "system", "value": "Be brief."}, *ASK),
    "a `system` column": llava(system="Be brief."),
    "an empty answer": llava(human(f"<image>\n{Q}"), gpt("")),
    "no answer": llava(human(f"<image>\n{Q}")),
    "a last turn of the user's": llava(*ASK, human("Thanks.")),
    "tool roles": llava(human(f"<image>\n{Q}"), {"from": "observation", "value": "x"}, gpt(A)),
    "role names of their own": llava({"from": "Human", "value": f"<image>\n{Q}"}, gpt(A)),
    "a picture as the answer": llava(human(f"<image>\n{Q}"), gpt("<image>"), image=["1.png"] * 2),
    "no words in the question": llava(human("<image>"), gpt(A)),
    "empty `conversations`": llava(conversations=[]),
    "no `conversations`": {"id": 7, "image": "1.png"},
    "an object as an answer": llava(human(f"<image>\n{Q}"), gpt({"a": 1})),
    "pairs of `human` and `assistant`": {
        "images": ["1.png"],
        "conversation": [{"human": Q, "assistant": A}],
    },
    "`conversations` with `chosen` and `rejected`": llava(
        human(f"<image>\n{Q}"), chosen=gpt(A), rejected=gpt("A dog.")
    ),
    "an absolute path": llava(image="/1.png"),
    "`./` before the path": llava(image="./1.png"),
    "a missing file": llava(image="none.png"),
    "a web address": llava(image="https://example.org/a.png"),
    "a data URL": llava(image=f"data:image/png;base64,{B64}"),
    "base64 alone": llava(image=B64),
    "`bytes` in base64": llava(image={"bytes": B64, "path": None}),
    "a folder as an image": llava(image="."),
    "`messages` of text": {"images": ["1.png"], "messages": [user(f"<image>{Q}"), assistant(A)]},
    "`messages` of parts": {"images": ["1.png"], "messages": [user(PARTS), assistant(A)]},
    "`messages` with `image_url` parts": {
        "messages": [
            user([{"type": "image_url", "image_url": {"url": "1.png"}}, PARTS[1]]),
            assistant([{"type": "text", "text": A}]),
        ]
    },
    "`messages` with a video part": {
        "images": ["1.png"],
        "messages": [user([{"type": "video", "video": "v.mp4"}, *PARTS]), assistant(A)],
    },
    "`messages` with `solution` (GRPO)": {
        "images": ["1.png"],
        "messages": [user(f"<image>{Q}")],
        "solution": A,
    },
    "`messages` with `rejected_response` (DPO)": {
        "images": ["1.png"],
        "messages": [user(f"<image>{Q}"), assistant(A)],
        "rejected_response": "A dog.",
    },
    "`prompt`, `completion`": {"image": "1.png", "prompt": Q, "completion": A},
    "`prompt`, `completion`, `label` (KTO)": {
        "image": "1.png",
        "prompt": [user(PARTS)],
        "completion": [assistant(A)],
        "label": True,
    },
    "`prompt`, `chosen`, `rejected` (DPO)": {
        "images": ["1.png"],
        "prompt": [user(PARTS)],
        "chosen": [assistant(A)],
        "rejected": [assistant("A dog.")],
    },
    "`prompt`, `chosen`, `rejected` as text": {
        "images": ["1.png"],
        "prompt": Q,
        "chosen": A,
        "rejected": "A dog.",
    },
    "`chosen`, `rejected` with the prompt inside": {
        "images": ["1.png"],
        "chosen": [user(PARTS), assistant(A)],
        "rejected": [user(PARTS), assistant("A dog.")],
    },
    "`prompt`, `solution` (GRPO)": {"image": "1.png", "prompt": [user(PARTS)], "solution": A},
    "`prompt`, `answer` (GRPO)": {"image": "1.png", "prompt": Q, "answer": A},
    "`query`, `response` (ms-swift)": {"images": ["1.png"], "query": f"<image>{Q}", "response": A},
    "`query`, `response`, `history`, `system`": {
        "images": ["1.png"],
        "query": "Sure?",
        "response": "Yes.",
        "history": [[Q, A]],
        "system": "Be brief.",
    },
    "`instruction`, `input`, `output` (alpaca)": {
        "images": ["1.png"],
        "instruction": "Answer the question.",
        "input": Q,
        "output": A,
    },
    "`problem`, `solution`": {"image": "1.png", "problem": Q, "solution": A},
    "`question`, `answers` of several people (VQA)": {
        "image": "1.png",
        "question": Q,
        "answers": [{"answer": A, "answer_confidence": "yes", "answer_id": 1}, {"answer": "cat"}],
    },
    "`question`, `multiple_choice_answer`, `answers`": {
        "image": "1.png",
        "question": Q,
        "multiple_choice_answer": A,
        "answers": [{"answer": "cat"}],
    },
    "`question`, `answers` with places (SQuAD)": {
        "image": "1.png",
        "question": Q,
        "answers": {"text": [A], "answer_start": [0]},
    },
    "`question`, `label` of words": {"image": "1.png", "question": Q, "label": A},
    "`question`, `label` a class index": {"image": "1.png", "question": Q, "label": 3},
    "`text` (a caption)": {"image": "1.png", "text": A},
    "a picture by its number in another set": {"image_id": 42, "question": Q, "answer": A},
    "other columns": {"image": "1.png", "frage": Q, "antwort": A},
}

BASE = [llava(id=i) for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in BASE)
FILES: dict[str, tuple[str, bytes]] = {
    "byte order mark and CRLF": (
        "x.json",
        b"\xef\xbb\xbf" + json.dumps(BASE, indent=1).replace("\n", "\r\n").encode(),
    ),
    "JSON lines": ("x.jsonl", LINES.encode()),
    "UTF-16": ("x.json", json.dumps(BASE).encode("utf-16")),
    "one line in Latin-1": (
        "x.jsonl",
        json.dumps(llava(id="é"), ensure_ascii=False).encode("latin1"),
    ),
    "an object around the list": ("x.json", json.dumps({"version": 1, "data": BASE}).encode()),
    "an object around two lists": ("x.json", json.dumps({"train": BASE, "test": BASE}).encode()),
    "pretty-printed objects": (
        "x.jsonl",
        "\n".join(json.dumps(r, indent=2) for r in BASE).encode(),
    ),
    "objects without line breaks": ("x.jsonl", "".join(map(json.dumps, BASE)).encode()),
    "a comma after the last item": ("x.json", (json.dumps(BASE)[:-1] + ",]").encode()),
    "a file cut short": ("x.json", json.dumps(BASE).encode()[:-30]),
    "comments": ("x.json", b"[\n// mine\n" + json.dumps(BASE)[1:].encode()),
    "a comment first": ("x.json", b"// mine\n" + json.dumps(BASE).encode()),
    "Python's quotes": ("x.jsonl", "".join(f"{row}\n" for row in BASE).encode()),
    "a broken first row": ("x.json", ('[{"id": 1, "image": },' + json.dumps(BASE)[1:]).encode()),
    "`query` and `response` in JSON lines": (
        "x.jsonl",
        json.dumps(ROWS["`query`, `response` (ms-swift)"]).encode(),
    ),
    "alpaca in a JSON list": (
        "x.json",
        json.dumps([ROWS["`instruction`, `input`, `output` (alpaca)"]]).encode(),
    ),
    "captions in JSON lines": ("x.jsonl", json.dumps(ROWS["`text` (a caption)"]).encode()),
    "`dataset_info.json`": ("dataset_info.json", b'{"mine": {"file_name": "x.json"}}'),
    "an index of annotations": ("meta.json", b'{"mine": {"root": "a/", "annotation": "x.jsonl"}}'),
    "an empty list": ("x.json", b"[]"),
    "an empty file": ("x.json", b""),
    "gzip": ("x.json.gz", gzip.compress(json.dumps(BASE).encode())),
    "CSV": ("x.csv", f"image,question,answer\n1.png,{Q},{A}\n".encode()),
    "TSV with base64": ("x.tsv", f"index\timage\tquestion\tanswer\n0\t{B64}\t{Q}\t{A}\n".encode()),
    "CSV with other columns": ("x.csv", b"bild,frage\n1.png,Was?\n"),
    "CSV without a picture": ("x.csv", b"id,question\n1,why\n"),
    "YAML": ("x.yaml", b"- a: 1\n"),
    "HTML": ("x.json", b"<!doctype html>"),
    "plain words": ("x.txt", b"hello\n"),
    "objects of other kinds": ("x.json", b'[{"a": 1}, {"b": 2}]'),
}

PICTURE = {"bytes": RED, "path": "1.png"}
TABLES: dict[str, dict[str, Any]] = {
    "`image`, `question`, `answer`": {"image": PICTURE, "question": Q, "answer": A},
    "alpaca with `input`": {
        "images": [PICTURE],
        "instruction": "Answer the question.",
        "input": Q,
        "output": A,
    },
    "a `system` column": {"image": PICTURE, "system": "Be brief.", "question": Q, "answer": A},
    "`history`": {"images": [PICTURE], "query": "Sure?", "response": "Yes.", "history": [[Q, A]]},
    "TRL parts with null": {
        "images": [PICTURE],
        "messages": [
            user([{"type": "image", "text": None}, {"type": "text", "text": Q}]),
            assistant([{"type": "text", "text": A}]),
        ],
    },
    "pictures inside parts": {
        "messages": [
            user([{"type": "image", "image": PICTURE}, {"type": "text", "text": Q}]),
            assistant([{"type": "text", "text": A}]),
        ]
    },
    "`texts` pairs (the Cauldron)": {
        "images": [PICTURE],
        "texts": [{"user": Q, "assistant": A, "source": "s"}],
    },
    "`answers` in a list": {"image": PICTURE, "question": Q, "answers": [A, "cat"]},
    "`label` of words": {"image": PICTURE, "question": Q, "label": A},
    "`label` a class index": {"image": PICTURE, "question": Q, "label": 1},
    "`caption`": {"image": PICTURE, "caption": A},
    "`text`": {"image": PICTURE, "text": A},
    "`problem`, `solution`": {"image": PICTURE, "problem": Q, "solution": A},
    "`question`, `chosen`, `rejected`": {
        "image": PICTURE,
        "question": Q,
        "chosen": A,
        "rejected": "A dog.",
    },
    "`multiple_choice_answer`": {"image": PICTURE, "question": Q, "multiple_choice_answer": A},
    "plain bytes": {"image": RED, "question": Q, "answer": A},
    "`image_0`, `image_1`": {"image_0": PICTURE, "image_1": PICTURE, "question": Q, "answer": A},
    "a mask beside the image": {"image": PICTURE, "mask": PICTURE, "question": Q, "answer": A},
    "paths": {"image": "1.png", "question": Q, "answer": A},
    "`conversations` as JSON text": {"image": PICTURE, "conversations": json.dumps(ASK)},
    "a marker in the question": {"image": PICTURE, "question": f"<image>\n{Q}", "answer": A},
    "a null picture": {"image": None, "question": "Say hi.", "answer": "Hi."},
    "a video": {"image": PICTURE, "video": "v.mp4", "question": Q, "answer": A},
    "no known picture column": {"bild": "1.png", "question": Q, "answer": A},
    "no known text column": {"image": PICTURE, "frage": Q, "antwort": A},
}


def _table(columns: dict[str, Any]) -> pa.Table:
    table = pa.table({name: [value] for name, value in columns.items()})
    if columns.get("image", "") is None:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = table.set_column(0, "image", pa.array([None], kind))
    return table


def _dictionary_encoded(place: Path) -> Path:
    table = _table(TABLES["`image`, `question`, `answer`"])
    encoded = table.column("question").dictionary_encode()
    pq.write_table(table.set_column(1, "question", encoded), place / "x.parquet")
    return place / "x.parquet"


def _large_strings(place: Path) -> Path:
    table = _table(TABLES["`image`, `question`, `answer`"])
    large = table.column("question").cast(pa.large_string())
    pq.write_table(table.set_column(1, "question", large), place / "x.parquet")
    return place / "x.parquet"


def _hub(place: Path) -> Path:
    (place / "hub/data").mkdir(parents=True)
    table = _table(TABLES["`image`, `question`, `answer`"])
    for split in ("train", "test"):
        pq.write_table(table, place / f"hub/data/{split}-00000-of-00001.parquet")
    return place / "hub"


def _split_of_hub(place: Path) -> Path:
    return _hub(place) / "train"


BUILT: dict[str, Callable[[Path], Path]] = {
    "dictionary-encoded text": _dictionary_encoded,
    "large strings": _large_strings,
    "a hub folder with splits": _hub,
    "one split of it: `hub/train`": _split_of_hub,
}
GREY = np.arange(16, dtype=np.uint16).reshape(4, 4) * 17
PICTURES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "16-bit PNG": ("x.png", lambda p: Image.fromarray((GREY * 257).astype("u2")).save(p)),
    "12 bits in a 16-bit PNG": (
        "x.png",
        lambda p: Image.fromarray((GREY * 16).astype("u2")).save(p),
    ),
    "16-bit TIFF": ("x.tif", lambda p: Image.fromarray((GREY * 257).astype("u2")).save(p)),
    "float TIFF, 0 to 1": ("x.tif", lambda p: Image.fromarray((GREY / 255).astype("f4")).save(p)),
    "float TIFF with NaN": (
        "x.tif",
        lambda p: Image.fromarray((GREY * np.nan).astype("f4")).save(p),
    ),
    "an empty file": ("x.png", lambda p: p.write_bytes(b"")),
    "a picture cut short": ("x.png", lambda p: p.write_bytes(RED[:50])),
    "a web page": ("x.jpg", lambda p: p.write_bytes(b"<!doctype html><html>404")),
    "SVG": ("x.svg", lambda p: p.write_bytes(b'<svg width="9" height="9"/>')),
    "a Git LFS pointer": (
        "x.png",
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/1"),
    ),
    "a bomb": ("x.png", lambda p: Image.new("1", (20_000, 20_000)).save(p)),
}


def lines() -> dict[str, list[str]]:
    """The rows of each table in the docs."""
    tables: dict[str, list[str]] = {}
    for title, cases in (("rows", ROWS), ("files", FILES), ("parquet", TABLES | BUILT)):
        tables[title] = [f"| {name} | {said(name, case)} |" for name, case in cases.items()]
    tables["pictures"] = [f"| {name} | {_seen(*case)} |" for name, case in PICTURES.items()]
    return tables


def said(name: str, case: Any) -> str:
    """What comes of one shape."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "1.png").write_bytes(RED)
        (place / "2.png").write_bytes(BLUE)
        if callable(case):
            path = case(place)
        elif isinstance(case, tuple):
            path = place / case[0]
            path.write_bytes(case[1])
        elif name in TABLES and TABLES[name] is case:
            path = place / "x.parquet"
            pq.write_table(_table(case), path)
        else:
            path = place / "x.jsonl"
            path.write_text(json.dumps(case) + "\n")
        told = _outcome(path).replace(f"{place.resolve()}/", "")
        return told.replace("|", "\\|").replace("<", "&lt;")


def _outcome(path: Path) -> str:
    try:
        dataset = open_dataset(path, need_answer=True)
    except DataError as error:
        return f"refused: {error}"
    reading = next(dataset.readings())
    found = reading.found
    if isinstance(found, SkippedRow):
        return f"skipped ({found.kind}): {found.reason}"
    if not isinstance(found, Sample):
        return "text alone: kept, not judged"
    turns = "; ".join(f"{t.role}: {t.text}".replace("\n", " / ").strip() for t in found.turns)
    many = "s" if len(found.images) > 1 else ""
    text = f"read: {turns} ({len(found.images)} picture{many})"
    return text + f", not read: {', '.join(reading.ignored)}" if reading.ignored else text


def _seen(name: str, save: Callable[[Path], object]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save(place / name)
        (place / "x.jsonl").write_text(json.dumps(llava(image=name)))
        found = next(open_dataset(place / "x.jsonl").rows())
        if isinstance(found, SkippedRow):
            return f"skipped ({found.kind}): {found.reason}"
        assert isinstance(found, Sample)
        values = np.asarray(found.images[0])
        return f"read: values {values.min()} to {values.max()}"


def documented(text: str) -> dict[str, list[str]]:
    """The same rows as the docs have them."""
    found = re.findall(r"<!-- (\w+) -->\n\|.*\n\|.*\n((?:\|.*\n)*)", text)
    return {title: rows.splitlines() for title, rows in found}


def main() -> None:
    """Write the tables into the docs."""
    text = DOCS.read_text("utf-8")
    for title, rows in lines().items():
        head = f"<!-- {title} -->\n| Shape | What happens |\n|---|---|\n"
        new = head + "".join(f"{row}\n" for row in rows)
        text, count = re.subn(rf"<!-- {title} -->\n(?:\|.*\n)*", lambda _, new=new: new, text)
        assert count == 1, f"docs/formats.md has no <!-- {title} -->"
    DOCS.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
