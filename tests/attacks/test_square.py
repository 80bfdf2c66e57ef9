"""The Square Attack against Algorithms 1 to 3 of the paper written for one image, closed forms, and its promises."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmed.attacks import PGD, AttackResult, SquareAttack
from advmed.attacks.problem import Problem
from advmed.attacks.square import _bump

RANKS = [(2, 17), (3, 11, 16), (2, 7, 9, 8)]  # (C, L), (C, H, W), (C, D, H, W)
TINY = [(1, 1), (1, 1, 1), (2, 2, 3), (1, 5, 1), (1, 1, 2, 3)]
ORDERS = [2, math.inf]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=dtype)


def lengths(noise: Tensor, p: float) -> Tensor:
    flat = noise.flatten(1)
    return flat.norm(dim=1) if p == 2 else flat.abs().amax(1)


class Watched:
    """An objective that notes its passes, and will not have a gradient asked for."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective
        self.points: list[Tensor] = []
        self.losses: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        assert not images.requires_grad
        assert not torch.is_grad_enabled()
        terms: Tensor = self.objective(images)
        assert not terms.requires_grad
        self.points.append(images.clone())
        self.losses.append(terms.sum(1))
        return terms


# The schedule, the window and its bump


def sizes(attack: SquareAttack, *extents: int) -> list[tuple[int, ...]]:
    problem = Problem(lambda x: x, torch.zeros(1, 1, *extents), 1.0, norm=attack.norm)
    return [attack._size(problem, query) for query in range(attack.steps)]


def test_the_area_of_the_window_is_halved_when_the_authors_halve_it() -> None:
    sides = [size[0] for size in sizes(SquareAttack(10_000, math.inf, share=0.8), 1000, 1000)]
    begins = [0, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000, 10_000]
    for k, (begin, end) in enumerate(itertools.pairwise(begins)):
        assert set(sides[begin:end]) == {round(math.sqrt(0.8 / 2**k) * 1000)}


