"""A LightningModule whose loss is asked of a training method."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import yaml
from torch import Tensor

from advmed.attacks import PGD
from advmed.distributed import gathered
from advmed.integrations.lightning.calibration import measure
from advmed.integrations.lightning.weights import read_tensors
from advmed.methods import AdaptiveRadiusMethod, AttackSettings, EveryMethodSettings, method_class
from advmed.objective import Objective
from advmed.thresholds import DEFAULT_RULE, RunningThresholds, Thresholds
from advmed.training.run import MethodRun, fingerprint, load_thresholds, saved_thresholds, self_calibrated
from advmed.training.settings import RunSettings, TrainingSettings
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

STATE = "advmed"
"""Key of our state in a checkpoint; plain values."""
FILE = "adversarial.yaml"
"""The resolved settings, in the run's folder."""
MARGINS = "margins.csv"


@dataclass(frozen=True, kw_only=True)
class MethodOptions(EveryMethodSettings, RunSettings):
    """The training method and its numbers.

    Attributes:
        name: one of :data:`advmed.methods.METHODS`, such as AMAT.

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
            none. A Trainer of your own needs inference_mode=False for it.
    """

    command: ClassVar[str]
    """The command whose checkpoints these are."""
    objective_class: ClassVar[type]
    """The class of its objectives."""
    sections: ClassVar[Mapping[str, type]]
    """The arguments that are dataclasses, by name."""
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
        validation_steps: int = 0,
    ) -> None:
        super().__init__()
        self.lr, self.weight_decay, self.validation_steps = lr, weight_decay, validation_steps
        method_class(method.name, self.objective_class)
        self.method_name, self.settings = method.name, method.with_attack(attack)
        self.terms, self.default_rule = tuple(terms), default_rule
        if self.settings.backward != "together":
            raise ValueError(
                "backward 'sequential' is not to be had with Lightning, which back-propagates one loss a step; use "
                "'together', and accumulate_grad_batches against a lack of memory"
            )
        self.run = None
        self._state: dict[str, Any] | None = None
        self._scored: list[dict[str, Tensor]] = []

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

    def attacked_objective(self, batch: Any) -> Objective:
        """What validation images are attacked by."""
        return self.objective(batch)[0]

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine schedule; a configuration may name others."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):  # max_epochs -1, which on_fit_start refuses in words
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # The run

    def on_fit_start(self) -> None:
        """Sets the method up: whatever is wrong with the settings is said before the first step."""
        self.settings = self.resolved(self.settings, self.data.dataset("train")[0]["image"].numel())
        ids = self._sample_ids()
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError(f"adversarial training needs to know its length in epochs: set max_epochs, got {epochs}")
        state = self._state
        if state is not None:
            self._check_state(state, ids)
        self.run = MethodRun(self.method_name, self.settings, self._thresholds(state, len(ids)), epochs=epochs)
        lines = [] if state is None else self.run.load_state_dict(state)
        for line in [*lines, *self.run.outlook(len(ids), len(ids), "images")]:
            say(line)
        if (folder := self._folder()) is not None:
            notes = f"# method: {self.method_name}\n# thresholds: {self.run.thresholds}\n"
            folder.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(plain(asdict(self.settings)), sort_keys=False)
            (folder / FILE).write_text(notes + text, encoding="utf-8")

    def on_train_epoch_start(self) -> None:
        """Ends the clean warm-up when it is over."""
        assert self.run is not None
        for line in self.run.begin_epoch(self.current_epoch):
            say(line)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The method's loss."""
        assert self.run is not None
        objective, images, ids = self.objective(batch)
        step = self.run.step(objective, images, ids)
        self.log("train/loss", step.loss.detach(), prog_bar=True, on_step=True, on_epoch=False)
        return step.loss

    def on_validation_epoch_start(self) -> None:
        """Makes the ranks' noise levels equal before a checkpoint is written, which happens after validation."""
        if self.run is not None and not self.trainer.sanity_checking:
            self.run.method.merge()

    def on_train_epoch_end(self) -> None:
        """Logs what the epoch was; writes the noise levels down."""
        assert self.run is not None
        values = self.run.end_epoch()
        known = {f"adv/{key}": value for key, value in values.items() if value == value}
        self.log_dict(known, sync_dist=True)
        if values["nonfinite"] > 0:
            say(
                f"WARNING: {int(values['nonfinite'])} attack step(s) were skipped because a gradient was not finite. "
                f"A few are harmless; if they persist, train with precision 32."
            )
        if isinstance(self.run.method, AdaptiveRadiusMethod) and (folder := self._folder()) is not None:
            self.run.method.store.to_csv(folder / MARGINS)

    # Validation and test

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Scores a batch, clean and, with ``validation_steps``, attacked."""
        images = batch["image"]
        kept = {"clean": self.scores(images, batch)}
        if self.validation_steps:
            settings = self.resolved(self.settings, images[0].numel())
            assert settings.eps is not None
            attack = PGD(self.validation_steps, 2.5, settings.p)
            objective = self.attacked_objective(batch)
            attacked = attack(objective, images, settings.eps, bounds=settings.bounds).images
            kept["attacked"] = self.scores(attacked, batch)
        self._scored.append(kept | self.truth(batch))

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

    def _all_scores(self) -> dict[str, Tensor]:
        """What was kept, of all batches and processes, and forgets it; empty if there was nothing."""
        if not self._scored:
            return {}
        scores = {name: torch.cat([part[name] for part in self._scored]) for name in self._scored[0]}
        self._scored = []
        if self.trainer.world_size > 1:
            scores = {name: torch.cat(gathered(value.cpu())) for name, value in scores.items()}
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
        path = self.settings.thresholds
        if path == "auto":
            say("thresholds are self-calibrated: clean epochs first, then the statistics of the clean loss")
            return running()
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no thresholds file {path}")
        if Path(path).suffix == ".ckpt":
            standard, rule = self.standard(path, self.data, self), self.settings.rule or self.default_rule
            measured = measure(standard, path, self.data, rule=rule, device=self.device)
            measured.require(self.terms, f"the thresholds of {path}")
            say(f"thresholds measured on {path}: {measured}")
            return measured
        taken, remark = load_thresholds(self.settings, path, self.terms)
        say(f"thresholds from the file {path}{remark}: {taken}")
        return taken

    @property
    def data(self) -> Any:
        """The data module of the training."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning's own declares none

    def _sample_ids(self) -> list[str]:
        """The ids of all training samples, from the data module."""
        return list(self.data.train_ids)

    def _folder(self) -> Path | None:
        """The run's folder, on the first rank."""
        folder = self.trainer.log_dir  # on all ranks, as it is agreed upon
        return Path(folder) if folder is not None and self.trainer.is_global_zero else None


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
