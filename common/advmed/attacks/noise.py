"""Noise that is no attack: what a perturbation of the same norm does that nobody has aimed. A curve's control line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advmed.attacks.problem import AttackResult, Bounds, Problem, attacking
from advmed.norms import check_norm, norm, per_sample
from advmed.objective import Objective


@dataclass(frozen=True)
class Noise:
    """Independent noise in every entry, scaled so that its Lp norm over the whole input is the radius.

    Bounds can only make it smaller.

    Args:
        kind: "gaussian" or "uniform".
        norm: 2 or inf.

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> import torch
        >>> from advmed import Noise
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> found = Noise("gaussian")(objective, torch.zeros(1, 3, 8, 8), 2.0)
        >>> round(found.norms.item(), 3)
        2.0
    """

    kind: Literal["gaussian", "uniform"]
    norm: float = 2.0

    access: ClassVar[str] = "none"
    gradients: ClassVar[int] = 0
    queries: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        if self.kind not in ("gaussian", "uniform"):
            raise ValueError(f"kind must be 'gaussian' or 'uniform', got {self.kind!r}")

    @property
    def description(self) -> str:
        """What it does, for a report."""
        return f"no attack, the control: {self.kind} noise of the same norm"

    def __call__(
        self,
        objective: Objective,
        images: Tensor,
        radius: float | Tensor,
        *,
        bounds: Bounds = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Adds noise to a batch; see :class:`advmed.attacks.PGD`, whose arguments these are."""
        with attacking(objective):
            problem = Problem(objective, images, radius, norm=self.norm, bounds=bounds, generator=generator)
            shape = tuple(images.shape)
            noise = problem.normal(shape) if self.kind == "gaussian" else 2 * problem.uniform(shape) - 1
            length = per_sample(norm(noise, self.norm), noise)
            iterate, _ = problem.inside(noise * (problem.radius / torch.where(length > 0, length, 1.0)))
            return problem.result(iterate, problem.terms(iterate))
