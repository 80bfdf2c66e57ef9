"""Training methods against closed forms of a linear model and gradients worked out apart from them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed.methods import AMAT, AT, DPAAT, SAT, STD, TRADES
from advmed.thresholds import RunningThresholds, Thresholds

RANKS = [(2, 7), (3, 4, 6), (2, 5, 4, 3)]  # (C, L), (C, H, W), (C, D, H, W)
ORDERS = [2, math.inf]
QUICK: dict[str, Any] = {"steps": 4, "step_scale": 2.0}


def names(count: int) -> list[str]:
    return [f"case_{i}" for i in range(count)]


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear_task(
    tiny: SimpleNamespace, batch: int, shape: tuple[int, ...], p: float, terms: int = 1
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A frozen linear model, images, thresholds, and each sample's closed-form radius, between about 0.3 and 3."""
    weight = uniform(*shape, seed=1) - 0.5
    dual = weight.norm() if p == 2 else weight.abs().sum()
    labels = 1.0 - 2.0 * (torch.arange(batch, dtype=torch.float64) % 2)
    scales = torch.tensor([1.0, 0.6, 1.7], dtype=torch.float64)[:terms]
    offsets = torch.tensor([0.0, 0.3, -0.2], dtype=torch.float64)[:terms]
    objective = tiny.Logistic(weight, labels, scales, offsets)
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
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("shape", RANKS)
@pytest.mark.parametrize(("p", "terms"), [(2, 1), (2, 3), (math.inf, 1), (math.inf, 2)])
def test_margins_settle_at_the_closed_form(
    tiny: SimpleNamespace, refinement: Any, batch: int, shape: tuple[int, ...], p: float, terms: int
) -> None:
    objective, images, thresholds, closed = linear_task(tiny, batch, shape, p, terms)
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
def test_crossing_brings_margins_down_that_are_too_large(tiny: SimpleNamespace, p: float) -> None:
    """As when the model has moved: the paper's refinement leaves them where they are."""
    objective, images, thresholds, closed = linear_task(tiny, 3, (2, 4, 4), p)
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


def test_a_path_that_ends_inside_its_ball_refines_to_the_noise_reached(tiny: SimpleNamespace) -> None:
    """step_scale 0.5: the last iterate is half way out, so a margin too large becomes (E/2 + E)/2."""
    objective, images, thresholds, closed = linear_task(tiny, 3, (2, 6), 2)
    method, ids = AMAT(0.1, thresholds.tolist(), steps=10, step_scale=0.5), names(3)
    method.margins.set(ids, closed * 3)
    method.step(objective, images, ids)
    torch.testing.assert_close(method.margins.get(ids).double(), closed * 2.25, rtol=1e-5, atol=0)
    crossing = AMAT(0.1, thresholds.tolist(), steps=10, step_scale=0.5, refinement="crossing")
    crossing.margins.set(ids, closed * 3)
    crossing.step(objective, images, ids)
    # Iterates at 0, 0.15, ... 1.5 times the closed form; 0.9 is the last one below the threshold.
    torch.testing.assert_close(crossing.margins.get(ids).double(), closed * 1.95, rtol=1e-5, atol=0)


@pytest.mark.parametrize("threshold", [0.7, torch.tensor(0.7), [0.7], (0.7,), torch.tensor([0.7])])
def test_one_threshold_as_a_plain_number(threshold: Any) -> None:
    assert AMAT(0.1, threshold).thresholds.values == pytest.approx((0.7,))


@pytest.mark.parametrize("terms", [1, 3])
def test_infinite_thresholds(tiny: SimpleNamespace, terms: int) -> None:
    objective, images, _, _ = linear_task(tiny, 3, (2, 6), 2, terms)
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


def test_a_threshold_met_exactly_is_not_below(tiny: SimpleNamespace) -> None:
    objective = tiny.Affine(torch.zeros(1, 1, 4), torch.tensor([2.0]))
    for xi, grown in ((2.0, False), (2.0000002, True)):
        method = AMAT(0.5, [xi], **QUICK)
        method.step(lambda x, o=objective: o(x) + 0 * x.flatten(1).sum(1, keepdim=True), torch.zeros(1, 1, 4), ["a"])
        assert method.margins.get(["a"]).item() == (1.0 if grown else 0.25)  # flat: no noise was reached


