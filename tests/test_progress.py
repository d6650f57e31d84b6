"""What is seen of how far something is."""

from __future__ import annotations

import io
import sys
import time

import pytest

from lowmem_npo import progress
from lowmem_npo.progress import Progress


@pytest.fixture
def minutes(monkeypatch):
    """A function that lets seconds pass; none pass by themselves."""
    now = [1000.0]
    monkeypatch.setattr(Progress, "printed", 1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_log_file_has_a_line_a_minute(minutes, capsys):
    with Progress(total=40, description="before, forget: likelihood", unit="row") as bar:
        for _ in range(40):
            minutes(10)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "before, forget: likelihood, row 6 of 40: ETA 05:40"
    assert len(lines) == 6 and lines[-1] == "before, forget: likelihood, row 36 of 40: ETA 00:40"


def test_the_minute_is_that_of_all_parts(minutes, capsys):
    """Parts of less than a minute each are no silence of an hour."""
    for part in range(8):
        with Progress(2, f"part {part}", "row") as bar:
            for _ in range(2):
                minutes(20)
                bar.update()
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        *("part 1", "part 2", "part 4", "part 5", "part 7")
    ]


def test_a_slow_step_has_its_line_and_a_resumed_run_counts_its_own_steps(minutes, capsys):
    with Progress(100, "unlearning", "step", initial=50) as bar:
        bar.set_postfix_str("loss 1.2")
        minutes(90)
        bar.update(5)
        bar.print_line()  # there has been one of this step
    assert capsys.readouterr().err == "unlearning, step 55 of 100: loss 1.2, ETA 13:30\n"


def test_none_is_printed_of_what_is_not_wanted(minutes, capsys):
    with Progress(2, "rows", "row", wanted=False) as bar:
        minutes(300)
        bar.update()
        bar.print_line()
    assert capsys.readouterr().err == ""


def test_the_other_processes_of_torchrun_print_none(minutes, monkeypatch, capsys):
    """A cluster may number processes that have nothing to do with each other: these have no number on their machine."""
    for rank, local, lines in (("1", "1", 0), ("1", "0", 0), ("0", "0", 1), ("1", None, 1)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local) if local else monkeypatch.delenv("LOCAL_RANK")
        minutes(300)
        with Progress(2, "rows", "row") as bar:
            bar.update()
        assert capsys.readouterr().err.count("rows, row 1 of 2") == lines


def test_what_is_soon_done_shows_nothing_and_what_is_not_does(minutes, capsys):
    minutes(300)
    with Progress(2, "tokenising", "row", delay=2) as bar:
        for _ in range(2):
            minutes(0.5)
            bar.update()
    assert capsys.readouterr().err == ""
    with Progress(2, "tokenising", "row", delay=2) as bar:
        minutes(2)
        bar.update()
    assert capsys.readouterr().err == "tokenising, row 1 of 2: ETA 00:02\n"


def test_a_line_that_cannot_be_written_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True))
    with Progress(2, "rows", "row") as bar:
        bar.print_line()
    with pytest.raises(OSError, match="No space left on device"):
        print("a line", file=sys.stderr, flush=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(progress, "SECONDS", 0)
    with Progress(3, "rows", "row", leave=True) as bar:
        for _ in range(3):
            bar.update()
    assert "rows: 100%" in terminal.getvalue() and "row 3 of 3" not in terminal.getvalue()


def test_a_terminal_has_no_bar_of_what_is_soon_done(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress(3, "tokenising", "row", delay=60) as bar:
        for _ in range(3):
            bar.update()
    assert terminal.getvalue() == ""
