"""Attacks by their names on a command line."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from advmed.attacks import APGD, PGD, CosineWeighted, Noise, SquareAttack
from advmed.attacks.names import EXPECTED, parse_attacks

NAMES = ["pgd100", "pgd20x3", "apgd100", "apgd50x2", "ifgsm10", "square1000", "gaussian", "uniform"]


def pgd(steps: int, norm: float, restarts: int = 1) -> PGD:
    return PGD(steps, 5.0, norm, random_start=1.0, restarts=restarts, keep="best")


@pytest.mark.parametrize("norm", [2, math.inf])
def test_every_kind_has_the_settings_of_an_evaluation(norm: float) -> None:
    assert parse_attacks(NAMES, norm=norm) == {
        "pgd100": pgd(100, norm),
        "pgd20x3": pgd(20, norm, 3),
        "apgd100": APGD(100, norm, random_start=1.0, restarts=1, momentum=0.75, rho=0.75),
        "apgd50x2": APGD(50, norm, restarts=2),
        "ifgsm10": PGD(10, 1.0, norm, random_start=0.0, restarts=1, keep="best"),
        "square1000": SquareAttack(1000, norm, share=0.1),
        "gaussian": Noise("gaussian", norm),
        "uniform": Noise("uniform", norm),
    }


def test_cospgd_has_the_settings_of_pgd() -> None:
    attack = parse_attacks(["cospgd20"], norm=math.inf)["cospgd20"]
    assert attack == PGD(20, 5.0, math.inf, random_start=1.0, loss=CosineWeighted())


def test_the_order_is_kept_and_the_norm_is_l2_by_default() -> None:
    names = list(reversed(NAMES))
    attacks = parse_attacks(names)
    assert list(attacks) == names
    assert {attack.norm for attack in attacks.values()} == {2.0}
    assert parse_attacks([]) == {}
    assert list(parse_attacks(name for name in names)) == names


REFUSED = [
    "pgd",
    "pgd0",
    "pgd-1",
    "pgd1.5",
    "pgd10x",
    "pgd10x0",
    "pgdx3",
    "pgd010",
    "PGD10",
    "10pgd",
    "apgd",
    "apgd0",
    "ifgsm",
    "ifgsm10x2",
    "square",
    "square0",
    "square100x2",
    "gaussian1",
    "uniform3",
    "Gaussian",
    "fgsm10",
    "cw10",
    "autoattack",
]


@pytest.mark.parametrize("name", [*REFUSED, "", "pgd 10", "pgd10 ", "pgd10\n", "pgd1\N{ARABIC-INDIC DIGIT THREE}"])
def test_other_names_are_refused_with_what_is_expected(name: str) -> None:
    message = f"unknown attack {name!r}: expected {EXPECTED}, for example pgd100, apgd50x3, square1000"
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        parse_attacks(["pgd5", name])


def test_what_is_expected_names_every_kind() -> None:
    for name in [*NAMES, "cospgd10"]:
        assert re.sub(r"\d+(x\d+)?", "", name) in EXPECTED


@pytest.mark.parametrize("name", ["pgd5", "square10", "uniform"])
def test_a_name_given_twice(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^attack '{name}' is given twice$"):
        parse_attacks([name, "apgd7", name])


@pytest.mark.parametrize("norm", [1, 0, "l2", None])
def test_another_norm(norm: Any) -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match=rf"norm must be 2 or inf \(L2 or Linf\), got {norm!r}"):
            parse_attacks([name], norm=norm)
