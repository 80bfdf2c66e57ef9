"""Attacks against closed forms, torchattacks and a loop written for one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import advmed.attacks.problem as problem_module
from advmed.attacks import PGD, Margin, pgd
from helpers.tensors import ORDERS, RANKS, classifying, lengths, seeded, uniform


def test_below_step_scale_one_the_sphere_is_out_of_reach(tiny: SimpleNamespace) -> None:
    objective = tiny.Affine(uniform(1, 2, 3), torch.zeros(1, dtype=torch.float64))
    result = pgd(objective, uniform(3, 2, 3), 2.0, steps=10, step_scale=0.25, random_start=False)
    torch.testing.assert_close(result.norms, torch.full((3,), 0.5, dtype=torch.float64))


def revised(terms: Tensor, norms: Tensor) -> Tensor:
    """From 2: back to 0.5, as it was, further out, and none at all."""
    torch.testing.assert_close(norms, torch.full((4,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(terms, 2.0 * 2**0.5 * torch.ones(4, 1, dtype=torch.float64))
    return torch.tensor([0.5, 2.0, 3.0, 0.0])


@pytest.mark.parametrize("final_pass", [True, False])
def test_a_radius_is_revised_by_what_the_first_step_found(tiny: SimpleNamespace, final_pass: bool) -> None:
    """Lengths of 1, 1/2 and 1/4 of a radius: for the first sample it is reached at once, the third comes to its own."""
    objective = tiny.Affine(torch.ones(1, 1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    images, calls = torch.zeros(4, 1, 2, dtype=torch.float64), list[int]()

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return objective(x)

    attack = PGD(3, 1.75, schedule="decreasing")
    found = attack(counted, images, 2.0, revise=revised, final_pass=final_pass)
    assert found.norms.tolist() == pytest.approx([0.5, 2.0, 3.0, 0.0])
    assert found.radius is not None
    assert found.radius.tolist() == [0.5, 2.0, 3.0, 0.0]
    assert len(calls) == (4 if final_pass else 3)
    plain = attack(objective, images, 2.0)
    assert plain.radius is not None
    assert plain.radius.tolist() == [2.0] * 4


@pytest.mark.parametrize("attack", [PGD(3, 1.75, keep="best"), PGD(3, 1.75, restarts=2), PGD(3, 1.75, loss=Margin())])
def test_a_radius_that_cannot_be_revised(attack: PGD) -> None:
    with pytest.raises(ValueError, match="revised for the last iterate of one run on the host's loss only"):
        attack(classifying(2), uniform(2, 3, 8, 8), 1.0, revise=lambda terms, norms: norms)


# torchattacks and the loop


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("start", ["image", "random"])
@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (10, 1.0), (10, 2.5), (20, 4.0)])
def test_pgd_equals_torchattacks_from_the_same_start(
    monkeypatch: pytest.MonkeyPatch, p: float, start: str, steps: int, scale: float
) -> None:
    import torchattacks

    objective, images = classifying(8), uniform(8, 3, 8, 8)
    eps = 1.5 if p == 2 else 0.1
    settings = {"eps": eps, "alpha": scale * eps / steps, "steps": steps, "random_start": start == "random"}
    if p == 2:
        reference = torchattacks.PGDL2(objective.model, eps_for_division=0, **settings)
    else:
        reference = torchattacks.PGD(objective.model, **settings)

    def same_noise(like: Tensor, radius: Tensor, order: float, generator: torch.Generator) -> Tensor:
        """The noise of torchattacks, drawn as it draws."""
        torch.manual_seed(7)
        if order == math.inf:
            return torch.empty_like(like).uniform_(-eps, eps)
        noise = torch.empty_like(like).normal_()
        length = lengths(noise).reshape(-1, 1, 1, 1)
        return noise * torch.zeros_like(length).uniform_(0, 1) / length * eps

    monkeypatch.setattr(problem_module, "random_in_ball", same_noise)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = reference(images, objective.labels)
        ours = PGD(steps, scale, p, start == "random")(objective, images, eps, bounds=(0, 1))
    assert (expected - images).flatten(1).norm(dim=1).min() > 0.1  # it did attack
    torch.testing.assert_close(ours.images, expected, rtol=0, atol=1e-10)


def one_by_one(
    terms: Callable[[Tensor, Tensor], Tensor], images: Tensor, weight: Tensor, radius: Tensor, p: float, bounds: Any
) -> Tensor:
    """12 steps of 3 radii in all from the image as the specification words it, one sample after the other, in numpy."""
    low, high = bounds or (-math.inf, math.inf)
    found = []
    for i, image in enumerate(images):
        x = image.numpy()
        eps, z = float(radius[i]), x.copy()
        for _ in range(12):
            leaf = torch.tensor(z)[None].requires_grad_()
            terms(leaf, weight[i : i + 1]).sum().backward()
            g = leaf.grad[0].numpy()
            z = z + 3 * eps / 12 * (np.sign(g) if p == math.inf else g / np.linalg.norm(g.ravel()))
            d = z - x
            d = np.clip(d, -eps, eps) if p == math.inf else d * min(1, eps / np.linalg.norm(d.ravel()))
            z = np.clip(x + d, np.minimum(x, low), np.maximum(x, high))
        found.append(z)
    return torch.tensor(np.stack(found))


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0.2, 0.7)])
@pytest.mark.parametrize("shape", RANKS)
def test_pgd_equals_the_loop_over_samples(p: float, bounds: tuple[float, float] | None, shape: tuple[int, ...]) -> None:
    """Per-sample radii, images outside their bounds, two terms, any rank."""
    images, weight = uniform(4, *shape), uniform(4, *shape, seed=3) - 0.5
    radius = torch.tensor([0.1, 0.9, 2.0, 5.0], dtype=torch.float64) * (1 if p == 2 else 0.2)

    def terms(x: Tensor, weight: Tensor) -> Tensor:
        return torch.stack((((x * weight).sin()).flatten(1).sum(1), (x**3 * weight).flatten(1).sum(1)), 1)

    expected = one_by_one(terms, images, weight, radius, p, bounds)
    result = PGD(12, 3, p)(lambda x: terms(x, weight), images, radius, bounds=bounds)
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.terms, terms(expected, weight), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.norms, lengths(expected - images, p), rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_sample_where_it_was_and_is_counted(p: float, bad: float) -> None:
    """Sample 1 has no usable gradient beyond a length of 0.45: ten steps of 0.1 get it to 0.5, five are lost."""
    images, slopes = uniform(3, 2, 5), uniform(3, 2, 5, seed=1) - 0.5

    def terms(x: Tensor, broken: bool) -> Tensor:
        values = (x * slopes).flatten(1).sum(1)
        beyond = (lengths((x - images).detach(), p) > 0.45) & (torch.arange(3) == 1)
        return (values * torch.where(beyond & broken, bad, 1.0))[:, None]

    settings: dict[str, Any] = {"steps": 10, "step_scale": 1, "norm": p, "random_start": False}
    healthy = pgd(lambda x: terms(x, False), images, 1.0, **settings)
    half = pgd(lambda x: terms(x, False), images, 0.5, **(settings | {"steps": 5}))
    result = pgd(lambda x: terms(x, True), images, 1.0, **settings)
    assert result.nonfinite.tolist() == [0, 5, 0]
    assert torch.equal(result.images[[0, 2]], healthy.images[[0, 2]])
    torch.testing.assert_close(result.images[1], half.images[1], rtol=0, atol=1e-12)


# Crossings, and the last pass


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("random_start", [0.0, 0.3])
def test_crossing_is_the_last_iterate_below_every_threshold(
    tiny: SimpleNamespace, p: float, random_start: float
) -> None:
    images = uniform(5, 2, 4)
    objective = tiny.Affine(uniform(2, 2, 4, seed=4) - 0.4, torch.zeros(2, dtype=torch.float64))
    thresholds = objective(images).mean(0) + torch.tensor([0.4, 0.3], dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(x: Tensor) -> Tensor:
        terms = objective(x)
        seen.append((x.detach(), terms.detach()))
        return terms

    settings: dict[str, Any] = {"steps": 11, "step_scale": 1.5, "norm": p, "random_start": random_start}
    result = pgd(watched, images, 0.9, thresholds=thresholds, generator=seeded(1), **settings)
    expected = torch.zeros(5, dtype=torch.float64)
    for iterate, terms in seen:
        for i in range(5):
            if all(terms[i, k] < thresholds[k] for k in range(2)):
                expected[i] = lengths(iterate - images, p)[i]
    assert len(seen) == 12
    assert len(set(expected.tolist())) > 2
    torch.testing.assert_close(result.crossing, expected, rtol=1e-12, atol=1e-12)
    assert pgd(objective, images, 0.9, generator=seeded(1), **settings).crossing is None
    for value, crossing in ((math.inf, result.norms), (-math.inf, torch.zeros(5, dtype=torch.float64))):
        extreme = pgd(objective, images, 0.9, thresholds=[value] * 2, generator=seeded(1), **settings)
        torch.testing.assert_close(extreme.crossing, crossing, rtol=1e-12, atol=1e-12)


def test_a_threshold_met_exactly_is_not_below(tiny: SimpleNamespace) -> None:
    """At the image, which has the norm 0 either way, and on the sphere."""
    objective, images = tiny.Affine(torch.ones(1, 1, 4), torch.zeros(1)), torch.zeros(1, 1, 4)
    for threshold in (0.0, 2.0):
        result = PGD(2, 2.0)(objective, images, 1.0, thresholds=[threshold])
        assert (result.terms.item(), result.crossing.item()) == (2, 0)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("thresholds", [None, [1.0]])
def test_a_caller_may_make_the_last_pass(steps: int, thresholds: list[float] | None) -> None:
    images = uniform(2, 3, 8, 8)
    for keep, restarts, final_pass, passes in (
        ("last", 1, True, steps + 1),
        ("last", 1, False, steps),
        ("best", 1, True, steps + 1),
        ("last", 3, True, 3 * (steps + 1)),
    ):
        objective = classifying(2)
        attack = PGD(steps, 2.0, keep=keep, restarts=restarts)
        with torch.inference_mode():  # thresholds made in there, too
            limits = None if thresholds is None else torch.tensor(thresholds)
            result = attack(objective, images, 0.5, thresholds=limits, final_pass=final_pass)
        assert objective.calls == passes
        assert (result.terms is None) == (not final_pass)
        assert (result.crossing is None) == (thresholds is None)


@pytest.mark.parametrize(
    ("steps", "step_scale", "expected"),
    [
        (1, 1.75, [1.75]),
        (2, 1.5, [1, 1 / 2]),
        (3, 1.75, [1, 1 / 2, 1 / 4]),
        (3, 3.5, [2, 1, 1 / 2]),
        (5, 1, [0.3558, 0.2516, 0.1779, 0.1258, 0.0889]),  # by 2^(-1/2), down to a quarter
    ],
)
def test_decreasing_steps(steps: int, step_scale: float, expected: list[float]) -> None:
    """Their lengths, and the path that an affine loss shows of them."""
    attack = PGD(steps, step_scale, schedule="decreasing")
    assert attack.lengths == pytest.approx(expected, rel=1e-3)
    assert sum(attack.lengths) == pytest.approx(step_scale)
    seen = []

    def objective(images: Tensor) -> Tensor:
        seen.append(images.detach().flatten(1).norm(dim=1).item())
        return images.flatten(1).sum(1, keepdim=True)

    attack(objective, torch.zeros(1, 1, 2, 2, dtype=torch.float64), 3.0)
    reached = [0.0]
    for length in attack.lengths:
        reached.append(min(3.0, reached[-1] + 3.0 * length))
    assert seen == pytest.approx(reached)
    assert f"steps of level x {attack.lengths[0]:.3g}" in attack.description
    assert PGD(steps, step_scale).lengths == (step_scale / steps,) * steps


@pytest.mark.parametrize("norm", [2, math.inf])
def test_what_the_last_pass_on_the_way_saw(norm: float) -> None:
    objective, images = classifying(3), uniform(3, 3, 8, 8)
    for steps in (1, 2, 4):
        attack = PGD(steps, 1.75, norm, schedule="decreasing")
        seen = attack(objective, images, 0.5, final_pass=False).seen
        assert attack(objective, images, 0.5).seen is None
        if steps == 1:
            assert seen is None
            continue
        before = PGD(steps - 1, sum(attack.lengths[:-1]), norm, schedule="decreasing")
        if steps == 2:  # whose first step is the same
            found = before(objective, images, 0.5)
            torch.testing.assert_close(seen, (found.terms, found.norms))
        assert (seen[1] <= 0.5 + 1e-6).all()
