"""The objective of a classifier, which the core has: it needs PyTorch only."""

from advmed.classification import ClassificationObjective

__all__ = ["ClassificationObjective"]
