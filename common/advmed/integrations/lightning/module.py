"""A LightningModule whose loss is asked of a training method."""

from __future__ import annotations

import copy
import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from advmed.attacks import PGD
from advmed.distributed import gathered
from advmed.files import write_whole
from advmed.integrations.lightning.calibration import HOW, IMAGES, LEAST, Judgement, look, measure, quality
from advmed.integrations.lightning.callbacks import does_not_wait
from advmed.integrations.lightning.data import SampleData
from advmed.integrations.lightning.weights import read_tensors
from advmed.margins import names_of_samples
from advmed.methods import (
    AdaptiveRadiusMethod,
    AdversarialMethod,
    AttackSettings,
    EveryMethodSettings,
    method_class,
)
from advmed.objective import Objective
from advmed.thresholds import BOUNDARY, DEFAULT_RULE, RunningThresholds, Thresholds, at_boundary, beyond_boundary
from advmed.training.rate import LateDecay
from advmed.training.run import (
    MethodRun,
    fingerprint,
    load_thresholds,
    saved_thresholds,
    self_calibrated,
    without_use,
)
from advmed.training.settings import RunSettings, TrainingSettings
from advmed.versions import tell_if_newer

STATE = "advmed"
"""Key of our state in a checkpoint; plain values."""
FILE = "adversarial.yaml"
"""The resolved settings, in the run's folder."""
MARGINS = "margins.csv"
VALIDATION_STEPS = 5
"""Of the attack on validation images, for an adversarial method whose user does not say."""
ROBUST = "val/robust_"
"""What the names of metrics of attacked validation images begin with."""
_REMEDY = "Check the images, lower lr, or train with trainer.precision bf16-mixed or 32-true."
_SHARING = (SingleDeviceStrategy, DDPStrategy)
"""The strategies, and no subclasses, with whole weights whose gradients one backward pass per step collects."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions(EveryMethodSettings, RunSettings):
    """The training method and its numbers.

    All but ``name`` are settings of :class:`advmed.TrainingSettings`: the run's, and those of every method. The page of
    settings (docs/settings.md) describes each, with values, defaults and units.

    Attributes:
        name: one of :data:`advmed.METHODS`, such as AMAT.
        eps: None: classification 2/255 of every value (4/255 in Linf), landmarks 1 for 3 x 200 x 160 values, growing
            with the square root of their number (2/255 in Linf).
        delta: None: classification 0.5/255 of every value (1/255 in Linf), landmarks as eps (0.5/255 in Linf).
        backward: "together"; "sequential" is refused, as Lightning back-propagates one loss a step.
        seed: seed of random starts; None: 0. The network's weights and the augmentation have another,
            ``seed_everything``, which is 0 if nothing is said.

    Raises:
        ValueError: a value out of its range, or a method that is none.

    Example:
        >>> from adv_classify import ClassifierAttack, MethodOptions
        >>> settings = MethodOptions(name="SAT", eps=1.5).with_attack(ClassifierAttack(steps=10))
        >>> settings.eps, settings.steps, settings.bounds
        (1.5, 10, (0.0, 1.0))
    """

    name: str = "STD"

    def __post_init__(self) -> None:
        super().__post_init__()
        method_class(self.name)

    def with_attack(self, attack: AttackSettings) -> TrainingSettings:
        """The two sections of a configuration as one."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}
        return TrainingSettings(
            **given, **{field.name: getattr(attack, field.name) for field in fields(AttackSettings)}
        )


