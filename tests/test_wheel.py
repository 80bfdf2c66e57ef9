"""What the pages promise of the wheel, typed in an empty folder of an environment that has no clone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.hosts import ROOT
from helpers.wheel import build_wheel, install

OURS = ("advmed", "adv_nnunet", "adv_yolo", "adv_classify", "adv_landmark")
SHORT = ("--trainer.max_epochs", 2, "--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 1)
CPU = ("--trainer.accelerator", "cpu", "--trainer.devices", 1, "--data.init_args.workers", 0, "--model.attack.steps", 1)
FEW = ("--attacks", "[pgd1]", "--samples", 4, "--examples", 1, "--checks", 0, "--device", "cpu", "--norm", "[2]")


@pytest.mark.slow
def test_everything_can_be_typed_in_from_the_wheel(tmp_path: Path) -> None:
    user = install(build_wheel(tmp_path), tmp_path / "user")
    where = user.run("python", "-c", f"import {', '.join(OURS)}; print({', '.join(f'{n}.__file__' for n in OURS)})")
    assert all(Path(path).is_relative_to(user.folder) for path in where.split()), where

    doctor = user.run("advmed", "doctor")
    assert "Nothing is broken." in doctor and f"{user.folder}/lib" in doctor
    assert doctor.count("works") == len(OURS)
    assert "a wheel holds none" in user.run("advmed", "zoo", status=1)

    pages = set()
    for command in ("advmed", "adv-nnunet", "adv-yolo", "adv-classify", "adv-landmark"):
        said = user.run(command, "--help")
        pages |= set(re.findall(r"\S+/docs/\S+\.md", said))
        if command != "advmed":
            said = user.run(command, "init")
            pages |= set(re.findall(r"\S+/docs/\S+\.md", said))
            assert ("in a clone of Advmed's repository" in said) == (command != "adv-nnunet")
    names = {Path(page).name for page in pages}
    assert names == {"index.md", "search.md", "nnunet.md", "yolo.md", "classify.md", "landmark.md"}
    assert all(Path(page).is_file() and Path(page).is_relative_to(user.folder) for page in pages), pages

    data = ROOT / "examples" / "data"
    network = ("--model.network.encoder", "tu-test_resnet", "--model.network.decoder_channels", "[16,16,8,8,8]")
    points = ("--config", "table.yaml", "--data.init_args.root", data / "hippocampus_landmarks", *network)
    user.run("adv-landmark", "fit", *points, *SHORT, *CPU, "--trainer.default_root_dir", "landmarks")
    images = ("--data.init_args.file", data / "pneumoniamnist" / "pneumoniamnist.npz", "--model.network.name")
    given = ("--config", "pneumoniamnist.yaml", *images, "test_resnet")
    user.run("adv-classify", "fit", *given, *SHORT, *CPU, "--trainer.default_root_dir", "images")
    for command, run in (("adv-landmark", "landmarks"), ("adv-classify", "images")):
        (checkpoint,) = (user.work / run).rglob("best.ckpt")
        user.run(command, "evaluate", checkpoint, "--levels", "[0,0.5]", *FEW, "--out", f"{run}/report")
        assert list((user.work / run / "report").rglob("report.html"))
