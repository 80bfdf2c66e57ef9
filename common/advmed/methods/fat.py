"""FAT: friendly adversarial training.

J. Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger", ICML 2020 (Algorithm 1,
PGD-K-tau): the attack of a sample ends soon after it has succeeded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor

from advmed.attacks.problem import total
from advmed.methods.base import (
    AttackOptions,
    Backward,
    FixedRadiusMethod,
    MethodSettings,
    MixedLoss,
    RadiusSettings,
    Step,
    ThresholdMethod,
)
from advmed.objective import ImageClassObjective, Objective, model_of
from advmed.thresholds import RunningThresholds, Thresholds


@dataclass(frozen=True, kw_only=True)
class FATSettings(RadiusSettings):
    """The settings of FAT.

    Attributes:
        tau: steps that an attack goes on after it has succeeded, >= 0 (the paper: 0 to 3, growing over the epochs).
    """

    tau: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau < 0:
            raise ValueError(f"tau must be a whole number >= 0, got {self.tau!r}")


class FAT(ThresholdMethod, FixedRadiusMethod):
    """L = L(x~) where x~ = PGD(x, y, eps), stopped tau steps after it has succeeded.

    Friendly adversarial training (J. Zhang et al. 2020, "Attacks Which Do Not Kill Training Make Adversarial Learning
    Stronger", ICML, Algorithm 1, PGD-K-tau). The attack of a sample has succeeded where one of its loss terms has
    reached its threshold; where objectives have one class an image, and tell which are wrong by a method
    ``terms_and_errors`` (:class:`ClassificationObjective`), instead where that class is wrong, as in the paper, and no
    thresholds are needed.

    Args:
        eps: radius of the noise, >= 0: its norm over a sample's whole input, in units of the images as the network
            receives them.
        thresholds: K thresholds xi, one per loss term, in the loss's own unit; None for objectives with one class an
            image.
        tau: steps that an attack goes on after it has succeeded, >= 0 (the paper: 0 to 3, growing over the epochs).
        **attack: of the training, by its names in :class:`AttackOptions`.

    Raises:
        ValueError: a number out of its range, or thresholds that are NaN.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import FAT
        >>> objective = ClassificationObjective(torch.nn.Identity(), torch.tensor([0]))  # images are logits
        >>> images = torch.tensor([[1.0, 0.0]])
        >>> step = FAT(eps=4.0, tau=0).step(objective, images, ["a"])
        >>> round((step.adversarial - images).norm().item(), 3)  # wrong after one step of 4 * eps / 20: the attack ends
        0.8
    """

    name = "FAT"
    settings: ClassVar[type[MethodSettings]] = FATSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # its attack is to stop on the way, which takes steps that are shorter than the radius
        "fast": {**FixedRadiusMethod.presets["fast"], "steps": 5, "step_scale": 2.0, "schedule": "equal"},
        "paper": {**FixedRadiusMethod.presets["paper"], "steps": 10},
    }
    learns_from_clean = False
    maximises: ClassVar[bool] = False

    def __init__(
        self,
        eps: float,
        thresholds: Thresholds | RunningThresholds | Tensor | Sequence[float] | float | None = None,
        *,
        tau: int = FATSettings.tau,
        **attack: Unpack[AttackOptions],
    ) -> None:
        FATSettings(tau=tau)
        super().__init__(eps, **attack)
        self.set_thresholds(thresholds)
        self.tau = tau

    @classmethod
    def needs_thresholds(cls, objective: type) -> bool:
        """Unless images have one class each, which can be seen to be wrong."""
        return not issubclass(objective, ImageClassObjective)

    @classmethod
    def from_settings(
        cls, settings: Any, thresholds: Thresholds | RunningThresholds | None = None, **attack: Unpack[AttackOptions]
    ) -> Self:
        """See :meth:`Method.from_settings`."""
        return cls(cls._eps(settings), thresholds, tau=settings.tau, **attack)

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """See :meth:`Method.step`; the ids are not used.

        Raises:
            ValueError: if there are no thresholds and images have no class, or if there are others than terms.
        """
        limits = self._limits(objective, images)
        if limits is not None:
            attacked = self._attack(objective, images, self.eps, limits, self.tau)
        elif isinstance(objective, ImageClassObjective):
            attacked = self._attack(Watched(objective), images, self.eps, (math.inf, 0.0), self.tau)
        else:
            raise ValueError("FAT needs thresholds, or objectives with one class an image")
        mixed = MixedLoss(objective, backward)
        loss, _ = mixed.add(attacked.images, 1.0)
        logs = {"loss_adversarial": loss, "nonfinite": attacked.nonfinite.sum()}
        return Step(mixed.total(), logs, adversarial=attacked.images)


class Watched:
    """The loss of an objective with one class an image, and a term that is above 0 where the class is wrong: K = 2.

    No gradient goes through the second.
    """

    names = ("loss", "wrong")

    def __init__(self, objective: ImageClassObjective) -> None:
        self.objective, self.model = objective, model_of(objective)

    def __call__(self, images: Tensor) -> Tensor:
        """The two, (B, 2)."""
        terms, wrong = self.objective.terms_and_errors(images)
        loss = total(terms)
        return torch.stack([loss, torch.where(wrong, 1.0, -1.0).to(loss.dtype)], 1)