class RobustModule(LightningModule):
    """A LightningModule that trains by a method of :mod:`advmed.methods`.

    Optimizer, schedule, precision, gradient accumulation, logging, checkpoints and several processes stay Lightning's.
    A subclass gives :meth:`objective` and :meth:`made_of`, and calls the hooks of this class where it overrides them.
    Its hyperparameters, in plain values, are what it is made from again.

    Args:
        method: the training method.
        attack: its attack.
        terms: the names of the loss terms.
        default_rule: how thresholds are made where the settings do not say.
        lr: learning rate of the default optimizer, AdamW with a cosine schedule over all epochs.
        weight_decay: of the default optimizer.
        validation_steps: steps of the PGD attack that validation images are attacked with at ``eps`` of the method; 0:
            none; None: 5 for adversarial methods, by whose robust metrics the best epoch is chosen.
        begins_with: the file that the network's weights are from, if they are from one.
    """

    command: ClassVar[str]
    """The command whose checkpoints these are."""
    objective_class: ClassVar[type]
    """The class of its objectives."""
    sections: ClassVar[Mapping[str, type]]
    """The arguments that are dataclasses, by name."""
    packages: ClassVar[tuple[str, ...]] = ("lightning",)
    """Whose releases may break it: a newer one than those that were tested is pointed out."""
    better: ClassVar[Mapping[str, str]] = {}
    """Whether a metric is better when it is larger, "max", or smaller, "min"; by what its name begins with."""
    run: MethodRun | None

    def __init__(
        self,
        method: MethodOptions,
        attack: AttackSettings,
        terms: Sequence[str],
        default_rule: str = DEFAULT_RULE,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        validation_steps: int | None = None,
        begins_with: str | None = None,
    ) -> None:
        super().__init__()
        self.lr, self.weight_decay, self.begins_with = lr, weight_decay, begins_with
        method_class(method.name, self.objective_class)
        self.validation_steps = validation_steps_of(method.name, validation_steps)
        self.method_name, self.settings = method.name, method.with_attack(attack)
        self._given = self.settings
        self.terms, self.default_rule = tuple(terms), default_rule
        if self.settings.backward != "together":
            raise ValueError(
                "backward 'sequential' is not to be had with Lightning, which back-propagates one loss a step; use "
                "'together', and accumulate_grad_batches against a lack of memory"
            )
        self.run = None
        self._state: dict[str, Any] | None = None
        self._scored: list[dict[str, Tensor]] = []
        self._scored_ids: list[str] = []
        self._judged: Judgement | None = None  # by the last validation
        self._schedule: tuple[torch.optim.lr_scheduler.CosineAnnealingLR, int] | None = (
            None  # of our own, and its steps
        )
        self._before_statistics: dict[str, Any] | None = None
        self._begun: int | None = None  # the epoch that the run has been told of
        self._planned: list[dict[str, Any]] = []  # what schedules are made of, before a checkpoint brings others

    @abstractmethod
    def objective(self, batch: Any) -> tuple[Objective, Tensor, Sequence[str]]:
        """The objective of a batch, its images and its sample ids."""

    @staticmethod
    @abstractmethod
    def made_of(values: Mapping[str, Any]) -> str | None:
        """What a network with these hyperparameters is, in words; None if they are of no module of this class."""

    @classmethod
    @abstractmethod
    def standard(cls, path: str | Path, data: Any, like: Self | None = None) -> Self:
        """A trained standard model whose thresholds are for the data, and for a training ``like`` this one.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is for other data, or its loss is another.
        """

    @staticmethod
    @abstractmethod
    def resolved(settings: TrainingSettings, values: int) -> TrainingSettings:
        """Settings with the defaults that depend on the number of values of an image filled in."""

    # Validation and test: what a host scores a batch by

    @abstractmethod
    def scores(self, images: Tensor, batch: Any) -> Tensor:
        """What a pass on the images of a batch, clean or attacked, gives the metrics, (B, ...)."""

    def truth(self, batch: Any) -> dict[str, Tensor]:
        """What of a batch the metrics need beside :meth:`scores`, each (B, ...)."""
        return {}

    @abstractmethod
    def metrics(self, scores: Tensor, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The metrics of all samples, by name."""

    # Whether a network is trained: what thresholds are measured on

    @abstractmethod
    def evidence(self, objective: Any, predictions: Any, batch: Any) -> dict[str, Tensor]:
        """What of a training batch tells how good the network is, each (B, ...)."""

    @abstractmethod
    def judge(self, evidence: Mapping[str, Tensor]) -> Judgement:
        """How good it is, by the evidence of all batches."""

    def evidence_of(self, scores: Tensor, truth: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The same of all validation images, from what their metrics are made of; None: nothing is said of them."""
        return None

    def attacked_objective(self, batch: Any) -> Objective:
        """What validation images are attacked by."""
        return self.objective(batch)[0]

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine schedule, or with a late decay; a configuration may name others."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):  # max_epochs -1, which on_fit_start refuses in words
            return optimizer
        if self.settings.decay == "late":
            late = LateDecay(optimizer, lambda: float(steps))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": late, "interval": "step"}}
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, int(steps)))
        self._schedule = schedule, schedule.T_max
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # The run

    def setup(self, stage: str) -> None:
        """Refuses what would train before the method is set up.

        Raises:
            ValueError: for a callback that does.
        """
        tell_if_newer(self.packages, lambda line: say(f"WARNING: {line}"))
        for callback in self.trainer.callbacks if stage == "fit" else ():  # type: ignore[attr-defined]  # as below
            if isinstance(callback, (BatchSizeFinder, LearningRateFinder)):
                raise ValueError(
                    f"{type(callback).__name__} trains before the training has begun, which a method that attacks "
                    f"cannot: leave it out, and set model.lr or data.batch_size"
                )

    @property
    def _running(self) -> MethodRun:
        if self.run is None:
            raise RuntimeError("the training has not begun: on_fit_start, which sets its method up, was not called")
        return self.run

    def on_fit_start(self) -> None:
        """Sets the method up: whatever is wrong with the settings is said before the first step."""
        values = self.data.dataset("train")[0]["image"].numel()
        self.settings = self._sharing(self.resolved(self.settings, values).for_method(self.method_name))
        for line in without_use(self.method_name, self._given):
            say(line)
        ids = self._sample_ids()
        steps = self._steps_per_epoch()
        epochs = self._epochs(steps)
        state = self._state
        if state is not None:
            self._check_state(state, ids)
        self._check_monitors()
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if self.settings.decay == "late" and not any(isinstance(schedule, LateDecay) for schedule in schedules):
            raise ValueError(
                "decay 'late' is a schedule of the default optimizer, and another optimizer or schedule was named: "
                "leave out that, or decay"
            )
        self._planned = [_numbers(schedule) for schedule in schedules]
        thresholds = self._thresholds(state, len(ids))
        if isinstance(thresholds, Thresholds) and (told := beyond_boundary(thresholds, self.objective_class)):
            say(told)
        self._begun = None  # of another fit of this module
        self.run = MethodRun(
            self.method_name,
            self.settings,
            thresholds,
            epochs=epochs,
            steps_per_epoch=steps,
            say=say,
            doubts=self._doubts,
        )
        self._check_optimizers()
        lines = [] if state is None else self.run.load_state_dict(state)
        visits = len(ids) * self._share_of_epoch(steps)
        for line in [*lines, *self.run.outlook(len(ids), visits, "images"), *self._looking_at_warmup()]:
            say(line)
        # Lightning has logged the arguments of the module, of which some were left open until now.
        resolved = plain(asdict(self.settings))
        for logger in self.loggers:
            logger.log_hyperparams({"adversarial": {"method": self.method_name, **resolved}})
        if (folder := self._folder()) is not None:
            notes = f"# method: {self.method_name}\n# thresholds: {self.run.thresholds}\n"
            folder.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(resolved, sort_keys=False)
            write_whole(folder / FILE, notes + text)

    def _sharing(self, settings: TrainingSettings) -> TrainingSettings:
        """Without a shared gradient where the strategy takes the gradients of the weights in its own way.

        Raises:
            ValueError: for a setting that cannot do without.
        """
        strategy = type(self.trainer.strategy)
        moves = settings.awp and is_adversarial(self.method_name)
        if moves and self.trainer.precision == "16-true":
            raise ValueError(
                "awp takes a second gradient in each step, which weights in float16 lose without a loss scale: train "
                "with precision 16-mixed, bf16-mixed or 32"
            )
        if moves and strategy not in _SHARING:
            raise ValueError(
                f"awp takes a second gradient in each step, at other weights, and {strategy.__name__} takes gradients "
                f"in its own way: leave awp out, or train with the strategy ddp, or on one device"
            )
        if not settings.share_gradient or strategy in _SHARING:
            return settings
        say(
            f"share_gradient is off: {strategy.__name__} takes gradients in its own way; each step costs two thirds of "
            f"a standard step more"
        )
        return replace(settings, share_gradient=False)

    def _steps_per_epoch(self) -> int | None:
        """Batches of an epoch in this process, where they can be counted."""
        self.trainer.fit_loop.setup_data()  # does nothing where the optimizer has asked for it before
        count = self.trainer.num_training_batches
        return int(count) if math.isfinite(count) and count > 0 else None

    def _share_of_epoch(self, steps: int | None) -> float:
        """Of the batches that the data have (``limit_train_batches``)."""
        try:
            return 1.0 if steps is None else min(1.0, steps / len(self.trainer.train_dataloader))  # type: ignore[arg-type]
        except TypeError:  # a stream has no length
            return 1.0

    def _doubts(self) -> str | None:
        """After a clean warm-up, against the network."""
        if not isinstance(self.data, SampleData):
            return None
        precision = self.trainer.precision_plugin
        with precision.forward_context():
            _, judged = look(
                self, self.data, "train", 0, device=self.device, most=LEAST, convert=precision.convert_input
            )
        return f"{judged} on training images" if judged.mediocre else None

    def _epochs(self, steps: int | None) -> int:
        """Epochs that this training will have, the last of them perhaps not whole."""
        epochs, limit = self.trainer.max_epochs, self.trainer.max_steps
        if epochs is None or epochs < 1:
            raise ValueError(f"adversarial training needs to know its length in epochs: set max_epochs, got {epochs}")
        epochs = min([epochs, *(callback.swa_end + 1 for callback in self._averaging())])
        if limit < 1 or steps is None:
            return epochs
        return min(epochs, math.ceil(limit / math.ceil(steps / self.trainer.accumulate_grad_batches)))

    def _averaging(self) -> list[StochasticWeightAveraging]:
        """What adds an epoch for the statistics of BatchNorm alone."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # Lightning declares it elsewhere
        return [callback for callback in callbacks if isinstance(callback, StochasticWeightAveraging)]

    def _check_optimizers(self) -> None:
        """Raises ValueError for an optimizer that evaluates a batch several times a step."""
        if self._running.method.keeps_sizes and any(isinstance(o, torch.optim.LBFGS) for o in self.trainer.optimizers):
            raise ValueError(
                f"LBFGS evaluates the loss of a batch several times a step, and {self.method_name} would move the "
                f"noise levels of its images each time: use another optimizer, or a method with one level for all"
            )

    @classmethod
    def mode_of(cls, monitor: str) -> str | None:
        """Whether a logged value is better when it is larger, "max", or smaller, "min"; None: not known."""
        name = monitor.rpartition("/")[2].removeprefix("robust_")
        if "loss" in name:
            return "min"
        return next((mode for start, mode in cls.better.items() if name.startswith(start)), None)

    def _check_monitors(self) -> None:
        """Raises ValueError where an epoch is to be judged under attack, and there will be none, or the wrong way."""
        watching = [*self.trainer.checkpoint_callbacks, *self.trainer.early_stopping_callbacks]
        watched = [str(getattr(callback, "monitor", None)) for callback in watching]
        for callback, monitor in zip(watching, watched, strict=True):
            mode, known = getattr(callback, "mode", None), self.mode_of(monitor)
            if known is not None and mode != known:
                raise ValueError(
                    f"{type(callback).__name__} takes the worst epoch by {monitor} for the best: its mode is {mode}, "
                    f"set {known}"
                )
        if not self.trainer.limit_val_batches and any(name.startswith("val/") for name in watched):
            say(
                "WARNING: limit_val_batches is 0: nothing is validated, so that no best checkpoint will be written and "
                "no early stopping happens, only last.ckpt"
            )
        robust = next((name for name in watched if name.startswith(ROBUST)), None)
        if robust is not None and not self.validation_steps:
            raise ValueError(
                f"{robust} is to be watched, but validation images are not attacked: set validation_steps (5, say), or "
                f"watch {robust.replace(ROBUST, 'val/')}"
            )
        if not is_adversarial(self.method_name):
            return
        if not self.validation_steps:
            say(
                f"WARNING: with validation_steps 0, nothing tells how robust an epoch is, and the best one is chosen "
                f"by clean images, which favours the least robust. Set validation_steps: {VALIDATION_STEPS}"
            )
            return
        kept = watched[: len(self.trainer.checkpoint_callbacks)]
        clean = next((name for name in kept if name.startswith("val/") and not name.startswith(ROBUST)), None)
        if clean is not None:
            say(
                f"WARNING: the best epoch of {self.method_name} is chosen by {clean}, of clean images, which favours "
                f"the least robust. Leave checkpoint.monitor out for {clean.replace('val/', ROBUST)}"
            )

    def _looking_at_warmup(self) -> list[str]:
        """A warning for each callback that would keep, or count, an epoch of the clean warm-up."""
        run = self._running
        if not run.warmup_epochs:
            return []
        package = self.command.replace("-", "_")
        return [
            f"WARNING: the {type(callback).__name__} of this Trainer also judges the {run.warmup_epochs} clean "
            f"epoch(s) of the warm-up: use {package}.{kind.__name__} in its place"
            for callback in self.trainer.callbacks  # type: ignore[attr-defined]  # Lightning declares it elsewhere
            if (kind := does_not_wait(callback)) is not None
        ]

    def on_train_start(self) -> None:
        """Gives our own schedule the length of this training, where a checkpoint has brought another; of a schedule
        of the user's it only says so."""
        if self._schedule is None:
            for config, planned in zip(self.trainer.lr_scheduler_configs, self._planned, strict=True):
                found = _numbers(config.scheduler)
                if other := [
                    f"{name} {found[name]}, not {planned[name]}" for name in found if found[name] != planned[name]
                ]:
                    say(
                        f"WARNING: {type(config.scheduler).__name__} goes on as the checkpoint has it, with "
                        f"{', '.join(other)}: where a longer training follows, its learning rate may climb again. "
                        f"Start a new training from the weights for another schedule"
                    )
            return
        schedule, steps = self._schedule
        share = (1 + math.cos(math.pi * min(1.0, schedule.last_epoch / steps))) / 2
        groups = schedule.optimizer.param_groups
        wanted = [base * share for base in schedule.base_lrs]
        there = [math.isclose(group["lr"], rate, rel_tol=1e-3) for group, rate in zip(groups, wanted, strict=True)]
        if schedule.T_max == steps and all(there):  # it is not where another schedule (decay 'late') has left it
            return
        before = f"one of {schedule.T_max}" if schedule.T_max != steps else "at another rate"
        say(f"the learning rate goes on as in a training of {steps} steps; the checkpoint's was {before}")
        schedule.T_max = steps
        for group, rate in zip(groups, wanted, strict=True):
            group["lr"] = rate
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    def on_train_epoch_start(self) -> None:
        """Ends the clean warm-up when it is over."""
        if any(self.current_epoch > callback.swa_end for callback in self._averaging()):
            self._before_statistics = copy.deepcopy(self._running.method.state_dict())
            return
        self._begin_epoch(0)

    def _begin_epoch(self, done: int) -> None:
        """For the run, with so many of its batches behind it."""
        self._begun = self.current_epoch
        for line in self._running.begin_epoch(self.current_epoch, done):
            say(line)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The method's loss."""
        run = self._running
        if self._begun != self.current_epoch and self._before_statistics is None:
            self._begin_epoch(batch_idx)  # from a checkpoint within an epoch, which Lightning does not begin again
        objective, images, ids = self.objective(batch)
        if batch_idx == 0:
            self._check_images(images)
        cast(Any, objective).loss_scale = self._loss_scale()
        take = run.step if self._before_statistics is None else run.method.step
        try:
            step = take(objective, images, names_of_samples(ids))
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise ValueError(
                    f"BatchNorm cannot train with a batch of {len(images)} image, whose last maps are one pixel: set "
                    f"data.batch_size to 2 or more for each process, or take a network without BatchNorm"
                ) from error
            raise
        self.log("train/loss", step.loss.detach(), prog_bar=True, on_step=True, on_epoch=False)
        return step.loss

    def _check_images(self, images: Tensor) -> None:
        """Raises ValueError for images that are not what the attack's bounds say."""
        bounds = self.settings.bounds
        low, high = bounds if isinstance(bounds, (tuple, list)) else (-math.inf, math.inf)
        slack = 1e-3 * (high - low) if math.isfinite(high - low) else 0.0
        found = images.min().item(), images.max().item()
        if not images.is_floating_point() or not low - slack <= found[0] <= found[1] <= high + slack:
            raise ValueError(
                f"images must be floating-point numbers between {low:g} and {high:g}, the attack's bounds; the first "
                f"batch has {str(images.dtype).removeprefix('torch.')} from {found[0]:g} to {found[1]:g}"
            )

    def _forget_statistics(self) -> None:
        """Puts back what the epoch for the statistics of BatchNorm has changed: it is no visit of any image."""
        if self._before_statistics is not None:
            self._running.method.load_state_dict(self._before_statistics)

    def _loss_scale(self) -> Tensor | None:
        """What the loss will be multiplied by against underflow in float16; None: nothing will."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def on_validation_epoch_start(self) -> None:
        """Makes the ranks' noise levels equal before a checkpoint is written, which happens after validation."""
        if self.run is not None and not self.trainer.sanity_checking:
            self._forget_statistics()
            self.run.method.merge()

    def on_train_epoch_end(self) -> None:
        """Logs what the epoch was; writes the noise levels down."""
        if self._before_statistics is not None:
            self._forget_statistics()
            self._before_statistics = None
            return
        run = self._running
        run.check_losses(_REMEDY)
        if (scale := self._loss_scale()) is not None:
            run.check_scale(float(scale), _REMEDY)
        values = run.end_epoch()
        known = {f"adv/{key}": value for key, value in values.items() if value == value}
        self.log_dict(known, sync_dist=True)
        if values["nonfinite"] > 0:
            say(
                f"WARNING: {int(values['nonfinite'])} attack step(s) were skipped because a gradient was not finite. "
                f"A few are harmless; if they persist, train with precision 32."
            )
        if isinstance(run.method, AdaptiveRadiusMethod) and (folder := self._folder()) is not None:
            run.method.store.to_csv(folder / MARGINS)

    def on_train_end(self) -> None:
        """Refuses to call a training done that has ended before its first attack; tells of one that has taught nothing.

        Raises:
            RuntimeError: in that case; its last checkpoint can be resumed.
        """
        run = self._running
        method = run.method
        if isinstance(method, AdversarialMethod) and not method.steps_done:
            raise RuntimeError(
                f"this training ended within its clean warm-up of {run.warmup_epochs} epoch(s): nothing was attacked, "
                f"and there is no best checkpoint. Go on from the last one, or lower warmup_epochs"
            )
        if self._judged is not None and self._judged.untrained:
            noise = isinstance(method, AdversarialMethod)
            say(
                f"WARNING: this training ends with {self._judged} on the validation images: the network is hardly "
                f"better than one that does not look at them. "
                + (
                    "Lower eps, as its noise leaves nothing to learn, or take a method that sees clean images, too; "
                    if noise
                    else "Look at the labels, the learning rate and the number of epochs; "
                )
                + "a best checkpoint may be of an epoch before that"
            )

    # Validation and test

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Scores a batch, clean and, with ``validation_steps``, attacked."""
        # No gradient goes back to tensors of inference mode, in which a Trainer validates if nobody forbids it.
        with torch.inference_mode(False), torch.no_grad():
            if batch_idx == 0:
                self._check_images(batch["image"])
            if batch["image"].is_inference():
                batch = {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
            self._scored.append(self._validated(batch))
            self._scored_ids += names_of_samples(batch["id"])

    def _validated(self, batch: Any) -> dict[str, Tensor]:
        images = batch["image"]
        kept = {"clean": self.scores(images, batch)}
        if self.validation_steps:
            settings = self.resolved(self.settings, images[0].numel())
            assert settings.eps is not None
            attack = PGD(self.validation_steps, 2.5, settings.p)
            objective = self.attacked_objective(batch)
            attacked = attack(objective, images, settings.eps, bounds=settings.bounds).images
            kept["attacked"] = self.scores(attacked, batch)
        return kept | self.truth(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics."""
        self._log_metrics("val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As :meth:`validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As :meth:`on_validation_epoch_end`."""
        self._log_metrics("test")

    def _log_metrics(self, split: str) -> None:
        scores = self._all_scores()
        for kind, prefix in (("clean", ""), ("attacked", "robust_")):
            if kind in scores:
                found = self.metrics(scores[kind], scores)
                self.log_dict({f"{split}/{prefix}{name}": value for name, value in found.items()}, prog_bar=True)
        if split == "test" or "clean" not in scores or self.trainer.sanity_checking:  # before the first batch
            return
        if (evidence := self.evidence_of(scores["clean"], scores)) is not None:
            self._judged = self.judge(evidence)

    def _all_scores(self) -> dict[str, Tensor]:
        """What was kept, of all batches and processes, and forgets it; empty if there was nothing.

        Lightning gives every process as many samples, some of them twice; each counts once.
        """
        if not self._scored:
            return {}
        scores = {name: torch.cat([part[name] for part in self._scored]) for name in self._scored[0]}
        ids, self._scored, self._scored_ids = self._scored_ids, [], []
        if self.trainer.world_size > 1:
            every = [sample for part in gathered(ids) for sample in part]
            first = dict(zip(reversed(every), range(len(every) - 1, -1, -1), strict=True))
            scores = {name: torch.cat(gathered(value.cpu()))[sorted(first.values())] for name, value in scores.items()}
        return scores

    # Checkpoints

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Self:
        """A trained model, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no checkpoint of this class.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        checkpoint = read_tensors(Path(path))
        found = checkpoint.get("hyper_parameters", {})
        if cls.made_of(found) is None:
            raise ValueError(f"{path} is no checkpoint of {cls.command}")
        given = {key: value for key, value in found.items() if not key.startswith("_")}
        for name, section in cls.sections.items():
            # plain values hold a list where a section has a tuple
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.pop(name).items()}
            given[name] = section(**values)
        model = cls(**given)
        model.load_state_dict(checkpoint["state_dict"])
        return model.eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Our state rides along, in plain values."""
        if self.run is not None:
            checkpoint[STATE] = self.run.state_dict() | {"images": fingerprint(self._sample_ids())}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the state for a resumed run; a checkpoint of another network is refused in one line.

        Raises:
            ValueError: in that case.
        """
        self._state = checkpoint.get(STATE)
        own, found = (self.made_of(values) for values in (self.hparams, checkpoint.get("hyper_parameters", {})))
        if found is not None and found != own:
            raise ValueError(f"the checkpoint is of {found}, and cannot be loaded into {own}")

    def _check_state(self, state: dict[str, Any], ids: Sequence[str]) -> None:
        made_by = state["method"]["method"]
        if made_by != self.method_name:
            raise ValueError(
                f"the checkpoint is of a run of {made_by}, it cannot be resumed with {self.method_name}. To start from "
                f"its weights, name it as the network's weights instead"
            )
        now = fingerprint(ids)
        if now != state["images"]:
            raise ValueError(
                f"the training images are not those of the checkpoint ({state['images']['count']} then, "
                f"{now['count']} now): restore them, or start a new training"
            )

    def _thresholds(self, state: dict[str, Any] | None, samples: int) -> Thresholds | RunningThresholds | None:
        if not method_class(self.method_name).needs_thresholds(self.objective_class):
            return None
        running = partial(self_calibrated, self.terms, self.settings, samples, self.default_rule)
        if state is not None:
            return saved_thresholds(state, self.terms, running)
        if self.settings.rule == BOUNDARY:
            fixed = at_boundary(self.objective_class)
            say(f"thresholds at the decision boundary, of no network's losses: {fixed}")
            return fixed
        path, measured = self.settings.thresholds, None
        if path == "auto":
            if self.begins_with is not None and (measured := self._of_the_beginning(self.begins_with)) is not None:
                return measured
            say("thresholds are self-calibrated: clean epochs first, then the statistics of the clean loss")
            return running()
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no thresholds file {path}")
        if Path(path).suffix == ".ckpt":
            measured = self._measured(path)
            say(f"thresholds measured on {path}: {measured} ({measured.notes['measured']}; {quality(measured)})")
            return measured
        taken, remark = load_thresholds(self.settings, path, self.terms)
        say(f"thresholds from the file {path}{remark}: {taken}")
        if taken.source_sha256 is not None and taken.notes.get("measured") != HOW:
            say(
                f"WARNING: the thresholds in {path} were not measured on {HOW}, which is what they are compared with: "
                f"make them anew by {self.command} thresholds"
            )
            return taken
        then, now = taken.notes.get(IMAGES), fingerprint(self._sample_ids())
        if then is not None and then != now:
            say(
                f"WARNING: the thresholds in {path} were measured on other images than those of this training "
                f"({then['count']} then, {now['count']} now): make them anew by {self.command} thresholds"
            )
        return taken

    def _measured(self, path: str) -> Thresholds:
        """Thresholds of a standard checkpoint, in all processes those of the first."""
        standard, rule = self.standard(path, self.data, self), self.settings.rule or self.default_rule
        measured = measure(standard, path, self.data, rule=rule, device=self.device)
        measured.require(self.terms, f"the thresholds of {path}")
        return self.trainer.strategy.broadcast(measured)

    def _of_the_beginning(self, path: str) -> Thresholds | None:
        """Thresholds of the standard network that this training begins with; None if it begins with no such one."""
        if Path(path).suffix != ".ckpt" or not Path(path).is_file():
            return None
        values = read_tensors(Path(path)).get("hyper_parameters", {})
        if self.made_of(values) is None or self.made_of(values) != self.made_of(self.hparams):
            return None
        if is_adversarial(name := values["method"]["name"]):
            say(f"no thresholds are taken from {path}, which this training begins with: it was trained by {name}")
            return None
        try:
            measured = self._measured(path)
        except ValueError as error:
            say(f"WARNING: no thresholds are taken from the network that this training begins with: {error}")
            return None
        say(
            f"thresholds measured on {path}, the standard network that this training begins with: {measured} "
            f"({measured.notes['measured']}; {quality(measured)})"
        )
        return measured

    @property
    def data(self) -> Any:
        """The data module of the training."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning's own declares none

    def _sample_ids(self) -> list[str]:
        """The ids of all training samples, from the data module."""
        return names_of_samples(self.data.train_ids)

    def _folder(self) -> Path | None:
        """The run's folder, on the first rank."""
        folder = folder_of(self.trainer)  # on all ranks, as it is agreed upon
        return Path(folder) if folder is not None and self.trainer.is_global_zero else None


def _numbers(schedule: Any) -> dict[str, Any]:
    """What a learning-rate schedule was made of, as far as it keeps it in plain values."""
    names = inspect.signature(type(schedule)).parameters
    kept = {name: vars(schedule)[name] for name in names if name in vars(schedule) and name != "last_epoch"}
    return {name: value for name, value in kept.items() if isinstance(value, (int, float, str, list, tuple))}


def folder_of(trainer: Any) -> str | None:
    """A run's folder: the logger's, or, where it has none of its own, that in which the first checkpoints' lies.

    For all processes alike, and all must ask. None for a Trainer that writes nothing.
    """
    folder: str | None = trainer.log_dir
    if isinstance(trainer.logger, (CSVLogger, TensorBoardLogger)):
        return folder
    kept = [str(found) for callback in trainer.checkpoint_callbacks if (found := getattr(callback, "dirpath", None))]
    return str(Path(kept[0]).parent) if kept else folder


def is_adversarial(method: str) -> bool:
    """Whether a method trains on attacked images."""
    return issubclass(method_class(method), AdversarialMethod)


def validation_steps_of(method: str, given: int | None) -> int:
    """Steps of the attack on validation images, 0 for none.

    Raises:
        ValueError: for a negative number.
    """
    if given is not None and given < 0:
        raise ValueError(f"validation_steps must be >= 0, got {given}")
    if given is not None:
        return given
    return VALIDATION_STEPS if is_adversarial(method) else 0


def plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists: what YAML and a checkpoint without our classes can hold."""
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def say(line: str) -> None:
    """A line for the log, once for all processes."""
    if line.startswith("WARNING: "):
        rank_zero_warn(line.removeprefix("WARNING: "))
    else:
        rank_zero_info(line)
