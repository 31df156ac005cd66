"""The command line without a model: help, start time, options, doctor, errors."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from gazeguard import versions
from gazeguard._version import __version__
from gazeguard.cli import _errors, doctor
from gazeguard.cli import main as entry
from gazeguard.cli._terminal import _plain
from gazeguard.cli.main import VERBS, cli, run
from gazeguard.data.survey import MAX_SKIPPED
from gazeguard.errors import DataError, MeasurementError, MissingExtra
from gazeguard.types import Outcome

HEAVY = ("torch", "transformers", "numpy", "pyarrow", "sklearn", "rich")


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["clean", "--help"], None])
def test_help_and_import_are_quick_and_light(args: list[str] | None) -> None:
    """In a process of its own: which modules are there is a property of the whole process."""
    use = "import gazeguard" if args is None else f"from gazeguard.cli.main import run; run({args})"
    heavy = HEAVY[:2] if args is None else HEAVY
    code = f"{use}; import sys; print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    seconds = []
    for _ in range(3):  # the best of three: the first one may have to compile, others may be late
        began = time.perf_counter()
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.strip() == "[]", f"imported on the way: {ended.stderr}"
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.5, f"took {min(seconds):.2f} s"


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "gazeguard", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == f"gazeguard {__version__}\n"
    command[-1:] = ["clean", "nothing"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("Usage: gazeguard clean"), "the name that users type"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"gazeguard {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_command_with_help(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    assert command.help, f"{verb} has no help text"


def test_every_option_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto_envvar_prefix` reaches the verbs: a bad value from the environment is noticed."""
    monkeypatch.setenv("GAZEGUARD_CLEAN_BATCH_SIZE", "none")
    assert run(["clean", "model", "data", "--out", "out"]) == 2


@pytest.mark.parametrize(
    "args",
    [
        ["paint"],
        ["clean"],
        ["clean", "model", "data"],
        ["clean", "model", "data", "--out", "o", "--batch-size", "0"],
        ["clean", "model", "data", "--out", "o", "--rule", "magic"],
        ["clean", "model", "data", "--out", "o", "--fail-on", "flagged,sometimes"],
        ["clean", "model", "data", "--out", "o", "--json", "-q"],
    ],
)
def test_usage_errors_exit_2_and_touch_nothing(
    args: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(args) == 2
    printed = capsys.readouterr()
    assert "Error" in printed.err
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("The data\nis bad: mend it."), 2, "The data is bad: mend it."),
        (MeasurementError("All is NaN: use float32."), 3, "All is NaN"),
        (MissingExtra("ray", "ray", "Scaling out"), 2, "gazeguard[ray]"),
        (OSError(errno.ENOSPC, "", "/x/y"), 2, "free some space"),
        (OSError(errno.EROFS, "", "/x/y"), 2, "/x/y"),
        (PermissionError(errno.EACCES, "", "/x/y"), 2, "check its rights"),
        (OSError("the storage went away"), 2, "the storage went away"),
    ],
)
def test_errors_become_one_sentence(
    error: Exception,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(entry.cli, "main", fail)
    assert run([]) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert words in printed
    assert printed.endswith(".\n")
    monkeypatch.setenv("GAZEGUARD_DEBUG", "1")
    with pytest.raises(type(error)):
        run([])


def test_a_reader_that_leaves_is_no_flagged_run() -> None:
    """In a process of its own: click takes stdout out of use."""
    code = "import sys; from gazeguard.cli.main import main; sys.argv[1:] = ['--help']; main()"
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.close()
    _, said = writer.communicate()
    assert writer.returncode == 2
    assert said.startswith("Error: Broken pipe: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("outcome", "fail_on", "code"),
    [
        (Outcome.CLEAN, {"flagged", "inconclusive"}, 0),
        (Outcome.FLAGGED, {"flagged", "inconclusive"}, 1),
        (Outcome.INCONCLUSIVE, {"flagged", "inconclusive"}, 3),
        (Outcome.FLAGGED, {"inconclusive"}, 0),
        (Outcome.INCONCLUSIVE, {"flagged"}, 0),
        (Outcome.FLAGGED, set(), 0),
    ],
)
def test_outcome_codes(outcome: Outcome, fail_on: set[str], code: int) -> None:
    assert _errors.outcome_code(outcome, frozenset(fail_on)) == code


def test_the_documented_exit_codes_are_the_real_ones() -> None:
    page = Path(__file__).parents[2] / "docs" / "exit-codes.md"
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page.read_text(), re.M)}
    assert documented == {
        _errors.CLEAN,
        _errors.FLAGGED,
        _errors.USAGE,
        _errors.INCONCLUSIVE,
        _errors.INTERRUPTED,
    }


def test_doctor_finds_this_environment_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["ready"]
    checks = {check["name"]: check for check in content["checks"]}
    assert {"python", "torch", "transformers", "device cpu", "attention sdpa"} <= set(checks)
    assert run(["doctor"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("Ready.")


def lines_of_metadata(monkeypatch: pytest.MonkeyPatch, *lines: str, **highest: str) -> None:
    monkeypatch.setattr(versions, "requires", lambda _: lines)
    monkeypatch.setattr(versions, "_highest", lambda: highest)


def test_doctor_names_what_is_missing_and_the_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines_of_metadata(
        monkeypatch, "torch>=999", "no-such-package>=1", 'also-absent>=2; extra == "server"'
    )
    assert run(["doctor"]) == 2
    shown = capsys.readouterr().out
    assert "older than the tested 999" in shown
    assert "pip install --upgrade 'torch>=999'" in shown
    assert "pip install 'no-such-package>=1'" in shown
    assert "pip install 'gazeguard[server]'" in shown
    assert "Not ready" in shown


def test_doctor_tells_a_version_that_is_newer_than_the_tests_ran_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {name: version(name) for name in ("click", "numpy")}
    lines_of_metadata(
        monkeypatch, "click<9,>=1.0", "numpy>=1", click="2.0", numpy=here["numpy"].split("+")[0]
    )
    assert run(["doctor"]) == 0, "newer is no reason to stop"
    shown = capsys.readouterr().out
    assert f"newer    {here['click']}, newer than the tested 1.0 to 2.0" in shown.replace(
        "  ", "  "
    )
    assert f"{here['numpy']}, tested" in shown
    assert "every guard checks itself" in shown.splitlines()[-1]


def test_doctor_survives_a_broken_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "import_module", broken)
    (check,) = (c for c in doctor.examine() if c.name == "torchvision")
    assert check.state == "broken"
    assert "torchvision" in check.cure


def test_plain_progress_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    from rich.console import Console

    clock = iter([0.0, 0.0, 5.0, 30.0, 60.0])
    monkeypatch.setattr("gazeguard.cli._terminal.time.monotonic", lambda: next(clock))
    out = StringIO()
    update = _plain(Console(file=out))
    for done in (100, 110, 160, 220):
        update(done, 220)
    assert out.getvalue().splitlines() == [
        "Measuring 120 rows; 100 were measured before.",
        "160 of 220 rows, 2.0 rows/s, 0:30 left",  # the 100 of the run before are no speed
        "220 of 220 rows, 2.0 rows/s",
    ]


def test_help_names_the_share_of_unread_rows_that_is_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["clean", "--help"]) == 0
    told = capsys.readouterr().out
    assert f"[{MAX_SKIPPED:g}]" in told[told.index("--max-skipped") : told.index("--resume")]
