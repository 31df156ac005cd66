"""Prompts: what a file may look like, and the built-in ones."""

from __future__ import annotations

import pytest

from gazeguard.data.prompts import built_in, read_prompts
from gazeguard.errors import DataError


def test_built_in_prompts_are_many_distinct_and_repeatable():
    many = built_in(4000)
    assert len(set(many)) == 4000
    assert many == built_in(4000)
    assert built_in(10) == many[:10]
    assert set(built_in(100, seed=1)) != set(many[:100])
    words = {word for prompt in many for word in prompt.replace(",", "").split()}
    assert len(words) > 300
    for prompt in many:
        assert prompt == " ".join(prompt.split())
        assert " a a" not in prompt, prompt
        assert "{" not in prompt, prompt


def test_more_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr("gazeguard.data.grammar._PATTERNS", ("{number}",))
    assert len(built_in(6)) == 6
    with pytest.raises(ValueError, match="only 6"):
        built_in(7)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\ufeffa cat\n\n  two   dogs \na cat\n"),
        ("a.jsonl", '"a cat"\n{"caption": "two dogs"}\n\n{"text": "a cat"}\n'),
        ("a.json", '["a cat", {"prompt": "two dogs"}]'),
    ],
)
def test_every_form_gives_distinct_prompts_in_order(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    assert read_prompts(file) == ["a cat", "two dogs"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.txt", b"a\x00b", "not a text file"),
        ("a.txt", b"\xff\xfe\x80", "not a text file"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b'{"a": 1}', "no prompt"),
        ("a.jsonl", b'"a"\n{', "line 2"),
        ("a.jsonl", b'{"image": "x"}', "item 0"),
    ],
)
def test_what_is_no_prompt_file(tmp_path, name, content, says):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_prompts(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="check the path"):
        read_prompts(tmp_path / "absent.txt")
