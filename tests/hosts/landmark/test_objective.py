"""Loss terms and distance against loops in float64, landmarks that are not there, and the methods of the core."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

from adv_landmark.objective import LandmarkObjective
from advmed.attacks import APGD, Appearing, Elsewhere, ExpectedError, Terms
from advmed.methods import AMAT
from advmed.objective import PredictingObjective
from helpers.landmark import plain_terms

SIZE, RADIUS = (9, 11), 2.5
NAN = (math.nan, math.nan)
POINTS = torch.tensor(
    [
        [(3.2, 4.7), (8.0, 2.0), (0.0, 8.3)],
        [NAN, (5.5, 5.5), (10.4, -0.4)],
        [NAN, NAN, (40.0, 3.0)],
        [(2.0, 2.0), NAN, (7.7, 6.1)],
    ],
    dtype=torch.float64,
)
KNOWN = ~POINTS.isnan().any(-1) & (POINTS[..., 0] < 20)
KINDS = ["dice", "bce"]


class Given(nn.Module):
    """The images are the maps; counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return images * 1.0


def random_maps(seed: int = 0, batch: int = len(POINTS), dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 9, *SIZE, generator=generator, dtype=torch.float64) * 2).to(dtype)


def objective_of(points: Tensor = POINTS, **options: Any) -> LandmarkObjective:
    return LandmarkObjective(Given(), points, SIZE, radius=RADIUS, **options)


# The terms


def slow_terms(maps: Tensor, kind: str, weight: float = 1.0) -> np.ndarray:
    """(B, 3), landmark by landmark; 0 for the image without any."""
    points = torch.where(KNOWN[..., None], POINTS, math.nan).numpy()
    each = [
        plain_terms(m, p, kind, weight, RADIUS).tolist()
        for m, p in zip(maps, points, strict=True)
        if not np.isnan(p).all()
    ]
    return np.insert(np.array(each), 2, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1.0, 0.5, 3.0])
def test_terms_and_training_loss_are_those_of_every_landmark(kind: Any, weight: float) -> None:
    """Of one pass each; the mean over the images is the loss, and methods need no other."""
    objective, maps = objective_of(heatmap=kind, heatmap_weight=weight), random_maps()
    assert isinstance(objective, PredictingObjective)
    assert not hasattr(objective, "loss")
    assert objective.names == ("heatmap", "offset_y", "offset_x")
    wanted = slow_terms(maps, kind, weight)
    assert (wanted[[0, 1, 3]] > 0.1).all()
    loss, last, predictions = objective.loss_and_predictions(maps)
    for terms in (objective(maps), last):
        assert terms.shape == (4, 3)
        np.testing.assert_allclose(terms.numpy(), wanted, rtol=1e-10, atol=1e-14)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(wanted.sum() / 4, rel=1e-10)  # the one without landmarks counts as 0
    assert torch.equal(predictions, maps)
    assert torch.equal(objective.predictions(maps), maps)
    assert objective.model.passes == 3
    if (kind, weight) == ("dice", 1.0):  # what is taken if nothing else is said
        assert torch.equal(objective_of()(maps), last)


# Landmarks that are not there


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 300.0, -300.0])
def test_an_image_without_landmarks_has_no_loss_and_no_gradient(kind: Any, value: float) -> None:
    maps = (random_maps() + value).requires_grad_()
    terms = objective_of(heatmap=kind)(maps)
    assert torch.equal(terms[2], torch.zeros(3, dtype=torch.float64))
    assert terms[[0, 1, 3]].isfinite().all()
    gradient = torch.autograd.grad(terms.sum(), maps)[0]
    assert gradient.isfinite().all()
    assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))
    assert gradient[[0, 1, 3]].abs().sum((1, 2, 3)).min() > 0


# Gradients


