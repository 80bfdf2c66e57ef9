"""APGD (Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", Algorithm 1): gradient ascent with momentum whose step length looks after itself, for any objective.

Where it stops rising, a sample halves its step and goes on from the best point it has seen. So there is no step length
to choose, which is what makes PGD's numbers depend on who tuned it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advmed.attacks.base import GradientAttack, check_fraction
from advmed.attacks.losses import AttackLoss, attack_by_loss
from advmed.attacks.problem import AttackResult, Bounds, Problem, Worst, attacking, broadcast, check_call, total
from advmed.objective import Objective

_STAGES = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))
"""Radii of the stages with ``shrink``, and their shares of the steps (Croce, Singh and Hein 2024, section 4.2)."""


@dataclass(frozen=True)
class APGD(GradientAttack):
    """APGD on the summed loss terms inside an Lp ball; returns the point of the largest loss that it made.

    Auto-PGD (Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", arXiv 2003.01690, Algorithm 1): ascent with momentum; where it stops rising, a sample
    halves its step and goes on from its best point. The image itself, where it starts there, is nothing that was found,
    but one to go back to when the steps are halved. A run of N steps costs N gradients and one forward pass, as PGD's.

    Args:
        steps: number of gradient steps, >= 1.
        norm: 2 or inf.
        random_start: fraction in [0, 1] of the radius from whose ball the start is drawn.
        restarts: runs per sample, of which the worst is kept; runs after the first always start at random.
        momentum: alpha of the paper, in (0, 1]: the share of the new step, the rest being the last one's.
        rho: a step length is halved where fewer than this share of its steps made the loss larger, in [0, 1].
        loss: what is climbed in place of the host's loss, an :class:`AttackLoss`; None for the host's.
        shrink: search a ball of twice the radius first, then one of 1.5 times, and go on from what was found there,
            projected (radius reduction, Croce, Singh and Hein 2024, section 4.2): a small ball has worse local maxima.

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> import torch
        >>> from advmed import APGD
        >>> attack = APGD(steps=10, norm=float("inf"), random_start=0)
        >>> found = attack(lambda images: images.flatten(1).sum(1, keepdim=True), torch.zeros(1, 1, 2, 2), 0.5)
        >>> found.images.flatten()  # a sum rises most where every value has risen by the radius
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    steps: int
    norm: float = 2.0
    random_start: float = 1.0
    restarts: int = 1
    momentum: float = 0.75
    rho: float = 0.75
    loss: AttackLoss | None = None
    shrink: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("rho", self.rho)
        if check_fraction("momentum", self.momentum) == 0:
            raise ValueError("momentum must be above 0, or nothing moves")

    @property
    def description(self) -> str:
        """What it does, for a report."""
        where = ", in a ball that shrinks from twice the radius," if self.shrink else ""
        return self._described(
            f"APGD (Croce & Hein 2020): {self.steps} steps of adaptive length{where}", "largest loss"
        )

    @property
    def queries(self) -> int:
        """See :attr:`GradientAttack.queries`: a pass ends every stage."""
        goals = 1 if self.loss is None else self.loss.goals
        return super().queries + self.restarts * goals * (len(self._stages) - 1)

    @property
    def _stages(self) -> tuple[tuple[float, float], ...]:
        return _STAGES if self.shrink and self.steps >= len(_STAGES) else ((1.0, 1.0),)

    def __call__(
        self,
        objective: Objective,
        images: Tensor,
        radius: float | Tensor,
        *,
        bounds: Bounds = None,
        generator: torch.Generator | None = None,
        initial: Tensor | None = None,
    ) -> AttackResult:
        """Attacks a batch; see :class:`advmed.attacks.PGD`, whose arguments these are.

        Args:
            objective: images -> (B, K) loss terms.
            images: shape (B, C, *spatial).
            radius: noise bound.
            bounds: lowest and highest value of an input.
            generator: source of the random starts.
            initial: where the first run starts, such as what a smaller radius has found, in the shape of the images;
                None: as ``random_start`` says.
        """
        if self.loss is not None:
            return attack_by_loss(
                self, self.loss, objective, images, radius, bounds=bounds, generator=generator, initial=initial
            )
        with attacking(objective):
            stages = self._stages
            problems = [
                Problem(objective, images, _times(radius, factor), norm=self.norm, bounds=bounds, generator=generator)
                for factor, _ in stages
            ]
            lengths = _shares(self.steps, [share for _, share in stages])
            runs, last = Worst(), problems[-1]
            for number, start in enumerate(self.starts):
                noise = None if initial is None or number else initial.to(last.images.dtype) - last.images
                for problem, steps in zip(problems, lengths, strict=True):
                    here = problem.start(start) if noise is None else problem.inside(noise)
                    terms, iterate = self._climb(problem, *here, steps, at_image=noise is None and start == 0)
                    noise = iterate - problem.images
                runs.offer(terms, iterate)
            for problem in problems[:-1]:
                last.nonfinite += problem.nonfinite
            return last.result(runs.values[0], runs.terms)

    def _climb(
        self, problem: Problem, iterate: Tensor, noise: Tensor, steps: int, *, at_image: bool
    ) -> tuple[Tensor, Tensor]:
        """One run from an iterate and its noise: terms and iterate of its largest loss."""
        checkpoints = dict(itertools.pairwise(_checkpoints(steps)))  # the end of an interval by its begin
        begin, end = 0, checkpoints.get(0)
        before, step = noise, 2 * problem.radius
        count = problem.nonfinite.shape
        previous = torch.full(count, math.inf, device=noise.device, dtype=noise.dtype)  # the first step rises nowhere
        rises = torch.zeros(count, device=noise.device)
        best = Worst()
        found = Worst() if at_image else best  # the image itself is nothing that was found
        halved = torch.zeros(count, dtype=torch.bool, device=noise.device)
        peak = torch.full_like(previous, -math.inf)  # the largest loss at the last checkpoint
        for k in range(steps):
            terms, direction = problem.slope(iterate)
            loss = total(terms).to(previous.dtype)
            rises += loss > previous
            previous = loss
            best.offer(terms, iterate, noise, direction)
            if found is not best and k > 0:
                found.offer(terms, iterate)
            if k == 0:
                peak = best.loss
            if k == end:
                # Condition 1 and 2 of the paper: too few steps rose; the same step found nothing better. What is
                # halved goes on from here, as in the authors' code: Algorithm 1 would first take one more step.
                stuck = ~halved & (best.loss <= peak)
                halve = (rises < self.rho * (k - begin)) | stuck
                step = torch.where(broadcast(halve, step), step / 2, step)
                noise = torch.where(broadcast(halve, noise), best.values[1], noise)
                direction = torch.where(broadcast(halve, noise), best.values[2], direction)
                previous = torch.where(halve, best.loss, previous)
                halved, peak, rises = halve, best.loss, torch.zeros_like(rises)
                begin, end = k, checkpoints.get(k)
            share = 1.0 if k == 0 else self.momentum
            _, ahead = problem.inside(torch.addcmul(noise, step, direction))
            moved = noise + share * (ahead - noise) + (1 - share) * (noise - before)
            before = noise
            iterate, noise = problem.inside(moved)
        found.offer(problem.terms(iterate), iterate, *([noise, noise] if found is best else []))
        return found.terms, found.values[0]


def apgd(
    objective: Objective,
    images: Tensor,
    radius: float | Tensor,
    *,
    steps: int,
    norm: float = 2,
    bounds: Bounds = None,
    random_start: float | bool = True,
    restarts: int = 1,
    loss: AttackLoss | None = None,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """APGD in one call; returns the point of the largest loss. There is no step length to choose.

    Croce and Hein 2020, arXiv 2003.01690, Algorithm 1; as :class:`APGD`.

    Args:
        objective: images -> (B, K) loss terms.
        images: shape (B, C, *spatial).
        radius: one number or (B,), >= 0, Lp norm of the noise over a sample's whole input, in units of the images.
        steps: number of gradient steps.
        norm: 2 or inf.
        bounds: None, or (lowest, highest): numbers or (B,) tensors.
        random_start: True (anywhere in the ball), False (at the image), or a fraction of the radius.
        restarts: number of runs, of which the worst for the model is kept per sample.
        loss: what is climbed in place of the objective's terms, an :class:`AttackLoss`.
        generator: makes random starts repeatable.

    Returns:
        The adversarial images, their terms and norms.

    Raises:
        ValueError: settings out of range, a radius that is negative or not finite, terms that are not (B, K).

    Example:
        >>> import torch
        >>> from advmed import apgd
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> found = apgd(objective, torch.zeros(1, 1, 2, 2), 1.0, steps=10, random_start=False)
        >>> round(found.terms.item(), 3)  # noise of L2 norm 1 raises a sum of 4 values by sqrt(4) at most
        2.0
    """
    check_call(images, radius, bounds)
    attack = APGD(steps, norm, random_start, restarts, loss=loss)
    return attack(objective, images, radius, bounds=bounds, generator=generator)


def _times(radius: float | Tensor, factor: float) -> float | Tensor:
    """A larger radius, which may exceed the range of the images where the one that was asked for does not."""
    return radius if factor == 1 else torch.as_tensor(radius) * factor


def _shares(steps: int, shares: Sequence[float]) -> list[int]:
    """Steps in parts, one or more each; the last takes what is left."""
    parts = [max(1, round(steps * share)) for share in shares[:-1]]
    return [*parts, steps - sum(parts)]


def _checkpoints(steps: int) -> list[int]:
    """The steps at which step lengths are looked at, 0 first: intervals that shrink from 22 % to 6 % of all steps."""
    shares = [0, 22]  # in percent: 0.57 * 100 is above 57 in floating point
    while shares[-1] < 100:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 3, 6))
    return list(dict.fromkeys(-(-share * steps // 100) for share in shares))
