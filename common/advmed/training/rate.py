"""A learning rate that stays, and falls late: what adversarial training was measured to like (docs/results/margins.md).

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


def late_decay(done: float) -> float:
    """What is left of the first learning rate when this share of the training is done."""
    return 1.0 if done < _STAYS else _LAST


class LateDecay(LambdaLR):
    """That schedule, for hosts that say in which epoch they are, and for those that do not.

    Args:
        optimizer: with its first learning rates.
        length: of the training, in steps of the schedule; asked at each.
    """

    def __init__(self, optimizer: Optimizer, length: Callable[[], float]) -> None:
        super().__init__(optimizer, lambda step: late_decay(step / max(1.0, length())))

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
