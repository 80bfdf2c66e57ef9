"""Attacks: the problem they all search (:mod:`advmed.attacks.problem`), one file per search, and what they climb."""

from advmed.attacks.apgd import APGD
from advmed.attacks.base import Attack
from advmed.attacks.losses import DLR, AttackLoss, Margin
from advmed.attacks.minimum import DDN
from advmed.attacks.names import parse_attacks
from advmed.attacks.noise import Noise
from advmed.attacks.pgd import PGD, ifgsm, pgd
from advmed.attacks.problem import AttackResult
from advmed.attacks.segmentation import (
    BalancedCrossEntropy,
    CosineWeighted,
    JensenShannon,
    MaskedCrossEntropy,
    SoftDice,
)
from advmed.attacks.square import SquareAttack
from advmed.attacks.standard import Judge, Standard
from advmed.attacks.tasks import Appearing, Elsewhere, ExpectedError, HeldTargets, Terms, Vanishing

__all__ = [
    "APGD",
    "DDN",
    "DLR",
    "PGD",
    "Appearing",
    "Attack",
    "AttackLoss",
    "AttackResult",
    "BalancedCrossEntropy",
    "CosineWeighted",
    "Elsewhere",
    "ExpectedError",
    "HeldTargets",
    "JensenShannon",
    "Judge",
    "Margin",
    "MaskedCrossEntropy",
    "Noise",
    "SoftDice",
    "SquareAttack",
    "Standard",
    "Terms",
    "Vanishing",
    "ifgsm",
    "parse_attacks",
    "pgd",
]
