"""What an attack is, what the attacks share that follow gradients, and the checks of their settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from advmed.attacks.losses import AttackLoss, queries_beside
from advmed.attacks.problem import AttackResult
from advmed.norms import check_norm


class Attack(Protocol):
    """What an evaluation attacks with: a dataclass, whose fields are what an evaluation's numbers depend on.

    Example:
        >>> from advmed import PGD, Attack, Noise
        >>> attacks: list[Attack] = [PGD(steps=20, step_scale=4), Noise("gaussian")]
        >>> [(attack.access, attack.gradients, attack.queries) for attack in attacks]
        [('white box', 20, 1), ('none', 0, 1)]
    """

    @property
    def norm(self) -> float:
        """2 or inf."""
        ...

    @property
    def access(self) -> str:
        """What it knows of the model: "white box" (gradients), "black box" (losses), or "none": it is a control."""
        ...

    @property
    def gradients(self) -> int | None:
        """Gradients per image; None where that is not known beforehand."""
        ...

    @property
    def queries(self) -> int | None:
        """Forward passes without a gradient per image; None where that is not known beforehand."""
        ...

    @property
    def description(self) -> str:
        """What it does, for a report."""
        ...

    def __call__(
        self,
        objective: Any,
        images: Tensor,
        radius: float | Tensor,
        /,
        *,
        bounds: tuple[float, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Attacks a batch; the result has terms."""
        ...


class GradientAttack:
    """Base of the frozen dataclasses of attacks by gradients, which name these fields in the order that suits them."""

    steps: int
    norm: float
    random_start: float
    restarts: int
    loss: AttackLoss | None

    access: ClassVar[str] = "white box"

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        object.__setattr__(self, "random_start", check_fraction("random_start", self.random_start, "of the radius"))

    @property
    def gradients(self) -> int:
        """Gradients per image; with a loss of several goals as many for each as there may be."""
        return self.steps * self.restarts * (1 if self.loss is None else self.loss.goals)

    @property
    def queries(self) -> int:
        """Forward passes without a gradient, per image."""
        if self.loss is None:
            return self.restarts
        return self.restarts * self.loss.goals + queries_beside(self.loss, self.restarts)

    @property
    def starts(self) -> Iterator[float]:
        """Fraction of the radius from whose ball each run starts: after the first at random, or all would be alike."""
        for run in range(self.restarts):
            yield self.random_start if run == 0 else self.random_start or 1.0

    @property
    def runs(self) -> list[Any]:
        """Its runs, each an attack of its own."""
        this: Any = self
        return [replace(this, restarts=1, random_start=start) for start in self.starts]

    def _described(self, search: str, found: str) -> str:
        where = "a random point of the ball" if self.random_start else "the input"
        runs = f", the worst of {self.restarts} runs" if self.restarts > 1 else ""
        climbs = "" if self.loss is None else f"; {self.loss.description}"
        return f"{search} from {where}; {found}{runs}{climbs}"


def check_count(name: str, value: object) -> int:
    """Returns a whole number >= 1.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def check_fraction(name: str, value: float, of: str = "") -> float:
    """Returns a number in [0, 1] as a float.

    Raises:
        ValueError: for anything else.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a fraction {of}{' ' if of else ''}in [0, 1], got {value!r}")
    return float(value)
