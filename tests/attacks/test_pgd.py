"""Attacks against closed forms, torchattacks and a loop written for one sample at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advmed.attacks.problem as problem_module
from advmed.attacks import PGD, AttackResult, ifgsm, pgd

RANKS = [(2, 7), (3, 4, 6), (2, 5, 4, 3)]  # (C, L), (C, H, W), (C, D, H, W)
ORDERS = [2, math.inf]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=dtype)


def classify(tiny: SimpleNamespace, batch: int, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A classifier, in evaluation mode, of (batch, 3, 8, 8) images."""
    model = tiny.cnn(**settings).to(dtype).eval()
    return tiny.Classifier(model, torch.arange(batch) % 4)


def one_by_one(
    objective: Callable[[int], Callable[[Tensor], Tensor]],
    images: Tensor,
    radius: Tensor,
    *,
    steps: int,
    scale: float,
    p: float,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """PGD from the image as the specification words it, for one sample after the other, in numpy."""
    found = []
    for i, image in enumerate(images):
        x = image.numpy()
        eps, z = float(radius[i]), x.copy()
        for _ in range(steps):
            leaf = torch.tensor(z)[None].requires_grad_()
            objective(i)(leaf).sum().backward()
            g = leaf.grad[0].numpy()
            z = z + scale * eps / steps * (np.sign(g) if p == math.inf else g / np.linalg.norm(g.ravel()))
            d = z - x
            d = np.clip(d, -eps, eps) if p == math.inf else d * min(1, eps / np.linalg.norm(d.ravel()))
            z = np.clip(x + d, np.minimum(x, low), np.maximum(x, high))
        found.append(z)
    return torch.tensor(np.stack(found))


# Closed forms


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("shape", RANKS)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("terms", [1, 3])
def test_pgd_reaches_the_maximum_of_an_affine_objective(
    tiny: SimpleNamespace, batch: int, shape: tuple[int, ...], p: float, terms: int
) -> None:
    slopes, offsets = uniform(terms, *shape, seed=1) - 0.5, uniform(terms, seed=2)
    objective, images = tiny.Affine(slopes, offsets), uniform(batch, *shape)
    radius = torch.linspace(0.2, 3, batch, dtype=torch.float64)
    slope = slopes.sum(0)
    dual = slope.norm(2) if p == 2 else slope.abs().sum()
    best = (images * slope).flatten(1).sum(1) + offsets.sum() + radius * dual
    for start in (0.0, 1.0):
        # From anywhere in the ball: the step is long enough to cross it, and short enough to settle.
        result = pgd(objective, images, radius, steps=60, step_scale=8, norm=p, random_start=start)
        torch.testing.assert_close(result.terms.sum(1), best, rtol=1e-4 if start else 1e-12, atol=0)
        torch.testing.assert_close(result.norms, radius, rtol=1e-12, atol=0)
        torch.testing.assert_close(result.terms, objective(result.images), rtol=0, atol=0)
    direction = slope / slope.norm() if p == 2 else slope.sign()
    expected = images + radius.reshape(-1, *[1] * len(shape)) * direction
    result = ifgsm(objective, images, radius, steps=7, norm=p)
    torch.testing.assert_close(result.images, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", RANKS)
def test_linf_pgd_reaches_the_maximum_inside_bounds(tiny: SimpleNamespace, shape: tuple[int, ...]) -> None:
    slopes, images = uniform(1, *shape, seed=1) - 0.5, uniform(4, *shape)
    result = pgd(
        tiny.Affine(slopes, torch.zeros(1, dtype=torch.float64)),
        images,
        0.3,
        steps=9,
        step_scale=2,
        norm=math.inf,
        bounds=(0, 1),
        random_start=False,
    )
    torch.testing.assert_close(result.images, (images + 0.3 * slopes[0].sign()).clamp(0, 1), rtol=0, atol=1e-12)


def test_below_step_scale_one_the_sphere_is_out_of_reach(tiny: SimpleNamespace) -> None:
    objective = tiny.Affine(uniform(1, 2, 3), torch.zeros(1, dtype=torch.float64))
    result = pgd(objective, uniform(3, 2, 3), 2.0, steps=10, step_scale=0.25, random_start=False)
    torch.testing.assert_close(result.norms, torch.full((3,), 0.5, dtype=torch.float64))


# torchattacks and the loop


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("start", ["image", "random"])
@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (10, 2.5), (20, 4.0)])
def test_pgd_equals_torchattacks_from_the_same_start(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, p: float, start: str, steps: int, scale: float
) -> None:
    import torchattacks

    objective, images = classify(tiny, 8), uniform(8, 3, 8, 8)
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
        lengths = noise.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return noise * torch.zeros_like(lengths).uniform_(0, 1) / lengths * eps

    monkeypatch.setattr(problem_module, "random_in_ball", same_noise)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = reference(images, objective.labels)
        ours = pgd(
            objective,
            images,
            eps,
            steps=steps,
            step_scale=scale,
            norm=p,
            bounds=(0, 1),
            random_start=start == "random",
        )
    assert (expected - images).flatten(1).norm(dim=1).min() > 0.1  # it did attack
    torch.testing.assert_close(ours.images, expected, rtol=0, atol=1e-10)


