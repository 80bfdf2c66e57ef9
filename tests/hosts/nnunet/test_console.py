"""The round that a user makes, through the installed commands: train, kill, continue, predict, thresholds, evaluate."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import time
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
from advmed.files import clickable, sha256
from advmed.thresholds import Thresholds
from advmed.training.settings import read_settings
from helpers.hosts import BLOCKER, margins_of

pytestmark = pytest.mark.slow

SCRIPTS = Path(sysconfig.get_path("scripts"))
EPOCHS, WARM_UP, ITERATIONS, BATCH = 4, 1, 10, 4
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
SAME = ["-d", "4", "-c", "2d", "-p", "tiny", "-f", "0", "-device", "cpu"]
EVALUATE = ["evaluate", *SAME, "--attacks", "pgd2", "--levels", "0", "4", "--samples", "8"]
EVALUATE += ["--batch_size", "4", "--checks", "2", "-tr", "nnUNetTrainer", "nnUNetTrainerAMAT", "-o"]
ONE_CORE = """
# The host's commands take a thread for every core. On a busy machine threads of so small a network wait for each other
# a thousand times longer than they work.
import os

os.cpu_count = lambda: 1
"""
WITHOUT_US = """
import pathlib

os.environ.pop("nnUNet_extTrainer", None)
try:
    import adv_nnunet
except ModuleNotFoundError:
    pathlib.Path(os.environ["BLOCKED"]).touch()
