"""What attacks climb in place of the host's loss: CosPGD's loss voxel by voxel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import PGD, AttackResult, CosineWeighted, Margin
from advmed.attacks.losses import margin
from advmed.attacks.problem import attacking
from advmed.objective import Averaged, ClassScores
from helpers.tensors import comparing, seeded


class Segmentation:
    """A convolution whose voxels are classes or regions, with its mean cross-entropy as the host's loss."""

    def __init__(self, classes: int = 3, dimensions: int = 2, exclusive: bool = True, ignored: bool = False) -> None:
        torch.manual_seed(classes + dimensions)
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.model = nn.Sequential(kind(2, 8, 3, padding=1), nn.Tanh(), kind(8, classes, 1)).double()
        size = (5, 4, 3)[:dimensions]
        self.images = torch.randn(4, 2, *size, dtype=torch.float64)
        self.exclusive = exclusive
        if exclusive:
            labels = self.model(self.images).argmax(1, keepdim=True)
            self.truth = torch.zeros(4, classes, *size).scatter_(1, labels, 1)
        else:
            self.truth = (self.model(self.images) > 0).float()
        self.valid = (torch.rand(4, 1, *size) < 0.7) if ignored else None

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        if self.exclusive:
            loss = -(self.truth * logits.log_softmax(1)).sum(1)
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, self.truth.double(), reduction="none").sum(1)
        return loss.flatten(1).mean(1, keepdim=True)

    def predictions(self, images: Tensor) -> Tensor:
        return self.model(images)

    def class_scores(self, predictions: Tensor) -> ClassScores:
        return ClassScores(predictions, self.truth, self.valid, self.exclusive)

    def wrong(self, images: Tensor) -> Tensor:
        """Share of wrong voxels, (B,)."""
        return (self.model(images).argmax(1) != self.truth.argmax(1)).double().flatten(1).mean(1)


def weighted(objective: Segmentation) -> Any:
    """The objective that is climbed."""
    (climbed,) = CosineWeighted().objectives(objective, objective.images)
    return climbed


