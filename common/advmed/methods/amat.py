"""AMAT: adaptive-margin adversarial training.

L. Ma and L. Liang, "Adaptive Adversarial Training to Improve Adversarial Robustness of DNNs for Medical Image
Segmentation and Detection", arXiv 2206.01736. The comments in :meth:`AMAT.step` name the lines of its Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, Unpack

import torch
from torch import Tensor

from advmed.margins import MarginStore
from advmed.methods.base import (
    AdaptiveRadiusMethod,
    AttackOptions,
    Backward,
    MethodSettings,
    MixedLoss,
    Step,
    ThresholdMethod,
    check_optional,
    check_positive,
)
from advmed.objective import Objective
from advmed.thresholds import RunningThresholds, Thresholds


@dataclass(frozen=True, kw_only=True)
class AMATSettings(MethodSettings):
    """The settings of AMAT.

    Attributes:
        delta: expansion step, and every margin's first value, > 0; None: the host's default.
        refinement: "paper": the noise reached is ||x~ - x||_p of the last iterate. It sits on the sphere whenever
            step_scale >= 1 and no bound interferes, so the refinement leaves the margin where it is. "crossing": the
            norm of the last iterate on the attack's path at which every term was still below its threshold, 0 if
            there was none; known from the attack's own passes, and it lets a margin shrink.
        margin_min: lowest margin, >= 0, or None.
        margin_max: highest margin, > 0, or None.
    """

    delta: float | None = None
    refinement: Literal["paper", "crossing"] = "paper"
    margin_min: float | None = None
    margin_max: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optional(self, "delta", "margin_max")
        check_optional(self, "margin_min", zero=True)
        if self.margin_min is not None and self.margin_max is not None and self.margin_min > self.margin_max:
            raise ValueError(f"margin_min {self.margin_min} is above margin_max {self.margin_max}")
        if self.refinement not in ("paper", "crossing"):
            raise ValueError(f"refinement must be 'paper' or 'crossing', got {self.refinement!r}")


class AMAT(ThresholdMethod, AdaptiveRadiusMethod):
    """Every sample has its own noise level, its margin E(i), which grows while the model can bear it.

    L = (L(x) + L(x~)) / 2 with x~ = PGD(x, y, E(i)). A margin whose attack left every loss term below its threshold
    grows by delta; any other is refined to the mean of itself and the noise that was reached.

    Args:
        delta: expansion step, and every margin's first value, > 0.
        thresholds: K thresholds xi, one per loss term: fixed, self-calibrated, or plain numbers.
        refinement: see :class:`AMATSettings`, as the next two.
        margin_min: lowest margin, or None.
        margin_max: highest margin, or None.
        **attack: see :class:`advmed.methods.base.AdversarialMethod`.

    Example:
        >>> import torch
        >>> from advmed import AMAT
        >>> method, objective = AMAT(delta=0.5, thresholds=1.5), lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> for _ in range(3):  # noise of norm 0.5 takes the loss to 1, and the margin grows; of norm 1, to 2
        ...     step = method.step(objective, torch.zeros(1, 1, 2, 2), ["a"])
        >>> round(method.margins.get(["a"]).item(), 3)
        1.0
    """

    name = "AMAT"
    settings: ClassVar[type[MethodSettings]] = AMATSettings

    def __init__(
        self,
        delta: float,
        thresholds: Thresholds | RunningThresholds | Tensor | Sequence[float] | float,
        *,
        refinement: Literal["paper", "crossing"] = AMATSettings.refinement,
        margin_min: float | None = AMATSettings.margin_min,
        margin_max: float | None = AMATSettings.margin_max,
        **attack: Unpack[AttackOptions],
    ) -> None:
        AMATSettings(refinement=refinement, margin_min=margin_min, margin_max=margin_max)
        self.delta, self.refinement = check_positive("delta", delta), refinement
        super().__init__(self.delta, self.delta, lowest=margin_min or 0.0, highest=margin_max, **attack)
        self.set_thresholds(thresholds)

    @classmethod
    def needs_thresholds(cls, objective: type) -> bool:
        """Always."""
        return True

    @classmethod
    def from_settings(
        cls, settings: Any, thresholds: Thresholds | RunningThresholds | None = None, **attack: Unpack[AttackOptions]
    ) -> Self:
        """See :meth:`Method.from_settings`."""
        own: AMATSettings = settings
        if own.delta is None or thresholds is None:
            raise ValueError("AMAT needs delta and thresholds")
        return cls(
            own.delta,
            thresholds,
            refinement=own.refinement,
            margin_min=own.margin_min,
            margin_max=own.margin_max,
            **attack,
        )

    @property
    def margins(self) -> MarginStore:
        """E, one margin for each sample."""
        return self.store

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """See :meth:`Method.step`.

        Raises:
            ValueError: if the objective's number of terms (or their names) are not those of the thresholds.
        """
        margin = self._levels(ids, images)
        xi = self._limits(objective, images)
        assert xi is not None
        assert self.thresholds is not None
        crossing = self.refinement == "crossing"
        attacked = self._attack(objective, images, margin, xi if crossing else None)  # line 3
        mixed = MixedLoss(objective, backward)
        clean, clean_terms = mixed.add(images, 0.5)  # lines 2, 5, 7
        adversarial, terms = mixed.add(attacked.images, 0.5)  # lines 4, 6, 7; the host back-propagates, line 8
        if terms.shape[1] != len(self.thresholds):
            raise ValueError(f"{len(self.thresholds)} thresholds for an objective with K = {terms.shape[1]} loss terms")

        inside = (terms < xi).all(1)  # line 9, with K terms eq. 2
        reached = attacked.crossing if attacked.crossing is not None else attacked.norms
        reached = reached.float().where(~terms.isnan().any(1), math.nan)  # a broken pass moves no margin
        margin = torch.where(inside, margin + self.delta, (reached + margin) / 2)  # lines 10 and 12
        self.margins.set(ids, self._bounded(margin))
        if isinstance(self.thresholds, RunningThresholds):
            self.thresholds.update(clean_terms)
        logs = {
            "loss_clean": clean,
            "loss_adversarial": adversarial,
            "expanded": inside.float().mean(),
            "nonfinite": attacked.nonfinite.sum(),
        }
        return Step(mixed.total(), logs, clean_terms, attacked.images)
