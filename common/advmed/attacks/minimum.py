"""The smallest noise that makes a model fail, where every other attack asks for the worst within a given noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advmed.attacks.base import check_count, check_fraction
from advmed.attacks.problem import Bounds, Problem, attacking, broadcast
from advmed.norms import check_norm, norm
from advmed.objective import Objective

Failing = Callable[[Tensor], Tensor]
"""Images to whether the model fails on each, (B,), bool."""


@dataclass(frozen=True)
class DDN:
    """Decoupled direction and norm (Rony et al. 2019, Algorithm 1), in L2 or Linf.

    Every step goes in the direction of the loss, and the noise is then brought to a norm of its own: a little smaller
    than before where the model fails, a little larger where it does not. What a failure is says the caller: a wrong
    class, a Dice below 0.5.

    Args:
        steps: number of gradient steps, >= 1; each takes a pass more, which looks for the failure.
        norm: 2 or inf.
        gamma: by which share the norm changes in a step, in (0, 1).

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> import torch
        >>> from advmed.attacks.minimum import DDN
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)  # a sum of four values
        >>> fails = lambda images: objective(images)[:, 0] > 1
        >>> images, norms = DDN(100).smallest(objective, torch.zeros(1, 1, 2, 2), 2.0, fails)
        >>> round(norms.item(), 2)  # four times 1/4: its L2 norm is 1/2
        0.5
    """

    steps: int
    norm: float = 2.0
    gamma: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        check_count("steps", self.steps)
        if not 0 < check_fraction("gamma", self.gamma) < 1:
            raise ValueError(f"gamma must be in (0, 1), got {self.gamma!r}")

    @property
    def description(self) -> str:
        """What it does, for a report."""
        return f"DDN (Rony et al. 2019): the smallest noise that makes the model fail, {self.steps} steps"

    @property
    def gradients(self) -> int:
        """Gradients per image, at all levels together."""
        return self.steps

    @property
    def queries(self) -> int:
        """Forward passes without a gradient per image, at all levels together."""
        return self.steps + 1

    def smallest(
        self, objective: Objective, images: Tensor, radius: float, failing: Failing, *, bounds: Bounds = None
    ) -> tuple[Tensor, Tensor]:
        """Searches a batch.

        Args:
            objective: images -> (B, K) loss terms, whose sum is followed.
            images: shape (B, C, *spatial).
            radius: the largest norm of interest, with which the search starts, > 0.
            failing: whether the model fails.
            bounds: lowest and highest value of an input.

        Returns:
            The images with the smallest noise that was found, those given where none was; its norms, inf there, (B,).
        """
        with attacking(objective):
            problem = Problem(objective, images, 2 * torch.as_tensor(radius), norm=self.norm, bounds=bounds)
            size = problem.radius / 2
            iterate, noise = problem.start(0.0)
            found, least = iterate, torch.full((len(images),), math.inf, device=images.device)
            for step in range(self.steps + 1):
                fails = failing(problem.shown(iterate))
                length = problem.length(iterate, noise).to(least.dtype)
                better = fails & (length < least)
                least = torch.where(better, length, least)
                found = torch.where(broadcast(better, iterate), iterate, found)
                if step == self.steps:
                    break
                _, direction = problem.slope(iterate)
                share = (1 + math.cos(math.pi * step / self.steps)) / 2
                size = size * torch.where(broadcast(fails, noise), 1 - self.gamma, 1 + self.gamma)
                noise = torch.addcmul(noise, problem.radius * (share / 2), direction)
                iterate, noise = problem.inside(self._of_size(noise, torch.minimum(size, problem.radius)))
            return problem.shown(found), least

    def _of_size(self, noise: Tensor, size: Tensor) -> Tensor:
        """The noise with a norm: scaled in L2, cut off in Linf."""
        if self.norm == math.inf:
            return torch.minimum(torch.maximum(noise, -size), size)
        length = norm(noise, self.norm, keepdim=True)
        return noise * (size / torch.where(length > 0, length, 1.0))
