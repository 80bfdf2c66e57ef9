"""What cannot be meant is refused before anything is computed, by every attack alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed import APGD, PGD, SAT, Attack, Noise, SquareAttack, apgd, ifgsm, pgd, square
from advmed.classification import ClassificationObjective

KINDS: dict[str, Callable[[float], Attack]] = {
    "pgd": lambda norm: PGD(2, 2.0, norm),
    "apgd": lambda norm: APGD(2, norm),
    "square": lambda norm: SquareAttack(2, norm),
    "noise": lambda norm: Noise("gaussian", norm),
}
ONE_CALL: dict[str, Callable[..., Any]] = {
    "pgd": lambda *what, **how: pgd(*what, **how, steps=2, step_scale=2),
    "ifgsm": lambda *what, **how: ifgsm(*what, **how, steps=2),
    "apgd": lambda *what, **how: apgd(*what, **how, steps=2),
    "square": lambda *what, **how: square(*what, **how, queries=2),
}


def network(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, classes))


def images() -> Tensor:
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def objective() -> ClassificationObjective:
    return ClassificationObjective(network(), torch.tensor([0, 2]))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
class TestEveryAttackRefuses:
    def test_a_network_in_place_of_an_objective(self, make: Callable[[float], Attack]) -> None:
        """Whose logits it would raise, all of them."""
        with pytest.raises(TypeError, match=r"Sequential is a network.*advmed\.ClassificationObjective"):
            make(2.0)(network(), images(), 0.5)

    def test_whole_numbers(self, make: Callable[[float], Attack]) -> None:
        with pytest.raises(ValueError, match=r"floating point, got torch\.uint8.*/ 255"):
            make(2.0)(objective(), (images() * 255).byte(), 0.5)

    @pytest.mark.parametrize(("norm", "most"), [(2.0, 8.0), (math.inf, 1.0)])
    def test_a_radius_beyond_the_bounds(self, make: Callable[[float], Attack], norm: float, most: float) -> None:
        """8 in Linf is 8 / 255 that was not divided. The distance of black and white is sqrt(64) in L2."""
        make(norm)(objective(), images(), most, bounds=(0.0, 1.0))
        with pytest.raises(ValueError, match=rf"a radius of {most + 1:g} is more than .* allows, {most:g} in L"):
            make(norm)(objective(), images(), most + 1, bounds=(0.0, 1.0))

    def test_images_of_another_scale_than_the_bounds(self, make: Callable[[float], Attack]) -> None:
        make(2.0)(objective(), images() * 2.8, 0.5, bounds=(0.0, 1.0))  # overshoots
        with pytest.raises(ValueError, match=r"images hold values from .* to 2.* where the bounds are 0 and 1"):
            make(2.0)(objective(), images() * 255, 0.5, bounds=(0.0, 1.0))


@pytest.mark.parametrize("call", ONE_CALL.values(), ids=ONE_CALL)
def test_the_functions_look_at_more(call: Callable[..., Any]) -> None:
    """For which the device must be waited for."""
    with pytest.raises(ValueError, match="radius must be >= 0"):
        call(objective(), images(), -1.0)
    with pytest.raises(ValueError, match="images hold values"):
        call(objective(), images() * 255, 0.5, bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"5\d% of the values of the images lie outside of the bounds 0 and 1"):
        call(objective(), images() * 2 - 1.1, 0.5, bounds=(0.0, 1.0))


def test_a_training_looks_at_its_first_images() -> None:
    """For which it waits once; a batch of a later augmentation may be what it is."""
    method = SAT(0.5, steps=2, bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match="normalise inside of the network"):
        method.step(objective(), images() * 2 - 1.1, [str(i) for i in range(len(images()))])
    method.step(objective(), images() * 2 - 1.1, [str(i) for i in range(len(images()))])


def test_noise_that_half_precision_cannot_hold_is_told() -> None:
    def rising(x: Tensor) -> Tensor:
        return x.float().flatten(1).sum(1, keepdim=True)

    many = torch.full((2, 3, 64, 64), 0.5)
    SAT(0.25, steps=2).step(rising, many, ["a", "b"])
    with pytest.warns(UserWarning, match=r"images in bfloat16 hold \d+% of the noise"):
        SAT(0.25, steps=2).step(rising, many.bfloat16(), ["a", "b"])


def test_a_module_that_returns_terms_says_so() -> None:
    class Loss(nn.Module):
        names = ("mean",)

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).mean(1, keepdim=True)

    found = pgd(Loss(), images(), 0.8, steps=4, step_scale=2, random_start=False)
    torch.testing.assert_close(found.terms, Loss()(images()) + 0.8 / 8)


class TestClassification:
    @pytest.mark.parametrize(
        ("labels", "got"),
        [
            (torch.tensor([[0.0], [1.0]]), "torch.float32 of shape (2, 1)"),
            (torch.tensor([0.0, 1.0]), "torch.float32 of shape (2,)"),
            (torch.tensor([[1, 0], [0, 1]]), "torch.int64 of shape (2, 2)"),
        ],
    )
    def test_labels_that_are_no_class_numbers(self, labels: Tensor, got: str) -> None:
        with pytest.raises(ValueError, match="class numbers") as error:
            ClassificationObjective(network(), labels)
        assert got in str(error.value)

    def test_a_single_logit_has_no_loss(self) -> None:
        """The softmax of one logit is 1: cross-entropy 0 whatever the image, which looks perfectly robust."""
        with pytest.raises(ValueError, match=r"two or more classes.*\(2, 1\)"):
            pgd(ClassificationObjective(network(1), torch.tensor([0, 0])), images(), 0.5, steps=2, step_scale=2)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
    def test_whole_numbers_of_every_kind_are_class_numbers(self, dtype: torch.dtype) -> None:
        labels = torch.tensor([0, 2], dtype=dtype)
        torch.testing.assert_close(ClassificationObjective(network(), labels)(images()), objective()(images()))

    def test_what_a_loader_made_in_inference_mode(self) -> None:
        how: dict[str, Any] = {"steps": 2, "step_scale": 2.0, "random_start": False}
        expected = pgd(objective(), images(), 0.5, **how)
        model = network()
        with torch.inference_mode():
            made = ClassificationObjective(model, torch.tensor([0, 2]) * 1)
            found = pgd(made, images() * 1, 0.5, **how)
        torch.testing.assert_close(found.images, expected.images)
