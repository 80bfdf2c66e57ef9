"""MART: misclassification-aware adversarial training.

Y. Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020 (eq. 11 and
Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor

from advmed.distances import at_least_float32
from advmed.methods.base import (
    AttackOptions,
    Backward,
    ComparingMethod,
    MethodSettings,
    RadiusSettings,
    Step,
    check_optional,
    joined_step,
)
from advmed.methods.shared import predictions_first, repeatable
from advmed.objective import ClassScores, Objective, PredictingObjective, check_terms, classes_of, predicting
from advmed.thresholds import RunningThresholds, Thresholds


@dataclass(frozen=True, kw_only=True)
class MARTSettings(RadiusSettings):
    """The settings of MART.

    Attributes:
        kl_weight: lambda, weight of its divergence, >= 0 (the paper: 5, and 6 for wide networks).
    """

    kl_weight: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optional(self, "kl_weight", zero=True)


class MART(ComparingMethod):
    """L = BCE(f(x~), y) + lambda * KL(f(x) || f(x~)) * (1 - f_y(x)) with x~ = PGD(x, y, eps).

    MART (Y. Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR, eq.
    11 and Algorithm 1). BCE is the boosted cross-entropy, -log f_y(x~) - log(1 - max_{k != y} f_k(x~)). Where the clean
    image is classified with little confidence, the divergence of the two predictions counts more. f are class
    probabilities: of an image, or of each of its voxels, over which the loss is then the mean; regions are each a
    choice of two, and summed.

    The loss takes the place of the host's own (its Dice, its class weights), whose terms are attacked and logged.
    Objectives must be a :class:`PredictingObjective` and a :class:`ClassObjective`.

    Args:
        eps: radius of the noise, >= 0: its norm over a sample's whole input, in units of the images as the network
            receives them.
        kl_weight: lambda, weight of the divergence, >= 0 (the paper: 5, and 6 for wide networks).
        **attack: of the training, by its names in :class:`AttackOptions`.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import MART
        >>> objective = ClassificationObjective(torch.nn.Identity(), torch.tensor([0]))  # images are logits
        >>> step = MART(eps=1.0).step(objective, torch.zeros(1, 2), ["a"])
        >>> round(step.loss.item(), 3)  # 2 log(1 + exp(sqrt(2))) + 5 * log(cosh(1 / sqrt(2))) * (1 - 1/2)
        3.843
    """

    name = "MART"
    shared: ClassVar[int] = 1
    settings: ClassVar[type[MethodSettings]] = MARTSettings
    needs_classes = True

    def __init__(
        self, eps: float, *, kl_weight: float = MARTSettings.kl_weight, **attack: Unpack[AttackOptions]
    ) -> None:
        MARTSettings(kl_weight=kl_weight)
        super().__init__(eps, **attack)
        self.kl_weight = float(kl_weight)

    @classmethod
    def from_settings(
        cls, settings: Any, thresholds: Thresholds | RunningThresholds | None = None, **attack: Unpack[AttackOptions]
    ) -> Self:
        """See :meth:`Method.from_settings`."""
        return cls(cls._eps(settings), kl_weight=settings.kl_weight, **attack)

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """See :meth:`Method.step`; the ids are not used. The divergence joins the two passes, so that they are
        back-propagated together, ``backward`` or not.

        Raises:
            TypeError: if the objective's predictions are no classes.
        """
        predictor = predicting(objective, self.name)
        classes_of(objective, self.name)  # before the attack, where there are none
        share = self.clean_gradients is not None and repeatable(predictor)
        passed, first = predictions_first(predictor, images) if share else (None, None)
        attacked = self._attack(objective, images, self.eps, clean=first)
        passed = passed or predictor.loss_and_predictions(images)
        loss, losses = self._compared(predictor, passed, attacked.images)
        return joined_step(loss, backward, losses, check_terms(passed[1], images), attacked)

    def _compared(
        self, predictor: PredictingObjective, passed: tuple[Tensor, Tensor, Any], adversarial: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts, of a clean pass and the one on the noise."""
        classes = classes_of(predictor, self.name)
        clean, _, reference = passed
        other, _, predictions = predictor.loss_and_predictions(adversarial)
        boosted, divergence = mart_losses(classes.class_scores(reference), classes.class_scores(predictions))
        loss = (boosted + self.kl_weight * divergence).mean()
        return loss, {"loss_clean": clean, "loss_adversarial": other, "loss_sync": divergence.mean()}


def mart_losses(clean: ClassScores, adversarial: ClassScores) -> tuple[Tensor, Tensor]:
    """The boosted cross-entropy and the weighted divergence of every sample, (B,) each.

    Args:
        clean: of the clean images.
        adversarial: of the attacked ones.
    """
    (log_p, truth), (log_q, _) = _log_probabilities(clean), _log_probabilities(adversarial)
    true = truth.bool()
    other = log_q.masked_fill(true, -torch.inf).argmax(1, keepdim=True)  # the most likely wrong class
    # log(1 - q_k) as the logarithm of the sum of the others, which does not cancel where q_k is near to 1
    without = log_q.scatter(1, other, -torch.inf).logsumexp(1)
    boosted = -_of(log_q, true) - without
    divergence = (log_p.exp() * (log_p - log_q)).sum(1) * (1 - _of(log_p, true).exp())
    return _per_sample(boosted, clean), _per_sample(divergence, clean)


def _log_probabilities(scores: ClassScores) -> tuple[Tensor, Tensor]:
    """Log-probabilities and true classes, (B, C, *places); regions are pairs of classes, (B, 2, regions, *places)."""
    logits, truth = at_least_float32(scores.logits), scores.truth
    if scores.exclusive:
        return logits.log_softmax(1), truth
    return torch.stack([logits, torch.zeros_like(logits)], 1).log_softmax(1), torch.stack([truth, 1 - truth], 1)


def _of(values: Tensor, true: Tensor) -> Tensor:
    """The value of the true class."""
    return torch.where(true, values, 0.0).sum(1)


def _per_sample(values: Tensor, scores: ClassScores) -> Tensor:
    """(B, *places), or (B, regions, *places), to (B,): summed over regions, the mean over the places that count."""
    if not scores.exclusive:
        values = values.sum(1)
    if values.ndim == 1:
        return values
    values = values.flatten(1)
    if scores.valid is None:
        return values.mean(1)
    valid = scores.valid.flatten(1)
    return (values * valid).sum(1) / valid.sum(1).clamp_min(1)
