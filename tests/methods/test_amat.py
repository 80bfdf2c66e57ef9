"""AMAT against closed forms of a linear model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from advmed.methods import AMAT
from advmed.thresholds import RunningThresholds, Thresholds
from helpers.tensors import ORDERS, QUICK, RANKS, comparing, names, uniform


def linear_task(
    tiny: SimpleNamespace, batch: int, shape: tuple[int, ...], p: float, terms: int = 1
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A frozen linear model, images, thresholds, and each sample's closed-form radius, between about 0.3 and 3."""
    weight = uniform(*shape, seed=1) - 0.5
    dual = weight.norm() if p == 2 else weight.abs().sum()
    labels = 1.0 - 2.0 * (torch.arange(batch, dtype=torch.float64) % 2)
    scales = torch.tensor([1.0, 0.6, 1.7], dtype=torch.float64)[:terms]
    offsets = torch.tensor([0.0, 0.3, -0.2], dtype=torch.float64)[:terms]
    objective = tiny.Logistic(weight, labels, scales, offsets)
    objective.model.requires_grad_(False)
    wanted = torch.linspace(1.0, 2.8, batch, dtype=torch.float64) * dual  # y w.x
    images = uniform(batch, *shape, seed=2)
    shift = labels * wanted - (images * weight).flatten(1).sum(1)
    images = images + shift.reshape(-1, *[1] * len(shape)) * weight / weight.square().sum()
    thresholds = torch.tensor([0.7, 0.65, 0.8], dtype=torch.float64)[:terms]
    closed = objective.largest_radius(images, thresholds, p)
    assert closed.min() > 0.3
    return objective, images, thresholds, closed.min(1).values


# The closed form


@pytest.mark.parametrize("refinement", ["paper", "crossing"])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("shape", RANKS)
@pytest.mark.parametrize(("p", "terms"), [(2, 1), (2, 3), (math.inf, 1), (math.inf, 2)])
def test_margins_settle_at_the_closed_form(
    tiny: SimpleNamespace, refinement: Any, batch: int, shape: tuple[int, ...], p: float, terms: int
) -> None:
    objective, images, thresholds, closed = linear_task(tiny, batch, shape, p, terms)
    if terms == 3 and batch == 8:
        index = objective.largest_radius(images, thresholds, p).argmin(1)
        assert len(set(index.tolist())) > 1  # it is not always the same term that decides
    delta, ids = 0.25, names(batch)
    method = AMAT(delta, thresholds.tolist(), steps=8, step_scale=2.0, norm=p, refinement=refinement)
    visits = math.ceil(float(closed.max()) / delta) + 2
    for visit in range(visits + 8):
        method.step(objective, images, ids)
        if visit < visits:
            continue
        margins = method.margins.get(ids).double()
        slack = delta if refinement == "paper" else delta + 2.0 * margins / 8
        assert (margins <= closed + delta + 1e-5).all()
        assert (margins >= closed - (slack if refinement == "crossing" else 1e-5)).all()


@pytest.mark.parametrize("p", ORDERS)
def test_crossing_brings_margins_down_that_are_too_large(tiny: SimpleNamespace, p: float) -> None:
    """As when the model has moved: the paper's refinement leaves them where they are."""
    objective, images, thresholds, closed = linear_task(tiny, 3, (2, 4, 4), p)
    ids = names(3)
    for refinement in ("paper", "crossing"):
        method = AMAT(0.1, thresholds.tolist(), steps=8, step_scale=2.0, norm=p, refinement=refinement)
        method.margins.set(ids, closed * 6)
        for _ in range(40):
            method.step(objective, images, ids)
        margins = method.margins.get(ids).double()
        if refinement == "paper":
            torch.testing.assert_close(margins, closed * 6, rtol=1e-5, atol=0)
        else:
            assert ((margins - closed).abs() <= 0.1 + 2.0 * margins / 8).all()


