"""TRADES against torchattacks, a closed form of a linear model, and losses and gradients worked out apart from it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

import advmed.attacks.problem as problem_module
from advmed.methods import TRADES
from advmed.methods.trades import detached
from advmed.testing.objectives import Classification
from helpers.tensors import (
    ORDERS,
    QUICK,
    assert_close,
    comparing,
    divergence,
    gradients,
    lengths,
    loss_by_hand,
    names,
    uniform,
)

# The attack


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("random_start", [0.01, 0.5])
def test_on_a_linear_model_the_attack_ends_at_the_edge(p: float, random_start: float) -> None:
    """Two classes are told apart by z = v.x alone, and the divergence grows with |z - z0|: the attack ends at
    z0 + eps ||v||* or z0 - eps ||v||*, on the side on which it started.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    model[1].weight.data = uniform(2, 12, seed=1) - 0.5
    images, eps = uniform(40, 3, 4), 0.8
    method = TRADES(eps, norm=p, steps=40, step_scale=40, random_start=random_start)
    step = method.step(Classification(model, torch.arange(40) % 2), images, names(40))
    normal = (model[1].weight[1] - model[1].weight[0]).detach()
    dual = normal.norm() if p == 2 else normal.abs().sum()
    clean = model(images).diff(dim=1).detach()[:, 0]
    side = ((step.adversarial - images).flatten(1) @ normal).sign()
    assert 8 < (side > 0).sum() < 32
    edge = clean + side * eps * dual
    torch.testing.assert_close(model(step.adversarial).diff(dim=1).detach()[:, 0], edge, rtol=1e-9, atol=0)
    expected = kl_divergence(Bernoulli(logits=clean), Bernoulli(logits=edge)).mean()
    torch.testing.assert_close(step.logs["loss_sync"], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("random_start", [0.01, 1.0])
@pytest.mark.parametrize("p", ORDERS)
def test_the_attack_raises_the_divergence(p: float, random_start: float) -> None:
    """Of every sample, far above that of the random start and of as much random noise."""
    found = {}
    for name, start, settings in (
        ("attack", random_start, {"steps": 10, "step_scale": 2.5}),
        ("start", random_start, {"steps": 1, "step_scale": 1e-12}),
        ("noise", 1.0, {"steps": 1, "step_scale": 1e-12}),
    ):
        objective, images = comparing()
        eps = 0.5 if p == 2 else 0.03
        step = TRADES(eps, norm=p, random_start=start, seed=3, **settings).step(objective, images, names(5))
        found[name] = divergence(objective.model(images), objective.model(step.adversarial)).detach()
        length = lengths(step.adversarial - images, p)
        assert (length > 0).all()
        assert (length <= start * eps if name == "start" else length <= eps * (1 + 1e-9)).all()
        if name == "attack":
            torch.testing.assert_close(length, torch.full((5,), eps, dtype=torch.float64), rtol=1e-9, atol=0)
    assert (found["attack"] > 10 * found["start"]).all()
    assert (found["attack"] > 10 * found["noise"]).all()


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (10, 2.5), (20, 4.0)])
def test_the_attack_equals_torchattacks_tpgd_from_the_same_start(
    monkeypatch: pytest.MonkeyPatch, steps: int, scale: float
) -> None:
    import torchattacks

    objective, images = comparing()
    eps = 0.1

    def same_noise(like: Tensor, radius: Tensor, order: float, generator: torch.Generator) -> Tensor:
        """The noise of torchattacks, drawn as it draws."""
        torch.manual_seed(7)
        return 0.001 * torch.randn_like(like)

    monkeypatch.setattr(problem_module, "random_in_ball", same_noise)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = torchattacks.TPGD(objective.model, eps=eps, alpha=scale * eps / steps, steps=steps)(images)
        method = TRADES(eps, norm=math.inf, bounds=(0, 1), steps=steps, step_scale=scale)
        step = method.step(objective, images, names(5))
    assert (expected - images).abs().flatten(1).amax(1).min() > 0.09  # it did attack
    torch.testing.assert_close(step.adversarial, expected, rtol=0, atol=1e-10)
    reached = divergence(objective.model(images), objective.model(expected)).mean().detach()
    torch.testing.assert_close(step.logs["loss_sync"], reached, rtol=1e-8, atol=0)


