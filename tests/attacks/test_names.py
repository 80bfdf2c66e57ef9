"""Attacks by their names on a command line."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from advmed.attacks import APGD, PGD, CosineWeighted, Noise, SquareAttack
from advmed.attacks.names import EXPECTED, parse_attacks


@pytest.mark.parametrize("norm", [2, math.inf])
def test_every_kind_has_the_settings_of_an_evaluation(norm: float) -> None:
    """In the order of the names, and in L2 by default."""
    climb: dict[str, Any] = {"step_scale": 5.0, "norm": norm, "random_start": 1.0}
    expected = {
        "uniform": Noise("uniform", norm),
        "gaussian": Noise("gaussian", norm),
        "square1000": SquareAttack(1000, norm, share=0.1),
        "ifgsm10": PGD(10, 1.0, norm, random_start=0.0, restarts=1, keep="best"),
        "apgd50x2": APGD(50, norm, restarts=2),
        "apgd100": APGD(100, norm, random_start=1.0, restarts=1, momentum=0.75, rho=0.75),
        "cospgd10x2": PGD(10, **climb, restarts=2, loss=CosineWeighted()),
        "cospgd20": PGD(20, **climb, loss=CosineWeighted()),
        "pgd20x3": PGD(20, **climb, restarts=3, keep="best"),
        "pgd100": PGD(100, **climb, restarts=1, keep="best"),
    }
    found = parse_attacks((name for name in expected), norm=norm)
    assert list(found.items()) == list(expected.items())
    assert parse_attacks([]) == {}
    for name in expected:
        assert parse_attacks([name])[name].norm == 2
        assert re.sub(r"\d+(x\d+)?", "", name) in EXPECTED
        for other in (1, 0, "l2", None):
            with pytest.raises(ValueError, match=rf"norm must be 2 or inf \(L2 or Linf\), got {other!r}"):
                parse_attacks([name], norm=other)
        with pytest.raises(ValueError, match=rf"^attack '{name}' is given twice$"):
            parse_attacks([name, "apgd7", name])


REFUSED = [
    *("pgd", "pgd0", "pgd-1", "pgd1.5", "pgd10x", "pgd10x0", "pgdx3", "pgd010", "PGD10", "10pgd", "apgd", "apgd0"),
    *("ifgsm", "ifgsm10x2", "square", "square0", "square100x2", "gaussian1", "uniform3", "Gaussian"),
    *("fgsm10", "cw10", "autoattack"),
    *("", "pgd 10", "pgd10 ", "pgd10\n", "pgd1\N{ARABIC-INDIC DIGIT THREE}"),
]


@pytest.mark.parametrize("name", REFUSED)
def test_other_names_are_refused_with_what_is_expected(name: str) -> None:
    message = f"unknown attack {name!r}: expected {EXPECTED}, for example pgd100, apgd50x3, square1000"
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        parse_attacks(["pgd5", name])
