"""The core of Advmed: attacks, margins, thresholds, methods, metrics, evaluation and report.

Imports no host framework: a host package (``adv_nnunet``, ...) closes its model and targets into an objective,
``images -> (B, K)`` loss terms, and everything in here works on that alone.
"""

__version__ = "0.1.0"
