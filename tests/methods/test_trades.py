"""The attack of TRADES against torchattacks and a closed form of a linear model; its loss is in test_methods.py."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

import advmed.attacks.problem as problem_module
from advmed.methods import TRADES
from advmed.testing.objectives import Classification
from helpers.tensors import ORDERS, QUICK, comparing, divergence, names, uniform


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


class Pair(NamedTuple):
    """As a model with two heads may return it."""

    first: Tensor
    second: Any


def test_the_attack_starts_from_predictions_without_gradients_in_any_nest() -> None:
    """The clean predictions are what the noise leads away from: the attack does not reach into their pass."""
    objective, images = comparing()
    compared: list[tuple[bool, ...]] = []

    class Nested(Classification):
        def predictions(self, images: Tensor) -> Any:
            return self.nest(super().predictions(images))

        def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Any]:
            loss, terms, logits = super().loss_and_predictions(images)
            return loss, terms, self.nest(logits)

        def nest(self, logits: Tensor) -> Any:
            return OrderedDict(heads=Pair(logits[:, :2], [(logits[:, 2:], "softmax")]), temperature=(2.0, None))

        def distance(self, *both: Any) -> Tensor:
            for heads, temperature in (nest.values() for nest in both):
                assert (type(heads), heads.second[0][1], temperature) == (Pair, "softmax", (2.0, None))
            tensors = [(nest["heads"].first, nest["heads"].second[0][0]) for nest in both]
            compared.append(tuple(tensor.requires_grad for pair in tensors for tensor in pair))
            return divergence(*(torch.cat(pair, 1) for pair in tensors))

    nested = Nested(objective.model, objective.labels)
    steps = [TRADES(0.7, **QUICK).step(task, images, names(5)) for task in (objective, nested)]
    assert compared == [(False, False, True, True)] * 4 + [(True,) * 4]
    torch.testing.assert_close(steps[0].adversarial, steps[1].adversarial, rtol=0, atol=1e-12)
    torch.testing.assert_close(steps[0].loss, steps[1].loss, rtol=1e-12, atol=0)
