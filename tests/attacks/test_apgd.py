"""APGD against closed forms, Algorithm 1 of the paper written for one sample at a time, PGD and torchattacks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmed.attacks import APGD, PGD, AttackResult
from advmed.attacks.apgd import _checkpoints

RANKS = [(2, 7), (3, 4, 6), (2, 5, 4, 3)]  # (C, L), (C, H, W), (C, D, H, W)
TINY = [(1, 1), (1, 1, 1), (2, 2, 3), (1, 5, 1)]
ORDERS = [2, math.inf]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=dtype)


def classify(tiny: SimpleNamespace, batch: int, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A classifier, in evaluation mode, of (batch, 3, 8, 8) images."""
    model = tiny.cnn(**settings).to(dtype).eval()
    return tiny.Classifier(model, torch.arange(batch) % 4)


def lengths(noise: Tensor, p: float) -> Tensor:
    flat = noise.flatten(1)
    return flat.norm(dim=1) if p == 2 else flat.abs().amax(1)


# Algorithm 1, one sample after the other


def paper_checkpoints(steps: int) -> list[int]:
    """w_j = ceil(p_j N) below N, p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), exactly."""
    p = [0, 22]
    while p[-1] < 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    return sorted({(hundredths * steps + 99) // 100 for hundredths in p if hundredths * steps <= 100 * (steps - 1)})


class Algorithm1:
    """APGD on one sample, in numpy: keeps every point, every loss, and which condition halved the step when."""

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor],
        x: np.ndarray,
        start: np.ndarray,
        eps: float,
        *,
        steps: int,
        p: float,
        low: float = -math.inf,
        high: float = math.inf,
        alpha: float = 0.75,
        rho: float = 0.75,
    ) -> None:
        self.loss, self.x, self.eps, self.p = loss, x, eps, p
        self.low, self.high = np.minimum(x, low), np.maximum(x, high)
        self.halvings: dict[int, tuple[bool, bool]] = {}
        checkpoints = paper_checkpoints(steps)
        eta, points, values = 2 * eps, [start], []
        f, g = self.evaluate(start)
        values.append(f)
        current, current_value, last = start, f, start
        best, f_max, best_gradient = start, f, g
        ascents: list[bool] = []
        etas, maxima = {0: eta}, {0: f}
        for k in range(steps):
            if k in checkpoints[1:]:
                w = checkpoints[checkpoints.index(k) - 1]
                first = sum(ascents[w:k]) < rho * (k - w)
                second = etas[w] == eta and maxima[w] == f_max
                etas[k], maxima[k] = eta, f_max  # of iteration k, before it halves: condition 2 looks one interval back
                if first or second:
                    eta = eta / 2
                    current, current_value, g = best, f_max, best_gradient
                self.halvings[k] = (first, second)
            direction = np.sign(g) if p == math.inf else g / max(np.linalg.norm(g.ravel()), 1e-300)
            z = self.project(current + eta * direction)
            share = alpha if k else 1.0
            following = self.project(current + share * (z - current) + (1 - share) * (current - last))
            f, g = self.evaluate(following)
            ascents.append(f > current_value)
            last, current, current_value = current, following, f
            points.append(following)
            values.append(f)
            if f > f_max:
                best, f_max, best_gradient = following, f, g
        self.points, self.values, self.best, self.f_max = np.stack(points), np.array(values), best, f_max

    def evaluate(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(point)[None].requires_grad_()
        value = self.loss(leaf)
        value.sum().backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad[0].numpy()

    def project(self, z: np.ndarray) -> np.ndarray:
        d = z - self.x
        if self.p == math.inf:
            d = np.clip(d, -self.eps, self.eps)
        else:
            d = d * min(1, self.eps / max(np.linalg.norm(d.ravel()), 1e-300))
        return np.clip(self.x + d, self.low, self.high)


def hilly(x: Tensor, weight: Tensor) -> Tensor:
    """Two terms with many maxima: steps overshoot, so that lengths are halved, not for all samples at a time."""
    flat, w = x.flatten(1), weight.flatten(1)
    return torch.stack(((flat * w * 9).sin().sum(1), (3 * (flat * w).sum(1)).cos() * 2 - (flat**2).sum(1) * 0.3), 1)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0.1, 0.9)])