def test_visits_bound_the_margins_while_training(tiny: SimpleNamespace) -> None:
    """Random visits with duplicates in a batch: the noise of a sample's v-th visit is at most v * delta."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    data, labels = uniform(12, 3, 8, 8, dtype=torch.float32), torch.arange(12) % 4
    model = tiny.cnn(normalise=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    method, visits = AMAT(0.3, [1.4], refinement="crossing", **QUICK), dict.fromkeys(names(12), 0)
    for _ in range(25):
        index = torch.randint(12, (5,), generator=rng)
        ids = [f"case_{i}" for i in index.tolist()]
        step = method.step(tiny.Classifier(model, labels[index]), data[index], ids)
        noise = (step.adversarial - data[index]).flatten(1).norm(dim=1)
        for name, length in zip(ids, noise.tolist(), strict=True):
            assert length <= (visits[name] + 1) * 0.3 * (1 + 1e-4)
        for name in ids:
            visits[name] += 1
        optimiser.zero_grad()
        step.loss.backward()
        optimiser.step()
    table = dict(zip(method.margins.ids(), method.margins.visits().tolist(), strict=True))
    assert table == {name: count for name, count in visits.items() if count}
    assert method.margins.values().max() > 0.6


def test_duplicates_in_a_batch_use_one_margin_and_take_one_update(tiny: SimpleNamespace) -> None:
    objective, images, thresholds, _ = linear_task(tiny, 3, (2, 6), 2)
    method = AMAT(0.25, thresholds.tolist(), **QUICK)
    step = method.step(objective, images, ["a", "b", "a"])
    lengths = (step.adversarial - images).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((3,), 0.25, dtype=torch.float64))
    assert method.margins.ids() == ["a", "b"]
    assert method.margins.values().tolist() == [0.5, 0.5]
    assert method.margins.visits().tolist() == [2, 1]


@pytest.mark.parametrize("refinement", ["paper", "crossing"])
def test_a_broken_sample_keeps_its_margin_and_harms_no_other(tiny: SimpleNamespace, refinement: Any) -> None:
    ids = names(3)
    margins = []
    for broken in (False, True):
        objective, images, thresholds, _ = linear_task(tiny, 3, (2, 6), 2)
        images[1, 0, 3] = math.nan if broken else images[1, 0, 3]
        method = AMAT(0.25, thresholds.tolist(), refinement=refinement, **QUICK)
        for _ in range(4):
            step = method.step(objective, images, ids)
        margins.append(method.margins.get(ids))
        assert step.logs["nonfinite"].item() == (QUICK["steps"] if broken else 0)
    assert torch.equal(margins[0][[0, 2]], margins[1][[0, 2]])
    assert margins[1][1] == 0.25


def test_an_infinite_loss_is_a_loss_above_its_threshold() -> None:
    def infinite(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True) * 0 + math.inf

    method = AMAT(0.5, [1.0], refinement="crossing", **QUICK)
    method.step(infinite, torch.zeros(1, 1, 4), ["a"])
    assert method.margins.get(["a"]).item() == 0.25


# Losses and gradients


class Coupled:
    """Two terms of a CNN, and a batch loss of the host's own that is not the mean of their sums."""

    names = ("ce", "sharp")

    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        self.model, self.labels = model, labels
        self.events: list[str] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.events.append("forward" if torch.is_grad_enabled() else "forward without gradient")
        logits = self.model(images)
        ce = nn.functional.cross_entropy(logits, self.labels, reduction="none")
        return torch.stack((ce, logits.square().mean(1)), 1)

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        terms = self(images)
        return terms.square().sum().sqrt(), terms


class Mean(Coupled):
    """The same without a loss of its own."""

    loss = None


def cnn_task(tiny: SimpleNamespace, kind: type[Coupled], **settings: Any) -> tuple[Coupled, Tensor]:
    model = tiny.cnn(**settings).double()
    return kind(model, torch.tensor([0, 1, 2, 3, 1])), uniform(5, 3, 8, 8)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def host_loss(objective: Coupled, images: Tensor) -> Tensor:
    terms = objective(images)
    return terms.square().sum().sqrt() if type(objective) is Coupled else terms.sum() / len(images)


