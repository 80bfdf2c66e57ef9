"""What docs/yolo.md and the README tell a user to type, typed: the commands in their order, then the code."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.hosts import ROOT, blocks, commands
from helpers.pages import README, run

PAGE = (ROOT / "docs" / "yolo.md").read_text(encoding="utf-8")
TRAINING = ["epochs=1", "imgsz=64", "batch=4", "device=cpu", "workers=0", "plots=False", "amp=False"]
SHORTER = {
    # Later words win, so that these go behind what is documented.
    "settings": [],
    "detect": TRAINING,
    "thresholds": ["imgsz=64", "device=cpu"],
    "evaluate": ["attacks=pgd1", "levels=0,5", "examples=1", "checks=0", "device=cpu"],
}
TYPED = """
# The commands of the console scripts, and the code, in one process that imports the host once.
import json, sys
import torch
from ultralytics.cfg import entrypoint
from adv_yolo import calibration
from adv_yolo.cli import main

torch.set_num_threads(1)
calibration.UNTRAINED = 0.0  # an epoch of eight images
for sys.argv[:] in json.loads(sys.argv[1]):  # the host keeps this list
    assert not {"yolo": entrypoint, "adv-yolo": main}[sys.argv[0]](), sys.argv
exec(open("page.py").read())
"""


@pytest.mark.slow
def test_the_commands_and_the_code_of_the_page_work(
    data: Any, batch: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "cells.yaml").rename(tmp_path / "data.yaml")
    monkeypatch.chdir(tmp_path)
    documented = commands(PAGE, "yolo", "adv-yolo")
    assert [words[1] for words in documented] == ["settings", "detect", "detect", "evaluate"]

    python = blocks(PAGE, "python")
    assert len(python) == 3
    torch.save(batch, "batch.pt")
    pairs = [word.split("=") for word in TRAINING] + [["epochs", "2"]]  # self-calibration needs one
    arguments = ", ".join(f"{key}={value!r}" for key, value in dict(pairs).items())
    python[0] = python[0].replace("imgsz=320", re.sub(r"'(\d+|True|False)'", r"\1", arguments))
    python[1] = "import shutil\nshutil.copy('runs/detect/amat/weights/best.pt', 'best.pt')\n" + python[1]
    python[1] = "import torch\nbatch = torch.load('batch.pt')\n" + python[1]
    python[2] = python[2].replace("steps=20", "steps=2")
    python.append("torch.save([losses.detach(), result.images - images, result.norms], 'found.pt')\n")
    Path("page.py").write_text("\n".join(python))

    # As outside of a test: the host has a place of its own for the runs of tests.
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "settings"))
    run(tmp_path, sys.executable, "-c", TYPED, json.dumps([[*words, *SHORTER[words[1]]] for words in documented]))
    assert Path("runs/evaluate/report.html").is_file()
    assert Path("runs/detect/train/weights/best.pt").is_file()
    losses, noise, norms = torch.load("found.pt")
    assert losses.shape == (4, 3)
    assert losses.isfinite().all()
    assert torch.equal(noise.flatten(1).abs().amax(1), norms)
    assert (norms <= 4 / 255 + 1e-6).all()  # 0 where a network that has learnt nothing has no worse image


def test_the_readme_shows_the_same_commands() -> None:
    assert commands(README, "yolo", "adv-yolo") == commands(PAGE, "yolo", "adv-yolo")
