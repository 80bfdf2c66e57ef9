"""What an attack can climb in place of the host's own loss: any attack of this folder takes one as its ``loss``.

``PGD(100, 5.0, loss=CosineWeighted())`` is CosPGD, ``APGD(100, loss=Margin())`` climbs the margin of the logits. A loss
makes objectives of the host's objective, which must show its classes (:class:`advmed.objective.ClassObjective`); what
the attack finds is judged, and reported, by the host's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from advmed.attacks.problem import AttackResult, Bounds, Worst, attacking
from advmed.distances import at_least_float32
from advmed.objective import Averaged, ClassObjective, ClassScores, Objective, check_terms, classes_of, model_of


class AttackLoss(Protocol):
    """A loss to attack with; a frozen dataclass, whose fields belong to what an evaluation's numbers depend on.

    Example:
        >>> from advmed import APGD, AttackLoss, Margin
        >>> loss: AttackLoss = Margin(targets=9)
        >>> loss.description, APGD(100, loss=loss).gradients  # 100 steps for each of the targets
        ('climbs the margin of each of up to 9 wrong classes', 900)
    """

    name: ClassVar[str]
    needs_classes: ClassVar[bool]
    """Whether the host's objective must show its classes."""

    @property
    def goals(self) -> int:
        """How many objectives it may make."""
        ...

    @property
    def queries(self) -> int:
        """Forward passes beside those of searches and of the judge: to make the objectives, for the host's terms."""
        ...

    @property
    def description(self) -> str:
        """What is climbed, for a report; completes "...; "."""
        ...

    def objectives(self, objective: ClassObjective, images: Tensor, /) -> Sequence[Objective]:
        """What is climbed, one after the other: each ``images -> (B, 1)``. Called without gradients."""
        ...

    def judge(self, objective: ClassObjective, /) -> Objective:
        """What decides between the points that runs and objectives have found: the largest sum of its terms wins."""
        ...


def attack_by_loss(
    attack: Any,
    loss: AttackLoss,
    objective: Objective,
    images: Tensor,
    radius: float | Tensor,
    *,
    bounds: Bounds,
    generator: torch.Generator | None,
    initial: Tensor | None = None,
) -> AttackResult:
    """Attacks every objective of a loss, run by run, and keeps of each sample the point that its judge finds worst.

    Args:
        attack: a dataclass with the field ``loss``; the runs of one with restarts are its ``runs``.
        loss: makes the objectives.
        objective: of the host; the terms of the result are its.
        images: as in :meth:`advmed.attacks.PGD.__call__`, as what follows.
        radius: noise bound.
        bounds: lowest and highest value of an input.
        generator: source of randomness.
        initial: where the first run starts, for an attack that can be told.

    Raises:
        TypeError: for an objective that does not offer what the loss needs, such as classes.
    """
    draws = objective.draws if isinstance(objective, Averaged) else None
    hosts = objective.objective if isinstance(objective, Averaged) else objective
    shown: Any = classes_of(hosts, f"the {loss.name}") if loss.needs_classes else hosts

    def over_draws(value: Objective) -> Objective:
        return value if draws is None else Averaged(value, draws)

    own = replace(attack, loss=None)
    # Each pass by itself: a random layer draws for every attack what it would draw for one alone.
    with attacking(objective):
        goals = [over_draws(goal) for goal in loss.objectives(shown, images)]
    where = {} if initial is None else {"initial": initial}
    # Only the first run begins where it is told to; the others are there to begin somewhere else.
    searches = [
        (run, goal, {} if number else where) for goal in goals for number, run in enumerate(getattr(own, "runs", [own]))
    ]
    judge, worst = over_draws(loss.judge(shown)), Worst()
    nonfinite = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for run, goal, told in searches:
        found: AttackResult = run(goal, images, radius, bounds=bounds, generator=generator, **told)
        nonfinite = nonfinite + found.nonfinite
        if len(searches) > 1:
            with attacking(objective):
                worst.offer(check_terms(judge(found.images), images), found.images, found.norms)
            best, norms = worst.values
        else:
            best, norms = found.images, found.norms
    with attacking(objective):
        return AttackResult(best, check_terms(objective(best), images), norms, None, nonfinite)


def queries_beside(loss: AttackLoss, runs: int) -> int:
    """Forward passes of :func:`attack_by_loss` beside those of its searches, for each image.

    Args:
        loss: what is climbed.
        runs: at each of its objectives.
    """
    searches = loss.goals * runs
    return loss.queries + (searches if searches > 1 else 0)


class TowardsClasses(ABC):
    """Base of losses of the logits of images: frozen dataclasses with ``targets``.

    That is the number of wrong classes which are made the target one after the other, beginning with the most likely of
    the clean image; 0: the largest wrong class.
    """

    targets: int

    needs_classes: ClassVar[bool] = True

    @property
    def goals(self) -> int:
        """One, or one for each target."""
        return max(1, self.targets)

    @property
    def queries(self) -> int:
        """See :attr:`AttackLoss.queries`."""
        return 1 + (self.targets > 0)

    def objectives(self, objective: ClassObjective, images: Tensor) -> Sequence[Objective]:
        """See :meth:`AttackLoss.objectives`."""
        if not self.targets:
            return [OfClasses(objective, self.value)]
        scores = objective.class_scores(objective.predictions(images))
        return [OfClasses(objective, partial(self.value, targets=goal)) for goal in _likely(scores, self.targets)]

    def judge(self, objective: ClassObjective) -> Objective:
        """See :meth:`AttackLoss.judge`: the margin, which is above 0 where the image is misclassified."""
        return OfClasses(objective, margin)

    @staticmethod
    @abstractmethod
    def value(scores: ClassScores, targets: Tensor | None = None) -> Tensor:
        """The loss, (B, 1); of the best wrong class, or of the classes ``targets``, (B,), int64."""


