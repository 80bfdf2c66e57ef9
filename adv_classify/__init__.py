"""Robust image classification: DPAAT, AMAT and their baselines on timm networks, with Lightning.

``from adv_classify import ClassificationObjective`` needs PyTorch only; everything else needs the extra ``classify``.
The public names are those of ``__init__.pyi``; each is imported when it is first asked for.
"""

from advmed.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__, extra="classify")
