"""What attacks on segmentations climb, against voxel by voxel computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from advmed.attacks import APGD, BalancedCrossEntropy, JensenShannon, MaskedCrossEntropy, SoftDice
from advmed.objective import ClassScores

LOSSES = (MaskedCrossEntropy, BalancedCrossEntropy, JensenShannon, SoftDice)


def scores(exclusive: bool, ignored: bool, classes: int = 3) -> ClassScores:
    generator = torch.Generator().manual_seed(classes + 2 * exclusive + ignored)
    logits = 3 * torch.randn(2, classes, 4, 3, generator=generator, dtype=torch.float64)
    if exclusive:
        labels = torch.randint(classes, (2, 1, 4, 3), generator=generator)
        truth = torch.zeros(2, classes, 4, 3).scatter_(1, labels, 1)
    else:
        truth = (torch.rand(2, classes, 4, 3, generator=generator) < 0.4).float()
    valid = (torch.rand(2, 1, 4, 3, generator=generator) < 0.7) if ignored else None
    return ClassScores(logits, truth, valid, exclusive)


def voxels(given: ClassScores, b: int) -> list[tuple[list[float], list[float], list[float]]]:
    """Logits, probabilities and truth of every voxel of a sample that counts, as numbers."""
    found = []
    for y in range(4):
        for x in range(3):
            if given.valid is not None and not given.valid[b, 0, y, x]:
                continue
            z = given.logits[b, :, y, x].tolist()
            if given.exclusive:
                total = sum(math.exp(v) for v in z)
                p = [math.exp(v) / total for v in z]
            else:
                p = [1 / (1 + math.exp(-v)) for v in z]
            found.append((z, p, given.truth[b, :, y, x].tolist()))
    return found


def masked(exclusive: bool, z: list[float], p: list[float], t: list[float]) -> list[float]:
    """Cross-entropy of each choice that is right still."""
    if exclusive:
        c = t.index(1.0)
        return [-math.log(p[c]) if max(range(len(z)), key=z.__getitem__) == c else 0.0]
    return [-math.log(q if y else 1 - q) if (q > 0.5) == (y > 0) else 0.0 for q, y in zip(p, t, strict=True)]


def by_hand(kind: Any, given: ClassScores, b: int) -> float:
    places = voxels(given, b)
    classes = given.logits.shape[1]
    if kind is MaskedCrossEntropy:
        return sum(sum(masked(given.exclusive, *place)) for place in places) / len(places)
    if kind is BalancedCrossEntropy:
        groups: dict[Any, list[float]] = {}
        for z, p, t in places:
            losses = masked(given.exclusive, z, p, t)
            keys = [t.index(1.0)] if given.exclusive else [(c, y) for c, y in enumerate(t)]
            for key, loss in zip(keys, losses, strict=True):
                groups.setdefault(key, []).append(loss)
        return sum(sum(group) / len(group) for group in groups.values()) / len(groups)
    if kind is JensenShannon:
        total = 0.0
        for _, p, t in places:
            pairs = [(p, t)] if given.exclusive else [([q, 1 - q], [y, 1 - y]) for q, y in zip(p, t, strict=True)]
            for q, y in pairs:
                middle = [(a + b) / 2 for a, b in zip(q, y, strict=True)]
                for one in (q, y):
                    total += 0.5 * sum(v * math.log(v / m) for v, m in zip(one, middle, strict=True) if v > 0)
        return total / len(places)
    found = []
    for c in range(1 if given.exclusive else 0, classes):
        truth = sum(t[c] for _, _, t in places)
        if truth:
            overlap, predicted = sum(p[c] * t[c] for _, p, t in places), sum(p[c] for _, p, _ in places)
            found.append(2 * overlap / (truth + predicted))
    return 1 - sum(found) / len(found)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("exclusive", [True, False])
def test_a_loss_voxel_by_voxel(exclusive: bool, ignored: bool, kind: Any) -> None:
    given = scores(exclusive, ignored)
    wanted = [by_hand(kind, given, b) for b in range(2)]
    torch.testing.assert_close(kind.value(given)[:, 0].tolist(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", LOSSES)
def test_nothing_to_count_gives_no_nan(kind: Any) -> None:
    logits = torch.randn(1, 2, 3, requires_grad=True)
    truth, nowhere = torch.tensor([[[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]]), torch.zeros(1, 1, 3, dtype=torch.bool)
    for valid in (nowhere, None):
        value = kind.value(ClassScores(logits, truth, valid, exclusive=True))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def test_an_image_without_structures_is_attacked_by_making_some() -> None:
    """Its Dice has no value, and no gradient; what is found in it is wrong."""

    class Background:
        def __call__(self, images: Tensor) -> Tensor:
            return images.flatten(1).sum(1, keepdim=True) * 0

        def predictions(self, images: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(images), images - 5], 1)

        def class_scores(self, predictions: Tensor) -> ClassScores:
            truth = torch.zeros_like(predictions)
            truth[:, 0] = 1
            return ClassScores(predictions, truth, None, exclusive=True)

    found = APGD(10, loss=SoftDice())(Background(), torch.zeros(1, 1, 4), 2.0)
    assert found.images.sum() > 1.9


def test_lost_voxels_pull_no_more() -> None:
    """The gradient of the host's cross-entropy is at its largest where a voxel is lost; these have none there."""
    logits = torch.tensor([[[-20.0, 1.0], [20.0, 0.0]]], requires_grad=True)
    truth = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    for kind in (MaskedCrossEntropy, JensenShannon):
        (gradient,) = torch.autograd.grad(kind.value(ClassScores(logits, truth, None, True)).sum(), logits)
        assert gradient[0, :, 0].abs().max() < 1e-6 < gradient[0, :, 1].abs().max()
