"""The search: toy hosts with curves in closed form, the paper's choices of delta, deaths, two processes, mistakes."""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from matplotlib.image import imread

from advmed.attacks.names import parse_attacks
from advmed.cli.main import main
from advmed.evaluation.auc import auc_robust
from advmed.evaluation.loop import Condition, Evaluation
from advmed.report import Entry, Metric, write_report
from advmed.search import claim as claims
from advmed.search.claim import Claim, Lost, Watch, lock, place
from advmed.search.curve import read_curve
from advmed.search.plan import Plan, name_of, placeholders, read_plan
from advmed.search.trials import Trials, open_study

PAPER = list(csv.DictReader((Path(__file__).parents[1] / "data" / "auc_robust_appendix_a.csv").open()))
CHOSEN = {"heart": "5", "hippocampus": "0.5", "prostate": "3", "cephalometric": "1.0", "bccd": "3.5"}
"""The deltas that the paper takes (Tables 8-12)."""

TRAIN = """
import json, os, sys, time
folder, values = sys.argv[1], dict(word.split("=", 1) for word in sys.argv[2:])
name = os.path.basename(folder)
with open(os.path.join(os.path.dirname(folder), "calls.txt"), "a") as calls:
    calls.write(f"train {name} {values.get('mode', 'new')}\\n")
busy = os.path.join(folder, "busy")  # two trainings in one folder would find this
open(busy, "x").close() if values.get("mode") != "resumed" else None
open(os.path.join(folder, "begun.ckpt"), "w").close()
print("epoch 1", flush=True)
time.sleep(float(values.get("seconds", 0)))
if os.path.exists(os.path.join(os.path.dirname(folder), "broken")) and values["delta"] == "2":
    sys.exit("CUDA out of memory: a toy's")
json.dump({k: v for k, v in values.items()}, open(os.path.join(folder, "model.json"), "w"))
if os.path.exists(busy):
    os.remove(busy)
"""