def test_a_path_that_ends_inside_its_ball_refines_to_the_noise_reached(tiny: SimpleNamespace) -> None:
    """step_scale 0.5: the last iterate is half way out, so a margin too large becomes (E/2 + E)/2."""
    objective, images, thresholds, closed = linear_task(tiny, 3, (2, 6), 2)
    method, ids = AMAT(0.1, thresholds.tolist(), steps=10, step_scale=0.5), names(3)
    method.margins.set(ids, closed * 3)
    method.step(objective, images, ids)
    torch.testing.assert_close(method.margins.get(ids).double(), closed * 2.25, rtol=1e-5, atol=0)
    crossing = AMAT(0.1, thresholds.tolist(), steps=10, step_scale=0.5, refinement="crossing")
    crossing.margins.set(ids, closed * 3)
    crossing.step(objective, images, ids)
    # Iterates at 0, 0.15, ... 1.5 times the closed form; 0.9 is the last one below the threshold.
    torch.testing.assert_close(crossing.margins.get(ids).double(), closed * 1.95, rtol=1e-5, atol=0)


@pytest.mark.parametrize("threshold", [0.7, torch.tensor(0.7), [0.7], (0.7,), torch.tensor([0.7])])
def test_one_threshold_as_a_plain_number(threshold: Any) -> None:
    assert AMAT(0.1, threshold).thresholds.values == pytest.approx((0.7,))


@pytest.mark.parametrize("terms", [1, 3])
def test_infinite_thresholds(tiny: SimpleNamespace, terms: int) -> None:
    objective, images, _, _ = linear_task(tiny, 3, (2, 6), 2, terms)
    ids = names(3)
    never, always = AMAT(0.25, [-math.inf] * terms, **QUICK), AMAT(0.25, [math.inf] * terms, **QUICK)
    halved = AMAT(0.25, [-math.inf] * terms, refinement="crossing", **QUICK)
    bounded = AMAT(0.25, [math.inf] * terms, margin_max=1.1, **QUICK)
    floor = AMAT(0.25, [-math.inf] * terms, refinement="crossing", margin_min=0.05, **QUICK)
    for visit in range(1, 7):
        for method in (never, always, halved, bounded, floor):
            used = method.margins.get(ids)
            step = method.step(objective, images, ids)
            noise = (step.adversarial - images).flatten(1).norm(dim=1)
            torch.testing.assert_close(noise.float(), used, rtol=1e-5, atol=0)
            assert (noise <= visit * 0.25 * (1 + 1e-5)).all()  # the v-th visit cannot use more than v * delta
        torch.testing.assert_close(never.margins.values(), torch.full((3,), 0.25), rtol=1e-5, atol=0)
        assert always.margins.values().tolist() == [0.25 * (visit + 1)] * 3
        assert halved.margins.values().tolist() == [0.25 * 0.5**visit] * 3
        torch.testing.assert_close(bounded.margins.values(), torch.full((3,), min(0.25 * (visit + 1), 1.1)))
        torch.testing.assert_close(floor.margins.values(), torch.full((3,), max(0.25 * 0.5**visit, 0.05)))


def test_a_threshold_met_exactly_is_not_below(tiny: SimpleNamespace) -> None:
    objective = tiny.Affine(torch.zeros(1, 1, 4), torch.tensor([2.0]))
    for xi, grown in ((2.0, False), (2.0000002, True)):
        method = AMAT(0.5, [xi], **QUICK)
        method.step(lambda x, o=objective: o(x) + 0 * x.flatten(1).sum(1, keepdim=True), torch.zeros(1, 1, 4), ["a"])
        assert method.margins.get(["a"]).item() == (1.0 if grown else 0.25)  # flat: no noise was reached


