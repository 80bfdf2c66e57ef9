"""What the pages of both hosts and the README tell a user to type, typed: the commands, the code, the examples."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adv_landmark.module import RobustLandmarks
from advmed.integrations.lightning.calibration import Judgement
from advmed.testing.lightning import LightningHost, unchanged_process
from helpers import pages
from helpers.hosts import ROOT, blocks

EXAMPLES = ROOT / "examples"
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("classify", "landmark")}
NETWORK = {"encoder": "tu-test_resnet", "decoder_channels": [16, 16, 8, 8, 8]}
TYPED: dict[str, tuple[Any, ...]] = {
    "classify": (
        *({"name": "test_resnet"}, {"L2", "Linf"}, "import timm"),
        *('"resnet18", num_classes=7', '"test_resnet", num_classes=2', ("2, 3, 128, 128", "(2, 2)")),
    ),
    "landmark": (
        *(NETWORK, {"L2"}, "import segmentation_models_pytorch"),
        'smp.Unet(\n    "vgg19_bn",\n    encoder_weights=None,\n    in_channels=3,\n    classes=3 * 19,\n)',
        'smp.Unet("tu-test_resnet", encoder_weights=None, in_channels=1, classes=12, decoder_channels=(16,16,8,8,8))',
        ("2, 1, 32, 64", "(2, 12, 32, 64)"),
    ),
}
"""The network of a page's commands, the norms of its report, and what its code without us is made to do here."""


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_commands_of_a_page_work(host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the network of a checkpoint, where nothing of ours is installed."""
    # In so few steps a standard network learns too little for thresholds.
    monkeypatch.setattr(host.module, "judge", lambda *_: Judgement("quality", 1.0, "of a test", False, False))
    name = host.module.command.removeprefix("adv-")
    network, norms, imported, stock, own, shape = TYPED[name]
    pages.write_images(tmp_path / "images")
    (tmp_path / "landmarks").symlink_to(EXAMPLES / "data" / "hippocampus_landmarks")
    words = [word for option, value in network.items() for word in (f"--model.network.{option}", str(value))]
    pages.type_commands(tmp_path, PAGES[name], host, words, 6)
    assert {path.parent.name for path in (tmp_path / "runs").glob("*/report/*/report.html")} == norms
    assert bool(list(tmp_path.rglob("overlays/*.png"))) == (name == "landmark")
    checkpoint = str(next((tmp_path / "runs").rglob("best.ckpt")))
    code = pages.block(PAGES[name], "python", imported)
    end = f"print(tuple(model.eval()(torch.rand({shape[0]})).shape))"
    assert shape[1] in pages.run_without_us(tmp_path, code, {"best.ckpt": checkpoint, stock: own}, end)


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
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str) -> None:
    path = EXAMPLES / "classify" / f"{name}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--epochs=1", "--steps=1"])
    with unchanged_process():
        runpy.run_path(str(path), run_name="__main__")
    assert 0.5 < float(capsys.readouterr().out.rsplit(":", 1)[1]) <= 1


def test_the_configurations_are_understood(host: LightningHost) -> None:
    """The names in the table of the classifiers' page are those of the settings."""
    name = host.module.command.removeprefix("adv-")
    paths = sorted((ROOT / f"adv_{name}" / "configurations").glob("*.yaml"))
    assert len(paths) == 4
    for path in (path for path in paths if not path.name.startswith("search")):
        shown = pages.check_configuration(path, host)
        if name == "classify":
            told = {name for section in ("method", "attack") for name in shown[section]} - {"backward", "seed"}
            assert {name for name in told if f"`{name}`" not in PAGES["classify"]} == set()


def test_every_setting_of_the_page_of_landmarks_is_real() -> None:
    (text,) = [block for block in blocks(PAGES["landmark"], "yaml") if block.startswith("model:")]
    content = yaml.safe_load(text)
    model = dict(content["model"])
    kinds = {name: kind for name, kind in RobustLandmarks.sections.items() if name != "network"}
    sections = {name: kind(**model.pop(name, {})) for name, kind in kinds.items()}
    network = RobustLandmarks.sections["network"](**{**model.pop("network"), **NETWORK})
    RobustLandmarks(network, **sections, **model, landmark_names=["a"], channels=1, size=(200, 160))
    assert content["checkpoint"]["monitor"] == "val/robust_MRE"
