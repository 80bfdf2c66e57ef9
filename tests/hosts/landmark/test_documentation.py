"""What docs/landmark.md and the README tell a user to type, typed: the commands, the code, the examples."""

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
PAGE = (ROOT / "docs" / "landmark.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGURATIONS = sorted((ROOT / "examples" / "landmark").glob("*.yaml"))
NETWORK = {"encoder": "tu-test_resnet", "decoder_channels": [16, 16, 8, 8, 8]}
SHORTER = ["--model.network.encoder", NETWORK["encoder"], "--model.network.decoder_channels", "[16,16,8,8,8]"]
SHORTER += ["--model.attack.steps", "1", "--data.init_args.workers", "0"]
TRAINER = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
# Later words win, so that these go behind what is documented.
MORE = {
    "fit": [*SHORTER, *TRAINER, "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"],
    "predict": [*SHORTER, *TRAINER, "--trainer.limit_predict_batches", "1"],
    "evaluate": ["--attacks", "[pgd1]", "--samples", "6", "--examples", "1", "--checks", "2", "--device", "cpu"],
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]
    return [line for line in words if line and line[0] == "adv-landmark"]


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
    assert (tmp_path / "report" / "L2" / "report.html").is_file()
    assert list(tmp_path.rglob("predictions.csv"))
    assert list(tmp_path.rglob("overlays/*.png"))

    # Where Advmed is not installed: the code of the page, with the names of this run.
    checkpoint = next((tmp_path / "runs" / "amat").rglob("best.ckpt"))
    (code,) = [block for block in blocks(PAGE, "python") if "import segmentation_models_pytorch" in block]
    documented_model = 'smp.Unet("vgg19", encoder_weights=None, in_channels=3, classes=3 * 19)'
    assert documented_model in code
    own = 'smp.Unet("tu-test_resnet", encoder_weights=None, in_channels=1, classes=12, decoder_channels=(16,16,8,8,8))'
    code = code.replace("best.ckpt", str(checkpoint)).replace(documented_model, own)
    block = "import sys\nfor name in ('adv_landmark', 'advmed'):\n    sys.modules[name] = None\n"
    end = "print(tuple(model.eval()(torch.rand(2, 1, 32, 64)).shape))"
    assert "(2, 12, 32, 64)" in run(tmp_path, sys.executable, "-c", block + code + end)


def test_the_readme_shows_the_same_commands() -> None:
    assert commands(README) == commands(PAGE)[:3]


def test_the_loop_of_the_page_trains() -> None:
    (code,) = [block for block in blocks(PAGE, "python") if "AMAT(" in block]
    model = torch.nn.Conv2d(3, 6, 3, padding=1)
    before = model.weight.detach().clone()
    batch = (torch.rand(4, 3, 24, 32) * 2 - 1, torch.rand(4, 2, 2) * 20, list("abcd"))
    known = {"loader": [batch, batch], "model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    exec(compile(code.replace("steps=20", "steps=2"), "docs/landmark.md", "exec"), known)
    assert not torch.equal(model.weight, before)
    assert known["found"].shape == (4, 2, 2)
    assert known["confidence"].shape == (4, 2)
    assert known["method"].margins.get(list("abcd")).min() > 0


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_example_configurations_are_understood(path: Path) -> None:
    """Read by the command itself."""
    command = str(Path(sys.executable).with_name("adv-landmark"))
    shown = yaml.safe_load(run(ROOT, command, "fit", "--config", str(path), "--print_config"))
    wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert shown["model"]["method"]["name"] == wanted["model"]["method"]["name"]
    assert shown["data"]["class_path"] == wanted["data"]["class_path"]
    assert shown["data"]["init_args"].keys() >= wanted["data"]["init_args"].keys()
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# adv-landmark fit --config examples/landmark/{path.name}")


def test_every_setting_of_the_page_is_real() -> None:
    from adv_landmark.module import RobustLandmarks

    (text,) = [block for block in blocks(PAGE, "yaml") if block.startswith("model:")]
    content = yaml.safe_load(text)
    model = dict(content["model"])
    sections = {name: kind(**model.pop(name)) for name, kind in RobustLandmarks.sections.items() if name != "network"}
    network = RobustLandmarks.sections["network"](**{**model.pop("network"), **NETWORK})
    RobustLandmarks(network, **sections, **model, landmark_names=["a"], channels=1, size=(200, 160))
    assert content["checkpoint"]["monitor"] == "val/robust_MRE"
