"""Checks of the attack: planted faults are found, sound models pass; small networks of real chest X-rays.

Which checks find which fault is in ``FAULTS``; others may speak up beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import APGD, PGD, Noise, SquareAttack
from advmed.attacks.names import parse_attacks
from advmed.evaluation.checks import (
    MOST_GAIN,
    QUESTIONS,
    Again,
    Check,
    Unlimited,
    check,
    level_to_check,
    probes,
    strongest,
)
from advmed.evaluation.loop import Condition, Evaluation, EvaluationBatch, LoadedBatch, evaluate
from advmed.evaluation.metric import Metric
from advmed.objective import Averaged
from advmed.report import Entry
from advmed.report.summary import verdict
from helpers.evaluations import by_hand, mean_of

ACCURACY = mean_of("correct", "accuracy", fails_at=0.5, is_mean=True)
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


def attacked(
    chest: SimpleNamespace, model: nn.Module, attack: Any, levels: Sequence[float] = LEVELS, seed: int = 0
) -> Evaluation:
    return evaluate(batches(chest, model), {"own": attack}, levels, bounds=(0.0, 1.0), seed=seed)


def checked(
    chest: SimpleNamespace, model: nn.Module, attack: Any, levels: Sequence[float] = LEVELS, seed: int = 0
) -> dict[str, Check]:
    """The checks as a report has them."""
    own = attacked(chest, model, attack, levels, seed)
    level = level_to_check(own, "own", ACCURACY)
    probed = evaluate(batches(chest, model), probes(attack), (0.0, level), bounds=(0.0, 1.0), seed=seed)
    found = check(own, "own", probed, ACCURACY)
    assert [one.name for one in found] == list(QUESTIONS)
    return {one.name: one for one in found}


LONG = replace(STANDARD, steps=20)
"""Of ten steps twice as many can break three more of 60 images."""


@pytest.mark.parametrize(
    ("kind", "seed", "attack", "levels"),
    [
        *((kind, seed, LONG, LEVELS) for kind in ("linear", "standard") for seed in SEEDS),
        ("adversarial", 0, LONG, LEVELS),
        *(("adversarial", 0, parse_attacks([name])[name], LEVELS) for name in ("apgd10", "ifgsm10", "pgd10x2")),
        ("adversarial", 0, parse_attacks(["pgd10"], norm=math.inf)["pgd10"], (0.0, 0.02, 0.04, 0.08)),
    ],
)
def test_nothing_is_said_of_sound_models_and_attacks(
    chest: SimpleNamespace, kind: str, seed: int, attack: Any, levels: Sequence[float]
) -> None:
    found = checked(chest, chest.trained(kind, seed), attack, levels, seed)
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
def test_planted_faults_look_robust_and_are_found(chest: SimpleNamespace, fault: str, seed: int) -> None:
    around, attack, expected = FAULTS[fault]
    plain = chest.trained("standard", seed)
    model = around(plain)
    found = checked(chest, model, attack, seed=seed)
    failed = {name for name, one in found.items() if one.verdict == "failed"}
    assert failed >= expected, found
    own = attacked(chest, model, attack)
    trusted, text = verdict([Entry("own", own, checks=list(found.values()))])
    assert trusted is False
    assert text.startswith("Do not rely on the robustness of these models: checks of the attack failed for own (")
    assert all(name in text for name in expected)
    if seed == 0:  # the attack seems to do less than to the network without the fault
        curve, right = (e.curve("own", ACCURACY.of) for e in (own, attacked(chest, plain, STANDARD)))
        assert abs(curve[0] - right[0]) < 0.05
        assert curve[-1] > right[-1] + 0.3


@pytest.mark.parametrize("attack", [parse_attacks(["ifgsm10"])["ifgsm10"], APGD(10, random_start=0)])
def test_an_attack_from_the_image_is_checked_from_other_places(attack: Any) -> None:
    """At the image the loss is a plateau, and no step leads anywhere; it rises from its edge on."""
    images = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def objective(x: Tensor) -> Tensor:
        length = (x - images).square().flatten(1).sum(1, keepdim=True).clamp_min(1e-12).sqrt()
        return nn.functional.relu(length - 0.2) + 0.1

    batch = LoadedBatch(images, objective, lambda x: {"correct": (objective(x)[:, 0] < 0.3).float()})
    loaded = [EvaluationBatch([str(i) for i in range(60)], lambda: batch)]
    own, probed = (evaluate(loaded, attacks, (0.0, 1.0)) for attacks in ({"own": attack}, probes(attack)))
    assert ACCURACY.of(own.scores("own", 1.0)) == ACCURACY.of(probed.scores("steps", 1.0)) == 1
    assert ACCURACY.of(probed.scores("restarts", 1.0)) == 0
    found = {one.name: one.verdict for one in check(own, "own", probed, ACCURACY)}
    assert (found["steps"], found["restarts"]) == ("passed", "failed")


# By hand


def measured(number: int = 100, **changes: tuple[Any, int]) -> Evaluation:
    """Samples that are all right when clean and half of them wrong under attack; all is well but what is changed.

    A condition is given by the loss, of all or of each sample, and by how many are right: the odd ones first.
    """
    half = number // 2
    given = {
        **{"clean": (1.0, number), "checked": (5.0, half), "steps": (5.0, half), "restarts": (5.0, half)},
        **{"black box": (4.0, number), "unlimited": (9.0, 0), "noise": (1.5, number)},
        **changes,
    }
    given.setdefault("repeatable", given["clean"])

    def condition(loss: Any, right: int) -> Condition:
        order = [*range(1, number, 2), *range(0, number, 2)]
        scores = {"correct": np.isin(range(number), order[:right]).astype(float)}
        return Condition(
            np.ones(number), np.full(number, loss, np.float32), np.zeros(number, np.int64), scores, seconds=0.0
        )

    clean, *under_attack = (condition(*numbers) for numbers in given.values())
    conditions = {(name, 1.0): one for name, one in zip(probes(STANDARD), under_attack, strict=True)}
    return Evaluation({}, probes(STANDARD), (0.0, 1.0), tuple(map(str, range(number))), clean, conditions)


def verdicts(evaluation: Evaluation, metric: Metric = ACCURACY) -> dict[str, str]:
    return {one.name: one.verdict for one in check(evaluation, "checked", evaluation, metric)}


def mixed(number: int, loss: float, rest: float) -> list[float]:
    """The losses of a hundred samples, so many of them another one than the rest."""
    return [loss] * number + [rest] * (100 - number)


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, set()),
        ({"steps": (5.0, 45)}, set()),  # five points of the clean accuracy of 1
        ({"steps": (5.0, 44)}, {"steps"}),
        ({"restarts": (5.1, 45)}, set()),
        ({"restarts": (5.1, 44)}, {"restarts"}),
        ({"restarts": (4.9, 20)}, set()),  # the worse of the two runs is the first, by its loss
        ({"black box": (4.0, 44)}, {"black box"}),
        ({"black box": (mixed(10, 6.0, 4.0), 100)}, set()),
        ({"black box": (mixed(11, 6.0, 4.0), 100)}, {"black box"}),
        ({"unlimited": (9.0, 10)}, set()),
        ({"unlimited": (9.0, 11)}, {"unlimited"}),
        ({"noise": (mixed(10, 5.5, 1.5), 100)}, set()),
        ({"noise": (mixed(11, 5.5, 1.5), 100)}, {"noise"}),
        ({"noise": (mixed(10, 90.0, 1.5), 100)}, {"noise"}),  # on the mean it does more
        ({"clean": (mixed(10, 5.1, 1.0), 100)}, set()),
        ({"clean": (mixed(11, 5.1, 1.0), 100)}, {"radius", "noise"}),
        ({"clean": (5.004, 100)}, {"noise"}),  # a loss within rounding is no fall of the loss
        ({"clean": (5.006, 100)}, {"radius", "noise"}),
        ({"repeatable": (mixed(10, 1.5, 1.0), 100)}, set()),
        ({"repeatable": (mixed(11, 1.5, 1.0), 100)}, {"repeatable"}),
        ({"repeatable": (mixed(11, 0.5, 1.0), 100)}, {"repeatable"}),
        ({"repeatable": (1.0009, 100)}, set()),  # within what kernels differ by
        ({"repeatable": (1.0011, 100)}, {"repeatable"}),
        # Next to no loss is no other one, if it is twice as large.
        ({"clean": (mixed(50, 1e-5, 1.0), 100), "repeatable": (mixed(50, 2e-5, 1.0), 100)}, set()),
        ({"clean": (mixed(50, 1e-3, 1.0), 100), "repeatable": (mixed(50, 2e-3, 1.0), 100)}, {"repeatable"}),
        ({"repeatable": (mixed(11, math.nan, 1.0), 100)}, {"repeatable"}),
        ({"repeatable": (math.inf, 100)}, {"repeatable"}),
    ],
)
def test_the_limits_of_each_check(changes: dict[str, tuple[Any, int]], failed: set[str]) -> None:
    assert verdicts(measured(**changes)) == dict.fromkeys(QUESTIONS, "passed") | dict.fromkeys(failed, "failed")


def test_few_samples_errors_and_figures() -> None:
    few = [verdicts(measured(10, checked=(5.0, 6), steps=(5.0, after)))["steps"] for after in (4, 3)]
    assert few == ["passed", "failed"]  # two may turn
    error = Metric(
        "error", lambda s: float(1 - s["correct"].mean()), False, per_sample=lambda s: 1 - s["correct"], fails_at=0.5
    )
    better_when_lower = verdicts(measured(steps=(5.0, 30)), error)
    assert better_when_lower == dict.fromkeys(QUESTIONS, "passed") | {"steps": "failed"}
    steps = check(measured(), "checked", measured(), ACCURACY)[1]
    assert steps.figures == {"before": 0.5, "after": 0.5, "gain": 0.0}
    assert MOST_GAIN == 0.05


def test_what_cannot_be_measured_is_said() -> None:
    alone = check(measured(), "checked", None, ACCURACY)
    assert [one.name for one in alone] == list(QUESTIONS)
    assert [one.verdict for one in alone] == ["passed"] + 6 * ["not measured"]
    assert all(one.question == QUESTIONS[one.name] for one in alone)
    assert verdicts(measured(), replace(ACCURACY, fails_at=None))["unlimited"] == "not measured"


@pytest.mark.filterwarnings("error")
def test_samples_without_a_value_of_the_metric_fail_no_check() -> None:
    """Slices without a structure have no Dice: of them nothing is known, and of the others what there is."""

    def dice(known: int) -> Metric:
        def per_sample(scores: Any) -> Any:
            return np.where(np.arange(len(scores["correct"])) < known, scores["correct"], np.nan)

        def of(scores: Any) -> float:
            found = per_sample(scores)
            return float(np.nanmean(found)) if known else math.nan

        return replace(ACCURACY, name="Dice", of=of, per_sample=per_sample)

    measuring = ["steps", "restarts", "black box", "unlimited"]
    none = {one.name: one for one in check(measured(), "checked", measured(), dice(0))}
    assert [name for name, one in none.items() if one.verdict == "not measured"] == measuring
    assert none["steps"].finding == "Dice has no value on these samples."
    some = {one.name: one for one in check(measured(), "checked", measured(), dice(40))}
    assert all(one.verdict == "passed" for one in some.values())
    assert some["unlimited"].finding == "100% of 40 samples fail."
    assert level_to_check(measured(), "checked", dice(0)) == measured().levels[1]


def test_what_is_checked_and_with_what() -> None:
    # Attacks on a loss of their own are not: the checks compare losses of the host.
    attacks = parse_attacks(["gaussian", "square100", "cospgd10", "apgd10", "pgd20"])
    assert strongest(attacks) == ("apgd10", attacks["apgd10"])
    assert strongest(parse_attacks(["square100", "cospgd10", "uniform"])) is None
    thrice = replace(STANDARD, restarts=3)
    tried = probes(thrice)
    assert tried == {
        "checked": thrice,
        "steps": replace(thrice, steps=20, step_scale=2 * STANDARD.step_scale),
        "restarts": thrice,
        "black box": SquareAttack(100),
        "unlimited": Unlimited(STANDARD),
        "noise": Noise("gaussian"),
        "repeatable": Again(2.0),
    }
    assert list(tried) == ["checked", *list(QUESTIONS)[1:]]
    for attack in (PGD(10, 1.0), PGD(10, 1.0, restarts=2), APGD(10, random_start=0)):  # from the image
        assert probes(attack)["restarts"] == replace(attack, random_start=1.0)
    assert probes(replace(STANDARD, random_start=0.5))["restarts"].random_start == 0.5
    assert (probes(APGD(10))["steps"], probes(APGD(10))["unlimited"]) == (APGD(20), Unlimited(APGD(10)))
    assert probes(replace(STANDARD, steps=50, norm=math.inf))["black box"] == SquareAttack(250, math.inf)
    with pytest.raises(TypeError, match=r"of advmed\.attacks that follow gradients are checked, got Square"):
        probes(SquareAttack(10))


def test_losses_that_are_not_finite_are_the_same_if_they_are_the_same() -> None:
    for bad in (math.nan, math.inf):
        found = check(measured(clean=(mixed(50, bad, 1.0), 100)), "checked", measured(clean=(bad, 100)), ACCURACY)[-1]
        assert (found.name, found.verdict) == ("repeatable", "passed")
        assert found.figures == {"share": 0.0, "gap": 0.0}
    half = check(measured(), "checked", measured(repeatable=(mixed(20, 3.0, 1.0), 100)), ACCURACY)[-1]
    assert half.figures == {"share": 0.2, "gap": pytest.approx(0.4)}
    assert half.finding.startswith("They differ for 20% of 100 samples, by 0.4 of the loss on the mean. The network is")
    assert "advmed.Averaged" in half.finding


# Random networks


class Draws(nn.Module):
    """Its images with noise of its own on them, which is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        self.drawn.append(noise.detach())
        return images + 0.05 * noise


