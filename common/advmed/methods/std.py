"""STD: standard training on clean images, the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from advmed.methods.base import Backward, Method, MixedLoss, Step
from advmed.objective import Objective


class STD(Method):
    """L = L(x): the host's own loss and nothing else. It takes no arguments.

    The baseline of a comparison, and the training that AMAT's thresholds come from (:class:`Thresholds`).

    Example:
        >>> import torch
        >>> from advmed import STD
        >>> objective, images = lambda images: images.flatten(1).sum(1, keepdim=True), torch.ones(1, 1, 2, 2)
        >>> STD().step(objective, images, ["a"]).loss
        tensor(4.)
    """

    name = "STD"

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """See :meth:`Method.step`."""
        mixed = MixedLoss(objective, backward)
        loss, terms = mixed.add(images, 1.0)
        return Step(mixed.total(), {"loss_clean": loss}, terms)
