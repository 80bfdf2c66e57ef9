"""Loss terms and distance against loops in float64, landmarks that are not there, and the methods of the core."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adv_landmark.maps import decode
from adv_landmark.objective import LandmarkObjective
from advmed.methods import AMAT, AT, DPAAT, SAT, STD, TRADES, Method
from advmed.objective import PredictingObjective

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


class Small(nn.Sequential):
    """Grey images to the maps of two landmarks."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1))


def random_maps(seed: int = 0, batch: int = len(POINTS), dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 9, *SIZE, generator=generator, dtype=torch.float64) * 2).to(dtype)


def objective_of(points: Tensor = POINTS, **options: Any) -> LandmarkObjective:
    return LandmarkObjective(Given(), points, SIZE, radius=RADIUS, **options)


# The terms


def slow_terms(maps: np.ndarray, points: np.ndarray, kind: str, weight: float = 1.0) -> np.ndarray:
    """(B, 3), landmark by landmark and pixel by pixel."""
    batch, landmarks = points.shape[:2]
    terms = np.zeros((batch, 3))
    for b in range(batch):
        each = []
        for k in range(landmarks):
            x, y = points[b, k]
            if not (-0.5 <= x <= SIZE[1] - 0.5 and -0.5 <= y <= SIZE[0] - 0.5):
                continue
            entropy, overlap, amount, area, error_y, error_x = 0.0, 0.0, 0.0, 0, 0.0, 0.0
            for row in range(SIZE[0]):
                for column in range(SIZE[1]):
                    p = 1 / (1 + math.exp(-maps[b, k, row, column]))
                    distance = math.hypot(row - y, column - x)
                    inside = distance <= RADIUS
                    target = math.exp(-0.5 * (distance / RADIUS) ** 2) if inside else 0.0
                    entropy -= target * math.log(p) + (1 - target) * math.log(1 - p)
                    amount += p
                    if inside:
                        area += 1
                        overlap += p
                        error_y += abs(maps[b, landmarks + k, row, column] - (y - row) / RADIUS)
                        error_x += abs(maps[b, 2 * landmarks + k, row, column] - (x - column) / RADIUS)
            dice = (2 * overlap + 1) / (amount + area + 1)
            heat = entropy / (SIZE[0] * SIZE[1]) if kind == "bce" else 1 - dice
            each.append((weight * heat, error_y / area, error_x / area))
        if each:
            terms[b] = np.mean(each, 0)
    return terms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1.0, 0.5, 3.0])