@pytest.mark.parametrize("named", [True, False])
def test_what_a_random_layer_draws_under_attack(chest: SimpleNamespace, named: bool) -> None:
    """Other numbers in every pass of an attack; but each attack, or look, begins with the same, where the model is
    named: the last pass of one and the first of the next are alike, and no two first ones are different."""
    layer, (images, labels) = Draws(), (part[:4] for part in chest.xrays())
    model = nn.Sequential(layer, chest.trained("standard", 0))
    objective = chest.Objective(model, labels)
    if not named:
        objective = objective.__call__
    first: list[Tensor] = []
    for attack in (PGD(2, 1.0), PGD(2, 1.0), Noise("gaussian"), Again(2.0)):
        attack(objective, images, 0.1)
        assert len(torch.stack(layer.drawn).unique(dim=0)) == len(layer.drawn)
        first.append(layer.drawn[0])
        layer.drawn.clear()
    assert len(torch.stack(first).unique(dim=0)) == (1 if named else 4)


RANDOM: dict[str, Callable[[nn.Module], nn.Module]] = {
    "noise on the images": lambda model: nn.Sequential(Draws(), model),
    "dropout left on": lambda model: nn.Sequential(nn.Dropout(0.1).train(), model),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_network_is_found_unless_its_passes_are_averaged(chest: SimpleNamespace, kind: str) -> None:
    model = RANDOM[kind](chest.trained("standard", 0))
    plain = batches(chest, model)[0].load()
    own = {"own": STANDARD}
    for draws, verdict_ in ((None, "failed"), (4, "passed")):
        asked = plain if draws is None else replace(plain, objective=Averaged(plain.objective, draws))
        loaded = [EvaluationBatch([str(i) for i in range(60)], lambda asked=asked: asked)]
        evaluations = [evaluate(loaded, attacks, (0.0, 0.2), bounds=(0.0, 1.0)) for attacks in (own, probes(STANDARD))]
        found = check(evaluations[0], "own", evaluations[1], ACCURACY)[-1]
        assert (found.name, found.verdict) == ("repeatable", verdict_)
        assert (found.figures["share"] > 0.8) == (draws is None)
        assert (found.figures["gap"] > 0.01) == (draws is None)


def test_a_second_pass_leaves_images_and_model_alone(chest: SimpleNamespace) -> None:
    objective = chest.Objective(chest.trained("standard", 0), (both := chest.xrays())[1][:4])
    images = both[0][:4]
    found = Again(math.inf)(objective, images, 0.5, bounds=(0.0, 1.0), generator=None)
    assert found.images is images
    assert (found.norms.tolist(), found.nonfinite.tolist()) == ([0.0] * 4, [0] * 4)
    assert torch.equal(found.terms, objective(images).detach())
    assert (Again.access, Again.gradients, Again.queries, Again(2.0).norm) == ("black box", 0, 2, 2.0)


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
