"""Attacks: the problem they all search (:mod:`advmed.attacks.problem`), one file per search, and what they climb."""

from advmed.attacks.apgd import APGD
from advmed.attacks.base import Attack
from advmed.attacks.losses import CosineWeighted, Margin
from advmed.attacks.names import parse_attacks
from advmed.attacks.noise import Noise
from advmed.attacks.pgd import PGD, ifgsm, pgd
from advmed.attacks.problem import AttackResult
from advmed.attacks.square import SquareAttack

__all__ = [
    "APGD",
    "PGD",
    "Attack",
    "AttackResult",
    "CosineWeighted",
    "Margin",
    "Noise",
    "SquareAttack",
    "ifgsm",
    "parse_attacks",
    "pgd",
]