def by_hand(objective: Segmentation, images: Tensor) -> Tensor:
    """The weighted loss, voxel by voxel."""
    logits = objective.model(images).detach()
    found = []
    for b in range(len(images)):
        losses = []
        for place in torch.cartesian_prod(*(torch.arange(n) for n in images.shape[2:])).reshape(-1, images.ndim - 2):
            at = tuple(place.tolist())
            if objective.valid is not None and not objective.valid[(b, 0, *at)]:
                continue
            z, t = logits[(b, slice(None), *at)].double(), objective.truth[(b, slice(None), *at)].double()
            if objective.exclusive:
                p = z.exp() / z.exp().sum()
                loss = -(t * p.log()).sum()
            else:
                yes = 1 / (1 + (-z).exp())
                loss = -(t * yes.log() + (1 - t) * (1 - yes).log()).sum()
                p, t = torch.cat([yes, 1 - yes]), torch.cat([t, 1 - t])
            losses.append(float(p @ t / (p.norm() * t.norm()) * loss))
        found.append(sum(losses) / max(1, len(losses)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_weighted_loss_voxel_by_voxel(dimensions: int, exclusive: bool, ignored: bool) -> None:
    objective = Segmentation(3, dimensions, exclusive, ignored)
    images = objective.images + 0.5 * torch.randn_like(objective.images)
    found = weighted(objective)(images)[:, 0]
    assert torch.allclose(found.double(), by_hand(objective, images), rtol=1e-5)


def test_the_weight_has_no_gradient() -> None:
    objective = Segmentation()
    images = (objective.images + 0.3).requires_grad_()
    (found,) = torch.autograd.grad(weighted(objective)(images).sum(), images)
    logits, truth = objective.model(images), objective.truth.double()
    weight = nn.functional.cosine_similarity(logits.softmax(1), truth, 1).detach()
    loss = (weight * -(truth * logits.log_softmax(1)).sum(1)).flatten(1).mean(1)
    (expected,) = torch.autograd.grad(loss.sum(), images)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, torch.autograd.grad(objective(images).sum(), images)[0], atol=1e-3)


def test_all_voxels_to_be_ignored_give_nothing_and_no_nan() -> None:
    objective = Segmentation(ignored=True)
    assert objective.valid is not None
    objective.valid[0] = False
    result = PGD(5, 5.0, loss=CosineWeighted())(objective, objective.images, 1.0)
    assert result.images.isfinite().all()
    assert torch.equal(result.images[0], objective.images[0])
    assert (result.norms[1:] > 0.9).all()


def test_an_attack_climbs_the_weighted_loss_and_tells_the_hosts_terms() -> None:
    objective = Segmentation()
    attack = PGD(8, 2.0, random_start=1.0, loss=CosineWeighted())
    found = attack(objective, objective.images, 0.5, generator=seeded(1))
    own = replace(attack, loss=None)(weighted(objective), objective.images, 0.5, generator=seeded(1))
    assert torch.equal(found.images, own.images)
    torch.testing.assert_close(found.terms, objective(own.images).detach())


def runs_by_hand(attack: PGD, objective: Any, images: Tensor, radius: float) -> list[AttackResult]:
    """The runs of an attack one by one, each as an attack of its own, with the random numbers of them all."""
    generator = seeded(1)
    return [
        replace(attack, restarts=1, random_start=start)(objective, images, radius, generator=generator)
        for start in attack.starts
    ]


@pytest.mark.parametrize("random_start", [0.0, 1.0])
def test_restarts_keep_the_run_that_the_host_finds_worst(random_start: float) -> None:
    """The weighted loss would keep another one."""
    objective = Segmentation()
    attack = PGD(3, 0.5, random_start=random_start, restarts=4, loss=CosineWeighted())
    found = attack(objective, objective.images, 4.0, generator=seeded(1))
    runs = runs_by_hand(attack, objective, objective.images, 4.0)
    winner = torch.stack([objective(run.images).sum(1) for run in runs]).argmax(0)
    assert len(winner.unique()) > 1
    assert not torch.equal(winner, torch.stack([weighted(objective)(run.images)[:, 0] for run in runs]).argmax(0))
    for name in ("images", "norms"):
        expected = torch.stack([getattr(runs[w], name)[i] for i, w in enumerate(winner.tolist())])
        assert torch.equal(getattr(found, name), expected)
    torch.testing.assert_close(found.terms, objective(found.images).detach())
    assert found.nonfinite.tolist() == [0] * 4


def test_restarts_on_the_margin_keep_the_run_of_the_largest_margin() -> None:
    """And not that of the largest cross-entropy."""
    objective, images = comparing()
    attack = PGD(2, 1.0, random_start=1.0, restarts=12, loss=Margin())
    found = attack(objective, images, 10.0, generator=seeded(1))
    runs = runs_by_hand(attack, objective, images, 10.0)
    margins = torch.stack([margin(objective.class_scores(objective.predictions(run.images)))[:, 0] for run in runs])
    assert len(margins.argmax(0).unique()) > 1
    assert not torch.equal(margins.argmax(0), torch.stack([objective(run.images).sum(1) for run in runs]).argmax(0))
    expected = torch.stack([runs[w].images[i] for i, w in enumerate(margins.argmax(0).tolist())])
    assert torch.equal(found.images, expected)


def test_a_run_whose_loss_is_not_finite_is_replaced_by_another() -> None:
    class Broken(Segmentation):
        passes = 0

        def __call__(self, images: Tensor) -> Tensor:
            self.passes += 1
            return super().__call__(images) * (torch.nan if self.passes == 1 else 1.0)  # when the first run is judged

    objective = Broken()
    attack = PGD(3, 3.0, random_start=1.0, restarts=2, loss=CosineWeighted())
    found = attack(objective, objective.images, 1.0, generator=seeded(1))
    assert objective.passes == 3  # two runs are judged, and one looked at
    assert torch.equal(found.images, runs_by_hand(attack, Segmentation(), objective.images, 1.0)[1].images)


@pytest.mark.parametrize("loss", [Margin(), CosineWeighted()])
def test_a_loss_of_a_random_network_is_the_mean_over_draws(loss: Any) -> None:
    """Of the loss that is climbed, and of the one that judges."""
    plain, images = comparing()
    random = type(plain)(nn.Sequential(nn.Dropout(0.3).train(), plain.model), plain.labels)
    value = margin if isinstance(loss, Margin) else CosineWeighted.value

    class ByHand:
        model = random.model

        def __call__(self, images: Tensor) -> Tensor:
            return sum(value(random.class_scores(random.predictions(images))) for _ in range(3)) / 3

    averaged = Averaged(random, 3)
    attack = PGD(3, 2.0, random_start=1.0, restarts=4, loss=loss)
    found = attack(averaged, images, 1.0, generator=seeded(1))
    runs = runs_by_hand(replace(attack, loss=None), ByHand(), images, 1.0)
    judge, values = ByHand() if isinstance(loss, Margin) else averaged, []
    for run in runs:
        with attacking(averaged):  # every look begins with the same draws
            values.append(judge(run.images).sum(1))
    winner = torch.stack(values).argmax(0).tolist()
    assert len(set(winner)) > 1
    expected = torch.stack([runs[w].images[i] for i, w in enumerate(winner)])
    torch.testing.assert_close(found.images, expected, rtol=1e-9, atol=1e-9)


def test_a_task_without_classes_is_told_so() -> None:
    with pytest.raises(TypeError, match="the cosine-weighted cross-entropy is for predictions that are classes"):
        PGD(10, 5.0, loss=CosineWeighted())(lambda images: images, torch.zeros(1, 3), 1.0)
