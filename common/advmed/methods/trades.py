"""TRADES (Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and Accuracy", eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, Unpack

from torch import Tensor

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
from advmed.objective import Objective, PredictingObjective, check_terms, model_of, predicting
from advmed.thresholds import RunningThresholds, Thresholds

LEAST_START = 0.01
"""Random start where the settings have none."""


@dataclass(frozen=True, kw_only=True)
class TRADESSettings(RadiusSettings):
    """The settings of TRADES.

    Attributes:
        beta: weight of the distance, > 0 (the paper: 1 and 6).
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optional(self, "beta")


class TRADES(ComparingMethod):
    """L = L(x) + beta * D(f(x), f(x~)), where x~ maximises D within the ball of radius eps.

    TRADES (H. Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and Accuracy", arXiv
    1901.08573, eq. 5; beta is 1 / lambda there). D is the distance of the objective's predictions (classification: KL
    of the softmax outputs, as in the paper), so objectives must be a :class:`PredictingObjective`.

    Args:
        eps: radius of the noise, >= 0: its norm over a sample's whole input, in units of the images as the network
            receives them.
        beta: weight of the distance, > 0 (the paper: 1 and 6).
        **attack: of the training, by its names in :class:`AttackOptions`; ``random_start`` must be > 0, by default
            0.01: on the clean image itself the gradient of the distance is zero.

    Raises:
        ValueError: a number out of its range, or a random start of 0.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import TRADES
        >>> objective = ClassificationObjective(torch.nn.Identity(), torch.tensor([0]))  # images are logits
        >>> step = TRADES(eps=1.0, beta=6.0).step(objective, torch.zeros(1, 2), ["a"])
        >>> round(step.loss.item(), 3)  # log(2) + 6 * log(cosh(1 / sqrt(2)))
        2.083
    """

    name = "TRADES"
    maximises: ClassVar[bool] = False
    shared: ClassVar[int] = 0
    settings: ClassVar[type[MethodSettings]] = TRADESSettings

    def __init__(self, eps: float, *, beta: float = TRADESSettings.beta, **attack: Unpack[AttackOptions]) -> None:
        random_start = attack.setdefault("random_start", LEAST_START)
        if random_start == 0:
            raise ValueError(
                "TRADES needs random_start > 0: on the clean image the gradient of its attack is zero, and the attack "
                "would never leave it"
            )
        TRADESSettings(beta=beta)
        super().__init__(eps, **attack)
        self.beta = float(beta)

    @classmethod
    def from_settings(
        cls, settings: Any, thresholds: Thresholds | RunningThresholds | None = None, **attack: Unpack[AttackOptions]
    ) -> Self:
        """See :meth:`Method.from_settings`; a random start of 0 becomes :data:`LEAST_START`."""
        attack["random_start"] = attack.get("random_start") or LEAST_START
        return cls(cls._eps(settings), beta=settings.beta, **attack)

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """See :meth:`Method.step`; the ids are not used. The distance joins the two passes, so that they are
        back-propagated together, ``backward`` or not.

        Raises:
            TypeError: if the objective gives no predictions.
        """
        predictor = predicting(objective, self.name)
        passed = predictor.loss_and_predictions(images)
        attacked = self._attack(Distance(predictor, detached(passed[2])), images, self.eps)
        loss, losses = self._compared(predictor, passed, attacked.images)
        return joined_step(loss, backward, losses, check_terms(passed[1], images), attacked)

    def _compared(
        self, predictor: PredictingObjective, passed: tuple[Tensor, Tensor, Any], adversarial: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts, of a clean pass and the one on the noise."""
        clean, _, reference = passed
        other, _, predictions = predictor.loss_and_predictions(adversarial)
        sync = predictor.distance(reference, predictions).mean()
        return clean + self.beta * sync, {"loss_clean": clean, "loss_adversarial": other, "loss_sync": sync}


class Distance:
    """The objective of an attack that pushes predictions away from those on the clean images: K = 1."""

    names = ("distance",)

    def __init__(self, objective: PredictingObjective, reference: Any) -> None:
        self.objective, self.reference = objective, reference
        self.model = model_of(objective)

    def __call__(self, images: Tensor) -> Tensor:
        """The distance, (B, 1)."""
        return self.objective.distance(self.reference, self.objective.predictions(images))[:, None]


def detached(predictions: Any) -> Any:
    """Predictions without gradients, in whatever nest of lists, tuples and dicts they come."""
    if isinstance(predictions, Tensor):
        return predictions.detach()
    if isinstance(predictions, dict):
        return {key: detached(value) for key, value in predictions.items()}
    if isinstance(predictions, (list, tuple)):
        values = [detached(value) for value in predictions]
        return type(predictions)(*values) if hasattr(predictions, "_fields") else type(predictions)(values)
    return predictions