def assert_close(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert sum(a.abs().sum() for a in first) > 0


METHODS: dict[str, Any] = {
    "STD": (lambda **a: STD(), {"clean": 1.0}),
    "SAT": (lambda **a: SAT(0.7, **QUICK, **a), {"clean": 0.5, "attacked": 0.5}),
    "AT": (lambda **a: AT(0.7, **QUICK, **a), {"attacked": 1.0}),
    "AMAT": (lambda **a: AMAT(0.7, [9, 9], **QUICK, **a), {"clean": 0.5, "attacked": 0.5}),
    "AMAT crossing": (
        lambda **a: AMAT(0.7, [9, 9], refinement="crossing", **QUICK, **a),
        {"clean": 0.5, "attacked": 0.5},
    ),
}


@pytest.mark.parametrize("kind", [Coupled, Mean])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("p", ORDERS)
def test_the_loss_is_the_mix_that_the_method_promises(
    tiny: SimpleNamespace, name: str, kind: type[Coupled], p: float
) -> None:
    make, weights = METHODS[name]
    objective, images = cnn_task(tiny, kind)
    method = make(norm=p)
    step = method.step(objective, images, names(5))
    step.loss.backward()
    found = gradients(objective.model)
    assert (step.adversarial is None) == (name == "STD")
    parts = {"clean": images, "attacked": step.adversarial}
    expected = sum(weight * host_loss(objective, parts[part]) for part, weight in weights.items())
    expected.backward()
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    assert_close(found, gradients(objective.model))
    if "attacked" in weights:
        noise = (step.adversarial - images).flatten(1)
        length = noise.norm(dim=1) if p == 2 else noise.abs().amax(1)
        torch.testing.assert_close(length, torch.full((5,), 0.7, dtype=torch.float64), rtol=1e-6, atol=0)
        torch.testing.assert_close(step.logs["loss_adversarial"], host_loss(objective, step.adversarial).detach())
        assert (objective(step.adversarial).sum(1) > objective(images).sum(1)).all()
    if "clean" in weights:
        torch.testing.assert_close(step.logs["loss_clean"], host_loss(objective, images).detach())
        torch.testing.assert_close(step.terms, objective(images).detach())
    else:
        assert step.terms is None
    for value in step.logs.values():
        assert value.shape == ()
        assert not value.requires_grad


@pytest.mark.parametrize("kind", [Coupled, Mean])
@pytest.mark.parametrize("name", METHODS)
def test_backward_in_parts_gives_the_same_gradients(tiny: SimpleNamespace, name: str, kind: type[Coupled]) -> None:
    results = []
    for parts in (False, True):
        objective, images = cnn_task(tiny, kind)
        method = METHODS[name][0]()

        def backward(loss: Tensor, events: list[str] = objective.events) -> None:
            assert loss.shape == ()
            events.append("backward")
            loss.backward()

        step = method.step(objective, images, names(5), backward if parts else None)
        assert step.loss.requires_grad == (not parts)
        if not parts:
            step.loss.backward()
        else:
            training = len(METHODS[name][1])
            assert objective.events[-2 * training :] == ["forward", "backward"] * training  # no two graphs at a time
        results.append((step, gradients(objective.model)))
    torch.testing.assert_close(results[0][0].loss.detach(), results[1][0].loss, rtol=1e-12, atol=0)
    assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", [Coupled, Mean])
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("p", ORDERS)
def test_sat_without_noise_is_standard_training(
    tiny: SimpleNamespace, kind: type[Coupled], parts: bool, p: float
) -> None:
    results = []
    for method in (STD(), SAT(0, steps=3, norm=p), AT(0, steps=3, norm=p)):
        objective, images = cnn_task(tiny, kind, normalise=True)
        backward = (lambda loss: loss.backward()) if parts else None
        step = method.step(objective, images, names(5), backward)
        if not parts:
            step.loss.backward()
        if step.adversarial is not None:
            assert torch.equal(step.adversarial, images)
        results.append((step.loss.detach(), gradients(objective.model)))
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-14, atol=0)
        assert_close(found, results[0][1])


@pytest.mark.parametrize("name", METHODS)
def test_number_of_passes(tiny: SimpleNamespace, name: str) -> None:
    objective, images = cnn_task(tiny, Mean)
    METHODS[name][0]().step(objective, images, names(5))
    training = len(METHODS[name][1])
    attack = QUICK["steps"] if "attacked" in METHODS[name][1] else 0
    assert objective.events == ["forward"] * (attack + training)


