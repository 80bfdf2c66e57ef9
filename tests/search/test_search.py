"""The search: a toy host with curves in closed form, the paper's choices of delta, deaths, two processes, mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread

from advmed.cli.main import main
from advmed.evaluation.auc import auc_robust
from advmed.files import clickable
from advmed.report import Entry, Metric, write_report
from advmed.search import claim as claims
from advmed.search import command, loop
from advmed.search.claim import Claim, Lost, Watch, lock
from advmed.search.curve import read_curve
from advmed.search.plan import name_of, placeholders, read_plan
from advmed.search.trials import Trials, open_study
from helpers import toy_host
from helpers.evaluations import by_hand
from helpers.hosts import ROOT, table

PAPER = table(ROOT / "tests" / "data" / "auc_robust_appendix_a.csv")
CHOSEN = {"heart": "5", "hippocampus": "0.5", "prostate": "3", "cephalometric": "1.0", "bccd": "3.5"}
"""The deltas that the paper takes (Tables 8-12)."""

PYTHON = f"'{sys.executable}' -S"
HOST = str(toy_host.__file__)
TRAIN = f"{PYTHON} {HOST} train {{folder}} delta={{delta}}"
FOLDER = Path("runs/search")
Toy = Callable[..., Path]
Told = Callable[..., str]
DRAW = Figure.savefig


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """Makes study files around the toy host, which does without processes, as the pictures do without drawing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    monkeypatch.setattr(loop, "run_command", in_this_process)
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"not drawn"))

    def make(train: str = "", evaluate: str = "", **more: Any) -> Path:
        content = {
            "study": "toy",
            "storage": "runs/search.log",
            "folder": str(FOLDER),
            "space": {"delta": [0.5, 1, 2]},
            "train": f"{TRAIN} {train}",
            "evaluate": f"{PYTHON} {HOST} evaluate {{folder}} {evaluate}",
            "report": "{folder}/report.json",
            **more,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not ...}, sort_keys=False))
        return path

    return make


def in_this_process(words: Sequence[str], log: Path, environment: Any, claim: Any, stop: Any, what: str) -> None:
    """What run_command does with the words of the toy host."""
    with log.open("a") as out, redirect_stdout(out):
        try:
            toy_host.main(words[words.index(HOST) + 1 :])
        except SystemExit as error:
            raise RuntimeError(f"{what} ended: {error}") from error