def test_the_terms_are_those_of_every_landmark(kind: Any, weight: float) -> None:
    objective, maps = objective_of(heatmap=kind, heatmap_weight=weight), random_maps()
    assert isinstance(objective, PredictingObjective)
    assert objective.names == ("heatmap", "offset_y", "offset_x")
    wanted = slow_terms(maps.numpy(), POINTS.numpy(), kind, weight)
    assert (wanted[[0, 1, 3]] > 0.1).all()
    for terms in (objective(maps), objective.loss_and_predictions(maps)[1]):
        assert terms.shape == (4, 3)
        np.testing.assert_allclose(terms.numpy(), wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_loss_is_the_mean_over_images_of_the_sum_of_the_terms(kind: Any) -> None:
    objective, maps = objective_of(heatmap=kind, heatmap_weight=2.0), random_maps()
    loss, _, predictions = objective.loss_and_predictions(maps)
    wanted = slow_terms(maps.numpy(), POINTS.numpy(), kind, 2.0).sum() / 4  # the one without landmarks counts as 0
    assert loss.shape == ()
    assert loss.item() == pytest.approx(wanted, rel=1e-10)
    assert torch.equal(predictions, maps)


def test_dice_with_the_weight_1_is_what_is_taken_if_nothing_else_is_said() -> None:
    maps = random_maps()
    assert torch.equal(objective_of()(maps), objective_of(heatmap="dice", heatmap_weight=1.0)(maps))


@pytest.mark.parametrize("kind", KINDS)
def test_right_maps_have_the_smallest_loss(kind: Any) -> None:
    """Dice and offsets end at 0; the cross-entropy at that of the Gaussian with itself."""
    points = POINTS[:1]
    objective = objective_of(points, heatmap=kind)
    targets = objective.targets
    heat = (targets.disk if kind == "dice" else targets.gaussian).clamp(1e-9, 1 - 1e-9).logit()
    offsets = [offset.expand_as(heat) for offset in (targets.offset_y, targets.offset_x)]
    terms = objective(torch.cat([heat, *offsets], 1))
    g = targets.gaussian[targets.gaussian.bool() & (targets.gaussian < 1)]
    floor = -(g * g.log() + (1 - g) * (1 - g).log()).sum().item() / targets.gaussian.numel() if kind == "bce" else 0.0
    assert terms[0].tolist() == pytest.approx([floor, 0.0, 0.0], abs=1e-6)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        other = torch.cat([heat + 10 * torch.randn(heat.shape, generator=generator).double(), *offsets], 1)
        assert objective(other)[0, 0] > terms[0, 0] + 1e-3


def test_offsets_count_within_the_disk_alone() -> None:
    objective, maps = objective_of(), random_maps()
    changed = maps.clone()
    disk = objective.targets.disk.repeat(1, 2, 1, 1) > 0
    changed[:, 3:][~disk] += 100
    assert torch.equal(objective(changed), objective(maps))
    changed[:, 3:6] += 50 * (objective.targets.disk > 0)
    found = objective(changed) - objective(maps)
    assert (found[[0, 1, 3], 1] > 45).all()
    assert torch.equal(found[:, [0, 2]], torch.zeros(4, 2, dtype=torch.float64))


# Landmarks that are not there


@pytest.mark.parametrize("kind", KINDS)
def test_a_landmark_that_is_not_there_changes_nothing(kind: Any) -> None:
    maps = random_maps().requires_grad_()
    objective = objective_of(heatmap=kind)
    gradient = torch.autograd.grad(objective(maps).sum(), maps)[0]
    reached = gradient.unflatten(1, (3, 3)).abs().sum((1, 3, 4))  # (B, L)
    assert torch.equal(reached > 0, KNOWN)
    changed = maps.detach().clone().unflatten(1, (3, 3))
    changed.transpose(1, 2)[~KNOWN] = 77.0
    assert torch.equal(objective(changed.flatten(1, 2)), objective(maps.detach()))


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


def test_a_batch_without_any_landmark_can_be_trained_on() -> None:
    model = nn.Conv2d(1, 9, 3, padding=1)
    objective = LandmarkObjective(model, torch.full((2, 3, 2), math.nan), SIZE, radius=RADIUS)
    loss, _, _ = objective.loss_and_predictions(torch.ones(2, 1, *SIZE))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None)


def test_images_know_nothing_of_each_other() -> None:
    order = torch.tensor([2, 0, 3, 1])
    for kind in KINDS:
        terms = objective_of(heatmap=kind)(random_maps())
        mixed = objective_of(POINTS[order], heatmap=kind)(random_maps()[order])
        torch.testing.assert_close(mixed, terms[order], rtol=1e-12, atol=0)


# Gradients


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_terms_is_that_of_finite_differences(kind: Any) -> None:
    objective = LandmarkObjective(
        nn.Identity(),
        torch.tensor([[(2.3, 1.7), NAN], [(0.2, 3.1), (3.0, 0.6)]], dtype=torch.float64),
        (5, 4),
        radius=1.6,
    )
    objective.heatmap = kind
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(objective, maps)