def test_points_may_be_made_in_inference_mode() -> None:
    """As a loader makes them inside of the block."""
    maps = random_maps().requires_grad_()
    expected = torch.autograd.grad(objective_of()(maps).sum(), maps)
    with torch.inference_mode():
        made = objective_of(POINTS * 1)
    torch.testing.assert_close(torch.autograd.grad(made(maps).sum(), maps), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_terms_is_that_of_finite_differences(kind: Any) -> None:
    points = torch.tensor([[(2.3, 1.7), NAN], [(0.2, 3.1), (3.0, 0.6)]], dtype=torch.float64)
    objective = LandmarkObjective(nn.Identity(), points, (5, 4), radius=1.6, heatmap=kind)
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(objective, maps)


def test_offsets_that_differ_do_not_drive_the_heat_down() -> None:
    """To have no heat would be the easy way to agree; where heat weighs offsets, it is a constant."""
    maps = random_maps()
    other = maps.clone()
    other[:, 3:] += 1 + random_maps(1)[:, 3:].abs()  # not the same everywhere
    sides = [side.clone().requires_grad_() for side in (maps, other)]
    distance = objective_of().distance(*sides)
    assert (distance > 2).all()
    heat = maps[:, :3].sigmoid()
    weight = (heat / heat.sum((2, 3), keepdim=True) / 3).repeat(1, 2, 1, 1)
    for gradient, sign in zip(torch.autograd.grad(distance.sum(), sides), (-1, 1), strict=True):
        torch.testing.assert_close(gradient[:, :3], torch.zeros_like(gradient[:, :3]), rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient[:, 3:], sign * weight)
    hot, cold = (random_maps(seed).requires_grad_() for seed in (3, 4))
    for gradient in torch.autograd.grad(objective_of().distance(hot, cold).sum(), (hot, cold)):
        assert gradient[:, :3].abs().min() > 0


# The distance


@pytest.mark.parametrize("shift", [0.0, -9.0])
def test_the_distance_is_divergence_and_difference_in_units_of_the_clean_heat(shift: float) -> None:
    """With a heat of less than a pixel, too."""
    objective = objective_of()
    for seed in range(3):
        clean, other = random_maps(seed), random_maps(seed + 10)
        clean[:, :3] += shift
        other[:, :3] += shift / 2
        found = objective.distance(clean, other)
        assert found.shape == (4,)
        assert (found > 0).all()
        heat = clean[:, :3].sigmoid()
        divergence = kl_divergence(*(Bernoulli(logits=maps[:, :3]) for maps in (clean, other)))
        moved = (clean - other)[:, 3:].abs().unflatten(1, (2, 3)).sum(1) * heat
        wanted = (divergence + moved).sum((2, 3)) / heat.sum((2, 3)).clamp_min(1)
        torch.testing.assert_close(found, wanted.mean(1), rtol=1e-9, atol=0)
        assert (objective.distance(other, clean) - found).abs().min() > 1e-3  # not symmetric
        assert torch.equal(objective_of(POINTS.flip(0)).distance(clean, other), found)  # wherever the landmarks are


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_maps_have_no_distance_and_no_gradient(dtype: torch.dtype) -> None:
    objective = objective_of()
    maps = random_maps(dtype=dtype)
    other = maps.clone().requires_grad_()
    clean = maps.clone().requires_grad_()
    distance = objective.distance(clean, other)
    torch.testing.assert_close(distance, torch.zeros_like(distance), rtol=0, atol=1e-7)
    distance.sum().backward()
    for side in (clean, other):
        assert side.grad is not None
        torch.testing.assert_close(side.grad, torch.zeros_like(maps), rtol=0, atol=1e-7)


def test_the_distance_is_never_negative_and_never_infinite() -> None:
    objective = objective_of()
    for scale in (1e-3, 1.0, 30.0, 1000.0):
        clean = random_maps(1, dtype=torch.float32) * scale
        other = (random_maps(2, dtype=torch.float32) * scale).requires_grad_()
        distance = objective.distance(clean, other)
        assert (distance >= 0).all()
        assert distance.isfinite().all()
        assert torch.autograd.grad(distance.sum(), other)[0].isfinite().all()


def test_half_precision_ends_with_the_network() -> None:
    points, images = POINTS.float(), torch.randn(4, 1, *SIZE, generator=torch.Generator().manual_seed(4))
    images.requires_grad_()
    for kind in KINDS:
        torch.manual_seed(0)
        model = nn.Conv2d(1, 9, 3, padding=1)
        objective = LandmarkObjective(model, points, SIZE, radius=RADIUS, heatmap=kind)
        with torch.autocast("cpu", torch.bfloat16):
            loss, terms, maps = objective.loss_and_predictions(images)
            found = (loss, terms, objective(images), objective.distance(maps, maps.flip(0)))
        assert maps.dtype == torch.bfloat16
        assert {x.dtype for x in found} == {torch.float32}
        wanted = slow_terms(maps.detach().double(), kind)
        np.testing.assert_allclose(terms.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.autograd.grad(loss, images)[0].isfinite().all()


# The methods of the core


@pytest.mark.parametrize(
    ("thresholds", "held"),
    [
        *(((math.inf,) * 3, False), ((-math.inf,) * 3, True)),
        *(((1e-6, math.inf, math.inf), True), ((math.inf, 1e-6, math.inf), True), ((math.inf, math.inf, 1e-6), True)),
    ],
)
def test_margins_move_as_the_thresholds_say(thresholds: tuple[float, ...], held: bool) -> None:
    """Any term above its threshold holds the margin. An image without landmarks has no loss, and is never attacked: a
    threshold that is never reached halves its margin."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1))
    objective = LandmarkObjective(model, POINTS[:, 1:].float(), SIZE, radius=RADIUS)
    images = torch.rand(4, 1, *SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    method, ids = AMAT(0.25, thresholds, steps=3), ["a", "b", "c", "d"]
    for visit in range(3):
        expected = torch.full((4,), 0.25 if held else 0.25 * (visit + 1))
        expected[2] = 0.25 / 2**visit if max(thresholds) < 0 else 0.25 * (visit + 1)
        torch.testing.assert_close(method.margins.get(ids), expected)
        assert method.step(objective, images, ids).loss.isfinite()


# What attacks may ask for.


def test_the_objective_of_some_images_is_that_of_the_batch_cut() -> None:
    maps, rows = random_maps(), torch.tensor([3, 0])
    objective = LandmarkObjective(nn.Identity(), POINTS, SIZE, radius=RADIUS, heatmap="bce", heatmap_weight=0.3)
    part = objective.take(rows)
    torch.testing.assert_close(part(maps[rows]), objective(maps)[rows])
    torch.testing.assert_close(part.expected_error(maps[rows]), objective.expected_error(maps)[rows])


def test_the_expected_error_pixel_by_pixel() -> None:
    maps = random_maps()
    found = LandmarkObjective(nn.Identity(), POINTS, SIZE, radius=RADIUS).expected_error(maps)
    assert found.shape == (len(POINTS), 1)
    for b, points in enumerate(POINTS):
        errors = []
        for k in np.flatnonzero(KNOWN[b]):
            heat, dy, dx = (maps[b, 3 * part + k] for part in range(3))
            total, weights = 0.0, 0.0
            for y in range(SIZE[0]):
                for x in range(SIZE[1]):
                    weight = (1 / (1 + math.exp(-float(heat[y, x])))) ** 2
                    vote = (x + RADIUS * float(dx[y, x]), y + RADIUS * float(dy[y, x]))
                    total += weight * math.dist(vote, points[k].tolist()) / RADIUS
                    weights += weight
            errors.append(total / weights)
        assert found[b].item() == pytest.approx(np.mean(errors) if errors else 0.0, rel=1e-5)


def test_landmarks_elsewhere_are_far_away_and_those_that_have_not_moved_weigh_more() -> None:
    maps = random_maps().requires_grad_()
    objective = LandmarkObjective(nn.Identity(), POINTS, SIZE, radius=RADIUS)
    climbed = objective.towards(maps)
    places = climbed.objective.points
    known = KNOWN & ~POINTS.isnan().any(-1)
    assert ((places - POINTS).norm(dim=-1)[known] > min(SIZE) / 2 - 1).all()
    assert ((places >= 0) & (places <= torch.tensor([SIZE[1] - 1.0, SIZE[0] - 1.0]))).all()
    loss = climbed.objective.per_landmark(maps).sum(2)
    share = (loss / loss.sum(1, keepdim=True)).detach()
    torch.testing.assert_close(climbed(maps), -(share * loss).sum(1, keepdim=True))
    (found,) = torch.autograd.grad(climbed(maps).sum(), maps)
    (wanted,) = torch.autograd.grad(-(share * loss).sum(), maps)
    torch.testing.assert_close(found, wanted)


def test_attacks_of_the_task_raise_what_they_are_for() -> None:
    maps = random_maps()
    objective = LandmarkObjective(nn.Identity(), POINTS, SIZE, radius=RADIUS)
    for loss in (ExpectedError(), Elsewhere(), Terms(("heatmap",)), Terms(("offset_y", "offset_x"))):
        (climbed,) = loss.objectives(objective, maps)
        found = APGD(5, loss=loss)(objective, maps, 3.0)
        assert (climbed(found.images) > climbed(maps))[KNOWN.any(1)].all()
        torch.testing.assert_close(found.terms, objective(found.images))
    with pytest.raises(TypeError, match="the loss of appearing objects is for detectors; LandmarkObjective is none"):
        APGD(5, loss=Appearing())(objective, maps, 3.0)
