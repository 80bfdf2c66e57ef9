"""DPAAT: dynamic perturbation-adaptive adversarial training.

arXiv 2403.06798, "Dynamic Perturbation-Adaptive Adversarial Training on Medical Image Classification". Its summary
describes the two parts, sizes that move with the distribution of losses and a synchronisation loss; what it leaves open
(the step of a size, its range, the weights) is read as the arguments below say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from common.attacks.problem import total
from common.margins import MarginStore, is_distributed
from common.methods.base import AdaptiveRadiusMethod, Backward, Step, check_positive
from common.objective import Objective, check_terms, predicting, training_pass, untraced


class DPAAT(AdaptiveRadiusMethod):
    """Every sample has its own perturbation size, smaller for relatively fragile and larger for relatively stable ones.

    L = L(x~) + sync_weight * D(f(x), f(x~)) with x~ = PGD(x, y, eps_i), D the distance of the objective's predictions.
    With dL_i = L(x~_i) - L(x_i): where dL_i is above the mean of the batch, the sample is relatively fragile, and eps_i
    falls by step_size; otherwise it is relatively stable, and eps_i rises by it; within [eps_min, eps_max].

    Args:
        eps_0: every sample's first size, >= 0.
        eps_min: smallest size; None: 0.
        eps_max: largest size; None: 2 * eps_0.
        step_size: how far a size moves a visit; None: a tenth of eps_0. 0 keeps the sizes as they are (an ablation).
        sync_weight: lambda, weight of the synchronisation loss. 0 leaves it out (an ablation), and any objective will
            do; otherwise it must be a :class:`common.objective.PredictingObjective`.
        average: what dL_i is compared with: the mean of the "batch" (of all processes together), or the running mean
            over the "epoch" so far. (With batches of one, a sample is compared with itself, and every size grows: take
            "epoch" there.)
        **attack: see :class:`common.methods.base.AdversarialMethod`.

    Raises:
        ValueError: for a value out of its range, such as eps_min > eps_0.
    """

    name = "DPAAT"

    def __init__(
        self,
        eps_0: float,
        *,
        eps_min: float | None = None,
        eps_max: float | None = None,
        step_size: float | None = None,
        sync_weight: float = 1.0,
        average: Literal["batch", "epoch"] = "batch",
        **attack: Any,
    ) -> None:
        self.eps_0 = check_positive("eps_0", eps_0, zero=True)
        lowest = 0.0 if eps_min is None else check_positive("eps_min", eps_min, zero=True)
        highest = 2 * self.eps_0 if eps_max is None else check_positive("eps_max", eps_max, zero=True)
        check_sizes(lowest, self.eps_0, highest)
        self.step_size = self.eps_0 / 10 if step_size is None else check_positive("step_size", step_size, zero=True)
        super().__init__(self.eps_0, self.step_size, lowest=lowest, highest=highest, additive=True, **attack)
        self.sync_weight = check_positive("sync_weight", sync_weight, zero=True)
        if average not in ("batch", "epoch"):
            raise ValueError(f"average must be 'batch' or 'epoch', got {average!r}")
        self.average = average
        self.learns_from_clean = self.sync_weight > 0
        self._seen = torch.zeros(2)  # sum and number of the increases of the epoch

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
        attacked = self._attack(objective, images, sizes)
        logs = {"nonfinite": attacked.nonfinite.sum()}
        if predictor is not None:
            clean, clean_terms, reference = predictor.loss_and_predictions(images)
            adversarial, terms, predictions = predictor.loss_and_predictions(attacked.images)
            sync = predictor.distance(reference, predictions).mean()
            loss = adversarial + self.sync_weight * sync
            logs |= {"loss_clean": clean.detach(), "loss_sync": sync.detach()}
        else:
            with untraced(objective):
                clean_terms = check_terms(objective(images), images)
            loss, terms = training_pass(objective, attacked.images)
            adversarial = loss
            logs["loss_clean"] = total(clean_terms).mean()
        clean_terms, terms = (check_terms(found, images).detach() for found in (clean_terms, terms))
        if backward is not None:
            backward(loss)
            loss = loss.detach()

        increase = total(terms) - total(clean_terms)
        stable = increase <= self._mean(increase)
        moved = torch.where(stable, sizes + self.step_size, sizes - self.step_size)
        moved = moved.where(increase.isfinite(), math.nan)  # a broken pass moves no size
        self.store.set(ids, self._bounded(moved))
        logs |= {"loss_adversarial": adversarial.detach(), "expanded": stable.float().mean()}
        return Step(loss, logs, clean_terms, attacked.images)

    def _mean(self, increase: Tensor) -> Tensor:
        """The mean increase of the batch, over all processes, or of the epoch so far; a scalar on the device."""
        finite = increase.isfinite()
        seen = torch.stack([torch.where(finite, increase, 0.0).sum(), finite.sum()])
        if is_distributed():
            torch.distributed.all_reduce(seen)
        if self.average == "epoch":
            self._seen = seen = self._seen.to(seen) + seen
        return seen[0] / seen[1].clamp_min(1)

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