def test_visits_bound_the_margins_while_training(tiny: SimpleNamespace) -> None:
    """Random visits with duplicates in a batch: the noise of a sample's v-th visit is at most v * delta."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    data, labels = uniform(12, 3, 8, 8, dtype=torch.float32), torch.arange(12) % 4
    model = tiny.cnn(normalise=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    method, visits = AMAT(0.3, [1.4], refinement="crossing", **QUICK), dict.fromkeys(names(12), 0)
    for _ in range(25):
        index = torch.randint(12, (5,), generator=rng)
        ids = [f"case_{i}" for i in index.tolist()]
        step = method.step(tiny.Classifier(model, labels[index]), data[index], ids)
        noise = (step.adversarial - data[index]).flatten(1).norm(dim=1)
        for name, length in zip(ids, noise.tolist(), strict=True):
            assert length <= (visits[name] + 1) * 0.3 * (1 + 1e-4)
        for name in ids:
            visits[name] += 1
        optimiser.zero_grad()
        step.loss.backward()
        optimiser.step()
    table = dict(zip(method.margins.ids(), method.margins.visits().tolist(), strict=True))
    assert table == {name: count for name, count in visits.items() if count}
    assert method.margins.values().max() > 0.6


def test_an_infinite_loss_is_a_loss_above_its_threshold() -> None:
    def infinite(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True) * 0 + math.inf

    method = AMAT(0.5, [1.0], refinement="crossing", **QUICK)
    method.step(infinite, torch.zeros(1, 1, 4), ["a"])
    assert method.margins.get(["a"]).item() == 0.25


# Thresholds


def test_half_precision_images_do_not_round_the_thresholds() -> None:
    """xi = 1.001 is 1 in bfloat16: a loss of 1 would not be below it."""
    xi = 1.001
    running = RunningThresholds(["a"])
    running.update(torch.tensor([[xi]], dtype=torch.float64))
    for thresholds in ([xi], running):
        method = AMAT(0.5, thresholds, **QUICK)
        method.step(lambda x: x.flatten(1).sum(1, keepdim=True) * 0 + 1, torch.zeros(1, 1, 4).bfloat16(), ["a"])
        assert method.margins.get(["a"]).item() == 1.0


def test_self_calibration_uses_the_thresholds_before_the_batch_and_learns_its_clean_terms(
    tiny: SimpleNamespace,
) -> None:
    objective, images, _, _ = linear_task(tiny, 3, (2, 6), 2)
    running = RunningThresholds(["loss"])
    method = AMAT(0.25, running, **QUICK)
    running.update(torch.full((4, 1), 9.0))
    running.begin()
    step = method.step(objective, images, names(3))
    assert method.margins.values().tolist() == [0.5] * 3
    assert running.statistics.n == 7
    clean = objective(images).detach()
    torch.testing.assert_close(step.terms, clean)
    expected = (4 * 9.0 + clean.sum()) / 7
    torch.testing.assert_close(running.tensor(clean), expected.reshape(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("refinement", ["paper", "crossing"])
def test_steps_that_do_not_fit(refinement: Any) -> None:
    objective, images = comparing()
    with pytest.raises(ValueError, match="4 sample ids for a batch of 5 images"):
        AMAT(0.1, [1.0, 1.0], refinement=refinement).step(objective, images, names(4))
    method = AMAT(0.1, [1.0], refinement=refinement, **QUICK)
    with pytest.raises(ValueError, match=r"1 thresholds .*K = 2 loss terms"):
        method.step(objective, images, names(5))
    assert len(method.margins) == 0
    for thresholds in (Thresholds((1.0, 1.0), ("sharp", "ce")), RunningThresholds(["sharp", "ce"])):
        method = AMAT(0.1, thresholds, refinement=refinement, **QUICK)
        with pytest.raises(ValueError, match=r"do not fit this model: .*\['sharp', 'ce'\].*\['ce', 'sharp'\]"):
            method.step(objective, images, names(5))


def test_numbers_as_thresholds_ask_for_no_names() -> None:
    objective, images = comparing()
    for thresholds in ([9.0, 9.0], torch.tensor([9.0, 9.0]), Thresholds((9.0, 9.0), ("ce", "sharp"))):
        method = AMAT(0.1, thresholds, **QUICK)
        method.step(objective, images, names(5))
        torch.testing.assert_close(method.margins.values(), torch.full((5,), 0.2))
