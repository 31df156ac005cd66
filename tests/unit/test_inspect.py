"""`gazeguard inspect`: what a person is told about a set before a model runs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gazeguard.cli.main import run


def picture(path: Path, colour: str) -> str:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(out, "PNG")
    path.write_bytes(out.getvalue())
    return path.name


def row(image: str | None, question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns} | more


@pytest.fixture
def data(tmp_path: Path) -> Path:
    red, blue = picture(tmp_path / "red.png", "red"), picture(tmp_path / "blue.png", "blue")
    rows = [
        row(red, "What?", "A cat."),
        row(red, "What?", "A dog.", source="x"),
        row(blue, "What?", "A cat."),
        row(red, "Why?", "Because."),
        row(None, "Say hi.", "Hi."),
        row("no.png", "What?", "A cat."),
        {"image": red, "question": "What?", "antwort": "A cat."},
        row("other.png", "What?\nNow.", "A cat."),
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


def test_json_holds_every_count(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(data), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "mixed"
    assert not found["usable"]
    assert (found["rows"], found["with_pictures"], found["text_only"]) == (8, 4, 1)
    assert (found["pictures"], found["turns"]) == (4, 8)
    assert found["skipped"] == {
        "picture not found": {
            "rows": 2,
            "reasons": [{"rows": 2, "first_row": 5, "first": "image not found: no.png"}],
        },
        "no answer": {
            "rows": 1,
            "reasons": [
                {
                    "rows": 1,
                    "first_row": 6,
                    "first": "no answer in this row (keys: image, question, antwort); name its"
                    " column with --answer",
                }
            ],
        },
    }
    assert found["ignored_columns"] == {"source": 1, "antwort": 1}
    assert [(s["keys"], s["rows"]) for s in found["shapes"]] == [
        (["image", "conversations"], 6),
        (["image", "conversations", "source"], 1),
        (["image", "question", "antwort"], 1),
    ]
    assert found["shapes"][0]["example"] == {
        "row": 0,
        "prompt": "What?",
        "turns": ["user", "assistant"],
        "answer": "A cat.",
        "pictures": ["6 x 4"],
    }
    assert found["shapes"][2]["example"] is None
    assert found["repeated_answers"] == {"rows": 1, "most": [{"answer": "A cat.", "rows": 2}]}
    assert found["same_picture"] == {
        "rows": 2,
        "same_question_other_answer": 1,
        "first": [[0, 1]],
    }


def test_text_names_what_is_skipped_and_fits_a_terminal(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(data)]) == 3
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 96
    out = " ".join(out.split())
    assert "8 rows: 4 with 4 pictures and 8 turns, 1 of text alone, 3 that cannot be used" in out
    assert "row 5 (and 1 more): image not found: no.png" in out
    assert "not read source (1 row)" in out
    assert "2 x A cat." in out
    assert "same question and another answer: 1 row (such as 0 and 1)" in out
    assert out.endswith("above 1%, `clean` does not call a set clean.")


def test_columns_that_are_named_and_a_limit_end_well(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(data), "--limit", "4"]) == 0
    assert "4 rows: 4 with 4 pictures" in " ".join(capsys.readouterr().out.split())
    rows = [json.loads(data.read_text())[6]] * 2
    rows[1] = rows[1] | {"question": [{"role": "Mensch", "content": "What?"}]}
    data.write_text(json.dumps(rows))
    named = ["--answer", "antwort", "--prompt", "question", "--role", "human=Mensch"]
    assert run(["inspect", str(data), *named]) == 0
    assert "2 rows: 2 with 2 pictures and 4 turns" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "verb",
    [["clean", "model", "DATA", "--out", "OUT"], ["calibrate", "model", "DATA", "--out", "OUT"]]
    + [["guard", "model", "--guard", "OUT", "--data", "DATA"]],
)
def test_other_verbs_take_the_same_columns(
    data: Path, tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"DATA": str(data), "OUT": str(tmp_path / "out")}
    args = [known.get(word, word) for word in verb]
    for option in ("--prompt", "--image"):
        assert run([*args, option, "foo", "--role", "human=Mensch"]) == 2
        assert f"no column 'foo' for {option}; it has image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.json"], "does not exist"),
        (["data.json", "--answer", "foo"], "no column 'foo' for --answer; it has image"),
        (["data.json", "--role", "boss=Human"], "'boss=Human' is not ROLE=NAME"),
        (["data.json", "--format", "xml"], "no format 'xml'"),
    ],
)
def test_mistakes_are_one_sentence(
    data: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(data.parent / arguments[0]), *arguments[1:]]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_a_set_of_text_alone_judges_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(json.dumps([row(None, "Say hi.", "Hi.")]))
    assert run(["inspect", str(tmp_path / "x.json")]) == 3
    assert "No row has a picture and an answer" in capsys.readouterr().out


def test_no_model_library_is_loaded(data: Path) -> None:
    code = (
        "import sys\n"
        "from gazeguard.cli.main import run\n"
        f"assert run(['inspect', {str(data)!r}, '--json']) == 3\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
