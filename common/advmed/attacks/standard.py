"""The ensemble that a model is to be measured with: fixed attacks without parameters, the worst of which counts.

AutoAttack (Croce and Hein 2020) is that for classifiers, SEA (Croce, Singh and Hein 2024) for segmentations in Linf.
This is one recipe for all four tasks, in L2 and Linf, judged by the task's own metric: every member looks for the
largest value of another loss, and of all points that they find the one counts that is the worst for the metric. It is
fixed and has a version, so that two numbers under one name are of the same attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from advmed.attacks.apgd import APGD
from advmed.attacks.base import check_count
from advmed.attacks.losses import DLR, AttackLoss, Margin
from advmed.attacks.minimum import DDN
from advmed.attacks.problem import AttackResult, Bounds, attacking, broadcast, total
from advmed.attacks.segmentation import (
    CosineWeighted,
    JensenShannon,
    MaskedCrossEntropy,
    SoftDice,
)
from advmed.attacks.square import SquareAttack
from advmed.attacks.tasks import Appearing, Elsewhere, ExpectedError, HeldTargets, Terms, Vanishing
from advmed.norms import check_norm, norm
from advmed.objective import Objective, check_terms

RECIPE = "advmed-standard/2"

LOSSES: Mapping[str, Mapping[str, AttackLoss | None]] = {
    "classification": {"ce": None, "margin": Margin(), "dlr-targeted": DLR(targets=9)},
    "segmentation": {
        "sum": None,
        "ce-masked": MaskedCrossEntropy(),
        "js": JensenShannon(),
        "dice": SoftDice(),
        "cosine": CosineWeighted(),
    },
    "detection": {
        "sum": None,
        "class": Terms(("cls_loss",)),
        "box": Terms(("box_loss", "dfl_loss", "l1_loss")),
        "held": HeldTargets(),
        "vanish": Vanishing(),
        "appear": Appearing(),
    },
    "landmarks": {
        "sum": None,
        "heatmap": Terms(("heatmap",)),
        "offsets": Terms(("offset_y", "offset_x")),
        "error": ExpectedError(),
        "elsewhere": Elsewhere(),
    },
    "": {"sum": None},
}
"""What the gradient attacks of the recipe climb, by task; None is the host's own loss."""
STEADY: Mapping[str, tuple[str, ...]] = {
    "segmentation": ("sum", "dice"),
    "detection": ("sum",),
    "landmarks": ("sum",),
    "": ("sum",),
}
"""Which of them are climbed once more, in a ball of one size. A ball that shrinks takes all losses to the same few
maxima, whatever they start from; another finds others (docs/results/standard.md)."""


@dataclass(frozen=True)
class Judge:
    """How bad images are for the model, by the metric of the task.

    Attributes:
        value: images to (B,), larger is worse; NaN for a sample that has no value.
        fails_above: a sample with a larger value has failed; None: nothing says when.
        lost_at: at this value nothing is left to lose; inf where a sample can always get worse.
    """

    value: Callable[[Tensor], Tensor]
    fails_above: float | None = None
    lost_at: float = math.inf


class Found(NamedTuple):
    """What a member of the ensemble found at a level.

    Attributes:
        member: its name.
        level: noise bound.
        images: shape of the images; of a sample that the member was not run on, the worst known so far.
        terms: loss terms there, (B, K).
        nonfinite: steps that a non-finite gradient cost, (B,).
    """

    member: str
    level: float
    images: Tensor
    terms: Tensor
    nonfinite: Tensor