@pytest.mark.parametrize("shape", RANKS)
@pytest.mark.parametrize(("steps", "alpha", "rho"), [(30, 0.75, 0.75), (13, 0.5, 0.4)])
def test_the_whole_path_is_that_of_algorithm_1(
    p: float, bounds: tuple[float, float] | None, shape: tuple[int, ...], steps: int, alpha: float, rho: float
) -> None:
    """Per-sample radii, images outside their bounds, two terms, any rank, a random start."""
    images, weight = uniform(6, *shape), uniform(6, *shape, seed=3) - 0.5
    radius = torch.tensor([0.1, 0.4, 0.9, 1.5, 2.0, 5.0], dtype=torch.float64) * (1 if p == 2 else 0.2)
    seen: list[tuple[Tensor, Tensor]] = []

    def terms(x: Tensor) -> Tensor:
        found = hilly(x, weight)
        seen.append((x.detach(), found.detach().sum(1)))
        return found

    result = APGD(steps, p, momentum=alpha, rho=rho)(terms, images, radius, bounds=bounds, generator=seeded(0))
    low, high = bounds or (-math.inf, math.inf)
    halvings: list[list[tuple[bool, bool]]] = []
    for i in range(6):
        expected = Algorithm1(
            lambda x, i=i: hilly(x, weight[i : i + 1]).sum(),
            images[i].numpy(),
            seen[0][0][i].numpy(),
            float(radius[i]),
            steps=steps,
            p=p,
            low=low,
            high=high,
            alpha=alpha,
            rho=rho,
        )
        path = torch.stack([x[i] for x, _ in seen])
        torch.testing.assert_close(path, torch.tensor(expected.points), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            torch.stack([f[i] for _, f in seen]), torch.tensor(expected.values), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(result.images[i], torch.tensor(expected.best), rtol=0, atol=1e-5)
        assert result.terms[i].sum().item() == pytest.approx(expected.f_max, rel=1e-4, abs=1e-4)
        halvings.append(list(expected.halvings.values()))
    flags = np.array(halvings).any(2)  # sample, checkpoint
    assert flags.any() and not flags.all()
    assert (flags.any(0) & ~flags.all(0)).any()  # at one checkpoint some samples halve, and some do not


@pytest.mark.parametrize("p", ORDERS)
def test_both_conditions_alone_halve_a_step(p: float) -> None:
    """Sample 0 overshoots (condition 1); 1 climbs back to below its start (condition 2 alone); 2 keeps its step."""
    steps = 40  # checkpoints 9, 17, ...

    images = torch.zeros(3, 1, 1, dtype=torch.float64)
    passes = itertools.count()
    # Losses by pass, whatever the point: what a sample does then depends only on these and on its gradient.
    falls = torch.linspace(5, 1, steps + 1, dtype=torch.float64)
    returns = torch.cat((torch.tensor([9.0]), torch.linspace(1, 8, steps))).double()
    rises = torch.linspace(1, 5, steps + 1, dtype=torch.float64)
    script = torch.stack((falls, returns, rises), 1)
    seen: list[Tensor] = []

    def terms(x: Tensor) -> Tensor:
        k = next(passes)
        seen.append(x.detach().flatten())
        slope = 1.0 if k % 2 == 0 else -1.0
        value = x.flatten(1).sum(1) * slope
        return (script[k] + value - value.detach())[:, None]

    result = APGD(steps, p, random_start=0)(terms, images, 1.0)
    path = torch.stack(seen)
    passes = itertools.count()
    for i in range(3):
        counter = itertools.count()

        def loss(x: Tensor, i: int = i, counter: Any = counter) -> Tensor:
            k = next(counter)
            value = x.sum() * (1.0 if k % 2 == 0 else -1.0)
            return script[k, i] + value - value.detach()

        expected = Algorithm1(loss, np.zeros((1, 1)), np.zeros((1, 1)), 1.0, steps=steps, p=p)
        torch.testing.assert_close(path[:, i], torch.tensor(expected.points).flatten(), rtol=0, atol=1e-12)
        flags = list(expected.halvings.values())
        # At the third checkpoint the last step length was a new one, and condition 2 is silent.
        assert flags[0] == [(True, True), (False, True), (False, False)][i]
        assert flags[1] == [(True, False), (False, False), (False, False)][i]
        assert i != 1 or flags[2] == (False, True)
    # Sample 2 alone still steps from one side to the other at the end.
    assert (path[-1] - path[-2])[2].abs() > 0.8
    assert (path[-1] - path[-2])[:2].abs().max() < 0.6
    assert result.terms.flatten().tolist() == [5, 9, 5]


def test_checkpoints_of_a_hundred_steps_are_those_of_the_paper() -> None:
    assert [w for w in _checkpoints(100) if w < 100] == [0, 22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10, 20, 50, 160, 250, 1000])
