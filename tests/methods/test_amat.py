"""AMAT against closed forms of a linear model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advmed.methods import AMAT
from advmed.methods.amat import expected_crossing
from advmed.thresholds import RunningThresholds, Thresholds
from advmed.training.settings import TrainingSettings
from helpers.models import Affine, Cut, Logistic
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


# Rules by which a margin follows its sample

FAST: dict[str, Any] = {"steps": 3, "step_scale": 1.75, "schedule": "decreasing"}
RULES: dict[str, dict[str, Any]] = {
    "secant": {"refinement": "secant"},
    "secant on the crossing": {"refinement": "secant", "train_on": "crossing"},
    "fast": {"refinement": "secant", "train_on": "sphere", "start": "estimate", "share_gradient": True},
    "fast on the crossing": {"refinement": "secant", "train_on": "crossing", "start": "estimate"},
    "balanced": {"refinement": "balanced"},
    "balanced on the crossing": {"refinement": "balanced", "train_on": "crossing", "start": "estimate"},
}


class Shifted:
    """A frozen linear model whose samples come back with random shifts of their logit, as augmentation has it."""

    def __init__(self, terms: int, spread: float, p: float) -> None:
        self.objective, self.images, self.thresholds, self.closed = linear_task(8, (2, 6), p, terms)
        weight = self.objective.model.weight.detach()
        self.weight = (weight / weight.square().sum()).reshape(1, 2, 6)
        self.labels, self.spread, self.generator = self.objective.labels, spread, torch.Generator().manual_seed(3)
        # a shift of one logit moves the crossing by as much over the dual norm
        self.unit = 1 / (weight.norm() if p == 2 else weight.abs().sum())

    def visit(self, method: AMAT) -> Tensor:
        shift = self.spread * torch.randn(8, 1, 1, generator=self.generator, dtype=torch.float64)
        method.step(self.objective, self.images + self.labels.reshape(-1, 1, 1) * shift * self.weight, names(8))
        return method.margins.get(names(8)).double()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("p", "terms"), [(2, 1), (2, 3), (math.inf, 3)])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_margins_settle_at_the_median_of_what_their_visits_bear(rule: str, p: float, terms: int, spread: float) -> None:
    task, delta = Shifted(terms, spread, p), 0.25
    method = AMAT(delta, task.thresholds.tolist(), norm=p, **FAST, **RULES[rule])
    margins = torch.stack([task.visit(method) for _ in range(150)])[50:]
    settled = task.closed > delta + 1.5 * spread * task.unit  # the others meet the floor
    assert settled.sum() >= 3
    assert ((margins.mean(0) - task.closed).abs()[settled] < delta).all()
    assert (margins <= (task.closed + 5 * spread * task.unit + delta + 0.05)).all()  # nothing runs away
    if spread == 0.0 and RULES[rule]["refinement"] == "secant":
        several = RULES[rule].get("train_on") == "crossing"  # straight lines; a single one swings about it
        apart = 0.02 if several else delta
        torch.testing.assert_close(margins[-1], task.closed.clamp(min=method.lowest), rtol=0, atol=apart)


def test_a_first_estimate_is_no_larger_than_it_may_be() -> None:
    """Of a loss that hardly rises it is any number, and so is the noise of the first attack."""
    task = Shifted(1, 0.0, 2)
    free, bounded = (AMAT(0.25, [9.0], start="estimate", start_max=most, **FAST) for most in (9.0, 0.5))
    steps = [method.step(task.objective, task.images, names(8)).adversarial for method in (free, bounded)]
    far, near = ((images - task.images).flatten(1).norm(dim=1) for images in steps if images is not None)
    assert far.min() > 2
    torch.testing.assert_close(near, torch.full_like(near, 0.5), rtol=1e-6, atol=0)
    own = TrainingSettings(eps=0.75, delta=0.25).make_method("AMAT", Thresholds((9.0,), ("loss",)))
    assert isinstance(own, AMAT)
    assert own.start_max == 0.75
    without = TrainingSettings(delta=0.25).make_method("AMAT", Thresholds((9.0,), ("loss",)))
    assert isinstance(without, AMAT)
    assert without.start_max == 0.25


@pytest.mark.parametrize("ids", [[3, 5], torch.tensor([3, 5]), np.array([3, 5])], ids=["int", "tensor", "numpy"])
def test_samples_are_known_again_whatever_their_ids_are(ids: Any) -> None:
    objective, images, xi, _ = linear_task(2, (2, 6), 2)
    ways = [AMAT(0.25, xi.tolist(), start="estimate", refinement="secant", **FAST) for _ in range(2)]
    for _ in range(4):
        for method, given in zip(ways, (ids, ["3", "5"]), strict=True):
            method.step(objective, images, given)
    assert ways[0].margins.ids() == ["3", "5"]
    assert ways[0].margins.visits().tolist() == [4, 4]
    torch.testing.assert_close(ways[0].margins.values(), ways[1].margins.values(), rtol=0, atol=0)


def test_a_margin_of_zero_grows_once_its_sample_can_bear_noise() -> None:
    """Without a floor, a sample whose clean loss is above the threshold begins with none; nothing is known of noise."""
    objective = Affine(uniform(1, 1, 4, seed=3), torch.tensor([1.0], dtype=torch.float64))
    images = torch.zeros(2, 1, 4, dtype=torch.float64)
    method = AMAT(0.25, [0.5], start="estimate", refinement="secant", margin_min=0.0, margin_max=4.0, **FAST)
    method.step(objective, images, names(2))
    assert method.margins.values().tolist() == [0.0, 0.0]
    assert "Choose higher thresholds" in (method.resting() or "")
    learnt = Affine(uniform(1, 1, 4, seed=3), torch.tensor([0.0], dtype=torch.float64))
    method.step(learnt, images, names(2))
    assert method.margins.values().tolist() == [0.25, 0.25]  # by delta, the most


def test_margins_of_an_earlier_run_come_within_the_bounds_of_this_one() -> None:
    objective, images, _, _ = linear_task(3, (2, 6), 2)
    wide, narrow = (AMAT(0.25, [math.inf], margin_max=most, **FAST) for most in (4.0, 1.0))
    for _ in range(8):
        wide.step(objective, images, names(3))
    narrow.load_state_dict(wide.state_dict())
    assert narrow.margins.get(names(3)).tolist() == [1.0, 1.0, 1.0]


def test_the_crossing_of_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'crossing' looks for a place on the way .* 2 steps or more"):
        AMAT(0.25, [1.0], train_on="crossing", steps=1)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "terms"), [("fast", 3), ("fast on the crossing", 1), ("paper", 1)])
def test_nothing_runs_away_in_ten_thousand_visits(rule: str, terms: int) -> None:
    """The rule of the paper does, sooner: it has the easiest visit of all."""
    task = Shifted(terms, 0.5, 2)
    method = AMAT(0.25, task.thresholds.tolist(), **FAST, **RULES.get(rule, {}))
    early = torch.stack([task.visit(method) for _ in range(1000)])[500:].amax(0)
    late = torch.stack([task.visit(method) for _ in range(3000 if rule == "paper" else 9000)])[-500:].amax(0)
    apart = (late - task.closed) / (0.5 * task.unit)  # in standard deviations of what a visit bears
    if rule == "paper":
        assert (late >= early).all()
        assert (apart > 3).all()
    else:
        assert (late < early + 0.75).all()
        assert (apart < 3).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("terms", [1, 3])
def test_margins_rest_on_the_floor_where_clean_losses_are_above_their_thresholds(rule: str, terms: int) -> None:
    objective, images, _, _ = linear_task(3, (2, 6), 2, terms)
    xi = objective(images).detach()
    xi[:, -1] -= 0.05  # one of the terms is enough
    for row, floor in ((xi.amin(0), None), (xi.amin(0), 0.1)):
        method = AMAT(0.25, row.tolist(), margin_min=floor, **FAST, **RULES[rule])
        method.margins.set(names(3), [2.0] * 3)
        for _ in range(12):
            step = method.step(objective, images, names(3))
        lowest = floor or (0.0625 if RULES[rule].get("start") == "estimate" else 0.25)
        assert method.margins.values().tolist() == pytest.approx([lowest] * 3)
        noise = (step.adversarial - images).flatten(1).norm(dim=1)
        torch.testing.assert_close(noise, torch.full_like(noise, lowest), rtol=1e-4, atol=0)


def test_a_cap_and_a_floor_hold() -> None:
    objective, images, _, _ = linear_task(3, (2, 6), 2)
    for rule in RULES.values():
        method = AMAT(0.25, [math.inf], margin_max=1.1, **FAST, **rule)
        for _ in range(8):
            method.step(objective, images, names(3))
        assert method.margins.values().tolist() == pytest.approx([1.1] * 3)


def test_a_cap_below_the_floor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"margin_max 0.1 is below 0.25, the floor .* lower delta, or set margin_min"):
        AMAT(0.25, [1.0], refinement="secant", margin_max=0.1)
    assert AMAT(0.25, [1.0], refinement="secant", margin_max=0.1, margin_min=0.05).lowest == 0.05


def test_the_first_margin_is_where_the_first_step_expects_the_threshold() -> None:
    """Of an affine loss that is the crossing itself; a sample whose loss is above its threshold has the floor. It is
    asked of the attack's own passes, and costs none."""
    slopes = uniform(2, 1, 4, seed=3)
    objective = Affine(slopes, torch.tensor([0.5, -0.25], dtype=torch.float64))
    images = torch.zeros(3, 1, 4, dtype=torch.float64)
    rises = slopes.flatten(1) @ slopes.sum(0).flatten() / slopes.sum(0).norm()  # of each term, with noise of norm 1
    for xi, expected in (([1.0, 0.25], 0.5 / rises.max()), ([0.4, 9.0], 0.125 / 4), ([9.0, 9.0], 3.0)):
        method = AMAT(0.125, xi, start="estimate", refinement="secant", margin_max=3.0, **FAST)
        radius = (method.step(objective, images, names(3)).adversarial - images).flatten(1).norm(dim=1)
        torch.testing.assert_close(radius, torch.full_like(radius, float(expected)), rtol=1e-5, atol=0)
        calls = 0

        def counted(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return objective(x)

        method.step(counted, images, [*names(2), "new"])
        first, calls = calls, 0
        method.step(counted, images, [*names(2), "new"])
        assert (first, calls) == (3 + 2, 3 + 2)


@pytest.mark.parametrize("rule", ["secant", "balanced", "paper"])
def test_a_first_visit_knows_what_its_first_step_has_seen(rule: Any) -> None:
    """Of exp(r): the line from 1 to exp(2) gives the estimate, and the one from there to exp(2) the margin."""

    def objective(images: Tensor) -> Tensor:  # rises by 2 with noise of norm 1
        return (images.flatten(1).sum(1, keepdim=True) / 2).exp()

    images, ids = torch.zeros(3, 1, 2, 2), ["met", "new", "sure"]
    images[2] = 1.0  # exp(2) on the clean image: above the threshold
    for steps, estimate in ((3, 2 * 3 / (math.exp(2) - 1)), (1, 2.0)):
        attack: dict[str, Any] = FAST if steps == 3 else {"steps": 1, "step_scale": 1.0}
        method = AMAT(0.125, [4.0], refinement=rule, start="estimate", start_max=2.0, margin_min=0.1, **attack)
        method.margins.set(["met"], [0.75])
        made = method.step(objective, images, ids).adversarial
        assert made is not None
        assert (made - images).flatten(1).norm(dim=1).tolist() == pytest.approx([0.75, estimate, 0.1], rel=1e-5)
        low = math.exp(estimate)
        known = estimate + (2 - estimate) * (4 - low) / (math.exp(2) - low) if steps == 3 else 6 / (math.exp(2) - 1)
        assert known < math.log(4)
        assert method.margins.get(["new", "sure"]).tolist() == pytest.approx([known, 0.1], rel=1e-5)


def test_a_first_visit_that_was_lost_is_still_to_come() -> None:
    """Also within the same epoch, before the processes agree on their margins."""
    broken = [True]

    def objective(images: Tensor) -> Tensor:
        return images.flatten(1).sum(1, keepdim=True) * (math.nan if broken[0] else 1.0)

    method = AMAT(0.125, [1.0], refinement="secant", start="estimate", start_max=2.0, margin_max=9.0, **FAST)
    method.step(objective, torch.zeros(1, 1, 2, 2), ["a"])
    assert method.margins.visits().tolist() == [0]
    broken[0] = False
    method.step(objective, torch.zeros(1, 1, 2, 2), ["a"])
    assert method.margins.get(["a"]).item() == pytest.approx(0.5)  # a loss that rises by 2 with noise of norm 1


# The margin of any sample


ANY: dict[str, Any] = {"refinement": "secant", "start": "estimate", "start_max": 2.0, "margin_max": 9.0}


def test_levels_are_drawn_from_all_margins_and_each_margin_follows_its_own_sample() -> None:
    """Of losses that rise in straight lines, whatever the noise: a margin is where its own meets the threshold."""
    slopes = torch.tensor([0.5, 1.0, 2.0, 4.0])

    def objective(images: Tensor) -> Tensor:
        return images.flatten(1).sum(1, keepdim=True) / 2 * slopes[: len(images), None]

    method = AMAT(0.125, [1.0], margin_of="any", **ANY, **FAST)
    images, ids = torch.zeros(4, 1, 2, 2), names(4)
    first = method.step(objective, images, ids).adversarial
    assert first is not None
    own = torch.tensor([2.0, 1.0, 0.5, 0.25])
    torch.testing.assert_close(first.flatten(1).norm(dim=1), own)  # new samples have their estimates
    torch.testing.assert_close(method.margins.get(ids), own)
    met: dict[int, set[float]] = {row: set() for row in range(4)}
    for _ in range(60):
        made = method.step(objective, images, ids).adversarial
        assert made is not None
        for row, level in enumerate(made.flatten(1).norm(dim=1).tolist()):
            met[row].add(round(level, 3))
        torch.testing.assert_close(method.margins.get(ids), own)
    assert all(levels == {0.25, 0.5, 1.0, 2.0} for levels in met.values())


@pytest.mark.parametrize("terms", [1, 3])
def test_margins_settle_near_the_closed_form_under_noise_of_any_size(terms: int) -> None:
    """Of a convex loss, which straight lines misjudge more the further they go."""
    objective, images, thresholds, closed = linear_task(32, (1, 4, 4), 2, terms)
    method = AMAT(0.125, thresholds.tolist(), margin_of="any", **ANY, **FAST)
    for _ in range(120):
        method.step(objective, images, names(32))
    share = method.margins.get(names(32)).double() / closed
    assert share.min() > 0.65
    assert share.max() < 1.4
    assert 0.8 < share.median() < 1.2


def test_draws_are_those_of_a_run_that_was_resumed() -> None:
    objective, images, thresholds, _ = linear_task(8, (1, 4, 4), 2)
    whole, ids = [AMAT(0.125, thresholds.tolist(), margin_of="any", seed=3, **ANY, **FAST) for _ in range(2)], names(8)
    for _ in range(3):
        whole[0].step(objective, images, ids)
    whole[1].load_state_dict(whole[0].state_dict())
    made = [method.step(objective, images, ids).adversarial for method in whole]
    assert torch.equal(made[0], made[1])
    levels = (made[0] - images).flatten(1).norm(dim=1)
    assert not torch.allclose(levels.float(), whole[0].margins.get(ids), rtol=0.01)


def test_empty_samples_keep_the_floor_where_levels_are_drawn() -> None:
    def objective(images: Tensor) -> Tensor:
        return images.flatten(1).sum(1, keepdim=True)

    objective.empty = [False, True, False]  # type: ignore[attr-defined]
    method = AMAT(0.125, [3.0], margin_of="any", empty_samples="floor", **ANY, **FAST)
    for _ in range(3):
        made = method.step(objective, torch.zeros(3, 1, 2, 2), names(3)).adversarial
        assert made is not None
        assert made[1].norm().item() == pytest.approx(method.lowest)
    assert len(method.margins) == 2


@pytest.mark.parametrize(
    "other", [{"refinement": "paper"}, {"refinement": "balanced"}, {"refinement": "crossing"}, {"train_on": "crossing"}]
)
def test_rules_that_judge_a_margin_at_itself_do_not_go_with_others(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="margin_of 'any' takes refinement 'secant' and train_on 'sphere'"):
        AMAT(0.125, [1.0], margin_of="any", **ANY | other, **FAST)
    with pytest.raises(ValueError, match="margin_of must be 'own' or 'any', got 'all'"):
        TrainingSettings(margin_of="all")  # type: ignore[arg-type]
    method = TrainingSettings(margin_of="any", preset="fast", delta=0.125, eps=1.0).make_method(
        "AMAT", Thresholds((1.0,), ("loss",))
    )
    assert method.drawn


def test_a_first_margin_is_twice_the_furthest_look_at_most() -> None:
    """What hardly rises is expected to bear any noise."""
    method = AMAT(0.125, [4.0], refinement="secant", start="estimate", start_max=2.0, margin_max=9.0, **FAST)
    method.step(lambda images: images.flatten(1).sum(1, keepdim=True) * 0.01, torch.zeros(1, 1, 2, 2), ["flat"])
    assert method.margins.get(["flat"]).item() == pytest.approx(4.0)


@pytest.mark.filterwarnings("error")
def test_noise_that_was_estimated_is_not_missed_in_half_precision() -> None:
    """A first visit has less noise than its attack began with, and that is no matter of digits."""
    method = AMAT(0.5, [0.5], refinement="secant", start="estimate", start_max=40.0, **FAST)
    method.step(lambda images: images.flatten(1).sum(1, keepdim=True), torch.zeros(2, 1, 2, 2).bfloat16(), names(2))


@pytest.mark.parametrize("norm", [2, math.inf])
def test_training_on_the_crossing_meets_the_threshold(norm: float) -> None:
    """Of an affine loss, exactly, where the attack goes beyond it; where it does not, at the end of the attack."""
    slopes = uniform(1, 1, 6, seed=3) - 0.3
    objective, images = Affine(slopes, torch.zeros(1, dtype=torch.float64)), torch.zeros(2, 1, 6, dtype=torch.float64)
    dual = slopes.norm() if norm == 2 else slopes.abs().sum()
    method = AMAT(0.05, [0.8], norm=norm, refinement="secant", train_on="crossing", **FAST)
    method.margins.set(names(2), [float(2.0 / dual), float(0.6 / dual)])
    step = method.step(objective, images, names(2))
    torch.testing.assert_close(objective(step.adversarial).flatten(), torch.tensor([0.8, 0.6]).double())
    moved = method.margins.values().double() * dual
    torch.testing.assert_close(moved, torch.tensor([(2.0 + 0.8) / 2, (0.6 + 0.8) / 2]).double(), rtol=1e-5, atol=1e-6)


def test_a_visit_moves_a_margin_by_half_of_itself_at_first_and_by_delta_later() -> None:
    objective, images, _, _ = linear_task(2, (2, 6), 2)
    for visits, most in ((1, (8.0 + 0.25) / 2 * 16 / 17), (16, (8.0 + 0.25) / 4), (5000, 0.25)):
        method = AMAT(0.25, [-math.inf], refinement="secant", **FAST)
        for _ in range(min(visits, 16)):
            method.margins.set(names(2), [8.0, 8.0])
        method.margins._visits[1:] = visits
        method.step(objective, images, names(2))
        moved = max(8.0 - most, 8.0 / 2)  # half the way to 0, where the clean loss is above the threshold
        assert method.margins.values().tolist() == pytest.approx([moved] * 2)


def test_the_expected_crossing() -> None:
    clean, xi = torch.tensor([[0.0, 0.0]]).expand(6, 2), torch.tensor([1.0, 2.0])
    near = torch.tensor([[2.0, 0.1], [0.5, 0.1], [0.5, 0.1], [0.0, -1.0], [0.5, 0.5], [math.nan, 0.0]])
    far = torch.tensor([[9.0, 9.0], [1.5, 0.2], [0.6, 0.2], [0.0, -1.0], [0.9, 4.0], [9.0, 0.0]])
    norms = torch.full((6,), 1.0)
    found = expected_crossing(clean, [(norms, near), (3 * norms, far)], xi)
    # between 0 and 1; between 1 and 3; beyond 3, as from 0 to 3; never; the second term between 1 and 3
    expected = torch.tensor([0.5, 2.0, 5.0, math.inf, 1 + 2 * 1.5 / 3.5, math.nan])
    torch.testing.assert_close(found, expected, equal_nan=True)
    # a second point at the same place says nothing
    same = expected_crossing(clean, [(norms, near), (norms, far)], xi)
    torch.testing.assert_close(same[:4], torch.tensor([0.5, 2.0, 2.0, math.inf]))
    above = expected_crossing(clean + 1.0, [(norms, near)], xi)
    assert above[:5].tolist() == [0.0] * 5


# Thresholds


@pytest.mark.filterwarnings("ignore:images in bfloat16 hold 0%")  # no loss rises here
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


# Samples with nothing to find


class Halves:
    """The sum of each image as its loss, of which some are empty."""

    def __init__(self, empty: list[bool] | None) -> None:
        self.empty = empty

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_sample_has_the_least_noise_and_teaches_no_margin(rule: str) -> None:
    images, ids = torch.tensor([0.0, -9.0, 0.3, -5.0]).view(4, 1, 1, 1), ["a", "void", "b", "void too"]
    given: dict[str, Any] = {"margin_min": 0.1, **FAST, **RULES[rule]}
    method = AMAT(0.25, [1.0], empty_samples="floor", **given)
    alone = AMAT(0.25, [1.0], **given)
    for _ in range(6):
        step = method.step(Halves([False, True, False, True]), images, ids)
        alone.step(Halves(None), images[[0, 2]], ["a", "b"])
        assert step.adversarial is not None
        noise = (step.adversarial - images).flatten()
        assert noise[[1, 3]].tolist() == pytest.approx([0.1, 0.1], abs=1e-5)
        assert method.margins.ids() == ["a", "b"]
    # What the others learn is what they learn without them.
    torch.testing.assert_close(method.margins.get(["a", "b"]), alone.margins.get(["a", "b"]), rtol=0, atol=0)
    others = AMAT(0.25, [1.0], empty_samples="as_others", **given)
    for _ in range(6):
        others.step(Halves([False, True, False, True]), images, ids)
    assert float(others.margins.get(["void"])) > 2 * float(others.margins.get(["a"])), "they bear noise of any size"


def test_empty_samples_cost_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no margin, and are met for the first time again and again."""
    given: dict[str, Any] = {"start": "estimate", "refinement": "secant", "empty_samples": "floor", **FAST}
    method, estimate, batches = AMAT(0.25, [1.0], **given), AMAT._estimate, []
    monkeypatch.setattr(AMAT, "_estimate", lambda *told: batches.append(ids) or estimate(*told))
    for ids in (["a", "b"], ["a", "b"], ["a", "void"], ["void", "void"]):
        step = method.step(Halves([name == "void" for name in ids]), torch.zeros(2, 1, 2, 2), ids)
        assert math.isfinite(float(step.logs["expanded"]))
        method.merge()  # as at the end of an epoch
    assert batches == [["a", "b"]]


def test_who_is_empty_is_said_of_every_sample() -> None:
    method = AMAT(0.25, [1.0], empty_samples="floor")
    with pytest.raises(ValueError, match="calls 1 samples empty or not, of 2"):
        method.step(Halves([True]), torch.zeros(2, 1, 2, 2), ["a", "b"])
    with pytest.raises(ValueError, match="empty_samples must be 'floor' or 'as_others', got 'none'"):
        AMAT(0.25, [1.0], empty_samples="none")
    with pytest.raises(ValueError, match="needs to be told which samples are empty"):  # as every classifier's
        method.step(Halves(None), torch.zeros(2, 1, 2, 2), ["a", "b"])
    for preset in ("fast", "paper"):
        assert TrainingSettings(preset=preset).for_method("AMAT").empty_samples == "as_others"


# Attacks that were lost


@pytest.mark.parametrize("rule", [*RULES, "paper"])
@pytest.mark.parametrize("start", ["delta", "estimate"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_an_attack_that_was_lost_moves_no_margin(rule: str, start: Any, value: float) -> None:
    """Its loss is that of the clean image, far below the threshold: the sample would seem to bear any noise."""
    given: dict[str, Any] = {**FAST, **RULES.get(rule, {}), "start": start, "start_max": 5.0, "margin_max": 40.0}
    whole, part = AMAT(0.25, [1.0], **given), AMAT(0.25, [1.0], **given)
    images, ids, lost = torch.tensor([0.0, 0.2, 0.4, 0.6]).view(4, 1, 1, 1), names(4), [1, 2]

    def broken(seen: Tensor) -> Tensor:
        return Cut.apply(seen, lost, value).flatten(1).sum(1, keepdim=True)  # type: ignore[no-any-return]

    for _ in range(4):
        whole.step(broken, images, ids)
        part.step(lambda seen: seen.flatten(1).sum(1, keepdim=True), images[[0, 3]], [ids[0], ids[3]])
        torch.testing.assert_close(whole.margins.get(ids)[[0, 3]], part.margins.values(), rtol=0, atol=0)
    if value == 0 and given.get("refinement", "paper") not in ("secant", "balanced"):  # as algorithm 1 has it
        assert (whole.margins.get(ids)[lost] >= 1.0).all()
        return
    assert whole.margins.get(ids)[lost].tolist() == [whole.margins.initial] * 2
    assert whole.margins.met(ids).tolist() == [4, 0, 0, 4]
    whole.merge()
    # The gradient is there again: they begin as samples that are new.
    whole.step(lambda seen: seen.flatten(1).sum(1, keepdim=True), images, ids)
    new = AMAT(0.25, [1.0], **given)
    new.step(lambda seen: seen.flatten(1).sum(1, keepdim=True), images[lost], [ids[row] for row in lost])
    torch.testing.assert_close(whole.margins.get(ids)[lost], new.margins.values(), rtol=0, atol=0)


def test_a_sample_that_is_twice_in_a_batch_has_made_two_visits() -> None:
    """Once it bears its noise, once it does not."""
    images = torch.tensor([0.0, 3.0]).view(2, 1, 1, 1)  # the second is above the threshold
    expected = {"balanced": 1.0, "paper": (1.0 + 0.25) * 1.0, "secant": (1.25 + 0.5) / 2}
    for rule, value in expected.items():
        method = AMAT(0.25, [1.5], refinement=rule, steps=2, step_scale=1.0, margin_min=0.0)  # type: ignore[arg-type]
        method.margins.set(["a"], [1.0])
        method.step(lambda seen: seen.flatten(1).sum(1, keepdim=True), images, ["a", "a"])
        assert method.margins.get(["a"]).item() == pytest.approx(value), rule
        assert method.margins.met(["a"]).item() == 3


def test_line_9_asks_the_image_that_is_trained_on() -> None:
    """Where it was not pulled back, whatever the loss was on the way."""

    def hill(seen: Tensor) -> Tensor:
        place = seen.flatten(1).sum(1, keepdim=True)
        return place + 3 * torch.exp(-(((place - 0.5) / 0.05) ** 2))

    method = AMAT(1.0, [2.0], train_on="crossing", steps=2, step_scale=1.0)
    step = method.step(hill, torch.zeros(1, 1, 1, 1), ["a"])
    assert step.adversarial is not None
    assert step.adversarial.item() == pytest.approx(1.0)
    assert method.margins.get(["a"]).item() == pytest.approx(2.0)
