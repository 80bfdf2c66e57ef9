"""Square Attack (Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial attack via random
search"): it asks for losses and never for a gradient, so that a model which hides its gradients cannot hide from it.

A query changes a window of the noise and is kept where the loss has risen. Written from the paper's description
(Algorithms 1 to 3), for any objective, any number of spatial dimensions (a window is a box of the same share of every
extent), and with all samples of a batch asked in one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advmed.attacks.base import check_count, check_fraction
from advmed.attacks.losses import AttackLoss, attack_by_loss, queries_beside
from advmed.attacks.problem import AttackResult, Bounds, Problem, Worst, attacking, broadcast, check_call
from advmed.norms import check_norm, steepest
from advmed.objective import Objective

# After these shares of the queries (the authors' schedule: 10, 50, 200, ... of 10,000) the window's area is halved.
_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class SquareAttack:
    """Random search with square windows on the summed loss terms inside an Lp ball.

    The Square Attack (Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial attack via
    random search", arXiv 1912.00049, Algorithms 1 to 3): a query changes a window of the noise, and is kept where the
    loss has risen. It asks for losses and never for a gradient; of any number of spatial dimensions.

    Args:
        steps: number of queries, >= 1.
        norm: 2 or inf.
        share: of the image that the first window covers, in (0, 1].
        loss: what is to rise in place of the host's loss, an :class:`AttackLoss`; None for the host's.

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> import torch
        >>> from advmed import PGD, SquareAttack
        >>> stairs = lambda images: images.flatten(1).round().sum(1, keepdim=True)  # its gradient is 0 everywhere
        >>> attacks = PGD(200, 4.0, float("inf")), SquareAttack(200, float("inf"))
        >>> [attack(stairs, torch.zeros(1, 1, 2, 2), 1.0).terms.item() for attack in attacks]
        [0.0, 4.0]
    """

    steps: int
    norm: float = 2.0
    share: float = 0.1
    loss: AttackLoss | None = None

    access: ClassVar[str] = "black box"
    gradients: ClassVar[int] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        check_count("steps", self.steps)
        if check_fraction("share", self.share) == 0:
            raise ValueError("share must be above 0")

    @property
    def queries(self) -> int:
        """Forward passes per image."""
        own = self.steps + 1
        return own if self.loss is None else own * self.loss.goals + queries_beside(self.loss, 1)

    @property
    def description(self) -> str:
        """What it does, for a report."""
        climbs = "" if self.loss is None else f"; {self.loss.description}"
        return f"Square Attack (Andriushchenko et al. 2020): {self.steps} queries of the loss, no gradients{climbs}"

    def __call__(
        self,
        objective: Objective,
        images: Tensor,
        radius: float | Tensor,
        *,
        bounds: Bounds = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Attacks a batch; see :class:`advmed.attacks.PGD`, whose arguments these are.

        Raises:
            ValueError: for images without spatial dimensions.
        """
        if images.ndim < 3:
            raise ValueError(f"the Square Attack needs images of shape (B, C, *spatial), got {tuple(images.shape)}")
        if self.loss is not None:
            return attack_by_loss(self, self.loss, objective, images, radius, bounds=bounds, generator=generator)
        with attacking(objective):
            problem = Problem(objective, images, radius, norm=self.norm, bounds=bounds, generator=generator)
            propose = self._squares if self.norm == math.inf else self._bumps
            iterate, noise = problem.inside(self._start(problem))
            worst = Worst()
            worst.offer(problem.terms(iterate), iterate, noise)
            for query in range(self.steps):
                iterate, noise = problem.inside(propose(problem, worst.values[1], self._size(problem, query)))
                worst.offer(problem.terms(iterate), iterate, noise)
            return problem.result(worst.values[0], worst.terms)

    def _size(self, problem: Problem, query: int) -> tuple[int, ...]:
        """Extents of the window."""
        share = self.share / 2 ** sum(query >= halving * self.steps for halving in _HALVINGS)
        extents = problem.images.shape[2:]
        side = share ** (1 / len(extents))
        least = 1 if self.norm == math.inf else 3  # a bump has two halves
        return tuple(min(n, max(least, round(side * n))) for n in extents)

    def _start(self, problem: Problem) -> Tensor:
        """Linf: stripes of plus and minus the radius; L2: bumps of random sign all over the image, five a side."""
        images = problem.images
        if self.norm == math.inf:
            length = 1 if images.ndim > 3 else images.shape[2]  # a signal has stripes of one entry each
            return problem.radius * problem.signs((*images.shape[:2], length, *images.shape[3:])).expand_as(images)
        size = tuple(max(1, n // 5) for n in images.shape[2:])
        places = _coordinates(images)
        tiles = [-(-n // s) for n, s in zip(images.shape[2:], size, strict=True)]
        signs = problem.signs((*images.shape[:2], *tiles))
        for axis, (place, side) in enumerate(zip(places, size, strict=True), 2):
            signs = signs.index_select(axis, place.flatten() // side)
        noise = signs * _bump([place % side for place, side in zip(places, size, strict=True)], size, 0)
        return problem.radius * steepest(noise, 2)

    def _squares(self, problem: Problem, noise: Tensor, size: tuple[int, ...]) -> Tensor:
        """Linf (Algorithm 2): plus or minus the radius in a window, one sign per channel."""
        inside, _ = self._window(problem, size)
        signs = problem.signs((*noise.shape[:2], *([1] * (noise.ndim - 2))))
        return torch.where(inside, problem.radius * signs, noise)

    def _bumps(self, problem: Problem, noise: Tensor, size: tuple[int, ...]) -> Tensor:
        """L2 (Algorithm 3): what is in two windows, and what the radius has left, becomes a bump in the first."""
        axes = tuple(range(2, noise.ndim))
        first, local = self._window(problem, size)
        second, _ = self._window(problem, size)
        both = first | second
        axis = problem.choose(len(axes))
        bump = _bump([place.clamp(0, side - 1) for place, side in zip(local, size, strict=True)], size, axis) * first
        signs = problem.signs((*noise.shape[:2], *([1] * len(axes))))
        shape = signs * _unit(bump, axes) + _unit(noise * first, axes)
        spent = (noise * both).square().sum(axes, keepdim=True)
        left = (problem.radius.square() - noise.square().sum((1, *axes), keepdim=True)).clamp_min(0) / noise.shape[1]
        return torch.where(both, 0.0, noise) + _unit(shape, axes) * (spent + left).sqrt()

    def _window(self, problem: Problem, size: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """A window at a random place of every sample: where it is, (B, 1, *spatial), and coordinates within it."""
        images = problem.images
        extents = images.shape[2:]
        drawn = problem.uniform((len(images), len(extents)))
        inside = torch.ones((), dtype=torch.bool, device=images.device)
        local = []
        for axis, (place, n, side) in enumerate(zip(_coordinates(images), extents, size, strict=True)):
            start = (drawn[:, axis] * (n - side + 1)).floor().clamp_max(n - side)
            place = place - broadcast(start, images).long()
            inside = inside & (place >= 0) & (place < side)
            local.append(place)
        return inside, local


def square(
    objective: Objective,
    images: Tensor,
    radius: float | Tensor,
    *,
    queries: int,
    norm: float = 2,
    bounds: Bounds = None,
    loss: AttackLoss | None = None,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """The Square Attack in one call; it asks for losses only.

    Andriushchenko et al. 2020, arXiv 1912.00049, Algorithms 1 to 3; as :class:`SquareAttack`.

    Args:
        objective: images -> (B, K) loss terms.
        images: shape (B, C, *spatial).
        radius: one number or (B,), >= 0, Lp norm of the noise over a sample's whole input, in units of the images.
        queries: number of forward passes after the first.
        norm: 2 or inf.
        bounds: None, or (lowest, highest): numbers or (B,) tensors.
        loss: what is to rise in place of the objective's terms, an :class:`AttackLoss`.
        generator: makes the search repeatable.

    Returns:
        The adversarial images, their terms and norms.

    Raises:
        ValueError: settings out of range, a radius that is negative or not finite, images without spatial dimensions.

    Example:
        >>> import torch
        >>> from advmed import square
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> found = square(objective, torch.zeros(1, 1, 2, 2), 0.5, queries=200, norm=float("inf"))
        >>> found.terms.item()
        2.0
    """
    check_call(images, radius, bounds)
    return SquareAttack(queries, norm, loss=loss)(objective, images, radius, bounds=bounds, generator=generator)


def _coordinates(images: Tensor) -> list[Tensor]:
    """Index along every spatial axis, each of shape (1, 1, ..., n, ..., 1)."""
    found = []
    for axis in range(2, images.ndim):
        shape = [1] * images.ndim
        shape[axis] = images.shape[axis]
        found.append(torch.arange(images.shape[axis], device=images.device).reshape(shape))
    return found


def _bump(local: list[Tensor], size: tuple[int, ...], axis: int) -> Tensor:
    """Two pyramids of opposite sign side by side along an axis of the window (section 3.4 of the paper, eta).

    Args:
        local: coordinates within the window, from 0 to its extent - 1, that broadcast to the image.
        size: extents of the window.
        axis: along which it is halved.
    """
    half = size[axis] // 2
    upper = local[axis] >= half
    distance = torch.zeros((), dtype=torch.long, device=local[0].device)
    for place, side, k in zip(local, size, range(len(size)), strict=True):
        centre = torch.where(upper, half + (side - half) // 2, half // 2) if k == axis else side // 2
        distance = torch.maximum(distance, (place - centre).abs())
    steps = torch.arange(max(size) // 2 + 1, 0, -1, dtype=torch.float32, device=distance.device)
    heights = (1 / steps.square()).cumsum(0).flip(0)  # at distance d: the sum of 1 / k^2 over d < k <= max(size)//2 + 1
    return torch.where(upper, -1.0, 1.0) * heights[distance]


def _unit(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Each channel by its length; 0 stays 0."""
    length = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
    return tensor / torch.where(length > 0, length, 1.0)
