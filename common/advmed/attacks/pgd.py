"""PGD (Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks") and I-FGSM (Kurakin et al.
2017, "Adversarial examples in the physical world"): the two attacks of the AMAT paper (arXiv 2206.01736, section 3.3),
which evaluates with PGD-100 and I-FGSM-10, in L2 (section 3.4); its authors' published code trains with PGD-20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advmed.attacks.base import GradientAttack
from advmed.attacks.losses import AttackLoss, attack_by_loss
from advmed.attacks.problem import AttackResult, Bounds, CleanPass, Problem, Worst, attacking, check_call
from advmed.norms import per_sample
from advmed.objective import Objective

Revise = Callable[[Tensor, Tensor], Tensor]
"""What the first step has found, its loss terms, (B, K), and the norms of its noise, (B,), to the radii to go on with,
(B,)."""
_LAST_OF_FIRST = 1 / 4
"""Length of the last decreasing step, in first ones."""


@dataclass(frozen=True)
class PGD(GradientAttack):
    """Iterated steepest ascent on the summed loss terms inside an Lp ball.

    Projected gradient descent on the negative loss (Madry et al. 2018, "Towards Deep Learning Models Resistant to
    Adversarial Attacks", arXiv 1706.06083, section 2.1, there in Linf); the AMAT paper evaluates with 100 steps in L2
    (arXiv 2206.01736, sections 3.3 and 3.4).

    One step: z = x_t + alpha * g/||g||_2 (L2) or x_t + alpha * sign(g) (Linf), alpha = step_scale * radius / steps,
    then projection onto the ball around x and onto the bounds. All lengths are per sample. Steps of ``step_scale`` 1
    from the image itself are I-FGSM. A ``schedule`` makes the first steps longer than the last; with few steps that
    finds more.

    Args:
        steps: number of gradient steps, >= 1.
        step_scale: a in alpha = a * radius / steps, > 0: the length of all steps together, in radii. Below 1 the sphere
            is out of reach.
        norm: 2 or inf.
        random_start: fraction in [0, 1] of the radius from whose ball the start is drawn (True: 1, False: 0).
        restarts: runs per sample, of which the one with the largest loss is kept; runs after the first always start
            at random, or they would all be the same.
        keep: "last" returns the last iterate (the papers), "best" the one with the largest summed loss. The image is
            no iterate: where noise of any step lowers the loss, so does that which is returned.
        loss: what is climbed in place of the host's loss, an :class:`AttackLoss`; None for the host's.
        schedule: "equal" steps, or "decreasing" ones, each shorter than the one before by the same factor, down to a
            quarter of the first (half of it where there are two): 3 steps of ``step_scale`` 1.75 are 1, 1/2 and 1/4
            radius long.

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> import torch
        >>> from advmed import PGD
        >>> attack = PGD(steps=20, step_scale=4)
        >>> found = attack(lambda images: images.flatten(1).sum(1, keepdim=True), torch.zeros(1, 1, 2, 2), 1.0)
        >>> round(found.norms.item(), 3), round(found.terms.item(), 3)  # a sum of 4 values rises by sqrt(4) at most
        (1.0, 2.0)
    """

    steps: int
    step_scale: float
    norm: float = 2.0
    random_start: float = 0.0
    restarts: int = 1
    keep: Literal["last", "best"] = "last"
    loss: AttackLoss | None = None
    schedule: Literal["equal", "decreasing"] = "equal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.step_scale) and self.step_scale > 0):
            raise ValueError(f"step_scale must be positive (1 just reaches the radius), got {self.step_scale!r}")
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep must be 'last' or 'best', got {self.keep!r}")
        if self.schedule not in ("equal", "decreasing"):
            raise ValueError(f"schedule must be 'equal' or 'decreasing', got {self.schedule!r}")

    @property
    def lengths(self) -> tuple[float, ...]:
        """Of the steps, in radii."""
        if self.schedule == "equal" or self.steps == 1:
            return (self.step_scale / self.steps,) * self.steps
        factor = max(_LAST_OF_FIRST, 0.5 ** (self.steps - 1)) ** (1 / (self.steps - 1))
        weights = [factor**number for number in range(self.steps)]
        return tuple(self.step_scale * weight / sum(weights) for weight in weights)

    @property
    def description(self) -> str:
        """What it does, for a report."""
        found = "largest loss" if self.keep == "best" else "last step"
        first, last = self.lengths[0], self.lengths[-1]
        length = f"{first:.3g}" if self.schedule == "equal" else f"{first:.3g} to {last:.3g}"
        return self._described(f"{self.steps} gradient steps of level x {length}", found)

    def __call__(
        self,
        objective: Objective,
        images: Tensor,
        radius: float | Tensor,
        *,
        bounds: Bounds = None,
        thresholds: Tensor | Sequence[float] | None = None,
        patience: int | None = None,
        generator: torch.Generator | None = None,
        final_pass: bool = True,
        clean: CleanPass | None = None,
        revise: Revise | None = None,
    ) -> AttackResult:
        """Attacks a batch.

        Works inside or outside autocast, ``no_grad`` and ``inference_mode``. Where the objective names its ``model``,
        the model is held still (:func:`advmed.guard.preserved`).

        Args:
            objective: images -> (B, K) loss terms; their sum is what rises.
            images: clean input x, shape (B, C, *spatial), floating point.
            radius: noise bound, one number or (B,), >= 0, in the units of the images; 0 gives the image back exactly.
            bounds: lowest and highest value of an input; an image that exceeds them itself may keep its values.
            thresholds: K numbers, for ``crossing`` and ``patience``.
            patience: a sample stays where it is so many steps after one of its terms has reached its threshold (Zhang
                et al. 2020, friendly adversarial training); None: all steps.
            generator: source of the random starts; without one they are not repeatable. No global random state moves.
            final_pass: False leaves the loss terms of the last iterate to a caller who computes them anyway
                (only with ``keep="last"`` and one run).
            clean: what a pass on ``images`` has told already; a run that starts there makes one pass less.
            revise: is told by the pass that begins the second step what the first one has found, and says how far to
                go on: for radii that depend on what the loss does. Noise beyond a radius is brought back to it.

        Raises:
            ValueError: a radius that is negative or not finite, as many thresholds as there are no terms, or
                ``revise`` for anything but the last iterate of one run on the host's loss.
        """
        if revise is not None and (self.loss is not None or self.keep == "best" or self.restarts > 1):
            raise ValueError("a radius can be revised for the last iterate of one run on the host's loss only")
        if self.loss is not None:
            return attack_by_loss(self, self.loss, objective, images, radius, bounds=bounds, generator=generator)
        with attacking(objective):
            problem = Problem(objective, images, radius, norm=self.norm, bounds=bounds, generator=generator)
            limits = None
            if thresholds is not None:
                limits = torch.as_tensor(thresholds, dtype=problem.images.dtype, device=images.device)
            runs = Worst()
            for start in self.starts:
                known = clean if start == 0 else None
                climbed = self._climb(problem, start, limits, patience, final_pass, known, revise)
                iterate, terms, crossing, seen = climbed
                if terms is None:
                    return problem.result(iterate, None, crossing, seen)
                runs.offer(terms, iterate, *([] if crossing is None else [crossing]))
            return problem.result(runs.values[0], runs.terms, None if limits is None else runs.values[1])

    def _climb(
        self,
        problem: Problem,
        start: float,
        limits: Tensor | None,
        patience: int | None,
        final_pass: bool,
        clean: CleanPass | None,
        revise: Revise | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        """One run: the iterate, its terms (None without the final pass), the crossing if there are limits, and what
        the last pass but the final one saw (without the final pass)."""
        best = Worst() if self.keep == "best" else None
        crossing = None if limits is None else torch.zeros_like(problem.radius).flatten()
        since = torch.zeros_like(problem.nonfinite)  # steps since a term reached its threshold, that one included
        iterate, noise = problem.start(start)
        seen = None
        for number, length in enumerate(self.lengths):
            if number == 0 and clean is not None:
                terms, direction = problem.ascent(clean.terms, clean.gradient.to(iterate.dtype))
            else:
                terms, direction = problem.slope(iterate)
            if limits is not None and crossing is not None:
                inside = _inside(terms, limits)
                crossing = torch.where(inside, problem.length(iterate, noise), crossing)
                if patience is not None:
                    since = since + ((since > 0) | ~inside)
                    direction = direction * (since <= patience).reshape(problem.radius.shape)
            if best is not None and (number > 0 or start > 0):  # the image itself is nothing that was found
                best.offer(terms, iterate)
            if number == self.steps - 1 > 0 and not final_pass:
                seen = terms, problem.length(iterate, noise)
            if number == 1 and revise is not None:
                problem.radius = per_sample(revise(terms, problem.length(iterate, noise)), problem.images)
                iterate, noise = problem.inside(noise)
            iterate, noise = problem.inside(torch.addcmul(noise, problem.radius * length, direction, out=direction))
        if not final_pass and best is None and self.restarts == 1:
            return iterate, None, crossing, seen
        terms = problem.terms(iterate)
        if limits is not None and crossing is not None:
            crossing = torch.where(_inside(terms, limits), problem.length(iterate, noise), crossing)
        if best is not None:
            best.offer(terms, iterate)
            return best.values[0], best.terms, crossing, None
        return iterate, terms, crossing, None


def _inside(terms: Tensor, limits: Tensor) -> Tensor:
    """Which samples have every term below its threshold, (B,)."""
    if limits.numel() != terms.shape[1]:
        raise ValueError(f"{limits.numel()} thresholds were given for K = {terms.shape[1]} loss terms")
    return (terms < limits).all(1)


def pgd(
    objective: Objective,
    images: Tensor,
    radius: float | Tensor,
    *,
    steps: int,
    step_scale: float,
    norm: float = 2,
    bounds: Bounds = None,
    random_start: float | bool = True,
    restarts: int = 1,
    thresholds: Tensor | Sequence[float] | None = None,
    keep: Literal["last", "best"] = "last",
    loss: AttackLoss | None = None,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Projected gradient ascent from a random point of the ball, with step alpha = step_scale * radius / steps.

    PGD in one call (Madry et al. 2018, arXiv 1706.06083, section 2.1; as :class:`PGD`).

    Args:
        objective: images -> (B, K) loss terms.
        images: shape (B, C, *spatial).
        radius: one number or (B,), >= 0, Lp norm of the noise over a sample's whole input, in units of the images.
        steps: number of gradient steps.
        step_scale: a in alpha = a * radius / steps.
        norm: 2 or inf.
        bounds: None, or (lowest, highest): numbers or (B,) tensors.
        random_start: True (anywhere in the ball), False (at the image), or a fraction of the radius.
        restarts: number of runs, of which the worst for the model is kept per sample.
        thresholds: K thresholds; with them the result has ``crossing``.
        keep: "last" iterate, or the "best" (largest loss) of all.
        loss: what is climbed in place of the objective's terms, an :class:`AttackLoss`.
        generator: makes random starts repeatable.

    Returns:
        The adversarial images, their terms, norms and crossings.

    Raises:
        ValueError: settings out of range, a radius that is negative or not finite, terms that are not (B, K).

    Example:
        >>> import torch
        >>> from advmed import pgd
        >>> images, radius = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 4.0])  # a radius for each
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> found = pgd(objective, images, radius, steps=20, step_scale=4, bounds=(0.0, 1.0), random_start=False)
        >>> found.terms.flatten().round(decimals=3)  # 4 values, the second time as high as the bounds let them
        tensor([2., 4.])
    """
    check_call(images, radius, bounds)
    attack = PGD(steps, step_scale, norm, random_start, restarts, keep, loss)
    return attack(objective, images, radius, bounds=bounds, thresholds=thresholds, generator=generator)


def ifgsm(
    objective: Objective,
    images: Tensor,
    radius: float | Tensor,
    *,
    steps: int,
    norm: float = 2,
    bounds: Bounds = None,
    thresholds: Tensor | Sequence[float] | None = None,
    keep: Literal["last", "best"] = "last",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Iterative FGSM, or basic iterative method: PGD from the image itself with step alpha = radius / steps.

    With one step it is FGSM (Kurakin et al. 2017, "Adversarial examples in the physical world", arXiv 1607.02533, there
    in Linf; the AMAT paper evaluates with 10 steps in L2, arXiv 2206.01736, section 3.3).

    Args:
        objective: images -> (B, K) loss terms.
        images: shape (B, C, *spatial).
        radius: one number or (B,), >= 0, Lp norm of the noise over a sample's whole input, in units of the images.
        steps: number of gradient steps.
        norm: 2 or inf.
        bounds: None, or (lowest, highest): numbers or (B,) tensors.
        thresholds: K thresholds; with them the result has ``crossing``.
        keep: "last" iterate, or the "best" (largest loss) of all.
        generator: accepted and not used: nothing is random.

    Returns:
        The adversarial images, their terms, norms and crossings.

    Raises:
        ValueError: settings out of range, a radius that is negative or not finite, terms that are not (B, K).

    Example:
        >>> import torch
        >>> from advmed import ifgsm
        >>> objective, images = lambda images: -images.flatten(1).sum(1, keepdim=True), torch.ones(1, 1, 2, 2)
        >>> fgsm = ifgsm(objective, images, 0.25, steps=1, norm=float("inf"))
        >>> fgsm.images.flatten()
        tensor([0.7500, 0.7500, 0.7500, 0.7500])
    """
    check_call(images, radius, bounds)
    attack = PGD(steps, 1.0, norm, 0.0, 1, keep)
    return attack(objective, images, radius, bounds=bounds, thresholds=thresholds, generator=generator)
