"""What every training method is: a step from (objective, images, ids) to a loss, and a state that can be resumed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.attacks.gradient import GradientAttack
from common.attacks.problem import AttackResult, Bounds, check_bounds
from common.clock import Clock
from common.margins import MarginStore, is_distributed
from common.objective import Objective, training_pass

Backward = Callable[[Tensor], None]
"""Back-propagates a scalar; a host's own scaler belongs in here."""


@dataclass(frozen=True)
class Step:
    """What a method makes of one batch.

    Attributes:
        loss: the training loss, a scalar. Back-propagate it, unless the step was given ``backward``: then it is
            detached, and all its gradients are in place already.
        logs: values worth logging, detached scalars on the device.
        terms: the clean loss terms, (B, K), detached; None where the method makes no clean pass.
        adversarial: the adversarial images, None where there are none.
    """

    loss: Tensor
    logs: dict[str, Tensor]
    terms: Tensor | None = None
    adversarial: Tensor | None = field(default=None, repr=False)


class Method(ABC):
    """A training method. It knows objectives, radii and ids, and no framework."""

    name: ClassVar[str]
    learns_from_clean = True
    """Whether clean images are among those that it back-propagates a loss of."""

    @abstractmethod
    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """Computes the training loss of a batch, and updates what the method knows about its samples.

        Args:
            objective: images -> (B, K) loss terms, closed over model and targets.
            images: shape (B, C, *spatial).
            ids: B stable sample ids.
            backward: with it, each part of the loss is back-propagated as soon as it is known, so that the graphs of
                the clean and of the adversarial pass never live at the same time: the peak memory of a standard step.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain types."""
        return {"method": self.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of an earlier run.

        Raises:
            ValueError: if it is the state of another method.
        """
        if state.get("method") != self.name:
            raise ValueError(f"the saved state is of the method {state.get('method')!r}, this run trains {self.name!r}")

    def begin_epoch(self) -> None:  # noqa: B027 - most methods do not know of epochs
        """Called before the first step of every epoch."""

    def merge(self) -> None:  # noqa: B027 - most methods have nothing to exchange
        """Makes the state of all processes equal; on all of them, once an epoch and before a state is saved."""


class AdversarialMethod(Method):
    """A method that trains on attacked images.

    Args:
        steps: gradient steps of the training attack (the papers: 20).
        step_scale: a in alpha = a * radius / steps. Default 4, the authors' released setting; the papers give none.
        norm: 2 or inf.
        random_start: fraction of the radius from whose ball an attack starts. Default 0: the path then begins at the
            clean image, which "crossing" needs, and a step is repeatable.
        bounds: lowest and highest value of an input, "sample", or None.
        seed: seed of the random starts.
    """

    def __init__(
        self,
        *,
        steps: int = 20,
        step_scale: float = 4.0,
        norm: float = 2,
        random_start: float = 0.0,
        bounds: Bounds = None,
        seed: int = 0,
    ) -> None:
        self.attack = GradientAttack(steps, step_scale, norm, random_start)
        check_bounds(bounds)
        self.bounds = bounds
        self.seed = seed
        self.steps_done = 0
        self.clock = Clock()

    def _attack(
        self, objective: Objective, images: Tensor, radius: float | Tensor, thresholds: Tensor | None = None
    ) -> AttackResult:
        """x~ = PGD(x, y, radius), without the terms of x~: the training pass on x~ computes them anyway."""
        generator = None
        if self.attack.random_start:
            # A seed for each step and process: a resumed run needs to know only how many steps were made.
            rank = torch.distributed.get_rank() if is_distributed() else 0
            generator = torch.Generator().manual_seed(hash((self.seed, rank, self.steps_done)) & (2**63 - 1))
        self.steps_done += 1
        with self.clock(images.device):
            return self.attack(
                objective,
                images,
                radius,
                bounds=self.bounds,
                thresholds=thresholds,
                generator=generator,
                final_pass=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain types."""
        return {**super().state_dict(), "steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of an earlier run."""
        super().load_state_dict(state)
        self.steps_done = int(state["steps_done"])


class FixedRadiusMethod(AdversarialMethod):
    """A method with one noise level for all samples.

    Args:
        eps: radius of the noise, >= 0, Lp norm over a sample's whole input.
        **attack: see :class:`AdversarialMethod`.
    """

    def __init__(self, eps: float, **attack: Any) -> None:
        super().__init__(**attack)
        self.eps = check_positive("eps", eps, zero=True)


class AdaptiveRadiusMethod(AdversarialMethod):
    """A method in which every sample has a noise level of its own, which moves each time the sample is met.

    Args:
        first: every sample's first level.
        growth: the most that a level grows a visit.
        lowest: no level falls below it.
        highest: no level rises above it; None: no limit.
        additive: whether levels shrink by steps of a given size, too.
        **attack: see :class:`AdversarialMethod`.

    Attributes:
        store: the :class:`MarginStore` with the levels.
    """

    def __init__(
        self,
        first: float,
        growth: float,
        *,
        lowest: float = 0.0,
        highest: float | None = None,
        additive: bool = False,
        **attack: Any,
    ) -> None:
        super().__init__(**attack)
        self.growth, self.lowest, self.highest = growth, lowest, highest
        self.store = MarginStore(self._bounded(torch.tensor(first)).item(), additive=additive)

    def _levels(self, ids: Sequence[str], images: Tensor) -> Tensor:
        """The levels of a batch's samples, (B,), on the device of the images."""
        check_ids(ids, images)
        return self.store.to(images.device).get(ids)

    def _bounded(self, levels: Tensor) -> Tensor:
        return levels.clamp(self.lowest, self.highest)

    def state_dict(self) -> dict[str, Any]:
        """Levels and counters, in plain types."""
        return {**super().state_dict(), "margins": self.store.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of an earlier run."""
        super().load_state_dict(state)
        self.store.load_state_dict(state["margins"])

    def merge(self) -> None:
        """Makes the levels of all processes equal."""
        self.store.merge()
        self.store.clamp(self.lowest, self.highest)


@dataclass
class MixedLoss:
    """A loss in parts, each with its weight; see ``backward`` in :meth:`Method.step`."""

    objective: Objective
    backward: Backward | None
    loss: Tensor | None = None

    def add(self, images: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Adds weight * L(images).

        Returns:
            The loss L(images), detached, and its terms, (B, K), detached.
        """
        loss, terms = training_pass(self.objective, images)
        part = loss * weight
        if self.backward is not None:
            self.backward(part)
            part = part.detach()
        self.loss = part if self.loss is None else self.loss + part
        return loss.detach(), terms

    def total(self) -> Tensor:
        """The sum of the parts."""
        assert self.loss is not None
        return self.loss


def check_positive(name: str, value: float, *, zero: bool = False) -> float:
    """Returns ``value`` as a float.

    Raises:
        ValueError: if it is not a finite number > 0 (>= 0 with ``zero``).
    """
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} must be a finite number {'>= 0' if zero else '> 0'}, got {value!r}")
    return number


def check_ids(ids: Sequence[str], images: Tensor) -> None:
    """Raises ValueError if there is not one id for each image."""
    if len(ids) != images.shape[0]:
        raise ValueError(f"{len(ids)} sample ids for a batch of {images.shape[0]} images")