def test_checkpoints_of_other_numbers_of_steps(steps: int) -> None:
    assert [w for w in _checkpoints(steps) if w < steps] == paper_checkpoints(steps)


# Closed forms


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("shape", RANKS + TINY)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_reaches_the_maximum_of_an_affine_objective(
    tiny: SimpleNamespace, batch: int, shape: tuple[int, ...], p: float, start: float
) -> None:
    slopes, offsets = uniform(3, *shape, seed=1) - 0.5, uniform(3, seed=2)
    objective, images = tiny.Affine(slopes, offsets), uniform(batch, *shape)
    radius = torch.linspace(0.2, 3, batch, dtype=torch.float64)
    slope = slopes.sum(0)
    dual = slope.norm(2) if p == 2 else slope.abs().sum()
    best = (images * slope).flatten(1).sum(1) + offsets.sum() + radius * dual
    result = APGD(60, p, random_start=start)(objective, images, radius, generator=seeded(0))
    torch.testing.assert_close(result.terms.sum(1), best, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.norms, radius, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.terms, objective(result.images), rtol=0, atol=0)


@pytest.mark.parametrize("shape", RANKS + TINY)
def test_linf_reaches_the_maximum_inside_bounds(tiny: SimpleNamespace, shape: tuple[int, ...]) -> None:
    slopes, images = uniform(1, *shape, seed=1) - 0.5, uniform(4, *shape)
    objective = tiny.Affine(slopes, torch.zeros(1, dtype=torch.float64))
    result = APGD(20, math.inf)(objective, images, 0.3, bounds=(0, 1))
    torch.testing.assert_close(result.images, (images + 0.3 * slopes[0].sign()).clamp(0, 1), rtol=0, atol=1e-12)


