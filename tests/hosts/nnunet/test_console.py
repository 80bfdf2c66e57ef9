"""The round that a user makes, through the installed commands: train, kill, continue, predict, thresholds, evaluate."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml

from adv_nnunet.cli import main
from adv_nnunet.settings import Settings
from adv_nnunet.trainer import STATE
from advmed.thresholds import Thresholds, sha256
from advmed.training.settings import read_settings

pytestmark = pytest.mark.slow

EPOCHS, WARM_UP, ITERATIONS, BATCH = 4, 1, 20, 4
SETTINGS = {
    "epochs": EPOCHS,
    "iterations_per_epoch": ITERATIONS,
    "val_iterations_per_epoch": 1,
    "save_every": 1,
    "steps": 3,
    "delta": 0.5,
    "warmup_epochs": WARM_UP,
    "refinement": "crossing",
}
EVALUATE = ["--attacks", "pgd10", "ifgsm3", "--levels", "0", "2", "6", "--samples", "20", "--batch_size", "4"]
EVALUATE += ["--checks", "4"]


ONE_CORE = """
# The host's commands take a thread for every core. On a busy machine threads of so small a network wait for each other
# a thousand times longer than they work.
import os

os.cpu_count = lambda: 1
"""
WITHOUT_US = (
    ONE_CORE
    + """
import pathlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("adv_nnunet", "advmed"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Blocker())
os.environ.pop("nnUNet_extTrainer", None)
pathlib.Path(os.environ["BLOCKED"]).write_text(str(sorted({m.partition(".")[0] for m in sys.modules})))
"""
)


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool], seconds: float = 240) -> None:
    """SIGKILL as soon as ``ready`` says so; then its worker processes, which it cannot end any more itself."""
    deadline = time.monotonic() + seconds
    try:
        while not ready():
            assert process.poll() is None, f"it ended before it could be killed, with status {process.returncode}"
            assert time.monotonic() < deadline, "it never came to where it was to be killed"
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def shell(world: Any, stock_results: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A user's shell: nnU-Net's variables, a results folder with a stock training, and adversarial.yaml in place."""
    root = tmp_path_factory.mktemp("console")
    shutil.copytree(stock_results, root / "results")
    shutil.copytree(world.preprocessed / world.main, root / "preprocessed" / world.main)
    (root / "preprocessed" / world.main / "adversarial.yaml").write_text(yaml.safe_dump(SETTINGS))
    (root / "one_core").mkdir()
    (root / "one_core" / "sitecustomize.py").write_text(ONE_CORE)
    environment = {k: v for k, v in os.environ.items() if k not in ("nnUNet_extTrainer", "nnUNet_adversarial")} | {
        "nnUNet_raw": str(world.raw),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(root / "results"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(root / "one_core"),
    }
    return SimpleNamespace(root=root, environment=environment, results=root / "results" / world.main)


def start(shell: SimpleNamespace, command: list[str], log: str, **environment: str) -> subprocess.Popen[bytes]:
    with (shell.root / f"{log}.log").open("wb") as out:
        return subprocess.Popen(
            command,
            env=shell.environment | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=shell.root,
            start_new_session=True,
        )


def finish(shell: SimpleNamespace, process: subprocess.Popen[bytes], log: str) -> str:
    try:
        status = process.wait(timeout=300)
    finally:
        process.kill()
    text = (shell.root / f"{log}.log").read_text(errors="replace")
    assert status == 0, text[-4000:]
    return text


@pytest.fixture(scope="module")
def trained(shell: SimpleNamespace, console: SimpleNamespace, world: Any) -> SimpleNamespace:
    """An AMAT training, killed in the middle of its third epoch, and continued to its end."""
    command = [*console.train, "4", "2d", "0", "-p", world.plans, "-tr", "nnUNetTrainerAMAT", "-device", "cpu"]
    folder = shell.results / f"nnUNetTrainerAMAT__{world.plans}__2d" / "fold_0"
    # The stock training of this fold must not serve for thresholds here: there is a self-calibrated run to continue.
    hidden = shell.results / "hidden"
    (shell.results / f"nnUNetTrainer__{world.plans}__2d").rename(hidden)

    def in_third_epoch() -> bool:
        logs = [path.read_text() for path in folder.glob("training_log_*.txt")]
        return bool(logs) and "Epoch 2" in logs[0]

    try:
        kill_when(start(shell, command, "train"), in_third_epoch)
        (killed_log,) = (path.read_text() for path in folder.glob("training_log_*.txt"))
        latest = torch.load(folder / "checkpoint_latest.pth", weights_only=False)
        remains = sorted(path.name for path in folder.glob("checkpoint_*"))
        resumed_log = finish(shell, start(shell, [*command, "--c"], "continue"), "continue")
    finally:
        hidden.rename(shell.results / f"nnUNetTrainer__{world.plans}__2d")
    return SimpleNamespace(
        folder=folder, killed_log=killed_log, latest=latest, remains=remains, resumed_log=resumed_log
    )


def test_a_killed_training_continues_and_ends(trained: SimpleNamespace) -> None:
    assert trained.killed_log.count("train_loss") == 2, "the kill was not in the middle of the third epoch"
    assert "checkpoint_latest.pth" in trained.remains
    assert "checkpoint_final.pth" not in trained.remains
    assert trained.latest["current_epoch"] == 2
    assert "Thresholds are self-calibrated" in trained.killed_log
    assert "Epoch 1" not in trained.resumed_log
    assert "Epoch 2" in trained.resumed_log

    final = torch.load(trained.folder / "checkpoint_final.pth", weights_only=False)
    assert final["current_epoch"] == EPOCHS
    assert {name: len(values) for name, values in final["logging"].items()} == dict.fromkeys(final["logging"], EPOCHS)
    for name, values in trained.latest["logging"].items():
        assert np.array_equal(final["logging"][name][:2], values, equal_nan=True), name
    assert final["trainer_name"] == "nnUNetTrainer"
    # Every sample of every adversarial epoch counted once: nothing of the killed half epoch, nothing twice.
    state = final[STATE]["method"]
    assert sum(state["margins"]["visits"]) == (EPOCHS - WARM_UP) * ITERATIONS * BATCH
    assert state["steps_done"] == (EPOCHS - WARM_UP) * ITERATIONS
    assert sum(trained.latest[STATE]["method"]["margins"]["visits"]) == (2 - WARM_UP) * ITERATIONS * BATCH
    assert state["thresholds"]["ceiling"] == trained.latest[STATE]["method"]["thresholds"]["ceiling"]
    for name in ("progress.png", "margins.csv", "adversarial.yaml", "checkpoint_best.pth", "validation/summary.json"):
        assert (trained.folder / name).is_file(), name
    rows = list(csv.DictReader((trained.folder / "margins.csv").open()))
    assert [float(row["margin"]) for row in rows] == pytest.approx(state["margins"]["values"])
    assert "Mean Validation Dice" in trained.resumed_log


def test_prediction_where_our_package_is_not_installed(
    trained: SimpleNamespace, shell: SimpleNamespace, console: SimpleNamespace, world: Any
) -> None:
    images, outputs = shell.root / "images", [shell.root / "with", shell.root / "without"]
    images.mkdir()
    for case in world.cases[6:]:
        shutil.copy(world.raw / world.main / "imagesTr" / f"{case}_0000.nii.gz", images)
    blocker = shell.root / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(WITHOUT_US)
    started = []
    for output in outputs:
        command = [*console.predict, "-i", str(images), "-o", str(output), "-d", "4", "-c", "2d", "-p", world.plans]
        command += ["-tr", "nnUNetTrainerAMAT", "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0"]
        hidden = {"PYTHONPATH": str(blocker), "BLOCKED": str(shell.root / "blocked")} if output == outputs[1] else {}
        started.append((start(shell, command, output.name, **hidden), output.name))
    for process, log in started:
        finish(shell, process, log)
    blocked = (shell.root / "blocked").read_text()
    assert "adv_nnunet" not in blocked
    assert "advmed" not in blocked
    for case in world.cases[6:]:
        masks = [sitk.GetArrayFromImage(sitk.ReadImage(output / f"{case}.nii.gz")) for output in outputs]
        assert np.array_equal(*masks)
        assert masks[0].shape == sitk.GetArrayFromImage(sitk.ReadImage(images / f"{case}_0000.nii.gz")).shape
    check = [sys.executable, "-c", "import adv_nnunet"]
    environment = shell.environment | {"PYTHONPATH": str(blocker), "BLOCKED": str(shell.root / "blocked")}
    refused = subprocess.run(check, env=environment, capture_output=True, text=True, cwd=shell.root)
    assert "is not installed here" in refused.stderr, "the hook hides nothing"


def here(shell: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's shell for a command that runs in this process, to save an import of PyTorch."""
    for name, value in shell.environment.items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


def test_thresholds_from_the_stock_training(
    shell: SimpleNamespace, world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here(shell, monkeypatch)
    before = {path.relative_to(shell.results) for path in shell.results.rglob("*")}
    command = ["thresholds", "-d", "4", "-c", "2d", "-f", "0", "-p", world.plans, "-device", "cpu", "--samples", "60"]
    assert main(command) == 0
    text = capsys.readouterr().out
    fold = shell.results / f"nnUNetTrainer__{world.plans}__2d" / "fold_0"
    new = {path.relative_to(shell.results) for path in shell.results.rglob("*")} - before
    assert new == {(fold / "thresholds.json").relative_to(shell.results)}, "it left something else behind"
    assert os.environ["nnUNet_results"] == shell.environment["nnUNet_results"]
    found = Thresholds.load(fold / "thresholds.json")
    assert found.names == ("ce+dice",)
    assert found.rule == "mean"
    assert found.values == found.mean
    assert found.n == 60
    assert found.source_sha256 == sha256(fold / "checkpoint_final.pth")
    assert f"ce+dice: threshold {found.values[0]:.4f} (mean;" in text
    assert f"Written to {fold / 'thresholds.json'}" in text
    assert "WARNING: this network is poorly trained" in text  # twenty iterations


def test_evaluate_is_killed_and_goes_on_in_two_processes(
    trained: SimpleNamespace,
    shell: SimpleNamespace,
    console: SimpleNamespace,
    world: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stock model and ours in one report; the numbers are those of an evaluation in one go."""
    here(shell, monkeypatch)
    report = shell.root / "report"
    command = ["evaluate", "-d", "4", "-c", "2d", "-f", "0", "-p", world.plans, "-device", "cpu", *EVALUATE]
    command += ["-tr", "nnUNetTrainer", "nnUNetTrainerAMAT", "-o"]
    parts = report / "AMAT" / "parts"
    kill_when(start(shell, [*console.ours, *command, str(report)], "evaluate"), lambda: len([*parts.glob("*.npz")]) > 1)
    assert not (report / "report.json").exists()
    done = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in report.rglob("*.npz")}
    again = [*console.twice, *console.ours, *command, str(report)]
    text = finish(shell, start(shell, again, "evaluate2"), "evaluate2")
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done} == done
    assert text.count(f"Report: {report / 'report.html'}") == 1
    for name in ("STD", "AMAT", "pgd10", "ifgsm3", "ADI", "TVDI", "AUC"):
        assert name in text, name

    whole = shell.root / "whole"
    assert main([*command, str(whole)]) == 0
    assert (whole / "table.csv").read_text() == (report / "table.csv").read_text()
    assert (whole / "samples.csv").read_text() == (report / "samples.csv").read_text()
    for name in ("report.html", "report.json", "curves.png"):
        assert (report / name).stat().st_size > 0
    content, other = (json.loads((folder / "report.json").read_text()) for folder in (report, whole))
    for key in ("results", "checks", "failures", "verdict", "findings"):
        assert content[key] == other[key], key
    assert [check["name"] for check in content["checks"]["STD"] if check["verdict"] == "not measured"] == []
    assert "nnUNetTrainerAMAT__" in json.dumps(content)
    assert str(shell.root) not in (report / "report.html").read_text(), "the report tells where the user keeps things"


def test_evaluate_raw_files(
    shell: SimpleNamespace, world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raw files of the validation cases give the numbers of the validation cases."""
    here(shell, monkeypatch)
    images, labels = shell.root / "raw_images", shell.root / "raw_labels"
    for folder, part, ending in ((images, "imagesTr", "_0000.nii.gz"), (labels, "labelsTr", ".nii.gz")):
        folder.mkdir()
        for case in world.cases[6:]:
            shutil.copy(world.raw / world.main / part / f"{case}{ending}", folder)
    model = shell.results / f"nnUNetTrainer__{world.plans}__2d"
    command = ["evaluate", "-d", "4", "-c", "2d", "-m", f"mine={model}", "-device", "cpu", "--attacks", "ifgsm2"]
    command += ["--levels", "0", "3", "--samples", "6", "--examples", "1", "--checks", "0"]
    raw, validation = shell.root / "of_raw", shell.root / "of_validation"
    assert main([*command, "-i", str(images), "-l", str(labels), "-o", str(raw)]) == 0
    assert main([*command, "-o", str(validation)]) == 0
    assert (raw / "samples.csv").read_text() == (validation / "samples.csv").read_text()
    assert "mine" in capsys.readouterr().out


def test_settings_make_a_round_trip(console: SimpleNamespace, tmp_path: Path) -> None:
    done = subprocess.run([*console.ours, "settings"], capture_output=True, text=True, cwd=tmp_path, check=True)
    path = tmp_path / "adversarial.yaml"
    path.write_text(done.stdout)
    assert read_settings(Settings, path) == Settings()
    assert done.stderr == ""
