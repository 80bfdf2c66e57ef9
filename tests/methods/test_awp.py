"""Gradients that are taken where the weights were moved."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed import MethodRun, TrainingSettings, WeightPerturbation
from advmed.methods import AMAT, AT, DPAAT, FAT, MART, METHODS, SAT, STD, TRADES, AdversarialMethod
from advmed.methods.mart import mart_losses
from helpers.models import Affine, Classifier, Compared, cnn
from helpers.tensors import assert_close, gradients, names, uniform

LABELS = torch.tensor([0, 1, 2, 3])
IMAGES = uniform(4, 3, 8, 8, seed=1)
FAST: dict[str, Any] = {"steps": 3, "step_scale": 1.75, "schedule": "decreasing"}
GAMMA = 0.2
MADE: dict[str, Any] = {
    "AT": lambda **more: AT(0.7, **FAST, **more),
    "SAT": lambda **more: SAT(0.7, **FAST, **more),
    "AMAT": lambda **more: AMAT(0.7, [1.5, 1.5], refinement="secant", **FAST, **more),
    "TRADES": lambda **more: TRADES(0.7, beta=3.0, **FAST, **more),
    "DPAAT": lambda **more: DPAAT(0.7, sync_weight=2.0, **FAST, **more),
    "DPAAT alone": lambda **more: DPAAT(0.7, sync_weight=0.0, **FAST, **more),
    "MART": lambda **more: MART(0.7, kl_weight=3.0, **FAST, **more),
    "FAT": lambda **more: FAT(0.7, [1.5, 1.5], **FAST, **more),
}


def by_hand(name: str, task: Any, images: Tensor, adversarial: Tensor) -> Tensor:
    """The loss of each method as its paper has it, written down once more."""
    (clean, _, one), (other, _, two) = (task.loss_and_predictions(shown) for shown in (images, adversarial))
    distance = task.distance(one, two).mean()
    boosted, divergence = mart_losses(task.class_scores(one), task.class_scores(two))
    return {
        "SAT": (clean + other) / 2,
        "AMAT": (clean + other) / 2,
        "TRADES": clean + 3 * distance,
        "DPAAT": other + 2 * distance,
        "MART": (boosted + 3 * divergence).mean(),
    }.get(name, other)


def task(**settings: Any) -> Compared:
    return Compared(cnn(**settings).double(), LABELS)


def test_there_is_a_case_for_every_method() -> None:
    adversarial = {name for name, kind in METHODS.items() if issubclass(kind, AdversarialMethod)}
    assert {name.split()[0] for name in MADE} == adversarial


@pytest.mark.parametrize("apart", [False, True], ids=["together", "backward"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_the_gradient_is_that_at_the_moved_weights(name: str, share: bool, apart: bool) -> None:
    plain, found = task(), task()
    share = share and name != "TRADES"  # whose attack does not begin on the images
    method, other = (MADE[name](share_gradient=share) for _ in range(2))
    made = method.step(plain, IMAGES, names(4))
    made.loss.backward()

    # A step by hand, with a network of its own.
    moved = copy.deepcopy(plain)
    with torch.no_grad():
        for weight, before in zip(moved.model.parameters(), plain.model.parameters(), strict=True):
            assert before.grad is not None
            if weight.dim() > 1:
                weight += GAMMA * before.norm() * before.grad / before.grad.norm()
            weight.grad = None
    loss = by_hand(name, moved, IMAGES, made.adversarial)
    loss.backward()

    before = copy.deepcopy(found.model.state_dict())
    step = WeightPerturbation(other, GAMMA).step(
        found, IMAGES, names(4), (lambda part: part.backward()) if apart else None
    )
    if not apart:
        step.loss.backward()
    torch.testing.assert_close(step.loss.detach(), loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(step.adversarial, made.adversarial, rtol=1e-9, atol=1e-12)
    assert_close(gradients(found.model), gradients(moved.model))
    after = found.model.state_dict()
    assert all(
        torch.equal(after[key], value) for key, value in before.items() if key in dict(found.model.named_parameters())
    )
    assert other.state_dict() == method.state_dict()
    assert step.logs.keys() == made.logs.keys()
    assert step.loss.requires_grad != apart


@pytest.mark.parametrize("name", MADE)
def test_the_loss_of_known_noise_is_that_of_the_step(name: str) -> None:
    """For every method, in one go and part by part."""
    first, second, third = task(), task(), task()
    made = MADE[name]().step(first, IMAGES, names(4))
    made.loss.backward()
    loss = MADE[name]().loss_of(second, IMAGES, made.adversarial)
    loss.backward()
    parts = MADE[name]().loss_of(third, IMAGES, made.adversarial, lambda part: part.backward())
    assert not parts.requires_grad
    wanted = gradients(first.model)
    for value, objective in ((loss, second), (parts, third)):
        torch.testing.assert_close(value.detach(), made.loss.detach(), rtol=1e-9, atol=0)
        assert_close(gradients(objective.model), wanted)


@pytest.mark.parametrize("apart", [False, True])
def test_what_has_gathered_stays_and_statistics_are_of_the_own_weights(apart: bool) -> None:
    expected, found = task(normalise=True), task(normalise=True)
    perturbed, plain = WeightPerturbation(MADE["SAT"](), GAMMA), WeightPerturbation(MADE["SAT"](), GAMMA)

    def backward(part: Tensor) -> None:
        (part / 4).backward()

    once = [torch.zeros_like(weight) for weight in expected.model.parameters()]
    for _ in range(2):
        for weight in expected.model.parameters():
            weight.grad = None
        (plain.step(expected, IMAGES, names(4)).loss / 4).backward()
        once = [total + gradient for total, gradient in zip(once, gradients(expected.model), strict=True)]
    for _ in range(2):
        step = perturbed.step(found, IMAGES, names(4), backward if apart else None)
        if not apart:
            (step.loss / 4).backward()
    assert_close(gradients(found.model), once)
    own = task(normalise=True)
    assert any("running_mean" in key for key in own.model.state_dict())
    for _ in range(2):
        MADE["SAT"]().step(own, IMAGES, names(4)).loss.backward()
    for key, value in own.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[key], value, rtol=1e-12, atol=0, msg=key)


@pytest.mark.parametrize("apart", [False, True])
def test_a_loss_that_learns_itself_gets_its_gradient_once(apart: bool) -> None:
    class Weighted(Compared):
        """Its loss has a weight that no model knows of."""

        def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
            loss, terms, _ = self.loss_and_predictions(images)
            return loss * self.own.exp(), terms

    found = Weighted(cnn().double(), LABELS)
    found.own = torch.zeros((), dtype=torch.float64, requires_grad=True)
    found.own.grad = torch.ones_like(found.own)
    step = WeightPerturbation(MADE["SAT"](), GAMMA).step(
        found, IMAGES, names(4), (lambda part: part.backward()) if apart else None
    )
    if not apart:
        step.loss.backward()
    torch.testing.assert_close(found.own.grad, 1 + step.loss.detach())  # d(L exp(w)) / dw at w = 0


def test_a_scaled_loss_has_scaled_gradients() -> None:
    expected, found = task(), task()
    found.loss_scale = torch.tensor(2.0**13, dtype=torch.float64)
    WeightPerturbation(MADE["SAT"](share_gradient=True), GAMMA).step(expected, IMAGES, names(4)).loss.backward()
    (
        WeightPerturbation(MADE["SAT"](share_gradient=True), GAMMA).step(found, IMAGES, names(4)).loss * 2.0**13
    ).backward()
    assert_close([gradient / 2.0**13 for gradient in gradients(found.model)], gradients(expected.model))


def test_weights_come_back_when_something_goes_wrong() -> None:
    found = task()
    before = copy.deepcopy(found.model.state_dict())
    method = MADE["SAT"]()

    def broken(*_: object) -> Tensor:
        assert any(not torch.equal(w, before[k]) for k, w in found.model.named_parameters()), "moved by now"
        raise InterruptedError

    method.loss_of = broken
    with pytest.raises(InterruptedError):
        WeightPerturbation(method, GAMMA).step(found, IMAGES, names(4))
    assert all(torch.equal(weight, before[key]) for key, weight in found.model.named_parameters())


def test_a_gradient_that_is_not_finite_moves_no_weight() -> None:
    """Nor does one of zero, of a dead layer: 0 / 0."""
    for values in (torch.full((2, 3), math.inf), torch.full((2, 3), math.nan), torch.zeros(2, 3)):
        weight = nn.Parameter(torch.ones(2, 3))
        with WeightPerturbation(SAT(1.0), 0.5)._moved([weight], [values]):
            assert torch.equal(weight, torch.ones(2, 3))


def test_frozen_weights_are_left_alone() -> None:
    found = task()
    first = next(iter(found.model.parameters())).requires_grad_(False)
    step = WeightPerturbation(MADE["SAT"](), GAMMA).step(found, IMAGES, names(4))
    step.loss.backward()
    assert first.grad is None
    assert sum(weight.grad is not None for weight in found.model.parameters()) > 1


def test_what_cannot_be_is_said() -> None:
    perturbed = WeightPerturbation(SAT(1.0, steps=1))
    with pytest.raises(ValueError, match="has no 'model'"):
        perturbed.step(Affine(torch.ones(1, 2), torch.zeros(1)), torch.zeros(1, 2), ["a"])
    hooked = Classifier(cnn(), LABELS)
    next(iter(hooked.model.parameters())).register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(ValueError, match="hooks of weights would change them twice"):
        perturbed.step(hooked, IMAGES.float(), names(4))
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16 needs the loss scale"):
        perturbed.step(Classifier(cnn(), LABELS), IMAGES.float(), names(4))


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, math.nan])
def test_the_share_is_one(gamma: float) -> None:
    for made in (lambda: WeightPerturbation(SAT(1.0), gamma), lambda: TrainingSettings(awp=gamma)):
        with pytest.raises(ValueError, match=r"a number in \(0, 1\)"):
            made()


def test_a_run_moves_weights_after_its_warm_up_only() -> None:
    settings = TrainingSettings(eps=0.7, awp=GAMMA, warmup_epochs=1)
    run = MethodRun("SAT", settings, epochs=2)
    assert not run.moves_weights
    run.begin_epoch(0)
    first, second = task(), task()
    run.step(first, IMAGES, names(4)).loss.backward()
    STD().step(second, IMAGES, names(4)).loss.backward()
    assert_close(gradients(first.model), gradients(second.model))
    run.begin_epoch(1)
    assert run.moves_weights
    found, expected = task(), task()
    run.step(found, IMAGES, names(4)).loss.backward()
    method = settings.make_method("SAT")
    WeightPerturbation(method, GAMMA).step(expected, IMAGES, names(4)).loss.backward()
    assert_close(gradients(found.model), gradients(expected.model))


def test_what_it_costs() -> None:
    """A training pass more for each; (2 * 3 + 4) / 3 without."""
    assert WeightPerturbation(MADE["SAT"](share_gradient=True)).cost == pytest.approx(16 / 3)
    assert WeightPerturbation(MADE["AT"]()).cost == pytest.approx(4)
    assert not MethodRun("STD", TrainingSettings(awp=0.1), epochs=1).moves_weights
