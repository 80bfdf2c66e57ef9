"""DPAAT: dynamic perturbation-adaptive adversarial training.

arXiv 2403.06798, "Dynamic Perturbation-Adaptive Adversarial Training on Medical Image Classification". Its summary
describes the two parts, sizes that move with the distribution of losses and a synchronisation loss; what it leaves open
(the step of a size, its range, the weights) is read as the arguments below say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, Unpack

import torch
from torch import Tensor

from advmed.attacks.problem import total
from advmed.distributed import is_distributed
from advmed.margins import MarginStore
from advmed.methods.base import (
    AdaptiveRadiusMethod,
    AttackOptions,
    Backward,
    MethodSettings,
    RadiusSettings,
    Step,
    check_optional,
    check_positive,
    gone_back,
    required,
)
from advmed.methods.shared import predictions_first, repeatable
from advmed.objective import Objective, check_terms, inspecting, predicting, training_pass
from advmed.thresholds import RunningThresholds, Thresholds


@dataclass(frozen=True, kw_only=True)
class DPAATSettings(RadiusSettings):
    """The settings of DPAAT; ``eps`` is every sample's first size.

    Attributes:
        eps_min: smallest size, >= 0, in the unit of eps, as the next two; None: 0.
        eps_max: largest size, >= 0; None: 2 * eps.
        step_size: how far a size moves a visit, >= 0; None: a tenth of eps. 0 keeps the sizes (an ablation).
        sync_weight: weight of the synchronisation loss, >= 0. 0 leaves it out (an ablation).
        average: what an increase of the loss is compared with: the mean of the "batch" (of all processes together), or
            the running mean over the "epoch" so far. (With batches of one, a sample is compared with itself, and every
            size grows: take "epoch" there.)
    """

    eps_min: float | None = None
    eps_max: float | None = None
    step_size: float | None = None
    sync_weight: float = 1.0
    average: Literal["batch", "epoch"] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optional(self, "eps_min", "eps_max", "step_size", "sync_weight", zero=True)
        if self.average not in ("batch", "epoch"):
            raise ValueError(f"average must be 'batch' or 'epoch', got {self.average!r}")
        if self.eps is not None:
            check_sizes(self.eps_min or 0.0, self.eps, 2 * self.eps if self.eps_max is None else self.eps_max, "eps")


class DPAAT(AdaptiveRadiusMethod):
    """Every sample has its own perturbation size, smaller for relatively fragile and larger for relatively stable ones.

    Dynamic perturbation-adaptive adversarial training (arXiv 2403.06798; only a summary of the paper was at hand: what
    it leaves open, the step of a size, its range and the weight, is read as the arguments say).

    L = L(x~) + sync_weight * D(f(x), f(x~)) with x~ = PGD(x, y, eps_i), D the distance of the objective's predictions
    (classification: KL of the softmax outputs), the synchronisation loss. With dL_i = L(x~_i) - L(x_i): where dL_i is
    above the mean of the batch, the sample is relatively fragile, and eps_i falls by step_size; otherwise it is
    relatively stable, and eps_i rises by it; within [eps_min, eps_max].

    Args:
        eps_0: every sample's first size, >= 0: the norm of its noise over its whole input, in units of the images as
            the network receives them, as the next three.
        eps_min: smallest size, >= 0; None: 0.
        eps_max: largest size, >= eps_0; None: 2 * eps_0.
        step_size: how far a size moves a visit, >= 0; None: a tenth of eps_0. 0 keeps the sizes (an ablation).
        sync_weight: lambda, weight of the synchronisation loss, >= 0. With 0 (an ablation) any objective will do;
            otherwise it must be a :class:`advmed.PredictingObjective`.
        average: what dL_i is compared with: its mean over the "batch" (of all processes together), or over the "epoch"
            so far.
        **attack: of the training, by its names in :class:`AttackOptions`.

    Raises:
        ValueError: for a value out of its range, such as eps_min > eps_0.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import DPAAT
        >>> objective = ClassificationObjective(torch.nn.Identity(), torch.tensor([0, 0]))  # images are logits
        >>> method = DPAAT(eps_0=1.0)
        >>> step = method.step(objective, torch.tensor([[0.0, 0.0], [4.0, 0.0]]), ["unsure", "sure"])
        >>> method.sizes.get(["unsure", "sure"])
        tensor([0.9000, 1.1000])
    """

    name = "DPAAT"
    shared: ClassVar[int] = 1
    settings: ClassVar[type[MethodSettings]] = DPAATSettings

    def __init__(
        self,
        eps_0: float,
        *,
        eps_min: float | None = DPAATSettings.eps_min,
        eps_max: float | None = DPAATSettings.eps_max,
        step_size: float | None = DPAATSettings.step_size,
        sync_weight: float = DPAATSettings.sync_weight,
        average: Literal["batch", "epoch"] = DPAATSettings.average,
        **attack: Unpack[AttackOptions],
    ) -> None:
        DPAATSettings(eps_min=eps_min, eps_max=eps_max, step_size=step_size, sync_weight=sync_weight, average=average)
        self.eps_0 = check_positive("eps_0", eps_0, zero=True)
        lowest, highest = eps_min or 0.0, 2 * self.eps_0 if eps_max is None else float(eps_max)
        check_sizes(lowest, self.eps_0, highest)
        self.step_size = self.eps_0 / 10 if step_size is None else float(step_size)
        super().__init__(self.eps_0, self.step_size, lowest=lowest, highest=highest, additive=True, **attack)
        self.sync_weight = float(sync_weight)
        self.average = average
        self.learns_from_clean = self.sync_weight > 0
        self._seen = torch.zeros(2)  # sum and number of the increases of the epoch

    @classmethod
    def compares_predictions(cls, settings: Any) -> bool:
        """By the synchronisation loss."""
        return bool(settings.sync_weight > 0)

    @classmethod
    def from_settings(
        cls, settings: Any, thresholds: Thresholds | RunningThresholds | None = None, **attack: Unpack[AttackOptions]
    ) -> Self:
        """See :meth:`Method.from_settings`."""
        own: DPAATSettings = settings
        return cls(
            required(cls.name, "eps, the radius of its noise", own.eps),
            eps_min=own.eps_min,
            eps_max=own.eps_max,
            step_size=own.step_size,
            sync_weight=own.sync_weight,
            average=own.average,
            **attack,
        )

    @property
    def cost(self) -> float:
        """See :attr:`advmed.methods.Method.cost`; without the synchronisation loss clean images are looked at only."""
        return super().cost + (0 if self.sync_weight else 1 / 3)

    @property
    def sizes(self) -> MarginStore:
        """eps_i, one perturbation size for each sample."""
        return self.store

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """See :meth:`Method.step`. The synchronisation loss joins the two passes, so that they are back-propagated
        together, ``backward`` or not.

        Raises:
            TypeError: if there is a synchronisation loss and the objective gives no predictions.
        """
        sizes = self._levels(ids, images)
        predictor = predicting(objective, self.name) if self.sync_weight else None
        share = predictor if self.clean_gradients and repeatable(predictor) else None
        passed, first = predictions_first(share, images) if share else (None, None)
        attacked = self._attack(objective, images, sizes, clean=first)
        logs = {"nonfinite": attacked.nonfinite.sum()}
        if predictor is not None:
            clean, clean_terms, reference = passed or predictor.loss_and_predictions(images)
            adversarial, terms, predictions = predictor.loss_and_predictions(attacked.images)
            sync = predictor.distance(reference, predictions).mean()
            loss = adversarial + self.sync_weight * sync
            logs |= {"loss_clean": clean.detach(), "loss_sync": sync.detach()}
        else:
            with inspecting(objective):
                clean_terms = check_terms(objective(images), images)
            loss, terms = training_pass(objective, attacked.images)
            adversarial = loss
            logs["loss_clean"] = total(clean_terms).mean()
        clean_terms, terms = (check_terms(found, images).detach() for found in (clean_terms, terms))
        loss = gone_back(loss, backward)

        increase = (total(terms) - total(clean_terms)).masked_fill(self._lost(attacked), math.nan)
        stable = increase <= self._mean(increase)
        moved = torch.where(stable, sizes + self.step_size, sizes - self.step_size)
        moved = moved.where(increase.isfinite(), math.nan)  # neither a broken pass nor a lost attack moves a size
        self.store.visit(ids, moved, self.lowest, self.highest)
        logs |= {"loss_adversarial": adversarial.detach(), "expanded": stable.float().mean()}
        return Step(loss, logs, clean_terms, attacked.images)

    def loss_of(
        self, objective: Objective, images: Tensor, adversarial: Tensor, backward: Backward | None = None
    ) -> Tensor:
        """See :meth:`AdversarialMethod.loss_of`."""
        if not self.sync_weight:
            return super().loss_of(objective, images, adversarial, backward)
        predictor = predicting(objective, self.name)
        _, _, reference = predictor.loss_and_predictions(images)
        loss, _, predictions = predictor.loss_and_predictions(adversarial)
        return gone_back(loss + self.sync_weight * predictor.distance(reference, predictions).mean(), backward)

    def _mean(self, increase: Tensor) -> Tensor:
        """The mean increase of the batch, over all processes, or of the epoch so far; a scalar on the device."""
        finite = increase.isfinite()
        seen = torch.stack([torch.where(finite, increase, 0.0).sum(), finite.sum()])
        if is_distributed():
            torch.distributed.all_reduce(seen)
        if self.average == "epoch":
            self._seen = seen = self._seen.to(seen) + seen
        return seen[0] / seen[1].clamp_min(1)

    def outlook(self, visits: float, eps: float | None) -> list[str]:
        """See :meth:`AdaptiveRadiusMethod.outlook`."""
        assert self.highest is not None
        reach = visits * self.step_size
        low, high = max(self.lowest, self.eps_0 - reach), min(self.highest, self.eps_0 + reach)
        return [
            f"perturbation sizes begin at {self.eps_0:g} and can come to lie between {low:.2f} and {high:.2f} "
            f"(L{self.attack.norm:g} norm)"
        ]

    def state_dict(self) -> dict[str, Any]:
        """Sizes, the running mean and counters, in plain types."""
        return {**super().state_dict(), "increases": self._seen.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of an earlier run."""
        super().load_state_dict(state)
        self._seen = torch.tensor(state["increases"], dtype=torch.float64)

    def begin_epoch(self) -> None:
        """Begins a new running mean."""
        self._seen = torch.zeros(2)


def check_sizes(eps_min: float, eps_0: float, eps_max: float, name: str = "eps_0") -> None:
    """Raises ValueError unless eps_min <= eps_0 <= eps_max; ``name`` is what the user calls eps_0."""
    if not eps_min <= eps_0 <= eps_max:
        raise ValueError(
            f"perturbation sizes need eps_min <= {name} <= eps_max, got eps_min {eps_min:g}, {name} {eps_0:g}, "
            f"eps_max {eps_max:g}"
        )
