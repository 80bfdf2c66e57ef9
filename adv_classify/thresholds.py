"""Thresholds for AMAT from a trained standard classifier: its loss over the training images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.lightning import thresholds
from common.thresholds import Thresholds

if TYPE_CHECKING:
    from adv_classify.data import ClassificationData


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
    if weight is not None:
        model.class_weight = weight
    return thresholds.measure(model, path, data, rule=rule, device=device, split=split)
