"""Every attack against the contract of all attacks, and the contract against attacks that break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from advmed.attacks import APGD, DLR, PGD, AttackResult, CosineWeighted, Margin, Noise, SquareAttack
from advmed.testing.attacks import AttackFactory, attack_checks, check_attack

ATTACKS: dict[str, tuple[AttackFactory, dict[str, bool]]] = {
    "pgd": (lambda norm: PGD(5, 2.0, norm), {}),
    "pgd random": (lambda norm: PGD(4, 3.0, norm, random_start=1.0), {}),
    "pgd best": (lambda norm: PGD(6, 4.0, norm, keep="best"), {}),
    "pgd restarts": (lambda norm: PGD(3, 4.0, norm, random_start=0.5, restarts=2, keep="best"), {}),
    "cospgd": (lambda norm: PGD(4, 2.0, norm, loss=CosineWeighted()), {}),
    "cospgd restarts": (lambda norm: PGD(3, 1.0, norm, random_start=0.5, restarts=2, loss=CosineWeighted()), {}),
    "pgd margin": (lambda norm: PGD(3, 2.0, norm, random_start=1.0, restarts=2, loss=Margin(targets=3)), {}),
    "apgd": (lambda norm: APGD(7, norm, random_start=0), {"keeps_best": True}),
    "apgd random": (lambda norm: APGD(5, norm, restarts=2), {"keeps_best": True}),
    "apgd shrinking": (lambda norm: APGD(9, norm, random_start=0, shrink=True), {}),
    "apgd dlr": (lambda norm: APGD(4, norm, shrink=True, loss=DLR(targets=2)), {}),
    "apgd margin": (lambda norm: APGD(4, norm, random_start=0, loss=Margin()), {}),
    "square": (lambda norm: SquareAttack(40, norm), {"keeps_best": True, "spatial": True}),
    "square margin": (lambda norm: SquareAttack(8, norm, loss=Margin(targets=2)), {"spatial": True}),
    "gaussian": (lambda norm: Noise("gaussian", norm), {}),
    "uniform": (lambda norm: Noise("uniform", norm), {}),
}


@pytest.mark.parametrize(
    ("attack", "check"),
    [
        pytest.param(make, check, id=f"{kind}: {name}")
        for kind, (make, traits) in ATTACKS.items()
        for name, check in attack_checks(**traits)
    ],
)
def test_every_attack_keeps_the_contract(attack: AttackFactory, check: Callable[[AttackFactory], None]) -> None:
    check(attack)


def faulty(spoil: Callable[..., AttackResult]) -> type[PGD]:
    """PGD whose call is made by a function, of the true one and its arguments."""

    @dataclass(frozen=True)
    class Faulty(PGD):
        def __call__(self, objective: Any, images: torch.Tensor, radius: Any, **more: Any) -> AttackResult:
            return spoil(super().__call__, objective, images, radius, **more)

    return Faulty


def twice(attack: Callable[..., AttackResult], *given: Any, **more: Any) -> AttackResult:
    attack(*given, **more)
    return attack(*given, **more)


def careless(attack: Callable[..., AttackResult], *given: Any, **more: Any) -> AttackResult:
    torch.rand(1)
    return attack(*given, **more)


def learning(attack: Callable[..., AttackResult], objective: Any, *given: Any, **more: Any) -> AttackResult:
    for buffer in getattr(objective, "model", torch.nn.Module()).buffers():
        buffer.add_(1)
    return attack(objective, *given, **more)


def restless(attack: Callable[..., AttackResult], o: Any, x: torch.Tensor, r: Any, **more: Any) -> AttackResult:
    found = attack(o, x, r, **more)
    still = (found.norms == 0) & (torch.as_tensor(r) > 0)
    return replace(found, images=found.images + 1e-9 * still.reshape(-1, *[1] * (x.ndim - 1)))


def scaled(factor: Callable[[torch.Tensor, Any], float]) -> Callable[..., AttackResult]:
    """With another radius than is asked for."""
    return lambda attack, o, x, r, **more: attack(o, x, r * factor(x, r), **more)


def told(change: Callable[[AttackResult], dict[str, Any]]) -> Callable[..., AttackResult]:
    """With another result than there is."""
    return lambda attack, *given, **more: replace(found := attack(*given, **more), **change(found))


FAULTS: dict[str, Callable[..., AttackResult]] = {
    "costs what": twice,
    "gives a complete": told(lambda found: {"norms": found.norms * 2}),
    "never leaves": scaled(lambda x, r: 1.5),
    "radius 0": told(lambda found: {"images": found.images + 0.0}),
    "one number": scaled(lambda x, r: 0.5 if isinstance(r, float) else 1),
    "samples are": scaled(lambda x, r: 0.9 if len(x) > 1 else 1),
    "the generator": careless,
    "leaves no trace": learning,
    "runs where": scaled(lambda x, r: 1 if torch.is_grad_enabled() else 0.5),
    "runs under": scaled(lambda x, r: 0.1 if torch.is_autocast_enabled("cpu") else 1),
    "takes images": lambda attack, o, x, r, **more: attack(o, x.float(), r, **more),
    "keeps the memory": told(lambda found: {"images": found.images.contiguous()}),
    "a zero gradient": restless,
    "a gradient that": told(lambda found: {"nonfinite": found.nonfinite * 0}),
    "a broken image": scaled(lambda x, r: 0.5 if x.isnan().any() else 1),
    "refuses what": lambda attack, *given, bounds=None, **more: attack(
        *given, bounds=None if isinstance(bounds, str) else bounds, **more
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_attack_that_breaks_the_contract_is_found_out(fault: str) -> None:
    kind = faulty(FAULTS[fault])
    (check,) = (check for name, check in attack_checks() if name.startswith(fault))
    with pytest.raises(AssertionError):
        check(lambda norm: kind(4, 2.0, norm, keep="best"))


@pytest.mark.parametrize(
    ("settings", "traits", "name", "message"),
    [
        ({"step_scale": 9.0}, {"keeps_best": True}, "keeps the worst", "the loss is not the largest"),
        ({"random_start": 0.5}, {"random": False}, "the generator", "another generator changes the result"),
        ({}, {"spatial": True}, "gives", "images without spatial dimensions: no ValueError"),
    ],
)
def test_what_is_said_of_an_attack_is_looked_at(
    settings: dict[str, float], traits: dict[str, bool], name: str, message: str
) -> None:
    (check,) = (check for other, check in attack_checks(**traits) if other.startswith(name))
    with pytest.raises(AssertionError, match=message):
        check(lambda norm: PGD(**({"steps": 3, "step_scale": 2.0, "norm": norm} | settings)))


def test_the_check_that_failed_is_named() -> None:
    with pytest.raises(AssertionError, match="is not what was asked for, Linf") as error:
        check_attack(lambda norm: PGD(3, 2.0, 2))
    assert error.value.__notes__ == ["check: says what it is"]
