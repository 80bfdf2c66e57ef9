"""Thresholds for AMAT from a trained standard classifier: its loss over the training images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from adv_classify.objective import ClassificationObjective
from common.thresholds import TermStatistics, Thresholds, sha256

if TYPE_CHECKING:
    from adv_classify.data import ClassificationData

FILE = "thresholds.json"
"""Name of the file beside the checkpoint that was measured."""


def measure(
    path: str | Path,
    data: ClassificationData,
    *,
    rule: str,
    device: torch.device,
    split: str = "train",
    weight: torch.Tensor | None = None,
) -> Thresholds:
    """Measures a trained classifier on a split, in evaluation mode, and applies the rule to its loss.

    Args:
        path: a checkpoint of adv-classify.
        data: the data.
        rule: ``mean`` or ``mean+2std``.
        device: where to measure.
        split: of the data.
        weight: of the classes, (classes,), of the training that the thresholds are for; None: that of the checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the model does not have the classes of the data.
    """
    from adv_classify.module import RobustClassifier

    model = RobustClassifier.from_checkpoint(path)
    if model.num_classes != data.num_classes:
        raise ValueError(
            f"{path} predicts {model.num_classes} classes, the data has {data.num_classes} ({data.class_names})"
        )
    network, weight = model.network.to(device), model.class_weight if weight is None else weight
    weight = None if weight is None else weight.to(device)
    statistics = TermStatistics(ClassificationObjective.names)
    loader = DataLoader(data.dataset(split), data.batch_size, num_workers=data.workers)
    with torch.no_grad():
        for batch in tqdm(loader, desc="thresholds", disable=None):
            objective = ClassificationObjective(network, batch["label"].to(device), weight=weight)
            statistics.update(objective(batch["image"].to(device)))
    notes = {"split": split}
    return statistics.thresholds(rule, source=str(path), source_sha256=sha256(Path(path)), notes=notes)