@dataclass(frozen=True)
class Standard:
    """The ensemble: APGD on each loss of a task, DDN, and the Square Attack.

    The recipe is ours and fixed; its pattern is AutoAttack (Croce and Hein 2020, arXiv 2003.01690) and, for
    segmentations, SEA (Croce, Singh and Hein 2024).

    Levels are attacked from small to large, each member from what it found at the last one. A sample that has nothing
    left to lose, as far as the judge can see, is left to the first member alone, because other metrics may see more: a
    wrong class can be made surer, which average precision counts. Where the objective has ``take(rows)``, the objective
    of some samples of its batch, the other members spend nothing on it.

    Args:
        task: "classification", "segmentation", "detection" or "landmarks"; "": nothing is known but the loss.
        norm: 2 or inf.
        steps: of each gradient attack.
        queries_of_square: of the Square Attack; 0: none, for images without spatial dimensions.

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import Standard
        >>> objective = ClassificationObjective(torch.nn.Flatten(), torch.tensor([0]))  # two pixels are the logits
        >>> found = Standard("classification")(objective, torch.tensor([[[[1.0, 0.0]]]]), 1.0)
        >>> bool(found.images[0, 0, 0, 1] > found.images[0, 0, 0, 0]), Standard.recipe
        (True, 'advmed-standard/2')
    """

    task: str = ""
    norm: float = 2.0
    steps: int = 100
    queries_of_square: int = 450

    access: ClassVar[str] = "white box"
    recipe: ClassVar[str] = RECIPE

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        check_count("steps", self.steps)
        if self.task not in LOSSES:
            raise ValueError(f"task must be one of {', '.join(filter(None, LOSSES))}, got {self.task!r}")

    @cached_property
    def members(self) -> Mapping[str, APGD | DDN | SquareAttack]:
        """The attacks by their names, in the order in which they run."""
        found: dict[str, APGD | DDN | SquareAttack] = {}
        for name, loss in LOSSES[self.task].items():
            steps = self.steps if loss is None or loss.goals == 1 else max(1, self.steps // 2)  # for each of its goals
            found[f"apgd-{name}"] = APGD(steps, self.norm, loss=loss, shrink=True)
        for name in STEADY.get(self.task, ()):
            found[f"apgd-{name}-steady"] = APGD(self.steps, self.norm, loss=LOSSES[self.task][name])
        found["ddn"] = DDN(self.steps, self.norm)
        if self.queries_of_square:
            found["square"] = SquareAttack(self.queries_of_square, self.norm)
        return found

    @property
    def gradients(self) -> int:
        """Gradients per image at a level, at most."""
        return sum(member.gradients for member in self.members.values())

    @property
    def queries(self) -> int:
        """Forward passes without a gradient per image at a level, at most; two more a member, to judge."""
        return sum(member.queries + 2 for member in self.members.values())

    @property
    def description(self) -> str:
        """What it does, for a report."""
        return f"{RECIPE}, the worst of {', '.join(self.members)} for the metric"

    def search(
        self,
        objective: Objective,
        images: Tensor,
        levels: Sequence[float],
        *,
        judge: Judge,
        generator: Callable[[str, float], torch.Generator],
        bounds: Bounds = None,
    ) -> Iterator[Found]:
        """Attacks a batch at every level.

        Args:
            objective: images -> (B, K) loss terms.
            images: clean input, shape (B, C, *spatial).
            levels: noise bounds above 0, increasing.
            judge: how bad images are.
            generator: source of randomness of a member at a level.
            bounds: lowest and highest value of an input.

        Yields:
            What every member found, level by level.
        """
        yield from self._search(_Record(objective, images, judge), images, levels, generator, bounds)

    def _search(
        self,
        record: _Record,
        images: Tensor,
        levels: Sequence[float],
        generator: Callable[[str, float], torch.Generator],
        bounds: Bounds,
    ) -> Iterator[Found]:
        """As :meth:`search`, with the books that it keeps."""
        objective = record.objective
        smallest = self._smallest(objective, images, levels[-1], record.judge, bounds)
        last: dict[str, Tensor] = {}  # by member, what it found at the level before
        for level in levels:
            for number, (name, member) in enumerate(self.members.items()):
                rows = record.open if number else torch.arange(len(images), device=images.device)
                nonfinite = torch.zeros(len(images), dtype=torch.int64, device=images.device)
                whole = record.images
                if isinstance(member, DDN):
                    if smallest is not None:
                        noisy, norms = smallest
                        whole = torch.where(broadcast(norms <= level, images), noisy, whole)
                elif len(rows):
                    part, own = _take(objective, rows, len(images))
                    warm = name in last and not isinstance(member, SquareAttack)
                    where = {"initial": last[name][part]} if warm else {}
                    result = member(own, images[part], level, bounds=bounds, generator=generator(name, level), **where)
                    whole = whole.clone()
                    whole[part], nonfinite[part] = result.images, result.nonfinite
                    last[name] = whole
                yield Found(name, level, whole, record.offer(whole), nonfinite)

    def __call__(
        self,
        objective: Objective,
        images: Tensor,
        radius: float | Tensor,
        *,
        bounds: Bounds = None,
        generator: torch.Generator | None = None,
        judge: Judge | None = None,
    ) -> AttackResult:
        """Attacks a batch at one level.

        Args:
            objective: images -> (B, K) loss terms.
            images: shape (B, C, *spatial).
            radius: noise bound, one number.
            bounds: lowest and highest value of an input.
            generator: source of randomness.
            judge: how bad images are; None: a classifier's wrong classes, else the host's loss.
        """
        if judge is None:
            judge = judge_of(objective)
        source = generator
        if source is None:
            source = torch.Generator()
            source.seed()
        record = _Record(objective, images, judge)
        nonfinite = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        for found in self._search(record, images, [float(radius)], lambda name, level: source, bounds):
            nonfinite += found.nonfinite
        noise = (record.images.float() - images.float()).detach()
        return AttackResult(record.images, record.terms, norm(noise, self.norm), None, nonfinite)

    def _smallest(
        self, objective: Objective, images: Tensor, radius: float, judge: Judge, bounds: Bounds
    ) -> tuple[Tensor, Tensor] | None:
        """What the attack of the smallest noise finds; None where nothing says what a failure is."""
        member = next((m for m in self.members.values() if isinstance(m, DDN)), None)
        limit = judge.fails_above
        if member is None or limit is None or not radius:
            return None
        return member.smallest(objective, images, radius, lambda noisy: judge.value(noisy) > limit, bounds=bounds)


class _Record:
    """The worst images known so far, by the judge; of those that it finds alike, the ones with the larger loss."""

    def __init__(self, objective: Objective, images: Tensor, judge: Judge) -> None:
        self.objective, self.judge, self.images = objective, judge, images
        self.value, self.terms = self._look(images)

    @property
    def open(self) -> Tensor:
        """Samples that have something to lose, their numbers."""
        return (~(self.value >= self.judge.lost_at)).nonzero()[:, 0]

    def offer(self, images: Tensor) -> Tensor:
        """Takes what is worse; returns the loss terms of what was offered, (B, K)."""
        if images is self.images:
            return self.terms
        value, terms = self._look(images)
        loss, old = total(terms), total(self.terms)
        worse = (value > self.value) | ((value == self.value) & (loss > old))
        self.value = torch.where(worse, value, self.value)
        self.terms = torch.where(worse[:, None], terms, self.terms)
        self.images = torch.where(broadcast(worse, images), images, self.images)
        return terms

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with attacking(self.objective):
            terms = check_terms(self.objective(images), images)
            value = self.judge.value(images)
        return value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), terms


def judge_of(objective: Objective) -> Judge:
    """A judge for an objective alone: wrong classes where it shows classes of images, else its loss."""
    if hasattr(objective, "terms_and_errors"):
        errors: Any = objective.terms_and_errors
        return Judge(lambda images: errors(images)[1].double(), fails_above=0.5, lost_at=1.0)
    return Judge(lambda images: total(check_terms(objective(images), images)))


def _take(objective: Objective, rows: Tensor, count: int) -> tuple[Any, Objective]:
    """The samples to attack and their objective: all of them where it cannot be taken apart."""
    take: Callable[[Tensor], Objective] | None = getattr(objective, "take", None)
    if len(rows) == count or take is None:
        return slice(None), objective
    return rows, take(rows)