@dataclass(frozen=True)
class Margin(TowardsClasses):
    """How far the best wrong class of an image is above the true one: max_{j != y} z_j - z_y of the logits z.

    Above 0 where the image is misclassified, and nowhere else (Carlini and Wagner 2017, "Towards Evaluating the
    Robustness of Neural Networks", arXiv 1608.04644, the function inside f_6).
    Cross-entropy rises for other reasons, too, where there are many classes.

    Args:
        targets: number of wrong classes whose own margins are raised one after the other, beginning with the most
            likely of the clean image, as in the targeted attacks of Croce and Hein 2020; 0 raises the largest margin.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import APGD, Margin
        >>> objective = ClassificationObjective(torch.nn.Identity(), torch.tensor([0]))  # images are logits
        >>> found = APGD(10, random_start=0, loss=Margin())(objective, torch.tensor([[1.0, 0.0]]), 1.0)
        >>> round((found.images[0, 1] - found.images[0, 0]).item(), 3)  # from -1, noise of L2 norm 1 adds sqrt(2)
        0.414
    """

    targets: int = 0

    name: ClassVar[str] = "margin of the logits"

    @property
    def description(self) -> str:
        """What is climbed, for a report."""
        goal = f"each of up to {self.targets} wrong classes" if self.targets else "the largest wrong class"
        return f"climbs the margin of {goal}"

    @staticmethod
    def value(scores: ClassScores, targets: Tensor | None = None) -> Tensor:
        """See :func:`margin`."""
        return margin(scores, targets)


@dataclass(frozen=True)
class DLR(TowardsClasses):
    """Difference of logits ratio: the margin of the logits over their spread.

    (Croce and Hein 2020, arXiv 2003.01690, eq. 6, and with a target eq. 7.)

    Neither the scale of the logits nor a shift of them changes it, so that a network with huge logits, whose
    cross-entropy has no gradient in float32, is attacked all the same. z_j - z_y is divided by z_1 - z_3 of the sorted
    logits, with a target by z_1 - (z_3 + z_4) / 2; where there are too few classes for that, the margin is climbed.

    Args:
        targets: number of wrong classes that are made the target one after the other, as in :class:`Margin`; 0: none.

    Example:
        >>> import torch
        >>> from advmed import ClassScores, DLR
        >>> logits = torch.tensor([[8.0, 4.0, 0.0, -1.0]])
        >>> truth = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> [DLR.value(ClassScores(scale * logits, truth, None, True)).item() for scale in (1.0, 1000.0)]
        [-0.5, -0.5]
    """

    targets: int = 0

    name: ClassVar[str] = "difference of logits ratio"

    @property
    def description(self) -> str:
        """What is climbed, for a report."""
        goal = f"for each of up to {self.targets} wrong classes" if self.targets else "for the largest wrong class"
        return f"climbs the difference of logits ratio {goal}"

    @staticmethod
    def value(scores: ClassScores, targets: Tensor | None = None) -> Tensor:
        """The ratio, (B, 1); of the best wrong class, or of the classes ``targets``, (B,), int64."""
        found = margin(scores, targets)
        logits = at_least_float32(scores.logits)
        classes = logits.shape[1]
        if classes < (3 if targets is None else 4):
            return found
        top = logits.topk(3 if targets is None else 4, 1).values
        least = top[:, 2:3] if targets is None else (top[:, 2:3] + top[:, 3:4]) / 2
        return found / (top[:, :1] - least).clamp_min(1e-12)


def margin(scores: ClassScores, targets: Tensor | None = None) -> Tensor:
    """z_j - z_y of the logits, (B, 1): of the best wrong class j, or of the classes ``targets``, (B,), int64.

    Raises:
        TypeError: for predictions that are no single choice of a class for each image.
    """
    true, logits = _true(scores), at_least_float32(scores.logits)
    if targets is not None:
        return logits.gather(1, targets[:, None]) - logits.gather(1, true)
    return logits.scatter(1, true, -torch.inf).amax(1, keepdim=True) - logits.gather(1, true)


def _likely(scores: ClassScores, number: int) -> tuple[Tensor, ...]:
    """The most likely wrong classes of each image, as many as asked for or as there are: (B,) each."""
    wrong = scores.logits.scatter(1, _true(scores), -torch.inf)
    return wrong.argsort(1, descending=True)[:, : min(number, wrong.shape[1] - 1)].unbind(1)


def _true(scores: ClassScores) -> Tensor:
    if scores.logits.ndim != 2 or not scores.exclusive:
        raise TypeError(
            f"the margin of the logits is for one class an image, logits (B, classes), got {tuple(scores.logits.shape)}"
        )
    return scores.truth.argmax(1, keepdim=True)


class OfClasses:
    """The objective of a loss of the classes: ``images -> (B, 1)``.

    Args:
        objective: of the host.
        value: the loss, (B, 1), of its classes.
    """

    names = ("loss",)

    def __init__(self, objective: ClassObjective, value: Callable[[ClassScores], Tensor]) -> None:
        self.objective, self.value, self.model = objective, value, model_of(objective)

    def __call__(self, images: Tensor) -> Tensor:
        """The loss."""
        return self.value(self.objective.class_scores(self.objective.predictions(images)))
