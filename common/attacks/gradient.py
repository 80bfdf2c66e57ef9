"""The gradient loop under every white-box attack: start, ascend, project, keep the books.

Nothing in the loop is decided per sample in Python, and nothing waits for the device: radii, bounds, thresholds, loss
scales and records are tensors with one entry per sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from common.guard import still
from common.norms import check_norm, norm, per_sample, project, random_in_ball, steepest
from common.objective import Objective, check_terms, model_of

Bounds = tuple[float | Tensor, float | Tensor] | Literal["sample"] | None
"""The lowest and highest value an input may take: None (any), a pair of numbers or of (B,) tensors, or "sample" (every
sample's own minimum and maximum)."""

# float16 loses gradients below 6e-8. The direction of an attack step does not depend on the scale of the loss, so a
# sample's loss is scaled up before the backward pass, and down again by this factor when its gradient overflows.
_HALF_SCALE = 2.0**15  # the largest power of two that terms in float16 can receive as their gradient
_HALF_BACKOFF = 2.0**-4


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, for every sample of the batch.

    Attributes:
        images: the adversarial input, shape of the images, no gradient.
        terms: its loss terms, (B, K); None if the attack was told to leave the last pass to its caller.
        norms: ||x~ - x||_p, (B,).
        crossing: norm of the last iterate on the path at which every term was below its threshold, 0 if there was
            none, (B,); None without thresholds. Without ``terms`` the last iterate itself has not been looked at yet.
        nonfinite: number of steps that a non-finite gradient cost the sample, (B,), int64.
    """

    images: Tensor
    terms: Tensor | None
    norms: Tensor
    crossing: Tensor | None
    nonfinite: Tensor


@dataclass(frozen=True)
class GradientAttack:
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
        object.__setattr__(self, "norm", check_norm(self.norm))
        object.__setattr__(self, "random_start", float(self.random_start))
        for name in ("steps", "restarts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if not (math.isfinite(self.step_scale) and self.step_scale > 0):
            raise ValueError(f"step_scale must be positive (1 just reaches the radius), got {self.step_scale!r}")
        if not 0 <= self.random_start <= 1:
            raise ValueError(f"random_start must be a fraction of the radius in [0, 1], got {self.random_start!r}")
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep must be 'last' or 'best', got {self.keep!r}")

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
        check_bounds(bounds)
        with torch.inference_mode(False), torch.enable_grad(), _still(objective):
            images = images.detach()
            if images.is_inference():
                images = images.clone()  # inference tensors cannot take part in autograd
            run = _Run(self, objective, images, radius, bounds, thresholds, generator)
            result = run(self.random_start, final_pass)
            for _ in range(1, self.restarts):
                result = _worse(result, run(self.random_start or 1.0, final_pass))
        return replace(result, images=result.images.to(images.dtype))


class _Run:
    """One batch under attack: what stays the same over steps and restarts."""

    def __init__(
        self,
        attack: GradientAttack,
        objective: Objective,
        images: Tensor,
        radius: float | Tensor,
        bounds: Bounds,
        thresholds: Tensor | Sequence[float] | None,
        generator: torch.Generator | None,
    ) -> None:
        self.attack, self.objective, self.dtype = attack, objective, images.dtype
        # Steps and norms of half-precision images are computed in float32; only the network sees them in half.
        self.images = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        self.radius = per_sample(radius, self.images)
        self.box = _box(self.images, bounds)
        self.limits = None
        if thresholds is not None:
            self.limits = torch.as_tensor(thresholds, dtype=self.images.dtype, device=images.device)
        self.scale = _loss_scale(images)
        self.generator = generator
        if generator is None:
            self.generator = torch.Generator(images.device)
            self.generator.seed()

    def __call__(self, random_start: float, final_pass: bool) -> AttackResult:
        attack, images, radius, scale = self.attack, self.images, self.radius, self.scale
        alpha = radius * (attack.step_scale / attack.steps)
        iterate, delta = images, torch.zeros_like(images)
        if random_start > 0:
            noise = random_in_ball(images, radius.flatten() * random_start, attack.norm, self.generator)
            iterate, delta = self._inside(noise)
        best = _Best(iterate, radius) if attack.keep == "best" else None
        crossing = None if self.limits is None else torch.zeros_like(radius).flatten()
        nonfinite = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device)

        for _ in range(attack.steps):
            iterate = iterate.detach().requires_grad_()
            terms = self._terms(iterate)
            loss = total(terms)
            (gradient,) = torch.autograd.grad((loss if scale is None else loss * scale).sum(), iterate)
            with torch.no_grad():
                if crossing is not None:
                    crossing = self._crossing(crossing, terms, delta)
                if best is not None:
                    best.offer(iterate.detach(), terms.detach())
                # A norm is finite only if every entry is: one reduction finds the broken samples, without a sync.
                peak = norm(gradient, math.inf)
                usable = peak.isfinite()
                nonfinite += ~usable
                if scale is not None:
                    scale = torch.where(usable, scale, scale * _HALF_BACKOFF)
                gradient = torch.where(_mask(usable, gradient), gradient, 0.0)
                direction = steepest(gradient, attack.norm, torch.where(usable, peak, 0.0))
                iterate, delta = self._inside(torch.addcmul(delta, alpha, direction))

        final = None
        if final_pass or best is not None or attack.restarts > 1:
            with torch.no_grad():
                final = self._terms(iterate)
                if crossing is not None:
                    crossing = self._crossing(crossing, final, delta)
                if best is not None:
                    best.offer(iterate, final)
                    iterate, final = best.images, best.terms
        iterate = torch.where(radius > 0, iterate, images)  # a radius of 0 gives the image back, bit for bit
        return AttackResult(iterate, final, norm(iterate - images, attack.norm), crossing, nonfinite)

    def _terms(self, iterate: Tensor) -> Tensor:
        return check_terms(self.objective(iterate.to(self.dtype)), self.images)

    def _inside(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The iterate and its noise, projected onto the ball and then onto the bounds.

        The bounds contain the image, so clamping moves the noise towards 0 and never out of the ball.
        """
        delta = project(delta, self.radius.flatten(), self.attack.norm)
        iterate = self.images + delta
        if self.box is not None:
            iterate = torch.clamp(iterate, *self.box)
            delta = iterate - self.images
        return iterate, delta

    def _crossing(self, crossing: Tensor, terms: Tensor, delta: Tensor) -> Tensor:
        assert self.limits is not None
        if self.limits.numel() != terms.shape[1]:
            raise ValueError(f"{self.limits.numel()} thresholds were given for K = {terms.shape[1]} loss terms")
        return torch.where((terms < self.limits).all(1), norm(delta, self.attack.norm), crossing)


class _Best:
    """Per sample, the iterate of the largest summed loss so far; a loss that is not finite never wins."""

    def __init__(self, images: Tensor, radius: Tensor) -> None:
        self.images = images
        self.terms: Tensor | None = None
        self.loss = torch.full_like(radius.flatten(), -math.inf)

    def offer(self, images: Tensor, terms: Tensor) -> None:
        loss = total(terms)
        wins = (loss > self.loss) & loss.isfinite()
        self.images = torch.where(_mask(wins, images), images, self.images)
        self.terms = terms if self.terms is None else torch.where(wins[:, None], terms, self.terms)
        self.loss = torch.where(wins, loss, self.loss)


def total(terms: Tensor) -> Tensor:
    """L, the sum over the K terms, (B,); half-precision terms are summed in float32."""
    return terms.sum(1, dtype=torch.promote_types(terms.dtype, torch.float32))


def _box(images: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor] | None:
    """The bounds, widened where the image itself lies outside of them."""
    if bounds is None:
        return None
    if bounds == "sample":
        axes = tuple(range(1, images.ndim))
        low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
        # An image with a NaN has no range; clamping to NaN would spread it over the rest of the image.
        return torch.where(low.isnan(), -math.inf, low), torch.where(high.isnan(), math.inf, high)
    low, high = (per_sample(bound, images) for bound in bounds)
    return torch.minimum(images, low), torch.maximum(images, high)


def check_bounds(bounds: Bounds) -> None:
    """Raises ValueError if ``bounds`` are none of the forms of :data:`Bounds`, or two numbers in the wrong order."""
    if bounds is None or (isinstance(bounds, str) and bounds == "sample"):
        return
    if isinstance(bounds, str) or not hasattr(bounds, "__len__") or len(bounds) != 2:
        raise ValueError(f"bounds must be None, 'sample' or a pair (lowest, highest), got {bounds!r}")
    low, high = bounds
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and not low < high:
        raise ValueError(f"bounds must be (lowest, highest) with lowest < highest, got {bounds!r}")


def _still(objective: Objective) -> AbstractContextManager[object]:
    model = model_of(objective)
    return nullcontext() if model is None else still(model)


def _mask(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *([1] * (like.ndim - 1)))


def _loss_scale(images: Tensor) -> Tensor | None:
    """(B,) loss scales where the passes run in float16, else None."""
    kind = images.device.type
    half = images.dtype == torch.float16 or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    )
    return torch.full((images.shape[0],), _HALF_SCALE, device=images.device) if half else None


def _worse(first: AttackResult, second: AttackResult) -> AttackResult:
    """Per sample, the run that hurt the model more (restarts keep the worst)."""
    assert first.terms is not None
    assert second.terms is not None
    loss, other = total(first.terms), total(second.terms)
    wins = other.isfinite() & ~(loss.isfinite() & (loss >= other))
    crossing = first.crossing
    if crossing is not None and second.crossing is not None:
        crossing = torch.where(wins, second.crossing, crossing)
    return AttackResult(
        torch.where(_mask(wins, first.images), second.images, first.images),
        torch.where(wins[:, None], second.terms, first.terms),
        torch.where(wins, second.norms, first.norms),
        crossing,
        first.nonfinite + second.nonfinite,
    )
