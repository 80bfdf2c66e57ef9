"""Dice indices of segmentations (arXiv 2206.01736, eq. 3 and 5).

Dice is computed from confusion counts per sample and class, which are small and additive: an evaluation stores the
counts, and every index below is computed from them afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Counts(NamedTuple):
    """Voxel counts per sample and foreground class; each of shape (N, C), int64."""

    tp: Tensor
    fp: Tensor
    fn: Tensor

    @classmethod
    def of(cls, scores: Mapping[str, Any]) -> Counts:
        """The counts among arrays or tensors called tp, fp and fn, the inverse of ``counts._asdict()``."""
        return cls(*(torch.as_tensor(scores[name]) for name in cls._fields))


def confusion_counts(
    prediction: Tensor, truth: Tensor, classes: Sequence[int], *, ignore: Tensor | None = None
) -> Counts:
    """Counts true positives, false positives and false negatives of label maps.

    Args:
        prediction: shape (N, *spatial), integer labels.
        truth: shape (N, *spatial), integer labels.
        classes: the C foreground labels; every other label is background.
        ignore: shape (N, *spatial), bool; True where a voxel does not count (nnU-Net's ignore label).

    Returns:
        ``tp``, ``fp`` and ``fn``, voxels of each sample and class, (N, C) each, int64.

    Raises:
        ValueError: for differing shapes, labels that are not integers, a mask that is not bool, no or double classes.

    Example:
        >>> import torch
        >>> from advmed import confusion_counts
        >>> prediction, truth = torch.tensor([[1, 1, 2, 0]]), torch.tensor([[1, 0, 2, 2]])
        >>> counts = confusion_counts(prediction, truth, classes=[1, 2])
        >>> counts.tp, counts.fp, counts.fn
        (tensor([[1, 1]]), tensor([[1, 0]]), tensor([[0, 1]]))
    """
    if len(classes) == 0 or len(set(classes)) != len(classes):
        raise ValueError(f"classes must be one or more different foreground labels, got {list(classes)}")
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim == 0:
            raise ValueError(
                f"{name} must be integer labels of shape (N, *spatial), got {labels.dtype} of shape "
                f"{tuple(labels.shape)}; take the argmax of scores first, or use region_confusion_counts for masks"
            )
    if prediction.shape != truth.shape:
        raise ValueError(_different_shapes(prediction, truth))
    wanted = torch.tensor(list(classes), device=truth.device).reshape(1, -1, *([1] * (truth.ndim - 1)))
    return region_confusion_counts(prediction.unsqueeze(1) == wanted, truth.unsqueeze(1) == wanted, ignore=ignore)


def region_confusion_counts(prediction: Tensor, truth: Tensor, *, ignore: Tensor | None = None) -> Counts:
    """Counts true positives, false positives and false negatives of masks, one per region; regions may overlap.

    Args:
        prediction: shape (N, C, *spatial), bool, or 0/1 integers.
        truth: shape (N, C, *spatial), bool, or 0/1 integers.
        ignore: shape (N, *spatial), bool; True where a voxel does not count.

    Raises:
        ValueError: for differing shapes, masks that are floating point, an ignore mask that is not bool.
    """
    if prediction.shape != truth.shape:
        raise ValueError(_different_shapes(prediction, truth))
    if prediction.ndim < 2 or prediction.is_floating_point() or truth.is_floating_point():
        raise ValueError(
            f"prediction and truth must be masks of shape (N, C, *spatial), got {prediction.dtype} and {truth.dtype} "
            f"of shape {tuple(truth.shape)}; threshold probabilities first"
        )
    predicted, present = prediction.bool(), truth.bool()
    if ignore is not None:
        if ignore.dtype != torch.bool or ignore.shape != truth.shape[:1] + truth.shape[2:]:
            raise ValueError(
                f"ignore must be a bool mask of shape {tuple(truth.shape[:1] + truth.shape[2:])}, "
                f"got {ignore.dtype} of shape {tuple(ignore.shape)}"
            )
        counted = ~ignore.unsqueeze(1)
        predicted, present = predicted & counted, present & counted
    return Counts(_voxels(predicted & present), _voxels(predicted & ~present), _voxels(~predicted & present))


def _different_shapes(prediction: Tensor, truth: Tensor) -> str:
    return f"prediction and truth must have the same shape, got {tuple(prediction.shape)} and {tuple(truth.shape)}"


def _voxels(mask: Tensor) -> Tensor:
    """Number of True per sample and class: (N, C, *spatial) -> (N, C)."""
    return mask.unsqueeze(-1).flatten(2).sum(2)


def dice_per_class(counts: Counts) -> Tensor:
    """Dice per sample and class, 2 TP / (2 TP + FP + FN), float64 of shape (N, C).

    NaN where the class is in neither the truth nor the prediction of the sample (0 / 0).
    """
    double = 2 * counts.tp.double()
    return double / (double + counts.fp + counts.fn)


def dice_per_sample(counts: Counts) -> Tensor:
    """Dice of every sample, float64 of shape (N,): the mean over the classes present in its truth or prediction.

    NaN for a sample in which no class is present at all.
    """
    return dice_per_class(counts).nanmean(1)


def adi(counts: Counts) -> float:
    """Average Dice Index: the mean over samples of Dice; a sample is what the model was given.

    (AMAT paper, arXiv 2206.01736, eq. 3.) With several classes the mean is taken over the classes of a sample first,
    then over samples, so that every sample weighs the same however many classes it shows: that is what ADI was
    introduced for (section 3.5). Samples in which no class is present in truth or prediction have no Dice and are left
    out; NaN if there are no others.

    Args:
        counts: of every sample and class, (N, C) each, as :func:`confusion_counts` makes them.

    Returns:
        A number in [0, 1], higher is better.

    Example:
        >>> import torch
        >>> from advmed import adi, confusion_counts
        >>> prediction, truth = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]]), torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1]])
        >>> round(adi(confusion_counts(prediction, truth, classes=[1])), 4)  # the mean of 1 and 2/3
        0.8333
    """
    return float(dice_per_sample(counts).nanmean())


def tvdi(counts: Counts) -> float:
    """Total Voxel Dice Index: Dice of TP, FP and FN summed over the samples, per class, then the mean.

    (AMAT paper, arXiv 2206.01736, eq. 5.) A class that no sample's truth or prediction holds is left out; NaN if there
    are no others.

    Args:
        counts: of every sample and class, (N, C) each, as :func:`confusion_counts` makes them.

    Returns:
        A number in [0, 1], higher is better.

    Example:
        >>> import torch
        >>> from advmed import confusion_counts, tvdi
        >>> prediction, truth = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]]), torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1]])
        >>> round(tvdi(confusion_counts(prediction, truth, classes=[1])), 4)  # 4 hits and a false positive: 8/9
        0.8889
    """
    return float(dice_per_sample(Counts(*(count.sum(0, keepdim=True) for count in counts))))
