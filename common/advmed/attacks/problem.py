"""The problem that every attack looks for a solution of: the largest loss in a ball around each image, inside bounds.

An attack is a search; what it searches is here, once: the projection, the gradient and what can go wrong with it, the
books on the worst point seen. Nothing is decided per sample in Python and nothing waits for the device: radii, bounds,
loss scales and records are tensors with one entry per sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from advmed.distributed import wanted_by_any
from advmed.guard import preserved
from advmed.norms import norm, per_sample, project, random_in_ball, steepest
from advmed.objective import Objective, check_terms, model_of, ordinary

Bounds = tuple[float | Tensor, float | Tensor] | Literal["sample"] | None
"""The lowest and highest value an input may take: None (any), a pair of numbers or of (B,) tensors, or "sample" (every
sample's own minimum and maximum)."""

# float16 loses gradients below 6e-8. The direction of an attack step does not depend on the scale of the loss, so a
# sample's loss is scaled up before the backward pass, and down again by this factor when its gradient overflows.
_SLACK, _MANY_OUTSIDE = 0.01, 1 / 3  # values so far outside of the bounds, in widths, and so many, are of another scale
_HALF_SCALE = 2.0**15  # the largest power of two that terms in float16 can receive as their gradient
_HALF_BACKOFF = 2.0**-4
_HALF_REPEATS = 4  # of a search's first gradient, down to a scale of 1/2


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
        seen: the last noisy iterate that was looked at on the way: its terms, (B, K), and the norm of its noise, (B,);
            None where the attack keeps no such record, or made one step only.
        radius: the bound of the noise at its end, (B,), which may have been revised; None where it is not told.

    Example:
        >>> import torch
        >>> from advmed import ifgsm
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> found = ifgsm(objective, torch.zeros(1, 1, 2, 2), 1.0, steps=4, thresholds=[1.2])
        >>> [round(value.item(), 3) for value in (found.terms, found.norms, found.crossing)]  # sums 0.5, 1, 1.5, 2
        [2.0, 1.0, 0.5]
    """

    images: Tensor
    terms: Tensor | None
    norms: Tensor
    crossing: Tensor | None
    nonfinite: Tensor
    seen: tuple[Tensor, Tensor] | None = None
    radius: Tensor | None = None


class CleanPass(NamedTuple):
    """What a pass on the clean images has told already, so that an attack that starts there need not ask again.

    Attributes:
        terms: loss terms, (B, K), no gradient.
        gradient: of the loss with respect to the images, in their shape. Only the direction of each sample's is used.
    """

    terms: Tensor
    gradient: Tensor


class Slope(NamedTuple):
    """What a backward pass at an iterate tells.

    Attributes:
        terms: loss terms there, (B, K), no gradient.
        direction: of steepest ascent, of unit length in the norm, shape of the images; 0 where there is no gradient.
    """

    terms: Tensor
    direction: Tensor


class Problem:
    """A batch under attack: max L(x~) over ||x~ - x||_p <= radius, inside the bounds, for each sample.

    Args:
        objective: images -> (B, K) loss terms; their sum L is what is to rise.
        images: clean input x, shape (B, C, *spatial), floating point.
        radius: one number or (B,), >= 0.
        norm: p, 2 or inf.
        bounds: lowest and highest value of an input; an image that exceeds them itself may keep its values.
        generator: source of randomness; without one nothing random is repeatable. No global random state moves.

    Attributes:
        images: x in float32 or float64: steps and norms of half-precision images are computed in float32, and the
            network and the caller get them in half, see :meth:`shown`.
        radius: (B, 1, ..., 1).
        nonfinite: gradients that were not finite so far, (B,), int64.
    """

    def __init__(
        self,
        objective: Objective,
        images: Tensor,
        radius: float | Tensor,
        *,
        norm: float,
        bounds: Bounds = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_bounds(bounds)
        _check_problem(objective, images, radius, norm, bounds)
        images = ordinary(images.detach())
        self.objective, self.norm, self.dtype = objective, norm, images.dtype
        self.images = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        self.radius = per_sample(radius, self.images)
        self._box = _box(self.images, bounds)
        self._scale, self._scale_fits = _loss_scale(images), False
        self.nonfinite = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device)
        if generator is None:
            generator = torch.Generator(images.device)
            generator.seed()
        self.generator = generator

    def terms(self, iterate: Tensor) -> Tensor:
        """The loss terms at an iterate, (B, K)."""
        return check_terms(self.objective(self.shown(iterate)), self.images)

    def shown(self, iterate: Tensor) -> Tensor:
        """What the network sees of an iterate, and the attack's caller gets: itself, or its values in half precision.

        These are rounded towards the image: to the nearest they may lie outside of the ball, and of the bounds, by half
        of a last digit, which in bfloat16 is half of a radius of 1/255.
        """
        if self.dtype == self.images.dtype:
            return iterate
        rounded = iterate.to(self.dtype)
        beyond = torch.where(iterate > self.images, rounded > iterate, rounded < iterate)
        # Beside a value, by its bits, are those of the next smaller and larger magnitude; one step back is behind the
        # iterate, and the image, which has no digits to round, is there or farther. (Not every device has nextafter.)
        back = torch.where(rounded.abs() > iterate.abs(), -1, 1) * beyond
        return (rounded.view(torch.int16) + back.to(torch.int16)).view(self.dtype)

    def length(self, iterate: Tensor, noise: Tensor) -> Tensor:
        """The norm of the noise of an iterate as it is shown, (B,)."""
        if self.dtype == self.images.dtype:
            return norm(noise, self.norm)
        return norm(self.shown(iterate).to(self.images.dtype) - self.images, self.norm)

    def slope(self, iterate: Tensor) -> Slope:
        """The loss terms at an iterate, and where they rise most; a gradient that is not finite is counted and 0."""
        terms, gradient, _ = self.gradient(iterate)
        return self.ascent(terms, gradient, scaled=True)

    def gradient(self, iterate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss terms at an iterate, (B, K), the gradient of every sample's scaled loss, and the scales, (B, K).

        Where the scale of the first one is too large for float16, the pass is repeated with a smaller one, so that no
        step is lost to it; this waits for the device, as no other gradient does.
        """
        found = self._gradient(iterate)
        if self._scale is None or self._scale_fits:
            return found
        self._scale_fits = True
        for _ in range(_HALF_REPEATS):
            terms, gradient, _ = found
            # No scale helps a network that overflows itself.
            over = ~(norm(gradient, math.inf) < math.inf) & terms.isfinite().all(1)
            if not wanted_by_any(bool(over.any()), model_of(self.objective), over.device):
                break
            self._back_off(over)
            found = self._gradient(iterate)
        return found

    def _gradient(self, iterate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = self.shown(iterate).detach().requires_grad_()
            terms = check_terms(self.objective(leaf), self.images)
        scale = torch.ones_like(terms) if self._scale is None else self._scale.to(terms.dtype).expand_as(terms)
        gradient = None
        if terms.requires_grad:
            (gradient,) = torch.autograd.grad(terms, leaf, scale, allow_unused=True)
        if gradient is None:
            # Not the same as a gradient of 0, which a network may have: here nothing could ever be found.
            raise ValueError(
                "no gradient leads from the loss to the images: somewhere between them it is cut, by detach(), no_grad "
                "or a conversion to NumPy or integers. An attack by gradients would find nothing, and the network look "
                "robust; mend the network, or attack it with losses only (square1000)"
            )
        return terms, gradient.to(self.images.dtype), scale

    def ascent(self, terms: Tensor, gradient: Tensor, scaled: bool = False) -> Slope:
        """What a gradient tells, (B, C, *spatial), with the loss terms at the same place.

        Args:
            terms: (B, K).
            gradient: of a sum of losses that rise with the terms; a sample's that is not finite is counted and 0.
            scaled: whether it is one of the scaled losses of :meth:`slope`.
        """
        # A norm is finite only if every entry is: one reduction finds the broken samples, without a sync.
        peak = norm(gradient, math.inf, keepdim=True)
        broken = ~(peak < math.inf)
        self.nonfinite += broken.flatten()
        if scaled:
            self._back_off(broken)
        return Slope(terms.detach(), steepest(gradient, self.norm, peak).masked_fill_(broken, 0.0))

    def _back_off(self, over: Tensor) -> None:
        """A smaller loss scale for the samples whose gradient is not finite, if there are scales."""
        if self._scale is not None:
            self._scale = torch.where(over.reshape(-1, 1), self._scale * _HALF_BACKOFF, self._scale)

    def start(self, fraction: float) -> tuple[Tensor, Tensor]:
        """An iterate and its noise: the image itself, or a point drawn from the ball of that fraction of the radius."""
        if fraction == 0:
            return self.images, torch.zeros_like(self.images)
        return self.inside(random_in_ball(self.images, self.radius.flatten() * fraction, self.norm, self.generator))

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Numbers in [0, 1), from the problem's source of randomness."""
        drawn = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.images.device, self.images.dtype)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Numbers of the standard normal distribution, from the problem's source of randomness."""
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.images.device, self.images.dtype)

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        """Numbers that are -1 or 1, either as likely."""
        return torch.where(self.uniform(shape) < 0.5, -1.0, 1.0).to(self.images.dtype)

    def choose(self, number: int) -> int:
        """A whole number below ``number``; where the source of randomness is on the CPU, no device is waited for."""
        return int(torch.rand((), generator=self.generator, device=self.generator.device).item() * number)

    def inside(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The iterate and its noise, projected onto the ball and then onto the bounds.

        The bounds contain the image, so clamping moves the noise towards 0 and never out of the ball.
        """
        noise = project(noise, self.radius, self.norm)
        iterate = self.images + noise
        if self._box is not None:
            low, high = self._box
            torch.maximum(iterate, low, out=iterate)
            torch.minimum(iterate, high, out=iterate)
            torch.sub(iterate, self.images, out=noise)
        return iterate, noise

    def result(
        self,
        iterate: Tensor,
        terms: Tensor | None,
        crossing: Tensor | None = None,
        seen: tuple[Tensor, Tensor] | None = None,
    ) -> AttackResult:
        """What the search found."""
        iterate = torch.where(self.radius > 0, iterate, self.images)  # radius 0 gives the image back, bit for bit
        found = self.shown(iterate)
        norms = norm(found.to(self.images.dtype) - self.images, self.norm)
        return AttackResult(found, terms, norms, crossing, self.nonfinite, seen, self.radius.flatten())


def steepness(objective: Objective, images: Tensor, p: float) -> tuple[CleanPass, Tensor]:
    """A pass on the clean images: what it tells an attack, and how steep each sample's loss is there.

    Args:
        objective: images -> (B, K) loss terms; the loss is their sum.
        images: shape (B, C, *spatial).
        p: norm of the noise, 2 or inf.

    Returns:
        The pass, and the most that each sample's loss rises to first order with noise of norm 1, (B,): the dual norm of
        its gradient, L2 for L2 and L1 for Linf.
    """
    with attacking(objective):
        problem = Problem(objective, images, 0.0, norm=p)
        terms, gradient, scale = problem.gradient(problem.images)
        steep = norm(gradient, 2) if p == 2 else gradient.abs().flatten(1).sum(1)
        return CleanPass(terms.detach(), gradient), steep / scale[:, 0]


@contextmanager
def attacking(objective: Objective) -> Iterator[None]:
    """Gradients off but in :meth:`Problem.slope`, inference mode off, the objective's model held still."""
    model = model_of(objective)
    with torch.inference_mode(False), torch.no_grad(), nullcontext() if model is None else preserved(model):
        yield


class Worst:
    """Per sample, what belongs to the largest loss offered so far; a loss that is not finite never wins.

    Attributes:
        terms: loss terms of the winner, (B, K); of what was offered first where no loss was finite.
        values: what was offered with them.
        loss: that largest loss, (B,); -inf where none was finite.
    """

    terms: Tensor
    values: tuple[Tensor, ...]
    loss: Tensor

    def __init__(self) -> None:
        self.empty = True

    def offer(self, terms: Tensor, *values: Tensor) -> Tensor:
        """Takes what is worse for the model.

        Args:
            terms: loss terms, (B, K).
            *values: tensors of B samples each, such as the iterate.

        Returns:
            Which samples took it, (B,), bool.
        """
        loss = total(terms)
        if self.empty:
            self.empty, self.terms, self.values = False, terms, values
            self.loss = torch.where(loss.isfinite(), loss, -math.inf)
            return loss.isfinite()
        wins = (loss > self.loss) & loss.isfinite()
        self.terms = torch.where(wins[:, None], terms, self.terms)
        self.values = tuple(
            torch.where(broadcast(wins, new), new, old) for new, old in zip(values, self.values, strict=True)
        )
        self.loss = torch.where(wins, loss, self.loss)
        return wins


def total(terms: Tensor) -> Tensor:
    """L, the sum over the K terms, (B,); half-precision terms are summed in float32."""
    return terms.sum(1, dtype=torch.promote_types(terms.dtype, torch.float32))


def check_bounds(bounds: Bounds) -> None:
    """Raises ValueError if ``bounds`` are none of the forms of :data:`Bounds`, or two numbers in the wrong order."""
    if bounds is None or (isinstance(bounds, str) and bounds == "sample"):
        return
    if isinstance(bounds, str) or not hasattr(bounds, "__len__") or len(bounds) != 2:
        raise ValueError(f"bounds must be None, 'sample' or a pair (lowest, highest), got {bounds!r}")
    low, high = bounds
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and not low < high:
        raise ValueError(f"bounds must be (lowest, highest) with lowest < highest, got {bounds!r}")


def check_call(images: Tensor, radius: float | Tensor, bounds: Bounds) -> None:
    """What a training does not ask at every step, because it waits for the device.

    Raises:
        ValueError: for a radius that is negative or not finite, or images of another scale than the bounds.
    """
    values = torch.as_tensor(radius)
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(f"radius must be >= 0 and finite, got {radius if values.ndim == 0 else values.min().item()}")
    check_scale(images, bounds)


def check_scale(images: Tensor, bounds: Bounds) -> None:
    """Raises ValueError for images that leave the bounds by more than twice their width, or with a third of their
    values; waits for the device.

    A little outside is meant: interpolation overshoots, and such an image keeps its values. Far outside is an image of
    0 to 255 where 0 to 1 was promised, and every noise level is off by the same factor; many values outside are those
    of an image that was normalised, whose noise could go one way only there.
    """
    check_bounds(bounds)
    ends = _numbers(bounds)
    if ends is None or not images.numel():
        return
    _check_range(images, ends)
    low, high = ends
    slack = _SLACK * (high - low)
    outside = float(((images < low - slack) | (images > high + slack)).float().mean())
    if outside > _MANY_OUTSIDE:
        raise ValueError(
            f"{outside:.0%} of the values of the images lie outside of the bounds {low:g} and {high:g}, as those of "
            f"normalised images do: normalise inside of the network, or set the bounds that the images have"
        )


def _check_range(images: Tensor, ends: tuple[float, float]) -> None:
    (low, high), (least, most) = ends, (float(value) for value in images.detach().aminmax())
    if least < low - 2 * (high - low) or most > high + 2 * (high - low):
        raise ValueError(
            f"images hold values from {least:.4g} to {most:.4g} where the bounds are {low:g} and {high:g}: scale the "
            f"images, or set the bounds that they have"
        )


def _numbers(bounds: Bounds) -> tuple[float, float] | None:
    """Bounds that are two numbers, else None."""
    if bounds is None or isinstance(bounds, str) or any(isinstance(bound, Tensor) for bound in bounds):
        return None
    return float(bounds[0]), float(bounds[1])


def _check_problem(objective: Objective, images: Tensor, radius: float | Tensor, norm: float, bounds: Bounds) -> None:
    """Raises TypeError or ValueError for what no attack can be meant to do, as far as no device is waited for."""
    if isinstance(objective, nn.Module) and not hasattr(objective, "names"):
        raise TypeError(
            f"an attack raises loss terms, and {type(objective).__name__} is a network: what it returns would be "
            f"raised as if it were a loss. Give an objective, such as advmed.ClassificationObjective(model, labels) "
            f"(a module that does return terms, (B, K), says so by an attribute 'names')"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point, got {images.dtype}; 8 bits are often meant as images / 255")
    ends = _numbers(bounds)
    if ends is not None and not isinstance(radius, Tensor):
        width = (ends[1] - ends[0]) * (1.0 if norm == math.inf else math.sqrt(images[:1].numel()))
        if radius > width:
            raise ValueError(
                f"a radius of {radius:g} is more than the whole range from {ends[0]:g} to {ends[1]:g} allows, "
                f"{width:.4g} in L{norm:g}: it is in the units of the images"
            )


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
    # Two numbers a sample are read faster than two images; on a CPU it costs no wait to see that they will do.
    if images.device.type == "cpu":
        if bool(((images >= low) & (images <= high)).all()):
            return low, high
        if (ends := _numbers(bounds)) is not None:
            _check_range(images, ends)
    return torch.minimum(images, low), torch.maximum(images, high)


def broadcast(flags: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to go with ``like``."""
    return flags.reshape(-1, *([1] * (like.ndim - 1)))


def _loss_scale(images: Tensor) -> Tensor | None:
    """(B, 1) loss scales where the passes run in float16, else None."""
    return torch.full((images.shape[0], 1), _HALF_SCALE, device=images.device) if in_float16(images) else None


def in_float16(images: Tensor) -> bool:
    """Whether passes run in float16, whose gradients underflow."""
    kind = images.device.type
    return images.dtype == torch.float16 or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    )
