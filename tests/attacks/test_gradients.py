"""What PGD and APGD share: closed forms, starts, restarts, half precision; and the settings of every attack."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import APGD, PGD, Attack, AttackResult, Margin, Noise, SquareAttack, ifgsm, pgd
from advmed.attacks.apgd import apgd
from advmed.attacks.problem import Problem
from advmed.attacks.square import square
from helpers.tensors import ORDERS, RANKS, comparing, seeded, uniform

TINY = [(1, 1), (1, 1, 1), (2, 2, 3), (1, 5, 1)]
SEARCHES: dict[str, Callable[..., Attack]] = {
    "pgd": lambda steps, norm=2, **more: PGD(steps, 2.0, norm, **more),
    "apgd": lambda steps, norm=2, **more: APGD(steps, norm, **{"random_start": 0.0, **more}),
}


def flat(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1, keepdim=True)


# Closed forms


@pytest.mark.parametrize("shape", RANKS + TINY)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_reaches_the_maximum_of_an_affine_objective(
    tiny: SimpleNamespace, shape: tuple[int, ...], p: float, start: float
) -> None:
    """<x, slope> + offset + radius * dual norm of the slope."""
    for batch, terms in ((1, 1), (5, 3)):
        slopes, offsets = uniform(terms, *shape, seed=1) - 0.5, uniform(terms, seed=2)
        objective, images = tiny.Affine(slopes, offsets), uniform(batch, *shape)
        radius = torch.linspace(0.2, 3, batch, dtype=torch.float64)
        slope = slopes.sum(0)
        dual = slope.norm(2) if p == 2 else slope.abs().sum()
        best = (images * slope).flatten(1).sum(1) + offsets.sum() + radius * dual
        # From anywhere in the ball: PGD's step is long enough to cross it, and short enough to settle.
        for attack, rtol in (
            (PGD(60, 8, p, random_start=start), 1e-4 if start else 1e-12),
            (APGD(60, p, random_start=start), 1e-6),
        ):
            result = attack(objective, images, radius, generator=seeded(0))
            torch.testing.assert_close(result.terms.sum(1), best, rtol=rtol, atol=1e-6)
            torch.testing.assert_close(result.norms, radius, rtol=1e-5, atol=0)
            torch.testing.assert_close(result.terms, objective(result.images), rtol=0, atol=0)
        direction = slope / slope.norm() if p == 2 else slope.sign()
        expected = images + radius.reshape(-1, *[1] * len(shape)) * direction
        result = ifgsm(objective, images, radius, steps=7, norm=p)
        torch.testing.assert_close(result.images, expected, rtol=1e-12, atol=1e-12)
        if p == math.inf:
            for attack in (PGD(9, 2.0, p), APGD(20, p)):
                result = attack(objective, images, radius, bounds=(0, 1))
                torch.testing.assert_close(result.images, expected.clamp(0, 1), rtol=0, atol=1e-12)


HALVES = [(torch.float16, 1.0, 2e-3), (torch.bfloat16, 1.0, 1e-2)]


@pytest.mark.parametrize(
    ("kind", "scale", "atol"), [(torch.float32, 1e-30, 1e-5), (torch.float32, 1e30, 1e-5), *HALVES]
)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("name", SEARCHES)
def test_tiny_huge_and_half_precision_gradients_still_give_the_direction(
    tiny: SimpleNamespace, kind: torch.dtype, scale: float, atol: float, p: float, name: str
) -> None:
    """Terms in float16 take the loss scale as their gradient: no step may be lost to it."""
    images = uniform(4, 2, 6, 6, dtype=torch.float32).to(kind)
    slopes = (uniform(1, 2, 6, 6, seed=1, dtype=torch.float32) - 0.5).to(kind)
    radius = torch.tensor([0.0, 0.25, 0.5, 1.0])
    result = SEARCHES[name](40, p)(tiny.Affine(slopes * scale, torch.zeros(1, dtype=kind)), images, radius)
    assert result.nonfinite.sum() == 0
    lost = 0.0 if kind == torch.float32 else atol * (slopes.numel() ** 0.5 if p == 2 else 1)  # rounded to the image
    torch.testing.assert_close(result.norms, radius, rtol=1e-5, atol=lost)
    assert (result.norms <= radius * (1 + 1e-6)).all()
    slope = slopes[0].float()
    expected = images.float() + radius.reshape(4, 1, 1, 1) * (slope / slope.norm() if p == 2 else slope.sign())
    torch.testing.assert_close(result.images.float(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("attack", [PGD(4, 1.0, keep="best"), APGD(6, random_start=0)])
def test_terms_in_half_precision_are_added_up_in_float32(attack: Attack) -> None:
    """In bfloat16 1024 + 0.5 is 1024, and no point would be worse than the first."""

    def terms(x: Tensor) -> Tensor:
        small = x[:, 0, 0].bfloat16()
        return torch.stack((small, torch.full_like(small, 1024.0)), 1)

    torch.testing.assert_close(attack(terms, torch.zeros(2, 1, 1), 1.0).norms, torch.ones(2))


# Half precision


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_what_is_shown_of_an_iterate_is_the_value_nearest_to_it_on_the_way_from_the_image(kind: torch.dtype) -> None:
    """Looked up among all values that there are."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind)
    images = values[values.isfinite()][None]
    own = images.double()
    order = own.unique()  # sorted
    problem = Problem(lambda x: x, images, 1.0, norm=math.inf)
    noise = torch.randn(8, 1, images.shape[1], generator=seeded(0))
    for size in (0.0, 1e-30, 1e-8, 1e-3, 0.3, 1e3, 1e5):
        for draw in noise * size:
            relative = problem.images * (1 + draw)
            for iterate in (problem.images + draw, relative.where(relative.isfinite(), problem.images)):
                shown, at = problem.shown(iterate).double(), iterate.double()
                below = order[(torch.searchsorted(order, at, right=True) - 1).clamp_min(0)]
                above = order[torch.searchsorted(order, at).clamp_max(len(order) - 1)]
                assert torch.equal(shown, torch.where(at > own, below, above).where(at != own, own))
    assert torch.equal(bits(problem.shown(problem.images)), bits(images))