def test_the_attack_looks_at_predictions_only() -> None:
    """Other labels change the loss and not the noise."""
    results = []
    for labels in ([0, 1, 2, 3, 1], [2, 2, 0, 1, 3]):
        objective, images = comparing()
        objective.labels = torch.tensor(labels)
        results.append(TRADES(0.7, **QUICK).step(objective, images, names(5)))
    assert torch.equal(results[0].adversarial, results[1].adversarial)
    assert torch.equal(results[0].logs["loss_sync"], results[1].logs["loss_sync"])
    assert results[0].loss != results[1].loss


# Losses and gradients


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_the_loss_is_that_of_clean_images_and_the_weighted_distance(p: float, beta: float) -> None:
    objective, images = comparing()
    eps = 0.7 if p == 2 else 0.05
    step = TRADES(eps, beta=beta, norm=p, **QUICK).step(objective, images, names(5))
    step.loss.backward()
    found = gradients(objective.model)
    clean, terms, logits = loss_by_hand(objective, images)
    adversarial, _, other = loss_by_hand(objective, step.adversarial)
    sync = divergence(logits, other).mean()
    assert sync > 0.01
    expected = clean + beta * sync
    expected.backward()
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    assert_close(found, gradients(objective.model))
    torch.testing.assert_close(step.terms, terms.detach(), rtol=1e-12, atol=0)
    assert not step.terms.requires_grad
    expected_logs = {"loss_clean": clean.item(), "loss_adversarial": adversarial.item(), "loss_sync": sync.item()}
    expected_logs["nonfinite"] = 0
    assert set(step.logs) == set(expected_logs)
    for key, value in step.logs.items():
        assert value.item() == pytest.approx(expected_logs[key], rel=1e-12)
        assert value.shape == ()
        assert not value.requires_grad


class Pair(NamedTuple):
    """As a model with two heads may return it."""

    first: Tensor
    second: Tensor


def test_the_attack_starts_from_predictions_without_gradients_in_any_nest() -> None:
    """The clean predictions are what the noise leads away from: the attack does not reach into their pass."""
    objective, images = comparing()
    compared: list[tuple[bool, bool]] = []

    class Nested(Classification):
        def predictions(self, images: Tensor) -> Any:
            return self.nest(super().predictions(images))

        def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Any]:
            loss, terms, logits = super().loss_and_predictions(images)
            return loss, terms, self.nest(logits)

        def nest(self, logits: Tensor) -> Any:
            return {"heads": [logits[:, :2], (logits[:, 2:], "softmax")], "temperature": 2.0}

        def distance(self, clean: Any, other: Any) -> Tensor:
            assert clean["temperature"] == other["temperature"] == 2.0
            assert clean["heads"][1][1] == other["heads"][1][1] == "softmax"
            first, second = (torch.cat((x["heads"][0], x["heads"][1][0]), 1) for x in (clean, other))
            compared.append((first.requires_grad, second.requires_grad))
            return divergence(first, second)

    nested = Nested(objective.model, objective.labels)
    steps = [TRADES(0.7, **QUICK).step(task, images, names(5)) for task in (objective, nested)]
    assert compared == [(False, True)] * 4 + [(True, True)]
    torch.testing.assert_close(steps[0].adversarial, steps[1].adversarial, rtol=0, atol=1e-12)
    torch.testing.assert_close(steps[0].loss, steps[1].loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "nest",
    [
        lambda x: x,
        lambda x: [x, x],
        lambda x: (x, [x, None]),
        lambda x: {"a": x, "b": (x, 3)},
        lambda x: OrderedDict(a=x),
        lambda x: Pair(x, x),
    ],
)
def test_predictions_keep_their_form_without_gradients(nest: Callable[[Tensor], Any]) -> None:
    weight = torch.ones(3, requires_grad=True)
    found, expected = detached(nest(weight * 2)), nest(torch.full((3,), 2.0))

    def compare(a: Any, b: Any) -> None:
        if isinstance(b, Tensor):
            assert torch.equal(a, b)
            assert not a.requires_grad
        elif isinstance(b, dict):
            assert isinstance(a, dict)
            assert list(a) == list(b)
            compare(list(a.values()), list(b.values()))
        elif isinstance(b, (list, tuple)):
            assert type(a) is type(b)
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        else:
            assert a == b

    compare(found, expected)
