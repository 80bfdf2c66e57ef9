"""Callbacks for a Trainer of one's own, which all Lightning hosts share."""

from advmed.integrations.lightning.callbacks import BestCheckpoint, BestStopping

__all__ = ["BestCheckpoint", "BestStopping"]
