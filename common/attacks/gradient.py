"""The gradient loop of PGD and I-FGSM: start, ascend, project, keep the books."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.attacks.ascent import Ascent
from common.attacks.problem import AttackResult, Bounds, Problem, Worst, attacking
from common.norms import norm
from common.objective import Objective


@dataclass(frozen=True)
class GradientAttack(Ascent):
    """Iterated steepest ascent on the summed loss terms inside an Lp ball (Madry et al. 2018; Kurakin et al. 2017).

    One step: z = x_t + alpha * g/||g||_2 (L2) or x_t + alpha * sign(g) (Linf), alpha = step_scale * radius / steps,
    then projection onto the ball around x and onto the bounds. All lengths are per sample.

    Args:
        steps: number of gradient steps, >= 1.
        step_scale: a in alpha = a * radius / steps, > 0. Below 1 the sphere is out of reach.
        norm: 2 or inf.
        random_start: fraction in [0, 1] of the radius from whose ball the start is drawn (True: 1, False: 0).
        restarts: runs per sample, of which the one with the largest loss is kept; runs after the first always start
            at random, or they would all be the same.
        keep: "last" returns the last iterate (the papers), "best" the one with the largest summed loss.

    Raises:
        ValueError: a setting out of its range.
    """

    steps: int
    step_scale: float
    norm: float = 2.0
    random_start: float = 0.0
    restarts: int = 1
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.step_scale) and self.step_scale > 0):
            raise ValueError(f"step_scale must be positive (1 just reaches the radius), got {self.step_scale!r}")
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep must be 'last' or 'best', got {self.keep!r}")

    @property
    def description(self) -> str:
        """What it does, for a report."""
        found = "largest loss" if self.keep == "best" else "last step"
        step = f"{self.step_scale / self.steps:.3g}"
        return f"{self.steps} gradient steps of level x {step} from {self._where}; {found}{self._runs}"

    def __call__(
        self,
        objective: Objective,
        images: Tensor,
        radius: float | Tensor,
        *,
        bounds: Bounds = None,
        thresholds: Tensor | Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        final_pass: bool = True,
    ) -> AttackResult:
        """Attacks a batch.

        Works inside or outside autocast, ``no_grad`` and ``inference_mode``. Where the objective names its ``model``,
        the model is held still (:func:`common.guard.still`).

        Args:
            objective: images -> (B, K) loss terms; their sum is what rises.
            images: clean input x, shape (B, C, *spatial), floating point.
            radius: noise bound, one number or (B,), >= 0, in the units of the images; 0 gives the image back exactly.
            bounds: lowest and highest value of an input; an image that exceeds them itself may keep its values.
            thresholds: K numbers, for ``crossing``.
            generator: source of the random starts; without one they are not repeatable. No global random state moves.
            final_pass: False leaves the loss terms of the last iterate to a caller who computes them anyway
                (only with ``keep="last"`` and one run).
        """
        with attacking(objective):
            problem = Problem(objective, images, radius, norm=self.norm, bounds=bounds, generator=generator)
            limits = None
            if thresholds is not None:
                limits = torch.as_tensor(thresholds, dtype=problem.images.dtype, device=images.device)
            runs = Worst()
            for start in self.starts:
                iterate, terms, crossing = self._climb(problem, start, limits, final_pass)
                if terms is None:
                    return problem.result(iterate, None, crossing)
                runs.offer(terms, iterate, *([] if crossing is None else [crossing]))
            return problem.result(runs.values[0], runs.terms, None if limits is None else runs.values[1])

    def _climb(
        self, problem: Problem, start: float, limits: Tensor | None, final_pass: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One run: the iterate, its terms (None without the final pass), and the crossing if there are limits."""
        alpha = problem.radius * (self.step_scale / self.steps)
        best = Worst() if self.keep == "best" else None
        crossing = None if limits is None else torch.zeros_like(problem.radius).flatten()
        iterate, noise = problem.start(start)
        for _ in range(self.steps):
            terms, direction = problem.slope(iterate)
            if crossing is not None:
                crossing = self._crossing(crossing, terms, noise, limits)
            if best is not None:
                best.offer(terms, iterate)
            iterate, noise = problem.inside(torch.addcmul(noise, alpha, direction, out=direction))
        if not final_pass and best is None and self.restarts == 1:
            return iterate, None, crossing
        terms = problem.terms(iterate)
        if crossing is not None:
            crossing = self._crossing(crossing, terms, noise, limits)
        if best is not None:
            best.offer(terms, iterate)
            return best.values[0], best.terms, crossing
        return iterate, terms, crossing

    def _crossing(self, crossing: Tensor, terms: Tensor, noise: Tensor, limits: Tensor | None) -> Tensor:
        assert limits is not None
        if limits.numel() != terms.shape[1]:
            raise ValueError(f"{limits.numel()} thresholds were given for K = {terms.shape[1]} loss terms")
        return torch.where((terms < limits).all(1), norm(noise, self.norm), crossing)
