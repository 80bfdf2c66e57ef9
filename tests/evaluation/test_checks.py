"""Checks of the attack: planted faults are found, sound models pass; small networks of real chest X-rays.

Which checks find which fault is in ``FAULTS``; others may speak up beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import APGD, PGD, Noise, SquareAttack
from advmed.attacks.names import parse_attacks
from advmed.evaluation.checks import MOST_GAIN, QUESTIONS, Check, Unlimited, check, level_to_check, probes, strongest
from advmed.evaluation.loop import Condition, Evaluation, EvaluationBatch, LoadedBatch, evaluate
from advmed.evaluation.metric import Metric
from advmed.report import Entry
from advmed.report.summary import verdict
from helpers.evaluations import by_hand

ACCURACY = Metric(
    "accuracy", lambda s: float(s["correct"].mean()), per_sample=lambda s: s["correct"], fails_at=0.5, is_mean=True
)
LEVELS = (0.0, 0.2, 0.4, 0.8)
STANDARD = parse_attacks(["pgd10"])["pgd10"]
SEEDS = [0, 1, 2]
Planted = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A network with something planted before or behind it."""

    def __init__(self, model: nn.Module, before: Planted = lambda x: x, after: Planted = lambda y: y) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.model(self.before(images)))


def batches(chest: SimpleNamespace, model: nn.Module, number: int = 60) -> list[EvaluationBatch]:
    """The first images in one batch."""
    images, labels = (part[:number] for part in chest.xrays())

    def load() -> LoadedBatch:
        return LoadedBatch(
            images, chest.Objective(model, labels), lambda x: {"correct": (model(x).argmax(1) == labels).float()}
        )

    return [EvaluationBatch([str(i) for i in range(number)], load)]


def checked(
    chest: SimpleNamespace, model: nn.Module, attack: Any = STANDARD, seed: int = 0, scale: float = 1.0
) -> dict[str, Check]:
    """The checks as a report has them."""
    how: dict[str, Any] = {"bounds": (0.0, 1.0), "seed": seed}
    own = evaluate(batches(chest, model), {"own": attack}, [scale * level for level in LEVELS], **how)
    level = level_to_check(own, "own", ACCURACY)
    probed = evaluate(batches(chest, model), probes(attack), (0.0, level), **how)
    found = check(own, "own", probed, ACCURACY)
    assert [one.name for one in found] == list(QUESTIONS)
    return {one.name: one for one in found}


@pytest.mark.parametrize(
    ("kind", "seed"), [*((kind, seed) for kind in ("linear", "standard") for seed in SEEDS), ("adversarial", 0)]
)
def test_nothing_is_said_of_sound_models(chest: SimpleNamespace, kind: str, seed: int) -> None:
    """Under an attack that has converged: of ten steps twice as many can break three more of 60 images."""
    found = checked(chest, chest.trained(kind, seed), replace(STANDARD, steps=20), seed=seed)
    assert {one.verdict for one in found.values()} == {"passed"}, found


@pytest.mark.parametrize(
    ("name", "norm", "scale"), [("apgd10", 2, 1.0), ("ifgsm10", 2, 1.0), ("pgd10x2", 2, 1.0), ("pgd10", math.inf, 0.1)]
)
def test_nothing_is_said_of_other_attacks_that_work(
    chest: SimpleNamespace, name: str, norm: float, scale: float
) -> None:
    attack = parse_attacks([name], norm=norm)[name]
    found = checked(chest, chest.trained("adversarial", 0), attack, scale=scale)
    assert {one.verdict for one in found.values()} == {"passed"}, found


