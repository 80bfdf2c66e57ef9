"""CosPGD (Agnihotri et al. 2024, "CosPGD: an efficient white-box adversarial attack for pixel-wise prediction tasks").

A segmentation fails voxel by voxel. The summed cross-entropy goes on rising at voxels that are wrong already; CosPGD
weighs the loss of a voxel by how close its prediction still is to the truth (equations 4 to 7), so that the noise goes
where there is something left to break. (SegPGD, Gu et al. 2022, is the same idea with a hard weight.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.attacks.gradient import GradientAttack
from common.attacks.problem import AttackResult, attacking
from common.objective import check_terms


class Voxels(NamedTuple):
    """What a segmentation is at every voxel.

    Attributes:
        logits: (B, C, *spatial), with gradients.
        truth: the same shape, 0 or 1: one class per voxel, or any number of regions.
        valid: (B, 1, *spatial), bool, False where a voxel does not count; None if all do.
        exclusive: one class per voxel (softmax), not regions (sigmoid).
    """

    logits: Tensor
    truth: Tensor
    valid: Tensor | None
    exclusive: bool


@runtime_checkable
class VoxelObjective(Protocol):
    """An objective that shows its voxels."""

    model: nn.Module

    def __call__(self, images: Tensor, /) -> Tensor:
        """Returns the loss terms, shape (B, K), with gradients."""
        ...

    def voxels(self, images: Tensor, /) -> Voxels:
        """One pass."""
        ...


class CosineWeighted:
    """The cross-entropy of every voxel times the cosine of prediction and truth there: ``images -> (B, 1)``.

    Args:
        objective: of the host.
    """

    names = ("cospgd",)

    def __init__(self, objective: VoxelObjective) -> None:
        self.objective, self.model = objective, objective.model

    def __call__(self, images: Tensor) -> Tensor:
        """The mean over the voxels that count; the cosine is a weight, and no gradient goes through it."""
        logits, truth, valid, exclusive = self.objective.voxels(images)
        logits, truth = logits.float(), truth.float()
        if exclusive:
            prediction, loss = logits.softmax(1), -(truth * logits.log_softmax(1)).sum(1, keepdim=True)
        else:
            prediction = torch.cat([logits.sigmoid(), (-logits).sigmoid()], 1)  # a region is a choice of two
            loss = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(1, keepdim=True)
            truth = torch.cat([truth, 1 - truth], 1)
        weighted = functional.cosine_similarity(prediction, truth, 1).detach()[:, None] * loss
        if valid is None:
            return weighted.flatten(1).mean(1, keepdim=True)
        return (weighted * valid).flatten(1).sum(1, keepdim=True) / valid.flatten(1).sum(1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class CosPGD(GradientAttack):
    """PGD on :class:`CosineWeighted`; of several runs the one with the largest loss of the host is kept.

    As in the paper a run ends in its last iterate: the weighted loss falls where voxels have been broken.
    """

    @property
    def description(self) -> str:
        """What it does, for a report."""
        return f"{super().description}; CosPGD (Agnihotri et al. 2024): voxels weigh what they still have right"

    def __call__(self, objective: Any, images: Tensor, radius: float | Tensor, **how: Any) -> AttackResult:
        """Attacks a batch; the terms of the result are those of ``objective``.

        Raises:
            TypeError: for an objective without voxels, that is, for a task other than segmentation.
        """
        if not isinstance(objective, VoxelObjective):
            raise TypeError("CosPGD attacks segmentations; this model predicts something else. Use pgd or apgd")
        with attacking(objective):
            result = super().__call__(CosineWeighted(objective), images, radius, **how)
            return replace(result, terms=check_terms(objective(result.images), images))
