"""The command itself, in a process of its own: start, signals, exit codes, mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner

from gazeguard.assets import ADAPTER, BASE
from gazeguard.cli import serve as command
from gazeguard.cli.main import run
from tests.server.conftest import until

ASK = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 200}


def start(guard_folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """A server as its user starts it, and its address."""
    model = [str(BASE), "--adapter", str(ADAPTER), "--dtype", "float32"]
    arguments = ["serve", *model, "--guard", str(guard_folder), "--port", "0", *options]
    code = "from gazeguard.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    line = process.stderr.readline()
    found = re.match(r"Serving base under its guard at (http://127\.0\.0\.1:\d+)/v1", line)
    if not found:
        process.kill()
        raise AssertionError(line + process.stderr.read())
    return process, found[1]


def ready(url: str) -> bool:
    return requests.get(f"{url}/health", timeout=5).status_code == 200


def test_sigterm_finishes_what_runs_and_exits_0(guard_folder):
    process, url = start(guard_folder)
    try:
        until(lambda: ready(url), 60)
        with requests.post(
            f"{url}/v1/chat/completions",
            json=ASK | {"stream": True, "temperature": 2},
            stream=True,
            timeout=60,
        ) as response:
            lines = response.iter_lines(chunk_size=1)
            first = json.loads(next(lines).removeprefix(b"data: "))
            assert first["gazeguard"]["applicable"] is False
            process.send_signal(signal.SIGTERM)
            until(lambda: refuses(url))
            assert process.poll() is None, "it still writes"
            rest = [line for line in lines if line]
            assert rest[-1] == b"data: [DONE]"
            assert len(rest) > 5
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def refuses(url: str) -> bool:
    try:
        return requests.post(f"{url}/v1/chat/completions", json=ASK, timeout=5).status_code == 503
    except requests.ConnectionError:
        return True


def test_a_second_signal_does_not_wait(guard_folder):
    process, url = start(guard_folder, "--max-tokens", "900")
    try:
        until(lambda: ready(url), 60)
        with requests.post(
            f"{url}/v1/chat/completions",
            json=ASK | {"stream": True, "temperature": 2, "max_tokens": 900},
            stream=True,
            timeout=60,
        ) as response:
            next(response.iter_lines(chunk_size=1))
            process.send_signal(signal.SIGINT)
            until(lambda: refuses(url))
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
    finally:
        process.kill()


def test_a_missing_extra_is_one_sentence_with_the_cure(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run(["serve", str(BASE), "--guard", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "pip install 'gazeguard[server]'" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--allow-remote-images", "ftp://x"), "is not a host"),
        (("--api-key-file", "none.txt"), "No such file"),
        (("--max-batch", "0"), "--max-batch"),
        (("--timeout", "0"), "--timeout"),
        (("--host", "203.0.113.1"), "cannot be listened at"),
        ((), "there is no guard in"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, options, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["serve", str(BASE), "--guard", str(tmp_path), "--port", "0", *options]
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def test_open_to_others_without_a_key_is_warned_about(tmp_path, capsys, monkeypatch):
    def serve(load, settings, host, port, listening):
        listening("http://0.0.0.0:1")
        return False

    monkeypatch.setattr("gazeguard.server.run.serve", serve)
    keys = tmp_path / "keys"
    keys.write_text("secret")
    open_ = ["serve", str(BASE), "--guard", "g", "--host", "0.0.0.0"]
    assert run(open_) == 0
    assert "Warning: anybody who reaches" in capsys.readouterr().err
    assert run([*open_, "--api-key-file", str(keys)]) == 0
    assert "Warning" not in capsys.readouterr().err
    assert run(open_[:-2]) == 0
    assert "Warning" not in capsys.readouterr().err


def test_every_option_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text("utf-8")
    for option in command.serve.params:
        name = option.opts[0]
        if name.startswith("--") and option.name not in ("device", "dtype", "revision", "adapter"):
            assert f"`{name}`" in page or name == "--trust-remote-code", name


def test_help_needs_no_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    shown = CliRunner().invoke(command.serve, ["--help"])
    assert shown.exit_code == 0
    assert os.linesep in shown.output
