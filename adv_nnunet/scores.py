"""What nnU-Net's Dice is computed from, for whatever a trained network predicts: labels or regions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from advmed.evaluation.dice import Counts, confusion_counts, region_confusion_counts


def segmentation_counts(label_manager: Any, output: Tensor, target: Tensor, padding: Tensor | None = None) -> Counts:
    """TP, FP, FN of the hard prediction, per sample and foreground class or region.

    Args:
        label_manager: the host's.
        output: logits, (B, heads, *spatial).
        target: label map (B, 1, *spatial), or regions (B, regions (+ 1), *spatial).
        padding: what does not count, (B, *spatial), bool; besides the ignore label.
    """
    ignore = padding
    if label_manager.has_ignore_label:
        last = target[:, -1]
        ignored = last > 0 if label_manager.has_regions else last == label_manager.ignore_label
        ignore = ignored if padding is None else ignored | padding
    if label_manager.has_regions:
        regions = target[:, :-1] if label_manager.has_ignore_label else target
        return region_confusion_counts(output > 0, regions > 0, ignore=ignore)
    return confusion_counts(output.argmax(1), target[:, 0].long(), label_manager.foreground_labels, ignore=ignore)
