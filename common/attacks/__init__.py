"""Attacks: one gradient loop (:mod:`common.attacks.gradient`), one file per attack."""

from common.attacks.gradient import AttackResult, GradientAttack
from common.attacks.pgd import ifgsm, pgd

__all__ = ["AttackResult", "GradientAttack", "ifgsm", "pgd"]