HALF_ATTACKS: dict[str, Callable[[float], Attack]] = {
    "pgd": lambda p: PGD(5, 4.0, p, random_start=0.5),
    "pgd best": lambda p: PGD(5, 4.0, p, keep="best"),
    "apgd": lambda p: APGD(6, p, restarts=2),
    "square": lambda p: SquareAttack(20, p),
    "noise": lambda p: Noise("uniform", p),
}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [None, (0.1, 0.9), "sample"])
@pytest.mark.parametrize("name", HALF_ATTACKS)
def test_what_is_delivered_in_half_precision_is_in_ball_and_bounds(
    name: str, bounds: Any, p: float, kind: torch.dtype
) -> None:
    """Measured in float64; the norms and the terms are those of what is delivered."""
    images = (uniform(5, 2, 6, 6, dtype=torch.float32) * 1.4 - 0.2).to(kind)
    slopes = uniform(1, 2, 6, 6, seed=1, dtype=torch.float32) - 0.5
    radius = torch.tensor([0.0, 1 / 255, 4 / 255, 0.1, 0.3]) * (1 if p == math.inf else 6)

    def objective(x: Tensor) -> Tensor:
        return ((x.float() * slopes * 9).sin()).flatten(1).sum(1, keepdim=True)

    result = HALF_ATTACKS[name](p)(objective, images, radius, bounds=bounds, generator=seeded(0))
    noise = result.images.double() - images.double()
    far = noise.flatten(1).norm(p, dim=1)
    assert (far <= radius.double() * (1 + 1e-6)).all()
    assert (far[2:] > 0.2 * radius[2:]).all()  # it is there, for all that
    torch.testing.assert_close(result.norms.double(), far, rtol=1e-6, atol=0)
    assert torch.equal(result.terms, objective(result.images))
    assert torch.equal(bits(result.images[0]), bits(images[0]))
    if bounds is not None:
        own = images.double().flatten(1)
        low, high = (own.amin(1), own.amax(1)) if bounds == "sample" else (own.new_full((5,), b) for b in bounds)
        low, high = (bound.reshape(5, 1, 1, 1) for bound in (low, high))
        found = result.images.double()
        assert (found >= torch.minimum(low, images.double()) - 1e-8).all()  # 0.1 in float32 is not 0.1
        assert (found <= torch.maximum(high, images.double()) + 1e-7).all()