IDLE = replace(STANDARD, step_scale=1e-12)
FAULTS: dict[str, tuple[Callable[[nn.Module], nn.Module], PGD, set[str]]] = {
    # The gradient is 0 everywhere.
    "inputs rounded to few grey values": (
        lambda model: Around(model, before=lambda x: (x * 7).round() / 7),
        STANDARD,
        {"radius", "black box", "unlimited", "noise"},
    ),
    # Logits a thousand times: where the decision is right, the loss and its gradient are 0 in float32.
    "a loss that is 0 where the decision is right": (
        lambda model: Around(model, after=lambda y: 1000 * y),
        STANDARD,
        {"unlimited", "noise"},
    ),
    # Too small to change a decision, steep enough to lead every gradient astray.
    "gradients shattered by a ripple": (
        lambda model: Around(model, before=lambda x: x + 0.01 * torch.sin(3000 * x)),
        STANDARD,
        {"radius", "black box"},
    ),
    "steps that do not reach the sphere": (Around, replace(STANDARD, step_scale=0.4, random_start=0.0), {"steps"}),
    "steps of no length": (Around, replace(IDLE, random_start=0.0), {"black box", "unlimited", "noise"}),
    "steps of no length from a random start": (Around, IDLE, {"black box", "unlimited", "noise"}),
}
"""What is planted: around the network, or in the attack; and the checks that fail for every seed."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(chest: SimpleNamespace, fault: str, seed: int) -> None:
    around, attack, expected = FAULTS[fault]
    model = around(chest.trained("standard", seed))
    found = checked(chest, model, attack, seed=seed)
    failed = {name for name, one in found.items() if one.verdict == "failed"}
    assert failed >= expected, found
    entry = Entry("own", evaluate(batches(chest, model), {"own": attack}, (0, 0.2)), checks=list(found.values()))
    trusted, text = verdict([entry])
    assert trusted is False
    assert text.startswith("Do not rely on the robustness of these models: checks of the attack failed for own (")
    assert all(name in text for name in expected)


def test_the_planted_faults_look_robust(chest: SimpleNamespace) -> None:
    """Or there would be nothing to find: the attack seems to do less than to the network without the fault."""
    model = chest.trained("standard", 0)
    plain = evaluate(batches(chest, model), {"own": STANDARD}, LEVELS, bounds=(0.0, 1.0)).curve("own", ACCURACY.of)
    for around, attack, _ in FAULTS.values():
        curve = evaluate(batches(chest, around(model)), {"own": attack}, LEVELS, bounds=(0.0, 1.0)).curve(
            "own", ACCURACY.of
        )
        assert abs(curve[0] - plain[0]) < 0.05
        assert curve[-1] > plain[-1] + 0.3


# By hand


def measured(attacks: dict[str, Any], losses: dict[str, list[float]], correct: dict[str, list[float]]) -> Evaluation:
    """Few samples at levels 0 and 1, with losses and scores by attack; "clean" is one too."""

    def condition(name: str) -> Condition:
        loss, scores = np.array(losses[name], np.float32), {"correct": np.array(correct[name])}
        return Condition(np.ones(len(loss)), loss, np.zeros(len(loss), np.int64), scores, 0.0)

    ids = tuple(str(i) for i in range(len(losses["clean"])))
    attacked = {(name, 1.0): condition(name) for name in attacks}
    return Evaluation({}, attacks, (0.0, 1.0), ids, condition("clean"), attacked)


def probed_by_hand(**changes: tuple[list[float], list[float]]) -> dict[str, Check]:
    """A hundred samples, all right when clean, half of them wrong under attack; all is well but what is changed."""
    half, all_wrong = [0.0, 1.0] * 50, [0.0] * 100
    numbers = {
        "clean": ([1.0] * 100, [1.0] * 100),
        "checked": ([5.0] * 100, half),
        "steps": ([5.0] * 100, half),
        "restarts": ([5.0] * 100, half),
        "black box": ([4.0] * 100, [1.0] * 100),
        "unlimited": ([9.0] * 100, all_wrong),
        "noise": ([1.5] * 100, [1.0] * 100),
        **changes,
    }
    losses, correct = ({name: pair[k] for name, pair in numbers.items()} for k in (0, 1))
    probed = measured(probes(STANDARD), losses, correct)
    own = measured({"own": STANDARD}, losses | {"own": losses["checked"]}, correct | {"own": correct["checked"]})
    return {one.name: one for one in check(own, "own", probed, ACCURACY)}


def failed(**changes: tuple[list[float], list[float]]) -> set[str]:
    return {name for name, one in probed_by_hand(**changes).items() if one.verdict == "failed"}


def right(number: int, of: int = 100) -> list[float]:
    """So many of the samples that the attack leaves alone, the odd ones first, are right."""
    return [float(i in (*range(1, of, 2), *range(0, of, 2))[:number]) for i in range(of)]


def test_the_limits_of_each_check() -> None:
    assert failed() == set()
    five = [5.0] * 100
    assert probed_by_hand()["steps"].figures == {"before": 0.5, "after": 0.5, "gain": 0.0}
    assert MOST_GAIN == 0.05
    assert failed(steps=(five, right(45))) == set()  # five points of the clean accuracy of 1
    assert failed(steps=(five, right(44))) == {"steps"}
    assert failed(restarts=([5.1] * 100, right(45))) == set()
    assert failed(restarts=([5.1] * 100, right(44))) == {"restarts"}
    assert failed(restarts=([4.9] * 100, right(20))) == set()  # the worse of the two runs is the first, by its loss
    assert failed(**{"black box": ([4.0] * 100, right(44))}) == {"black box"}
    assert failed(**{"black box": ([6.0] * 10 + [4.0] * 90, right(100))}) == set()
    assert failed(**{"black box": ([6.0] * 11 + [4.0] * 89, right(100))}) == {"black box"}
    assert failed(unlimited=([9.0] * 100, right(10))) == set()
    assert failed(unlimited=([9.0] * 100, right(11))) == {"unlimited"}
    assert failed(noise=([5.5] * 10 + [1.5] * 90, right(100))) == set()
    assert failed(noise=([5.5] * 11 + [1.5] * 89, right(100))) == {"noise"}
    assert failed(noise=([1.5] * 90 + [90.0] * 10, right(100))) == {"noise"}  # on the mean it does more
    assert failed(clean=([5.1] * 10 + [1.0] * 90, right(100))) == set()
    assert failed(clean=([5.1] * 11 + [1.0] * 89, right(100))) == {"radius", "noise"}
    assert failed(clean=([5.004] * 100, right(100))) == {"noise"}  # a loss within rounding is no fall of the loss
    assert failed(clean=([5.006] * 100, right(100))) == {"radius", "noise"}


def test_of_few_samples_two_may_turn() -> None:
    def of(after: int) -> str:
        losses = {"clean": [1.0] * 10} | {name: [5.0] * 10 for name in probes(STANDARD)}
        correct = (
            {"clean": [1.0] * 10} | {name: right(6, 10) for name in probes(STANDARD)} | {"steps": right(after, 10)}
        )
        probed = measured(probes(STANDARD), losses, correct)
        return {one.name: one.verdict for one in check(probed, "checked", probed, ACCURACY)}["steps"]

    assert (of(4), of(3)) == ("passed", "failed")


def test_errors_are_better_when_lower() -> None:
    error = Metric(
        "error", lambda s: float(1 - s["correct"].mean()), False, per_sample=lambda s: 1 - s["correct"], fails_at=0.5
    )
    ones = [1.0] * 100
    losses = {"clean": ones} | {name: [5.0] * 100 for name in probes(STANDARD)} | {"noise": ones}
    correct = {"clean": ones} | {name: right(50) for name in probes(STANDARD)}
    correct |= {"steps": right(30), "unlimited": right(0)}
    probed = measured(probes(STANDARD), losses, correct)
    found = {one.name: one.verdict for one in check(probed, "checked", probed, error)}
    assert found == dict.fromkeys(QUESTIONS, "passed") | {"steps": "failed"}


def test_what_cannot_be_measured_is_said() -> None:
    own = probed_by_hand()
    alone = check(
        measured({"own": STANDARD}, {"clean": [1, 1], "own": [2, 2]}, {"clean": [1, 1], "own": [0, 1]}),
        "own",
        None,
        ACCURACY,
    )
    assert [one.name for one in alone] == list(QUESTIONS) == list(own)
    assert [one.verdict for one in alone] == ["passed"] + 5 * ["not measured"]
    assert all(one.question == QUESTIONS[one.name] for one in alone)
    losses = {"clean": [1.0] * 4} | {name: [5.0] * 4 for name in probes(STANDARD)}
    correct = {"clean": [1.0] * 4} | {name: [0.0] * 4 for name in probes(STANDARD)}
    probed = measured(probes(STANDARD), losses, correct)
    plain = replace(ACCURACY, fails_at=None)
    found = {one.name: one.verdict for one in check(probed, "checked", probed, plain)}
    assert found["unlimited"] == "not measured"


def test_what_is_checked_and_with_what() -> None:
    # Attacks on a loss of their own are not: the checks compare losses of the host.
    assert strongest(parse_attacks(["gaussian", "square100", "cospgd10", "apgd10", "pgd20"])) == "apgd10"
    assert strongest(parse_attacks(["square100", "cospgd10", "uniform"])) is None
    tried = probes(replace(STANDARD, restarts=3))
    assert list(tried) == ["checked", "steps", "restarts", "black box", "unlimited", "noise"]
    assert tried["checked"] == tried["restarts"] == replace(STANDARD, restarts=3)
    assert tried["steps"] == replace(STANDARD, restarts=3, steps=20, step_scale=2 * STANDARD.step_scale)
    assert probes(APGD(10))["steps"] == APGD(20)
    assert tried["black box"] == SquareAttack(100)
    assert probes(replace(STANDARD, steps=50, norm=math.inf))["black box"] == SquareAttack(250, math.inf)
    assert tried["unlimited"] == Unlimited(STANDARD)
    assert tried["noise"] == Noise("gaussian")
    assert isinstance(probes(APGD(10))["unlimited"], Unlimited)
    with pytest.raises(
        TypeError, match=r"only attacks of advmed\.attacks that follow gradients are checked, got Square"
    ):
        probes(SquareAttack(10))


@pytest.mark.parametrize("p", [2, math.inf])
def test_noise_without_limit_may_be_as_large_as_the_image_and_not_larger(p: float) -> None:
    slopes = torch.linspace(-1, 2, 12)
    images = torch.randn(3, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    images[2] *= 1e-3
    attack = Unlimited(PGD(20, 5.0, p, keep="best"))
    result = attack(lambda x: x.flatten(1) @ slopes[:, None], images, 0.5)
    expected = images.flatten(1).norm(p, dim=1).clamp_min(0.5)
    assert expected[2] == 0.5  # an empty image: at least the noise of the level
    torch.testing.assert_close(result.norms, expected)
    bounded = attack(lambda x: x.flatten(1) @ slopes[:, None], images, 0.5, bounds=(-1.0, 1.0))
    assert (bounded.images <= images.clamp_min(1.0)).all()
    assert (attack.norm, attack.gradients, attack.queries, attack.access) == (p, 20, 1, "white box")
    assert attack.description.endswith("; the noise may be as large as the image")


def test_the_level_is_that_at_which_half_of_the_samples_fail() -> None:
    def at(*shares: float) -> float:
        rows = [np.arange(10) >= 10 * share for share in (0, *shares)]
        own = by_hand({"own": rows}, attacks={"own": STANDARD}, scores=lambda value: {"correct": value})
        assert level_to_check(own, "own", replace(ACCURACY, fails_at=None)) == 1 + (len(shares) - 1) // 2
        return level_to_check(own, "own", ACCURACY)

    assert at(0.1, 0.4, 0.9) == 2
    assert at(0.7, 0.9, 1.0) == 1
    assert at(0.0, 0.0, 0.1) == 3
    assert at(0.0) == 1
