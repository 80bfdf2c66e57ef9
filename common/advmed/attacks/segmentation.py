"""What to climb to break a segmentation: losses of the classes of voxels, for any attack of this folder.

The summed cross-entropy of a segmentation goes on rising at voxels that are wrong already. Each of these losses asks in
its own way where there is something left to break; no single one is the worst for every network (Croce et al. 2024,
"Towards reliable evaluation and fast training of robust semantic segmentation models", section 3).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from advmed.attacks.losses import OfClasses
from advmed.distances import at_least_float32
from advmed.objective import ClassObjective, ClassScores, Objective


class VoxelLoss(ABC):
    """Base of losses of voxels: frozen dataclasses without fields, whose points the host's own loss ranks.

    Their values say where to go on, and not how bad a point is: most fall where a voxel is broken for good.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    needs_classes: ClassVar[bool] = True
    goals: ClassVar[int] = 1
    queries: ClassVar[int] = 1

    def objectives(self, objective: ClassObjective, images: Tensor) -> Sequence[Objective]:
        """See :meth:`advmed.attacks.AttackLoss.objectives`."""
        return [OfClasses(objective, self.value)]

    def judge(self, objective: ClassObjective) -> Objective:
        """See :meth:`advmed.attacks.AttackLoss.judge`."""
        return objective  # not the value that was climbed, see above

    @staticmethod
    @abstractmethod
    def value(scores: ClassScores) -> Tensor:
        """The loss, (B, 1)."""


@dataclass(frozen=True)
class MaskedCrossEntropy(VoxelLoss):
    """Cross-entropy of the voxels that are right still (Croce et al. 2024, eq. 4); wrong ones count as a constant.

    Example:
        >>> import torch
        >>> from advmed import ClassScores
        >>> from advmed.attacks.segmentation import MaskedCrossEntropy
        >>> logits = torch.tensor([[[0.0, -9.0], [0.0, 9.0]]])  # two voxels of class 0: undecided, and lost
        >>> truth = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
        >>> round(MaskedCrossEntropy.value(ClassScores(logits, truth, None, exclusive=True)).item(), 4)  # log 2 / 2
        0.3466
    """

    name: ClassVar[str] = "masked cross-entropy"
    description: ClassVar[str] = "climbs the cross-entropy of the voxels that are right still"

    @staticmethod
    def value(scores: ClassScores) -> Tensor:
        """The mean over the voxels that count, (B, 1)."""
        loss, right = _per_voxel(scores)
        return _mean(loss * right, scores.valid)