def test_l2_reaches_the_maximum_inside_bounds_that_cut_a_corner(tiny: SimpleNamespace) -> None:
    """Along (3, 4) / 5 the first entry meets its bound at 0.5; what is left of the radius goes to the second."""
    slopes = torch.tensor([3.0, 4.0], dtype=torch.float64).reshape(1, 1, 2)
    objective = tiny.Affine(slopes, torch.zeros(1, dtype=torch.float64))
    bounds = (torch.tensor([-9.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    images = torch.tensor([0.0, -2.0], dtype=torch.float64).reshape(1, 1, 2)
    result = APGD(200, 2)(objective, images, 1.0, bounds=bounds, generator=seeded(0))
    best = 3 * 0.5 + 4 * (-2 + math.sqrt(1 - 0.5**2))
    assert result.terms.item() == pytest.approx(best, rel=2e-2)
    assert result.terms.item() <= best + 1e-9


# PGD and torchattacks, on a network that has learnt something


@pytest.fixture(scope="module")
def trained() -> SimpleNamespace:
    """400 noisy images of four patterns and a small network that tells them apart."""
    torch.set_num_threads(1)
    generator = seeded(0)
    patterns = torch.rand(4, 1, 10, 10, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(4, (count,), generator=generator)
        noise = torch.randn(count, 1, 10, 10, generator=generator)
        return (0.5 + 0.35 * (patterns[labels] - 0.5) + 0.15 * noise).clamp(0, 1), labels

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 4)),
        )
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(150):
            images, labels = draw(64)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    images, labels = draw(400)
    model.eval()

    def objective(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels, reduction="none")[:, None]

    def accuracy(x: Tensor) -> float:
        with torch.no_grad():
            return 100 * (model(x).argmax(1) == labels).float().mean().item()

    objective.model = model
    assert accuracy(images) > 90
    return SimpleNamespace(model=model, images=images, labels=labels, objective=objective, accuracy=accuracy)


@pytest.mark.parametrize(("p", "eps"), [(2, 0.6), (math.inf, 0.08)])
@pytest.mark.parametrize("steps", [10, 40])
def test_robust_accuracy_is_that_of_torchattacks(trained: SimpleNamespace, p: float, eps: float, steps: int) -> None:
    import torchattacks

    with torch.random.fork_rng():
        reference = torchattacks.APGD(trained.model, norm="L2" if p == 2 else "Linf", eps=eps, steps=steps, loss="ce")
        expected = trained.accuracy(reference(trained.images, trained.labels))
    attack = APGD(steps, p)
    ours = trained.accuracy(attack(trained.objective, trained.images, eps, bounds=(0, 1), generator=seeded(0)).images)
    assert 10 < expected < 80  # it is worth comparing
    assert abs(ours - expected) <= 0.5


@pytest.mark.parametrize(
    ("p", "eps", "steps"), [(2, 0.6, 50), (math.inf, 0.08, 50), (2, 2.0, 20), (math.inf, 0.25, 20)]
)
def test_reaches_the_loss_of_pgd_with_as_many_gradients(
    trained: SimpleNamespace, p: float, eps: float, steps: int
) -> None:
    settings: dict[str, Any] = {"bounds": (0, 1)}
    ours = APGD(steps, p)(trained.objective, trained.images, eps, generator=seeded(0), **settings)
    for scale in (2.5, 5.0):
        pgd = PGD(steps, scale, p, random_start=1.0, keep="best")
        theirs = pgd(trained.objective, trained.images, eps, generator=seeded(0), **settings)
        assert ours.terms.mean() >= theirs.terms.mean() * 0.995
        assert trained.accuracy(ours.images) <= trained.accuracy(theirs.images) + 0.5


# Samples are alone


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0, 1), "sample"])
def test_a_batch_equals_batches_of_one(tiny: SimpleNamespace, p: float, bounds: Any) -> None:
    images, labels = uniform(5, 3, 8, 8), torch.tensor([0, 3, 1, 2, 2])
    radius = torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64) * (1 if p == 2 else 0.1)
    model = tiny.cnn().double().eval()
    attack = APGD(12, p, random_start=0)
    whole = attack(tiny.Classifier(model, labels), images, radius, bounds=bounds)
    for i in range(5):
        one = attack(tiny.Classifier(model, labels[i : i + 1]), images[i : i + 1], radius[i : i + 1], bounds=bounds)
        number = attack(tiny.Classifier(model, labels[i : i + 1]), images[i : i + 1], float(radius[i]), bounds=bounds)
        for name in ("images", "terms", "norms", "nonfinite"):
            torch.testing.assert_close(getattr(whole, name)[i], getattr(one, name)[0], rtol=1e-6, atol=1e-6)
            assert torch.equal(getattr(one, name), getattr(number, name))


