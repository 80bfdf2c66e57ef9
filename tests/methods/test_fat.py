"""FAT against closed forms: on a linear model it is known at which step an attack succeeds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmed.attacks import pgd
from advmed.methods import FAT
from advmed.thresholds import RunningThresholds, Thresholds
from helpers import models

STEPS, SCALE, EPS = 10, 2.0, 1.0
ALPHA = SCALE * EPS / STEPS


def expected(crossing: Tensor, tau: int) -> Tensor:
    """The noise that is left: of the first iterate at or beyond the crossing, tau steps on, within eps."""
    first = torch.ceil((crossing / ALPHA - 1e-9).clamp_min(0))
    return ((first + tau) * ALPHA).clamp_max(EPS)


@pytest.mark.parametrize("tau", [0, 1, 3, 99])
@pytest.mark.parametrize("terms", [1, 3])
def test_an_attack_ends_tau_steps_after_a_term_has_reached_its_threshold(tau: int, terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    weight = torch.randn(6, generator=generator, dtype=torch.float64)
    images = torch.randn(40, 1, 2, 3, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(40, generator=generator) < 0.5, -1.0, 1.0).double()
    scales, offsets = (
        torch.linspace(1, 2, terms, dtype=torch.float64),
        torch.linspace(0, 0.5, terms, dtype=torch.float64),
    )
    objective = models.Logistic(weight, labels, scales, offsets)
    xi = torch.linspace(0.4, 1.2, terms, dtype=torch.float64)
    crossing = objective.largest_radius(images, xi, 2).amin(1)
    step = FAT(EPS, xi, tau=tau, steps=STEPS, step_scale=SCALE).step(objective, images, [""] * 40)
    assert step.adversarial is not None
    noise = (step.adversarial - images).flatten(1).norm(dim=1)
    assert torch.allclose(noise, expected(crossing, tau), atol=1e-6)
    assert 0 < (crossing < EPS).sum() < 40  # some attacks succeed, some never do
    assert step.loss.item() == pytest.approx(objective(step.adversarial).sum(1).mean().item())
    step.loss.backward()
    assert objective.model.weight.grad is not None


class Linear:
    """Two classes, the logits of a linear model."""

    names = ("ce",)

    def __init__(self, weight: Tensor, labels: Tensor) -> None:
        self.model, self.labels = nn.Linear(weight.shape[1], 2, bias=False, dtype=weight.dtype), labels
        self.model.weight.data.copy_(weight)

    def __call__(self, images: Tensor) -> Tensor:
        return self.terms_and_errors(images)[0]

    def predictions(self, images: Tensor) -> Tensor:
        return self.model(images.flatten(1))

    def class_scores(self, predictions: Tensor) -> object:
        raise NotImplementedError

    def terms_and_errors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.predictions(images)
        return F.cross_entropy(logits, self.labels, reduction="none")[:, None], logits.argmax(1) != self.labels


@pytest.mark.parametrize("tau", [0, 2])
def test_where_images_have_classes_an_attack_ends_after_its_class_is_wrong(tau: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    images = torch.randn(40, 1, 2, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (40,), generator=generator)
    objective = Linear(weight, labels)
    assert not FAT.needs_thresholds(Linear)
    logits = images.flatten(1) @ weight.T
    margin = logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None])
    crossing = margin[:, 0] / (weight[0] - weight[1]).norm()
    step = FAT(EPS, tau=tau, steps=STEPS, step_scale=SCALE).step(objective, images, [""] * 40)
    assert step.adversarial is not None
    noise = (step.adversarial - images).flatten(1).norm(dim=1)
    assert torch.allclose(noise, expected(crossing, tau), atol=1e-6)
    assert 0 < (crossing < 0).sum() < (crossing < EPS).sum() < 40
    assert set(step.logs) == {"loss_adversarial", "nonfinite"}


def test_with_thresholds_out_of_reach_it_is_adversarial_training() -> None:
    objective = models.Classifier(models.cnn(), torch.tensor([0, 1, 2, 3]))
    images = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    how = {"steps": 4, "step_scale": 2.0}
    found = FAT(0.7, math.inf, **how).step(objective, images, list("abcd")).adversarial
    assert torch.equal(found, pgd(objective, images, 0.7, random_start=False, **how).images)
    none = FAT(0.7, -math.inf, tau=0, **how).step(objective, images, list("abcd")).adversarial
    assert torch.equal(none, images)


def test_self_calibrated_thresholds_ride_in_the_state() -> None:
    running = RunningThresholds(("ce",))
    running.update(torch.tensor([[1.0], [3.0]]))
    running.begin()
    state = FAT(1.0, running).state_dict()
    resumed = FAT(1.0, RunningThresholds(("ce",)))
    resumed.load_state_dict(state)
    assert isinstance(resumed.thresholds, RunningThresholds)
    assert resumed.thresholds.current().values == (2.0,)


def test_what_it_cannot_do_without() -> None:
    objective = models.Affine(torch.ones(1, 1, 2, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="FAT needs thresholds, or objectives with one class an image"):
        FAT(1.0).step(objective, torch.zeros(1, 1, 2, 2), ["a"])
    with pytest.raises(ValueError, match="2 thresholds were given for K = 1 loss terms"):
        FAT(1.0, [1.0, 2.0]).step(objective, torch.zeros(1, 1, 2, 2), ["a"])
    named = models.Classifier(models.cnn(), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"they are for K = 1 loss terms \['other'\]"):
        FAT(1.0, Thresholds((1.0,), ("other",))).step(named, torch.zeros(1, 3, 9, 9), ["a"])
    with pytest.raises(ValueError, match="tau must be a whole number >= 0, got -1"):
        FAT(1.0, 1.0, tau=-1)