def test_the_gradient_of_the_distance_is_that_of_finite_differences() -> None:
    """The heat that weighs the offsets is held constant, so the clean side is checked by its offsets."""
    objective = objective_of()
    generator = torch.Generator().manual_seed(3)
    clean, other = (torch.randn(2, 6, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    other.requires_grad_()
    assert torch.autograd.gradcheck(lambda maps: objective.distance(clean, maps), other)
    offsets = clean[:, 2:].clone().requires_grad_()
    fixed = other.detach()
    assert torch.autograd.gradcheck(lambda o: objective.distance(torch.cat([clean[:, :2], o], 1), fixed), offsets)
    heat = clean.clone().requires_grad_()
    objective.distance(heat, fixed).sum().backward()
    assert heat.grad is not None
    assert heat.grad[:, :2].abs().min() > 0


def test_offsets_that_differ_do_not_drive_the_heat_down() -> None:
    """To have no heat would be the easy way to agree; where heat weighs offsets, it is a constant."""
    maps = random_maps()
    other = maps.clone()
    other[:, 3:] += 1 + random_maps(1)[:, 3:].abs()  # not the same everywhere
    clean = maps.clone().requires_grad_()
    distance = objective_of().distance(clean, other)
    assert (distance > 2).all()
    gradient = torch.autograd.grad(distance.sum(), clean)[0]
    torch.testing.assert_close(gradient[:, :3], torch.zeros(4, 3, *SIZE, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (gradient[:, 3:] < 0).all()


def test_one_pass_each() -> None:
    objective, maps = objective_of(), random_maps()
    model: Any = objective.model
    for part in (objective, objective.predictions, objective.loss_and_predictions):
        before = model.passes
        part(maps)
        assert model.passes == before + 1
    assert torch.equal(objective.predictions(maps), maps)
    assert not hasattr(objective, "loss")  # the mean over images is the loss: methods need no other


# The distance


def slow_distance(clean: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(B,)."""
    batch, landmarks = clean.shape[0], clean.shape[1] // 3
    found = np.zeros(batch)
    for b in range(batch):
        for k in range(landmarks):
            p, q = (1 / (1 + np.exp(-maps[b, k])) for maps in (clean, other))
            divergence = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
            moved = sum(
                (p * np.abs(clean[b, part * landmarks + k] - other[b, part * landmarks + k])).sum() for part in (1, 2)
            )
            found[b] += (divergence + moved) / max(p.sum(), 1) / landmarks
    return found


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
        np.testing.assert_allclose(found.numpy(), slow_distance(clean.numpy(), other.numpy()), rtol=1e-9)
        assert (objective.distance(other, clean) - found).abs().min() > 1e-3  # not symmetric


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


def test_the_distance_does_not_ask_where_the_landmarks_are() -> None:
    clean, other = random_maps(1), random_maps(2)
    assert torch.equal(objective_of().distance(clean, other), objective_of(POINTS.flip(0)).distance(clean, other))


def test_half_precision_ends_with_the_network() -> None:
    points, images = POINTS.float(), torch.randn(4, 1, *SIZE, generator=torch.Generator().manual_seed(4))
    images.requires_grad_()
    for kind in KINDS:
        torch.manual_seed(0)
        model = nn.Conv2d(1, 9, 3, padding=1)
        objective = LandmarkObjective(model, points, SIZE, radius=RADIUS, heatmap=kind)  # type: ignore[arg-type]  # wrong on purpose
        with torch.autocast("cpu", torch.bfloat16):
            loss, terms, maps = objective.loss_and_predictions(images)
            found = (loss, terms, objective(images), objective.distance(maps, maps.flip(0)))
        assert maps.dtype == torch.bfloat16
        assert {x.dtype for x in found} == {torch.float32}
        wanted = slow_terms(maps.detach().double().numpy(), points.double().numpy(), kind)
        np.testing.assert_allclose(terms.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.autograd.grad(loss, images)[0].isfinite().all()


# The methods of the core


IDS = ["a", "b", "c", "d"]
QUICK: dict[str, Any] = {"steps": 3}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 1, *SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.fixture(params=KINDS)
def trained(request: pytest.FixtureRequest) -> LandmarkObjective:
    """The objective of two landmarks and a small network."""
    return LandmarkObjective(Small(), POINTS[:, 1:].float(), SIZE, radius=RADIUS, heatmap=request.param)


@pytest.mark.parametrize(
    "make",
    [
        lambda: STD(),
        lambda: SAT(0.7, **QUICK),
        lambda: AT(0.7, **QUICK),
        lambda: AMAT(0.7, [0.5, 0.5, 0.5], **QUICK),
        lambda: DPAAT(0.7, **QUICK),
        lambda: TRADES(0.7, **QUICK),
    ],
    ids=["STD", "SAT", "AT", "AMAT", "DPAAT", "TRADES"],
)
def test_every_method_makes_a_step(make: Callable[[], Method], trained: LandmarkObjective, images: Tensor) -> None:
    """The loss is finite and reaches every weight, the noise is as large as it may be, and does harm."""
    method = make()
    before = images.clone()
    step = method.step(trained, images, IDS)
    assert step.loss.isfinite()
    step.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.model.parameters())
    assert all(p.grad.isfinite().all() for p in trained.model.parameters() if p.grad is not None)
    assert torch.equal(images, before)
    if step.adversarial is None:
        assert method.name == "STD"
        assert step.loss.item() == pytest.approx(trained(images).sum(1).mean().item())
        return
    noise = (step.adversarial - images).flatten(1).norm(dim=1)
    with_landmarks = torch.tensor([True, True, method.name == "TRADES", True])  # TRADES asks for none
    torch.testing.assert_close(noise, 0.7 * with_landmarks, rtol=1e-4, atol=1e-6)
    clean, attacked = (trained(x).detach().sum(1) for x in (images, step.adversarial))
    if method.name == "TRADES":
        maps = trained.predictions(images), trained.predictions(step.adversarial)
        distance = trained.distance(*maps).mean()
        assert distance > 1e-3
        assert step.loss.item() == pytest.approx((clean.mean() + 6 * distance).item(), rel=1e-4)
    else:
        assert (attacked > clean)[[0, 1, 3]].all()
        distance = trained.distance(trained.predictions(images), trained.predictions(step.adversarial)).mean()
        half = (clean.mean() + attacked.mean()) / 2
        wanted = {"SAT": half, "AMAT": half, "AT": attacked.mean(), "DPAAT": attacked.mean() + distance}
        assert step.loss.item() == pytest.approx(wanted[method.name].item(), rel=1e-4)


@pytest.mark.parametrize(("threshold", "wanted"), [(math.inf, (0.25, 0.5, 0.75)), (-math.inf, (0.25, 0.25, 0.25))])
def test_margins_move_as_the_thresholds_say(
    trained: LandmarkObjective, images: Tensor, threshold: float, wanted: tuple[float, ...]
) -> None:
    """An image without landmarks is never attacked, so a threshold that is never reached halves its margin."""
    method = AMAT(0.25, [threshold] * 3, **QUICK)
    for visit, margin in enumerate(wanted):
        expected = torch.full((4,), margin)
        if threshold < 0:
            expected[2] = 0.25 / 2**visit
        torch.testing.assert_close(method.margins.get(IDS), expected)
        assert method.step(trained, images, IDS).loss.isfinite()


@pytest.mark.parametrize("term", [0, 1, 2])
def test_any_term_above_its_threshold_holds_the_margin(trained: LandmarkObjective, images: Tensor, term: int) -> None:
    thresholds = [math.inf] * 3
    thresholds[term] = 1e-6
    method = AMAT(0.25, thresholds, **QUICK)
    method.step(trained, images, IDS)
    torch.testing.assert_close(method.margins.get(IDS), torch.tensor([0.25, 0.25, 0.5, 0.25]))  # one has no loss


def test_sizes_move_as_the_increase_of_the_loss_says(trained: LandmarkObjective, images: Tensor) -> None:
    method = DPAAT(0.5, step_size=0.1, **QUICK)
    step = method.step(trained, images, IDS)
    assert step.adversarial is not None
    increase = (trained(step.adversarial) - trained(images)).detach().sum(1)
    wanted = torch.where(increase <= increase.mean(), 0.6, 0.4)
    torch.testing.assert_close(method.sizes.get(IDS), wanted)
    assert 0 < (wanted == 0.6).sum() < 4


def test_training_with_a_method_learns_the_landmark(images: Tensor) -> None:
    """A bright pixel is the landmark: the loss falls, and the landmark is found."""
    points = torch.tensor([[(3.0, 4.0)], [(7.0, 2.0)], [(5.0, 6.0)], [(2.0, 2.0)]])
    images = torch.full_like(images, -1.0)
    for b, (x, y) in enumerate(points[:, 0].long().tolist()):
        images[b, 0, y, x] = 1.0
    torch.manual_seed(2)
    body = nn.Conv2d(1, 24, 7, padding=3, padding_mode="replicate")
    model = nn.Sequential(body, nn.ReLU(), nn.Conv2d(24, 3, 1))
    objective = LandmarkObjective(model, points, SIZE, radius=RADIUS, heatmap="bce")
    method, optimizer = SAT(0.1, **QUICK), torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(100):
        step = method.step(objective, images, IDS)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
    assert losses[-1] < losses[0] / 2
    found, _ = decode(model(images), RADIUS)
    assert (found - points).norm(dim=-1).max() < 0.6
