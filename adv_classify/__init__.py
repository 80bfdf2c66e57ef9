"""Robust image classification: DPAAT, AMAT and their baselines on timm networks, with Lightning.

``from adv_classify import ClassificationObjective`` needs PyTorch only; everything else needs the extra ``classify``.
"""

from adv_classify.objective import ClassificationObjective

__all__ = ["ClassificationObjective"]
