"""DPAAT against a reference on a frozen linear model, and losses and gradients worked out apart from it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmed.methods import AMAT, AT, DPAAT
from advmed.methods.base import Step

ORDERS = [2, math.inf]
QUICK: dict[str, Any] = {"steps": 4, "step_scale": 2.0}


def names(count: int) -> list[str]:
    return [f"case_{i}" for i in range(count)]


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def assert_close(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert sum(a.abs().sum() for a in first) > 0


def lengths(step: Step, images: Tensor, p: float = 2) -> Tensor:
    return torch.linalg.vector_norm((step.adversarial - images).flatten(1), ord=p, dim=1)


# The sizes


class LinearTask:
    """Ten samples of a frozen linear model with K logistic losses, drawn three at a time for three epochs."""

    def __init__(self, tiny: SimpleNamespace, p: float, terms: int) -> None:
        self.tiny, self.p = tiny, p
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
        objective = self.tiny.Logistic(self.weight, self.labels[index], self.scales, self.offsets)
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
                for i, size, increase in zip(samples, [sizes[i] for i in samples], increases, strict=True):
                    sizes[i] = min(max(size - step if increase > mean else size + step, low), high)
                history.append((sum(increase <= mean for increase in increases) / len(samples), list(sizes)))
        return history


@pytest.mark.parametrize("average", ["batch", "epoch"])
@pytest.mark.parametrize(("p", "terms"), [(2, 1), (2, 2), (math.inf, 1)])
@pytest.mark.parametrize("low", [0.0, 0.27])
def test_sizes_move_as_the_rule_says(tiny: SimpleNamespace, average: Any, p: float, terms: int, low: float) -> None:
    task, bounds = LinearTask(tiny, p, terms), (low, 0.52, 0.93)
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
            torch.testing.assert_close(lengths(step, images, p), used, rtol=1e-6, atol=1e-12)
            stable, sizes = next(expected)
            assert step.logs["expanded"].item() == pytest.approx(stable)
            torch.testing.assert_close(method.sizes.get(names(10)), torch.tensor(sizes), rtol=0, atol=2e-6)
            method.merge()  # however often a state is saved
    assert next(expected, None) is None
    assert method.sizes.visits().sum() == 3 * 14 * 3


@pytest.mark.parametrize("average", ["batch", "epoch"])
def test_a_sample_at_the_mean_is_stable(tiny: SimpleNamespace, average: Any) -> None:
    """As the only one of its batch is, and as all are where the increases are equal."""
    task, index = LinearTask(tiny, 2, 1), torch.tensor([3])
    alone, flat = (DPAAT(0.5, step_size=0.25, sync_weight=0, average=average, **QUICK) for _ in range(2))
    alone.step(task.objective(index), task.images[index], ["a"])
    assert alone.sizes.get(["a"]).item() == 0.75
    for visit in (1, 2, 3):
        step = flat.step(lambda x: x.flatten(1).sum(1, keepdim=True) * 0, task.images[:4], names(4))
        assert flat.sizes.values().tolist() == [min(0.5 + 0.25 * visit, 1.0)] * 4
        assert step.logs["expanded"] == 1


def test_the_mean_of_an_epoch_is_forgotten_in_the_next() -> None:
    """One sample a batch, whose loss increase is what the slope says: 1, then 4."""

    def run(*, anew: bool) -> float:
        method = DPAAT(1.0, step_size=0.25, sync_weight=0, average="epoch", **QUICK)
        for sample, slope in (("a", 1.0), ("b", 4.0)):
            method.merge()
            if anew:
                method.begin_epoch()
            method.step(lambda x, slope=slope: slope * x[:, 0, :1], torch.zeros(1, 1, 4), [sample])
        assert method.sizes.get(["a"]).item() == 1.25
        return method.sizes.get(["b"]).item()

    assert run(anew=False) == 0.75  # 4 is above the mean of 1 and 4
    assert run(anew=True) == 1.25


@pytest.mark.parametrize("swapped", [False, True])
def test_an_id_twice_in_a_batch_moves_once_as_its_last_image_says(tiny: SimpleNamespace, swapped: bool) -> None:
    """As when a batch holds two crops of one case."""
    task = LinearTask(tiny, 2, 1)
    index = torch.tensor([9, 4, 0] if swapped else [0, 4, 9])  # sample 0 is fragile, 9 stable
    method = DPAAT(0.5, step_size=0.25, sync_weight=0, **QUICK)
    step = method.step(task.objective(index), task.images[index], ["twice", "b", "twice"])
    torch.testing.assert_close(lengths(step, task.images[index]), torch.full((3,), 0.5, dtype=torch.float64))
    assert method.sizes.get(["twice"]).item() == (0.25 if swapped else 0.75)
    assert method.sizes.ids() == ["twice", "b"]
    assert method.sizes.visits().tolist() == [2, 1]


class Broken:
    """An objective some samples of which have a loss that is not finite, in the clean or the attacked training pass."""

    def __init__(self, inner: Any, rows: list[int], bad: float, where: str) -> None:
        self.inner, self.rows, self.bad, self.where = inner, rows, bad, where
        self.model, self.clean = inner.model, True

    def __call__(self, images: Tensor) -> Tensor:
        """For the attack, and for the clean pass where nothing is compared."""
        return self.inner(images) if torch.is_grad_enabled() else self._spoilt(self.inner(images), "clean")

    def _spoilt(self, terms: Tensor, what: str) -> Tensor:
        if self.where in (what, "both"):
            terms = terms.clone()
            terms[self.rows, 0] = self.bad
        return terms

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        loss, terms = self.inner.loss(images)
        return loss, self._spoilt(terms, "attacked")

    def predictions(self, images: Tensor) -> Tensor:
        return self.inner.predictions(images)

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, terms, predictions = self.inner.loss_and_predictions(images)
        what, self.clean = "clean" if self.clean else "attacked", not self.clean
        return loss, self._spoilt(terms, what), predictions

    def distance(self, clean: Tensor, other: Tensor) -> Tensor:
        return self.inner.distance(clean, other)


@pytest.mark.parametrize("sync_weight", [0.0, 1.0])
@pytest.mark.parametrize("average", ["batch", "epoch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["clean", "attacked", "both"])
def test_a_loss_that_is_not_finite_moves_no_size_and_spoils_no_mean(
    tiny: SimpleNamespace, sync_weight: float, average: Any, bad: float, where: str
) -> None:
    """The others move as they do without that sample."""
    model, images, labels = tiny.cnn().double(), uniform(7, 3, 8, 8), torch.arange(7) % 4
    healthy = [0, 1, 3, 4, 6]
    whole, part = (DPAAT(0.5, step_size=0.03, sync_weight=sync_weight, average=average, **QUICK) for _ in range(2))
    for _ in range(5):
        broken = Broken(tiny.Compared(model, labels), [2, 5], bad, where)
        whole.step(broken, images, names(7))
        part.step(tiny.Compared(model, labels[healthy]), images[healthy], [f"case_{i}" for i in healthy])
    expected = torch.full((7,), 0.5)
    expected[healthy] = part.sizes.values()
    assert torch.equal(whole.sizes.values(), expected)
    assert whole.sizes.visits().tolist() == [5] * 7
    assert len(set(part.sizes.values().tolist())) > 1


def test_a_batch_without_a_finite_loss_moves_nothing(tiny: SimpleNamespace) -> None:
    objective = Broken(tiny.Compared(tiny.cnn().double(), torch.arange(3)), [0, 1, 2], math.nan, "attacked")
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
    still = DPAAT(0)
    assert (still.lowest, still.highest, still.step_size) == (0.0, 0.0, 0.0)


def test_merging_adds_up_the_steps_of_two_processes_inside_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinking is a step of a given size here, not a factor."""
    methods = [DPAAT(0.5, eps_min=0.125, eps_max=1.0, step_size=0.25) for _ in range(2)]
    for method, moves in zip(methods, ([0.75, 0.25, 0.75, 0.75, 0.25], [0.75, 0.25, 0.25]), strict=True):
        method.sizes.set(["up", "down", "both", "one up", "one down"][: len(moves)], moves)
    changes = [method.sizes.changes() for method in methods]
    for method in methods:
        merge = method.sizes.merge
        monkeypatch.setattr(method.sizes, "merge", lambda merge=merge: merge(changes))
        method.merge()
        assert method.sizes.get(["up", "down", "both", "one up", "one down"]).tolist() == [1.0, 0.125, 0.5, 0.75, 0.25]
        assert method.sizes.changes()["ids"] == []


