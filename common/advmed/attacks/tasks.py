"""What to climb where a task has more to offer than its loss: single terms, detectors, landmarks.

An objective offers it by methods of its own (:class:`DetectionTask`, :class:`LandmarkTask`), because only a host knows
how its network's output becomes objects or places. What to do with it is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from torch import Tensor

from advmed.objective import Objective, model_of, names_of


@runtime_checkable
class DetectionTask(Objective, Protocol):
    """An objective of a detector."""

    def confidence(self, images: Tensor, /) -> Tensor:
        """How much is detected, whatever it is: the sum of the confidences of all candidate boxes, (B, 1)."""
        ...

    def holding(self, images: Tensor, /) -> Objective:
        """The same loss, with candidate boxes assigned to the true objects as they are on ``images``."""
        ...


@runtime_checkable
class LandmarkTask(Objective, Protocol):
    """An objective of a landmark detector."""

    def expected_error(self, images: Tensor, /) -> Tensor:
        """The mean distance of where the network expects the landmarks to where they are, (B, 1)."""
        ...

    def towards(self, images: Tensor, /) -> Objective:
        """How near the network's maps are to those of landmarks far from where they are on ``images``."""
        ...


class OfTask:
    """An objective made of a function of the images: ``images -> (B, 1)``.

    Args:
        objective: of the host, whose model is held still.
        value: what is to rise.
    """

    names = ("loss",)

    def __init__(self, objective: Objective, value: Callable[[Tensor], Tensor]) -> None:
        self.value, self.model = value, model_of(objective)

    def __call__(self, images: Tensor) -> Tensor:
        """The loss."""
        return self.value(images)


class TaskLoss:
    """Base of losses of a task: frozen dataclasses whose points the host's own loss ranks."""

    needs_classes: ClassVar[bool] = False
    goals: ClassVar[int] = 1
    queries: ClassVar[int] = 1

    def judge(self, objective: Any) -> Objective:
        """See :meth:`advmed.attacks.AttackLoss.judge`."""
        return cast(Objective, objective)


@dataclass(frozen=True)
class Terms(TaskLoss):
    """Some of the host's loss terms.

    Args:
        names: those that are climbed, as far as the objective has them.

    Example:
        >>> import torch
        >>> from advmed import APGD, Terms
        >>> def objective(images):
        ...     return torch.stack([images[:, 0], -9 * images[:, 0]], 1)
        >>> objective.names = ("left", "right")
        >>> APGD(20, loss=Terms(("left",)))(objective, torch.zeros(1, 1), 1.0).images.item()
        1.0
    """

    names: tuple[str, ...]

    name: ClassVar[str] = "terms of the loss"

    @property
    def description(self) -> str:
        """What is climbed, for a report."""
        return f"climbs {' and '.join(self.names)}"

    def objectives(self, objective: Any, images: Tensor) -> Sequence[Objective]:
        """See :meth:`advmed.attacks.AttackLoss.objectives`.

        Raises:
            TypeError: for an objective that has none of the terms.
        """
        own = names_of(objective, 0)
        places = [own.index(name) for name in self.names if name in own]
        if not places:
            raise TypeError(f"there is no term {' or '.join(self.names)} among those of the loss, {', '.join(own)}")
        return [OfTask(objective, lambda images: objective(images)[:, places].sum(1, keepdim=True))]


@dataclass(frozen=True)
class Appearing(TaskLoss):
    """Objects that are not there: raises the confidence of every candidate box of a detector.

    The host's loss sees them as one background among thousands of anchors; average precision counts each.
    """

    name: ClassVar[str] = "appearing objects"
    description: ClassVar[str] = "makes objects appear"

    def objectives(self, objective: Any, images: Tensor) -> Sequence[Objective]:
        """See :meth:`advmed.attacks.AttackLoss.objectives`."""
        task = _of(objective, DetectionTask, self.name)
        return [OfTask(task, task.confidence)]


@dataclass(frozen=True)
class Vanishing(TaskLoss):
    """No objects at all: lowers the confidence of every candidate box of a detector."""

    name: ClassVar[str] = "vanishing objects"
    description: ClassVar[str] = "makes all objects vanish"

    def objectives(self, objective: Any, images: Tensor) -> Sequence[Objective]:
        """See :meth:`advmed.attacks.AttackLoss.objectives`."""
        task = _of(objective, DetectionTask, self.name)
        return [OfTask(task, lambda images: -task.confidence(images))]


@dataclass(frozen=True)
class HeldTargets(TaskLoss):
    """A detector's loss whose candidate boxes stay with the objects that they were assigned to on the clean image.

    The host assigns boxes anew in every pass, to whatever fits best; so the loss of a box that an attack has moved away
    is replaced by that of one which is still right, and its gradient is lost.
    """

    name: ClassVar[str] = "held targets"
    description: ClassVar[str] = "climbs the loss of the boxes that are assigned on the clean image"

    def objectives(self, objective: Any, images: Tensor) -> Sequence[Objective]:
        """See :meth:`advmed.attacks.AttackLoss.objectives`."""
        return [_of(objective, DetectionTask, self.name).holding(images)]


@dataclass(frozen=True)
class ExpectedError(TaskLoss):
    """The distance between where a landmark is expected and where it is: the metric, made differentiable."""

    name: ClassVar[str] = "expected error"
    description: ClassVar[str] = "climbs the expected distance of the landmarks"

    def objectives(self, objective: Any, images: Tensor) -> Sequence[Objective]:
        """See :meth:`advmed.attacks.AttackLoss.objectives`."""
        task = _of(objective, LandmarkTask, self.name)
        return [OfTask(task, task.expected_error)]


@dataclass(frozen=True)
class Elsewhere(TaskLoss):
    """Landmarks far away, each with a weight that grows as long as it does not move (Yao et al. 2020, "Miss the point:
    targeted adversarial attack on multiple landmark detection", the adaptive weights of ATI-FGSM)."""

    name: ClassVar[str] = "landmarks elsewhere"
    description: ClassVar[str] = "moves the landmarks to other places, adaptively weighted"

    def objectives(self, objective: Any, images: Tensor) -> Sequence[Objective]:
        """See :meth:`advmed.attacks.AttackLoss.objectives`."""
        return [_of(objective, LandmarkTask, self.name).towards(images)]


def _of(objective: Any, kind: type, what: str) -> Any:
    """Returns ``objective`` if it offers what a task needs.

    Raises:
        TypeError: otherwise.
    """
    if not isinstance(objective, kind):
        wanted = "detectors" if kind is DetectionTask else "landmark detectors"
        raise TypeError(f"the loss of {what} is for {wanted}; {type(objective).__name__} is none (see {kind.__name__})")
    return objective