EVALUATE = """
import json, os, sys
folder, values = sys.argv[1], dict(word.split("=", 1) for word in sys.argv[2:])
model = json.load(open(os.path.join(folder, "model.json")))
with open(os.path.join(os.path.dirname(folder), "calls.txt"), "a") as calls:
    calls.write(f"evaluate {os.path.basename(folder)}\\n")
levels = [float(level) for level in values.get("levels", "0,1,2").split(",")]
if "curves" in values:
    curve = json.load(open(values["curves"]))[model["delta"]]
else:  # best at delta = 1
    clean = 0.9 - 0.1 * (float(model["delta"]) - 1) ** 2
    curve = [clean * (1 - level / 4) for level in levels]
curve = [None if model["delta"] == values.get("nan") and level else value for level, value in zip(levels, curve)]
result = {"clean": curve[0], "attacks": {name: {"levels": levels, "values": curve} for name in ("pgd100", "ifgsm10")}}
lower = values.get("better") == "lower"
samples = ["a", "b"] if os.path.exists(os.path.join(os.path.dirname(folder), "fewer")) else ["a", "b", "c"]
report = {
    "format": "advmed.report/1",
    "configuration": {
        "evaluation": {"attacks": {"pgd100": {"steps": 100}}, "levels": levels, "seed": 0, "bounds": None},
        "metrics": {"accuracy": {"higher_is_better": not lower, "scale": None, "unit": ""}},
        "samples": samples,
        "level_unit": "L2",
    },
    "results": {"accuracy": {"scale": 1.0, "models": {"model": result}}},
}
if values.get("two"):
    report["results"]["accuracy"]["models"]["standard"] = result
if not values.get("silent"):
    json.dump(report, open(os.path.join(folder, "report.json"), "w"))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes study files around the toy hosts."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    monkeypatch.chdir(tmp_path)
    os.environ.pop("nnUNet_extTrainer", None)

    def make(train: str = "", evaluate: str = "", **more: Any) -> Path:
        python = f"'{sys.executable}' -S"
        content = {
            "study": "toy",
            "storage": "runs/search.log",
            "folder": "runs/search",
            "space": {"delta": [0.5, 1, 2]},
            "train": f"{python} train.py {{folder}} delta={{delta}} {train}",
            "evaluate": f"{python} evaluate.py {{folder}} {evaluate}",
            "report": "{folder}/report.json",
            **more,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return make


def search(path: Path, *flags: str) -> int:
    return main(["search", str(path), *flags])


def calls() -> list[str]:
    path = Path("runs/search/calls.txt")
    return path.read_text().splitlines() if path.exists() else []


def states(path: Path) -> dict[str, str]:
    plan = read_plan(path)
    return {name: t.state for name, t in Trials(plan, open_study(plan, create=False)).by_setting().items()}


def table_of(folder: str = "runs/search") -> list[dict[str, str]]:
    return list(csv.DictReader((Path(folder) / "search.csv").open()))


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def process(path: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "advmed.cli.main", "search", str(path), *flags],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A suite that runs in the background of a shell has SIGINT ignored, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


# What it finds


def test_a_grid(toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "| 1 | 0.9000 | 0.6750 | 0.4500 | 0.5625 | 0.7794 | best |" in Path("runs/search/search.md").read_text()
    assert imread(Path("runs/search/search.png")).std() > 0
    assert calls() == [f"{what} delta_{d}" + (" new" if what == "train" else "") for d in ("0.5", 1, 2)
                       for what in ("train", "evaluate")]  # fmt: skip
    assert Path("runs/search/delta_1/train.log").read_text().endswith("epoch 1\n")
    # Called again, it has nothing to do; --table says the same without doing anything.
    assert search(path) == 0
    assert search(path, "--table") == 0
    assert len(calls()) == 6
    assert capsys.readouterr().out.count("best") == 2


@pytest.mark.parametrize("dataset", CHOSEN)
def test_the_papers_choice(toy: Callable[..., Path], dataset: str) -> None:
    rows = [row for row in PAPER if row["dataset"] == dataset]
    curves = {name_of({"d": float(r["delta"])})[2:]: [float(v) for v in r["values"].split(";")] for r in rows}
    Path("curves.json").write_text(json.dumps(curves))
    levels, better = rows[0]["levels"].replace(";", ","), rows[0]["better"]
    path = toy(
        evaluate=f"levels={levels} better={better} curves=curves.json",
        space={"delta": [float(row["delta"]) for row in rows]},
    )
    assert search(path) == 0
    found = table_of()
    best = [row for row in found if row["state"] == "best"]
    assert [float(row["delta"]) for row in best] == [float(CHOSEN[dataset])]
    for row, theirs in zip(found, rows, strict=True):
        assert float(row["AUC_robust"]) == pytest.approx(float(theirs["auc_robust"]), abs=1e-4)
    # What Optuna is told orders the settings as the common scale does.
    study = optuna.load_study(study_name="toy", storage=open_study(read_plan(path))._storage)
    assert study.best_trial.user_attrs["setting"]["delta"] == float(CHOSEN[dataset])
    assert study.best_value < 0 if better == "lower" else study.best_value > 0


def test_tpe_finds_the_best(toy: Callable[..., Path]) -> None:
    # The best of 20 among [0.1, 3] lies near 1, where 3 of the first ten, drawn at random, would not.
    path = toy(space={"delta": {"low": 0.1, "high": 3.0}}, sampler="tpe", trials=20, seed=1)
    assert search(path) == 0
    rows = table_of()
    assert len(rows) == 20
    best = next(row for row in rows if row["state"] == "best")
    assert abs(float(best["delta"]) - 1) < 0.15
    assert all(len(row["delta"]) <= 6 for row in rows)


def test_tpe_goes_on_and_can_be_given_more_trials(toy: Callable[..., Path]) -> None:
    wanted = {"space": {"delta": {"low": 0.1, "high": 3.0}}, "sampler": "tpe", "seed": 4}
    assert search(toy(trials=6, storage="runs/all.log", folder="runs/all", **wanted)) == 0
    assert search(toy(trials=2, **wanted)) == 0
    assert search(toy(trials=6, **wanted)) == 0
    assert [row["delta"] for row in table_of()] == [row["delta"] for row in table_of("runs/all")]


def test_tpe_trains_nothing_twice(toy: Callable[..., Path]) -> None:
    path = toy(space={"delta": [0.5, 1], "eps": {"low": 1, "high": 2, "step": 1}}, train="eps={eps}",
               sampler="tpe", trials=12)  # fmt: skip
    assert search(path) == 0
    assert len(table_of()) <= 4
    assert len(calls()) == 2 * len(table_of())
    assert len(open_study(read_plan(path)).get_trials(states=[optuna.trial.TrialState.COMPLETE])) == 12


@pytest.mark.parametrize(
    ("objective", "best"), [("clean", "0.5"), ("attacked_mean", "2"), (1, "1"), ("auc_robust", "2")]
)
def test_objectives(toy: Callable[..., Path], objective: object, best: str) -> None:
    curves = {"0.5": [0.9, 0.5, 0.1], "1": [0.7, 0.65, 0.2], "2": [0.75, 0.6, 0.5]}
    Path("curves.json").write_text(json.dumps(curves))
    assert search(toy(evaluate="curves=curves.json", objective=objective)) == 0
    assert [row["delta"] for row in table_of() if row["state"] == "best"] == [best]


def test_a_best_value_at_the_edge_is_said(toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert search(toy(space={"delta": [1, 2, 3]})) == 0
    assert "It is the smallest delta tried: try smaller ones." in capsys.readouterr().out
    # More values are added to the grid; the trials that there are stay.
    assert search(toy(space={"delta": [0.25, 0.5, 1.0, 2.0, 3.0]})) == 0
    assert "tried: try" not in capsys.readouterr().out
    assert calls()[6:] == ["train delta_0.25 new", "evaluate delta_0.25", "train delta_0.5 new", "evaluate delta_0.5"]
    assert [row["delta"] for row in table_of()] == ["0.25", "0.5", "1", "2", "3"]


def test_two_parameters_and_texts(toy: Callable[..., Path]) -> None:
    space = {"delta": [0.5, 1], "note": ["a b", "c=d; rm -rf x", True]}
    assert search(toy(space=space, train="'note={note}'")) == 0
    rows = table_of()
    assert [(row["delta"], row["note"]) for row in rows] == [
        (delta, note) for delta in ("0.5", "1") for note in ("a b", "c=d; rm -rf x", "true")
    ]
    notes = {json.loads(path.read_text())["note"] for path in Path("runs/search").glob("*/model.json")}
    assert notes == {"a b", "c=d; rm -rf x", "true"}
    assert not Path("runs/search/search.png").exists()
    # A text, unlike Optuna's own choices, can be added, too.
    space["note"].append("e")
    assert search(toy(space=space, train="'note={note}'")) == 0
    assert len(calls()) == 2 * 8


def test_environment_files_and_checkpoint(toy: Callable[..., Path]) -> None:
    script = "import os,sys;t=open(os.environ['SETTINGS']).read();open(sys.argv[1]+'/last.ckpt','w').write(t)"
    path = toy(
        environment={"SETTINGS": "{folder}/adversarial.yaml"},
        files={"adversarial.yaml": "delta: {delta}\nbounds: {{}}\n"},
        checkpoint="{folder}/*.ckpt",
    )
    content = yaml.safe_load(path.read_text())
    content["train"] = f"'{sys.executable}' -S -c \"{script}\" {{folder}}"
    checker = "import json,sys;assert open(sys.argv[1]).read()=='delta: 1\\nbounds: {{}}\\n'"
    content["evaluate"] = f"'{sys.executable}' -S -c \"{checker}\" {{checkpoint}}"
    content["space"] = {"delta": [1]}
    path.write_text(yaml.safe_dump(content))
    assert search(path) == 1  # it gets as far as the report, which this evaluation does not write
    assert "evaluate.log" not in states(path) and states(path) == {"delta_1": "FAILED"}
    assert Path("runs/search/delta_1/last.ckpt").read_text() == "delta: 1\nbounds: {}\n"
    assert "Traceback" not in Path("runs/search/delta_1/evaluate.log").read_text()


def test_nobody_reads_the_output(toy: Callable[..., Path]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "advmed.cli.main", "search", str(toy()), "--dry-run"]
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_dry_run(toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = toy(train="'a b'", environment={"HOME_OF": "{folder}"}, files={"x.yaml": "delta: {delta}"})
    assert search(path, "--dry-run") == 0
    out = capsys.readouterr().out
    folder = f"{Path.cwd()}/runs/search/delta_2"
    assert f"HOME_OF={folder} {sys.executable} -S train.py {folder} delta=2 'a b'\n" in out
    assert f"# {folder}/x.yaml:\n#   delta: 2\n" in out
    assert out.count("evaluate.py") == 3
    assert search(toy(sampler="tpe", trials=3), "--dry-run") == 0
    assert capsys.readouterr().out.startswith("# 3 trials; the first:\n# delta_")
    assert not Path("runs").exists()


def test_a_report_of_ours_is_read(tmp_path: Path, toy: Callable[..., Path]) -> None:
    """The layout that advmed.report writes, and not only the toy's idea of it."""

    def condition(value: float, level: float) -> Condition:
        return Condition(np.full(2, level), np.zeros(2), np.zeros(2, np.int64), {"dice": np.full(2, value)}, seconds=0)

    attacks = parse_attacks(["pgd100", "ifgsm10"])
    configuration = {"attacks": {"pgd100": 100, "ifgsm10": 10}, "levels": [0.0, 5.0], "seed": 0, "bounds": None}
    attacked = {("pgd100", 5.0): condition(0.5, 5), ("ifgsm10", 5.0): condition(0.6, 5)}
    made = Evaluation(
        {**configuration, "fingerprint": "f"}, attacks, (0.0, 5.0), ("a", "b"), condition(0.8, 0), attacked
    )
    metrics = [Metric("ADI", lambda s: s["dice"].mean()), Metric("MRE", lambda s: s["dice"].sum(), False, unit="mm")]
    write_report(tmp_path / "r", [Entry("AMAT", made)], metrics, title="t", level_unit="L2")
    plan = read_plan(toy(attack="ifgsm10"))
    curve = read_curve(tmp_path / "r" / "report.json", plan)
    assert (curve.levels, curve.values, curve.sign) == ([0, 5], [0.8, 0.6], 1)
    assert curve.measure("auc_robust") == pytest.approx(auc_robust([0, 5], [0.8, 0.6]))
    lower = read_curve(tmp_path / "r" / "report.json", read_plan(toy(metric="MRE")))
    assert (lower.values, lower.sign, lower.facts["attack settings"]) == ([1.6, 1.0], -1, 100)


