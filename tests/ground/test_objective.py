"""What a host hands over, and the one pass for training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import APGD, PGD
from advmed.objective import (
    Averaged,
    ClassObjective,
    Objective,
    PredictingObjective,
    check_terms,
    classes_of,
    model_of,
    names_of,
    predicting,
    training_pass,
)
from advmed.testing.objectives import Classification, network

IMAGES = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0))


def two_terms(images: Tensor) -> Tensor:
    return torch.stack((images.flatten(1).sum(1), images.flatten(1).square().sum(1)), 1)


class Coupled:
    """A host whose batch loss is not the mean of its per-sample terms."""

    names = ("a", "b")

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.passes += 1
        return two_terms(images)

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        terms = self(images)
        return terms.sum().log(), terms


def test_what_is_an_objective_and_one_with_predictions() -> None:
    for objective in (two_terms, Coupled()):
        assert isinstance(objective, Objective)
        assert not isinstance(objective, PredictingObjective)
    assert not isinstance(torch.zeros(1), Objective)
    compared = Classification(network(), torch.zeros(1))
    assert isinstance(compared, PredictingObjective)
    assert isinstance(compared, ClassObjective)
    assert predicting(compared, "A method") is compared
    assert classes_of(compared, "margin") is compared


PREDICTING = ["predictions", "loss_and_predictions", "distance"]


@pytest.mark.parametrize("present", [[], ["predictions"], ["distance", "predictions"]])
@pytest.mark.parametrize("absent", ["no attribute", "not callable"])
def test_what_an_objective_without_predictions_or_classes_lacks_is_named(present: list[str], absent: str) -> None:
    given: dict[str, Any] = {name: lambda self, *images: images for name in present}
    if absent == "not callable":
        given = {**dict.fromkeys([*PREDICTING, "class_scores"]), **given}
    objective = type("Half", (Coupled,), given)()
    lacking = [name for name in PREDICTING if name not in present]
    message = (
        rf"^DPAAT compares predictions on clean and attacked images, and Half gives none: it has no "
        rf"{', '.join(lacking)} \(see advmed\.objective\.PredictingObjective\)$"
    )
    with pytest.raises(TypeError, match=message):
        predicting(objective, "DPAAT")
    message = (
        rf"^the margin is for predictions that are classes, of images or voxels; Half shows none: it has no "
        rf"{'' if present else 'predictions, '}class_scores \(see advmed\.objective\.ClassObjective\)$"
    )
    with pytest.raises(TypeError, match=message):
        classes_of(objective, "the margin")


def test_models_and_names_are_optional() -> None:
    model = nn.Linear(2, 2)
    assert model_of(Classification(model, torch.zeros(1))) is model
    for objective in (two_terms, SimpleNamespace(model="resnet18"), Classification(model, torch.zeros(1), named=False)):
        assert model_of(objective) is None
    assert names_of(Coupled(), 2) == ("a", "b")
    assert names_of(two_terms, 1) == ("loss",)
    assert names_of(two_terms, 3) == ("term_0", "term_1", "term_2")


@pytest.mark.parametrize("coupled", [False, True])
def test_the_training_loss_is_the_batch_mean_of_the_sums_or_the_hosts_own(coupled: bool) -> None:
    """In one pass."""
    images, objective = IMAGES.clone().requires_grad_(), Coupled() if coupled else two_terms
    loss, terms = training_pass(objective, images)
    assert not coupled or objective.passes == 1
    assert not terms.requires_grad
    assert torch.equal(terms, two_terms(IMAGES))
    loss.backward()
    total = two_terms(IMAGES).double().sum()
    assert loss.item() == pytest.approx((total.log() if coupled else total / 3).item(), rel=1e-6)
    torch.testing.assert_close(images.grad, (1 + 2 * IMAGES) / (total.float() if coupled else 3))


# Random networks


class Noisy:
    """Two terms of a random slope each: its mean, and in every pass another one."""

    names = ("a", "b")

    def __init__(self) -> None:
        self.model = nn.Dropout(0.5)
        self.mean = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ (self.mean + 4 * (self.model(torch.ones(2, 8)) - 1)).T


def test_the_mean_over_draws_of_a_random_network() -> None:
    noisy = Noisy()
    images = IMAGES.clone().requires_grad_()
    averaged = Averaged(noisy, draws=3)
    torch.manual_seed(0)
    found = averaged(images)
    torch.manual_seed(0)
    passes = [noisy(images) for _ in range(3)]
    assert not torch.equal(passes[0], passes[1])
    torch.testing.assert_close(found, (passes[0] + passes[1] + passes[2]) / 3)
    gradients = [torch.autograd.grad(one.sum(), images, retain_graph=True)[0] for one in passes]
    torch.testing.assert_close(torch.autograd.grad(found.sum(), images)[0], sum(gradients) / 3)
    assert (averaged.draws, averaged.objective) == (3, noisy)
    assert model_of(averaged) is noisy.model
    assert names_of(averaged, 2) == ("a", "b")
    assert names_of(Averaged(two_terms, 2), 2) == ("term_0", "term_1")
    assert model_of(Averaged(two_terms, 2)) is None
    assert isinstance(averaged, Objective)
    for draws in (1, 0, True, 2.0):
        with pytest.raises(ValueError, match=f"draws must be a whole number >= 2, got {draws}"):
            Averaged(noisy, draws)
    with pytest.raises(ValueError, match="must return loss terms of shape"):
        Averaged(lambda images: torch.zeros(3), 2)(IMAGES)


@pytest.mark.parametrize("attack", [PGD(1, 1.0), APGD(1, random_start=0)])
def test_an_attack_on_the_mean_over_draws_goes_where_the_mean_rises(attack: Any) -> None:
    """Expectation over transformation: a step along the mean slope, which no pass by itself has."""
    noisy = Noisy()
    slope = noisy.mean.sum(0)
    torch.manual_seed(0)
    cosines = [
        torch.cosine_similarity((attack(one, IMAGES, 1.0).images - IMAGES).flatten(1), slope[None]).min().item()
        for one in (noisy, Averaged(noisy, 2000))
    ]
    assert cosines[0] < 0.8
    assert cosines[1] > 0.98


@pytest.mark.parametrize(
    ("terms", "got"),
    [
        (torch.zeros(()), r"\(\)"),
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(1, 2), r"\(1, 2\)"),
        (torch.zeros(3, 2, 1), r"\(3, 2, 1\)"),
        ([[0.0]] * 3, "list"),
        (None, "NoneType"),
    ],
)
def test_wrong_terms(terms: Any, got: str) -> None:
    message = rf"must return loss terms of shape \(B, K\) = \(3, K\), one row per sample and not averaged.*got {got}$"
    with pytest.raises(ValueError, match=message):
        check_terms(terms, IMAGES)
    with pytest.raises(ValueError, match=message):
        training_pass(lambda images: terms, IMAGES)

    class Own:
        def __call__(self, images: Tensor) -> Tensor:
            raise AssertionError("the host's own loss makes the pass")

        def loss(self, images: Tensor) -> tuple[Tensor, Any]:
            return torch.zeros(()), terms

    with pytest.raises(ValueError, match=message):
        training_pass(Own(), IMAGES)
