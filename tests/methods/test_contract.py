"""Every method against the contract of all methods, and the contract against methods that break it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from advmed.methods import AMAT, AT, DPAAT, FAT, MART, SAT, STD, TRADES, Method, Step
from advmed.testing.methods import MethodFactory, check_method, method_checks
from advmed.thresholds import RunningThresholds

QUICK: dict[str, Any] = {"steps": 3, "step_scale": 2.0}
FAST: dict[str, Any] = {"steps": 3, "step_scale": 1.75, "schedule": "decreasing", "share_gradient": True}
RANDOM: dict[str, Any] = {**QUICK, "random_start": 0.5, "seed": 4}


def self_calibrating() -> AMAT:
    running = RunningThresholds(["ce", "sharp"], "mean+2std", memory=12)
    running.update(torch.tensor([[1.0, 0.5], [2.0, 1.0]]))
    return AMAT(0.7, running, refinement="crossing", **RANDOM)


METHODS: dict[str, MethodFactory] = {
    "STD": STD,
    "AT": lambda: AT(0.7, **RANDOM),
    "SAT": lambda: SAT(0.7, norm=math.inf, **QUICK),
    "AMAT": lambda: AMAT(0.7, [9, 9], **QUICK),
    "AMAT crossing": lambda: AMAT(0.7, [2.0, 1.0], refinement="crossing", bounds=(0, 1), **QUICK),
    "AMAT self-calibrated": self_calibrating,
    "AMAT fast": lambda: AMAT(0.7, [2.0, 1.0], refinement="secant", start="estimate", **FAST),
    "AMAT fast on the crossing": lambda: AMAT(
        0.7, [2.0, 1.0], refinement="secant", train_on="crossing", start="estimate", **FAST
    ),
    "AMAT secant": lambda: AMAT(0.7, [2.0, 1.0], refinement="secant", margin_max=9.0, **RANDOM),
    "AMAT balanced": lambda: AMAT(0.7, [2.0, 1.0], refinement="balanced", train_on="crossing", **QUICK),
    "SAT fast": lambda: SAT(0.7, **FAST),
    "TRADES": lambda: TRADES(0.7, **QUICK),
    "MART": lambda: MART(0.7, **QUICK),
    "FAT": lambda: FAT(0.7, tau=1, **RANDOM),
    "MART fast": lambda: MART(0.7, **FAST),
    "FAT thresholds": lambda: FAT(0.7, [1.5, 1.0], tau=0, **QUICK),
    "DPAAT": lambda: DPAAT(0.7, step_size=0.11, **QUICK),
    "DPAAT fast": lambda: DPAAT(0.7, step_size=0.11, **FAST),
    "DPAAT epoch": lambda: DPAAT(0.7, step_size=0.11, average="epoch", **RANDOM),
    "DPAAT plain": lambda: DPAAT(0.7, sync_weight=0, average="epoch", **QUICK),
}


@pytest.mark.parametrize(
    ("method", "check"),
    [
        pytest.param(make, check, id=f"{kind}: {name}")
        for kind, make in METHODS.items()
        for name, check in method_checks()
    ],
)
def test_every_method_keeps_the_contract(method: MethodFactory, check: Callable[[MethodFactory], None]) -> None:
    check(method)


def faulty(**spoiled: Any) -> type[AMAT]:
    """AMAT with attributes of a fault."""
    return type("Faulty", (AMAT,), spoiled)


def stepping(change: Callable[..., Step]) -> Any:
    """A step that is changed afterwards, or made with other arguments: ``change(true step, method, *arguments)``."""
    return lambda self, objective, images, ids, backward=None: change(
        lambda *given: AMAT.step(self, *given), self, objective, images, ids, backward
    )


def leaving_gradients(step: Callable[..., Step], method: Method, objective: Any, *rest: Any) -> Step:
    objective(rest[0]).sum().backward()
    return step(objective, *rest)


FAULTS: dict[str, dict[str, Any]] = {
    "says what": {"keeps_sizes": False},
    "makes a step": {"step": stepping(lambda step, _, *rest: replace(f := step(*rest), terms=f.adversarial))},
    "backward gives": {"step": stepping(lambda step, _, o, x, i, b: step(o, x, i, b and (lambda loss: b(2 * loss))))},
    "knows its loss": {"step": stepping(lambda step, _, *rest: replace(f := step(*rest), loss=0.9 * f.loss))},
    "the model learns": {"step": stepping(leaving_gradients)},
    "says whether": {"learns_from_clean": False},
    "works with": {"step": stepping(lambda step, _, o, *rest: step(o, rest[0] * (hasattr(o, "model") + 1), *rest[1:]))},
    "two of": {"step": stepping(lambda step, _, o, x, *rest: step(o, x + 0.01 * torch.rand(1), *rest))},
    "a resumed": {"state_dict": lambda self: {**AMAT.state_dict(self), "steps_done": 0}},
    "refuses": {"load_state_dict": lambda self, state: AMAT.load_state_dict(self, {**state, "method": "AMAT"})},
    "merging": {"merge": lambda self: self.store.clamp(0.0, 0.1)},
    "ids may": {
        "step": stepping(lambda step, _, o, x, i, b: step(o, x, [f"{k}{name}" for k, name in enumerate(i)], b))
    },
    "a broken": {"_bounded": lambda self, levels: levels.nan_to_num(0.5)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_method_that_breaks_the_contract_is_found_out(fault: str) -> None:
    kind = faulty(**FAULTS[fault])
    (check,) = (check for name, check in method_checks() if name.startswith(fault))
    with pytest.raises(AssertionError):
        check(lambda: kind(0.7, [9, 9], **RANDOM))


def test_the_check_that_failed_is_named() -> None:
    with pytest.raises(AssertionError, match=r"learns_from_clean is False, not True") as error:
        check_method(lambda: faulty(learns_from_clean=False)(0.7, [9, 9], **QUICK))
    assert error.value.__notes__ == ["check: says whether it learns from clean images"]
