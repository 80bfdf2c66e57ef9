"""What the page of a host on Lightning and the README tell a user to type, typed: commands, code, configurations."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from helpers.hosts import ROOT, blocks, commands

README = (ROOT / "README.md").read_text(encoding="utf-8")
TYPED = """
import json, sys
from importlib.metadata import entry_points

for sys.argv[:] in json.loads(sys.argv[1]):
    (script,) = entry_points(group="console_scripts", name=sys.argv[0])
    assert not script.load()(), sys.argv
"""
"""Commands one after the other, in one process that imports the host once."""


def block(text: str, language: str, part: str) -> str:
    """The one code block with such a part."""
    (found,) = [code for code in blocks(text, language) if part in code]
    return found


def run(folder: Path, *words: object) -> str:
    """Runs a command that must succeed; returns what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(folder: Path, code: str, *flags: str) -> str:
    """What code prints in an interpreter of its own."""
    return run(folder, sys.executable, *flags, "-c", code).strip()


def type_commands(folder: Path, page: str, name: str, network: Sequence[str], samples: int) -> None:
    """Runs what a page tells to type, shorter and with a small network."""
    (folder / "examples").symlink_to(ROOT / "examples")
    documented = commands(page, name)
    assert [words[1] for words in documented] == ["fit", "fit", "evaluate", "predict"]
    short = [*network, "--model.attack.steps", "1", "--data.init_args.workers", "0", "--trainer.max_epochs", "1"]
    short += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    few = ["--attacks", "[pgd1]", "--samples", str(samples), "--examples", "1", "--checks", "2", "--device", "cpu"]
    more = {  # later words win, so that these go behind what is documented
        "fit": [*short, "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"],
        "predict": [*short, "--trainer.limit_predict_batches", "2"],
        "evaluate": few,
    }
    run(folder, sys.executable, "-c", TYPED, json.dumps([[*words, *more[words[1]]] for words in documented]))
    assert list(folder.rglob("predictions.csv"))
    readme = [words for words in commands(README, name) if words[1] != "predict"]
    assert readme == documented[:3]


def run_without_us(folder: Path, code: str, replaced: Mapping[str, str], end: str) -> str:
    """Runs code of a page where our packages cannot be imported, with the names of this run."""
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    hidden = "import sys\nfor name in ('adv_classify', 'adv_landmark', 'advmed'):\n    sys.modules[name] = None\n"
    return python(folder, hidden + code + end)


def check_configuration(path: Path, name: str) -> dict[str, object]:
    """An example configuration is read by the command itself as it is written; returns what is made of it."""
    text = path.read_text(encoding="utf-8")
    wanted = yaml.safe_load(text)
    (script,) = entry_points(group="console_scripts", name=name)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out, suppress(SystemExit):
        patch.setattr(sys, "argv", [name, "fit", "--config", str(path), "--print_config"])
        script.load()()
    shown: dict[str, dict[str, dict[str, object]]] = yaml.safe_load(out.getvalue())
    assert shown["model"]["method"]["name"] == wanted["model"]["method"]["name"]
    assert shown["data"]["class_path"] == wanted["data"]["class_path"]
    assert shown["data"]["init_args"].keys() >= wanted["data"]["init_args"].keys()
    assert text.startswith(f"# {name} fit --config {path.relative_to(ROOT)}")
    return shown["model"]