def test_linf_ifgsm_equals_torchattacks_bim(tiny: SimpleNamespace) -> None:
    import torchattacks

    objective, images = classify(tiny, 8), uniform(8, 3, 8, 8)
    expected = torchattacks.BIM(objective.model, eps=0.08, alpha=0.008, steps=10)(images, objective.labels)
    ours = ifgsm(objective, images, 0.08, steps=10, norm=math.inf, bounds=(0, 1))
    torch.testing.assert_close(ours.images, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0.2, 0.7)])
@pytest.mark.parametrize("shape", RANKS)
def test_pgd_equals_the_loop_over_samples(p: float, bounds: tuple[float, float] | None, shape: tuple[int, ...]) -> None:
    """Per-sample radii, images outside their bounds, two terms, any rank."""
    images, weight = uniform(4, *shape), uniform(4, *shape, seed=3) - 0.5
    radius = torch.tensor([0.1, 0.9, 2.0, 5.0], dtype=torch.float64) * (1 if p == 2 else 0.2)

    def terms(x: Tensor, weight: Tensor) -> Tensor:
        return torch.stack((((x * weight).sin()).flatten(1).sum(1), (x**3 * weight).flatten(1).sum(1)), 1)

    low, high = bounds or (-math.inf, math.inf)
    expected = one_by_one(
        lambda i: lambda x: terms(x, weight[i : i + 1]),
        images,
        radius,
        steps=12,
        scale=3,
        p=p,
        low=low,
        high=high,
    )
    result = pgd(
        lambda x: terms(x, weight), images, radius, steps=12, step_scale=3, norm=p, bounds=bounds, random_start=False
    )
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.terms, terms(expected, weight), rtol=1e-10, atol=1e-12)
    difference = (expected - images).flatten(1)
    length = difference.norm(dim=1) if p == 2 else difference.abs().amax(1)
    torch.testing.assert_close(result.norms, length, rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0, 1), "sample"])
def test_a_batch_equals_batches_of_one(tiny: SimpleNamespace, p: float, bounds: Any) -> None:
    images, labels = uniform(5, 3, 8, 8), torch.tensor([0, 3, 1, 2, 2])
    radius = torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64) * (1 if p == 2 else 0.1)
    model = tiny.cnn().double().eval()
    settings: dict[str, Any] = {"steps": 8, "step_scale": 3, "norm": p, "bounds": bounds, "random_start": False}
    settings |= {"thresholds": [1.5], "keep": "best"}
    whole = pgd(tiny.Classifier(model, labels), images, radius, **settings)
    for i in range(5):
        one = pgd(tiny.Classifier(model, labels[i : i + 1]), images[i : i + 1], radius[i : i + 1], **settings)
        for name in ("images", "terms", "norms", "crossing", "nonfinite"):
            torch.testing.assert_close(getattr(whole, name)[i], getattr(one, name)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("random_start", [0.0, 1.0])
def test_channels_last_equals_contiguous(tiny: SimpleNamespace, p: float, random_start: float) -> None:
    objective, images = classify(tiny, 4), uniform(4, 3, 8, 8)
    settings: dict[str, Any] = {"steps": 6, "step_scale": 3, "norm": p, "bounds": (0, 1), "random_start": random_start}
    radius = 1.0 if p == 2 else 0.1
    first = pgd(objective, images, radius, **settings, generator=seeded(1))
    last = images.contiguous(memory_format=torch.channels_last)
    second = pgd(objective, last, radius, **settings, generator=seeded(1))
    torch.testing.assert_close(second.images, first.images, rtol=0, atol=1e-9)
    assert second.images.is_contiguous(memory_format=torch.channels_last)


# Radii and bounds


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0.3, 0.6), "sample"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_radius_zero_returns_the_bits_of_the_image(tiny: SimpleNamespace, p: float, bounds: Any, keep: Any) -> None:
    images = uniform(3, 3, 8, 8, dtype=torch.float32)
    images[:, 0, 0, 0] = -0.0
    images[:, 0, 0, 1] = 1e-42
    objective, radius = classify(tiny, 3, torch.float32), torch.tensor([0.0, 0.5, 0.0])
    result = pgd(objective, images, radius, steps=3, step_scale=2, norm=p, bounds=bounds, restarts=2, keep=keep)
    same = (result.images.view(torch.int32) == images.view(torch.int32)).flatten(1).all(1)
    assert same.tolist() == [True, False, True]
    assert (result.norms == 0).tolist() == [True, False, True]


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0, 1)])
def test_the_noise_never_leaves_its_ball(tiny: SimpleNamespace, p: float, bounds: Any) -> None:
    objective, images = classify(tiny, 16, torch.float32), uniform(16, 3, 8, 8, dtype=torch.float32)
    radius = torch.logspace(-3, 1, 16)
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return objective(x)

    result = pgd(watched, images, radius, steps=15, step_scale=6, norm=p, bounds=bounds, generator=seeded(0))
    for iterate in [*seen, result.images]:
        noise = (iterate.double() - images.double()).flatten(1)
        length = noise.norm(dim=1) if p == 2 else noise.abs().amax(1)
        # Adding noise to an image rounds: half a unit in the last place of values below 16.
        assert (length <= radius.double() * (1 + 1e-5) + 2.0**-21 * (math.sqrt(192) if p == 2 else 1)).all()
        assert bounds is None or (iterate.min() >= 0 and iterate.max() <= 1)
    assert (result.norms <= radius * (1 + 1e-5) + 1e-5).all()
    if bounds is None:
        big = radius > 0.1
        assert (result.norms[big] <= radius[big] * (1 + 1e-5)).all()


