"""DPAAT against a reference on a frozen linear model; its loss is in test_methods.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from advmed.methods import AT, DPAAT
from advmed.testing.objectives import Classification, network
from helpers.models import Cut, Logistic
from helpers.tensors import QUICK, comparing, gradients, lengths, names, uniform

# The sizes


class LinearTask:
    """Ten samples of a frozen linear model with K logistic losses, drawn three at a time for three epochs."""

    def __init__(self, p: float, terms: int) -> None:
        self.weight = uniform(2, 5, seed=1) - 0.5
        self.dual = float(self.weight.norm() if p == 2 else self.weight.abs().sum())
        self.labels = 1.0 - 2.0 * (torch.arange(10, dtype=torch.float64) % 2)
        self.scales = torch.tensor([1.0, 0.6], dtype=torch.float64)[:terms]
        self.offsets = torch.tensor([0.1, -0.3], dtype=torch.float64)[:terms]
        images = uniform(10, 2, 5, seed=2)
        wanted = self.labels * torch.linspace(-1.5, 3.0, 10, dtype=torch.float64)  # some far on the wrong side
        shift = wanted - (images * self.weight).flatten(1).sum(1)
        self.images = images + shift[:, None, None] * self.weight / self.weight.square().sum()
        drawn = torch.Generator().manual_seed(3)
        # With replacement: the same sample may be in a batch twice.
        self.epochs = [[torch.randint(10, (3,), generator=drawn) for _ in range(14)] for _ in range(3)]

    def objective(self, index: Tensor) -> Any:
        objective = Logistic(self.weight, self.labels[index], self.scales, self.offsets)
        objective.model.requires_grad_(False)
        return objective

    def reference(
        self, low: float, first: float, high: float, step: float, average: str
    ) -> list[tuple[float, list[float]]]:
        """For every batch the fraction of stable samples and all sizes after it, in plain numbers.

        The worst point of a ball moves y w.x by -eps ||w||.
        """

        def loss(sample: int, size: float) -> float:
            label, output = float(self.labels[sample]), float((self.images[sample] * self.weight).sum())
            worst = output - label * size * self.dual
            margins = [
                label * (c * worst + b) for c, b in zip(self.scales.tolist(), self.offsets.tolist(), strict=True)
            ]
            return sum(math.log1p(math.exp(-margin)) for margin in margins)

        sizes, history, pool = [first] * 10, [], []
        for epoch in self.epochs:
            pool = pool if average == "run" else []
            for batch in epoch:
                samples = batch.tolist()
                increases = [loss(i, sizes[i]) - loss(i, 0) for i in samples]
                pool = [*([] if average == "batch" else pool), *increases]
                mean = sum(pool) / len(pool)
                gaps = [abs(increase - mean) for increase in increases]
                assert min(gaps) > 1e-6 or not any(increases)  # rounding decides nothing
                for i, increase in zip(samples, increases, strict=True):  # a sample that is there twice moves twice
                    sizes[i] = min(max(sizes[i] - step if increase > mean else sizes[i] + step, low), high)
                history.append((sum(increase <= mean for increase in increases) / len(samples), list(sizes)))
        return history


@pytest.mark.parametrize("average", ["batch", "epoch"])
@pytest.mark.parametrize(("p", "terms"), [(2, 1), (2, 2), (math.inf, 1)])
@pytest.mark.parametrize("low", [0.0, 0.27])
def test_sizes_move_as_the_rule_says(average: Any, p: float, terms: int, low: float) -> None:
    task, bounds = LinearTask(p, terms), (low, 0.52, 0.93)
    reference = task.reference(*bounds, 0.09, average)
    for other in {"batch", "epoch", "run"} - {average}:  # it does matter what the mean is of
        assert task.reference(*bounds, 0.09, other) != reference
    reached = {size for _, sizes in reference for size in sizes}
    assert {low or 0.93, 0.93} < reached  # nobody falls to 0, where nothing increases
    method = DPAAT(0.52, eps_min=low, eps_max=0.93, step_size=0.09, sync_weight=0, average=average, norm=p, **QUICK)
    expected = iter(reference)
    for epoch in task.epochs:
        method.begin_epoch()
        for batch in epoch:
            ids, images = [f"case_{i}" for i in batch.tolist()], task.images[batch]
            used = method.sizes.get(ids).double()
            step = method.step(task.objective(batch), images, ids)
            torch.testing.assert_close(lengths(step.adversarial - images, p), used, rtol=1e-6, atol=1e-12)
            stable, sizes = next(expected)
            assert step.logs["expanded"].item() == pytest.approx(stable)
            torch.testing.assert_close(method.sizes.get(names(10)), torch.tensor(sizes), rtol=0, atol=2e-6)
            method.merge()  # however often a state is saved
    assert next(expected, None) is None
    assert method.sizes.visits().sum() == 3 * 14 * 3


@pytest.mark.parametrize("average", ["batch", "epoch"])
def test_a_sample_at_the_mean_is_stable(average: Any) -> None:
    """As the only one of its batch is, and as all are where the increases are equal."""
    task, index = LinearTask(2, 1), torch.tensor([3])
    alone, flat = (DPAAT(0.5, step_size=0.25, sync_weight=0, average=average, **QUICK) for _ in range(2))
    alone.step(task.objective(index), task.images[index], ["a"])
    assert alone.sizes.get(["a"]).item() == 0.75
    for visit in (1, 2, 3):
        step = flat.step(lambda x: x.flatten(1).sum(1, keepdim=True) * 0, task.images[:4], names(4))
        assert flat.sizes.values().tolist() == [min(0.5 + 0.25 * visit, 1.0)] * 4
        assert step.logs["expanded"] == 1


class Broken(Classification):
    """Some samples have a loss that is not finite, in the clean or the attacked pass of a step."""

    def __init__(self, labels: Tensor, rows: list[int], bad: float, where: str, compares: bool) -> None:
        super().__init__(network().double(), labels)
        self.rows, self.bad, self.where, self.compares = rows, bad, where, compares

    def _spoilt(self, terms: Tensor, what: str) -> Tensor:
        if self.where in (what, "both"):
            terms = terms.clone()
            terms[self.rows, 0] = self.bad
        return terms

    def __call__(self, images: Tensor) -> Tensor:
        """For the attack, and for the clean pass where nothing is compared."""
        terms = super().__call__(images)
        return terms if torch.is_grad_enabled() else self._spoilt(terms, "clean")

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, terms, predictions = super().loss_and_predictions(images)
        clean = self.compares and self.passes.count("training") % 2 == 1
        return loss, self._spoilt(terms, "clean" if clean else "attacked"), predictions


@pytest.mark.parametrize("sync_weight", [0.0, 1.0])
@pytest.mark.parametrize("average", ["batch", "epoch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["clean", "attacked", "both"])
def test_a_loss_that_is_not_finite_moves_no_size_and_spoils_no_mean(
    sync_weight: float, average: Any, bad: float, where: str
) -> None:
    """The others move as they do without that sample."""
    images, labels, healthy = uniform(7, 3, 8, 8), torch.arange(7) % 4, [0, 1, 3, 4, 6]
    broken = Broken(labels, [2, 5], bad, where, compares=sync_weight > 0)
    sound = Classification(broken.model, labels[healthy])
    whole, part = (DPAAT(0.5, step_size=0.03, sync_weight=sync_weight, average=average, **QUICK) for _ in range(2))
    for _ in range(5):
        whole.step(broken, images, names(7))
        part.step(sound, images[healthy], names(healthy))
    expected = torch.full((7,), 0.5)
    expected[healthy] = part.sizes.values()
    assert torch.equal(whole.sizes.values(), expected)
    assert whole.sizes.visits().tolist() == [5 * (i in healthy) for i in range(7)]
    assert len(set(part.sizes.values().tolist())) > 1


def test_an_attack_that_was_lost_moves_no_size_and_spoils_no_mean() -> None:
    """The losses are finite, the gradients of two samples are not: their loss would seem not to rise at all."""
    images, labels, healthy = uniform(7, 3, 8, 8), torch.arange(7) % 4, [0, 1, 3, 4, 6]
    sound = Classification(network().double(), labels)

    def cut(seen: Any) -> Any:
        return sound(Cut.apply(seen, [2, 5], math.nan))

    whole, part = (DPAAT(0.5, step_size=0.03, sync_weight=0, **QUICK) for _ in range(2))
    for _ in range(5):
        whole.step(cut, images, names(7))
        part.step(Classification(sound.model, labels[healthy]), images[healthy], names(healthy))
    expected = torch.full((7,), 0.5)
    expected[healthy] = part.sizes.values()
    assert torch.equal(whole.sizes.values(), expected)
    assert whole.sizes.visits().tolist() == [5 * (i in healthy) for i in range(7)]


def test_a_batch_without_a_finite_loss_moves_nothing() -> None:
    objective = Broken(torch.arange(3), [0, 1, 2], math.nan, "attacked", compares=False)
    method = DPAAT(0.5, sync_weight=0, average="epoch", **QUICK)
    method.step(objective, uniform(3, 3, 8, 8), names(3))
    assert method.sizes.values().tolist() == [0.5] * 3
    assert method.state_dict()["increases"] == [0, 0]


def test_terms_in_half_precision_are_added_up_in_float32() -> None:
    """In bfloat16 1024 + 0.75 is 1024, and no sample would have an increase."""

    def objective(images: Tensor) -> Tensor:
        slopes = torch.tensor([0.25, 0.5, 0.75])
        small = (images[:, 0, 0] * slopes).bfloat16()
        return torch.stack((small, torch.full_like(small, 1024.0)), 1)

    method = DPAAT(1.0, step_size=0.25, sync_weight=0, **QUICK)
    for _ in range(2):
        method.step(objective, torch.zeros(3, 1, 1), names(3))
    # Increases of 1/4, 1/2 and 3/4 at the size 1; then 5/16, 5/8 and 9/16, of which the mean is 1/2.
    assert method.sizes.values().tolist() == [1.5, 1.0, 0.5]


def test_sizes_begin_and_end_where_they_are_told_by_default() -> None:
    method = DPAAT(0.5)
    assert method.sizes.get(["new"]).item() == 0.5
    assert (method.lowest, method.highest, method.step_size) == (0.0, 1.0, 0.05)
    assert (method.sync_weight, method.average) == (1.0, "batch")
    still = DPAAT(0)  # sizes may have no room at all
    assert (still.lowest, still.highest, still.step_size) == (0.0, 0.0, 0.0)


# The clean pass


def test_without_steps_and_synchronisation_it_is_adversarial_training() -> None:
    """Bit for bit, BatchNorm and the random state included: the clean pass leaves no trace."""
    results = []
    for method in (AT(0.75, **QUICK), DPAAT(0.75, step_size=0, sync_weight=0, **QUICK)):
        objective, images = comparing(normalise=True, dropout=0.4)
        torch.manual_seed(0)
        for _ in range(2):
            step = method.step(objective, images, names(5))
        step.loss.backward()
        state = [*objective.model.state_dict().values(), torch.get_rng_state()]
        results.append([step.loss.detach(), step.adversarial, *gradients(objective.model), *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert method.sizes.get(names(5)).tolist() == [0.75] * 5
    assert method.sizes.visits().tolist() == [2] * 5


def test_the_clean_pass_normalises_as_the_training_pass_does() -> None:
    """Without noise nothing has increased; running statistics would give the clean pass another loss."""
    objective, images = comparing(normalise=True, dropout=0.4)
    objective.model[1].running_mean.fill_(9.0)
    method = DPAAT(0, eps_max=1, step_size=0.1, sync_weight=0, average="epoch", **QUICK)
    method.step(objective, images, names(5))
    assert method.state_dict()["increases"] == [0.0, 5.0]