@pytest.mark.parametrize("name", ["SAT", "AT", "AMAT", "AMAT crossing"])
def test_batch_norm_learns_from_the_training_passes_alone(tiny: SimpleNamespace, name: str) -> None:
    objective, images = cnn_task(tiny, Mean, normalise=True)
    twin = copy.deepcopy(objective.model)
    step = METHODS[name][0]().step(objective, images, names(5))
    if "clean" in METHODS[name][1]:
        twin(images)
    twin(step.adversarial)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(objective.model.state_dict()[key], value, rtol=1e-12, atol=0)
    assert twin[1].num_batches_tracked == len(METHODS[name][1])


@pytest.mark.parametrize(
    ("make", "learns"),
    [
        (lambda: STD(), True),
        (lambda: SAT(0.7, **QUICK), True),
        (lambda: AT(0.7, **QUICK), False),
        (lambda: AMAT(0.7, [9, 9], **QUICK), True),
        (lambda: TRADES(0.7, **QUICK), True),
        (lambda: DPAAT(0.7, **QUICK), True),
        (lambda: DPAAT(0.7, sync_weight=0, **QUICK), False),
    ],
)
def test_a_method_says_whether_it_learns_from_clean_images(tiny: SimpleNamespace, make: Any, learns: bool) -> None:
    """It does where the gradients of a step change with what only the clean images pass through."""
    objective, images = tiny.Compared(tiny.cnn().double(), torch.tensor([0, 1, 2, 3, 1])), uniform(5, 3, 8, 8)
    gain, seen = torch.ones(5, 1, dtype=torch.float64, requires_grad=True), []

    def on_clean_images(model: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        seen.append(torch.equal(inputs[0], images))
        return logits * gain if seen[-1] else logits

    objective.model.register_forward_hook(on_clean_images)
    method = make()
    method.step(objective, images, names(5)).loss.backward()
    assert any(seen)
    assert method.learns_from_clean is learns
    assert (gain.grad is not None and bool(gain.grad.any())) is learns


def test_the_random_state_moves_as_in_standard_training(tiny: SimpleNamespace) -> None:
    """Dropout and random starts: after the step torch's generator has served the training passes and nothing else."""
    states = []
    for passes, method in ((1, AT(0.5, random_start=1.0, **QUICK)), (2, SAT(0.5, random_start=1.0, **QUICK))):
        objective, images = cnn_task(tiny, Mean, dropout=0.4)
        torch.manual_seed(0)
        for _ in range(passes):
            objective(images)
        states.append(torch.get_rng_state())
        torch.manual_seed(0)
        method.step(objective, images, names(5))
        assert torch.equal(torch.get_rng_state(), states[-1])


def test_half_precision_images_do_not_round_the_thresholds() -> None:
    """xi = 1.001 is 1 in bfloat16: a loss of 1 would not be below it."""
    xi = 1.001
    running = RunningThresholds(["a"])
    running.update(torch.tensor([[xi]], dtype=torch.float64))
    for thresholds in ([xi], running):
        method = AMAT(0.5, thresholds, **QUICK)
        method.step(lambda x: x.flatten(1).sum(1, keepdim=True) * 0 + 1, torch.zeros(1, 1, 4).bfloat16(), ["a"])
        assert method.margins.get(["a"]).item() == 1.0


# Random starts, thresholds that run, state


def test_random_starts_are_repeatable_and_differ_from_step_to_step(tiny: SimpleNamespace) -> None:
    objective, images = cnn_task(tiny, Mean)

    def run(count: int, **settings: Any) -> list[Tensor]:
        method = SAT(0.5, steps=2, step_scale=0.5, random_start=1.0, **settings)
        return [method.step(objective, images, names(5)).adversarial for _ in range(count)]

    first, again, other = run(2), run(2), run(2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_self_calibration_uses_the_thresholds_before_the_batch_and_learns_its_clean_terms(
    tiny: SimpleNamespace,
) -> None:
    objective, images, _, _ = linear_task(tiny, 3, (2, 6), 2)
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


@pytest.mark.parametrize("thresholds", ["fixed", "running"])
def test_a_resumed_run_continues_to_the_bit(tiny: SimpleNamespace, thresholds: str) -> None:
    objective, images, fixed, _ = linear_task(tiny, 5, (2, 6), 2, 2)

    def fresh() -> AMAT:
        xi = fixed.tolist() if thresholds == "fixed" else RunningThresholds(["a", "b"], "mean+2std", memory=12)
        return AMAT(0.7, xi, refinement="crossing", random_start=0.5, seed=4, **QUICK)

    whole = fresh()
    for i in range(6):
        whole.step(objective, images, [f"{i % 2}_{j}" for j in range(5)])
        if i == 2:
            state = json.loads(json.dumps(whole.state_dict(), allow_nan=False))
            resumed = fresh()
            resumed.load_state_dict(state)
        elif i > 2:
            resumed.step(objective, images, [f"{i % 2}_{j}" for j in range(5)])
    assert resumed.state_dict() == whole.state_dict()
    assert len(whole.margins) == 10
    assert whole.margins.values().unique().numel() > 3


def test_the_state_of_another_method_is_refused() -> None:
    state = SAT(1.0).state_dict()
    with pytest.raises(ValueError, match="the saved state is of the method 'SAT', this run trains 'AMAT'"):
        AMAT(0.1, [1.0]).load_state_dict(state)
    with pytest.raises(ValueError, match="the saved state is of the method None, this run trains 'STD'"):
        STD().load_state_dict({})


def test_merging_keeps_margins_inside_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that both grew to the bound: growth adds up, and would pass it."""
    methods = [AMAT(0.5, [1.0], margin_max=1.0, margin_min=0.2) for _ in range(2)]
    for method in methods:
        method.margins.set(["up", "down"], [1.0, 0.2])
    changes = [method.margins.changes() for method in methods]
    for method in methods:
        merge = method.margins.merge
        monkeypatch.setattr(method.margins, "merge", lambda merge=merge: merge(changes))
        method.merge()
        torch.testing.assert_close(method.margins.get(["up", "down"]), torch.tensor([1.0, 0.2]))
        assert method.margins.changes()["ids"] == []


def test_attack_seconds_are_measured(tiny: SimpleNamespace) -> None:
    objective, images = cnn_task(tiny, Mean)
    method = SAT(0.5, **QUICK)
    assert method.clock.drain() == 0
    method.step(objective, images, names(5))
    assert 0 < method.clock.drain() < 60
    assert method.clock.drain() == 0


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAT(-1), r"eps must be a finite number >= 0, got -1"),
        (lambda: AT(math.nan), r"eps must be a finite number >= 0, got nan"),
        (lambda: AT(math.inf), r"eps must be a finite number >= 0, got inf"),
        (lambda: SAT(1, steps=0), r"steps must be a whole number >= 1, got 0"),
        (lambda: SAT(1, step_scale=0), r"step_scale must be positive"),
        (lambda: SAT(1, norm=1), r"norm must be 2 or inf"),
        (lambda: SAT(1, random_start=2), r"random_start must be a fraction of the radius"),
        (lambda: SAT(1, bounds=(1, 0)), r"bounds must be \(lowest, highest\)"),
        (lambda: AMAT(0, [1.0]), r"delta must be a finite number > 0, got 0"),
        (lambda: AMAT(-0.1, [1.0]), r"delta must be a finite number > 0, got -0.1"),
        (lambda: AMAT(0.1, []), r"0 thresholds for 0 loss terms"),
        (lambda: AMAT(0.1, [math.nan]), r"a threshold is NaN"),
        (lambda: AMAT(0.1, [1.0], refinement="mean"), r"refinement must be 'paper' or 'crossing', got 'mean'"),
        (lambda: AMAT(0.1, [1.0], margin_min=-1), r"margin_min must be a finite number >= 0, got -1"),
        (lambda: AMAT(0.1, [1.0], margin_max=0), r"margin_max must be a finite number > 0, got 0"),
        (lambda: AMAT(0.1, [1.0], margin_min=2, margin_max=1), r"margin_min 2 is above margin_max 1"),
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("refinement", ["paper", "crossing"])
def test_steps_that_do_not_fit(tiny: SimpleNamespace, refinement: Any) -> None:
    objective, images = cnn_task(tiny, Mean)
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


def test_numbers_as_thresholds_ask_for_no_names(tiny: SimpleNamespace) -> None:
    objective, images = cnn_task(tiny, Mean)
    for thresholds in ([9.0, 9.0], torch.tensor([9.0, 9.0]), Thresholds((9.0, 9.0), Mean.names)):
        method = AMAT(0.1, thresholds, **QUICK)
        method.step(objective, images, names(5))
        torch.testing.assert_close(method.margins.values(), torch.full((5,), 0.2))
