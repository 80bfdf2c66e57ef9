"""Whether the short attack of a training still finds what a long one finds.

Training against few steps can end in catastrophic overfitting: the network learns to hide its gradients from just these
steps (Wong, Rice and Kolter 2020; Andriushchenko and Flammarion 2020, who saw the gradients at the image and near it
fall out of line). It looks like robustness, and is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advmed.attacks.pgd import PGD
from advmed.attacks.problem import Bounds, attacking, steepness, total
from advmed.norms import norm, random_in_ball
from advmed.objective import Objective

LONG = PGD(20, 4.0, random_start=0.5, keep="best")
"""What the attack of the training is compared with."""
COST = (2 * (LONG.steps + 2) + 2) / 3
"""Of a look, in standard training steps: the gradients, at the image and beside it too, and two forward passes."""
PRICE = 0.018
"""What looking may add to the time of a training by this count: less than 2 % as measured, where a gradient of the
images costs somewhat more than two thirds of a standard step."""
HARDLY = 0.02
"""Below this share of its clean loss, what the long attack adds to a sample's loss says nothing of the short one: in
half precision it may be a rounding. A noise level that grows (``ramp``) begins there."""
WEAK = 1 / 3
"""Below this share of what the long attack adds to the loss, the training's is too weak. (Three steps
that are pulled back to the crossing were seen to add 0.6 of it, with gradients in line: few steps, and no
overfitting.)"""


@dataclass(frozen=True)
class Strength:
    """What a look at a batch found.

    Attributes:
        share: how much the training's noise adds to the loss, over what the long attack adds with noise of the same
            norm; near to 1 where the training's attack is as good.
        alignment: the cosine of the loss's gradients at the images and at random points of their balls, the mean; 1
            where the loss is as good as linear there.
    """

    share: float
    alignment: float


class StrengthCheck:
    """Looks at a batch every so many steps that it costs less than 2 % of a long training; first after a quarter of
    them, so that a short one is looked at, too.

    Args:
        cost: of a training step, in standard ones.
        norm: of the noise, 2 or inf.
        bounds: of the images.
        seed: of the random points.
    """

    def __init__(self, cost: float, norm: float, bounds: Bounds, seed: int = 0) -> None:
        self.norm, self.bounds, self.seed = norm, bounds, seed
        self.every = math.ceil(COST / (PRICE * cost))
        self.steps = self.every - self.every // 4  # since the last look
        self._sums = torch.zeros(4, dtype=torch.float64)

    def due(self) -> bool:
        """Whether enough steps were made since the last look; counts one."""
        self.steps += 1
        return self.steps >= self.every

    def look(self, objective: Objective, images: Tensor, adversarial: Tensor) -> None:
        """Compares the noise that a batch is trained on with that of a long attack; before the weights change.

        Args:
            objective: of the batch.
            images: clean.
            adversarial: what the training made of them.
        """
        self.steps = 0
        generator = torch.Generator().manual_seed(self.seed)
        self.seed += 1
        long = PGD(LONG.steps, LONG.step_scale, self.norm, LONG.random_start, keep=LONG.keep)
        radius = norm((adversarial - images).float(), self.norm)
        clean, _ = steepness(objective, images, self.norm)
        near = random_in_ball(images.float(), radius, self.norm, generator).to(images.dtype)
        beside, _ = steepness(objective, images + near, self.norm)
        with attacking(objective):
            own = total(objective(adversarial))
        found = long(objective, images, radius, bounds=self.bounds, generator=generator)
        assert found.terms is not None
        base = total(clean.terms)
        cosine = torch.cosine_similarity(clean.gradient.flatten(1).double(), beside.gradient.flatten(1).double(), dim=1)
        rows = torch.stack([own - base, total(found.terms) - base, cosine, torch.ones_like(cosine)]).double()
        told = rows.isfinite().all(0) & (rows[1] > HARDLY * base.abs().to(rows.dtype))
        rows = rows[:, told]
        self._sums = self._sums.to(rows.device) + rows.sum(1)

    def drain(self, gather: Sequence[list[float]] | None = None) -> Strength | None:
        """What was found since the last call, in all processes; None if no look told anything."""
        own, longer, cosine, count = (sum(column) for column in zip(*(gather or [self.sums()]), strict=True))
        self._sums = torch.zeros(4, dtype=torch.float64)
        if not count:
            return None
        return Strength(own / longer if longer > 0 else 1.0, cosine / count)

    def sums(self) -> list[float]:
        """What this process found, to be gathered."""
        return [float(value) for value in self._sums]
