"""What every training method is: a step from (objective, images, ids) to a loss, and a state that can be resumed.

A method is one file: its settings (a :class:`MethodSettings` with fields of its own) and its class, which declares what
it needs. The list of all methods is in :mod:`advmed.methods`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypedDict, Unpack

import torch
from torch import Tensor

from advmed.attacks.pgd import PGD, Revise
from advmed.attacks.problem import AttackResult, Bounds, CleanPass, check_bounds, check_scale
from advmed.clock import Clock
from advmed.distributed import is_distributed
from advmed.margins import MarginStore
from advmed.methods.shared import CleanGradients, leaf_of
from advmed.norms import check_norm
from advmed.objective import Objective, PredictingObjective, predicting, training_pass
from advmed.thresholds import RunningThresholds, Thresholds

Backward = Callable[[Tensor], None]
"""Back-propagates a scalar; a host's own scaler belongs in here."""
_HELD = 0.9
"""Below this share of the noise that images in half precision were to have, the first step warns."""


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """The settings of a method; the fields of a subclass are its own. Their union is what a host reads.

    A subclass that checks its fields calls the check of this class, so that the union checks all.
    """

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""


@dataclass(frozen=True, kw_only=True)
class RadiusSettings(MethodSettings):
    """Of the methods with a noise level.

    Attributes:
        eps: radius of the noise of AT, SAT, TRADES, MART and FAT, and first size of DPAAT, >= 0: a norm over a sample's
            whole input, in units of the images as the network receives them; None: the host's default.
    """

    eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optional(self, "eps", zero=True)


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """The attack of a training. What is None is chosen by the preset of the training.

    Attributes:
        steps: gradient steps, >= 1 (the AMAT authors' release: 20; the papers do not say).
        step_scale: a in alpha = a * radius / steps, > 0, the length of all steps together in radii (the papers give
            none; the authors' release has 4).
        schedule: "equal" steps, or "decreasing" ones (:class:`advmed.attacks.PGD`).
        share_gradient: whether the attack takes its first gradient from the clean training pass, where a method has
            one, which saves a forward pass and half a backward pass. It is the gradient of the training loss: where
            that couples samples (batch Dice, a detector's normaliser) not quite that of a sample's own loss.
        norm: 2 or inf.
        random_start: fraction of the radius from whose ball an attack starts. Default 0: the path then begins at the
            clean image, which "crossing" needs, and a step is repeatable. TRADES, which cannot start there, takes 0.01
            for 0.
        bounds: lowest and highest value of an input, as a pair; "sample": each sample's own; None: no bounds.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from advmed import AttackSettings
        >>> AttackSettings(steps=10, norm="inf").p
        inf
        >>> AttackSettings(steps=0)
        Traceback (most recent call last):
        ValueError: steps must be a whole number >= 1, got 0
    """

    steps: int | None = None
    step_scale: float | None = None
    schedule: Literal["equal", "decreasing"] | None = None
    share_gradient: bool | None = None
    norm: float | Literal["inf"] = 2.0
    random_start: float = 0.0
    bounds: tuple[float, float] | Literal["sample"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        steps = 1 if self.steps is None else self.steps
        step_scale = 1.0 if self.step_scale is None else self.step_scale
        PGD(steps, step_scale, self.p, self.random_start, schedule=self.schedule or "equal")
        check_bounds(self.bounds)

    @property
    def p(self) -> float:
        """The norm as a number."""
        return float(self.norm)


class AttackOptions(TypedDict, total=False):
    """The arguments that every method has for its attack, PGD: the fields of :class:`AttackSettings`, and a seed.

    What is not given is as in the published code of the AMAT paper (arXiv 2206.01736, which prints no such numbers for
    training), but random starts and bounds, which are off.

    Attributes:
        steps: gradient steps, >= 1; 20 where it is not given.
        step_scale: a in alpha = a * radius / steps, > 0: the length of all steps together, in radii; 4.
        schedule: "equal" steps, or "decreasing" ones, as in :class:`PGD`; "equal".
        share_gradient: whether the attack takes its first gradient from the clean training pass, where the method has
            one and the attack starts on the clean images; False.
        norm: 2 or inf, of the noise over a sample's whole input; 2.
        random_start: fraction in [0, 1] of the radius from whose ball an attack starts; 0 (TRADES: 0.01).
        bounds: lowest and highest value of an input, in units of the images as the network receives them: a pair of
            numbers or of (B,) tensors; "sample": each sample's own; None: no bounds. None where it is not given.
        seed: of the random starts, a whole number; 0.

    Example:
        >>> from advmed import AMAT, SAT, AttackOptions
        >>> attack: AttackOptions = {"steps": 10, "norm": "inf", "bounds": (0.0, 1.0)}
        >>> SAT(eps=0.03, **attack).attack == AMAT(delta=0.01, thresholds=1.5, **attack).attack
        True
    """

    steps: int
    step_scale: float
    schedule: Literal["equal", "decreasing"]
    share_gradient: bool
    norm: float | Literal["inf"]
    random_start: float
    bounds: Bounds
    seed: int


@dataclass(frozen=True)
class Step:
    """What a method makes of one batch.

    Attributes:
        loss: the training loss, a scalar. Back-propagate it, unless the step was given ``backward``: then it is
            detached, and all its gradients are in place already.
        logs: values worth logging, detached scalars on the device.
        terms: the clean loss terms, (B, K), detached; None where the method makes no clean pass.
        adversarial: the adversarial images, None where there are none.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import SAT
        >>> objective = ClassificationObjective(torch.nn.Linear(4, 2), torch.tensor([0, 1]))
        >>> step = SAT(eps=0.5).step(objective, torch.eye(2, 4), ["a", "b"])
        >>> step.loss.backward()  # and then the optimizer's step, as in any training
        >>> sorted(step.logs), step.terms.shape
        (['loss_adversarial', 'loss_clean', 'nonfinite'], torch.Size([2, 1]))
    """

    loss: Tensor
    logs: dict[str, Tensor]
    terms: Tensor | None = None
    adversarial: Tensor | None = field(default=None, repr=False)


class Method(ABC):
    """A training method. It knows objectives, radii and ids, and no framework.

    A class of your own gives ``name`` and ``step``; :func:`advmed.check_method` tells whether it keeps what every
    method promises.

    Attributes:
        name: as in a configuration.
        settings: the class of its settings.
        keeps_sizes: whether every sample has a noise level of its own, under its id.
        needs_classes: whether predictions must be classes (:class:`advmed.ClassObjective`).
        presets: by name, the values of settings that a user left open. "paper" is the method as published; "fast", the
            default of all trainers, what measurements found at a few times the cost of standard training.
        learns_from_clean: whether clean images are among those that it back-propagates a loss of.

    Example:
        >>> import torch
        >>> from advmed import Method, Step
        >>> class Brighter(Method):
        ...     name = "brighter"
        ...     def step(self, objective, images, ids, backward=None):
        ...         return Step(objective(images + 0.5).mean(), logs={})
        >>> Brighter().step(lambda images: images.flatten(1).sum(1, keepdim=True), torch.zeros(1, 1, 2, 2), ["a"]).loss
        tensor(2.)
    """

    name: ClassVar[str]
    settings: ClassVar[type[MethodSettings]] = MethodSettings
    keeps_sizes: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fast": {}, "paper": {}}
    learns_from_clean: bool = True

    @property
    def cost(self) -> float:
        """Of a step, in standard training steps: a forward pass counts a third, as each half of a backward pass."""
        return 1.0

    @classmethod
    def needs_thresholds(cls, objective: type) -> bool:
        """Whether it needs thresholds, with objectives of this class."""
        return False

    @classmethod
    def compares_predictions(cls, settings: MethodSettings) -> bool:
        """Whether its loss joins the clean and the attacked pass, which are then back-propagated together."""
        return False

    @classmethod
    def from_settings(
        cls,
        settings: Any,
        thresholds: Thresholds | RunningThresholds | None = None,
        **attack: Unpack[AttackOptions],
    ) -> Self:
        """The method with these settings, and others that it does not know.

        Args:
            settings: an instance of its class of settings.
            thresholds: where it needs some.
            **attack: see :class:`AttackOptions`.

        Raises:
            ValueError: if a number that it needs is None.
        """
        return cls()

    @abstractmethod
    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """Computes the training loss of a batch, and updates what the method knows about its samples.

        Args:
            objective: images -> (B, K) loss terms, closed over model and targets.
            images: shape (B, C, *spatial).
            ids: B stable sample ids.
            backward: with it, each part of the loss is back-propagated as soon as it is known, so that the graphs of
                the clean and of the adversarial pass never live at the same time: the peak memory of a standard step.
                (Where the loss joins the two passes, they are back-propagated together.)
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
        steps: see :class:`AttackSettings`, as all but the last.
        step_scale: a in alpha = a * radius / steps.
        schedule: "equal" or "decreasing" steps.
        share_gradient: whether the first gradient is that of the clean training pass.
        norm: 2 or inf.
        random_start: fraction of the radius from whose ball an attack starts.
        bounds: lowest and highest value of an input, "sample", or None.
        seed: seed of the random starts.

    Attributes:
        maximises: whether its attack means to find the largest loss.
        shared: passes that ``share_gradient`` saves, forward passes and halves of backward passes.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"steps": 3, "step_scale": 1.75, "schedule": "decreasing", "share_gradient": True},
        "paper": {"steps": 20, "step_scale": 4.0, "schedule": "equal", "share_gradient": False},
    }
    maximises: ClassVar[bool] = True
    shared: ClassVar[int] = 2

    def __init__(
        self,
        *,
        steps: int = 20,
        step_scale: float = 4.0,
        schedule: Literal["equal", "decreasing"] = "equal",
        share_gradient: bool = False,
        norm: float | Literal["inf"] = AttackSettings.norm,
        random_start: float = AttackSettings.random_start,
        bounds: Bounds = AttackSettings.bounds,
        seed: int = 0,
    ) -> None:
        self.attack = PGD(steps, step_scale, check_norm(norm), random_start, schedule=schedule)
        check_bounds(bounds)
        self.clean_gradients = CleanGradients() if share_gradient and not random_start else None
        self.bounds = bounds
        self.seed = seed
        self.steps_done = 0
        self._looked = False  # at the images of the first step
        self.clock = Clock()

    @property
    def cost(self) -> float:
        """See :attr:`Method.cost`: two for each attack step, three for each pass that the network learns from."""
        beside = 6 if self.learns_from_clean else 3
        saved = self.shared if self.learns_from_clean and self.clean_gradients is not None else 0
        return (2 * self.attack.steps + beside - saved) / 3

    def _attack(
        self,
        objective: Objective,
        images: Tensor,
        radius: float | Tensor,
        thresholds: Tensor | Sequence[float] | None = None,
        patience: int | None = None,
        clean: CleanPass | None = None,
        revise: Revise | None = None,
    ) -> AttackResult:
        """x~ = PGD(x, y, radius), without the terms of x~: the training pass on x~ computes them anyway."""
        generator = self._generator() if self.attack.random_start else None
        self.steps_done += 1
        first, self._looked = not self._looked, True
        if first:  # it waits for the device, so not in every step
            check_scale(images, self.bounds)
        with self.clock(images.device):
            attacked = self.attack(
                objective,
                images,
                radius,
                bounds=self.bounds,
                thresholds=thresholds,
                patience=patience,
                generator=generator,
                final_pass=False,
                clean=clean,
                revise=revise,
            )
        if first and images.dtype in (torch.float16, torch.bfloat16):
            assert attacked.radius is not None
            self._compare(attacked.norms.float(), attacked.radius.float(), images.dtype)
        return attacked

    def _generator(self, *use: int) -> torch.Generator:
        """Of this step and process, and of a use beside the random start: a resumed run needs to know only how many
        steps were made."""
        rank = torch.distributed.get_rank() if is_distributed() else 0
        return torch.Generator().manual_seed(hash((self.seed, rank, self.steps_done, *use)) & (2**63 - 1))

    @staticmethod
    def _compare(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
        """Warns where images in half precision cannot hold their noise."""
        share = float(found.sum() / wanted.sum())
        if share < _HELD:
            warnings.warn(
                f"images in {str(dtype).removeprefix('torch.')} hold {share:.0%} of the noise that they are to be "
                f"trained with, for their digits are few: keep images in float32, as mixed precision does (bf16-mixed)",
                stacklevel=2,
            )

    def loss_of(
        self, objective: Objective, images: Tensor, adversarial: Tensor, backward: Backward | None = None
    ) -> Tensor:
        """The training loss of images whose noise is known already; nothing is attacked, and nothing learnt of them.

        Args:
            objective: of the batch.
            images: clean, (B, C, *spatial).
            adversarial: the same with their noise.
            backward: see :meth:`step`.

        Returns:
            A scalar, of the same make as :attr:`Step.loss`.
        """
        mixed = MixedLoss(objective, backward)
        if self.learns_from_clean:
            mixed.add(images, 0.5)
        mixed.add(adversarial, 0.5 if self.learns_from_clean else 1.0)
        return mixed.total()

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
        **attack: see :class:`AttackOptions`.
    """

    settings: ClassVar[type[MethodSettings]] = RadiusSettings

    def __init__(self, eps: float, **attack: Unpack[AttackOptions]) -> None:
        super().__init__(**attack)
        self.eps = check_positive("eps", eps, zero=True)

    @classmethod
    def from_settings(
        cls,
        settings: Any,
        thresholds: Thresholds | RunningThresholds | None = None,
        **attack: Unpack[AttackOptions],
    ) -> Self:
        """See :meth:`Method.from_settings`."""
        return cls(cls._eps(settings), **attack)

    @classmethod
    def _eps(cls, settings: RadiusSettings) -> float:
        return required(cls.name, "eps, the radius of its noise", settings.eps)


class ComparingMethod(FixedRadiusMethod):
    """A method with one noise level whose loss joins the clean pass with the attacked one."""

    @classmethod
    def compares_predictions(cls, settings: MethodSettings) -> bool:
        """Always."""
        return True

    def loss_of(
        self, objective: Objective, images: Tensor, adversarial: Tensor, backward: Backward | None = None
    ) -> Tensor:
        """See :meth:`AdversarialMethod.loss_of`."""
        predictor = predicting(objective, self.name)
        loss, _ = self._compared(predictor, predictor.loss_and_predictions(images), adversarial)
        return gone_back(loss, backward)

    @abstractmethod
    def _compared(
        self, predictor: PredictingObjective, passed: tuple[Tensor, Tensor, Any], adversarial: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts by name, of a clean pass (loss, terms, predictions) and the one on the noise."""


class AdaptiveRadiusMethod(AdversarialMethod):
    """A method in which every sample has a noise level of its own, which moves each time the sample is met.

    Args:
        first: every sample's first level.
        growth: the most that a level grows a visit.
        lowest: no level falls below it.
        highest: no level rises above it; None: no limit.
        additive: whether levels shrink by steps of a given size, too.
        averaged: whether a level is a moving average of what the visits of its sample say.
        estimated: whether a sample's first visit sets its level anew.
        **attack: see :class:`AttackOptions`.

    Attributes:
        store: the :class:`MarginStore` with the levels.
        drawn: whether a sample is trained with the level of any sample.
    """

    keeps_sizes: ClassVar[bool] = True
    drawn: bool = False

    def __init__(
        self,
        first: float,
        growth: float,
        *,
        lowest: float = 0.0,
        highest: float | None = None,
        additive: bool = False,
        averaged: bool = False,
        estimated: bool = False,
        **attack: Unpack[AttackOptions],
    ) -> None:
        super().__init__(**attack)
        self.growth, self.lowest, self.highest = growth, lowest, highest
        initial = self._bounded(torch.tensor(first)).item()
        self.store = MarginStore(initial, additive=additive, averaged=averaged, estimated=estimated)

    def _levels(self, ids: Sequence[str], images: Tensor) -> Tensor:
        """The levels of a batch's samples, (B,), on the device of the images."""
        check_ids(ids, images)
        return self.store.to(images.device).get(ids)

    def _bounded(self, levels: Tensor) -> Tensor:
        return levels.clamp(self.lowest, self.highest)

    def _lost(self, attacked: AttackResult) -> Tensor:
        """Samples whose attack came to nothing because no gradient was finite, (B,): it says nothing of their level."""
        return attacked.nonfinite >= self.attack.steps

    def outlook(self, visits: float, eps: float | None) -> list[str]:
        """How far levels can get in a run, completing "N samples, each met about V times in this run: ...".

        Args:
            visits: how often a sample is met.
            eps: the noise level of interest; None: not known.

        Returns:
            That line, and a warning where it is not far enough.
        """
        reach = visits * self.growth
        norm = f"L{self.attack.norm:g} norm"
        lines = [
            f"margins can reach about {reach:.2f} ({norm}, delta {self.growth:g}"
            + (")" if eps is None else f", eps {eps:g})")
        ]
        if eps is not None and reach < eps:
            lines.append(
                f"WARNING: margins cannot reach the noise levels of interest (about eps = {eps:g}) in so short a run, "
                f"because a margin grows by at most delta a visit. Raise delta to about {eps / visits:.2g}, "
                f"or train longer."
            )
        return lines

    def resting(self) -> str | None:
        """A warning if so many levels rest on one of their bounds that the bound decides, and not the samples."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Levels and counters, in plain types."""
        return {**super().state_dict(), "margins": self.store.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of an earlier run; its levels are brought within the bounds of this one."""
        super().load_state_dict(state)
        self.store.load_state_dict({**state["margins"], "initial": self.store.initial})
        self._clamp()

    def merge(self) -> None:
        """Makes the levels of all processes equal."""
        self.store.merge()
        self._clamp()

    def _clamp(self) -> None:
        self.store.clamp(self.lowest, self.highest)


class ThresholdMethod(AdversarialMethod):
    """A method that compares loss terms with thresholds; a base class before the one with its noise levels.

    Attributes:
        thresholds: fixed or self-calibrated; None where it can do without.
    """

    thresholds: Thresholds | RunningThresholds | None = None
    _named = False  # whether the thresholds know the names of their terms
    _xi: Tensor | None = None

    def set_thresholds(
        self, thresholds: Thresholds | RunningThresholds | Tensor | Sequence[float] | float | None
    ) -> None:
        """Takes thresholds, or plain numbers."""
        self._named = isinstance(thresholds, (Thresholds, RunningThresholds))
        if thresholds is not None and not isinstance(thresholds, (Thresholds, RunningThresholds)):
            values = torch.as_tensor(thresholds, dtype=torch.float64).reshape(-1).tolist()
            thresholds = Thresholds(tuple(values), tuple(f"term_{k}" for k in range(len(values))))
        self.thresholds, self._xi = thresholds, None

    def _limits(self, objective: Objective, images: Tensor) -> Tensor | None:
        """xi, (K,), on the device; None without thresholds."""
        if self.thresholds is None:
            return None
        names = getattr(objective, "names", None)
        if self._named and names is not None:
            self.thresholds.require(names)
        like = torch.empty((), device=images.device)  # float32 for images in half precision, too
        if isinstance(self.thresholds, RunningThresholds):
            return self.thresholds.tensor(like)
        if self._xi is None or self._xi.device != images.device:
            self._xi = self.thresholds.tensor(like)
        return self._xi

    def _check_number(self, terms: Tensor) -> None:
        """Raises ValueError if there are not as many thresholds as terms, (B, K)."""
        if self.thresholds is not None and terms.shape[1] != len(self.thresholds):
            raise ValueError(f"{len(self.thresholds)} thresholds for an objective with K = {terms.shape[1]} loss terms")

    def state_dict(self) -> dict[str, Any]:
        """What its bases keep, and self-calibrated thresholds, in plain types."""
        state = super().state_dict()
        if isinstance(self.thresholds, RunningThresholds):
            state["thresholds"] = self.thresholds.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of an earlier run."""
        super().load_state_dict(state)
        if isinstance(self.thresholds, RunningThresholds) and "thresholds" in state:
            self.thresholds.load_state_dict(state["thresholds"])

    def merge(self) -> None:
        """Makes what its bases keep, and running thresholds, equal in all processes."""
        super().merge()
        if isinstance(self.thresholds, RunningThresholds):
            self.thresholds.merge()


@dataclass
class MixedLoss:
    """A loss in parts, each with its weight; see ``backward`` in :meth:`Method.step`.

    Args:
        objective: of the batch.
        backward: see :meth:`Method.step`.
        gradients: takes the gradients of the clean pass at once (:attr:`AdversarialMethod.clean_gradients`); None:
            they wait for the loss's own backward pass.
    """

    objective: Objective
    backward: Backward | None
    gradients: CleanGradients | None = None
    loss: Tensor | None = None
    _clean: tuple[Tensor, Tensor] | None = None

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
        self._add(part)
        return loss.detach(), terms

    def clean_first(self, images: Tensor, weight: float) -> CleanPass | None:
        """Adds weight * L(images) before the attack, which begins with what is returned; None: it has to see itself."""
        if self.gradients is None or not self.gradients.possible(self.objective, images, self.backward):
            return None
        leaf = leaf_of(images)
        loss, terms = training_pass(self.objective, leaf)
        part, found = self.gradients.take(self.objective, leaf, loss * weight, terms, self.backward)
        self._add(part)
        self._clean = loss.detach(), terms
        return found

    def clean(self, images: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """As :meth:`add`, unless :meth:`clean_first` has added the same."""
        return self._clean or self.add(images, weight)

    def _add(self, part: Tensor) -> None:
        self.loss = part if self.loss is None else self.loss + part

    def total(self) -> Tensor:
        """The sum of the parts."""
        assert self.loss is not None
        return self.loss


def gone_back(loss: Tensor, backward: Backward | None) -> Tensor:
    """A loss that was back-propagated, and is detached then, if ``backward`` is given."""
    if backward is None:
        return loss
    backward(loss)
    return loss.detach()


def joined_step(
    loss: Tensor, backward: Backward | None, losses: Mapping[str, Tensor], terms: Tensor, attacked: AttackResult
) -> Step:
    """The end of a step whose loss compares the clean pass with the attacked one: both go back at once, ``backward`` or
    not.

    Args:
        loss: scalar, of both passes.
        backward: see :meth:`Method.step`.
        losses: scalars to be logged.
        terms: loss terms of the clean images, (B, K).
        attacked: the attacked images.
    """
    loss = gone_back(loss, backward)
    logs = {**{name: value.detach() for name, value in losses.items()}, "nonfinite": attacked.nonfinite.sum()}
    return Step(loss, logs, terms.detach(), attacked.images)


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


def check_optional(settings: object, *names: str, zero: bool = False) -> None:
    """Raises ValueError for a field that is neither None nor a finite number > 0 (>= 0 with ``zero``)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            check_positive(name, value, zero=zero)


def required(method: str, what: str, value: float | None) -> float:
    """Returns a number that a method cannot do without.

    Raises:
        ValueError: if it is None.
    """
    if value is None:
        raise ValueError(f"{method} needs {what}")
    return value