# Failures, deaths and several processes


def test_a_failed_trial_is_told_and_does_not_stop_the_others(
    toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy(space={"delta": [2, 1]})
    Path("runs/search").mkdir(parents=True)
    Path("runs/search/broken").touch()
    assert search(path) == 1
    out = capsys.readouterr().out
    assert "training ended with status 1, see runs/search/delta_2/train.log:" in out
    assert "    CUDA out of memory: a toy's" in out
    assert states(path) == {"delta_2": "FAILED", "delta_1": "COMPLETE"}
    assert "Not counted: 1 failed." in out and "--retry-failed" in out
    assert search(path) == 1  # it is not tried again by itself
    assert calls().count("train delta_2 new") == 1
    Path("runs/search/broken").unlink()
    Path("runs/search/delta_2/busy").unlink()
    assert search(path, "--retry-failed") == 0
    assert states(path) == {"delta_2": "COMPLETE", "delta_1": "COMPLETE"}


def test_stop_on_failure(toy: Callable[..., Path]) -> None:
    path = toy(space={"delta": [2, 1]})
    Path("runs/search").mkdir(parents=True)
    Path("runs/search/broken").touch()
    assert search(path, "--stop-on-failure") == 1
    assert calls() == ["train delta_2 new"]


def test_a_failing_tpe_ends(toy: Callable[..., Path]) -> None:
    Path("runs/search").mkdir(parents=True)
    Path("runs/search/broken").touch()
    path = toy(space={"delta": [2]}, sampler="tpe", trials=3)
    assert search(path) == 1
    assert calls() == ["train delta_2 new"]


def test_only_the_evaluation_is_done_again(toy: Callable[..., Path]) -> None:
    path = toy(evaluate="silent=1", space={"delta": [1]})
    assert search(path) == 1
    content = yaml.safe_load(path.read_text())
    assert content["evaluate"].endswith("silent=1")
    Path("evaluate.py").write_text(EVALUATE.replace('if not values.get("silent")', "if True"))
    assert search(path, "--retry-failed") == 0
    assert calls() == ["train delta_1 new", "evaluate delta_1", "evaluate delta_1"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_resumed(toy: Callable[..., Path], number: signal.Signals, resume: bool) -> None:
    more = {"resume": f"'{sys.executable}' -S train.py {{folder}} delta={{delta}} mode=resumed"} if resume else {}
    slow = toy(train="seconds=600", space={"delta": [1, 2]}, **more, checkpoint="{folder}/*.ckpt")
    running = process(slow)
    wait_for(lambda: Path("runs/search/delta_1/begun.ckpt").exists())
    running.send_signal(number)
    out, _ = running.communicate(timeout=120)
    if number is not signal.SIGKILL:
        assert running.returncode == 130
        assert f"Stopped. Call advmed search {slow} again to go on where it stopped." in out
        assert lock(Path("runs/search/delta_1/trial.lock")) is not None  # the command has ended, too
    # The toy looks into its own script for how long to train, so the command stays the same.
    Path("train.py").write_text(
        TRAIN.replace('values.get("seconds", 0)', "0").replace('open(busy, "x")', 'open(busy, "w")')
    )
    assert search(slow) == 0  # the command of the one that was killed by SIGKILL is ended first
    again = "resumed" if resume else "new"
    assert calls() == ["train delta_1 new", f"train delta_1 {again}", "evaluate delta_1", "train delta_2 new",
                       "evaluate delta_2"]  # fmt: skip
    assert [row["state"] for row in table_of()] == ["best", ""]


@pytest.mark.parametrize("storage", ["runs/search.log", "sqlite:///search.db"])
def test_two_processes_share_a_study(toy: Callable[..., Path], storage: str) -> None:
    path = toy(train="seconds=0.3", space={"delta": [0.25, 0.5, 0.75, 1, 1.5, 2]}, storage=storage)
    both = [process(path), process(path)]
    outs = [one.communicate(timeout=600)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], outs
    trained = [call for call in calls() if call.startswith("train")]
    assert len(trained) == len(set(trained)) == 6
    assert all(state == "COMPLETE" for state in states(path).values())
    assert search(path) == 0
    assert len(table_of()) == 6
    # Both have worked: each says which trials it trained.
    assert all(": training\n" in out for out in outs)


def test_a_running_trial_of_this_machine_is_left_alone(
    toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy(train="seconds=600", space={"delta": [1, 2]})
    other = process(path)
    wait_for(lambda: Path("runs/search/delta_1/begun.ckpt").exists())
    Path("train.py").write_text(TRAIN.replace('values.get("seconds", 0)', "0"))
    try:
        assert search(path) == 0
        assert calls() == ["train delta_1 new", "train delta_2 new", "evaluate delta_2"]
        assert "Not counted: 1 running." in capsys.readouterr().out
    finally:
        other.terminate()
        other.communicate(timeout=120)


def begun_elsewhere(path: Path, **life: object) -> tuple[Plan, Trials, Any]:
    """A study in which another machine runs a trial."""
    plan = read_plan(path)
    study = open_study(plan)
    trials = Trials(plan, study)
    trial = trials.take()
    assert trial is not None
    study._storage.set_trial_user_attr(trial.key, "life", {"place": "another", "locked": True, "beat": 3, **life})
    return plan, trials, trial


def test_a_silent_machine_loses_its_trial(toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = toy(space={"delta": [1, 2]}, patience=1)
    _, trials, lost = begun_elsewhere(path)
    start = time.monotonic()
    assert search(path) == 0
    assert time.monotonic() - start > 0.9
    out = capsys.readouterr().out
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


def test_two_machines_share_a_study(
    toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This process plays another machine: it sees signs of life, and locks as a network folder shows them."""
    path = toy(train="seconds=600", space={"delta": [1, 2]}, patience=1)
    other = process(path)
    wait_for(lambda: Path("runs/search/delta_1/begun.ckpt").exists())
    Path("train.py").write_text(TRAIN.replace('values.get("seconds", 0)', "0").replace('"x"', '"w"'))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(claims, "place", lambda: "another machine")
        assert search(path) == 0
        assert states(path) == {"delta_1": "RUNNING", "delta_2": "COMPLETE"}
        other.kill()
        assert search(path) == 0  # silent, but its command lives, which is not this machine's to end
        assert states(path)["delta_1"] == "RUNNING"
    assert "Waiting for a sign of life" in capsys.readouterr().out
    other.communicate()
    assert search(path) == 0
    assert calls() == ["train delta_1 new", "train delta_2 new", "evaluate delta_2", "train delta_1 new",
                       "evaluate delta_1"]  # fmt: skip


def test_an_owner_notices_that_it_has_lost_its_trial(toy: Callable[..., Path], tmp_path: Path) -> None:
    told: list[int] = []

    def tell(life: Mapping[str, Any]) -> None:
        told.append(life["beat"])
        if len(told) > 3:
            raise optuna.exceptions.UpdateFinishedTrialError

    claim = Claim(tmp_path / "trial", tell, patience=0.2)
    wait_for(lambda: claim.lost)
    claim.close()
    assert told == [0, 1, 2, 3]
    assert "another process has taken it over" in claim.lost

    def unreachable(life: Mapping[str, Any]) -> None:
        if life["beat"]:
            raise OSError("stale file handle")

    claim = Claim(tmp_path / "trial", unreachable, patience=0.3)
    wait_for(lambda: claim.lost)
    claim.close()
    assert "the storage could not be reached" in claim.lost and "stale file handle" in claim.lost


def test_a_lost_trial_is_stopped_and_the_search_goes_on(
    toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy(train="seconds=600", space={"delta": [1]}, patience=1)
    real = Claim._beat

    def beat(self: Claim) -> None:
        wait_for(lambda: Path("runs/search/delta_1/begun.ckpt").exists())
        if not Path("lost").exists():
            Path("lost").touch()
            Path("train.py").write_text(TRAIN.replace('values.get("seconds", 0)', "0").replace('"x"', '"w"'))
            plan = read_plan(path)
            trials = Trials(plan, open_study(plan))
            assert trials.abandon(trials.by_setting()["delta_1"])  # as another machine does it
        real(self)

    monkeypatch.setattr(Claim, "_beat", beat)
    assert search(path) == 0
    assert "delta_1: stopped, another process has taken it over" in capsys.readouterr().out
    assert calls() == ["train delta_1 new", "train delta_1 new", "evaluate delta_1"]


def test_a_folder_in_use_is_not_entered(toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "lock", lambda path, wait=0.0: lock(path))
    path = toy(space={"delta": [1]})
    Path("runs/search/delta_1").mkdir(parents=True)
    held = lock(Path("runs/search/delta_1/trial.lock"))
    assert held is not None
    assert search(path) == 1
    assert calls() == []
    held.close()
    assert search(path, "--retry-failed") == 0


def test_the_same_setting_proposed_twice_is_run_once(toy: Callable[..., Path]) -> None:
    path = toy(space={"delta": [1]})
    plan = read_plan(path)
    one, two = Trials(plan, open_study(plan)), Trials(plan, open_study(plan))
    one._queue({"delta": 1}, {"delta": 1})
    two._queue({"delta": 1}, {"delta": 1})
    first, second = one.take(), two.take()
    assert first is not None and second is None
    assert [trial.state for trial in one.all()] == ["RUNNING", "WITHDRAWN"]
    assert one.abandon(first) and not two.abandon(first)
    again = two.take()
    assert again is not None and again.setting == first.setting


def test_an_interrupted_trial_of_tpe_keeps_its_setting(toy: Callable[..., Path]) -> None:
    plan = read_plan(toy(space={"delta": {"low": 0.1, "high": 3, "log": True}}, sampler="tpe", trials=2))
    trials = Trials(plan, open_study(plan))
    first, second = trials.take(), trials.take()
    assert first is not None and second is not None and trials.take() is None
    assert first.setting != second.setting
    trials.abandon(first)
    again = trials.take()
    assert again is not None and again.setting == first.setting
    assert trials.take() is None


# Mistakes


@pytest.mark.parametrize(
    ("change", "message"),
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
        (
            {"evaluate": "echo {checkpoint}"},
            "unknown placeholder {checkpoint}; give its pattern with 'checkpoint: ...'",
        ),
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
    ],
)
def test_mistakes_in_a_study_file(
    toy: Callable[..., Path], change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy()
    content = {**yaml.safe_load(path.read_text()), **change}
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not ...}))
    assert search(path) == 1
    error = capsys.readouterr().err
    assert error.startswith("advmed search: ") and message in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("runs").exists()  # nothing was begun


def test_all_mistakes_are_told_at_once(toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert search(toy(train="{a} {b}", report="x")) == 1
    error = capsys.readouterr().err
    assert all(text in error for text in ("{a}", "{b}", "report does not use"))


@pytest.mark.parametrize(("content", "message"), [("a: [", "is not a YAML file"), ("- 1", "must hold 'name: value'")])
def test_no_yaml(tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.yaml").write_text(content)
    assert search(tmp_path / "s.yaml") == 1
    assert message in capsys.readouterr().err
    assert search(tmp_path / "t.yaml") == 1
    assert "there is no study file" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        search(tmp_path / "t.yaml", "--debug")


@pytest.mark.parametrize(
    ("evaluate", "more", "message"),
    [
        ("silent=1", {}, "runs/search/delta_1/report.json: see 'report' and its log"),
        ("", {"metric": "mAP"}, "has no metric 'mAP'; it has accuracy"),
        ("", {"attack": "square"}, "has no attack 'square'; it has pgd100, ifgsm10"),
        ("", {"model": "AMAT"}, "has no model 'AMAT'; it has model"),
        ("two=1", {}, "has several models (model, standard): name one with 'model: ...'"),
        ("nan=1", {}, "accuracy under pgd100 is not a number at level 1, 2"),
        ("", {"objective": 3}, "the objective is level 3, which was not evaluated; there are 0 1 2"),
        ("", {"report": "{folder}/model.json"}, "is not a report of Advmed"),
        ("", {"checkpoint": "{folder}/*.pth"}, "runs/search/delta_1/*.pth, see its log"),
    ],
)
def test_reports_that_will_not_do(
    toy: Callable[..., Path], evaluate: str, more: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy(evaluate=evaluate, space={"delta": [1]}, **more)
    assert search(path) == 1
    out = capsys.readouterr().out
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
@pytest.mark.parametrize("kept", ["storage", "folder"])
def test_another_study_file_is_refused(
    toy: Callable[..., Path], change: dict[str, Any], message: str, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(toy(space={"delta": [1]})) == 0
    before = calls()
    elsewhere = {"folder": "runs/new"} if kept == "storage" else {"storage": "runs/new.log"}
    assert search(toy(space={"delta": [1]}, **elsewhere, **change)) == 1
    error = capsys.readouterr().err
    assert "was begun with another study file" in error and message in error
    assert calls() == before


def test_other_samples_are_refused(toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert search(toy(space={"delta": [1]})) == 0
    Path("runs/search/fewer").touch()
    path = toy(space={"delta": [1, 2, 3]})
    assert search(path) == 1
    error = capsys.readouterr().err
    assert "the report of delta_2 cannot be compared with that of delta_1: samples is '2, hash" in error
    assert "was '3, hash" in error
    assert states(path) == {"delta_1": "COMPLETE", "delta_2": "FAILED"}  # delta_3 was not begun
    Path("runs/search/fewer").unlink()
    assert search(path, "--retry-failed") == 0


def test_another_studys_folder_is_refused(toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert search(toy(space={"delta": [1]})) == 0
    assert search(toy(study="other")) == 1
    assert "the folder runs/search belongs to the study 'toy': take another folder" in capsys.readouterr().err
    Path("runs/search/study.json").write_text("{")
    assert search(toy()) == 1
    assert "study.json is damaged" in capsys.readouterr().err


def test_a_trials_folder_of_another_setting_is_refused(toy: Callable[..., Path], capsys: Any) -> None:
    Path("runs/search/delta_1").mkdir(parents=True)
    Path("runs/search/delta_1/trial.json").write_text('{"setting": {"delta": 7}}')
    assert search(toy(space={"delta": [1]})) == 1
    assert "trial.json is of the setting {'delta': 7}: move the folder away" in capsys.readouterr().out


def test_storages_that_will_not_do(
    toy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(storage: str) -> str:
        assert search(toy(storage=storage, folder=f"runs/{len(list(Path('.').iterdir()))}{hash(storage)}")) == 1
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        return error

    (tmp_path / "text.log").write_text("no journal\n\n")
    assert "cannot use the storage text.log: it is not readable, or no storage of Optuna" in refused("text.log")
    (tmp_path / "json.log").write_text('{"a": 1}\n')
    assert "no storage of Optuna" in refused("json.log")
    (tmp_path / "binary.log").write_bytes(bytes(range(256)))
    assert "no storage of Optuna" in refused("binary.log")
    (tmp_path / "folder.log").mkdir()
    assert "it is not readable" in refused("folder.log")
    (tmp_path / "text.db").write_text("no database" * 100)
    assert "no storage of Optuna" in refused("sqlite:///text.db")
    assert "cannot use the storage nonsense://" in refused("nonsense://")
    error = refused("postgresql://user:secret@nowhere/db")
    assert "secret" not in error
    # Of Optuna, but made by somebody else.
    study = optuna.create_study(study_name="toy", storage="sqlite:///theirs.db")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    assert "the study 'toy' in sqlite:///theirs.db was not made by advmed search" in refused("sqlite:///theirs.db")


def test_a_locked_database(toy: Callable[..., Path], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy(storage="sqlite:///busy.db?timeout=0.1", space={"delta": [1]})
    assert search(path) == 0
    with sqlite3.connect("busy.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert search(path) == 1
        other.execute("ROLLBACK")
    assert "another program has it locked" in capsys.readouterr().err


def test_table_before_the_search(toy: Callable[..., Path], capsys: Any) -> None:
    assert search(toy(), "--table") == 1
    assert "there is no storage runs/search.log: the search has not been started" in capsys.readouterr().err
    optuna.create_study(study_name="theirs", storage="sqlite:///theirs.db")
    assert search(toy(storage="sqlite:///theirs.db"), "--table") == 1
    assert "has no study 'toy'; it has theirs" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_without_optuna(toy: Callable[..., Path], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert search(toy()) == 1
    assert "pip install 'advmed[search]'" in capsys.readouterr().err
    assert search(toy(), "--dry-run") == 0


# Parts


def test_names_of_folders() -> None:
    assert name_of({"delta": 0.5, "eps": 2.0, "on": True}) == "delta_0.5__eps_2__on_true"
    odd, other = name_of({"text": "a/b"}), name_of({"text": "a b"})
    assert odd.startswith("text_a-b-") and other.startswith("text_a-b-") and odd != other
    assert len(name_of({"text": "x" * 500})) < 200


def test_placeholders() -> None:
    assert placeholders("a{b}{{c}} {d}") == ["b", "d"]


def test_a_range_with_a_step_is_a_list(toy: Callable[..., Path]) -> None:
    plan = read_plan(toy(space={"delta": {"low": 0.1, "high": 0.5, "step": 0.1}}))
    assert [point["delta"] for point in plan.grid()] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [p["delta"] for p in read_plan(toy(space={"delta": {"low": 1, "high": 4, "step": 2}})).grid()] == [1, 3]
    assert read_plan(toy(space={"delta": ["1e-3"]})).grid() == [{"delta": 0.001}]


def test_place_tells_processes_of_this_machine() -> None:
    script = "from advmed.search.claim import place; print(place())"
    theirs = subprocess.check_output([sys.executable, "-c", script], text=True, cwd=Path(__file__).parents[2])
    assert theirs.strip() == place()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples" / "search").glob("*.yaml")), ids=str)
def test_examples_are_right(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("advmed.search.plan.program", lambda word: word)  # a host may not be installed
    assert search(path, "--dry-run") == 0
    assert f"advmed search examples/search/{path.name}" in path.read_text().splitlines()[0]
