"""SAT: standard adversarial training, half clean and half attacked (Goodfellow et al. 2015, "Explaining and Harnessing
Adversarial Examples"; arXiv 2206.01736, eq. 1), the baseline of the AMAT paper."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from advmed.methods.base import Backward, FixedRadiusMethod, MixedLoss, Step
from advmed.objective import Objective


class SAT(FixedRadiusMethod):
    """L = (L(x) + L(x~)) / 2 with x~ = PGD(x, y, eps): one noise level for all.

    Standard adversarial training, the baseline of the AMAT paper (arXiv 2206.01736, eq. 1; Goodfellow et al. 2015,
    "Explaining and Harnessing Adversarial Examples"). With eps = 0 it is :class:`STD`.

    Args:
        eps: radius of the noise, >= 0: its norm over a sample's whole input, in units of the images as the network
            receives them.
        **attack: of the training, by its names in :class:`AttackOptions`.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> import torch
        >>> from advmed import SAT
        >>> method, objective = SAT(eps=1.0), lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> step = method.step(objective, torch.zeros(1, 1, 2, 2), ["a"])
        >>> round(step.loss.item(), 3)  # the mean of 0, of the clean image, and sqrt(4), of the attacked one
        1.0
    """

    name = "SAT"

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """See :meth:`Method.step`; the ids are not used."""
        mixed = MixedLoss(objective, backward, self.clean_gradients)
        first = mixed.clean_first(images, 0.5)
        attacked = self._attack(objective, images, self.eps, clean=first)
        clean, terms = mixed.clean(images, 0.5)
        adversarial, _ = mixed.add(attacked.images, 0.5)
        logs = {"loss_clean": clean, "loss_adversarial": adversarial, "nonfinite": attacked.nonfinite.sum()}
        return Step(mixed.total(), logs, terms, attacked.images)