@pytest.mark.parametrize("p", ORDERS)
def test_crossings_in_half_precision_are_norms_of_what_the_network_saw(p: float) -> None:
    images, slopes = uniform(4, 1, 6, 6, dtype=torch.float32).bfloat16(), uniform(1, 6, 6, seed=1, dtype=torch.float32)
    seen: list[tuple[Tensor, Tensor]] = []

    def objective(x: Tensor) -> Tensor:
        terms = (x.float() * slopes).flatten(1).sum(1, keepdim=True)
        seen.append((x.detach().double() - images.double(), terms.detach()))
        return terms

    limit = float(objective(images).mean() + 0.2 * (slopes.norm() if p == 2 else slopes.abs().sum()))
    seen.clear()
    result = PGD(40, 1.0, p)(objective, images, 0.4, thresholds=[limit])
    expected = torch.zeros(4, dtype=torch.float64)
    for noise, terms in seen:
        expected = noise.flatten(1).norm(p, dim=1).where(terms[:, 0] < limit, expected)
    assert len(set(expected.tolist())) > 2
    torch.testing.assert_close(result.crossing.double(), expected, rtol=1e-6, atol=0)
    half = PGD(40, 1.0, p)(objective, images, 0.4, final_pass=False)
    torch.testing.assert_close(half.seen[1].double(), seen[-1][0].flatten(1).norm(p, dim=1), rtol=1e-6, atol=0)


# Starts and restarts


@pytest.mark.parametrize("name", SEARCHES)
def test_runs_begin_at_the_image_or_in_the_ball_of_the_fraction_and_then_at_random(name: str) -> None:
    starts: list[Tensor] = []

    def terms(x: Tensor) -> Tensor:
        starts.append(x.detach())
        return flat(x)

    SEARCHES[name](1, restarts=3)(terms, torch.zeros(1, 1, 4), 1.0)
    first, second, third = starts[0], starts[2], starts[4]
    assert first.count_nonzero() == 0
    assert second.count_nonzero() == third.count_nonzero() == 4
    assert not torch.equal(second, third)
    for fraction in (0.25, 1.0):
        starts.clear()
        SEARCHES[name](1, random_start=fraction)(terms, torch.zeros(8, 1, 20), 2.0, generator=seeded(0))
        norms = starts[0].flatten(1).norm(dim=1)
        assert norms.max() <= 2 * fraction * (1 + 1e-6)
        assert norms.mean() > 2 * fraction * 0.8  # most of a ball of 20 dimensions is near its surface


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("name", ["pgd last", "pgd best", "apgd"])
def test_restarts_keep_the_worst_run_of_each_sample(tiny: SimpleNamespace, p: float, name: str) -> None:
    classifier, images = tiny.Classifier(tiny.cnn().double().eval(), torch.arange(6) % 4), uniform(6, 3, 8, 8)
    radius, generator = 6.0 if p == 2 else 0.4, seeded(5)

    def wavy(x: Tensor) -> Tensor:
        return (classifier(x) * 6).sin()

    def attack(generator: torch.Generator, restarts: int = 1) -> AttackResult:
        if name == "apgd":
            return APGD(3, p, restarts=restarts)(wavy, images, radius, generator=generator)
        found = PGD(2, 1.0, p, random_start=1.0, restarts=restarts, keep=name.removeprefix("pgd "))
        return found(wavy, images, radius, thresholds=[0.5], generator=generator)

    runs = [attack(generator) for _ in range(4)]
    together = attack(seeded(5), restarts=4)
    winner = torch.stack([run.terms.sum(1) for run in runs]).argmax(0).tolist()
    assert len(set(winner)) > 1
    for field in ("images", "terms", "norms", *([] if name == "apgd" else ["crossing"])):
        expected = torch.stack([getattr(runs[w], field)[i] for i, w in enumerate(winner)])
        assert torch.equal(getattr(together, field), expected), field
    assert together.nonfinite.tolist() == [0] * 6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_restart_replaces_a_run_without_a_finite_loss(bad: float) -> None:
    passes = iter(range(99))

    def terms(x: Tensor) -> Tensor:
        return flat(x) * (bad if next(passes) < 4 else 1.0)

    result = pgd(terms, torch.zeros(2, 1, 4), 1.0, steps=3, step_scale=2, restarts=2, generator=seeded(0))
    assert result.terms.isfinite().all()
    torch.testing.assert_close(result.terms, flat(result.images))