@pytest.fixture
def commands(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are run as processes all the same."""
    monkeypatch.setattr(loop, "run_command", command.run_command)


def search(path: Path, *flags: str) -> int:
    return main(["search", str(path), *flags])


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Searches, and returns what it said; a mistake, on stderr, has one line."""

    def run(path: Path, *flags: str, status: int = 0) -> str:
        capsys.readouterr()
        assert search(path, *flags) == status
        out, error = capsys.readouterr()
        return error if status and error.startswith("advmed") else out

    return run


def host(**values: str) -> None:
    """Values that go before those of the toy's commands from now on."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "values.json").write_text(json.dumps(values))


def calls() -> list[str]:
    path = FOLDER / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def trials_of(path: Path) -> Trials:
    plan = read_plan(path)
    return Trials(plan, open_study(plan))


def states(path: Path) -> dict[str, str]:
    return {name: trial.state for name, trial in trials_of(path).by_setting().items()}


def table_of(folder: Path = FOLDER) -> list[dict[str, str]]:
    return table(folder / "search.csv")


def best() -> list[dict[str, str]]:
    return [row for row in table_of() if row["state"] == "best"]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def begun(delta: object) -> bool:
    return (FOLDER / f"delta_{delta}" / "begun.ckpt").exists()


def process(path: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "advmed.cli.main", "search", str(path), *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT / "common"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A suite that runs in the background of a shell has SIGINT ignored, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


# What it finds


@pytest.mark.usefixtures("commands")
def test_a_grid(toy: Toy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", DRAW)
    path = toy()
    assert search(path) == 0
    out = capsys.readouterr().out
    rows = table_of()
    assert [row["delta"] for row in rows] == ["0.5", "1", "2"]
    assert [row["state"] for row in rows] == ["", "best", ""]
    for row, clean in zip(rows, (0.875, 0.9, 0.8), strict=True):
        # Linear from c to c / 2: the area is 3/4 c, so AUC_robust is c sqrt(3/4).
        assert float(row["AUC_robust"]) == pytest.approx(clean * 0.75**0.5)
        assert [float(row[c]) for c in ("clean", "1", "2", "mean")] == pytest.approx(
            [clean, clean * 0.75, clean * 0.5, clean * 0.625]
        )
    assert "Best: delta 1, with the highest AUC_robust of 3 settings, 0.7794 (accuracy under pgd100)." in out
    assert "| 1 | 0.9000 | 0.6750 | 0.4500 | 0.5625 | 0.7794 | best |" in (FOLDER / "search.md").read_text()
    assert imread(FOLDER / "search.png").std() > 0
    page = clickable(FOLDER / "search.md")
    assert out.splitlines()[-1] == f"Report: {page} (beside it search.csv, search.png)"
    assert calls() == [f"{what} delta_{d}" + (" new" if what == "train" else "") for d in ("0.5", 1, 2)
                       for what in ("train", "evaluate")]  # fmt: skip
    assert (FOLDER / "delta_1" / "train.log").read_text().endswith("epoch 1\n")
    # Called again, it has nothing to do; --table says the same without doing anything.
    assert search(path) == 0
    assert search(path, "--table") == 0
    assert len(calls()) == 6
    assert capsys.readouterr().out.count("best") == 2


@pytest.mark.parametrize("dataset", CHOSEN)
def test_the_papers_choice(toy: Toy, dataset: str) -> None:
    rows = [row for row in PAPER if row["dataset"] == dataset]
    curves = {name_of({"d": float(r["delta"])})[2:]: [float(v) for v in r["values"].split(";")] for r in rows}
    Path("curves.json").write_text(json.dumps(curves))
    levels, better = rows[0]["levels"].replace(";", ","), rows[0]["better"]
    path = toy(
        evaluate=f"levels={levels} better={better} curves=curves.json",
        space={"delta": [float(row["delta"]) for row in rows]},
    )
    assert search(path) == 0
    assert [float(row["delta"]) for row in best()] == [float(CHOSEN[dataset])]
    for row, theirs in zip(table_of(), rows, strict=True):
        assert float(row["AUC_robust"]) == pytest.approx(float(theirs["auc_robust"]), abs=1e-4)
    # What Optuna is told orders the settings as the common scale does.
    study = optuna.load_study(study_name="toy", storage=open_study(read_plan(path))._storage)
    assert study.best_trial.user_attrs["setting"]["delta"] == float(CHOSEN[dataset])
    assert study.best_value < 0 if better == "lower" else study.best_value > 0


def test_tpe_finds_the_best_and_goes_on(toy: Toy) -> None:
    # The best of 20 among [0.1, 3] lies near 1, where 3 of the first ten, drawn at random, would not.
    wanted = {"space": {"delta": {"low": 0.1, "high": 3.0}}, "sampler": "tpe", "seed": 1}
    assert search(toy(trials=20, storage="runs/all.log", folder="runs/all", **wanted)) == 0
    at_once = [row["delta"] for row in table_of(Path("runs/all"))]
    assert len(at_once) == 20
    assert all(len(delta) <= 6 for delta in at_once)
    for trials in (2, 20):
        assert search(toy(trials=trials, **wanted)) == 0
    assert [row["delta"] for row in table_of()] == at_once
    assert abs(float(best()[0]["delta"]) - 1) < 0.15


def test_tpe_trains_nothing_twice(toy: Toy) -> None:
    space = {"delta": [0.5, 1], "eps": {"low": 1, "high": 2, "step": 1}}
    path = toy(space=space, train="eps={eps}", sampler="tpe", trials=12)
    assert search(path) == 0
    assert len(table_of()) <= 4
    assert len(calls()) == 2 * len(table_of())
    assert len(open_study(read_plan(path)).get_trials(states=[optuna.trial.TrialState.COMPLETE])) == 12


@pytest.mark.parametrize(
    ("objective", "wanted"), [("clean", "0.5"), ("attacked_mean", "2"), (1, "1"), ("auc_robust", "2")]
)
def test_objectives(toy: Toy, objective: object, wanted: str) -> None:
    curves = {"0.5": [0.9, 0.5, 0.1], "1": [0.7, 0.65, 0.2], "2": [0.75, 0.6, 0.5]}
    Path("curves.json").write_text(json.dumps(curves))
    assert search(toy(evaluate="curves=curves.json", objective=objective)) == 0
    assert [row["delta"] for row in best()] == [wanted]


def test_a_best_value_at_the_edge_is_said(toy: Toy, told: Told) -> None:
    assert "It is the smallest delta tried: try smaller ones." in told(toy(space={"delta": [1, 2, 3]}))
    # More values are added to the grid; the trials that there are stay.
    assert "tried: try" not in told(toy(space={"delta": [0.25, 0.5, 1.0, 2.0, 3.0]}))
    assert calls()[6:] == ["train delta_0.25 new", "evaluate delta_0.25", "train delta_0.5 new", "evaluate delta_0.5"]
    assert [row["delta"] for row in table_of()] == ["0.25", "0.5", "1", "2", "3"]
    up = toy(space={"delta": [0.5, 0.75, 1]}, storage="up.log", folder="up")
    assert "It is the largest delta tried: try larger ones." in told(up)


def test_two_parameters_and_texts(toy: Toy) -> None:
    space = {"delta": [0.5, 1], "note": ["a b", "c=d; rm -rf x", True]}
    assert search(toy(space=space, train="'note={note}'")) == 0
    rows = table_of()
    assert [(row["delta"], row["note"]) for row in rows] == [
        (delta, note) for delta in ("0.5", "1") for note in ("a b", "c=d; rm -rf x", "true")
    ]
    notes = {json.loads(path.read_text())["note"] for path in FOLDER.glob("*/model.json")}
    assert notes == {"a b", "c=d; rm -rf x", "true"}
    assert not (FOLDER / "search.png").exists()
    # A text, unlike Optuna's own choices, can be added, too.
    space["note"].append("e")
    assert search(toy(space=space, train="'note={note}'")) == 0
    assert len(calls()) == 2 * 8


@pytest.mark.usefixtures("commands")
def test_environment_files_and_checkpoint(toy: Toy) -> None:
    script = "import os,sys;t=open(os.environ['SETTINGS']).read();open(sys.argv[1]+'/last.ckpt','w').write(t)"
    checker = "import json,sys;assert open(sys.argv[1]).read()=='delta: 1\\nbounds: {{}}\\n'"
    made = toy(
        space={"delta": [1]},
        environment={"SETTINGS": "{folder}/adversarial.yaml"},
        files={"adversarial.yaml": "delta: {delta}\nbounds: {{}}\n"},
        checkpoint="{folder}/*.ckpt",
    )
    content = yaml.safe_load(made.read_text())
    content |= {"train": f'{PYTHON} -c "{script}" {{folder}}', "evaluate": f'{PYTHON} -c "{checker}" {{checkpoint}}'}
    made.write_text(yaml.safe_dump(content))
    (FOLDER / "delta_1").mkdir(parents=True)
    (FOLDER / "delta_1" / "old.ckpt").touch()
    os.utime(FOLDER / "delta_1" / "old.ckpt", (0, 0))  # the newest counts
    assert search(made) == 1  # it gets as far as the report, which this evaluation does not write
    assert states(made) == {"delta_1": "FAILED"}
    assert (FOLDER / "delta_1" / "last.ckpt").read_text() == "delta: 1\nbounds: {}\n"
    assert "Traceback" not in (FOLDER / "delta_1" / "evaluate.log").read_text()


def test_dry_run(toy: Toy, told: Told) -> None:
    path = toy(train="'a b'", environment={"HOME_OF": "{folder}"}, files={"x.yaml": "delta: {delta}"})
    out = told(path, "--dry-run")
    folder = f"{Path.cwd()}/runs/search/delta_2"
    assert f"HOME_OF={folder} {sys.executable} -S {HOST} train {folder} delta=2 'a b'\n" in out
    assert f"# {folder}/x.yaml:\n#   delta: 2\n" in out
    assert out.count(f"{HOST} evaluate") == 3
    assert told(toy(sampler="tpe", trials=3), "--dry-run").startswith("# 3 trials; the first:\n# delta_")
    assert not Path("runs").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_ours_is_read(tmp_path: Path, toy: Toy) -> None:
    """The layout that advmed.report writes, and not only the toy's idea of it."""
    made = by_hand({"pgd100": [[0.8] * 2, [0.5] * 2], "ifgsm10": [[0.8] * 2, [0.6] * 2]}, (0, 5))
    metrics = [Metric("ADI", lambda s: s["v"].mean()), Metric("MRE", lambda s: s["v"].sum(), False, unit="mm")]
    write_report(tmp_path / "r", [Entry("AMAT", made)], metrics, title="t", level_unit="L2")
    curve = read_curve(tmp_path / "r" / "report.json", read_plan(toy(attack="ifgsm10")))
    assert (curve.levels, curve.values, curve.sign) == ([0, 5], [0.8, 0.6], 1)
    assert curve.measure("auc_robust") == pytest.approx(auc_robust([0, 5], [0.8, 0.6]))
    lower = read_curve(tmp_path / "r" / "report.json", read_plan(toy(metric="MRE")))
    assert (lower.values, lower.sign, lower.facts["attack settings"]["steps"]) == ([1.6, 1.0], -1, 100)


# Failures, deaths and several processes


@pytest.mark.usefixtures("commands")
def test_a_failed_trial_is_told_and_does_not_stop_the_others(toy: Toy, told: Told) -> None:
    path = toy(space={"delta": [2, 1]})
    host(broken="2")
    out = told(path, status=1)
    assert "training ended with status 1, see runs/search/delta_2/train.log:" in out
    assert "    CUDA out of memory: a toy's" in out
    assert states(path) == {"delta_2": "FAILED", "delta_1": "COMPLETE"}
    assert "Not counted: 1 failed." in out and "--retry-failed" in out
    assert search(path) == 1  # it is not tried again by itself
    assert calls().count("train delta_2 new") == 1
    host(again="1")
    assert search(path, "--retry-failed") == 0
    assert states(path) == {"delta_2": "COMPLETE", "delta_1": "COMPLETE"}


@pytest.mark.parametrize(
    ("more", "flags"),
    [
        ({"space": {"delta": [2, 1]}}, ["--stop-on-failure"]),
        ({"space": {"delta": [2]}, "sampler": "tpe", "trials": 3}, []),  # the same again would fail again
    ],
)
def test_a_search_ends_with_a_failure(toy: Toy, more: dict[str, Any], flags: list[str]) -> None:
    host(broken="2")
    assert search(toy(**more), *flags) == 1
    assert calls() == ["train delta_2 new"]


def test_only_the_evaluation_is_done_again(toy: Toy) -> None:
    path = toy(space={"delta": [1]})
    host(silent="1")
    assert search(path) == 1
    host()
    assert search(path, "--retry-failed") == 0
    assert calls() == ["train delta_1 new", "evaluate delta_1", "evaluate delta_1"]


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize(
    ("number", "resume"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, False), (signal.SIGINT, True)],
)
def test_killed_and_resumed(toy: Toy, number: signal.Signals, resume: bool) -> None:
    more = {"resume": f"{TRAIN} mode=resumed"} if resume else {}
    path = toy(train="wait=go", space={"delta": [1, 2]}, **more, checkpoint="{folder}/*.ckpt")
    running = process(path)
    wait_for(lambda: begun(1))
    running.send_signal(number)
    out, _ = running.communicate(timeout=120)
    if number is not signal.SIGKILL:
        assert running.returncode == 130
        assert f"Stopped. Call advmed search {path} again to go on where it stopped." in out
        assert lock(FOLDER / "delta_1" / "trial.lock") is not None  # the command has ended, too
    host(wait="", again="1")
    # Processes of this machine know each other: the command of the one that was killed by SIGKILL is ended first.
    assert search(path) == 0
    again = "resumed" if resume else "new"
    assert calls() == ["train delta_1 new", f"train delta_1 {again}", "evaluate delta_1", "train delta_2 new",
                       "evaluate delta_2"]  # fmt: skip
    assert [row["state"] for row in table_of()] == ["best", ""]


