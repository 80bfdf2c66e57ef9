"""Tensors that tests of several rooms draw, measure and compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmed.testing.objectives import Classification, network, uniform
from helpers.models import Classifier

__all__ = ["ORDERS", "QUICK", "RANKS", "assert_close", "classifying", "comparing", "divergence", "gradients"]
__all__ += ["lengths", "loss_by_hand", "names", "seeded", "uniform"]

ORDERS = [2, math.inf]
RANKS = [(2, 7), (3, 4, 6), (2, 5, 4, 3)]  # (C, L), (C, H, W), (C, D, H, W)

QUICK: dict[str, Any] = {"steps": 4, "step_scale": 2.0}
"""A short attack of a method."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lengths(noise: Tensor, p: float = 2) -> Tensor:
    """Lp norm of every sample."""
    flat = noise.flatten(1)
    return flat.norm(dim=1) if p == 2 else flat.abs().amax(1)


def names(count: int | Iterable[int]) -> list[str]:
    return [f"case_{i}" for i in (range(count) if isinstance(count, int) else count)]


def gradients(model: nn.Module) -> list[Tensor]:
    """Of the weights, which have none afterwards."""
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def assert_close(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Gradients are the same, and not all zero."""
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert sum(a.abs().sum() for a in first) > 0


def divergence(clean: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(other)), (B,)."""
    return F.kl_div(other.log_softmax(1), clean.softmax(1), reduction="none").sum(1)


def classifying(batch: int) -> Classifier:
    """A classifier, in evaluation mode, of (batch, 3, 8, 8) images."""
    return Classifier(network().double().eval(), torch.arange(batch) % 4)


def comparing(**settings: bool | float) -> tuple[Classification, Tensor]:
    """A classifier that gives predictions, and five images of 3 x 8 x 8."""
    model = network(**settings).double()
    for parameter in model.parameters():  # as it comes, noise hardly moves its predictions
        parameter.data *= 3
    return Classification(model, torch.tensor([0, 1, 2, 3, 1])), uniform(5, 3, 8, 8)


def loss_by_hand(objective: Classification, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of that classifier, its terms and the logits, by other means."""
    logits = objective.model(images)
    chosen = logits.gather(1, objective.labels[:, None])[:, 0]
    terms = torch.stack((logits.exp().sum(1).log() - chosen, (logits**2).sum(1) / logits.shape[1]), 1)
    return torch.linalg.vector_norm(terms), terms, logits
