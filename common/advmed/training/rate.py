"""A learning rate that stays, and falls late, as adversarial training was measured to like (docs/results/training.md).

L. Rice, E. Wong and Z. Kolter, "Overfitting in adversarially robust deep learning", ICML 2020, arXiv 2002.11569, train
so, with a second drop later on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_STAYS, _LAST = 0.75, 0.1
"""The share of a training in which the rate stays, and what is left of it then."""


def late_decay(step: float, length: float) -> float:
    """What is left of the first learning rate at a step of the schedule, counted from 0.

    Args:
        step: of the schedule, which may count batches or epochs.
        length: of the training, in the same steps. Its last one falls, however few there are; a single one does not.

    Example:
        >>> from advmed.training.rate import late_decay
        >>> [late_decay(epoch, 8) for epoch in range(8)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1]
        >>> [late_decay(epoch, 3) for epoch in range(3)]
        [1.0, 1.0, 0.1]
    """
    return 1.0 if length <= 1 or step < min(_STAYS * length, length - 1) else _LAST


class LateDecay(LambdaLR):
    """That schedule, for hosts that say in which epoch they are, and for those that do not.

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
        rates = [base * factor(epoch) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where an earlier schedule was, which may have been another one."""
        names = ("last_epoch", "_step_count", "_last_lr")
        known: dict[str, Any] = {name: state_dict[name] for name in names if name in state_dict}
        super().load_state_dict({**known, "lr_lambdas": [None] * len(self.lr_lambdas)})