@dataclass(frozen=True)
class BalancedCrossEntropy(VoxelLoss):
    """Masked cross-entropy in which every class of the truth weighs the same, however few voxels it has.

    A small structure is what Dice is about, and next to nothing in a mean over voxels (Croce et al. 2024, "bal-CE").

    Example:
        >>> import torch
        >>> from advmed import ClassScores
        >>> from advmed.attacks.segmentation import BalancedCrossEntropy
        >>> logits = torch.zeros(1, 2, 4)  # four undecided voxels, one of them of class 1
        >>> truth = torch.tensor([[[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
        >>> logits[0, 0, :3] = 9.0  # now the three are sure
        >>> round(BalancedCrossEntropy.value(ClassScores(logits, truth, None, exclusive=True)).item(), 4)  # log 2 / 2
        0.3466
    """

    name: ClassVar[str] = "class-balanced cross-entropy"
    description: ClassVar[str] = "climbs the cross-entropy of the voxels that are right still, every class alike"

    @staticmethod
    def value(scores: ClassScores) -> Tensor:
        """The mean over the classes that the truth holds, (B, 1)."""
        loss, right = _per_voxel(scores)
        truth, valid = scores.truth.float().flatten(2), scores.valid
        if not scores.exclusive:  # a region, and what is not in it
            truth = torch.cat([truth, 1 - truth], 1)
            loss, right = torch.cat([loss, loss], 1), torch.cat([right, right], 1)
        if valid is not None:
            truth = truth * valid.flatten(2)
        count = truth.sum(2)
        mean = (truth * (loss * right).flatten(2)).sum(2) / count.clamp_min(1)
        return mean.sum(1, keepdim=True) / (count > 0).sum(1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class JensenShannon(VoxelLoss):
    """Jensen-Shannon divergence of prediction and truth: flat at both ends, so that lost voxels pull no more.

    (Croce et al. 2024, eq. 5.) Its gradient is largest at voxels that are neither sure nor lost.

    Example:
        >>> import torch
        >>> from advmed import ClassScores
        >>> from advmed.attacks.segmentation import JensenShannon
        >>> logits, truth = torch.tensor([[[-99.0], [99.0]]]), torch.tensor([[[1.0], [0.0]]])
        >>> round(JensenShannon.value(ClassScores(logits, truth, None, exclusive=True)).item(), 4)  # at most log 2
        0.6931
    """

    name: ClassVar[str] = "Jensen-Shannon divergence"
    description: ClassVar[str] = "climbs the Jensen-Shannon divergence of prediction and truth"

    @staticmethod
    def value(scores: ClassScores) -> Tensor:
        """The mean over the voxels that count, (B, 1)."""
        logits, truth = at_least_float32(scores.logits), scores.truth.float()
        if scores.exclusive:
            log_p = (logits.log_softmax(1) * truth).sum(1, keepdim=True)
        else:
            log_p = functional.logsigmoid(torch.where(truth > 0, logits, -logits))
        # All of the truth is in one class, so that the divergence is a function of its probability p alone.
        p = log_p.exp()
        half = (1 + p) / 2
        found = 0.5 * (p * (log_p - half.log()) - half.log() + (1 - p) * math.log(2))
        return _mean(found.sum(1, keepdim=True), scores.valid)


@dataclass(frozen=True)
class SoftDice(VoxelLoss):
    """1 - soft Dice of the classes that the truth holds: what the metric counts, made differentiable.

    Class 0 of an exclusive choice is the background and left out, as in the metric.

    Example:
        >>> import torch
        >>> from advmed import ClassScores
        >>> from advmed.attacks.segmentation import SoftDice
        >>> logits = torch.tensor([[[-99.0, -99.0], [99.0, 99.0]]])  # both voxels are called class 1
        >>> truth = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> round(SoftDice.value(ClassScores(logits, truth, None, exclusive=True)).item(), 4)  # 1 - 2 / (2 + 1)
        0.3333
    """

    name: ClassVar[str] = "soft Dice"
    description: ClassVar[str] = "lowers the soft Dice of the classes that are there"

    @staticmethod
    def value(scores: ClassScores) -> Tensor:
        """One minus the mean Dice, (B, 1); of an image without a class, the mass of all that are not there."""
        logits, truth = at_least_float32(scores.logits), scores.truth.float()
        probability = logits.softmax(1)[:, 1:] if scores.exclusive else logits.sigmoid()
        truth = truth[:, 1:] if scores.exclusive else truth
        if scores.valid is not None:
            probability, truth = probability * scores.valid, truth * scores.valid
        probability, truth = probability.flatten(2), truth.flatten(2)
        there = truth.sum(2)
        dice = 2 * (probability * truth).sum(2) / (probability.sum(2) + there).clamp_min(1e-8)
        number = (there > 0).sum(1)
        loss = 1 - torch.where(there > 0, dice, 0.0).sum(1) / number.clamp_min(1)
        return torch.where(number > 0, loss, probability.sum((1, 2)))[:, None]


@dataclass(frozen=True)
class CosineWeighted(VoxelLoss):
    """CosPGD (Agnihotri et al. 2024, "CosPGD: an efficient white-box adversarial attack for pixel-wise prediction
    tasks", equations 4 to 7), as a loss for :class:`PGD`.

    A segmentation fails voxel by voxel. The summed cross-entropy goes on rising at voxels that are wrong already; this
    loss weighs the cross-entropy of a voxel by how close its prediction still is to the truth, so that the noise goes
    where there is something left to break. (SegPGD, Gu et al. 2022, is the same idea with a hard weight.) As in the
    paper a run should end in its last iterate: the weighted loss falls where voxels are broken. For the same reason it
    is the host's loss that decides between runs.

    Example:
        >>> import torch
        >>> from advmed import PGD, ClassScores, CosineWeighted
        >>> attack = PGD(100, 5.0, loss=CosineWeighted())  # CosPGD
        >>> logits, truth = torch.tensor([[[-9.0], [9.0]]]), torch.tensor([[[1.0], [0.0]]])  # one voxel, surely wrong
        >>> loss = CosineWeighted.value(ClassScores(logits, truth, None, exclusive=True))
        >>> round(loss.item(), 4)  # its cross-entropy is 18, but there is nothing left to break
        0.0
    """

    name: ClassVar[str] = "cosine-weighted cross-entropy"
    description: ClassVar[str] = "CosPGD (Agnihotri et al. 2024): voxels weigh what they still have right"

    @staticmethod
    def value(scores: ClassScores) -> Tensor:
        """The mean over the voxels that count, (B, 1); the cosine is a weight, and no gradient goes through it."""
        logits, truth, valid, exclusive = scores
        logits, truth = logits.float(), truth.float()
        if exclusive:
            prediction, loss = logits.softmax(1), -(truth * logits.log_softmax(1)).sum(1, keepdim=True)
        else:
            prediction = torch.cat([logits.sigmoid(), (-logits).sigmoid()], 1)  # a region is a choice of two
            loss = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(1, keepdim=True)
            truth = torch.cat((truth, 1 - truth), 1)
        weighted = functional.cosine_similarity(prediction, truth, 1).detach()[:, None] * loss
        return _mean(weighted, valid)


def _per_voxel(scores: ClassScores) -> tuple[Tensor, Tensor]:
    """Cross-entropy, (B, 1 or regions, *places), and whether the prediction is right there, as 0 or 1."""
    logits, truth = at_least_float32(scores.logits), scores.truth.float()
    if not scores.exclusive:
        loss = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        return loss, ((logits > 0) == (truth > 0.5)).float()
    loss = -(truth * logits.log_softmax(1)).sum(1, keepdim=True)
    wrong = logits.masked_fill(truth > 0.5, -torch.inf).amax(1, keepdim=True)
    return loss, (wrong <= (logits * truth).sum(1, keepdim=True)).float()


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the places that count of what is summed over the channels, (B, 1)."""
    values = values.sum(1, keepdim=True)
    if valid is None:
        return values.flatten(1).mean(1, keepdim=True)
    return (values * valid).flatten(1).sum(1, keepdim=True) / valid.flatten(1).sum(1, keepdim=True).clamp_min(1)
