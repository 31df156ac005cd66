"""What is printed where there is no terminal."""

from __future__ import annotations

import io

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from gazeguard.cli._terminal import NORMAL, print_summary, row_progress


def test_a_piped_summary_is_not_wrapped(capsys):
    table = Table.grid(padding=(0, 2))
    path = "/a/long/path" * 20
    table.add_row("Files", Text(path))
    table.add_row("", Text("short"))
    sentence = "a sentence of many words " * 20
    print_summary(Group(Text(sentence.strip()), table))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [sentence.strip(), f"Files  {path}", "       short"]


def test_progress_from_the_start_measured_nothing_before():
    out = io.StringIO()
    with row_progress(Console(file=out), NORMAL, "Answering") as progress:
        progress(0, 20)
        progress(8, 20)
        progress(20, 20)
    lines = out.getvalue().splitlines()
    assert lines[0] == "Answering 20 rows."
    assert lines[1].startswith("20 of 20 rows")
