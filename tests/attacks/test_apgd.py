"""APGD against closed forms, Algorithm 1 of the paper written for one sample at a time, PGD and torchattacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advmed.attacks import APGD, PGD
from advmed.attacks.apgd import _checkpoints
from helpers.models import Affine, Classifier, trained, xrays
from helpers.tensors import ORDERS, RANKS, seeded, uniform

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
        settings: dict[str, Any] = {"steps": steps, "p": p, "low": low, "high": high, "alpha": alpha, "rho": rho}
        x, start, eps = images[i].numpy(), seen[0][0][i].numpy(), float(radius[i])
        expected = Algorithm1(lambda x, i=i: hilly(x, weight[i : i + 1]).sum(), x, start, eps, **settings)
        path = torch.stack([x[i] for x, _ in seen])
        torch.testing.assert_close(path, torch.tensor(expected.points), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            torch.stack([f[i] for _, f in seen]), torch.tensor(expected.values), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(result.images[i], torch.tensor(expected.best), rtol=0, atol=1e-5)
        assert result.terms[i].sum().item() == pytest.approx(expected.f_max, rel=1e-4, abs=1e-4)
        halvings.append(list(expected.halvings.values()))
    # Either condition alone halves a step; in 30 steps none climbs back to below its start.
    assert {(True, False), *([(False, True)] if steps == 13 else [])} <= {flag for own in halvings for flag in own}
    flags = np.array(halvings).any(2)  # sample, checkpoint
    assert flags.any() and not flags.all()
    assert (flags.any(0) & ~flags.all(0)).any()  # at one checkpoint some samples halve, and some do not


@pytest.mark.parametrize("p", ORDERS)
def test_a_start_that_nothing_comes_up_to_halves_the_first_step(p: float) -> None:
    """Losses that climb back to below the first one: condition 2 alone, at the first checkpoint and at the third."""
    losses = torch.cat((torch.tensor([9.0]), torch.linspace(1, 8, 40))).double()  # of every pass, wherever it is

    def scripted(points: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            value = x.flatten(1).sum(1, keepdim=True) * (-1) ** len(points)
            points.append(x.detach())
            return losses[len(points) - 1] + value - value.detach()

        return loss

    path: list[Tensor] = []
    APGD(40, p, random_start=0)(scripted(path), torch.zeros(1, 1, 1).double(), 1.0)
    expected = Algorithm1(scripted([]), np.zeros((1, 1)), np.zeros((1, 1)), 1.0, steps=40, p=p)
    torch.testing.assert_close(torch.cat(path), torch.tensor(expected.points), rtol=0, atol=1e-12)
    assert list(expected.halvings.values())[:3] == [(False, True), (False, False), (False, True)]


def test_checkpoints_are_those_of_the_paper() -> None:
    assert [w for w in _checkpoints(100) if w < 100] == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 3, 5, 7, 10, 20, 50, 160, 250, 1000):
        assert [w for w in _checkpoints(steps) if w < steps] == paper_checkpoints(steps)


# Closed forms


def test_l2_reaches_the_maximum_inside_bounds_that_cut_a_corner() -> None:
    """Along (3, 4) / 5 the first entry meets its bound at 0.5; what is left of the radius goes to the second."""
    slopes = torch.tensor([3.0, 4.0], dtype=torch.float64).reshape(1, 1, 2)
    objective = Affine(slopes, torch.zeros(1, dtype=torch.float64))
    bounds = (torch.tensor([-9.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    images = torch.tensor([0.0, -2.0], dtype=torch.float64).reshape(1, 1, 2)
    result = APGD(200, 2)(objective, images, 1.0, bounds=bounds, generator=seeded(0))
    best = 3 * 0.5 + 4 * (-2 + math.sqrt(1 - 0.5**2))
    assert result.terms.item() == pytest.approx(best, rel=2e-2)
    assert result.terms.item() <= best + 1e-9


# PGD and torchattacks, on a network that has learnt something


@pytest.fixture
def learnt() -> SimpleNamespace:
    """A network that knows chest X-rays, its loss, and the accuracy in per cent that an attack leaves."""
    model, (images, labels) = trained("convolutional", 0), xrays()

    def accuracy(x: Tensor) -> float:
        return 100 * (model(x).argmax(1) == labels).float().mean().item()

    assert accuracy(images) > 90
    return SimpleNamespace(
        model=model, images=images, labels=labels, objective=Classifier(model, labels), accuracy=accuracy
    )


@pytest.mark.parametrize(("p", "eps"), [(2, 0.3), (math.inf, 0.05)])
@pytest.mark.parametrize("steps", [10, 40])
def test_robust_accuracy_is_that_of_torchattacks(learnt: SimpleNamespace, p: float, eps: float, steps: int) -> None:
    import torchattacks

    with torch.random.fork_rng():
        reference = torchattacks.APGD(learnt.model, norm="L2" if p == 2 else "Linf", eps=eps, steps=steps, loss="ce")
        expected = learnt.accuracy(reference(learnt.images, learnt.labels))
    attack = APGD(steps, p)
    ours = learnt.accuracy(attack(learnt.objective, learnt.images, eps, bounds=(0, 1), generator=seeded(0)).images)
    assert 10 < expected < 80  # it is worth comparing
    assert abs(ours - expected) <= 0.5


@pytest.mark.parametrize(("p", "eps", "steps"), [(2, 0.3, 50), (math.inf, 0.05, 20)])
def test_reaches_the_loss_of_pgd_with_as_many_gradients(
    learnt: SimpleNamespace, p: float, eps: float, steps: int
) -> None:
    given = learnt.objective, learnt.images, eps
    ours = APGD(steps, p)(*given, bounds=(0, 1), generator=seeded(0))
    for scale in (2.5, 5.0):
        pgd = PGD(steps, scale, p, random_start=1.0, keep="best")
        theirs = pgd(*given, bounds=(0, 1), generator=seeded(0))
        assert ours.terms.mean() >= theirs.terms.mean() * 0.995
        assert learnt.accuracy(ours.images) <= learnt.accuracy(theirs.images) + 0.5
