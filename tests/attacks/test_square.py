"""The Square Attack against Algorithms 1 to 3 of the paper written for one image, closed forms and torchattacks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import PGD, SquareAttack
from advmed.attacks.problem import Problem
from advmed.attacks.square import _bump
from helpers.models import Affine, Classifier
from helpers.tensors import ORDERS, lengths, seeded, uniform

RANKS = [(2, 17), (3, 11, 16), (2, 7, 9, 8)]  # (C, L), (C, H, W), (C, D, H, W)
TINY = [(1, 1), (1, 1, 1), (2, 2, 3), (1, 5, 1), (1, 1, 2, 3)]


# The schedule, the window and its bump


def sizes(attack: SquareAttack, *extents: int) -> list[tuple[int, ...]]:
    problem = Problem(lambda x: x, torch.zeros(1, 1, *extents), 1.0, norm=attack.norm)
    return [attack._size(problem, query) for query in range(attack.steps)]


@pytest.mark.parametrize(("p", "least"), [(math.inf, 1), (2, 3)])
@pytest.mark.parametrize(("steps", "share", "extents"), [(100, 0.1, (20, 40)), (10_000, 0.8, (1000, 1000))])
def test_the_area_of_the_window_is_halved_when_the_authors_halve_it(
    p: float, least: int, steps: int, share: float, extents: tuple[int, ...]
) -> None:
    """They make 10,000 queries; of any other number it is the same share."""
    found = sizes(SquareAttack(steps, p, share=share), *extents)
    for query, size in enumerate(found):
        begins = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
        halvings = sum(query * 10_000 >= begin * steps for begin in begins)
        assert size == tuple(max(least, round(n * math.sqrt(share / 2**halvings))) for n in extents)
    assert steps > 100 or (found[0], found[-1]) == ((6, 13), (least, least))


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
@pytest.mark.parametrize("shape", TINY)
def test_the_smallest_images_are_attacked_inside_their_balls(p: float, shape: Any) -> None:
    """What the contract says of all attacks, of images that no window has room in."""
    radius = torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    images, weight = uniform(5, *shape), uniform(1, *shape, seed=3) - 0.5
    objective, points = Affine(weight, torch.zeros(1, dtype=torch.float64)), list[Tensor]()
    attack = SquareAttack(30, p)
    result = attack(lambda x: points.append(x.clone()) or objective(x), images, radius, generator=seeded(0))
    for point in points:
        assert (lengths(point - images, p) <= radius * (1 + 1e-9) + 1e-12).all()
    assert torch.equal(result.terms, torch.stack([objective(point) for point in points]).amax(0))


@pytest.mark.parametrize("p", ORDERS)
def test_nears_the_maximum_of_an_affine_objective(p: float) -> None:
    """A slope that is one piece of one sign per channel; half of a bump, and stripes, begin far from it."""
    slopes = torch.ones(1, 2, 12, 12, dtype=torch.float64)
    slopes[:, 1] = -1
    objective, images = Affine(slopes, torch.zeros(1, dtype=torch.float64)), torch.zeros(3, 2, 12, 12).double()
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


def accuracy(objective: Classifier, images: Tensor) -> float:
    """In per cent."""
    return 100 * (1 - objective.terms_and_errors(images)[1].float().mean().item())


@pytest.mark.parametrize(("p", "eps"), [(2, 2.0), (math.inf, 0.2)])
def test_breaks_a_model_that_hides_its_gradients(p: float, eps: float) -> None:
    model, images, labels = shapes_of_two()
    objective = Classifier(model, labels)
    pgd = PGD(50, 5.0, p, random_start=1.0, keep="best")(objective, images, eps, generator=seeded(0))
    square = SquareAttack(150, p)(objective, images, eps, bounds=(0, 1), generator=seeded(0))
    assert accuracy(objective, images) > 90
    assert accuracy(objective, pgd.images) > 90  # rounding has no slope: PGD stays at its random start
    assert accuracy(objective, square.images) < 40


@pytest.mark.parametrize(("p", "eps"), [(2, 1.5), (math.inf, 0.2)])
def test_is_as_strong_as_torchattacks(p: float, eps: float) -> None:
    """Of as many queries, on a smooth model, mean of three seeds; theirs ends where a sample is misclassified."""
    import torchattacks

    model, images, labels = shapes_of_two()
    smooth = Classifier(nn.Sequential(nn.Flatten(), model.linear), labels)
    settings: dict[str, Any] = {"n_queries": 100, "p_init": 0.1, "loss": "ce", "resc_schedule": True}
    theirs, ours = [], []
    for seed in range(3):
        with torch.random.fork_rng():
            norm = "L2" if p == 2 else "Linf"
            reference = torchattacks.Square(smooth.model, norm=norm, eps=eps, seed=seed, **settings)
            theirs.append(accuracy(smooth, reference(images, labels)))
        found = SquareAttack(100, p)(smooth, images, eps, bounds=(0, 1), generator=seeded(seed))
        ours.append(accuracy(smooth, found.images))
    assert 20 < np.mean(theirs) < accuracy(smooth, images) - 10
    assert np.mean(ours) <= np.mean(theirs) + 10


def test_both_directions_of_a_bump_are_chosen() -> None:
    problem = Problem(lambda x: x, torch.zeros(1, 1, 4, 4), 1.0, norm=2, generator=seeded(0))
    chosen = [problem.choose(2) for _ in range(200)]
    assert set(chosen) == {0, 1}
    assert 70 < sum(chosen) < 130
