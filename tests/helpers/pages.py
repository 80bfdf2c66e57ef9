"""What the page of a host on Lightning and the README tell a user to type, typed: commands, code, configurations."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import chdir, redirect_stdout, suppress
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from advmed.testing.lightning import LightningHost, unchanged_process
from helpers.hosts import ROOT, blocks, commands

README = (ROOT / "README.md").read_text(encoding="utf-8")


def write_images(folder: Path) -> None:
    """Folders of images as a user of classifiers has them: two classes, coloured noise with and without a square."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("plain", "square"):
            (folder / split / kind).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 200, (32, 40, 3), np.uint8)
                pixels[8:24, 8:24] += np.uint8(55 * (kind == "square"))
                Image.fromarray(pixels).save(folder / split / kind / f"{number}.png")


def block(text: str, language: str, part: str) -> str:
    """The one code block with such a part."""
    (found,) = [code for code in blocks(text, language) if part in code]
    return found


def run(folder: Path, *words: object) -> str:
    """Runs a command that must succeed, in a process of its own and as in an active environment; what it prints."""
    given = [str(word) for word in words]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PATH": path}
    done = subprocess.run(given, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(folder: Path, code: str, *flags: str) -> str:
    """What code prints in an interpreter of its own."""
    return run(folder, sys.executable, *flags, "-c", code).strip()


def type_commands(folder: Path, page: str, host: LightningHost, network: Sequence[str], samples: int) -> None:
    """Runs what a page tells to type, shorter and with a small network, in this process; the folder holds the data."""
    name = host.module.command
    (script,) = entry_points(group="console_scripts", name=name)
    assert script.value == host.entry
    documented = commands(page, name)
    assert [words[1] for words in documented] == ["init", "fit", "fit", "evaluate", "predict"]
    short = [*network, "--model.attack.steps", "1", "--data.init_args.workers", "0", "--trainer.max_epochs", "1"]
    short += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    few = ["--attacks", "[pgd1]", "--samples", str(samples), "--examples", "1", "--checks", "2", "--device", "cpu"]
    more = {  # later words win, so that these go behind what is documented
        "init": [],
        "fit": [*short, "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"],
        "predict": [*short, "--trainer.limit_predict_batches", "2"],
        "evaluate": few,
    }
    with chdir(folder):
        for _, *words in documented:
            host.ok(*words, *more[words[0]])
    assert list(folder.rglob("predictions.csv"))
    readme = [words for words in commands(README, name) if words[1] != "predict"]
    assert readme == documented[:4]


def run_without_us(folder: Path, code: str, replaced: Mapping[str, str], end: str) -> str:
    """Runs code of a page where our packages cannot be imported, with the names of this run."""
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    hidden = "import sys\nfor name in ('adv_classify', 'adv_landmark', 'advmed'):\n    sys.modules[name] = None\n"
    return python(folder, hidden + code + end)


def check_configuration(path: Path, host: LightningHost) -> dict[str, object]:
    """A configuration of ours is read by the command itself as it is written; returns what is made of it."""
    text = path.read_text(encoding="utf-8")
    wanted = yaml.safe_load(text)
    printed = io.StringIO()
    with chdir(ROOT), unchanged_process(), redirect_stdout(printed), suppress(SystemExit):
        host.main(["fit", "--config", path, "--print_config"])
    shown = yaml.safe_load(printed.getvalue())
    assert shown["model"]["method"]["name"] == wanted["model"]["method"]["name"]
    assert shown["data"]["class_path"] == wanted["data"]["class_path"]
    assert shown["data"]["init_args"].keys() >= wanted["data"]["init_args"].keys()
    assert text.startswith(f"# {host.module.command} fit --config {path.name}")
    found: dict[str, dict[str, object]] = shown["model"]
    return found
