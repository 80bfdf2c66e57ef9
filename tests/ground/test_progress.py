"""A bar on a terminal, sparse lines in a log file; and nothing of work that is soon over."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advmed import progress
from advmed.files import clickable
from advmed.progress import ProgressBar, on_terminal, watched


class Terminal(io.StringIO):
    """A standard error that a person looks at."""

    def isatty(self) -> bool:
        return True


class Seconds:
    """A clock that a test turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def terminal(patch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    patch.setattr(sys, "stderr", found)
    patch.setattr(progress, "_DELAY", 0.0)
    return found


def lines_of(total: int, seconds: float, **how: Any) -> list[str]:
    """What is said of so many pieces of work that take so many seconds each, the time before it."""
    clock, said = Seconds(), []
    with ProgressBar("work", total, "pieces", say=lambda line: said.append(f"{clock.now:g}: {line}"), **how) as bar:
        bar._clock, bar._begun, bar._next = clock, 0.0, 10.0
        for _ in range(total):
            clock.now += seconds
            bar.update()
    assert bar.done == total
    return said


def test_a_log_file_has_few_lines_each_with_the_time_that_is_left() -> None:
    assert lines_of(9, 1.0) == [], "of what is over in ten seconds nothing is said"
    assert lines_of(100, 1.0) == [
        "10: work: 10 of 100 pieces, about 2 min left",
        "30: work: 30 of 100 pieces, about 70 s left",
        "70: work: 70 of 100 pieces, about 30 s left",
    ]
    day = lines_of(24 * 60, 60.0)
    assert 140 < len(day) < 160, "every ten minutes of a day"
    assert day[-1].endswith(" min left")
    assert lines_of(2, 3600.0) == ["3600: work: 1 of 2 pieces, about 60 min left"]
    assert lines_of(100, 1.0, shown=False) == []


def test_what_an_earlier_run_did_says_nothing_about_the_time() -> None:
    clock, said = Seconds(), []
    with ProgressBar("work", 100, "pieces", say=said.append, clock=clock) as bar:
        clock.now = 5.0
        bar.update(50, earlier=True)
        clock.now = 25.0
        bar.update(10)
    assert said == ["work: 60 of 100 pieces, about 80 s left"]


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    assert on_terminal()
    said: list[str] = []
    clock = Seconds()
    with ProgressBar("work", 4, "pieces", say=said.append, clock=clock) as bar:
        for number in range(4):
            clock.now += 100
            bar.update(now=f"piece {number}")
    assert said == []
    text = shown.getvalue()
    assert "work: 100%" in text
    assert "4/4 pieces [" in text
    assert "piece 3" in text
    with ProgressBar("hidden", 4, "pieces", shown=False) as bar:
        bar.update(4)
    assert "hidden" not in shown.getvalue()


SMALL = """
from advmed import progress
progress._DELAY = 0.0
with progress.ProgressBar("work", 4, "pieces") as bar:
    bar.update(4)
"""


@pytest.mark.parametrize("size", [(0, 0), (0, 100), (30, 0), (30, 100)], ids=str)
def test_a_terminal_that_does_not_know_its_size_has_a_bar(size: tuple[int, int]) -> None:
    """As in some containers: tqdm would show nothing there."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, size)
    process = subprocess.Popen([sys.executable, "-c", SMALL], stderr=theirs)
    assert process.wait(timeout=60) == 0
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "work: 100%" in shown
    assert "4/4 pieces" in shown


def test_a_terminal_is_spared_what_is_soon_over(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stderr", shown)
    with ProgressBar("short", 4, "pieces") as bar:
        bar.update(4)
    assert shown.getvalue() == ""


def test_a_log_file_without_a_listener_is_the_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not on_terminal()
    clock = Seconds()
    with ProgressBar("work", 4, "pieces", clock=clock) as bar:
        clock.now = 60.0
        bar.update()
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "work: 1 of 4 pieces, about 3 min left\n")
    monkeypatch.setattr(sys, "stderr", None)  # as in a process without a console
    assert not on_terminal()


@pytest.mark.parametrize("make", [list, iter, lambda items: (item for item in items)], ids=["list", "iter", "made"])
def test_watched_items_are_those_that_were_given(make: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    assert list(watched(make("abc"), "letters", "letters", total=3)) == ["a", "b", "c"]
    assert "3/3 letters" in shown.getvalue()


def test_who_does_not_know_how_many_there_are_is_told_so() -> None:
    assert list(watched("abc", "letters", "letters")) == ["a", "b", "c"]
    with pytest.raises(TypeError, match="total"):
        list(watched(iter("abc"), "letters", "letters"))


def test_a_path_is_clickable_wherever_the_command_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = clickable(Path("my report", "report.html"))
    assert found == f"file://{tmp_path}/my%20report/report.html"
    assert clickable(tmp_path / "my report" / "report.html") == found
