"""Thresholds for AMAT from a trained standard model: its loss terms over the training samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from advmed.integrations.lightning.data import SampleData
from advmed.thresholds import TermStatistics, Thresholds, sha256

FILE = "thresholds.json"
"""Name of the file beside the checkpoint that was measured."""


def measure(
    model: Any, path: str | Path, data: SampleData, *, rule: str, device: torch.device, split: str = "train"
) -> Thresholds:
    """Measures a trained model on a split, without augmentation and in evaluation mode, and applies the rule.

    Args:
        model: a :class:`advmed.integrations.lightning.module.RobustModule`.
        path: the checkpoint that it is from.
        data: the data.
        rule: ``mean`` or ``mean+2std``.
        device: where to measure.
        split: of the data.
    """
    model = model.to(device).eval()
    statistics = TermStatistics(model.terms)
    with torch.no_grad():
        for batch in tqdm(data.loader(split), desc="thresholds", disable=None):
            objective, images, _ = model.objective(model.transfer_batch_to_device(batch, device, 0))
            statistics.update(objective(images))
    return statistics.thresholds(rule, source=str(path), source_sha256=sha256(Path(path)), notes={"split": split})
