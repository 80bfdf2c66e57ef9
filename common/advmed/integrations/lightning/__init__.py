"""What the two Lightning hosts share: module, data, weights, thresholds, evaluation and command.

The one part of ``advmed`` that imports a host framework, and is imported by nothing else in it. Its names are those of
``__init__.pyi``; each is imported when it is first asked for.
"""

from advmed.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
