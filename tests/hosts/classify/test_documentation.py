"""What docs/classify.md and the README tell a user to type, typed: the commands, the code, the examples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from helpers import pages
from helpers.hosts import ROOT

PAGE = (ROOT / "docs" / "classify.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples" / "classify"


@pytest.mark.slow
def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    pages.type_commands(tmp_path, PAGE, "adv-classify", ["--model.network.name", "test_resnet"], 20)
    assert {path.parent.name for path in (tmp_path / "report").rglob("report.html")} == {"L2", "Linf"}
    code = pages.block(PAGE, "python", "import timm")
    checkpoint = next((tmp_path / "runs" / "dpaat").rglob("best.ckpt"))
    replaced = {"best.ckpt": str(checkpoint), '"resnet18", num_classes=7': '"test_resnet", num_classes=2, in_chans=1'}
    pages.run_without_us(tmp_path, code, replaced, "print(model(torch.rand(2, 1, 28, 28)).shape)")


def test_the_loop_of_the_page_trains() -> None:
    code = pages.block(PAGE, "python", "DPAAT")
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_pytorch", "own_lightning_module"])
def test_the_examples_run(tmp_path: Path, name: str) -> None:
    text = pages.run(tmp_path, sys.executable, EXAMPLES / f"{name}.py", "--epochs=1", "--steps=1")
    assert 0.5 < float(text.rsplit(":", 1)[1]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_configurations_are_understood(path: Path) -> None:
    """The names in the table of the page are those of the settings."""
    shown = pages.check_configuration(path, "adv-classify")
    for section in ("method", "attack"):
        for name in shown[section]:
            if name not in ("backward", "seed"):
                assert f"`{name}`" in PAGE, f"docs/classify.md does not tell of {section}.{name}"
