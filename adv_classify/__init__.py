"""Robust image classification: DPAAT, AMAT and their baselines on timm networks, with Lightning.

``from adv_classify import ClassificationObjective`` needs PyTorch only; everything else needs the extra ``classify``.
"""

from typing import TYPE_CHECKING

from advmed.lazy import lazy

if TYPE_CHECKING:
    from adv_classify.objective import ClassificationObjective

__getattr__ = lazy(__name__, {"ClassificationObjective": "objective"})

__all__ = ["ClassificationObjective"]
