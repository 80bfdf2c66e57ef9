"""What training methods share: the mix of their loss, their passes, their bounds, and the errors of their settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed import ClassificationObjective, Thresholds, TrainingSettings, ifgsm
from advmed.methods import AMAT, AT, DPAAT, METHODS, SAT, STD, TRADES, AdaptiveRadiusMethod
from advmed.testing.objectives import Classification
from helpers.tensors import ORDERS, QUICK, assert_close, comparing, divergence, gradients, lengths, loss_by_hand, names


class Plain(Classification):
    """The same classifier without a loss of its own for a batch."""

    loss = None


def task(kind: type[Classification], **settings: bool | float) -> tuple[Classification, Tensor]:
    objective, images = comparing(**settings)
    return kind(objective.model, objective.labels), images


MIXED: dict[str, tuple[Any, dict[str, float]]] = {
    "STD": (lambda **a: STD(), {"clean": 1.0}),
    "SAT": (lambda **a: SAT(0.7, **a), {"clean": 0.5, "attacked": 0.5}),
    "AT": (lambda **a: AT(0.7, **a), {"attacked": 1.0}),
    "AMAT": (lambda **a: AMAT(0.7, [99, 99], **a), {"clean": 0.5, "attacked": 0.5}),
    "TRADES": (lambda **a: TRADES(0.7, beta=2.5, **a), {"clean": 1.0, "sync": 2.5}),
    "DPAAT": (lambda **a: DPAAT(0.7, sync_weight=3.0, **a), {"attacked": 1.0, "sync": 3.0}),
    "DPAAT, nothing compared": (lambda **a: DPAAT(0.7, sync_weight=0, **a), {"attacked": 1.0}),
}


@pytest.mark.parametrize("kind", [Classification, Plain])
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("p", ORDERS)
def test_the_loss_is_the_mix_that_the_method_promises(name: str, kind: type[Classification], p: float) -> None:
    make, weights = MIXED[name]
    objective, images = task(kind)
    step = make(norm=p, **QUICK).step(objective, images, names(5))
    step.loss.backward()
    found = gradients(objective.model)
    assert (step.adversarial is None) == (name == "STD")
    clean, terms, logits = loss_by_hand(objective, images)
    attacked, attacked_terms, other = loss_by_hand(objective, images if name == "STD" else step.adversarial)
    if kind is Plain and "sync" not in weights:
        clean, attacked = terms.sum(1).mean(), attacked_terms.sum(1).mean()
    parts = {"clean": clean, "attacked": attacked, "sync": divergence(logits, other).mean()}
    expected = sum(weight * parts[part] for part, weight in weights.items())
    expected.backward()
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    assert_close(found, gradients(objective.model))

    if name == "DPAAT, nothing compared":  # no loss of the host's own, for want of a training pass
        clean = terms.sum(1).mean()
    logs = {"loss_clean": clean, "loss_adversarial": attacked, "loss_sync": parts["sync"]}
    absent = {"STD": {"loss_adversarial"}, "AT": {"loss_clean"}}.get(name, set())
    absent = absent if "sync" in weights else absent | {"loss_sync"}
    assert {key for key in logs if key not in step.logs} == absent
    for key in logs.keys() - absent:
        torch.testing.assert_close(step.logs[key], logs[key].detach(), rtol=1e-12, atol=0)
    assert (step.terms is None) == (name == "AT")
    if step.terms is not None:
        torch.testing.assert_close(step.terms, terms.detach(), rtol=1e-12, atol=0)
    if name != "STD":
        radius = torch.full((5,), 0.7, dtype=torch.float64)
        torch.testing.assert_close(lengths(step.adversarial - images, p), radius, rtol=1e-6, atol=0)
        assert divergence(logits, other).mean() > 0.01
        assert name == "TRADES" or (attacked_terms.sum(1) > terms.sum(1)).all()


@pytest.mark.parametrize("kind", [Classification, Plain])
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("p", ORDERS)
def test_without_noise_it_is_standard_training(kind: type[Classification], parts: bool, p: float) -> None:
    """So it is with a distance of 0."""
    results = []
    methods = [STD(), SAT(0, steps=3, norm=p), AT(0, steps=3, norm=p), DPAAT(0, sync_weight=0, steps=3, norm=p)]
    if kind is Classification:
        methods += [TRADES(0, steps=3, norm=p), DPAAT(0, sync_weight=5, steps=3, norm=p)]
    for method in methods:
        objective, images = task(kind, normalise=True)
        backward = (lambda loss: loss.backward()) if parts else None
        step = method.step(objective, images, names(5), backward)
        if not parts:
            step.loss.backward()
        assert step.adversarial is None or torch.equal(step.adversarial, images)
        assert step.logs.get("loss_sync", 0) == 0
        results.append((step.loss.detach(), gradients(objective.model)))
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-14, atol=0)
        assert_close(found, results[0][1])


ATTACK = ["terms"] * 4


@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (STD, ["training", "backward"]),
        (lambda: SAT(0.7, **QUICK), [*ATTACK, "training", "backward", "training", "backward"]),
        (lambda: AT(0.7, **QUICK), [*ATTACK, "training", "backward"]),
        (lambda: AMAT(0.7, [9, 9], **QUICK), ["training", "backward", *ATTACK, "training", "backward"]),
        (
            lambda: AMAT(0.7, [9, 9], refinement="crossing", **QUICK),
            ["training", "backward", *ATTACK, "training", "backward"],
        ),
        (lambda: TRADES(0.7, **QUICK), ["training", *["predictions"] * 4, "training", "backward"]),
        (lambda: DPAAT(0.7, **QUICK), [*ATTACK, "training", "training", "backward"]),
        (lambda: DPAAT(0.7, sync_weight=0, **QUICK), [*ATTACK, "terms without gradient", "training", "backward"]),
    ],
)
def test_passes_and_when_they_are_back_propagated(make: Callable[[], Any], passes: list[str]) -> None:
    """No two graphs live at a time, where no distance joins them."""
    objective, images = comparing()

    def backward(loss: Tensor) -> None:
        objective.passes.append("backward")
        loss.backward()

    make().step(objective, images, names(5), backward)
    assert objective.passes == passes


@pytest.mark.parametrize("name", ["TRADES", "DPAAT", "MART"])
@pytest.mark.parametrize("missing", ["predictions", "loss_and_predictions", "distance"])
def test_methods_that_compare_need_predictions(name: str, missing: str) -> None:
    objective, images = comparing()
    setattr(objective, missing, None)
    message = f"^{name} compares predictions .* Classification gives none: it has no {missing} "
    with pytest.raises(TypeError, match=message):
        make(name).step(objective, images, names(5))
    assert objective.calls == 0


def test_another_seed_gives_other_random_starts() -> None:
    objective, images = comparing()
    for kind in (SAT, TRADES):
        methods = (kind(0.5, steps=2, step_scale=0.5, random_start=1.0, seed=seed) for seed in (0, 1))
        first, other = (method.step(objective, images, names(5)).adversarial for method in methods)
        assert not torch.equal(first, other)


def test_attack_seconds_are_measured() -> None:
    objective, images = comparing()
    method = SAT(0.5, **QUICK)
    assert method.clock.drain() == 0
    method.step(objective, images, names(5))
    assert 0 < method.clock.drain() < 60
    assert method.clock.drain() == 0


@pytest.mark.parametrize(
    ("make", "moves", "expected"),
    [
        # Growth of two processes adds up, and would pass the bound that both have reached.
        (
            lambda: AMAT(0.5, [1.0], margin_max=1.0, margin_min=0.2),
            [{"up": 1.0, "down": 0.2}] * 2,
            {"up": 1.0, "down": 0.2},
        ),
        # Shrinking is a step of a given size for DPAAT, not a factor.
        (
            lambda: DPAAT(0.5, eps_min=0.125, eps_max=1.0, step_size=0.25),
            [
                {"up": 0.75, "down": 0.25, "both": 0.75, "one up": 0.75, "one down": 0.25},
                {"up": 0.75, "down": 0.25, "both": 0.25},
            ],
            {"up": 1.0, "down": 0.125, "both": 0.5, "one up": 0.75, "one down": 0.25},
        ),
    ],
)
def test_merging_keeps_sizes_inside_their_bounds(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], AdaptiveRadiusMethod],
    moves: list[dict[str, float]],
    expected: dict[str, float],
) -> None:
    methods = [make() for _ in moves]
    for method, moved in zip(methods, moves, strict=True):
        method.store.set(list(moved), list(moved.values()))
    changes = [method.store.changes() for method in methods]
    for method in methods:
        merge = method.store.merge
        monkeypatch.setattr(method.store, "merge", lambda merge=merge: merge(changes))
        method.merge()
        torch.testing.assert_close(method.store.get(list(expected)), torch.tensor(list(expected.values())))
        assert method.store.changes()["ids"] == []


def test_the_state_of_another_method_is_refused_by_name() -> None:
    """Of one that has sizes for its samples, too."""
    amat, dpaat, message = AMAT(0.1, [1.0]), DPAAT(0.1), "the saved state is of the method {!r}, this run trains {!r}"
    for saved, method in ((SAT(1.0), amat), (amat, dpaat), (dpaat, amat), (SAT(1.0), TRADES(1.0))):
        with pytest.raises(ValueError, match=message.format(saved.name, method.name)):
            method.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=message.format(None, "STD")):
        STD().load_state_dict({})


# Settings


def make(name: str, **settings: Any) -> Any:
    """The method with what it cannot do without, unless it is given by name."""
    needed = {"DPAAT": {"eps_0": 1.0}, "AMAT": {"delta": 1.0, "thresholds": [1.0]}}
    return METHODS[name](**(needed.get(name, {"eps": 1.0}) | settings))


@pytest.mark.parametrize(
    ("methods", "setting", "allowed"),
    [
        ("SAT AT TRADES MART FAT", "eps", ">= 0"),
        ("DPAAT", "eps_0", ">= 0"),
        ("DPAAT", "eps_min", ">= 0"),
        ("DPAAT", "eps_max", ">= 0"),
        ("DPAAT", "step_size", ">= 0"),
        ("DPAAT", "sync_weight", ">= 0"),
        ("MART", "kl_weight", ">= 0"),
        ("AMAT", "margin_min", ">= 0"),
        ("AMAT", "margin_max", "> 0"),
        ("AMAT", "delta", "> 0"),
        ("TRADES", "beta", "> 0"),
    ],
)
def test_numbers_out_of_range(methods: str, setting: str, allowed: str) -> None:
    for name in methods.split():
        for value in (-1, -0.5, math.nan, math.inf, *([] if allowed == ">= 0" else [0])):
            with pytest.raises(ValueError, match=f"^{setting} must be a finite number {allowed}, got {value}$"):
                make(name, **{setting: value})


@pytest.mark.parametrize("name", [name for name in METHODS if name != "STD"])
def test_an_attack_out_of_range(name: str) -> None:
    """Some of what PGD refuses (tests/attacks/test_gradients.py), and bounds."""
    for setting, value, message in (
        ("steps", 0, "steps must be a whole number >= 1, got 0"),
        ("step_scale", 0, "step_scale must be positive"),
        ("norm", 1, "norm must be 2 or inf"),
        ("random_start", 2, r"random_start must be a fraction of the radius in \[0, 1\], got 2"),
        ("bounds", (1, 0), r"bounds must be \(lowest, highest\)"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            make(name, **{setting: value})


SIZES = "perturbation sizes need eps_min <= eps_0 <= eps_max, got eps_min {}, eps_0 {}, eps_max {}$"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("AMAT", {"thresholds": []}, "0 thresholds for 0 loss terms"),
        ("AMAT", {"thresholds": [math.nan]}, "a threshold is NaN"),
        (
            "AMAT",
            {"refinement": "mean"},
            "refinement must be 'paper' or 'crossing' or 'secant' or 'balanced', got 'mean'",
        ),
        ("AMAT", {"margin_min": 2, "margin_max": 1}, "margin_min 2 is above margin_max 1"),
        ("TRADES", {"random_start": 0}, "TRADES needs random_start > 0: on the clean image the gradient of its"),
        ("TRADES", {"random_start": False}, "TRADES needs random_start > 0: on the clean image the gradient of its"),
        ("FAT", {"tau": -1}, "tau must be a whole number >= 0, got -1"),
        ("DPAAT", {"eps_min": 1.5}, SIZES.format("1.5", "1", "2")),
        ("DPAAT", {"eps_max": 0.5}, SIZES.format("0", "1", "0.5")),
        ("DPAAT", {"eps_0": 0, "eps_min": 0.1}, SIZES.format("0.1", "0", "0")),
        ("DPAAT", {"average": "x"}, "average must be 'batch' or 'epoch', got 'x'"),
    ],
)
def test_settings_that_do_not_go_together(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make(name, **settings)


# What other processes wait for


class Waiting(nn.Module):
    """A network with a layer that makes processes wait for each other; PyTorch runs none on a CPU."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.layer, self.passes, self.slope = nn.Linear(16, 3), layer, 0, 1.0
        self.to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return self.linear(images.flatten(1)) * self.slope  # type: ignore[no-any-return]


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Two processes, of which the other wants what is left in this list; whatever this one wants is put behind it."""
    told: list[bool] = []

    def exchange(asked: Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        wanted = told.pop(0)
        told.append(bool(asked))
        asked.fill_(max(float(asked), float(wanted)))

    monkeypatch.setattr("advmed.distributed.place", lambda: (0, 2))
    monkeypatch.setattr("torch.distributed.all_reduce", exchange)
    return told


@pytest.mark.parametrize("preset", ["fast", "paper"])
@pytest.mark.parametrize("name", METHODS)
def test_processes_that_wait_for_each_other_make_equal_passes(name: str, preset: Any, others: list[bool]) -> None:
    """Of batches with samples that are new, that were met before, and of either kind: nobody needs to be asked."""
    torch.manual_seed(0)
    images, labels = torch.rand(4, 1, 4, 4), torch.arange(4) % 3
    settings = TrainingSettings(preset=preset, eps=0.5, delta=0.1, bounds=(0.0, 1.0)).for_method(name)
    made: dict[type, list[int]] = {}
    for layer in (nn.SyncBatchNorm, nn.BatchNorm1d):
        model = Waiting(layer(3), torch.float32)
        method = settings.make_method(name, Thresholds((2.0,), ("ce",)))
        others[:] = [True] * 4
        made[layer] = []
        for ids in ("abcd", "abcd", "abef", "abcd"):
            before = model.passes
            method.step(ClassificationObjective(model, labels), images, list(ids))
            made[layer].append(model.passes - before)
        assert others == [True] * 4, "nobody was asked"
    assert len({count for counts in made.values() for count in counts}) == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_that_another_process_repeats_is_repeated(training: bool, others: list[bool]) -> None:
    """In float16, where a scale was too large for one of them; not in an evaluation, where nobody waits."""
    model = Waiting(nn.SyncBatchNorm(3), torch.float16).train(training)
    objective, images = ClassificationObjective(model, torch.arange(4) % 3), torch.rand(4, 1, 4, 4).half()
    model.slope = 1e-3  # this process repeats nothing
    others[:] = [True, True, False]
    ifgsm(objective, images, 0.1, steps=2)
    assert model.passes == 2 + 1 + 2 * training
    assert others == ([False] * 3 if training else [True, True, False])
