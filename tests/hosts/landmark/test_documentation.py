"""What docs/landmark.md and the README tell a user to type, typed: the commands, the code, the examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from adv_landmark.module import RobustLandmarks
from helpers import pages
from helpers.hosts import ROOT, blocks

PAGE = (ROOT / "docs" / "landmark.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples" / "landmark"
NETWORK = {"encoder": "tu-test_resnet", "decoder_channels": [16, 16, 8, 8, 8]}


@pytest.mark.slow
def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    words = [word for name, value in NETWORK.items() for word in (f"--model.network.{name}", str(value))]
    pages.type_commands(tmp_path, PAGE, "adv-landmark", words, 6)
    assert {path.parent.name for path in (tmp_path / "report").rglob("report.html")} == {"L2"}
    assert list(tmp_path.rglob("overlays/*.png"))
    code = pages.block(PAGE, "python", "import segmentation_models_pytorch")
    own = 'smp.Unet("tu-test_resnet", encoder_weights=None, in_channels=1, classes=12, decoder_channels=(16,16,8,8,8))'
    replaced = {
        "best.ckpt": str(next((tmp_path / "runs" / "amat").rglob("best.ckpt"))),
        'smp.Unet("vgg19", encoder_weights=None, in_channels=3, classes=3 * 19)': own,
    }
    end = "print(tuple(model.eval()(torch.rand(2, 1, 32, 64)).shape))"
    assert "(2, 12, 32, 64)" in pages.run_without_us(tmp_path, code, replaced, end)


def test_the_loop_of_the_page_trains() -> None:
    code = pages.block(PAGE, "python", "AMAT(")
    model = torch.nn.Conv2d(3, 6, 3, padding=1)
    before = model.weight.detach().clone()
    batch = (torch.rand(4, 3, 24, 32) * 2 - 1, torch.rand(4, 2, 2) * 20, list("abcd"))
    known = {"loader": [batch, batch], "model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    exec(compile(code.replace("steps=20", "steps=2"), "docs/landmark.md", "exec"), known)
    assert not torch.equal(model.weight, before)
    assert known["found"].shape == (4, 2, 2)
    assert known["confidence"].shape == (4, 2)
    assert known["method"].margins.get(list("abcd")).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_configurations_are_understood(path: Path) -> None:
    pages.check_configuration(path, "adv-landmark")


def test_every_setting_of_the_page_is_real() -> None:
    (text,) = [block for block in blocks(PAGE, "yaml") if block.startswith("model:")]
    content = yaml.safe_load(text)
    model = dict(content["model"])
    sections = {name: kind(**model.pop(name)) for name, kind in RobustLandmarks.sections.items() if name != "network"}
    network = RobustLandmarks.sections["network"](**{**model.pop("network"), **NETWORK})
    RobustLandmarks(network, **sections, **model, landmark_names=["a"], channels=1, size=(200, 160))
    assert content["checkpoint"]["monitor"] == "val/robust_MRE"