@pytest.mark.parametrize(("p", "least"), [(math.inf, 1), (2, 3)])
def test_the_schedule_is_the_same_share_of_any_number_of_queries(p: float, least: int) -> None:
    found = sizes(SquareAttack(100, p), 20, 40)
    for query, size in enumerate(found):
        halvings = sum(query >= 0.01 * start for start in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = math.sqrt(0.1 / 2**halvings)
        assert size == (max(least, round(20 * side)), max(least, round(40 * side)))
    assert found[0] == (6, 13)
    assert found[-1] == (least, least)


@pytest.mark.parametrize("p", ORDERS)
def test_a_window_fits_tiny_and_long_images(p: float) -> None:
    for extents in ((1, 1), (2, 3), (1, 50), (1, 1, 9), (5,)):
        for size in sizes(SquareAttack(30, p, share=1.0), *extents):
            assert all(1 <= side <= n for side, n in zip(size, extents, strict=True))
    assert sizes(SquareAttack(5000, p, share=1.0), 9, 11)[0] == (9, 11)


def paper_bump(h: int) -> np.ndarray:
    """eta of section 3.4, in two halves of opposite sign, of h1 rows and h columns each.

    Its entry (r, s), counted from 1, is the sum over k = 0 .. M of 1 / (n + 1 - k)^2 with n = floor(h / 2) and
    M = n - max(|r - floor(h1 / 2) - 1|, |s - floor(h / 2) - 1|).
    """
    n = h // 2

    def rectangle(h1: int) -> np.ndarray:
        found = np.zeros((h1, h))
        for r in range(1, h1 + 1):
            for s in range(1, h + 1):
                m = n - max(abs(r - h1 // 2 - 1), abs(s - h // 2 - 1))
                found[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
        return found

    return np.concatenate((rectangle(n), -rectangle(h - n)))


@pytest.mark.parametrize("h", [1, 2, 3, 4, 7, 10, 15])
def test_the_bump_is_that_of_the_paper(h: int) -> None:
    rows, columns = torch.arange(h).reshape(1, 1, h, 1), torch.arange(h).reshape(1, 1, 1, h)
    expected = torch.tensor(paper_bump(h))
    torch.testing.assert_close(_bump([rows, columns], (h, h), 0)[0, 0].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(_bump([rows, columns], (h, h), 1)[0, 0].double(), expected.T, rtol=1e-6, atol=0)


def test_windows_are_everywhere_and_whole() -> None:
    images = torch.zeros(4000, 1, 5, 6)
    problem = Problem(lambda x: x, images, 1.0, norm=2, generator=seeded(0))
    inside, local = SquareAttack(1)._window(problem, (2, 3))
    assert (inside.sum((1, 2, 3)) == 6).all()
    corners = inside[:, 0].flatten(1).int().argmax(1)
    counts = torch.bincount(corners, minlength=30).reshape(5, 6)
    assert (counts[:4, :4] > 4000 / 16 * 0.75).all()  # 16 places, each as likely: 250, give or take 15
    assert (counts[:4, :4] < 4000 / 16 * 1.25).all()
    assert counts[:4, :4].sum() == 4000
    rows = local[0].expand(-1, -1, 5, 6)[inside]
    columns = local[1].expand(-1, -1, 5, 6)[inside]
    assert (3 * rows + columns).reshape(4000, 6).tolist() == [list(range(6))] * 4000


# One query, for one image after the other


class Draws:
    """Numbers given beforehand for a problem that draws."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.generator = seeded(seed)
        self.made: list[Tensor] = []
        monkeypatch.setattr(Problem, "uniform", lambda problem, shape: self.draw(shape))

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        self.made.append(drawn)
        return drawn


def test_a_linf_query_is_that_of_algorithm_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds plus or minus twice the radius in the window, and projects."""
    draws = Draws(monkeypatch, 0)
    images, radius = uniform(5, 3, 9, 12), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.6], dtype=torch.float64)
    problem = Problem(lambda x: x, images, radius, norm=math.inf, bounds=(0, 1))
    noise = problem.inside((uniform(5, 3, 9, 12, seed=2) - 0.5) * 2 * radius.reshape(5, 1, 1, 1))[1]
    found, _ = problem.inside(SquareAttack(9, math.inf)._squares(problem, noise, (4, 5)))
    places, signs = draws.made
    for i in range(5):
        eps, x = float(radius[i]), images[i].numpy()
        r, s = int(places[i, 0] * (9 - 4 + 1)), int(places[i, 1] * (12 - 5 + 1))
        delta = np.zeros((3, 9, 12))
        for c in range(3):
            delta[c, r : r + 4, s : s + 5] = -2 * eps if signs[i, c, 0, 0] < 0.5 else 2 * eps
        z = np.clip(x + noise[i].numpy() + delta, x - eps, x + eps).clip(0, 1)
        torch.testing.assert_close(found[i], torch.tensor(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_an_l2_query_is_that_of_algorithm_3(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draws = Draws(monkeypatch, seed)
    monkeypatch.setattr(Problem, "choose", lambda _, number: seed % number)
    h, w, channels = 4, 11, 3
    images, radius = uniform(5, channels, w, w), torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    problem = Problem(lambda x: x, images, radius, norm=2)
    noise = problem.inside(uniform(5, channels, w, w, seed=2) - 0.5)[1] * 0.9
    noise[3] = 0
    found = SquareAttack(9)._bumps(problem, noise, (h, h))
    first, second, signs = draws.made
    bump = paper_bump(h).T if seed % 2 else paper_bump(h)
    bump = bump / np.linalg.norm(bump)
    for i in range(5):
        nu, eps = noise[i].numpy().copy(), float(radius[i])
        (r1, s1), (r2, s2) = ((np.floor(place[i].numpy() * (w - h + 1))).astype(int) for place in (first, second))
        unused = eps**2 - np.sum(nu**2)
        both = np.zeros((w, w), dtype=bool)
        both[r1 : r1 + h, s1 : s1 + h] = both[r2 : r2 + h, s2 : s2 + h] = True
        expected = nu.copy()
        for c in range(channels):
            window = nu[c, r1 : r1 + h, s1 : s1 + h]
            length = np.linalg.norm(window)
            shape = (-1 if signs[i, c, 0, 0] < 0.5 else 1) * bump + (window / length if length else 0)
            available = math.sqrt(np.sum(nu[c][both] ** 2) + unused / channels)
            expected[c, r2 : r2 + h, s2 : s2 + h] = 0
            expected[c, r1 : r1 + h, s1 : s1 + h] = shape / np.linalg.norm(shape) * available
        torch.testing.assert_close(found[i], torch.tensor(expected), rtol=0, atol=1e-6)
        assert np.linalg.norm(expected) == pytest.approx(eps)  # all of the radius is spent


# The start


@pytest.mark.parametrize("shape", [(2, 9), (2, 9, 12), (2, 4, 9, 12)])
def test_the_linf_start_is_stripes_of_width_one(shape: tuple[int, ...]) -> None:
    problem = Problem(lambda x: x, torch.zeros(40, *shape), 0.25, norm=math.inf, generator=seeded(0))
    start = SquareAttack(1, math.inf)._start(problem)
    assert start.shape == (40, *shape)
    assert set(start.unique().tolist()) == {-0.25, 0.25}
    stripes = start if len(shape) == 2 else start[:, :, 0]
    assert len(shape) == 2 or torch.equal(start, stripes.unsqueeze(2).expand_as(start))
    neighbours = (stripes[..., 1:] == stripes[..., :-1]).float().mean()
    assert 0.4 < neighbours < 0.6  # independent
    assert 0.4 < (stripes > 0).float().mean() < 0.6
    assert not torch.equal(stripes[:, 0], stripes[:, 1])


@pytest.mark.parametrize("shape", RANKS + TINY)
def test_the_l2_start_is_on_the_sphere_and_everywhere(shape: tuple[int, ...]) -> None:
    radius = torch.tensor([0.5, 2.0], dtype=torch.float64)
    problem = Problem(lambda x: x, torch.zeros(2, *shape, dtype=torch.float64), radius, norm=2, generator=seeded(0))
    start = SquareAttack(1)._start(problem)
    torch.testing.assert_close(lengths(start, 2), radius, rtol=1e-12, atol=0)
    assert start.count_nonzero() == start.numel()


def test_the_l2_start_has_one_bump_per_tile_of_random_sign() -> None:
    problem = Problem(lambda x: x, torch.zeros(30, 2, 20, 20), 1.0, norm=2, generator=seeded(0))
    tiles = SquareAttack(1)._start(problem).unfold(2, 4, 4).unfold(3, 4, 4)  # five a side
    expected = (
        torch.tensor(paper_bump(4), dtype=torch.float32) * tiles[0, 0, 0, 0, 0, 0].abs() / abs(paper_bump(4)[0, 0])
    )
    torch.testing.assert_close(tiles.abs(), expected.abs().expand_as(tiles), rtol=1e-5, atol=1e-7)
    signs = (tiles * expected).sign()
    assert torch.equal(signs, signs[..., :1, :1].expand_as(signs))
    assert 0.45 < (signs[..., 0, 0] > 0).float().mean() < 0.55


# The search


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("shape", RANKS + TINY)
@pytest.mark.parametrize("bounds", [None, (0.2, 0.8)])
def test_keeps_the_worst_of_its_queries_and_stays_inside(p: float, shape: tuple[int, ...], bounds: Any) -> None:
    """Per-sample radii, two terms, images outside their bounds."""
    images, weight = uniform(5, *shape), uniform(5, *shape, seed=3) - 0.5
    radius = torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64) * (1 if p == 2 else 0.2)

    def terms(x: Tensor) -> Tensor:
        return torch.stack((((x * weight * 5).sin()).flatten(1).sum(1), (x**3 * weight).flatten(1).sum(1)), 1)

    watched = Watched(terms)
    attack = SquareAttack(30, p)
    result = attack(watched, images, radius, bounds=bounds, generator=seeded(0))
    assert len(watched.points) == attack.queries == 31
    assert attack.gradients == 0
    losses = torch.stack(watched.losses)
    worst = losses.max(0)
    torch.testing.assert_close(result.terms.sum(1), worst.values, rtol=0, atol=0)
    for i in range(1, 5):
        assert torch.equal(result.images[i], watched.points[int(worst.indices[i])][i])
    assert torch.equal(result.images[0], images[0])
    assert result.nonfinite.tolist() == [0] * 5
    for point in watched.points:
        assert (lengths(point - images, p) <= radius * (1 + 1e-9) + 1e-12).all()
        if bounds is not None:
            assert (point >= images.clamp(max=0.2)).all()
            assert (point <= images.clamp(min=0.8)).all()
    torch.testing.assert_close(result.norms, lengths(result.images - images, p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bounds", [None, (0, 1)])
def test_linf_points_are_at_the_radius_before_clamping(tiny: SimpleNamespace, bounds: Any) -> None:
    images = uniform(3, 2, 10, 10)
    objective = Watched(tiny.Affine(uniform(1, 2, 10, 10, seed=1) - 0.5, torch.zeros(1, dtype=torch.float64)))
    SquareAttack(40, math.inf)(objective, images, 0.25, bounds=bounds, generator=seeded(0))
    for point in objective.points:
        up, down = images + 0.25, images - 0.25
        if bounds is not None:
            up, down = up.clamp(max=1), down.clamp(min=0)
        assert torch.minimum((point - up).abs(), (point - down).abs()).max() < 1e-12


@pytest.mark.parametrize("p", ORDERS)
def test_the_loss_never_falls_with_more_queries(tiny: SimpleNamespace, p: float) -> None:
    """With a window of one size, a run of fewer queries is the beginning of a longer one."""
    objective = tiny.Classifier(tiny.cnn().double().eval(), torch.arange(6) % 4)
    images, radius = uniform(6, 3, 8, 8), 2.0 if p == 2 else 0.2
    share = 1e-6  # the smallest window from the start
    losses = []
    for steps in (1, 2, 5, 20, 60):
        result = SquareAttack(steps, p, share=share)(objective, images, radius, generator=seeded(0))
        losses.append(result.terms[:, 0])
    assert (torch.stack(losses).diff(dim=0) >= 0).all()
    assert (losses[-1] > losses[0]).all()


@pytest.mark.parametrize("p", ORDERS)
def test_nears_the_maximum_of_an_affine_objective(tiny: SimpleNamespace, p: float) -> None:
    """A slope that is one piece of one sign per channel; half of a bump, and stripes, begin far from it."""
    slopes = torch.ones(1, 2, 12, 12, dtype=torch.float64)
    slopes[:, 1] = -1
    objective, images = tiny.Affine(slopes, torch.zeros(1, dtype=torch.float64)), torch.zeros(3, 2, 12, 12).double()
    best = slopes.norm() if p == 2 else slopes.abs().sum()
    short = SquareAttack(3, p)(objective, images, 1.0, generator=seeded(0)).terms[:, 0] / best
    long = SquareAttack(1500, p)(objective, images, 1.0, generator=seeded(0)).terms[:, 0] / best
    assert (short < 0.6).all()
    assert (long > (0.9 if p == math.inf else 0.45)).all()
    assert (long <= 1 + 1e-9).all()


def shapes_of_two() -> tuple[nn.Module, Tensor, Tensor]:
    """A template classifier behind an input with six grey values, and 60 images of two kinds."""
    labels = torch.arange(60) % 2
    pattern = torch.zeros(1, 15, 15)
    pattern[:, 4:11, 4:11] = 1
    images = 0.5 + 0.1 * (2 * labels - 1).reshape(-1, 1, 1, 1) * pattern
    images = (images + 0.08 * torch.randn(60, 1, 15, 15, generator=seeded(0))).clamp(0, 1)

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(225, 2)
            weight = (pattern - pattern.mean()).flatten()
            self.linear.weight.data.copy_(torch.stack((-weight, weight)))
            self.linear.bias.data.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(((x * 5).round() / 5).flatten(1))

    return Quantised(), images, labels


@pytest.mark.parametrize(("p", "eps"), [(2, 2.0), (math.inf, 0.2)])
def test_breaks_a_model_that_hides_its_gradients(tiny: SimpleNamespace, p: float, eps: float) -> None:
    model, images, labels = shapes_of_two()
    objective = tiny.Classifier(model, labels)

    def accuracy(x: Tensor) -> float:
        with torch.no_grad():
            return (model(x).argmax(1) == labels).float().mean().item()

    pgd = PGD(50, 5.0, p, random_start=1.0, keep="best")(objective, images, eps, generator=seeded(0))
    square = SquareAttack(150, p)(objective, images, eps, bounds=(0, 1), generator=seeded(0))
    assert accuracy(images) > 0.9
    assert accuracy(pgd.images) > 0.9  # rounding has no slope: PGD stays at its random start
    assert accuracy(square.images) < 0.4


@pytest.mark.parametrize(("p", "eps"), [(2, 1.5), (math.inf, 0.2)])
def test_is_as_strong_as_torchattacks(p: float, eps: float) -> None:
    """Of as many queries, on a smooth model, mean of three seeds; theirs ends where a sample is misclassified."""
    import torchattacks

    model, images, labels = shapes_of_two()
    smooth = nn.Sequential(nn.Flatten(), model.linear)

    def terms(x: Tensor) -> Tensor:
        return F.cross_entropy(smooth(x), labels, reduction="none")[:, None]

    def accuracy(x: Tensor) -> float:
        with torch.no_grad():
            return 100 * (smooth(x).argmax(1) == labels).float().mean().item()

    theirs, ours = [], []
    for seed in range(3):
        with torch.random.fork_rng():
            settings: dict[str, Any] = {"n_queries": 100, "p_init": 0.1, "loss": "ce", "resc_schedule": True}
            reference = torchattacks.Square(smooth, norm="L2" if p == 2 else "Linf", eps=eps, seed=seed, **settings)
            theirs.append(accuracy(reference(images, labels)))
        attack = SquareAttack(100, p)
        ours.append(accuracy(attack(terms, images, eps, bounds=(0, 1), generator=seeded(seed)).images))
    assert 20 < np.mean(theirs) < accuracy(images) - 10
    assert np.mean(ours) <= np.mean(theirs) + 10


# What can go wrong


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("p", ORDERS)
def test_a_loss_that_is_not_finite_is_never_kept(p: float, bad: float) -> None:
    """Sample 1 has a finite loss in every third query only, sample 2 never."""
    images, slopes = uniform(3, 1, 6, 6), uniform(1, 6, 6, seed=1) - 0.5
    passes: list[int] = []

    def terms(x: Tensor) -> Tensor:
        passes.append(1)
        values = (x * slopes).flatten(1).sum(1)
        broken = torch.tensor([False, len(passes) % 3 != 0, True])
        return torch.where(broken, bad, values)[:, None]

    watched = Watched(terms)
    result = SquareAttack(40, p)(watched, images, 0.5, generator=seeded(0))
    losses = torch.stack(watched.losses)
    finite = losses.where(losses.isfinite(), -math.inf).max(0)
    torch.testing.assert_close(result.terms[:2, 0], finite.values[:2], rtol=0, atol=0)
    for i in (0, 1):
        assert torch.equal(result.images[i], watched.points[int(finite.indices[i])][i])
    assert not result.terms[2].isfinite()
    assert torch.equal(result.images[2], watched.points[0][2])
    assert result.images.isfinite().all()


@pytest.mark.parametrize("p", ORDERS)
def test_nan_in_one_image_leaves_the_others_alone(tiny: SimpleNamespace, p: float) -> None:
    images = uniform(3, 3, 8, 8)
    objective = tiny.Classifier(tiny.cnn().double().eval(), torch.arange(3))
    broken = images.clone()
    broken[1, 2, 3, 4] = math.nan
    healthy = SquareAttack(20, p)(objective, images, 0.3, bounds="sample", generator=seeded(0))
    result = SquareAttack(20, p)(objective, broken, 0.3, bounds="sample", generator=seeded(0))
    assert torch.equal(result.images[[0, 2]], healthy.images[[0, 2]])
    assert result.terms[[0, 2]].isfinite().all()


# What it leaves behind


@pytest.mark.parametrize("p", ORDERS)
def test_the_generator_repeats_a_run(tiny: SimpleNamespace, p: float) -> None:
    objective = tiny.Classifier(tiny.cnn().double().eval(), torch.arange(3))
    images, attack = uniform(3, 3, 8, 8), SquareAttack(10, p)
    first, again, other = (attack(objective, images, 0.5, generator=seeded(s)) for s in (1, 1, 2))
    for name in ("images", "terms", "norms"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.images, other.images)
    assert not torch.equal(*(attack(objective, images, 0.5).images for _ in range(2)))


@pytest.mark.parametrize("p", ORDERS)
def test_no_trace_is_left_in_the_model_or_the_images(tiny: SimpleNamespace, p: float) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), tiny.cnn(dropout=0.5)).train()
    model[0].weight.requires_grad_(False)
    images = uniform(4, 3, 8, 8, dtype=torch.float32)
    before, version = images.clone(), images._version
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    result = SquareAttack(5, p)(tiny.Classifier(model, torch.arange(4)), images, 1.0, bounds=(0, 1))
    assert (result.norms > 0.1).all()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
    assert torch.equal(images, before)
    assert images._version == version


# Modes of torch


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_runs_in_any_mode_of_gradients(tiny: SimpleNamespace, mode: Any, p: float) -> None:
    objective, images = tiny.Classifier(tiny.cnn().double().eval(), torch.arange(3)), uniform(3, 3, 8, 8)
    attack = SquareAttack(10, p)
    expected = attack(objective, images, 0.5, bounds=(0, 1), generator=seeded(0))
    with mode():
        found: AttackResult = attack(objective, images.clone(), 0.5, bounds=(0, 1), generator=seeded(0))
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.terms, expected.terms)
    assert not found.terms.requires_grad


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_runs_under_autocast(tiny: SimpleNamespace, kind: torch.dtype, p: float) -> None:
    objective = tiny.Classifier(tiny.cnn().eval(), torch.arange(4))
    images = uniform(4, 3, 8, 8, dtype=torch.float32)
    before = objective(images)[:, 0].detach()
    with torch.autocast("cpu", kind):
        result = SquareAttack(40, p)(objective, images, 2.0 if p == 2 else 0.2, generator=seeded(0))
    assert result.images.dtype == torch.float32
    assert (objective(result.images)[:, 0] > before).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", ORDERS)
def test_half_precision_images(kind: torch.dtype, p: float) -> None:
    images = uniform(3, 2, 9, 9, dtype=torch.float32).to(kind)
    slopes = (uniform(2, 9, 9, seed=1, dtype=torch.float32) - 0.5).to(kind)
    seen: set[torch.dtype] = set()

    def terms(x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return (x * slopes).flatten(1).sum(1, keepdim=True)

    radius = torch.tensor([0.0, 0.25, 0.5])
    result = SquareAttack(15, p)(terms, images, radius, generator=seeded(0))
    assert seen == {kind}
    assert result.images.dtype == kind
    assert torch.equal(result.images[0], images[0])
    torch.testing.assert_close(result.norms, radius, rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", ORDERS)
def test_channels_last_equals_contiguous(tiny: SimpleNamespace, p: float) -> None:
    objective, images = tiny.Classifier(tiny.cnn().double().eval(), torch.arange(4)), uniform(4, 3, 8, 8)
    first = SquareAttack(10, p)(objective, images, 0.5, bounds=(0, 1), generator=seeded(1))
    last = images.contiguous(memory_format=torch.channels_last)
    second = SquareAttack(10, p)(objective, last, 0.5, bounds=(0, 1), generator=seeded(1))
    torch.testing.assert_close(second.images, first.images, rtol=0, atol=1e-9)
    assert second.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("p", ORDERS)
def test_radius_zero_returns_the_bits_of_the_image(p: float) -> None:
    images = uniform(2, 1, 4, 4, dtype=torch.float32)
    images[:, 0, 0, 0] = -0.0
    images[:, 0, 0, 1] = 1e-42
    result = SquareAttack(5, p)(lambda x: x.flatten(1).sum(1, keepdim=True), images, torch.tensor([0.0, 1.0]))
    same = (result.images.view(torch.int32) == images.view(torch.int32)).flatten(1).all(1)
    assert same.tolist() == [True, False]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"steps must be a whole number >= 1, got 0"),
        ({"steps": 10.0}, r"steps must be a whole number >= 1, got 10.0"),
        ({"share": 0}, r"share must be above 0"),
        ({"share": 1.5}, r"share must be a fraction in \[0, 1\], got 1.5"),
        ({"share": math.nan}, r"share must be a fraction in \[0, 1\], got nan"),
        ({"norm": 1}, r"norm must be 2 or inf \(L2 or Linf\), got 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SquareAttack(**({"steps": 2} | settings))


def test_a_setting_cannot_be_changed_afterwards() -> None:
    attack = SquareAttack(1000, "inf")
    assert attack.norm == math.inf
    assert attack.access == "black box"
    assert attack.description == "Square Attack (Andriushchenko et al. 2020): 1000 queries of the loss, no gradients"
    with pytest.raises(FrozenInstanceError):
        attack.steps = 6


def test_images_without_spatial_dimensions() -> None:
    with pytest.raises(ValueError, match=r"needs images of shape \(B, C, \*spatial\), got \(2, 4\)"):
        SquareAttack(2)(lambda x: x.sum(1, keepdim=True), torch.zeros(2, 4), 1.0)


def test_both_directions_of_a_bump_are_chosen() -> None:
    problem = Problem(lambda x: x, torch.zeros(1, 1, 4, 4), 1.0, norm=2, generator=torch.Generator().manual_seed(0))
    chosen = [problem.choose(2) for _ in range(200)]
    assert set(chosen) == {0, 1}
    assert 70 < sum(chosen) < 130
