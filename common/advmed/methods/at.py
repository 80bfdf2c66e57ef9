"""AT: adversarial training (Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks")."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from advmed.methods.base import Backward, FixedRadiusMethod, MixedLoss, Step
from advmed.objective import Objective


class AT(FixedRadiusMethod):
    """L = L(x~) with x~ = PGD(x, y, eps): only attacked images, one noise level for all.

    Adversarial training (Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", eq. 2.1,
    whose inner maximum PGD looks for).

    Args:
        eps: radius of the noise, >= 0: its norm over a sample's whole input, in units of the images as the network
            receives them.
        **attack: of the training, by its names in :class:`AttackOptions`.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> import torch
        >>> from advmed import AT
        >>> method, objective = AT(eps=1.0), lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> step = method.step(objective, torch.zeros(1, 1, 2, 2), ["a"])
        >>> round(step.loss.item(), 3)  # of the attacked image: a sum of 4 values has risen by sqrt(4)
        2.0
    """

    name = "AT"
    learns_from_clean = False

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """See :meth:`Method.step`; the ids are not used."""
        attacked = self._attack(objective, images, self.eps)
        mixed = MixedLoss(objective, backward)
        loss, _ = mixed.add(attacked.images, 1.0)
        logs = {"loss_adversarial": loss, "nonfinite": attacked.nonfinite.sum()}
        return Step(mixed.total(), logs, adversarial=attacked.images)
