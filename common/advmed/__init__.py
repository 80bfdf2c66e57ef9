"""Adversarial training with a noise level for every sample, its baselines, and the measurement of what it gives.

The core knows no host framework: a host package (``adv_nnunet``, ...) closes its model and targets into an objective,
``images -> (B, K)`` loss terms, and everything in here works on that alone. The public names are those of
``__init__.pyi``; each is imported when it is first asked for.
"""

from advmed.lazy import public_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