# Losses and gradients


def cnn_task(tiny: SimpleNamespace, **settings: Any) -> tuple[Any, Tensor]:
    model = tiny.cnn(**settings).double()
    for parameter in model.parameters():  # as it comes, noise hardly moves its predictions
        parameter.data *= 3
    return tiny.Compared(model, torch.tensor([0, 1, 2, 3, 1])), uniform(5, 3, 8, 8)


def host_loss(objective: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of :class:`Compared`, its terms and the logits, by other means."""
    logits = objective.model(images)
    chosen = logits.gather(1, objective.labels[:, None])[:, 0]
    terms = torch.stack((logits.exp().sum(1).log() - chosen, (logits**2).sum(1) / logits.shape[1]), 1)
    return torch.linalg.vector_norm(terms), terms, logits


def divergence(clean: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(other)), (B,)."""
    return F.kl_div(other.log_softmax(1), clean.softmax(1), reduction="none").sum(1)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("sync_weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("average", ["batch", "epoch"])
def test_the_loss_is_that_of_attacked_images_and_the_weighted_distance(
    tiny: SimpleNamespace, p: float, sync_weight: float, average: Any
) -> None:
    objective, images = cnn_task(tiny)
    method = DPAAT(0.7, sync_weight=sync_weight, average=average, norm=p, **QUICK)
    given = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    method.sizes.set(names(5), given)
    step = method.step(objective, images, names(5))
    torch.testing.assert_close(lengths(step, images, p), given.double(), rtol=1e-6, atol=0)
    step.loss.backward()
    found = gradients(objective.model)

    adversarial, attacked, other = host_loss(objective, step.adversarial)
    clean, terms, logits = host_loss(objective, images)
    sync = divergence(logits, other).mean()
    assert sync > 0.01
    expected = adversarial + sync_weight * sync
    expected.backward()
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    assert_close(found, gradients(objective.model))
    torch.testing.assert_close(step.terms, terms.detach(), rtol=1e-12, atol=0)
    assert not step.terms.requires_grad
    torch.testing.assert_close(step.logs["loss_adversarial"], adversarial.detach(), rtol=1e-12, atol=0)
    if sync_weight:
        torch.testing.assert_close(step.logs["loss_sync"], sync.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(step.logs["loss_clean"], clean.detach(), rtol=1e-12, atol=0)
    else:  # no loss of the host's own, for want of a training pass
        assert "loss_sync" not in step.logs
        torch.testing.assert_close(step.logs["loss_clean"], terms.sum(1).mean().detach(), rtol=1e-12, atol=0)
    for value in step.logs.values():
        assert value.shape == ()
        assert not value.requires_grad
    assert (attacked.sum(1) > terms.sum(1)).all()


def test_the_distance_is_that_of_attacked_predictions_from_clean_ones(tiny: SimpleNamespace) -> None:
    """The two are not swapped, and both have gradients."""
    objective, images = cnn_task(tiny)
    calls: list[tuple[Tensor, Tensor]] = []

    def distance(clean: Tensor, other: Tensor) -> Tensor:
        calls.append((clean, other))
        return (other - clean).square().sum(1)

    objective.distance = distance
    step = DPAAT(0.7, **QUICK).step(objective, images, names(5))
    ((clean, other),) = calls
    torch.testing.assert_close(clean, objective.model(images))
    torch.testing.assert_close(other, objective.model(step.adversarial))
    assert clean.requires_grad
    assert other.requires_grad


@pytest.mark.parametrize("sync_weight", [0.0, 2.0])
def test_backward_gives_the_same_gradients(tiny: SimpleNamespace, sync_weight: float) -> None:
    results = []
    for given in (False, True):
        objective, images = cnn_task(tiny)
        losses: list[Tensor] = []

        def backward(loss: Tensor, losses: list[Tensor] = losses) -> None:
            losses.append(loss.detach())
            loss.backward()

        method = DPAAT(0.7, sync_weight=sync_weight, **QUICK)
        step = method.step(objective, images, names(5), backward if given else None)
        assert len(losses) == int(given)  # the distance joins the two passes
        assert step.loss.requires_grad == (not given)
        if given:
            assert torch.equal(losses[0], step.loss)
        else:
            step.loss.backward()
        results.append((step.loss.detach(), gradients(objective.model), method.sizes.values()))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("p", ORDERS)
def test_without_noise_there_is_nothing_to_synchronise(tiny: SimpleNamespace, p: float) -> None:
    results = []
    for sync_weight in (0.0, 5.0):
        objective, images = cnn_task(tiny, normalise=True)
        step = DPAAT(0, sync_weight=sync_weight, norm=p, **QUICK).step(objective, images, names(5))
        assert torch.equal(step.adversarial, images)
        step.loss.backward()
        results.append((step, gradients(objective.model)))
    assert results[1][0].logs["loss_sync"] == 0
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss, rtol=1e-14, atol=0)
    assert_close(results[0][1], results[1][1])


def test_without_steps_and_synchronisation_it_is_adversarial_training(tiny: SimpleNamespace) -> None:
    """Bit for bit, BatchNorm and the random state included: the clean pass leaves no trace."""
    results = []
    for method in (AT(0.75, **QUICK), DPAAT(0.75, step_size=0, sync_weight=0, **QUICK)):
        objective, images = cnn_task(tiny, normalise=True, dropout=0.4)
        torch.manual_seed(0)
        for _ in range(2):
            step = method.step(objective, images, names(5))
        step.loss.backward()
        state = [*objective.model.state_dict().values(), torch.get_rng_state()]
        results.append([step.loss.detach(), step.adversarial, *gradients(objective.model), *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert method.sizes.get(names(5)).tolist() == [0.75] * 5
    assert method.sizes.visits().tolist() == [2] * 5


@pytest.mark.parametrize("plain", [False, True])
def test_a_plain_objective_will_do_without_synchronisation(tiny: SimpleNamespace, plain: bool) -> None:
    """One with no loss of its own, and one that names no model."""
    objective = tiny.Classifier(tiny.cnn().double(), torch.tensor([0, 1, 2, 3, 1]))
    images = uniform(5, 3, 8, 8)
    step = DPAAT(0.7, sync_weight=0, **QUICK).step(objective.__call__ if plain else objective, images, names(5))
    objective.model.zero_grad()  # an attack on a model that nobody names holds nothing still
    step.loss.backward()
    found = gradients(objective.model)
    expected = F.cross_entropy(objective.model(step.adversarial), objective.labels)
    expected.backward()
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    assert_close(found, gradients(objective.model))
    torch.testing.assert_close(step.terms, objective(images).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("sync_weight", "passes"),
    [
        (1.0, ["terms"] * 4 + ["training"] * 2),
        (0.0, ["terms"] * 4 + ["terms without gradient", "training"]),
    ],
)
def test_number_of_passes(tiny: SimpleNamespace, sync_weight: float, passes: list[str]) -> None:
    objective, images = cnn_task(tiny)
    DPAAT(0.7, sync_weight=sync_weight, **QUICK).step(objective, images, names(5))
    assert objective.passes == passes


@pytest.mark.parametrize("sync_weight", [0.0, 1.0])
def test_batch_norm_learns_from_the_training_passes_alone(tiny: SimpleNamespace, sync_weight: float) -> None:
    objective, images = cnn_task(tiny, normalise=True)
    twin = copy.deepcopy(objective.model)
    step = DPAAT(0.7, sync_weight=sync_weight, **QUICK).step(objective, images, names(5))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in objective.model.parameters())
    assert objective.model.training
    if sync_weight:
        twin(images)
    twin(step.adversarial)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(objective.model.state_dict()[key], value, rtol=1e-12, atol=0)
    assert twin[1].num_batches_tracked == (2 if sync_weight else 1)


def test_the_clean_pass_normalises_as_the_training_pass_does(tiny: SimpleNamespace) -> None:
    """Without noise nothing has increased; running statistics would give the clean pass another loss."""
    objective, images = cnn_task(tiny, normalise=True, dropout=0.4)
    objective.model[1].running_mean.fill_(9.0)
    method = DPAAT(0, eps_max=1, step_size=0.1, sync_weight=0, average="epoch", **QUICK)
    method.step(objective, images, names(5))
    assert method.state_dict()["increases"] == [0.0, 5.0]


@pytest.mark.parametrize("missing", ["predictions", "loss_and_predictions", "distance"])
def test_synchronisation_needs_predictions(tiny: SimpleNamespace, missing: str) -> None:
    objective, images = cnn_task(tiny)
    setattr(objective, missing, None)
    method = DPAAT(0.7, **QUICK)
    message = f"DPAAT compares predictions on clean and attacked images, and Compared gives none: it has no {missing} "
    with pytest.raises(TypeError, match=message):
        method.step(objective, images, names(5))
    assert len(method.sizes) == 0


def test_one_id_for_each_image(tiny: SimpleNamespace) -> None:
    objective, images = cnn_task(tiny)
    method = DPAAT(0.7, **QUICK)
    with pytest.raises(ValueError, match="4 sample ids for a batch of 5 images"):
        method.step(objective, images, names(4))
    assert len(method.sizes) == objective.calls == 0


# State


@pytest.mark.parametrize(
    ("average", "dtype"),
    [
        ("batch", torch.float32),
        ("epoch", torch.float32),
        ("batch", torch.float64),
        ("epoch", torch.float64),
    ],
)
def test_a_resumed_run_continues_bit_for_bit(tiny: SimpleNamespace, average: Any, dtype: torch.dtype) -> None:
    """In the middle of an epoch, with random starts."""
    images, labels = uniform(10, 3, 8, 8, dtype=dtype), torch.arange(10) % 4
    model = tiny.cnn().to(dtype)

    def fresh() -> DPAAT:
        return DPAAT(0.7, step_size=0.11, average=average, random_start=0.5, seed=4, **QUICK)

    def step(method: DPAAT, number: int) -> Step:
        index = torch.arange(number, number + 5) % 10
        return method.step(tiny.Compared(model, labels[index]), images[index], [f"case_{i}" for i in index.tolist()])

    whole, resumed = fresh(), fresh()
    for number in range(9):
        first = step(whole, number)
        if number == 3:
            resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
        if number > 3:
            second = step(resumed, number)
            assert torch.equal(first.adversarial, second.adversarial)
            assert torch.equal(first.loss, second.loss)
        assert number < 3 or resumed.state_dict() == whole.state_dict()
        if number == 6:
            whole.begin_epoch()
            resumed.begin_epoch()
    assert whole.state_dict()["method"] == "DPAAT"
    assert whole.sizes.values().unique().numel() > 3
    assert any(whole.state_dict()["increases"]) == (average == "epoch")


def test_the_state_of_another_method_is_refused() -> None:
    """Of one that has sizes for its samples, too."""
    amat, dpaat = AMAT(0.1, [1.0]), DPAAT(0.1)
    with pytest.raises(ValueError, match="the saved state is of the method 'AMAT', this run trains 'DPAAT'"):
        dpaat.load_state_dict(amat.state_dict())
    with pytest.raises(ValueError, match="the saved state is of the method 'DPAAT', this run trains 'AMAT'"):
        amat.load_state_dict(dpaat.state_dict())


# Errors


SIZES = "perturbation sizes need eps_min <= eps_0 <= eps_max, got eps_min {}, eps_0 {}, eps_max {}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPAAT(-1), "eps_0 must be a finite number >= 0, got -1"),
        (lambda: DPAAT(1, eps_min=-0.5), "eps_min must be a finite number >= 0, got -0.5"),
        (lambda: DPAAT(1, eps_max=-1), "eps_max must be a finite number >= 0, got -1"),
        (lambda: DPAAT(1, step_size=-0.1), "step_size must be a finite number >= 0, got -0.1"),
        (lambda: DPAAT(1, sync_weight=-2), "sync_weight must be a finite number >= 0, got -2"),
        (lambda: DPAAT(1, eps_min=1.5), SIZES.format("1.5", "1", "2")),
        (lambda: DPAAT(1, eps_max=0.5), SIZES.format("0", "1", "0.5")),
        (lambda: DPAAT(1, eps_min=3, eps_max=0.5), SIZES.format("3", "1", "0.5")),
        (lambda: DPAAT(0, eps_min=0.1), SIZES.format("0.1", "0", "0")),
        (lambda: DPAAT(1, average="x"), "average must be 'batch' or 'epoch', got 'x'"),
        (lambda: DPAAT(1, steps=0), "steps must be a whole number >= 1, got 0"),
    ],
)
def test_settings_out_of_range(make: Callable[[], DPAAT], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["eps_0", "eps_min", "eps_max", "step_size", "sync_weight"])
def test_settings_that_are_no_number(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a finite number >= 0, got {bad}$"):
        DPAAT(**{"eps_0": 1.0, name: bad})


def test_sizes_may_have_no_room_at_all(tiny: SimpleNamespace) -> None:
    objective, images = cnn_task(tiny)
    method = DPAAT(0.5, eps_min=0.5, eps_max=0.5, step_size=0.2, **QUICK)
    method.step(objective, images, names(5))
    assert method.sizes.values().tolist() == [0.5] * 5