# float16


@pytest.mark.parametrize("p", ORDERS)
def test_float16_gradients_do_not_underflow(p: float) -> None:
    """A convolution in float16 under a tiny loss: its gradient is below what float16 holds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Conv2d(2, 4, 3)

    def objective(scale: float) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x).float().square().flatten(1).mean(1, keepdim=True) * scale

    images, attack = uniform(3, 2, 12, 12, dtype=torch.float32), PGD(4, 2.0, p)
    exact = attack(objective(1.0), images, 1.0)
    with torch.autocast("cpu", torch.float16):
        leaf = images.clone().requires_grad_()
        assert torch.autograd.grad(objective(1e-6)(leaf).sum(), leaf)[0].count_nonzero() < leaf.numel() / 2
        result = attack(objective(1e-6), images, 1.0)
    cosine = torch.cosine_similarity((result.images - images).flatten(1), (exact.images - images).flatten(1))
    assert cosine.min() > 0.9
    assert result.nonfinite.sum() == 0


@dataclass
class Steep:
    """Through a convolution in float16: a loss of so steep a slope for each sample, from the pass of a number on."""

    slopes: Tensor
    since: int = 0
    passes: int = 0
    gradients: int = 0

    def __post_init__(self) -> None:
        self.convolution = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.convolution.weight)

    def __call__(self, x: Tensor) -> Tensor:
        slopes = self.slopes if self.passes >= self.since else torch.ones_like(self.slopes)
        self.passes += 1
        self.gradients += x.requires_grad
        return (self.convolution(x).float().flatten(1).sum(1) * slopes)[:, None]


FLOAT16: dict[str, Callable[[int], Attack]] = {
    "pgd": lambda steps: PGD(steps, 8.0),
    "apgd": lambda steps: APGD(steps, random_start=0),
}


@pytest.mark.parametrize(
    ("slopes", "repeats"),
    [
        ([1e-3, 1.0], 0),
        ([1e-3, 20.0], 1),  # 20 * 2^15 is too much, 20 * 2^11 is not
        ([20.0, 1e5], 4),  # 1e5 * 2^3 is too much, 1e5 / 2 is not
    ],
)
@pytest.mark.parametrize("name", FLOAT16)
def test_no_step_is_lost_to_a_loss_scale_that_is_too_large_at_first(
    name: str, slopes: list[float], repeats: int
) -> None:
    """Sample 1 has a loss much larger: the first gradient is computed again until its scale has come down."""
    objective, once = Steep(torch.tensor(slopes)), Steep(torch.tensor(slopes))
    with torch.autocast("cpu", torch.float16):
        result = FLOAT16[name](8)(objective, torch.zeros(2, 1, 3, 3), 1.0)
        first = PGD(1, 1.0)(once, torch.zeros(2, 1, 3, 3), 1.0)
    assert result.nonfinite.tolist() == first.nonfinite.tolist() == [0, 0]
    for found in (result, first):
        torch.testing.assert_close(found.images, torch.full((2, 1, 3, 3), 1 / 3))
    assert (objective.gradients, once.gradients) == (8 + repeats, 1 + repeats)


def test_a_later_float16_overflow_backs_off_per_sample_and_costs_its_step() -> None:
    objective = Steep(torch.tensor([1e-3, 20.0]), since=2)
    with torch.autocast("cpu", torch.float16):
        result = PGD(8, 8.0)(objective, torch.zeros(2, 1, 3, 3), 1.0)
    assert result.nonfinite.tolist() == [0, 1]
    assert objective.gradients == 8
    torch.testing.assert_close(result.images, torch.full((2, 1, 3, 3), 1 / 3))


@pytest.mark.parametrize(("slope", "repeats"), [(math.nan, 0), (1e9, 4)])
def test_what_no_loss_scale_mends_is_soon_given_up_and_counted(slope: float, repeats: int) -> None:
    """A loss that is NaN itself, and one too steep for any; the other sample is attacked all the same."""
    objective = Steep(torch.tensor([1.0, slope]))
    with torch.autocast("cpu", torch.float16):
        result = PGD(3, 3.0)(objective, torch.zeros(2, 1, 3, 3), 1.0)
    assert objective.gradients == 3 + repeats
    assert result.nonfinite[0] == 0
    assert result.nonfinite[1] >= 1
    torch.testing.assert_close(result.images[0], torch.full((1, 3, 3), 1 / 3))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_gradient_is_not_repeated_but_in_float16(kind: torch.dtype) -> None:
    objective = Steep(torch.tensor([1.0, math.inf]))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        result = PGD(3, 3.0)(objective, torch.zeros(2, 1, 3, 3), 1.0)
    assert objective.gradients == 3
    assert result.nonfinite.tolist() == [0, 3]


# Settings of all attacks

LEAST: dict[Any, dict[str, Any]] = {
    PGD: {"steps": 2, "step_scale": 1.0}, APGD: {"steps": 2}, SquareAttack: {"steps": 2}, Noise: {"kind": "gaussian"}
}  # fmt: skip
COUNT, FRACTION = "must be a whole number >= 1, got", r"must be a fraction {}in \[0, 1\], got {}$"


@pytest.mark.parametrize(
    ("kinds", "name", "value", "message"),
    [
        ((PGD, APGD, SquareAttack), "steps", 0, f"steps {COUNT} 0"),
        ((PGD, APGD, SquareAttack), "steps", 2.0, f"steps {COUNT} 2.0"),
        ((PGD, APGD, SquareAttack), "steps", True, f"steps {COUNT} True"),
        ((PGD, APGD), "restarts", 0, f"restarts {COUNT} 0"),
        ((PGD, APGD), "random_start", 1.5, "random_start " + FRACTION.format("of the radius ", 1.5)),
        ((PGD, APGD), "random_start", math.nan, "random_start " + FRACTION.format("of the radius ", "nan")),
        (tuple(LEAST), "norm", 1, r"norm must be 2 or inf \(L2 or Linf\), got 1"),
        *(
            ((PGD,), "step_scale", value, rf"step_scale must be positive \(1 just reaches the radius\), got {value}")
            for value in (0, -1.0, math.inf, math.nan)
        ),
        ((PGD,), "keep", "worst", "keep must be 'last' or 'best', got 'worst'"),
        ((APGD,), "momentum", 0, "momentum must be above 0, or nothing moves"),
        ((APGD,), "momentum", 1.1, "momentum " + FRACTION.format("", 1.1)),
        ((APGD,), "rho", -0.1, "rho " + FRACTION.format("", -0.1)),
        ((SquareAttack,), "share", 0, "share must be above 0"),
        ((SquareAttack,), "share", 1.5, "share " + FRACTION.format("", 1.5)),
        ((SquareAttack,), "share", math.nan, "share " + FRACTION.format("", "nan")),
        ((Noise,), "kind", "salt", "kind must be 'gaussian' or 'uniform', got 'salt'"),
    ],
)
def test_settings_out_of_range(kinds: tuple[Any, ...], name: str, value: Any, message: str) -> None:
    for kind in kinds:
        with pytest.raises(ValueError, match=f"^{message}"):
            kind(**(LEAST[kind] | {name: value}))


@pytest.mark.parametrize(
    ("call", "more", "attack"),
    [
        (pgd, {"steps": 3, "step_scale": 2.0, "norm": "inf"}, PGD(3, 2.0, math.inf, 1.0)),
        (
            pgd,
            {"steps": 3, "step_scale": 2.0, "keep": "best", "loss": Margin()},
            PGD(3, 2.0, 2, 1.0, 1, "best", Margin()),
        ),
        (ifgsm, {"steps": 3, "keep": "best"}, PGD(3, 1.0, keep="best")),
        (apgd, {"steps": 4, "restarts": 2, "loss": Margin()}, APGD(4, restarts=2, loss=Margin())),
        (square, {"queries": 5, "norm": math.inf}, SquareAttack(5, math.inf)),
    ],
)
def test_an_attack_in_one_call(call: Callable[..., AttackResult], more: dict[str, Any], attack: Attack) -> None:
    """It is the attack of these settings, and refuses a radius that is none."""
    objective, images = comparing()
    found = call(objective, images, 0.5, bounds=(0, 1), generator=seeded(0), **more)
    expected = attack(objective, images, 0.5, bounds=(0, 1), generator=seeded(0))
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.terms, expected.terms)
    with pytest.raises(ValueError, match="radius must be >= 0 and finite, got -1"):
        call(objective, images, -1, **more)
    with pytest.raises(ValueError, match=f"steps {COUNT} 0"):
        call(objective, images, 1, **(more | {"queries" if call is square else "steps": 0}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounds": (1, 0)}, r"bounds must be \(lowest, highest\) with lowest < highest, got \(1, 0\)"),
        ({"bounds": (math.nan, 1)}, r"bounds must be \(lowest, highest\) with lowest < highest, got \(nan, 1\)"),
        ({"bounds": (0, 1, 2)}, r"bounds must be None, 'sample' or a pair \(lowest, highest\), got \(0, 1, 2\)"),
        ({"bounds": "image"}, r"bounds must be None, 'sample' or a pair \(lowest, highest\), got 'image'"),
        ({"bounds": 1.0}, r"bounds must be None, 'sample' or a pair \(lowest, highest\), got 1.0"),
        ({"radius": -0.5}, r"radius must be >= 0 and finite, got -0.5"),
        ({"radius": torch.tensor([1.0, -2.0])}, r"radius must be >= 0 and finite, got -2.0"),
        ({"radius": math.nan}, r"radius must be >= 0 and finite, got nan"),
        ({"radius": math.inf}, r"radius must be >= 0 and finite, got inf"),
        ({"thresholds": [1.0, 2.0]}, r"2 thresholds were given for K = 1 loss terms"),
    ],
)
def test_what_does_not_fit_a_batch(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgd(flat, torch.zeros(2, 1, 4), **({"radius": 1.0, "steps": 2, "step_scale": 1.0} | arguments))


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (APGD(100), "100 steps of adaptive length from a random point of the ball; largest loss"),
        (APGD(100, random_start=0), "from the input; largest loss"),
        (APGD(100, restarts=3), "largest loss, the worst of 3 runs"),
        (SquareAttack(1000), "Square Attack (Andriushchenko et al. 2020): 1000 queries of the loss, no gradients"),
        (Noise("gaussian"), "no attack, the control: gaussian noise of the same norm"),
    ],
)
def test_descriptions(attack: Attack, words: str) -> None:
    assert attack.description.endswith(words)


def test_settings_are_read_as_numbers() -> None:
    attack = APGD(5, "inf", random_start=True)
    assert (attack.norm, attack.random_start) == (math.inf, 1.0)
    assert SquareAttack(5, "inf").norm == Noise("uniform", "inf").norm == math.inf
