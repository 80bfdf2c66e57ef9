"""Robust landmark detection: a U-Net with a heatmap and two offset maps for each landmark, on Lightning.

The command is ``adv-landmark``. The public names are those of ``__init__.pyi``; each is imported when it is first asked
for.
"""

from advmed.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__, extra="landmark")