@pytest.mark.parametrize("p", ORDERS)
def test_channels_last_equals_contiguous(tiny: SimpleNamespace, p: float) -> None:
    objective, images = classify(tiny, 4), uniform(4, 3, 8, 8)
    radius = 1.0 if p == 2 else 0.1
    first = APGD(9, p)(objective, images, radius, bounds=(0, 1), generator=seeded(1))
    last = images.contiguous(memory_format=torch.channels_last)
    second = APGD(9, p)(objective, last, radius, bounds=(0, 1), generator=seeded(1))
    torch.testing.assert_close(second.images, first.images, rtol=0, atol=1e-9)
    assert second.images.is_contiguous(memory_format=torch.channels_last)


# Radii and bounds


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0.3, 0.6), "sample"])
@pytest.mark.parametrize("restarts", [1, 2])
def test_radius_zero_returns_the_bits_of_the_image(tiny: SimpleNamespace, p: float, bounds: Any, restarts: int) -> None:
    images = uniform(3, 3, 8, 8, dtype=torch.float32)
    images[:, 0, 0, 0] = -0.0
    images[:, 0, 0, 1] = 1e-42
    objective, radius = classify(tiny, 3, torch.float32), torch.tensor([0.0, 0.5, 0.0])
    result = APGD(6, p, restarts=restarts)(objective, images, radius, bounds=bounds)
    same = (result.images.view(torch.int32) == images.view(torch.int32)).flatten(1).all(1)
    assert same.tolist() == [True, False, True]
    assert (result.norms == 0).tolist() == [True, False, True]


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0.2, 0.8)])
def test_the_noise_never_leaves_its_ball_nor_the_bounds(tiny: SimpleNamespace, p: float, bounds: Any) -> None:
    """Values of images that are outside the bounds themselves may stay, and move inwards only."""
    objective, images = classify(tiny, 16, torch.float32), uniform(16, 3, 8, 8, dtype=torch.float32)
    radius = torch.logspace(-3, 1, 16)
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return objective(x)

    result = APGD(25, p)(watched, images, radius, bounds=bounds, generator=seeded(0))
    assert len(seen) == 26
    for iterate in [*seen, result.images]:
        noise = lengths(iterate.double() - images.double(), p)
        # Adding noise to an image rounds: half a unit in the last place of values below 16.
        assert (noise <= radius.double() * (1 + 1e-5) + 2.0**-21 * (math.sqrt(192) if p == 2 else 1)).all()
        if bounds is not None:
            assert (iterate >= images.clamp(max=0.2)).all()
            assert (iterate <= images.clamp(min=0.8)).all()
    torch.testing.assert_close(result.norms, lengths(result.images - images, p), rtol=1e-6, atol=0)


# What can go wrong


@pytest.mark.parametrize("p", ORDERS)
def test_a_zero_gradient_moves_nothing_and_harms_no_neighbour(p: float) -> None:
    images = uniform(3, 2, 4)
    slopes = (uniform(3, 2, 4, seed=1) - 0.5) * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    result = APGD(30, p, random_start=0)(lambda x: (x * slopes).flatten(1).sum(1, keepdim=True), images, 0.7)
    assert torch.equal(result.images[1], images[1])
    assert result.nonfinite.tolist() == [0, 0, 0]
    torch.testing.assert_close(result.norms, torch.tensor([0.7, 0, 0.7], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_where_loss_and_gradient_are_not_finite_the_best_finite_point_is_kept(p: float, bad: float) -> None:
    """Sample 1 is broken at a length beyond 0.5; what it returns is the best of the points below that it has seen."""
    images, slopes = uniform(3, 2, 5), uniform(3, 2, 5, seed=1) - 0.5
    seen: list[tuple[Tensor, Tensor]] = []

    def terms(x: Tensor, broken: bool) -> Tensor:
        values = (x * slopes).flatten(1).sum(1)
        beyond = (lengths((x - images).detach(), p) > 0.5) & (torch.arange(3) == 1)
        values = values * torch.where(beyond & broken, bad, 1.0)
        seen.append((x.detach(), values.detach()))
        return values[:, None]

    attack = APGD(30, p, random_start=0)
    healthy = attack(lambda x: terms(x, False), images, 1.0)
    seen.clear()
    result = attack(lambda x: terms(x, True), images, 1.0)
    assert torch.equal(result.images[[0, 2]], healthy.images[[0, 2]])
    losses = torch.stack([f[1] for _, f in seen])
    finite = losses.isfinite()
    assert result.nonfinite.tolist() == [0, int((~finite[:-1]).sum()), 0]
    assert 0 < result.nonfinite[1] < 30
    winner = int(losses.where(finite, -math.inf).argmax())
    assert torch.equal(result.images[1], seen[winner][0][1])
    assert result.terms[1].item() == losses[winner].item()
    assert result.norms[1] <= 0.5


def test_a_gradient_alone_that_is_not_finite_is_counted_and_the_sample_goes_on() -> None:
    """A root has no finite derivative at 0, where sample 0 begins: it stays."""
    images = torch.tensor([[[0.0, 0.0]], [[0.3, 0.2]]])
    result = APGD(8, 2, random_start=0)(lambda x: x.flatten(1).norm(dim=1, keepdim=True).sqrt(), images, 1.0)
    assert result.nonfinite.tolist() == [8, 0]
    assert torch.equal(result.images[0], images[0])
    assert result.images.isfinite().all()
    assert result.norms[1].item() == pytest.approx(1)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0, 1), "sample"])
