"""What the pages of both hosts and the README tell a user to type, typed: the commands, the code, the examples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adv_landmark.module import RobustLandmarks
from helpers import pages
from helpers.hosts import ROOT, blocks

EXAMPLES = ROOT / "examples"
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("classify", "landmark")}
NETWORK = {"encoder": "tu-test_resnet", "decoder_channels": [16, 16, 8, 8, 8]}


@pytest.mark.slow
def test_the_commands_of_the_classifiers_work(tmp_path: Path) -> None:
    page = PAGES["classify"]
    pages.type_commands(tmp_path, page, "adv-classify", ["--model.network.name", "test_resnet"], 20)
    assert {path.parent.name for path in (tmp_path / "report").rglob("report.html")} == {"L2", "Linf"}
    checkpoint = next((tmp_path / "runs" / "chest" / "dpaat").rglob("best.ckpt"))
    replaced = {"best.ckpt": str(checkpoint), '"resnet18", num_classes=7': '"test_resnet", num_classes=2, in_chans=1'}
    end = "print(model(torch.rand(2, 1, 28, 28)).shape)"
    pages.run_without_us(tmp_path, pages.block(page, "python", "import timm"), replaced, end)


@pytest.mark.slow
def test_the_commands_of_the_landmarks_work(tmp_path: Path) -> None:
    page = PAGES["landmark"]
    words = [word for name, value in NETWORK.items() for word in (f"--model.network.{name}", str(value))]
    pages.type_commands(tmp_path, page, "adv-landmark", words, 6)
    assert {path.parent.name for path in (tmp_path / "report").rglob("report.html")} == {"L2"}
    assert list(tmp_path.rglob("overlays/*.png"))
    own = 'smp.Unet("tu-test_resnet", encoder_weights=None, in_channels=1, classes=12, decoder_channels=(16,16,8,8,8))'
    replaced = {
        "best.ckpt": str(next((tmp_path / "runs" / "landmarks" / "amat").rglob("best.ckpt"))),
        'smp.Unet("vgg19", encoder_weights=None, in_channels=3, classes=3 * 19)': own,
    }
    end = "print(tuple(model.eval()(torch.rand(2, 1, 32, 64)).shape))"
    code = pages.block(page, "python", "import segmentation_models_pytorch")
    assert "(2, 12, 32, 64)" in pages.run_without_us(tmp_path, code, replaced, end)


@pytest.mark.parametrize(
    ("page", "part", "images", "targets", "model"),
    [
        (
            *("classify", "DPAAT", torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 0, 1])),
            lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)),
        ),
        (
            *("landmark", "AMAT(", torch.rand(4, 3, 24, 32) * 2 - 1, torch.rand(4, 2, 2) * 20),
            lambda: torch.nn.Conv2d(3, 6, 3, padding=1),
        ),
    ],
    ids=PAGES,
)
def test_the_loops_of_the_pages_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, part: str, images: Any, targets: Any, model: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    network, ids = model(), list("abcd")
    before = [parameter.detach().clone() for parameter in network.parameters()]
    known = {"loader": [(images, targets, ids)] * 2, "model": network}
    known["optimizer"] = torch.optim.SGD(network.parameters(), 0.1)
    code = pages.block(PAGES[page], "python", part).replace("steps=20", "steps=2")
    exec(compile(code, f"docs/{page}.md", "exec"), known)
    assert not any(map(torch.equal, before, network.parameters()))
    if page == "classify":
        sizes = torch.load("checkpoint.pth")["method"]["margins"]
        assert sorted(sizes["ids"]) == ids
        assert sizes["visits"] == [2] * 4
    else:
        assert (known["found"].shape, known["confidence"].shape) == ((4, 2, 2), (4, 2))
        assert known["method"].margins.get(ids).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_pytorch", "own_lightning_module"])
def test_the_examples_run(tmp_path: Path, name: str) -> None:
    text = pages.run(tmp_path, sys.executable, EXAMPLES / "classify" / f"{name}.py", "--epochs=1", "--steps=1")
    assert 0.5 < float(text.rsplit(":", 1)[1]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    sorted(p for name in PAGES for p in (EXAMPLES / name).glob("*.yaml")),
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_the_example_configurations_are_understood(path: Path) -> None:
    """The names in the table of the classifiers' page are those of the settings."""
    shown = pages.check_configuration(path, f"adv-{path.parent.name}")
    if path.parent.name == "classify":
        told = {name for section in ("method", "attack") for name in shown[section]} - {"backward", "seed"}
        assert {name for name in told if f"`{name}`" not in PAGES["classify"]} == set()


def test_every_setting_of_the_page_of_landmarks_is_real() -> None:
    (text,) = [block for block in blocks(PAGES["landmark"], "yaml") if block.startswith("model:")]
    content = yaml.safe_load(text)
    model = dict(content["model"])
    sections = {name: kind(**model.pop(name)) for name, kind in RobustLandmarks.sections.items() if name != "network"}
    network = RobustLandmarks.sections["network"](**{**model.pop("network"), **NETWORK})
    RobustLandmarks(network, **sections, **model, landmark_names=["a"], channels=1, size=(200, 160))
    assert content["checkpoint"]["monitor"] == "val/robust_MRE"
