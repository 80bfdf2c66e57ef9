"""FAT against closed forms: on a linear model it is known at which step an attack succeeds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import pgd
from advmed.methods import FAT, Step
from advmed.testing.objectives import Classification
from advmed.thresholds import Thresholds
from helpers import models
from helpers.tensors import seeded

STEPS, SCALE, EPS = 10, 2.0, 1.0
ALPHA = SCALE * EPS / STEPS


def expected(crossing: Tensor, tau: int) -> Tensor:
    """The noise that is left: of the first iterate at or beyond the crossing, tau steps on, within eps."""
    first = torch.ceil((crossing / ALPHA - 1e-9).clamp_min(0))
    return ((first + tau) * ALPHA).clamp_max(EPS)


def assert_ends(method: FAT, objective: Any, images: Tensor, crossing: Tensor) -> Step:
    """The noise of a step is that which is expected; some attacks succeed, some never do."""
    step = method.step(objective, images, [""] * len(images))
    noise = (step.adversarial - images).flatten(1).norm(dim=1)
    assert torch.allclose(noise, expected(crossing, method.tau), atol=1e-6)
    assert 0 < (crossing < EPS).sum() < len(images)
    assert set(step.logs) == {"loss_adversarial", "nonfinite"}
    return step


@pytest.mark.parametrize("tau", [0, 1, 3, 99])
@pytest.mark.parametrize("terms", [1, 3])
def test_an_attack_ends_tau_steps_after_a_term_has_reached_its_threshold(tau: int, terms: int) -> None:
    generator = seeded(terms)
    weight = torch.randn(6, generator=generator, dtype=torch.float64)
    images = torch.randn(40, 1, 2, 3, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(40, generator=generator) < 0.5, -1.0, 1.0).double()
    scales, offsets, xi = (torch.linspace(*ends, terms).double() for ends in ((1, 2), (0, 0.5), (0.4, 1.2)))
    objective = models.Logistic(weight, labels, scales, offsets)
    crossing = objective.largest_radius(images, xi, 2).amin(1)
    step = assert_ends(FAT(EPS, xi, tau=tau, steps=STEPS, step_scale=SCALE), objective, images, crossing)
    assert step.loss.item() == pytest.approx(objective(step.adversarial).sum(1).mean().item())


def test_an_attack_that_slips_back_below_its_threshold_ends_all_the_same() -> None:
    """One pixel: its second term reaches its threshold near 0.4 only, while the loss rises on."""

    def objective(images: Tensor) -> Tensor:
        pixel = images.flatten(1)
        return torch.cat([10 * pixel, 1 - (pixel - 0.4).abs()], 1)

    step = FAT(EPS, [math.inf, 0.95], tau=2, steps=STEPS, step_scale=SCALE).step(objective, torch.zeros(1, 1, 1), ["a"])
    assert step.adversarial.item() == pytest.approx(0.4 + 2 * ALPHA)


class OneTerm(Classification):
    """Cross-entropy alone: it rises along the difference of the logits."""

    def terms_of(self, logits: Tensor) -> Tensor:
        return super().terms_of(logits)[:, :1]


@pytest.mark.parametrize("tau", [0, 2])
def test_where_images_have_classes_an_attack_ends_after_its_class_is_wrong(tau: int) -> None:
    generator = seeded(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2, bias=False, dtype=torch.float64))
    weight = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    model[1].weight.data = weight
    images = torch.randn(40, 1, 2, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (40,), generator=generator)
    assert not FAT.needs_thresholds(OneTerm)
    logits = model(images).detach()
    margin = logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None])
    crossing = margin[:, 0] / (weight[0] - weight[1]).norm()
    assert (crossing < 0).any()
    assert_ends(FAT(EPS, tau=tau, steps=STEPS, step_scale=SCALE), OneTerm(model, labels), images, crossing)


def test_with_thresholds_out_of_reach_it_is_adversarial_training() -> None:
    objective = models.Classifier(models.cnn(), torch.tensor([0, 1, 2, 3]))
    images = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    how = {"steps": 4, "step_scale": 2.0}
    found = FAT(0.7, math.inf, **how).step(objective, images, list("abcd")).adversarial
    assert torch.equal(found, pgd(objective, images, 0.7, random_start=False, **how).images)
    none = FAT(0.7, -math.inf, tau=0, **how).step(objective, images, list("abcd")).adversarial
    assert torch.equal(none, images)


def test_what_it_cannot_do_without() -> None:
    objective = models.Affine(torch.ones(1, 1, 2, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="FAT needs thresholds, or objectives with one class an image"):
        FAT(1.0).step(objective, torch.zeros(1, 1, 2, 2), ["a"])
    with pytest.raises(ValueError, match="2 thresholds were given for K = 1 loss terms"):
        FAT(1.0, [1.0, 2.0]).step(objective, torch.zeros(1, 1, 2, 2), ["a"])
    named = models.Classifier(models.cnn(), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"they are for K = 1 loss terms \['other'\]"):
        FAT(1.0, Thresholds((1.0,), ("other",))).step(named, torch.zeros(1, 3, 9, 9), ["a"])