def test_nan_in_one_image_leaves_the_others_alone(tiny: SimpleNamespace, p: float, bounds: Any) -> None:
    images = uniform(3, 3, 8, 8)
    objective, attack = classify(tiny, 3), APGD(9, p, random_start=0)
    broken = images.clone()
    broken[1, 2, 3, 4] = math.nan
    healthy = attack(objective, images, 0.3, bounds=bounds)
    result = attack(objective, broken, 0.3, bounds=bounds)
    torch.testing.assert_close(result.images[[0, 2]], healthy.images[[0, 2]], rtol=0, atol=1e-12)
    assert result.nonfinite.tolist() == [0, 9, 0]
    kept = ~broken[1].isnan()
    assert torch.equal(result.images[1][kept], broken[1][kept])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("p", ORDERS)
def test_tiny_and_huge_gradients_still_give_the_direction(tiny: SimpleNamespace, scale: float, p: float) -> None:
    slopes, images = (uniform(1, 2, 5) - 0.5).float(), uniform(3, 2, 5, dtype=torch.float32)
    direction = slopes[0] / slopes[0].norm() if p == 2 else slopes[0].sign()
    result = APGD(40, p)(tiny.Affine(slopes * scale, torch.zeros(1)), images, 1.0, generator=seeded(0))
    torch.testing.assert_close(result.images, images + direction, rtol=0, atol=2e-3)


# Restarts


@pytest.mark.parametrize("p", ORDERS)
def test_restarts_keep_the_worst_run_of_each_sample(tiny: SimpleNamespace, p: float) -> None:
    objective, images = classify(tiny, 6), uniform(6, 3, 8, 8)
    radius, generator = 6.0 if p == 2 else 0.4, seeded(5)

    def wavy(x: Tensor) -> Tensor:
        return (objective(x) * 6).sin()

    runs: list[AttackResult] = [APGD(3, p)(wavy, images, radius, generator=generator) for _ in range(4)]
    together = APGD(3, p, restarts=4)(wavy, images, radius, generator=seeded(5))
    winner = torch.stack([run.terms.sum(1) for run in runs]).argmax(0).tolist()
    assert len(set(winner)) > 1
    for name in ("images", "terms", "norms"):
        expected = torch.stack([getattr(runs[w], name)[i] for i, w in enumerate(winner)])
        assert torch.equal(getattr(together, name), expected), name
    assert together.nonfinite.tolist() == [0] * 6


