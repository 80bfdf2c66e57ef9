"""Attacks: the problem they all search (:mod:`common.attacks.problem`), one file per search."""

from common.attacks.apgd import APGD
from common.attacks.cospgd import CosPGD
from common.attacks.gradient import GradientAttack
from common.attacks.noise import Noise
from common.attacks.pgd import ifgsm, pgd
from common.attacks.problem import AttackResult
from common.attacks.square import SquareAttack

__all__ = ["APGD", "AttackResult", "CosPGD", "GradientAttack", "Noise", "SquareAttack", "ifgsm", "pgd"]
