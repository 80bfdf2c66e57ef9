"""Gradients that are taken where the weights were moved."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed import MethodRun, TrainingSettings, WeightPerturbation
from advmed.methods import AMAT, AT, DPAAT, FAT, MART, METHODS, SAT, STD, TRADES, AdversarialMethod
from advmed.methods.mart import mart_losses
from helpers.models import Affine, Classifier, Compared, Mean, cnn
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
    perturbed = WeightPerturbation(MADE["SAT"](), GAMMA)
    perturbed.step(task(), IMAGES, names(4))  # one before it, which knows nothing of that weight
    step = perturbed.step(found, IMAGES, names(4), (lambda part: part.backward()) if apart else None)
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
    for values in (torch.full((2, 3), math.inf), torch.full((2, 3), math.nan), torch.zeros(2, 3), None):
        weight = nn.Parameter(torch.ones(2, 3))
        WeightPerturbation(SAT(1.0), 0.5)._move([weight], [values])
        assert torch.equal(weight, torch.ones(2, 3))


@pytest.mark.parametrize("apart", [False, True])
def test_half_precision_has_no_copies_of_the_own_weights(apart: bool) -> None:
    """Autocast keeps one of each weight, until it ends."""
    losses, found = [], []
    for cached in (True, False):
        objective = Compared(cnn(), LABELS)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            step = WeightPerturbation(MADE["SAT"](share_gradient=True), GAMMA).step(
                objective, IMAGES.float(), names(4), (lambda part: part.backward()) if apart else None
            )
            after = objective(IMAGES.float()).sum().item()
        if not apart:
            step.loss.backward()
        losses.append((step.loss.item(), after))
        found.append(gradients(objective.model))
    assert losses[0] == losses[1]
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    with torch.autocast("cpu", torch.bfloat16):
        own = MADE["SAT"](share_gradient=True).step(Compared(cnn(), LABELS), IMAGES.float(), names(4)).loss.item()
    assert abs(own - losses[0][0]) > 0.1


@pytest.mark.parametrize("apart", [False, True])
def test_layers_with_buffers_forget_the_moved_passes(apart: bool) -> None:
    """Spectral norm's vectors and InstanceNorm's statistics; their gradients are in order."""

    def made() -> Compared:
        torch.manual_seed(0)
        first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3, padding=1))
        layers = [
            first,
            nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(2),
        ]
        return Compared(nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 4)).double(), LABELS)

    own, found = made(), made()
    MADE["SAT"]().step(own, IMAGES, names(4)).loss.backward()
    step = WeightPerturbation(MADE["SAT"](), GAMMA).step(
        found, IMAGES, names(4), (lambda part: part.backward()) if apart else None
    )
    if not apart:
        step.loss.backward()
    before = dict(made().model.named_buffers())
    for key, value in own.model.named_buffers():
        torch.testing.assert_close(dict(found.model.named_buffers())[key], value, rtol=1e-9, atol=1e-12, msg=key)
    assert any(not torch.equal(value, before[key]) for key, value in own.model.named_buffers())


def test_no_two_graphs_live_at_once() -> None:
    """The clean part is gone back through before the attacked one begins, as in the method's own step."""

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def peak(make: Any) -> int:
        alive, most = weakref.WeakSet[Any](), [0]

        def pack(tensor: Tensor) -> Kept:
            kept = Kept(tensor)
            alive.add(kept)
            most[0] = max(most[0], len(alive))
            return kept

        objective = Mean(cnn().double(), LABELS)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            assert make(MADE["SAT"](share_gradient=True)).step(objective, IMAGES, names(4)).loss.requires_grad
        return most[0]

    own = peak(lambda method: method)
    assert peak(lambda method: WeightPerturbation(method, GAMMA)) <= own + 2 < 2 * own


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
    with pytest.raises(ValueError, match="hooks of weights would do their work twice"):
        perturbed.step(hooked, IMAGES.float(), names(4))
    waiting = Classifier(cnn(), LABELS)
    next(iter(waiting.model.parameters())).register_post_accumulate_grad_hook(lambda weight: None)
    with pytest.raises(ValueError, match="hooks of weights would do their work twice"):
        perturbed.step(waiting, IMAGES.float(), names(4), lambda loss: loss.backward())
    perturbed.step(waiting, IMAGES.float(), names(4)).loss.backward()
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16 needs the loss scale"):
        perturbed.step(Classifier(cnn(), LABELS), IMAGES.float(), names(4))


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, math.nan])
def test_the_share_is_one(gamma: float) -> None:
    makes = [lambda: WeightPerturbation(SAT(1.0), gamma), lambda: TrainingSettings(awp=gamma)]
    for made in makes[: 1 if gamma == 0 else 2]:  # in a setting 0 is for none
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
    assert (run.summary(1)["awp"], run.summary(2)["awp"]) == (None, GAMMA)
    found, expected = task(), task()
    run.step(found, IMAGES, names(4)).loss.backward()
    method = settings.make_method("SAT")
    WeightPerturbation(method, GAMMA).step(expected, IMAGES, names(4)).loss.backward()
    assert_close(gradients(found.model), gradients(expected.model))


def test_what_it_costs() -> None:
    """A training pass more for each; (2 * 3 + 4) / 3 without."""
    assert WeightPerturbation(MADE["SAT"](share_gradient=True)).cost == pytest.approx(16 / 3)
    assert WeightPerturbation(MADE["AT"]()).cost == pytest.approx(4)
    assert MethodRun("SAT", TrainingSettings(eps=1.0, awp=0.1), epochs=1).cost == pytest.approx(16 / 3)
    assert not MethodRun("STD", TrainingSettings(awp=0.1), epochs=1).moves_weights
