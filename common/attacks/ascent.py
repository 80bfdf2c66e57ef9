"""What the attacks share that follow gradients: runs from several starts, of which each sample keeps the worst."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from common.attacks.settings import check_count, check_fraction
from common.norms import check_norm


class Ascent:
    """Base of the frozen dataclasses of attacks by gradients, which name these fields in the order that suits them."""

    steps: int
    norm: float
    random_start: float
    restarts: int

    access: ClassVar[str] = "white box"

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        object.__setattr__(self, "random_start", check_fraction("random_start", self.random_start, "of the radius"))

    @property
    def gradients(self) -> int:
        """Gradients per image."""
        return self.steps * self.restarts

    @property
    def queries(self) -> int:
        """Forward passes without a gradient, per image."""
        return self.restarts

    @property
    def starts(self) -> Iterator[float]:
        """Fraction of the radius from whose ball each run starts: after the first at random, or all would be alike."""
        for run in range(self.restarts):
            yield self.random_start if run == 0 else self.random_start or 1.0

    @property
    def _where(self) -> str:
        return "a random point of the ball" if self.random_start else "the input"

    @property
    def _runs(self) -> str:
        return f", the worst of {self.restarts} runs" if self.restarts > 1 else ""
