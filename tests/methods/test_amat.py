"""AMAT against closed forms of a linear model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from advmed.methods import AMAT
from advmed.thresholds import RunningThresholds, Thresholds
from helpers.models import Affine, Logistic
from helpers.tensors import ORDERS, QUICK, RANKS, comparing, names, uniform


def linear_task(batch: int, shape: tuple[int, ...], p: float, terms: int = 1) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A frozen linear model, images, thresholds, and each sample's closed-form radius, between about 0.3 and 3."""
    weight = uniform(*shape, seed=1) - 0.5
    dual = weight.norm() if p == 2 else weight.abs().sum()
    labels = 1.0 - 2.0 * (torch.arange(batch, dtype=torch.float64) % 2)
    scales = torch.tensor([1.0, 0.6, 1.7], dtype=torch.float64)[:terms]
    offsets = torch.tensor([0.0, 0.3, -0.2], dtype=torch.float64)[:terms]
    objective = Logistic(weight, labels, scales, offsets)
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
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", RANKS)
@pytest.mark.parametrize(("p", "terms"), [(2, 1), (2, 3), (math.inf, 1), (math.inf, 2)])
def test_margins_settle_at_the_closed_form(
    refinement: Any, batch: int, shape: tuple[int, ...], p: float, terms: int
) -> None:
    objective, images, thresholds, closed = linear_task(batch, shape, p, terms)
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
def test_crossing_brings_margins_down_that_are_too_large(p: float) -> None:
    """As when the model has moved: the paper's refinement leaves them where they are."""
    objective, images, thresholds, closed = linear_task(3, (2, 4, 4), p)
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


def test_a_path_that_ends_inside_its_ball_refines_to_the_noise_reached() -> None:
    """step_scale 0.5: the last iterate is half way out, so a margin too large becomes (E/2 + E)/2."""
    objective, images, thresholds, closed = linear_task(3, (2, 6), 2)
    # Of iterates at 0, 0.15, ... 1.5 times the closed form, 0.9 is the last one below the threshold.
    for refinement, expected in (("paper", (1.5 + 3) / 2), ("crossing", (0.9 + 3) / 2)):
        method = AMAT(0.1, thresholds.tolist(), steps=10, step_scale=0.5, refinement=refinement)
        method.margins.set(names(3), closed * 3)
        method.step(objective, images, names(3))
        torch.testing.assert_close(method.margins.get(names(3)).double(), closed * expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("threshold", [0.7, torch.tensor(0.7), [0.7], (0.7,), torch.tensor([0.7])])
def test_one_threshold_as_a_plain_number(threshold: Any) -> None:
    assert AMAT(0.1, threshold).thresholds.values == pytest.approx((0.7,))


@pytest.mark.parametrize("terms", [1, 3])
def test_infinite_thresholds(terms: int) -> None:
    objective, images, _, _ = linear_task(3, (2, 6), 2, terms)
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


def test_a_threshold_met_exactly_is_not_below() -> None:
    objective = Affine(torch.zeros(1, 1, 4), torch.tensor([2.0]))
    for xi, grown in ((2.0, False), (2.0000002, True)):
        method = AMAT(0.5, [xi], **QUICK)
        method.step(lambda x, o=objective: o(x) + 0 * x.flatten(1).sum(1, keepdim=True), torch.zeros(1, 1, 4), ["a"])
        assert method.margins.get(["a"]).item() == (1.0 if grown else 0.25)  # flat: no noise was reached


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


def test_self_calibration_uses_the_thresholds_before_the_batch_and_learns_its_clean_terms() -> None:
    objective, images, _, _ = linear_task(3, (2, 6), 2)
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