def test_restarts_begin_at_the_image_and_then_at_random() -> None:
    starts: list[Tensor] = []

    def terms(x: Tensor) -> Tensor:
        starts.append(x.detach())
        return x.flatten(1).sum(1, keepdim=True)

    APGD(1, 2, random_start=0, restarts=3)(terms, torch.zeros(1, 1, 4), 1.0)
    first, second, third = starts[0], starts[2], starts[4]
    assert first.count_nonzero() == 0
    assert second.count_nonzero() == third.count_nonzero() == 4
    assert not torch.equal(second, third)


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_the_start_is_in_the_ball_of_the_fraction(fraction: float) -> None:
    starts: list[Tensor] = []

    def terms(x: Tensor) -> Tensor:
        starts.append(x.detach())
        return x.flatten(1).sum(1, keepdim=True)

    APGD(1, 2, random_start=fraction)(terms, torch.zeros(8, 1, 20), 2.0, generator=seeded(0))
    norms = starts[0].flatten(1).norm(dim=1)
    assert norms.max() <= 2 * fraction * (1 + 1e-6)
    assert norms.mean() > 2 * fraction * 0.8  # most of a ball of 20 dimensions is near its surface


# Cost, and what an attack leaves behind


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("restarts", [1, 3])
def test_number_of_passes_is_what_the_properties_say(steps: int, restarts: int) -> None:
    forward, backward = [], []

    def terms(x: Tensor) -> Tensor:
        forward.append(x.requires_grad)
        if x.requires_grad:
            x.register_hook(lambda gradient: backward.append(1))
        return x.square().flatten(1).sum(1, keepdim=True)

    attack = APGD(steps, restarts=restarts)
    attack(terms, uniform(2, 1, 4), 0.5)
    assert sum(forward) == len(backward) == attack.gradients == steps * restarts
    assert len(forward) - sum(forward) == attack.queries == restarts


def test_no_trace_is_left_in_the_model_or_the_images(tiny: SimpleNamespace) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), tiny.cnn(dropout=0.5)).train()
    model[0].weight.requires_grad_(False)
    objective = tiny.Classifier(model, torch.arange(4))
    images = uniform(4, 3, 8, 8, dtype=torch.float32)
    before, version = images.clone(), images._version
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    asked: list[bool] = []
    model[1][0].register_forward_hook(lambda m, i, o: asked.append(m.weight.requires_grad))
    result = APGD(5, restarts=2)(objective, images, 1.0, bounds=(0, 1))
    assert asked == [False] * 12
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
    assert not any(t.requires_grad for t in (result.images, result.terms, result.norms))


def test_the_generator_repeats_a_run(tiny: SimpleNamespace) -> None:
    objective, images, attack = classify(tiny, 2), uniform(2, 3, 8, 8), APGD(4, restarts=2)
    first, again, other = (attack(objective, images, 1.0, generator=seeded(s)) for s in (1, 1, 2))
    for name in ("images", "terms", "norms"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.images, other.images)
    free = [attack(objective, images, 1.0).images for _ in range(2)]
    assert not torch.equal(*free)


# Modes of torch


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("random_start", [0.0, 1.0])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_where_gradients_are_off(tiny: SimpleNamespace, mode: Any, random_start: float, p: float) -> None:
    objective, images = classify(tiny, 3), uniform(3, 3, 8, 8)
    radius = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    attack = APGD(9, p, random_start=random_start)
    expected = attack(objective, images, radius, bounds=(0, 1), generator=seeded(0))
    with mode():
        inside = images.clone(), radius.clone()
        results = [attack(objective, x, r, bounds=(0, 1), generator=seeded(0)) for x, r in ((images, radius), inside)]
        assert not torch.is_grad_enabled()
    for result in (*results, attack(objective, *inside, bounds=(0, 1), generator=seeded(0))):
        assert torch.equal(result.images, expected.images)
        assert torch.equal(result.terms, expected.terms)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", [True, False])
