"""Every method that can work with a host's objective has its trainer there, and no other has; lists name them all."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from advmed.methods import METHODS, method_class

ROOT = Path(__file__).resolve().parents[2]


def possible(objective: type) -> set[str]:
    """The names of the methods for such objectives."""
    found = set()
    for name in METHODS:
        try:
            found.add(method_class(name, objective).name)
        except TypeError:
            continue
    return found


def test_nnunet() -> None:
    """In the one file, too, in which nnU-Net looks for them."""
    trainer, objective = import_module("adv_nnunet.trainer"), import_module("adv_nnunet.objective")
    wanted = possible(objective.SegmentationObjective)
    start = "nnUNetTrainer"
    for name in wanted:
        assert getattr(trainer, f"{start}{name}").method_name == name
    (shim,) = (Path(trainer.__file__).parent / "trainers").glob("*.py")
    assert {name for name in runpy.run_path(str(shim)) if name.startswith(start)} == {
        f"{start}{name}" for name in wanted
    }


def test_yolo() -> None:
    """STD is the host's own trainer."""
    trainer, objective = import_module("adv_yolo.trainer"), import_module("adv_yolo.objective")
    wanted = possible(objective.DetectionObjective) - {"STD"}
    assert {name: kind.method_name for name, kind in trainer.TRAINERS.items()} == {n.lower(): n for n in wanted}


def classifier(module: Any, **given: Any) -> Any:
    return module.RobustClassifier(module.Network(name="test_resnet"), num_classes=2, **given)


def landmarks(module: Any, **given: Any) -> Any:
    network = module.Network(encoder="tu-test_resnet", decoder_channels=(8, 8, 8, 8, 8))
    return module.RobustLandmarks(network, landmark_names=["a"], size=(32, 32), **given)


@pytest.mark.parametrize(("package", "make"), [("adv_classify", classifier), ("adv_landmark", landmarks)])
@pytest.mark.parametrize("name", METHODS)
def test_lightning(package: str, make: Callable[..., Any], name: str) -> None:
    """The name of a method is all that a host is told."""
    module = import_module(f"{package}.module")
    kind = make(module).objective_class
    if name in possible(kind):
        assert make(module, method=module.MethodOptions(name=name)).method_name == name
    else:
        with pytest.raises(TypeError, match=f"{name} is for predictions that are class probabilities"):
            make(module, method=module.MethodOptions(name=name))


@pytest.mark.parametrize(
    ("host", "objective", "example"),
    [("classify", "ClassificationObjective", "pneumoniamnist"), ("landmark", "LandmarkObjective", "table")],
)
def test_lists_in_configurations(host: str, objective: str, example: str) -> None:
    wanted = possible(getattr(import_module(f"adv_{host}.objective"), objective))
    for path in (ROOT / f"docs/{host}.md", ROOT / f"adv_{host}/configurations/{example}.yaml"):
        (names,) = re.findall(r"^ +name: .*# (STD, .*)$", path.read_text(), re.MULTILINE)
        assert set(names.split(", ")) == wanted, path