@pytest.mark.parametrize("storage", ["runs/search.log", pytest.param("sqlite:///search.db", marks=pytest.mark.slow)])
def test_two_processes_share_a_study(toy: Toy, storage: str) -> None:
    path = toy(train="wait=go", space={"delta": [0.5, 0.75, 1, 2]}, storage=storage)
    both = [process(path), process(path)]
    wait_for(lambda: len([*FOLDER.glob("*/begun.ckpt")]) == 2)  # each has begun one
    Path("go").touch()
    outs = [one.communicate(timeout=600)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], outs
    trained = [call for call in calls() if call.startswith("train")]
    assert len(trained) == len(set(trained)) == 4
    assert list(states(path).values()) == ["COMPLETE"] * 4
    assert search(path) == 0
    assert len(table_of()) == 4
    # Both have worked: each says which trials it trained.
    assert all(": training\n" in out for out in outs)


@pytest.mark.parametrize("storage", ["runs/search.log", "sqlite:///search.db"])
def test_a_trial_that_two_processes_were_given_is_of_the_one_that_has_the_folder(
    toy: Toy, told: Told, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    monkeypatch.setattr(claims, "lock", lambda path, wait=0.0: lock(path))
    path = toy(space={"delta": [1, 2]}, storage=storage)
    other = trials_of(path)
    both = other.take()
    assert both is not None
    claim = other.claim(both, FOLDER / "delta_1")
    given, take = [both], Trials.take
    monkeypatch.setattr(Trials, "take", lambda trials: given.pop() if given else take(trials))
    assert "delta_1: stopped, another process was given it at the same moment\n" in told(path)
    assert calls() == ["train delta_2 new", "evaluate delta_2"]
    assert states(path) == {"delta_1": "RUNNING", "delta_2": "COMPLETE"}
    # A process that has left its trial to others, and works in the folder all the same, is a failure.
    assert other.abandon(both)
    out = told(path, status=1)
    assert f"delta_1 failed: another process works in {FOLDER / 'delta_1'}: wait for it" in out
    claim.close()
    assert "delta_1: " in told(path, "--retry-failed")
    assert list(states(path).values()) == ["COMPLETE"] * 2


def test_a_silent_machine_loses_its_trial(toy: Toy, told: Told) -> None:
    path = toy(space={"delta": [1, 2]}, patience=1)
    trials = trials_of(path)  # of another machine, which runs a trial
    lost = trials.take()
    assert lost is not None
    trials._attribute(lost.key, "life", {"place": "another", "locked": True, "beat": 3})
    start = time.monotonic()
    out = told(path)
    assert time.monotonic() - start > 0.9
    assert "Waiting for a sign of life of other machines, at most 1 s" in out
    assert "delta_1: its process has died, it is taken up again" in out
    assert calls()[0] == "train delta_2 new" and states(path) == {"delta_1": "COMPLETE", "delta_2": "COMPLETE"}
    # The other machine wakes up: it cannot end the trial any more, in no way.
    curve = next(iter(trials.by_setting().values())).curve
    assert curve is not None
    with pytest.raises(Lost):
        trials.complete(lost, curve)
    trials.fail(lost, "late")
    assert not trials.abandon(lost)
    with pytest.raises(Lost):
        trials.claim(lost, Path("elsewhere"))
    assert states(path) == {"delta_1": "COMPLETE", "delta_2": "COMPLETE"}


def test_a_machine_with_signs_of_life_keeps_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(claims, "time", SimpleNamespace(monotonic=lambda: now))
    watch = Watch(patience=5)
    assert watch.verdict(0, {"place": "another", "beat": 1}) == "unknown"
    assert watch.verdict(0, {"place": "another", "beat": 2}) == "alive"
    now = 4.9
    assert watch.verdict(0, {"place": "another", "beat": 2}) == "alive"
    now = 5.1
    assert watch.verdict(0, {"place": "another", "beat": 2}) == "dead"
    assert watch.verdict(1, None) == "unknown"


def test_a_running_trial_is_left_alone_here_and_on_another_machine(
    toy: Toy, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then this process plays another machine: it sees signs of life, and locks as a network folder shows them."""
    path = toy(train="wait=go", space={"delta": [1, 2]}, patience=8)
    other = process(path)
    wait_for(lambda: begun(1))
    host(wait="", again="1")
    assert "Not counted: 1 running." in told(path)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(claims, "place", lambda: "another machine")
        assert "Waiting for a sign of life" in told(path)
        assert states(path) == {"delta_1": "RUNNING", "delta_2": "COMPLETE"}
        other.kill()
        other.communicate()
        elsewhere.setattr(claims, "time", SimpleNamespace(monotonic=lambda: 20 * time.monotonic(), sleep=time.sleep))
        assert search(path) == 0  # silent, but its command lives, which is not this machine's to end
        assert states(path)["delta_1"] == "RUNNING"
    assert search(path) == 0
    assert calls() == ["train delta_1 new", "train delta_2 new", "evaluate delta_2", "train delta_1 new",
                       "evaluate delta_1"]  # fmt: skip


def test_an_owner_whose_signs_of_life_do_not_arrive_loses_its_trial(tmp_path: Path) -> None:
    def unreachable(life: Mapping[str, Any]) -> None:
        if life["beat"]:
            raise OSError("stale file handle")

    claim = Claim(tmp_path / "trial", unreachable, patience=0.3)
    wait_for(lambda: claim.lost)
    claim.close()
    assert "the storage could not be reached" in claim.lost and "stale file handle" in claim.lost


@pytest.mark.usefixtures("commands")
def test_a_lost_trial_is_stopped_and_the_search_goes_on(toy: Toy, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy(train="wait=go", space={"delta": [1]}, patience=1)
    real = Claim._beat

    def beat(self: Claim) -> None:
        wait_for(lambda: begun(1))
        if not Path("lost").exists():
            Path("lost").touch()
            host(wait="", again="1")
            trials = trials_of(path)
            assert trials.abandon(trials.by_setting()["delta_1"])  # as another machine does it
        real(self)

    monkeypatch.setattr(Claim, "_beat", beat)
    assert "delta_1: stopped, another process has taken it over" in told(path)
    assert calls() == ["train delta_1 new", "train delta_1 new", "evaluate delta_1"]


def test_a_folder_in_use_is_not_entered(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "lock", lambda path, wait=0.0: lock(path))
    path = toy(space={"delta": [1]})
    (FOLDER / "delta_1").mkdir(parents=True)
    held = lock(FOLDER / "delta_1" / "trial.lock")
    assert held is not None
    assert search(path) == 1
    assert calls() == []
    held.close()
    assert search(path, "--retry-failed") == 0


def test_the_same_setting_proposed_twice_is_run_once(toy: Toy) -> None:
    path = toy(space={"delta": [1]})
    one, two = trials_of(path), trials_of(path)
    for trials in (one, two):
        trials._queue({"delta": 1}, {"delta": 1})
    first, second = one.take(), two.take()
    assert first is not None and second is None
    assert [trial.state for trial in one.all()] == ["RUNNING", "WITHDRAWN"]
    assert one.abandon(first) and not two.abandon(first)
    again = two.take()
    assert again is not None and again.setting == first.setting


def test_an_interrupted_trial_of_tpe_keeps_its_setting(toy: Toy) -> None:
    trials = trials_of(toy(space={"delta": {"low": 0.1, "high": 3, "log": True}}, sampler="tpe", trials=2))
    first, second = trials.take(), trials.take()
    assert first is not None and second is not None and trials.take() is None
    assert first.setting != second.setting
    trials.abandon(first)
    again = trials.take()
    assert again is not None and again.setting == first.setting and trials.take() is None


# Mistakes


@pytest.mark.parametrize(
    "case",
    [
        ({"study": ...}, "study is missing"),
        ({"metrics": "accuracy"}, "unknown setting 'metrics', did you mean 'metric'?"),
        ({"space": {"delta": {"low": 0, "high": 1}}}, "a grid needs a list of values, or a step, for delta"),
        ({"space": {"delta": {"low": 2, "high": 1}}}, "must begin below its end"),
        ({"space": {"delta": {"low": 0, "high": 1, "log": True}}}, "above 0 with log: true"),
        ({"space": {"delta": {"low": 1, "high": 2, "log": True, "step": 1}}}, "either log: true or a step"),
        ({"space": {"delta": {"low": 1, "hight": 2}}}, "must have low and high"),
        ({"space": {"delta": []}}, "must be a list of values"),
        ({"space": {"delta": [0.5, 0.50]}}, "holds a value twice"),
        ({"space": {"delta": [float("nan")]}}, "must be a finite number"),
        ({"space": {"delta": [[1]]}}, "may hold numbers, texts, true and false, got [1]"),
        ({"space": {}}, "must name one or more parameters"),
        ({"space": {"folder": [1]}}, "cannot have a parameter 'folder'"),
        ({"space": {"delta": [1], "eps": [2]}}, "train does not use {eps}: nothing would change from trial to trial"),
        ({"train": "echo {folder} {delta} {epsilon}"}, "train has an unknown placeholder {epsilon}"),
        ({"train": "echo {delta}"}, "train does not use {folder}: the trials would overwrite each other"),
        ({"train": "echo {folder} {delta:.2f}"}, "a brace that is none is written twice"),
        ({"train": "echo {folder} {delta} {"}, "a brace that is no placeholder is written twice"),
        ({"train": "echo {folder} '{delta}"}, "cannot be split into words"),
        ({"train": "no-such-program {folder} {delta}"}, "train: there is no program no-such-program"),
        ({"train": "# {folder} {delta}"}, "holds no command"),
        ({"train": 3}, "train must be a text, got 3"),
        ({"resume": "no-such-program {folder}"}, "resume: there is no program no-such-program"),
        ({"evaluate": "no-such-program {folder}"}, "evaluate: there is no program no-such-program"),
        ({"evaluate": "echo {checkpoint}"}, "placeholder {checkpoint}; give its pattern with 'checkpoint: ...'"),
        ({"report": "report.json"}, "report does not use {folder}"),
        ({"files": {"../x": "a"}}, "files are written into the trial's folder"),
        ({"files": ["x"]}, "files must be 'name: text' lines"),
        ({"sampler": "random"}, "sampler must be grid or tpe, got 'random'"),
        ({"sampler": "tpe"}, "needs the number of trials"),
        ({"trials": 3}, "trials belongs to the sampler tpe"),
        ({"sampler": "tpe", "trials": -1}, "trials must be a whole number, got -1"),
        ({"objective": "auc"}, "must be auc_robust, attacked_mean, clean or a noise level, got 'auc'"),
        ({"scale": 0}, "scale must be above 0"),
        ({"patience": "long"}, "patience must be a number"),
        ({"train": "echo {a} {b}", "report": "x"}, "{a}", "{b}", "report does not use"),  # all are told at once
    ],
    ids=lambda case: str(case[1])[:40],
)
def test_mistakes_in_a_study_file(toy: Toy, told: Told, case: tuple[Any, ...]) -> None:
    change, *messages = case
    path = toy()
    content = {**yaml.safe_load(path.read_text()), **change}
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not ...}))
    error = told(path, status=1)
    assert error.startswith("advmed search: ") and all(message in error for message in messages)
    assert len(error.strip().splitlines()) == 1
    assert not Path("runs").exists()  # nothing was begun


def test_no_study_file(tmp_path: Path, told: Told) -> None:
    path = tmp_path / "s.yaml"
    assert "there is no study file" in told(path, status=1)
    with pytest.raises(FileNotFoundError):
        search(path, "--debug")
    for content, message in (("a: [", "is not a YAML file"), ("- 1", "must hold 'name: value'")):
        path.write_text(content)
        assert message in told(path, status=1)


@pytest.mark.parametrize(
    ("evaluate", "more", "message"),
    [
        ("silent=1", {}, "runs/search/delta_1/report.json: see 'report' and its log"),
        ("", {"metric": "mAP"}, "has no metric 'mAP'; it has accuracy"),
        ("", {"attack": "square"}, "has no attack 'square'; it has pgd100, ifgsm10"),
        ("", {"model": "AMAT"}, "has no model 'AMAT'; it has model"),
        ("models=model,standard", {}, "has several models (model, standard): name one with 'model: ...'"),
        ("nan=1", {}, "accuracy under pgd100 is not a number at level 1, 2"),
        ("", {"objective": 3}, "the objective is level 3, which was not evaluated; there are 0 1 2"),
        ("", {"report": "{folder}/model.json"}, "is not a report of Advmed"),
        ("", {"checkpoint": "{folder}/*.pth"}, "runs/search/delta_1/*.pth, see its log"),
    ],
)
def test_reports_that_will_not_do(toy: Toy, told: Told, evaluate: str, more: dict[str, Any], message: str) -> None:
    path = toy(evaluate=evaluate, space={"delta": [1]}, **more)
    out = told(path, status=1)
    assert "delta_1 failed: " in out and message in out
    assert states(path) == {"delta_1": "FAILED"}
    assert "No trial has a result yet." in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluate": "levels=0,1"}, "evaluate has 'levels=0,1' where there was 'nothing'"),
        ({"train": "lr=1"}, "train has 'lr=1'"),
        ({"metric": "accuracy"}, "metric is 'accuracy', was None"),
        ({"attack": "ifgsm10"}, "attack is 'ifgsm10', was None"),
        ({"sampler": "tpe", "trials": 3}, "sampler is 'tpe', was 'grid'"),
        ({"objective": "clean"}, "objective is 'clean', was 'auc_robust'"),
    ],
)
@pytest.mark.parametrize("elsewhere", [{"folder": "runs/new"}, {"storage": "runs/new.log"}])
def test_another_study_file_is_refused(
    toy: Toy, told: Told, change: dict[str, Any], message: str, elsewhere: dict[str, str]
) -> None:
    """By the storage, and by the folder."""
    assert search(toy(space={"delta": [1]})) == 0
    before = calls()
    error = told(toy(space={"delta": [1]}, **elsewhere, **change), status=1)
    assert "was begun with another study file" in error and message in error
    assert calls() == before


def test_other_samples_are_refused(toy: Toy, told: Told) -> None:
    assert search(toy(space={"delta": [1]})) == 0
    host(samples="ab")
    path = toy(space={"delta": [1, 2, 3]})
    error = told(path, status=1)
    assert "the report of delta_2 cannot be compared with that of delta_1: samples is '2, hash" in error
    assert "was '3, hash" in error
    assert states(path) == {"delta_1": "COMPLETE", "delta_2": "FAILED"}  # delta_3 was not begun
    host()
    assert search(path, "--retry-failed") == 0


@pytest.mark.usefixtures("commands")
def test_another_truth_of_the_same_samples_is_refused(toy: Toy, told: Told) -> None:
    """Where both say what it was: an older study does not."""
    host(truth="labels")
    assert search(toy(space={"delta": [1]})) == 0
    host()
    assert search(toy(space={"delta": [1, 2]})) == 0
    host(truth="corrected")
    path = toy(space={"delta": [1, 2, 3]})
    assert (
        "the report of delta_3 cannot be compared with that of delta_1: the same samples have another truth (other "
        "labels, points or spacing)"
    ) in told(path, status=1)
    assert states(path) == {"delta_1": "COMPLETE", "delta_2": "COMPLETE", "delta_3": "FAILED"}


def test_folders_of_others_are_refused(toy: Toy, told: Told) -> None:
    (FOLDER / "delta_1").mkdir(parents=True)
    (FOLDER / "delta_1" / "trial.json").write_text('{"setting": {"delta": 7}}')
    out = told(toy(space={"delta": [1]}), status=1)
    assert "trial.json is of the setting {'delta': 7}: move the folder away" in out
    error = told(toy(study="other"), status=1)
    assert "the folder runs/search belongs to the study 'toy': take another folder" in error
    (FOLDER / "study.json").write_text("{")
    assert "study.json is damaged" in told(toy(), status=1)


def test_storages_that_will_not_do(toy: Toy, told: Told, tmp_path: Path) -> None:
    (tmp_path / "text.log").write_text("no journal\n\n")
    (tmp_path / "json.log").write_text('{"a": 1}\n')
    (tmp_path / "binary.log").write_bytes(bytes(range(256)))
    (tmp_path / "folder.log").mkdir()
    (tmp_path / "text.db").write_text("no database" * 100)
    # Of Optuna, but made by somebody else.
    study = optuna.create_study(study_name="toy", storage="sqlite:///theirs.db")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    for number, (storage, message) in enumerate(
        (
            ("text.log", "cannot use the storage text.log: it is not readable, or no storage of Optuna"),
            ("json.log", "no storage of Optuna"),
            ("binary.log", "no storage of Optuna"),
            ("folder.log", "it is not readable"),
            ("sqlite:///text.db", "no storage of Optuna"),
            ("nonsense://", "cannot use the storage nonsense://"),
            ("postgresql://user:secret@nowhere/db", ""),
            ("sqlite:///theirs.db", "the study 'toy' in sqlite:///theirs.db was not made by advmed search"),
        )
    ):
        error = told(toy(storage=storage, folder=f"runs/{number}"), status=1)
        assert message in error and len(error.strip().splitlines()) == 1
        assert "secret" not in error


def test_the_lock_of_a_killed_process_holds_nobody_up(toy: Toy) -> None:
    """Optuna's lock was a link to ``runs/search.log`` from the folder ``runs``: it led nowhere, for ever."""
    path = toy(space={"delta": [1]}, storage="runs/search.log")
    Path("runs").mkdir()
    os.symlink("runs/search.log", "runs/search.log.lock")
    assert search(path) == 0
    assert not os.path.lexists("runs/search.log.lock")


def test_a_journal_with_a_broken_line_is_named(toy: Toy, told: Told) -> None:
    path = toy(space={"delta": [1]}, storage="runs/search.log")
    assert search(path) == 0
    with Path("runs/search.log").open("a") as journal:
        journal.write("half a li\n")
    assert "cannot use the storage runs/search.log" in told(path, status=1)


def test_a_second_signal_ends_what_does_not_look() -> None:
    """As a storage that waits for a lock."""
    code = "import time\nfrom advmed.search import command\ncommand.SECONDS_AT_ONCE = 0.1\nstop = command.Stop()\n"
    code += "with stop.listening():\n    print('ready', flush=True)\n    while True:\n        time.sleep(0.01)\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "common")}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as deaf:
        assert deaf.stdout is not None
        deaf.stdout.readline()
        deaf.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            deaf.wait(0.5)
        deaf.terminate()
        assert deaf.wait(30) == 128 + signal.SIGTERM


def test_a_locked_database(toy: Toy, told: Told) -> None:
    path = toy(storage="sqlite:///busy.db?timeout=0.1", space={"delta": [1]})
    assert search(path) == 0
    with sqlite3.connect("busy.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "another program has it locked" in told(path, status=1)
        other.execute("ROLLBACK")


def test_what_is_not_there(toy: Toy, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "there is no storage runs/search.log: the search has not been started"
    assert missing in told(toy(), "--table", status=1)
    optuna.create_study(study_name="theirs", storage="sqlite:///theirs.db")
    assert "has no study 'toy'; it has theirs" in told(toy(storage="sqlite:///theirs.db"), "--table", status=1)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'advmed[search]'" in told(toy(), status=1)
    assert search(toy(), "--dry-run") == 0
    assert not Path("runs").exists()


def test_a_study_names_what_lies_beside_it(toy: Toy, told: Told) -> None:
    """Wherever it lies, and the search is called."""
    path = toy(train="echo --config {here}/base.yaml {delta} {folder}")
    beside = Path("my studies", path.name)
    beside.parent.mkdir()
    path.rename(beside)
    assert f"--config '{beside.parent}/base.yaml'" in told(beside, "--dry-run")
    assert "{here}/base.yaml" in read_plan(beside).definition["train"], "a study that was moved goes on"
    path = toy(here="elsewhere")
    assert "unknown setting 'here'" in told(path, status=1)


# Parts


def test_names_of_folders_and_placeholders() -> None:
    assert name_of({"delta": 0.5, "eps": 2.0, "on": True}) == "delta_0.5__eps_2__on_true"
    odd, other = name_of({"text": "a/b"}), name_of({"text": "a b"})
    assert odd.startswith("text_a-b-") and other.startswith("text_a-b-") and odd != other
    assert len(name_of({"text": "x" * 500})) < 200
    assert placeholders("a{b}{{c}} {d}") == ["b", "d"]


@pytest.mark.parametrize(
    ("values", "points"),
    [
        ({"low": 0.1, "high": 0.5, "step": 0.1}, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ({"low": 1, "high": 4, "step": 2}, [1, 3]),
        (["1e-3"], [0.001]),
    ],
)
def test_the_points_of_a_grid(toy: Toy, values: Any, points: list[float]) -> None:
    assert read_plan(toy(space={"delta": values})).grid() == [{"delta": point} for point in points]


EXAMPLES = sorted(ROOT.glob("adv_*/configurations/search_*.yaml"))
STUDIES = sorted(ROOT.glob("benchmarks/studies/*.yaml"))
"""Those of pages of results; named, as they are called, from the root of a clone."""


@pytest.mark.parametrize("path", [*EXAMPLES, *STUDIES], ids=lambda path: path.stem)
def test_examples_are_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advmed.search.plan.program", lambda word: word)  # a host may not be installed
    assert search(path, "--dry-run") == 0
    name = path.name if path in EXAMPLES else path.relative_to(ROOT)
    assert path.read_text().startswith(f"# advmed search {name}\n")


def test_the_studies_of_the_page_of_results_search_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of the page for each study that it names, in its order: the parameter and its values."""
    monkeypatch.setattr("advmed.search.plan.program", lambda word: word)
    page = (ROOT / "docs/results/search.md").read_text(encoding="utf-8")
    named = [ROOT / path for path in re.findall(r"^\$ advmed search (\S+)$", page, re.MULTILINE)]
    assert sorted(named) == STUDIES
    tables = [part.split("\n\n")[0].splitlines() for part in page.split("\n\n| ")[1:]]
    for path, (head, _, *rows) in zip(named, tables, strict=True):
        ((parameter, values),) = read_plan(path).space.items()
        assert head.partition(" |")[0] == parameter
        assert [float(row.split(" | ")[0].strip("| ")) for row in rows] == list(values)