def test_runs_under_autocast(tiny: SimpleNamespace, kind: torch.dtype, gradients: bool) -> None:
    objective, images = classify(tiny, 4, torch.float32), uniform(4, 3, 8, 8, dtype=torch.float32)
    attack = APGD(10, 2, random_start=0)
    exact = attack(objective, images, 1.0)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", kind):
        objective(images)  # as a host would; fills autocast's cache of cast weights
        result = attack(objective, images, 1.0)
    assert result.images.dtype == torch.float32
    assert result.nonfinite.sum() == 0
    cosine = torch.cosine_similarity((result.images - images).flatten(1), (exact.images - images).flatten(1))
    assert cosine.min() > 0.98
    assert (result.norms <= 1 + 1e-5).all()
    assert (result.norms > 0.98).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", ORDERS)
def test_half_precision_images_and_terms(kind: torch.dtype, p: float) -> None:
    images = uniform(3, 2, 6, 6, dtype=torch.float32).to(kind)
    slopes = (uniform(2, 6, 6, seed=1, dtype=torch.float32) - 0.5).to(kind)
    seen: set[torch.dtype] = set()

    def terms(x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return torch.stack(((x * slopes).flatten(1).sum(1), (x * slopes).flatten(1).sum(1) / 2), 1)

    radius = torch.tensor([0.0, 0.25, 0.5])
    result = APGD(10, p, random_start=0)(terms, images, radius)
    assert seen == {kind}
    assert result.images.dtype == kind
    assert result.nonfinite.sum() == 0
    assert torch.equal(result.images[0], images[0])
    torch.testing.assert_close(result.norms, radius, rtol=1e-5, atol=0)
    direction = slopes.float() / slopes.float().norm() if p == 2 else slopes.float().sign()
    expected = images.float() + radius.reshape(3, 1, 1, 1) * direction
    torch.testing.assert_close(result.images.float(), expected, rtol=0, atol=2e-3 if kind == torch.float16 else 1e-2)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"steps must be a whole number >= 1, got 0"),
        ({"steps": 2.0}, r"steps must be a whole number >= 1, got 2.0"),
        ({"steps": True}, r"steps must be a whole number >= 1, got True"),
        ({"restarts": 0}, r"restarts must be a whole number >= 1, got 0"),
        ({"random_start": 1.5}, r"random_start must be a fraction of the radius in \[0, 1\], got 1.5"),
        ({"random_start": math.nan}, r"random_start must be a fraction of the radius in \[0, 1\], got nan"),
        ({"momentum": 0}, r"momentum must be above 0, or nothing moves"),
        ({"momentum": 1.1}, r"momentum must be a fraction in \[0, 1\], got 1.1"),
        ({"rho": -0.1}, r"rho must be a fraction in \[0, 1\], got -0.1"),
        ({"norm": 1}, r"norm must be 2 or inf \(L2 or Linf\), got 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APGD(**({"steps": 2} | settings))


def test_a_setting_cannot_be_changed_afterwards() -> None:
    attack = APGD(5, "inf", random_start=True)
    assert (attack.norm, attack.random_start) == (math.inf, 1.0)
    assert attack.access == "white box"
    with pytest.raises(FrozenInstanceError):
        attack.steps = 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": (1, 0)}, r"bounds must be \(lowest, highest\) with lowest < highest, got \(1, 0\)"),
        ({"bounds": "image"}, r"bounds must be None, 'sample' or a pair \(lowest, highest\), got 'image'"),
        ({"radius": torch.ones(3)}, r"must be a number or have shape \(2,\), got \(3,\)"),
    ],
)
def test_what_does_not_fit_a_batch(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APGD(2)(lambda x: x.flatten(1).sum(1, keepdim=True), torch.zeros(2, 1, 4), **({"radius": 1.0} | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "100 steps of adaptive length from a random point of the ball; largest loss"),
        ({"random_start": 0}, "from the input; largest loss"),
        ({"restarts": 3}, "largest loss, the worst of 3 runs"),
    ],
)
def test_description(settings: dict[str, Any], words: str) -> None:
    assert APGD(100, **settings).description.endswith(words)
