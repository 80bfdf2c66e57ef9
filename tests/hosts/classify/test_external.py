"""Attacks of torchattacks in the place of ours: in the ball, repeatable, and without a trace."""

from __future__ import annotations

import math
import random
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from adv_classify import ClassificationObjective
from adv_classify.external import DESCRIPTIONS, LEAST_CLASSES, torch_attack
from advmed.norms import norm
from helpers.classify import Small, noise

RADIUS = {2.0: 3.5, math.inf: 0.2}
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.fixture
def model() -> nn.Module:
    """Right on most images; with layers that an attack could disturb."""
    model = nn.Sequential(nn.BatchNorm2d(3), *Small(classes=4), nn.Dropout(0.5))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pictures()), LABELS).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


ASKED: dict[str, dict[str, Any]] = {
    "apgd": {"name": "APGD", "steps": 100},
    "apgdt": {"name": "APGDT", "steps": 100, "n_classes": 4},
    "fab": {"name": "FAB", "steps": 100, "n_classes": 4},
    "square": {"name": "Square", "n_queries": 2000},
    "autoattack": {"name": "AutoAttack", "n_classes": 4},
}


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What torchattacks was asked for; a search of 2000 queries is cut short."""
    asked: list[dict[str, Any]] = []

    def make(name: str, kind: Any, model: nn.Module, **settings: Any) -> Any:
        asked.append({"name": name, **settings})
        return kind(model, **{**settings, **({"n_queries": 400} if name == "Square" else {})})

    for name in (settings["name"] for settings in ASKED.values()):
        monkeypatch.setattr(torchattacks, name, partial(make, name, getattr(torchattacks, name)))
    return asked


def pictures() -> Tensor:
    images = noise(len(LABELS), 3, 8, 8)
    images[LABELS == 0, 0] *= 0.3
    images[LABELS == 1, 1] *= 0.3
    images[LABELS == 2, 2] *= 0.3
    images[0, :, 0] = 0  # at the bounds already
    images[1, :, 0] = 1
    return images


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


AUTO = [pytest.param("autoattack", shape, marks=pytest.mark.slow) for shape in ((8, 8), (8, 5), (5, 8))]


@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (8, 8)) for name in ("apgd", "apgdt", "fab", "square")), ("square", (8, 5)), ("square", (5, 8)), *AUTO],
)
def test_attacks_stay_in_the_ball_and_in_the_bounds(
    model: nn.Module, made: list[dict[str, Any]], name: str, shape: tuple[int, int], p: float
) -> None:
    """Whatever the shape of the images; with the settings that torchattacks is asked for."""
    images = pictures()[..., : shape[0], : shape[1]]
    objective = ClassificationObjective(model, LABELS)
    clean, right = objective(images).detach(), model(images).argmax(1) == LABELS
    assert right.all() or shape != (8, 8)
    attack = partial(torch_attack(name, p), objective, images, RADIUS[p], bounds=(0.0, 1.0))
    result = attack(generator=seeded())
    assert result.images.shape == images.shape
    assert 0 <= result.images.min() <= result.images.max() <= 1
    assert (norm(result.images - images, p) <= RADIUS[p] * (1 + 1e-4)).all()
    torch.testing.assert_close(result.norms, norm(result.images - images, p))
    assert result.norms.max() > 0.1 * RADIUS[p]
    torch.testing.assert_close(result.terms, objective(result.images))
    assert (result.terms >= clean - 1e-5).all()
    assert result.terms.sum() > clean.sum() + 0.1
    assert (model(result.images).argmax(1) == LABELS).sum() < right.sum()
    assert torch.equal(result.nonfinite, torch.zeros(len(LABELS), dtype=torch.int64))
    assert not result.images.requires_grad
    assert not result.terms.requires_grad
    asked = made[0]
    assert isinstance(asked.pop("seed"), int)
    assert asked == {"norm": "L2" if p == 2 else "Linf", "eps": RADIUS[p], **ASKED[name]}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["apgd", "apgdt", "fab", "square"])
def test_the_generator_decides_and_an_attack_leaves_no_trace(model: nn.Module, name: str, training: bool) -> None:
    """In images, network and random states, whatever the process has drawn before."""
    images, objective = pictures(), ClassificationObjective(model.train(training), LABELS)
    model[1].weight.requires_grad_(False)

    def state() -> list[Any]:
        weights = [value.tolist() for value in model.state_dict().values()]
        flags = [module.training for module in model.modules()]
        gradients = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        drawn = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
        return [images.tolist(), weights, flags, gradients, *drawn]

    found = []
    for seed in (1, 1, 2):
        torch.rand(seed)
        before = state()
        with torch.inference_mode():
            attack = partial(torch_attack(name, math.inf), objective, images, RADIUS[math.inf])
            found.append(attack(bounds=(0.0, 1.0), generator=seeded(seed)).images)
        assert state() == before
    assert torch.equal(found[0], found[1])
    assert name not in ("apgd", "square") or not torch.equal(found[1], found[2])


@pytest.mark.parametrize("name", sorted(DESCRIPTIONS))
def test_attacks_that_need_four_classes_and_those_that_do_with_two(name: str) -> None:
    for classes in (2, 3):
        objective = ClassificationObjective(Small(classes=classes).eval(), torch.tensor([0, 1]))
        attack = partial(torch_attack(name, 2.0), objective, noise(2, 3, 8, 8), 0.5, bounds=(0.0, 1.0))
        if name in LEAST_CLASSES:
            with pytest.raises(ValueError, match=f"{name} needs 4 classes or more, the model has {classes}"):
                attack()
        else:
            assert (attack(generator=seeded()).norms <= 0.5 * (1 + 1e-4)).all()


@pytest.mark.parametrize("bounds", [None, (0.0, 2.0), (-1.0, 1.0)])
def test_other_bounds_are_refused(model: nn.Module, bounds: Any) -> None:
    with pytest.raises(ValueError, match=r"apgd of torchattacks needs images in \[0, 1\], got bounds"):
        torch_attack("apgd", 2.0)(ClassificationObjective(model, LABELS), pictures(), 0.1, bounds=bounds)


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown attack 'deepfool': expected pgd<steps>.* autoattack, apgd"):
        torch_attack("deepfool", 2.0)
    assert torch_attack("fab", 2.0).description.startswith("FAB")
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(ValueError, match=r"apgd needs torchattacks: pip install 'advmed\[eval\]'"):
        torch_attack("apgd", 2.0)
