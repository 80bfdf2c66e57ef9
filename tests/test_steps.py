"""The steps of the demos: run once, side by side, and what is done is kept when another one fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from steps import Command, Steps

# Commands run in the working folder and leave a line there each time that they run.
NOTE = "import os, sys; open(sys.argv[1], 'a').write(os.environ['OMP_NUM_THREADS'] + '\\n')"


def python(name: str, code: str, *words: str, **settings: object) -> Command:
    return Command(name, ["python", "-c", code, *words], **settings)


def runs(folder: Path, name: str) -> list[str]:
    """The number of threads in every run of a command."""
    return (folder / name).read_text().splitlines()


def test_commands_share_the_threads_and_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Each waits for the other's file: one after the other they would not end.
    wait = "\nimport time\nwhile not os.path.exists(sys.argv[2]): time.sleep(0.05)\nprint('met', sys.argv[2])"
    both = [python("a", NOTE + wait, "a", "b"), python("b", NOTE + wait, "b", "a")]
    for _ in range(2):
        Steps(tmp_path, {"OMP_NUM_THREADS": "4"}).commands("train both", both)
    assert runs(tmp_path, "a") == runs(tmp_path, "b") == ["2"]
    assert (tmp_path / "logs" / "a.log").read_text() == "met b\n"
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("train both ... ") and first.endswith(" s")
    assert second == "train both ... done before"


def test_a_failure_ends_the_others_and_keeps_what_is_done(tmp_path: Path) -> None:
    first = python("first", NOTE, "first")
    # It fails when the first one has its stamp and the third one runs.
    wait = "import sys, time; from os.path import exists\nwhile not (exists('done/first') and exists('slow')): "
    broken = python("broken", f"{wait}time.sleep(0.05)\nprint('no such data')\nsys.exit(3)")
    slow = python("slow", NOTE + "\nimport time; time.sleep(30); open('woke', 'w')", "slow")
    with pytest.raises(SystemExit) as refused:
        Steps(tmp_path, {"OMP_NUM_THREADS": "3"}).commands("train", [first, broken, slow])
    assert not (tmp_path / "woke").exists()
    message = str(refused.value)
    assert "failed with exit status 3" in message and "no such data" in message
    assert str(tmp_path / "logs" / "broken.log") in message and "finished steps are kept" in message
    assert {stamp.name for stamp in (tmp_path / "done").iterdir()} == {"first"}
    mended = [first, python("broken", NOTE, "broken"), python("slow", NOTE, "slow")]
    Steps(tmp_path, {"OMP_NUM_THREADS": "4"}).commands("train", mended)
    assert (runs(tmp_path, "first"), runs(tmp_path, "broken"), runs(tmp_path, "slow")) == (["1"], ["2"], ["1", "2"])


@pytest.mark.parametrize("change", ["words", "depends_on"])
def test_a_changed_command_runs_again_without_its_old_output(tmp_path: Path, change: str) -> None:
    made = tmp_path / "made"
    code = "import os, sys; os.makedirs('made'); open('made/' + sys.argv[1], 'w').close()"
    Steps(tmp_path, {}).commands("make", [python("make", code, "one", output=made, depends_on="1")])
    words, depends_on = ("two", "1") if change == "words" else ("one", "2")
    (made / "left over").touch()
    Steps(tmp_path, {}).commands("make", [python("make", code, words, output=made, depends_on=depends_on)])
    assert [path.name for path in made.iterdir()] == [words]


def test_a_step_runs_once_and_again_after_a_failure(tmp_path: Path) -> None:
    calls: list[str] = []

    def action() -> None:
        calls.append("called")
        if len(calls) == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Steps(tmp_path, {}).step("data", "prepare", action, "1")
    for depends_on in ("1", "1", "2"):
        Steps(tmp_path, {}).step("data", "prepare", action, depends_on)
    assert len(calls) == 3


def test_a_command_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected the command adv-nothing in .* found none; call this script by its"):
        Steps(tmp_path, {}).commands("train", [Command("train", ["adv-nothing", "fit"])])


def test_the_time_left_follows_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By what its steps have taken so far; what was done before tells nothing."""
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steps.time.monotonic", lambda: now)
        (tmp_path / "done").mkdir()
        (tmp_path / "done" / "first").write_text("1")
        steps = Steps(tmp_path, {}, expected=(60, 60, 120, 240))
        for name, seconds in (("first", 0), ("second", 90), ("third", 180), ("fourth", 1)):
            steps.step(name, name, lambda seconds=seconds: take(seconds), "1")
    assert capsys.readouterr().out.splitlines() == [
        "first (about 8 min left) ... done before",
        "second (about 7 min left) ... 90 s",
        "third (about 9 min left) ... 180 s",
        "fourth (about 6 min left) ... 1 s",
    ]
    assert Steps(tmp_path, {}).left() is None