"""


class Shell:
    """A user's shell: nnU-Net's variables, a results folder with a stock training, and adversarial.yaml in place."""

    def __init__(self, root: Path, world: Any, stock: Path) -> None:
        self.root, data = root, world.dataset("main")
        self.results = root / "results" / data
        self.stock = self.results / stock.name
        shutil.copytree(stock, self.stock)
        shutil.copytree(world.preprocessed / data, root / "preprocessed" / data)
        (root / "preprocessed" / data / "adversarial.yaml").write_text(yaml.safe_dump(SETTINGS))
        for folder, code in (("one_core", ONE_CORE), ("blocker", ONE_CORE + BLOCKER + WITHOUT_US)):
            (root / folder).mkdir()
            (root / folder / "sitecustomize.py").write_text(code)
        self.variables = world.variables(root / "results") | {
            "nnUNet_preprocessed": str(root / "preprocessed"),
            "nnUNet_n_proc_DA": "1",
        }
        self.environment = os.environ | self.variables
        for name in ("nnUNet_extTrainer", "nnUNet_adversarial", "nnUNet_compile"):
            self.environment.pop(name, None)
        self.environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.environment["PYTHONPATH"] = str(root / "one_core")

    def start(self, log: str, *words: Any, **environment: str) -> subprocess.Popen[bytes]:
        """Starts an installed command of Python."""
        command, *rest = words
        with (self.root / f"{log}.log").open("wb") as out:
            return subprocess.Popen(
                [str(word) for word in (SCRIPTS / command, *rest)],
                env=self.environment | environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                start_new_session=True,
            )

    def finish(self, log: str, process: subprocess.Popen[bytes]) -> str:
        try:
            status = process.wait(timeout=300)
        finally:
            process.kill()
        text = (self.root / f"{log}.log").read_text(errors="replace")
        assert status == 0, text[-4000:]
        return text

    def here(self, patch: pytest.MonkeyPatch) -> None:
        """For a command that runs in this process, to save an import of PyTorch."""
        for name, value in self.variables.items():
            patch.setenv(name, value)


@pytest.fixture(scope="module")
def shell(world: Any, stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("console"), world, stock)


@pytest.fixture(scope="module")
def trained(shell: Shell) -> SimpleNamespace:
    """An AMAT training, killed in the middle of its third epoch, and continued to its end."""
    command = ["nnUNetv2_train", "4", "2d", "0", "-p", "tiny", "-tr", "nnUNetTrainerAMAT", "-device", "cpu"]
    folder = shell.results / "nnUNetTrainerAMAT__tiny__2d" / "fold_0"
    # The stock training of this fold must not serve for thresholds here: there is a self-calibrated run to continue.
    hidden = shell.stock.rename(shell.root / "hidden")
    process, deadline = shell.start("train", *command), time.monotonic() + 240
    try:
        while not any("Epoch 2" in path.read_text() for path in folder.glob("training_log_*.txt")):
            assert process.poll() is None, (shell.root / "train.log").read_text()[-4000:]
            assert time.monotonic() < deadline, "it never came to where it was to be killed"
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        (killed_log,) = (path.read_text() for path in folder.glob("training_log_*.txt"))
        latest = torch.load(folder / "checkpoint_latest.pth", weights_only=False)
        remains = sorted(path.name for path in folder.glob("checkpoint_*"))
        resumed_log = shell.finish("continue", shell.start("continue", *command, "--c"))
    finally:
        with contextlib.suppress(ProcessLookupError):  # worker processes, which it could not end any more itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        hidden.rename(shell.stock)
    found = {"folder": folder, "killed_log": killed_log, "resumed_log": resumed_log}
    return SimpleNamespace(**found, latest=latest, remains=remains)


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
    # Every sample of every adversarial epoch counted once: nothing of the killed half epoch, nothing twice.
    state, before = (checkpoint[STATE]["method"] for checkpoint in (final, trained.latest))
    assert sum(state["margins"]["visits"]) == (EPOCHS - WARM_UP) * ITERATIONS * BATCH
    assert state["steps_done"] == (EPOCHS - WARM_UP) * ITERATIONS
    assert sum(before["margins"]["visits"]) == (2 - WARM_UP) * ITERATIONS * BATCH
    assert state["thresholds"]["ceiling"] == before["thresholds"]["ceiling"]
    for name in ("adversarial.yaml", "checkpoint_best.pth", "validation/summary.json"):
        assert (trained.folder / name).is_file(), name
    assert (trained.folder / "progress.png").stat().st_size > 10_000
    assert list(margins_of(trained.folder / "margins.csv").values()) == pytest.approx(state["margins"]["values"])
    assert "Mean Validation Dice" in trained.resumed_log


@pytest.mark.usefixtures("trained")
def test_prediction_where_our_package_is_not_installed(shell: Shell, world: Any) -> None:
    images, output, blocked = (shell.root / name for name in ("images", "predicted", "blocked"))
    images.mkdir()
    for case in world.cases[6:]:
        shutil.copy(world.raw / shell.results.name / "imagesTr" / f"{case}_0000.nii.gz", images)
    words = ["-i", images, "-o", output, *SAME, "-tr", "nnUNetTrainerAMAT", "-npp", "0", "-nps", "0"]
    hidden = {"PYTHONPATH": str(shell.root / "blocker"), "BLOCKED": str(blocked)}
    shell.finish("predict", shell.start("predict", "nnUNetv2_predict", *words, **hidden))
    assert blocked.exists(), "the hook hides nothing"
    for case in world.cases[6:]:
        found = sitk.GetArrayFromImage(sitk.ReadImage(output / f"{case}.nii.gz"))
        assert found.shape == sitk.GetArrayFromImage(sitk.ReadImage(images / f"{case}_0000.nii.gz")).shape


def test_thresholds_from_the_stock_training(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.here(monkeypatch)
    before = set(shell.results.rglob("*"))
    assert main(["thresholds", *SAME, "--samples", "60"]) == 0
    text, fold = capsys.readouterr().out, shell.stock / "fold_0"
    assert set(shell.results.rglob("*")) - before == {fold / "thresholds.json"}, "it left something else behind"
    assert os.environ["nnUNet_results"] == shell.environment["nnUNet_results"]
    found = Thresholds.load(fold / "thresholds.json")
    assert (found.names, found.rule, found.n) == (("ce+dice",), "mean+2std", 60)
    assert found.values == pytest.approx([found.mean[0] + 2 * found.std[0]])
    assert found.source_sha256 == sha256(fold / "checkpoint_final.pth")
    assert f"ce+dice: threshold {found.values[0]:.4f} (mean+2std;" in text
    assert f"Written to {fold / 'thresholds.json'}" in text
    assert "WARNING: this network is poorly trained" in text  # twenty iterations


@pytest.mark.usefixtures("trained", "undrawn")
def test_evaluate_in_two_processes(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stock model and ours in one report; the numbers are those of an evaluation in one process."""
    shell.here(monkeypatch)
    report, whole = shell.root / "report", shell.root / "whole"
    twice = ["torchrun", "--nproc-per-node", "2", "--no-python", SCRIPTS / "adv-nnunet", *EVALUATE, report]
    text = shell.finish("evaluate", shell.start("evaluate", *twice))
    assert text.count(f"Report: {clickable(report / 'report.html')}") == 1
    for name in ("STD", "AMAT", "pgd2", "ADI", "TVDI", "AUC"):
        assert name in text, name
    assert main([*EVALUATE, str(whole)]) == 0
    for name in ("table.csv", "samples.csv"):
        assert (whole / name).read_text() == (report / name).read_text()
    assert (report / "curves.png").stat().st_size > 0
    content, other = (json.loads((folder / "report.json").read_text()) for folder in (report, whole))
    for key in ("results", "checks", "failures", "verdict", "findings"):
        assert content[key] == other[key], key
    assert "nnUNetTrainerAMAT__" in json.dumps(content)
    assert str(shell.root) not in (report / "report.html").read_text(), "the report tells where the user keeps things"


def test_settings_make_a_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "adversarial.yaml"
    assert main(["settings"]) == 0
    path.write_text(capsys.readouterr().out)
    assert read_settings(Settings, path) == Settings()