@pytest.mark.parametrize("p", ORDERS)
def test_bounds_may_differ_from_sample_to_sample(tiny: SimpleNamespace, p: float) -> None:
    images = uniform(3, 2, 5, 5)
    objective = tiny.Affine(uniform(1, 2, 5, 5, seed=1) - 0.5, torch.zeros(1, dtype=torch.float64))
    settings: dict[str, Any] = {"steps": 5, "step_scale": 4, "norm": p, "random_start": False}
    low, high = images.flatten(1).amin(1), images.flatten(1).amax(1)
    given = pgd(objective, images, 4.0, bounds=(low, high), **settings)
    by_name = pgd(objective, images, 4.0, bounds="sample", **settings)
    assert torch.equal(given.images, by_name.images)
    for i in range(3):
        assert low[i] - 1e-12 <= given.images[i].min() <= low[i] + 1e-12  # the radius is large enough to get there
        assert high[i] - 1e-12 <= given.images[i].max() <= high[i] + 1e-12
        one = pgd(objective, images[i : i + 1], 4.0, bounds=(low[i].item(), high[i].item()), **settings)
        torch.testing.assert_close(one.images[0], given.images[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", ORDERS)
def test_an_image_outside_its_bounds_keeps_its_values_and_moves_only_inwards(tiny: SimpleNamespace, p: float) -> None:
    images = torch.full((1, 1, 4), 0.5, dtype=torch.float64)
    images[0, 0, :2] = torch.tensor([1.7, -0.4], dtype=torch.float64)
    slope = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(1, 1, 4)
    outward = tiny.Affine(slope, torch.zeros(1, dtype=torch.float64))
    result = pgd(outward, images, 0.2, steps=5, step_scale=2, norm=p, bounds=(0, 1), random_start=False)
    assert result.images[0, 0, :2].tolist() == [1.7, -0.4]
    assert (result.images[0, 0, 2:] != 0.5).all()
    inward = tiny.Affine(-slope, torch.zeros(1, dtype=torch.float64))
    result = pgd(inward, images, 0.2, steps=5, step_scale=2, norm=p, bounds=(0, 1), random_start=False)
    assert result.images[0, 0, 0] < 1.7
    assert result.images[0, 0, 1] > -0.4


# What can go wrong with a gradient


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("keep", ["last", "best"])
def test_an_image_inside_its_bounds_is_attacked_alike_beside_one_outside(
    tiny: SimpleNamespace, p: float, keep: Any
) -> None:
    inside = uniform(2, 3, 8, 8)
    beside = inside.clone()
    beside[1, 0, 0, :2] = torch.tensor([-0.5, 1.5])
    attack = PGD(5, 4.0, p, keep=keep)
    expected, found = (attack(classify(tiny, 2), images, 3.0, bounds=(0, 1)).images for images in (inside, beside))
    assert ((expected[0] == 0) | (expected[0] == 1)).any()  # the bounds matter
    assert torch.equal(found[0], expected[0])
    assert found[1].min() >= -0.5 and found[1].max() <= 1.5 and (found[1] > 1).sum() <= 1


def test_a_radius_with_a_gradient_is_taken_as_a_number(tiny: SimpleNamespace) -> None:
    images, radius = uniform(2, 3, 8, 8), torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    found = pgd(classify(tiny, 2), images, radius, steps=2, step_scale=2.0, bounds=(0, 1), random_start=False)
    plain = pgd(classify(tiny, 2), images, radius.detach(), steps=2, step_scale=2.0, bounds=(0, 1), random_start=False)
    assert not found.images.requires_grad and not found.norms.requires_grad
    assert torch.equal(found.images, plain.images)


@pytest.mark.parametrize("p", ORDERS)
def test_a_zero_gradient_moves_nothing_and_harms_no_neighbour(tiny: SimpleNamespace, p: float) -> None:
    images = uniform(3, 2, 4)
    slopes = (uniform(3, 2, 4, seed=1) - 0.5) * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    result = pgd(
        lambda x: (x * slopes).flatten(1).sum(1, keepdim=True),
        images,
        0.7,
        steps=5,
        step_scale=2,
        norm=p,
        random_start=False,
    )
    assert torch.equal(result.images[1], images[1])
    assert result.images.isfinite().all()
    assert result.nonfinite.tolist() == [0, 0, 0]
    torch.testing.assert_close(result.norms, torch.tensor([0.7, 0, 0.7], dtype=torch.float64))


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_sample_where_it_was_and_is_counted(p: float, bad: float) -> None:
    """Sample 1 has no usable gradient beyond a length of 0.45: ten steps of 0.1 get it to 0.5, five are lost."""
    images, slopes = uniform(3, 2, 5), uniform(3, 2, 5, seed=1) - 0.5

    def terms(x: Tensor, broken: bool) -> Tensor:
        values = (x * slopes).flatten(1).sum(1)
        moved = (x - images).detach().flatten(1)
        length = moved.norm(dim=1) if p == 2 else moved.abs().amax(1)
        beyond = (length > 0.45) & (torch.arange(3) == 1)
        return (values * torch.where(beyond & broken, bad, 1.0))[:, None]

    settings: dict[str, Any] = {"steps": 10, "step_scale": 1, "norm": p, "random_start": False}
    healthy = pgd(lambda x: terms(x, False), images, 1.0, **settings)
    half = pgd(lambda x: terms(x, False), images, 0.5, **(settings | {"steps": 5}))
    result = pgd(lambda x: terms(x, True), images, 1.0, **settings)
    assert result.nonfinite.tolist() == [0, 5, 0]
    assert torch.equal(result.images[[0, 2]], healthy.images[[0, 2]])
    torch.testing.assert_close(result.images[1], half.images[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0, 1), "sample"])
def test_nan_in_one_image_leaves_the_others_alone(tiny: SimpleNamespace, p: float, bounds: Any) -> None:
    images = uniform(3, 3, 8, 8)
    objective = classify(tiny, 3)
    settings: dict[str, Any] = {"steps": 5, "step_scale": 3, "norm": p, "bounds": bounds, "random_start": False}
    broken = images.clone()
    broken[1, 2, 3, 4] = math.nan
    for keep in ("last", "best"):
        healthy = pgd(objective, images, 0.3, thresholds=[1.4], keep=keep, **settings)
        result = pgd(objective, broken, 0.3, thresholds=[1.4], keep=keep, **settings)
        torch.testing.assert_close(result.images[[0, 2]], healthy.images[[0, 2]], rtol=0, atol=1e-12)
        torch.testing.assert_close(result.crossing[[0, 2]], healthy.crossing[[0, 2]], rtol=0, atol=1e-12)
        assert result.nonfinite.tolist() == [0, 5, 0]
        assert torch.equal(result.images[1].isnan(), broken[1].isnan())
        kept = ~broken[1].isnan()
        assert torch.equal(result.images[1][kept], broken[1][kept])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("p", ORDERS)
def test_tiny_and_huge_gradients_still_give_the_direction(tiny: SimpleNamespace, scale: float, p: float) -> None:
    slopes, images = (uniform(1, 2, 5) - 0.5).float(), uniform(3, 2, 5, dtype=torch.float32)
    direction = slopes[0] / slopes[0].norm() if p == 2 else slopes[0].sign()
    result = pgd(
        tiny.Affine(slopes * scale, torch.zeros(1)), images, 1.0, steps=5, step_scale=2, norm=p, random_start=False
    )
    torch.testing.assert_close(result.images, images + direction, rtol=0, atol=1e-5)


# Which iterate, which run


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("random_start", [0.0, 0.5])
def test_best_is_the_worst_iterate_for_the_model_on_the_same_path(
    tiny: SimpleNamespace, p: float, random_start: float
) -> None:
    objective, images = classify(tiny, 6), uniform(6, 3, 8, 8)
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(x: Tensor) -> Tensor:
        terms = objective(x).sin() * 3  # not monotone: the last iterate is seldom the best
        seen.append((x.detach(), terms.detach()))
        return terms

    settings: dict[str, Any] = {"steps": 9, "step_scale": 9, "norm": p, "random_start": random_start}
    radius = 12.0 if p == 2 else 0.4
    last = pgd(watched, images, radius, keep="last", generator=seeded(3), **settings)
    path, seen = seen, []
    best = pgd(watched, images, radius, keep="best", generator=seeded(3), **settings)
    assert len(path) == len(seen) == 10
    for (a, _), (b, _) in zip(path, seen, strict=True):
        assert torch.equal(a, b)
    losses = torch.stack([terms.sum(1) for _, terms in seen])
    winner = losses.argmax(0)
    assert (winner < 9).any()
    assert (best.terms.sum(1) >= last.terms.sum(1)).all()
    torch.testing.assert_close(best.terms.sum(1), losses.max(0).values, rtol=0, atol=0)
    assert torch.equal(best.images, torch.stack([seen[w][0][i] for i, w in enumerate(winner.tolist())]))
    assert torch.equal(last.images, path[-1][0])
    noise = (best.images - images).flatten(1)
    torch.testing.assert_close(best.norms, noise.norm(dim=1) if p == 2 else noise.abs().amax(1))


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    """The loss of sample 0 is NaN from the third pass on, that of sample 1 always."""
    passes = iter(range(99))

    def terms(x: Tensor) -> Tensor:
        broken = torch.tensor([next(passes) >= 2, True])
        return (x.flatten(1).sum(1) * torch.where(broken, math.nan, 1.0))[:, None]

    images = torch.zeros(2, 1, 4)
    result = pgd(terms, images, 1.0, steps=5, step_scale=1, random_start=False, keep="best")
    assert torch.allclose(result.norms, torch.tensor([0.2, 0.0]))
    assert result.terms[0].isfinite()
    assert result.terms[1].isnan()


@pytest.mark.parametrize("keep", ["last", "best"])
def test_restarts_keep_the_worst_run_of_each_sample(tiny: SimpleNamespace, keep: Any) -> None:
    objective, images = classify(tiny, 6), uniform(6, 3, 8, 8)
    settings: dict[str, Any] = {"steps": 2, "step_scale": 1, "thresholds": [1.5], "keep": keep}
    generator = seeded(5)
    runs: list[AttackResult] = [pgd(objective, images, 2.0, generator=generator, **settings) for _ in range(4)]
    together = pgd(objective, images, 2.0, restarts=4, generator=seeded(5), **settings)
    losses = torch.stack([run.terms.sum(1) for run in runs])
    winner = losses.argmax(0).tolist()
    assert len(set(winner)) > 1
    for name in ("images", "terms", "norms", "crossing"):
        expected = torch.stack([getattr(runs[w], name)[i] for i, w in enumerate(winner)])
        assert torch.equal(getattr(together, name), expected), name


def test_restarts_begin_at_the_image_and_then_at_random() -> None:
    starts: list[Tensor] = []

    def terms(x: Tensor) -> Tensor:
        starts.append(x.detach())
        return x.flatten(1).sum(1, keepdim=True)

    pgd(terms, torch.zeros(1, 1, 4), 1.0, steps=1, step_scale=1, random_start=False, restarts=3)
    first, second, third = starts[0], starts[2], starts[4]
    assert first.count_nonzero() == 0
    assert second.count_nonzero() == third.count_nonzero() == 4
    assert not torch.equal(second, third)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_restart_replaces_a_run_without_a_finite_loss(bad: float) -> None:
    passes = iter(range(99))

    def terms(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True) * (bad if next(passes) < 4 else 1.0)

    result = pgd(terms, torch.zeros(2, 1, 4), 1.0, steps=3, step_scale=2, restarts=2, generator=seeded(0))
    assert result.terms.isfinite().all()
    torch.testing.assert_close(result.terms[:, 0], result.images.flatten(1).sum(1))


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
                noise = (iterate[i] - images[i]).flatten()
                expected[i] = noise.norm() if p == 2 else noise.abs().max()
    assert len(seen) == 12
    assert len(set(expected.tolist())) > 2
    torch.testing.assert_close(result.crossing, expected, rtol=1e-12, atol=1e-12)
    assert pgd(objective, images, 0.9, generator=seeded(1), **settings).crossing is None
    for value, crossing in ((math.inf, result.norms), (-math.inf, torch.zeros(5, dtype=torch.float64))):
        extreme = pgd(objective, images, 0.9, thresholds=[value] * 2, generator=seeded(1), **settings)
        torch.testing.assert_close(extreme.crossing, crossing, rtol=1e-12, atol=1e-12)


def test_a_threshold_met_exactly_is_not_below(tiny: SimpleNamespace) -> None:
    objective = tiny.Affine(torch.ones(1, 1, 4), torch.zeros(1))
    images = torch.zeros(1, 1, 4)
    result = pgd(objective, images, 1.0, steps=2, step_scale=2, thresholds=[0.0], random_start=False)
    assert result.crossing.item() == 0  # the image itself has exactly the threshold; norm 0 either way
    start = pgd(objective, images, 1.0, steps=2, step_scale=2, thresholds=[2.0], random_start=False)
    assert start.terms.item() == 2  # the sphere has exactly the threshold
    assert start.crossing.item() == 0


# Cost, and what an attack leaves behind


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("thresholds", [None, [1.0]])
def test_number_of_passes(tiny: SimpleNamespace, steps: int, thresholds: list[float] | None) -> None:
    images = uniform(2, 3, 8, 8)
    for keep, final_pass, passes in (("last", True, 1), ("last", False, 0), ("best", True, 1)):
        objective = classify(tiny, 2)
        attack = PGD(steps, 2.0, keep=keep)
        result = attack(objective, images, 0.5, thresholds=thresholds, final_pass=final_pass)
        assert objective.calls == steps + passes
        assert (result.terms is None) == (not final_pass)
    objective = classify(tiny, 2)
    pgd(objective, images, 0.5, steps=steps, step_scale=2, restarts=3, thresholds=thresholds)
    assert objective.calls == 3 * (steps + 1)


def test_no_parameter_gets_or_computes_a_gradient(tiny: SimpleNamespace) -> None:
    objective = classify(tiny, 2)
    asked: list[bool] = []
    objective.model[0].register_forward_hook(lambda m, i, o: asked.append(m.weight.requires_grad))
    pgd(objective, uniform(2, 3, 8, 8), 0.5, steps=3, step_scale=2)
    assert asked == [False] * 4
    assert all(p.grad is None and p.requires_grad for p in objective.model.parameters())


def test_a_callable_without_a_model_gets_no_gradient_either(tiny: SimpleNamespace) -> None:
    objective = classify(tiny, 2)
    images = uniform(2, 3, 8, 8).requires_grad_()
    result = pgd(lambda x: objective(x), images, 0.5, steps=3, step_scale=2)
    assert all(p.grad is None for p in objective.model.parameters())
    assert images.grad is None
    for tensor in (result.images, result.terms, result.norms):
        assert not tensor.requires_grad


def test_images_are_not_written_to(tiny: SimpleNamespace) -> None:
    images = uniform(2, 3, 8, 8)
    before, version = images.clone(), images._version
    pgd(classify(tiny, 2), images, 0.5, steps=3, step_scale=2, bounds=(0, 1), keep="best")
    assert torch.equal(images, before)
    assert images._version == version


def test_the_generator_repeats_a_run_and_no_global_random_state_moves(tiny: SimpleNamespace) -> None:
    images = uniform(2, 3, 8, 8)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for objective in (classify(tiny, 2), lambda x: x.flatten(1).sum(1, keepdim=True)):
        settings: dict[str, Any] = {"steps": 2, "step_scale": 0.5, "restarts": 2}
        first, again, other = (pgd(objective, images, 1.0, generator=seeded(s), **settings).images for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        free = [pgd(objective, images, 1.0, **settings).images for _ in range(2)]
        assert not torch.equal(*free)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state


def test_dropout_draws_in_the_attack_do_not_move_the_random_state(tiny: SimpleNamespace) -> None:
    model = tiny.cnn(dropout=0.5).train()
    objective = tiny.Classifier(model, torch.arange(4))
    state = torch.get_rng_state()
    pgd(objective, uniform(4, 3, 8, 8, dtype=torch.float32), 1.0, steps=3, step_scale=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


# Modes of torch


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("random_start", [0.0, 1.0])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_where_gradients_are_off(tiny: SimpleNamespace, mode: Any, random_start: float, p: float) -> None:
    objective, images = classify(tiny, 3), uniform(3, 3, 8, 8)
    radius = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    bounds = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    settings: dict[str, Any] = {"steps": 4, "step_scale": 2, "norm": p, "keep": "best", "random_start": random_start}
    expected = pgd(objective, images, radius, bounds=bounds, thresholds=[1.4], generator=seeded(0), **settings)
    with mode():
        # Everything that a caller may have made inside the mode, too.
        inside = images.clone(), radius.clone(), tuple(b.clone() for b in bounds), torch.tensor([1.4])
        results = [
            pgd(objective, x, r, bounds=b, thresholds=t, generator=seeded(0), **settings)
            for x, r, b, t in ((images, radius, bounds, torch.tensor([1.4])), inside)
        ]
        assert not torch.is_grad_enabled()
    outside = pgd(objective, inside[0], inside[1], bounds=inside[2], generator=seeded(0), **settings)
    for result in (*results, outside):
        assert torch.equal(result.images, expected.images)
        assert torch.equal(result.terms, expected.terms)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", [True, False])
def test_runs_under_autocast(tiny: SimpleNamespace, kind: torch.dtype, gradients: bool) -> None:
    objective, images = classify(tiny, 4, torch.float32), uniform(4, 3, 8, 8, dtype=torch.float32)
    settings: dict[str, Any] = {"steps": 5, "step_scale": 2, "random_start": False}
    exact = pgd(objective, images, 1.0, **settings)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", kind):
        objective(images)  # as a host would; fills autocast's cache of cast weights
        result = pgd(objective, images, 1.0, **settings)
    assert result.images.dtype == torch.float32
    assert result.nonfinite.sum() == 0
    cosine = torch.cosine_similarity((result.images - images).flatten(1), (exact.images - images).flatten(1))
    assert cosine.min() > 0.99
    torch.testing.assert_close(result.norms, torch.ones(4), rtol=1e-5, atol=0)


def test_autocast_training_after_an_attack_still_reaches_the_weights(tiny: SimpleNamespace) -> None:
    objective, images = classify(tiny, 4, torch.float32), uniform(4, 3, 8, 8, dtype=torch.float32)
    gradients = []
    for attacked in (False, True):
        objective.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if attacked:
                pgd(objective, images, 1.0, steps=2, step_scale=2)
            objective(images).mean().backward()
        gradients.append([p.grad.clone() for p in objective.model.parameters()])
    for plain, after in zip(*gradients, strict=True):
        assert torch.equal(plain, after)
        assert plain.count_nonzero() > 0


class HalfTerms:
    """A convolution in float16 under a tiny loss: its gradient is below what float16 holds."""

    def __init__(self, scale: float) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Conv2d(2, 4, 3)
        self.scale = scale

    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images).float().square().flatten(1).mean(1, keepdim=True) * self.scale


@pytest.mark.parametrize("p", ORDERS)
def test_float16_gradients_do_not_underflow(p: float) -> None:
    images = uniform(3, 2, 12, 12, dtype=torch.float32)
    settings: dict[str, Any] = {"steps": 4, "step_scale": 2, "norm": p, "random_start": False}
    exact = pgd(HalfTerms(1.0), images, 1.0, **settings)
    tiny_loss = HalfTerms(1e-6)
    with torch.autocast("cpu", torch.float16):
        leaf = images.clone().requires_grad_()
        assert torch.autograd.grad(tiny_loss(leaf).sum(), leaf)[0].count_nonzero() < leaf.numel() / 2
        result = pgd(tiny_loss, images, 1.0, **settings)
    cosine = torch.cosine_similarity((result.images - images).flatten(1), (exact.images - images).flatten(1))
    assert cosine.min() > 0.9
    assert result.nonfinite.sum() == 0


def test_float16_overflow_backs_off_per_sample() -> None:
    """Sample 1 has a loss a thousand times larger: its scaled gradient overflows until its scale has come down."""
    model = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(model.weight)
    factor = torch.tensor([1e-3, 20.0])

    def terms(x: Tensor) -> Tensor:
        return (model(x).float().flatten(1).sum(1) * factor)[:, None]

    with torch.autocast("cpu", torch.float16):
        result = pgd(terms, torch.zeros(2, 1, 3, 3), 1.0, steps=8, step_scale=8, random_start=False)
    assert result.nonfinite.tolist() == [0, 1]  # 20 * 2^15 is too much, 20 * 2^11 is not
    torch.testing.assert_close(result.images, torch.full((2, 1, 3, 3), 1 / 3))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", ORDERS)
def test_half_precision_images_and_terms(kind: torch.dtype, p: float) -> None:
    """Terms in float16 take the loss scale as their gradient: no step may be lost to it."""
    images = uniform(3, 2, 6, 6, dtype=torch.float32).to(kind)
    slopes = (uniform(2, 6, 6, seed=1, dtype=torch.float32) - 0.5).to(kind)
    seen: set[torch.dtype] = set()

    def terms(x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return torch.stack(((x * slopes).flatten(1).sum(1), (x * slopes).flatten(1).sum(1) / 2), 1)

    radius = torch.tensor([0.0, 0.25, 0.5])
    result = pgd(terms, images, radius, steps=5, step_scale=2, norm=p, random_start=False, thresholds=[9, 9])
    assert seen == {kind}
    assert result.images.dtype == kind
    assert result.nonfinite.sum() == 0
    assert torch.equal(result.images[0], images[0])
    torch.testing.assert_close(result.norms, radius, rtol=1e-5, atol=0)
    direction = slopes.float() / slopes.float().norm() if p == 2 else slopes.float().sign()
    expected = images.float() + radius.reshape(3, 1, 1, 1) * direction
    torch.testing.assert_close(result.images.float(), expected, rtol=0, atol=2e-3 if kind == torch.float16 else 1e-2)


# Errors


def flat(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"steps must be a whole number >= 1, got 0"),
        ({"steps": 2.0}, r"steps must be a whole number >= 1, got 2.0"),
        ({"steps": True}, r"steps must be a whole number >= 1, got True"),
        ({"restarts": 0}, r"restarts must be a whole number >= 1, got 0"),
        ({"step_scale": 0}, r"step_scale must be positive \(1 just reaches the radius\), got 0"),
        ({"step_scale": -1.0}, r"step_scale must be positive .*got -1.0"),
        ({"step_scale": math.inf}, r"step_scale must be positive .*got inf"),
        ({"step_scale": math.nan}, r"step_scale must be positive .*got nan"),
        ({"random_start": 1.5}, r"random_start must be a fraction of the radius in \[0, 1\], got 1.5"),
        ({"random_start": math.nan}, r"random_start must be a fraction .*got nan"),
        ({"keep": "worst"}, r"keep must be 'last' or 'best', got 'worst'"),
        ({"norm": 1}, r"norm must be 2 or inf \(L2 or Linf\), got 1"),
        ({"bounds": (1, 0)}, r"bounds must be \(lowest, highest\) with lowest < highest, got \(1, 0\)"),
        ({"bounds": (math.nan, 1)}, r"bounds must be \(lowest, highest\) with lowest < highest, got \(nan, 1\)"),
        ({"bounds": (0, 1, 2)}, r"bounds must be None, 'sample' or a pair \(lowest, highest\), got \(0, 1, 2\)"),
        ({"bounds": "image"}, r"bounds must be None, 'sample' or a pair \(lowest, highest\), got 'image'"),
        ({"bounds": 1.0}, r"bounds must be None, 'sample' or a pair \(lowest, highest\), got 1.0"),
        ({"bounds": (torch.zeros(3), torch.ones(3))}, r"must be a number or have shape \(2,\), got \(3,\)"),
        ({"radius": -0.5}, r"radius must be >= 0 and finite, got -0.5"),
        ({"radius": torch.tensor([1.0, -2.0])}, r"radius must be >= 0 and finite, got -2.0"),
        ({"radius": math.nan}, r"radius must be >= 0 and finite, got nan"),
        ({"radius": math.inf}, r"radius must be >= 0 and finite, got inf"),
        ({"radius": torch.ones(3)}, r"must be a number or have shape \(2,\), got \(3,\)"),
        ({"thresholds": [1.0, 2.0]}, r"2 thresholds were given for K = 1 loss terms"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    settings = {"radius": 1.0, "steps": 2, "step_scale": 1.0} | settings
    with pytest.raises(ValueError, match=message):
        pgd(flat, torch.zeros(2, 1, 4), **settings)


def test_ifgsm_refuses_the_same() -> None:
    with pytest.raises(ValueError, match="radius must be >= 0 and finite, got -1"):
        ifgsm(flat, torch.zeros(2, 1, 4), -1, steps=3)
    with pytest.raises(ValueError, match="steps must be a whole number >= 1, got 0"):
        ifgsm(flat, torch.zeros(2, 1, 4), 1, steps=0)


@pytest.mark.parametrize(
    ("terms", "got"),
    [
        (lambda x: x.sum(), r"\(\)"),
        (lambda x: x.flatten(1).sum(1), r"\(2,\)"),
        (lambda x: x.sum().reshape(1, 1), r"\(1, 1\)"),
        (lambda x: 0.5, "float"),
    ],
)
def test_terms_of_another_shape(terms: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"loss terms of shape \(B, K\) = \(2, K\), one row per sample.*got {got}"):
        pgd(terms, torch.zeros(2, 1, 4), 1.0, steps=2, step_scale=1)
