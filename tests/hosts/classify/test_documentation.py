"""What docs/classify.md and the README tell a user to type, typed: the commands, the code, the examples."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "classify.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGURATIONS = sorted((ROOT / "examples" / "classify").glob("*.yaml"))
SHORTER = ["--model.network.name", "test_resnet", "--model.attack.steps", "1", "--data.init_args.workers", "0"]
TRAINER = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
# Later words win, so that these go behind what is documented.
MORE = {
    "fit": [*SHORTER, *TRAINER, "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"],
    "predict": [*SHORTER, *TRAINER, "--trainer.limit_predict_batches", "2"],
    "evaluate": ["--attacks", "[pgd1]", "--samples", "20", "--examples", "1", "--checks", "2", "--device", "cpu"],
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]
    return [line for line in words if line and line[0] == "adv-classify"]


def run(folder: Path, *words: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([*words], capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    documented = commands(PAGE)
    assert [words[1] for words in documented] == ["fit", "fit", "evaluate", "predict"]
    for words in documented:
        run(tmp_path, str(Path(sys.executable).with_name(words[0])), *words[1:], *MORE[words[1]])
    for norm in ("L2", "Linf"):
        assert (tmp_path / "report" / norm / "report.html").is_file()
    assert list(tmp_path.rglob("predictions.csv"))

    # Where Advmed is not installed: the code of the page, with the names of this run.
    checkpoint = next((tmp_path / "runs" / "dpaat").rglob("best.ckpt"))
    code = next(block for block in blocks(PAGE, "python") if "import timm" in block)
    code = code.replace("best.ckpt", str(checkpoint)).replace(
        '"resnet18", num_classes=7', '"test_resnet", 2, in_chans=1'
    )
    code = code.replace('"test_resnet", 2, in_chans=1', '"test_resnet", num_classes=2, in_chans=1')
    block = "import sys\nfor name in ('adv_classify', 'advmed'):\n    sys.modules[name] = None\n"
    run(tmp_path, sys.executable, "-c", block + code + "print(model(torch.rand(2, 1, 28, 28)).shape)")


def test_the_readme_shows_the_same_commands() -> None:
    assert [words for words in commands(README) if words[1] != "predict"] == commands(PAGE)[:3]


def test_the_loop_of_the_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in blocks(PAGE, "python") if "DPAAT" in block]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    before = model[1].weight.detach().clone()
    known = {
        "loader": [(torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 0, 1]), list("abcd")) for _ in range(2)],
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    }
    exec(compile(code, "docs/classify.md", "exec"), known)
    assert not torch.equal(before, model[1].weight)
    sizes = torch.load("checkpoint.pth")["method"]["margins"]
    assert sorted(sizes["ids"]) == list("abcd")
    assert sizes["visits"] == [2] * 4


@pytest.mark.parametrize("name", ["plain_pytorch", "own_lightning_module"])
def test_the_examples_run(tmp_path: Path, name: str) -> None:
    text = run(tmp_path, sys.executable, str(ROOT / "examples" / "classify" / f"{name}.py"), "--epochs=1", "--steps=1")
    assert 0.5 < float(text.rsplit(":", 1)[1]) <= 1


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_example_configurations_are_understood(path: Path) -> None:
    """Read by the command itself; the names in the table of the page are those of the settings."""
    text = run(
        ROOT, str(Path(sys.executable).with_name("adv-classify")), "fit", "--config", str(path), "--print_config"
    )
    shown = yaml.safe_load(text)
    assert shown["model"]["method"]["name"] == yaml.safe_load(path.read_text())["model"]["method"]["name"]
    for section in ("method", "attack"):
        for name in shown["model"][section]:
            if name not in ("backward", "seed"):
                assert f"`{name}`" in PAGE, f"docs/classify.md does not tell of {section}.{name}"
