"""Attacks by their names on a command line, with the settings of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal

from advmed.attacks.apgd import APGD
from advmed.attacks.base import Attack
from advmed.attacks.noise import Noise
from advmed.attacks.pgd import PGD
from advmed.attacks.segmentation import CosineWeighted
from advmed.attacks.square import SquareAttack
from advmed.attacks.standard import RECIPE, Standard


def _pgd(number: int, restarts: int, norm: float) -> Attack:
    return PGD(number, 5.0, norm, random_start=1.0, restarts=restarts, keep="best")


_NUMBERED: dict[str, Callable[[int, int, float], Attack]] = {
    "pgd": _pgd,
    "apgd": lambda number, restarts, norm: APGD(number, norm, restarts=restarts),
    "ifgsm": lambda number, _, norm: PGD(number, 1.0, norm, keep="best"),
    "cospgd": lambda number, restarts, norm: PGD(
        number, 5.0, norm, random_start=1.0, restarts=restarts, loss=CosineWeighted()
    ),
    "square": lambda number, _, norm: SquareAttack(number, norm),
}
_RESTARTED = ("pgd", "apgd", "cospgd")
_NOISE: dict[str, Literal["gaussian", "uniform"]] = {"gaussian": "gaussian", "uniform": "uniform"}
EXPECTED = (
    "pgd<steps>, apgd<steps>, cospgd<steps> (segmentation), each with x<restarts>, ifgsm<steps>, square<queries>, "
    f"gaussian, uniform, or standard ({RECIPE}, the worst of an ensemble)"
)


def parse_attacks(names: Iterable[str], *, norm: float = 2, task: str = "") -> dict[str, Attack]:
    """Attacks by their command-line names, with the settings of an evaluation.

    ``pgd100`` is PGD with 100 steps, from a random start, with steps of 5 * level / 100; ``pgd20x3`` runs it three
    times and keeps the worst run of every sample; ``ifgsm10`` is I-FGSM with 10 steps of level / 10 ("100-PGD" and
    "10-IFGSM" in the AMAT paper, section 3.3). ``apgd100`` is APGD (Croce and Hein 2020) with 100 steps, ``square1000``
    the Square Attack (Andriushchenko et al. 2020) with 1000 queries. All return the image of the largest loss.
    ``standard`` is the ensemble of :class:`advmed.attacks.Standard`, the one number to give where one is asked for.
    ``gaussian`` and ``uniform`` are noise of the same norm that no one has aimed.

    Args:
        names: attack names.
        norm: 2 or inf, the norm of the noise level.
        task: what ``standard`` climbs, one of the tasks of :class:`Standard`.

    Raises:
        ValueError: for a name that is none, or given twice.

    Example:
        >>> from advmed import parse_attacks
        >>> attacks = parse_attacks(["pgd100", "apgd50x3", "gaussian"], norm=2)
        >>> attacks["apgd50x3"].gradients
        150
    """
    attacks: dict[str, Attack] = {}
    for name in names:
        if name in attacks:
            raise ValueError(f"attack {name!r} is given twice")
        match = re.fullmatch(r"([a-z]+)([1-9][0-9]*)(?:x([1-9][0-9]*))?", name)
        if name == "standard":
            attacks[name] = Standard(task, norm)
        elif name in _NOISE:
            attacks[name] = Noise(_NOISE[name], norm)
        elif match and match[1] in _NUMBERED and (match[3] is None or match[1] in _RESTARTED):
            attacks[name] = _NUMBERED[match[1]](int(match[2]), int(match[3] or 1), norm)
        else:
            raise ValueError(f"unknown attack {name!r}: expected {EXPECTED}, for example pgd100, apgd50x3, square1000")
    return attacks
