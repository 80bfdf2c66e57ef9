"""A learning rate that stays, and falls late, as adversarial training was measured to like (docs/results/training.md).

A constant rate and a cooldown in a straight line: A. Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond
Fixed Training Durations", 2024, arXiv 2405.18392. (L. Rice et al. 2020, "Overfitting in adversarially robust deep
learning", arXiv 2002.11569, have a rate that drops to a tenth at once, which cost clean Dice in very short trainings.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_STAYS, _LEAST = 0.75, 0.01
"""The share of a training in which the rate stays, and what is left of it at the end."""


def late_decay(step: float, length: float) -> float:
    """What is left of the first learning rate at a step of the schedule, counted from 0.

    Args:
        step: of the schedule, which may count batches or epochs; within an epoch, with the part of it that is done.
        length: of the training, in the same steps.

    Example:
        >>> from advmed.training.rate import late_decay
        >>> [late_decay(step, 16) for step in range(11, 16)]
        [1.0, 1.0, 0.75, 0.5, 0.25]
        >>> late_decay(2.9, 3)  # epochs: near the end of the last of three
        0.1333...
    """
    return max(_LEAST, min(1.0, (1 - step / length) / (1 - _STAYS)))


class LateDecay(LambdaLR):
    """That schedule, for hosts that say in which epoch they are, and for those that do not.

    Where a step of the schedule is an epoch, :meth:`within` is to be called before each batch: a training may have so
    few epochs that the rate has to fall within the last of them.

    Args:
        optimizer: with its first learning rates.
        length: of the training, in steps of the schedule; asked at each.
    """

    def __init__(self, optimizer: Optimizer, length: Callable[[], float]) -> None:
        super().__init__(optimizer, lambda step: late_decay(step, length()))

    def step(self, epoch: Any = None) -> None:
        """The next step, or the one that is named."""
        if epoch is None:
            super().step()
            return
        self.last_epoch = epoch
        self.within(epoch)

    def within(self, step: float) -> None:
        """The rate at a step that need not be whole; the schedule itself stays where it is."""
        factors: Sequence[Callable[[float], float]] = self.lr_lambdas  # type: ignore[assignment]  # ours, of no whole steps
        rates = [float(base) * factor(step) for base, factor in zip(self.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = [*rates]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where an earlier schedule was, which may have been another one."""
        names = ("last_epoch", "_step_count", "_last_lr")
        known: dict[str, Any] = {name: state_dict[name] for name in names if name in state_dict}
        super().load_state_dict({**known, "lr_lambdas": [None] * len(self.lr_lambdas)})
