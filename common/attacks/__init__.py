"""Attacks: the problem they all search (:mod:`common.attacks.problem`), one file per search."""

from common.attacks.gradient import GradientAttack
from common.attacks.pgd import ifgsm, pgd
from common.attacks.problem import AttackResult

__all__ = ["AttackResult", "GradientAttack", "ifgsm", "pgd"]
