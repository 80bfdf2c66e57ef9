"""Whether a weak attack is found out, and what looking costs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed.methods import AMAT, SAT
from advmed.training.run import MethodRun, strength_check
from advmed.training.settings import TrainingSettings
from advmed.training.strength import StrengthCheck
from helpers.models import Affine, Classifier, cnn
from helpers.tensors import names, uniform

IMAGES = uniform(4, 1, 4, 4, seed=1)


class Hiding(nn.Module):
    """Hides where its loss is large from an attack that begins at the images: the slope there points elsewhere.

    The loss rises slowly with the first pixel, and in waves, which begin flat, with the others.
    """

    def __init__(self, images: Tensor, waves: float) -> None:
        super().__init__()
        self.images, self.waves, self.weight = images, waves, nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        noise = (images - self.images).flatten(1)
        slow, fast = noise[:, 0], noise[:, 1:]
        return self.weight * (0.1 * slow + self.waves * (1 - torch.cos(4 * fast)).sum(1))[:, None]


class Hidden:
    names = ("loss",)

    def __init__(self, waves: float) -> None:
        self.model = Hiding(IMAGES, waves)

    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images)


class Counted(Hidden):
    calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().__call__(images)


def looked(objective: Any, method: Any, images: Tensor = IMAGES) -> Any:
    check = strength_check(method)
    step = method.step(objective, images, names(len(images)))
    check.look(objective, images, step.adversarial)
    return check.drain()


@pytest.mark.parametrize("norm", [2, math.inf])
def test_of_a_linear_loss_one_step_finds_all(norm: float) -> None:
    objective = Affine(uniform(2, 1, 4, 4, seed=3), torch.zeros(2, dtype=torch.float64))
    found = looked(objective, SAT(0.7, steps=1, step_scale=1.0, norm=norm))
    assert (found.share, found.alignment) == (pytest.approx(1.0, rel=1e-3), pytest.approx(1.0))
    assert looked(objective, SAT(0.7, steps=1, step_scale=0.25, norm=norm)).share == pytest.approx(
        1.0, rel=1e-3
    )  # at its norm


def test_what_is_hidden_from_the_attack_is_found() -> None:
    """By as much as the long attack finds in closed form: a ball of norm 1 whose waves are 2 high each."""
    for waves, most in ((0.0, 1.0), (1.0, 0.05)):
        found = looked(Hidden(waves), SAT(1.0, steps=1, step_scale=1.0))
        assert (found.share > 0.99) if waves == 0 else (found.share < most)
        assert (found.alignment > 0.99) if waves == 0 else (found.alignment < 0.1)


class Rounded(Hidden):
    """The plain loss with an offset, in as many digits as half precision has; what an attack adds may be a rounding."""

    def __call__(self, images: Tensor) -> Tensor:
        loss = super().__call__(images) + 1.0
        return loss + (loss.detach().bfloat16().double() - loss.detach())


def test_noise_that_hardly_matters_says_nothing_of_the_attack() -> None:
    """As where a level grows from 0: the best of twenty roundings would stand beside one."""
    for eps, told in ((1e-3, False), (0.05, False), (2.0, True)):
        found = looked(Rounded(0.0), SAT(eps, steps=1, step_scale=1.0))
        assert (found is not None) == told, eps
    assert found.share == pytest.approx(1.0, abs=0.05)


def test_looking_leaves_no_trace() -> None:
    """In weights, gradients, statistics, random state; nor in what the training does afterwards."""
    objective = Classifier(cnn(normalise=True, dropout=0.3).double(), torch.tensor([0, 1, 2, 3]))
    images = uniform(4, 3, 8, 8)
    method = SAT(0.7, steps=2, step_scale=2.0)
    step = method.step(objective, images, names(4))
    before = {name: value.clone() for name, value in objective.model.state_dict().items()}
    state, calls = torch.get_rng_state(), objective.calls
    StrengthCheck(2.0, 2.0, None).look(objective, images, step.adversarial)
    assert objective.calls - calls == 20 + 1 + 2 + 1
    assert all(torch.equal(value, before[name]) for name, value in objective.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in objective.model.parameters())


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_looking_costs_less_than_two_percent(preset: str) -> None:
    """Of all the passes of a run; an attack of 20 steps needs no look."""
    settings = TrainingSettings(preset=preset, eps=0.5)
    run = MethodRun("SAT", settings, epochs=9)
    passes: list[int] = []
    objective = Counted(0.0)
    for share in (True, False):
        run._check = strength_check(run.method) if share else None
        assert preset == "fast" or run._check is None
        before = objective.calls
        for epoch in range(3):
            run.begin_epoch(epoch)
            for _ in range(100):
                run.step(objective, IMAGES, names(4))
            run.end_epoch()
        passes.append(objective.calls - before)
    if preset == "fast":
        assert passes[0] - passes[1] == 24  # one look in 300 steps, and the next after 256 more
        assert StrengthCheck(run.method.cost, 2.0, None).every == 256
        assert 24 * 2 / (300 * 3 * run.method.cost) < 0.02
    else:
        assert passes[0] == passes[1]


def test_a_short_training_is_looked_at_and_one_that_is_often_resumed() -> None:
    """After 64 steps, wherever it was stopped."""
    state: Any = None
    looks = []
    for part in range(4):
        run = MethodRun("SAT", TrainingSettings(eps=0.5), epochs=9)
        if state is not None:
            assert run.load_state_dict(state) == []
        run.begin_epoch(part)
        for _ in range(30):
            run.step(Hidden(0.0), IMAGES, names(4))
        looks.append(not math.isnan(run.end_epoch()["attack_share"]))
        state = json.loads(json.dumps(run.state_dict()))
    assert looks == [False, False, True, False]
    assert state["unlooked"] == 4 * 30 - 64


def hiding_run(said: list[str], **settings: Any) -> MethodRun:
    wanted = TrainingSettings(eps=1.0, delta=1.0, steps=1, step_scale=1.0, **settings)
    run = MethodRun("SAT", wanted, epochs=9, say=said.append)
    assert run._check is not None
    run._check.every, run._check.steps = 3, 0  # in place of hundreds of steps
    return run


def test_a_run_that_hides_its_gradients_is_caught() -> None:
    """One step, a large level: it says so and has more steps from then on, after a resumption, too."""
    said: list[str] = []
    run, objective = hiding_run(said), Hidden(1.0)
    run.begin_epoch(0)
    for _ in range(3):
        run.step(objective, IMAGES, names(4))
    values = run.end_epoch()
    assert values["attack_share"] < 0.05
    assert values["gradient_alignment"] < 0.1
    (line,) = (line for line in said if "WARNING" in line)
    assert "attack of 1 step(s) adds only" in line
    assert "catastrophic overfitting" in line
    assert "From here on it has 2 steps" in line
    assert run.method.attack.steps == 2
    state = json.loads(json.dumps(run.state_dict()))
    again = hiding_run([])
    assert again.load_state_dict(state) == []
    assert again.method.attack.steps == 2
    other = MethodRun("SAT", TrainingSettings(eps=1.0, steps=4), epochs=9)
    (changed,) = other.load_state_dict(state)  # a user's own number is not touched
    assert "steps 1 -> 4" in changed
    assert other.method.attack.steps == 4


def test_a_run_whose_attack_is_strong_says_nothing() -> None:
    said: list[str] = []
    run = hiding_run(said)
    run.begin_epoch(0)
    for _ in range(4):
        run.step(Hidden(0.0), IMAGES, names(4))
    assert run.end_epoch()["attack_share"] > 0.99
    assert [line for line in said if "WARNING" in line] == []
    assert run.method.attack.steps == 1
    run.begin_epoch(1)
    run.step(Hidden(0.0), IMAGES, names(4))
    assert math.isnan(run.end_epoch()["attack_share"])  # it was not looked at


def test_processes_agree_on_what_they_found() -> None:
    checks = [StrengthCheck(1.0, 2.0, None) for _ in range(2)]
    for check, waves in zip(checks, (0.0, 1.0), strict=True):
        objective = Hidden(waves)
        check.look(objective, IMAGES, SAT(1.0, steps=1, step_scale=1.0).step(objective, IMAGES, names(4)).adversarial)
    sums = [check.sums() for check in checks]
    found = [check.drain(sums) for check in checks]
    assert found[0] == found[1]
    assert found[0].share == pytest.approx((sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1]))
    assert checks[0].drain() is None


def test_methods_whose_attack_is_not_to_be_the_strongest_are_not_looked_at() -> None:
    for name, looked_at in (
        ("AT", True),
        ("SAT", True),
        ("DPAAT", True),
        ("MART", True),
        ("TRADES", False),
        ("FAT", False),
    ):
        assert (strength_check(TrainingSettings(eps=1.0).make_method(name)) is not None) == looked_at
    assert strength_check(AMAT(0.5, [1.0], steps=3)) is not None
    assert strength_check(TrainingSettings().make_method("STD")) is None
