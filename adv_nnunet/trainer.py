"""Our trainers: nnU-Net's own, whose training step asks a method for its loss.

:class:`AdversarialTraining` is a mixin, so that it can be put before any trainer that keeps nnU-Net's loss::

    class MyTrainer(AdversarialTraining, nnUNetTrainerNoMirroring):
        method_name = "AMAT"
"""

from __future__ import annotations

import io
import math
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from adv_nnunet import calibration as standard
from adv_nnunet.loader import (
    BACKGROUND,
    CellLoader,
    PartLoader,
    SliceLoader,
    case_of,
    slice_ids,
    with_loader,
    without_measuring,
)
from adv_nnunet.objective import SampleTerms, SegmentationObjective
from adv_nnunet.scores import segmentation_counts
from adv_nnunet.settings import FILE, STATE, find_settings
from advmed.attacks.pgd import PGD
from advmed.distributed import from_first_rank, gathered
from advmed.evaluation.dice import dice_per_sample
from advmed.files import replacing, write_whole
from advmed.methods import AdaptiveRadiusMethod, AdversarialMethod, Method, method_class
from advmed.thresholds import RunningThresholds, Thresholds
from advmed.training.run import LOG_KEYS as RUN_KEYS
from advmed.training.run import MethodRun, load_thresholds, saved_thresholds, self_calibrated
from advmed.training.settings import settings_text

LOG_KEYS = (*(f"adv_{key}" for key in RUN_KEYS), "adv_robust_dice", "adv_ema_robust_dice")
"""What we add to nnU-Net's log, one value per epoch; NaN where a method has no such value."""


if TYPE_CHECKING:

    class _Host(nnUNetTrainer):
        """A mixin has the attributes of the trainer that it is put before, as type checkers must be told."""

else:
    _Host = object


class AdversarialTraining(_Host):
    """Puts a training method of :mod:`advmed.methods` into an nnU-Net trainer; to be listed before it as a base class.

    Everything but the loss stays the host's: data, augmentation, network, optimizer, schedule, gradient scaling and
    clipping, validation, logs, checkpoints, distributed training. Checkpoints name the stock trainer, so they predict
    where this package is not installed.

    Example:
        >>> from adv_nnunet import AdversarialTraining
        >>> from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
        >>> class MyTrainer(AdversarialTraining, nnUNetTrainerBN):  # for nnUNetv2_train ... -tr MyTrainer
        ...     method_name = "AMAT"
        >>> MyTrainer.train_step is AdversarialTraining.train_step  # the loss is the method's,
        True
        >>> MyTrainer.build_network_architecture is nnUNetTrainerBN.build_network_architecture  # all else the host's
        True
    """

    method_name: ClassVar[str]
    num_epochs: int
    _best_ema: float | None

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - the host's signature
    ) -> None:
        require_environment()
        dataset_folder = Path(os.environ["nnUNet_preprocessed"]) / plans["dataset_name"]
        settings, self.settings_origin = find_settings(dataset_folder)
        self._resuming = bool(plans.get("continue_training"))
        stock = stock_class(type(self))
        self.stock_name = stock.__name__
        if settings.tag:  # the host names its output folder after the class
            self.__class__ = type(f"{type(self).__name__}_{settings.tag}", (type(self),), {})
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_cascaded:
            raise RuntimeError(
                f"{type(self).__name__} does not train the second stage of a cascade ({configuration}): the first "
                f"stage's segmentation is part of the input and no image noise. Train 3d_lowres or 3d_fullres with it, "
                f"and the cascade with the stock trainer."
            )
        settings = settings.resolved(_channels(self), self.configuration_manager.patch_size)
        self.settings = settings.for_method(self.method_name)
        if self.settings.sample_id == "slice" and len(self.configuration_manager.patch_size) != 2:
            raise ValueError(f"sample_id: slice is for 2d; {configuration} is 3D, use 'case' or 'cell'")
        for ours, host in (
            ("epochs", "num_epochs"),
            ("iterations_per_epoch", "num_iterations_per_epoch"),
            ("val_iterations_per_epoch", "num_val_iterations_per_epoch"),
            ("initial_lr", "initial_lr"),
            ("save_every", "save_every"),
        ):
            if (value := getattr(self.settings, ours)) is not None:
                setattr(self, host, value)
        self.run = MethodRun("STD", self.settings, epochs=self.num_epochs)  # until on_train_start
        self.terms: SampleTerms | None = None
        self._saved_state: dict[str, Any] | None = None
        self._standard: Path | None = None  # whose weights training starts with
        self._best_robust = -math.inf
        self._robust_counts: list[Any] = []
        self._datasets: tuple[Any, Any] | None = None

    @property
    def method(self) -> Method:
        """The training method."""
        return self.run.method

    # Before training: everything that can go wrong goes wrong here.

    def initialize(self) -> None:
        """Builds network, optimizer and loss, and the per-sample form of the loss."""
        if self.settings.seed is not None:
            torch.manual_seed(self.settings.seed)
        self._choose_start()
        super().initialize()
        self.terms = SampleTerms(self.loss, self.settings.terms, self.settings.absent_classes)

    def on_train_start(self) -> None:
        """Checks output folder, data and thresholds, sets the method up, and starts as the host does."""
        self._check_output_folder()
        given = self.was_initialized and self._saved_state is None  # weights of the command line
        if not self.was_initialized:
            self.initialize()
        if self._saved_state is None:  # (--c may have found nothing)
            if self.settings.start_from not in (None, "scratch"):
                self._load_weights(str(self.settings.start_from))
            elif self._standard is not None and not given:
                self._load_weights("standard")
        if self.settings.check_data:
            self._check_data()
        self._set_up_method()
        super().on_train_start()
        if self.local_rank == 0:
            resolved = settings_text(
                self.settings,
                method=self.method_name,
                read_from=self.settings_origin,
                thresholds=getattr(self.method, "thresholds", None),
            )
            write_whole(Path(self.output_folder) / FILE, resolved)

    def _check_output_folder(self) -> None:
        checkpoints = sorted(p.name for p in Path(self.output_folder).glob("checkpoint_*.pth"))
        if checkpoints and not self._resuming and not self.settings.overwrite:
            raise FileExistsError(
                f"{self.output_folder} holds {', '.join(checkpoints)} of an earlier training. Continue it with --c, "
                f"move it away, give this run a 'tag' in the settings, or set 'overwrite: true' to lose it."
            )

    def _choose_start(self) -> None:
        """Whether the preset starts from the standard training, and for how long it then trains."""
        settings = self.settings
        if settings.preset != "fast" or not issubclass(method_class(self.method_name), AdversarialMethod):
            return
        if settings.start_from not in (None, "standard"):
            return
        self._standard = from_first_rank(standard.find_checkpoint(self))
        if self._standard is None:
            self.print_to_log_file(
                f"There is no finished standard training in {' or '.join(map(str, standard.standard_folders(self)))}: "
                f"{self.method_name} trains from scratch, {self.num_epochs} epochs. With one (the stock trainer, same "
                f"fold) a quarter of its epochs is enough."
            )
        elif settings.epochs is None:
            epochs = torch.load(self._standard, map_location="cpu", weights_only=False)["current_epoch"]
            self.num_epochs = max(1, math.ceil(epochs / _SHARE_OF_STANDARD))
            self.print_to_log_file(
                f"Preset fast: a quarter of the {epochs} epochs of the standard training, {self.num_epochs} "
                f"(another number: 'epochs')"
            )

    def _load_weights(self, source: str) -> None:
        path = standard.find_checkpoint(self) if source == "standard" else Path(source)
        if path is None or not path.is_file():
            searched = " or ".join(str(folder) for folder in standard.standard_folders(self))
            raise FileNotFoundError(
                f"'start_from: {source}' found no checkpoint: there is no "
                + (
                    f"{standard.CHECKPOINT} in {searched}. Train the fold with the stock trainer first"
                    if source == "standard"
                    else f"{path}. Name a checkpoint file"
                )
                + ", or remove 'start_from'."
            )
        weights = torch.load(path, map_location=self.device, weights_only=False)["network_weights"]
        network = _bare(self.network)
        getattr(network, "_orig_mod", network).load_state_dict(weights)
        self.print_to_log_file(f"Starting from the weights of {path}")

    def _check_data(self) -> None:
        """Stops at an image that is not finite, and says which cases have no foreground."""
        broken, empty = [], []
        if self.local_rank == 0:
            # With fold "all", a case is in both data sets.
            cases = {case: dataset for dataset in self.get_tr_and_val_datasets() for case in dataset.identifiers}
            for case, dataset in cases.items():
                image, segmentation, _, _ = dataset.load_case(case)
                if not np.isfinite(image[:]).all():
                    broken.append(case)
                labels = np.unique(segmentation[:])
                if not np.any((labels > 0) & (labels != self.label_manager.ignore_label)):
                    empty.append(case)
        broken = from_first_rank(broken)
        if broken:
            raise ValueError(
                f"{len(broken)} preprocessed case(s) hold NaN or infinite values: {', '.join(broken[:10])}. Mend the "
                f"raw images and preprocess them again (nnUNetv2_plan_and_preprocess), or take the cases out of "
                f"splits_final.json."
            )
        if empty:
            self.print_to_log_file(
                f"{len(empty)} case(s) have no foreground: {', '.join(empty[:10])}. They are trained on as the stock "
                f"trainer does; check their labels if this is not meant."
            )

    def _set_up_method(self) -> None:
        settings, state = self.settings, self._saved_state
        thresholds = None
        if method_class(self.method_name, SegmentationObjective).needs_thresholds(SegmentationObjective):
            thresholds = self._thresholds_of(state) if state else self._resolve_thresholds()
            if state is None and isinstance(thresholds, Thresholds):
                origin = thresholds.source or "the thresholds"
                if (doubt := standard.doubts(thresholds, origin, settings.check_standard)) is not None:
                    self.print_to_log_file(doubt)
        self.run = MethodRun(
            self.method_name,
            settings,
            thresholds,
            epochs=self.num_epochs,
            steps_per_epoch=self.num_iterations_per_epoch,
            say=self.print_to_log_file,
            shown=lambda sample: not sample.endswith(BACKGROUND),
        )
        if state is not None:
            self._load_method(state)
        self._announce()

    def _resolve_thresholds(self) -> Thresholds | RunningThresholds:
        """From a file, from a finished standard training, or by self-calibration; and says which."""
        assert self.terms is not None
        settings = self.settings
        if settings.thresholds != "auto":
            return self._load_thresholds(Path(settings.thresholds))
        # The first rank looks for all: another could look later, and find what the first has just written.
        path, checkpoint = from_first_rank((standard.find_file(self), standard.find_checkpoint(self)))
        if path is not None:
            found = self._load_thresholds(path, " (found beside the standard training)")
            if standard.is_outdated(found, path):
                self.print_to_log_file(
                    f"WARNING: {path} was made of another checkpoint than the {standard.CHECKPOINT} beside it. Delete "
                    f"the file to have it made anew."
                )
            return found
        if checkpoint is not None:
            measured = None
            if self.local_rank == 0:
                self.print_to_log_file(f"Thresholds are measured on the standard training {checkpoint} ...")
                measured = standard.measure(self, checkpoint)
                measured.save(checkpoint.parent / standard.FILE)
                self.print_to_log_file(
                    f"... {measured}; mean Dice of that network on clean training samples "
                    f"{measured.notes['training_dice']}; written to {checkpoint.parent / standard.FILE}"
                )
            return from_first_rank(measured)
        if settings.warmup_epochs == 0:
            searched = " or ".join(str(folder) for folder in standard.standard_folders(self))
            raise ValueError(
                f"{self.method_name} has no thresholds. There is no {standard.FILE} and no finished standard training "
                f"({standard.CHECKPOINT}) in {searched}, and 'warmup_epochs: 0' rules out self-calibration. Train the "
                f"fold with the stock trainer first, name a file with 'thresholds: PATH' in the settings, or remove "
                f"'warmup_epochs'."
            )
        self.print_to_log_file(
            "Thresholds are self-calibrated: a clean warm-up first, then the statistics of the clean training loss."
        )
        return self._self_calibrated()

    def _load_thresholds(self, path: Path, remark: str = "") -> Thresholds:
        assert self.terms is not None
        taken, changed = load_thresholds(self.settings, str(path), self.terms.names)
        self.print_to_log_file(f"Thresholds from the file {path}{remark}{changed}: {taken}")
        return taken

    def _self_calibrated(self) -> RunningThresholds:
        assert self.terms is not None
        return self_calibrated(self.terms.names, self.settings, self._samples_per_epoch())

    def _announce(self) -> None:
        self.print_to_log_file(
            f"Adversarial training: {self.method_name}, settings from {self.settings_origin}; "
            f"{self.run.warmup_epochs} epoch(s) of clean warm-up"
        )
        samples = self.sample_ids() if method_class(self.method_name).keeps_sizes else None
        if samples is not None:
            what = f"samples ({self.settings.sample_id})"
            for line in self.run.outlook(len(samples), self._samples_per_epoch(), what):
                self.print_to_log_file(line)

    # Data

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """The host's data sets; split once, because we look at them more often than the host does."""
        if self._datasets is None:
            self._datasets = super().get_tr_and_val_datasets()
        return self._datasets

    def get_dataloaders(self) -> Any:
        """The host's loaders, which also say what they cut where ids need it, and are seeded if the settings say so."""
        own, loader, seed = super().get_dataloaders, None, self.settings.seed
        if method_class(self.method_name).keeps_sizes and self.settings.sample_id != "case":
            loader = {"slice": SliceLoader, "part": PartLoader, "cell": CellLoader}[self.settings.sample_id]
        if loader is None and seed is None:
            return own()
        if seed is not None:  # other batches on other ranks, and after a resumption
            seed += 10_000 * self.current_epoch + 1_000 * self.local_rank
        return with_loader(own, loader, seed)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> Any:
        """The host's; with a seed, the same in every run."""
        made = super().get_training_transforms(*args, **kwargs)
        return made if self.settings.seed is None else without_measuring(made)

    def sample_ids(self) -> list[str] | None:
        """Every id a training sample can have; None where they are not countable (``cell``)."""
        if self.settings.sample_id == "cell":
            return None
        training, _ = self.get_tr_and_val_datasets()
        if self.settings.sample_id == "case":
            return list(training.identifiers)
        if self.settings.sample_id == "part":
            return [f"{case}:{part}" for case in training.identifiers for part in ("foreground", "background")]
        return slice_ids((case, training.load_case(case)[0].shape[1]) for case in training.identifiers)

    def _samples_per_epoch(self) -> int:
        return int(self.configuration_manager.batch_size * self.num_iterations_per_epoch)

    def to_device(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | list[Tensor]]:
        """Images and targets of a batch on the device."""
        images, target = batch["data"].to(self.device, non_blocking=True), batch["target"]
        if isinstance(target, list):
            return images, [t.to(self.device, non_blocking=True) for t in target]
        return images, target.to(self.device, non_blocking=True)

    # Training

    def _do_i_compile(self) -> bool:
        if self.settings.compile:
            return bool(super()._do_i_compile())
        return False

    def autocast(self) -> AbstractContextManager[object]:
        """The host's precision: float16 autocast on CUDA, none elsewhere."""
        return torch.autocast("cuda", enabled=True) if self.device.type == "cuda" else nullcontext()

    def _attack_precision(self) -> AbstractContextManager[object]:
        if self.settings.attack_precision == "float32":
            return torch.autocast(self.device.type, enabled=False)
        if self.settings.attack_precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def on_train_epoch_start(self) -> None:
        """Ends the warm-up when it is over."""
        super().on_train_epoch_start()
        for line in self.run.begin_epoch(self.current_epoch):
            self.print_to_log_file(line)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The host's training step with the method's loss."""
        images, target = self.to_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        assert self.terms is not None
        objective = SegmentationObjective(
            self.network, _bare(self.network), self.loss, self.terms, target, self._attack_precision
        )
        # A shared first gradient needs the clean pass's own backward pass: with the host's scaler, and through its
        # distributed wrapper, which knows no other.
        shares = getattr(self.method, "clean_gradients", None) is not None and not self.run.warming_up
        scaled = self._backward if shares or self.settings.backward == "sequential" else None
        with self.autocast():
            step = self.run.step(objective, images, batch.get("ids", batch["keys"]), scaled)
        if scaled is None:
            self._backward(step.loss)

        # From here on as in nnUNetTrainer.train_step.
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()
        return {"loss": step.loss.detach().cpu().numpy()}

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Makes the ranks' margins equal, and adds our values to the host's log."""
        super().on_train_epoch_end(train_outputs)
        losses = [float(output["loss"]) for output in train_outputs]
        if not np.isfinite(losses).any():
            raise FloatingPointError(
                f"the training loss was not finite in any step of epoch {self.current_epoch}. The checkpoints on disk "
                f"are of earlier epochs. Check the images, lower 'initial_lr', or set 'attack_precision: float32'."
            )
        values = {f"adv_{key}": value for key, value in self.run.end_epoch().items()}
        _open_log(self.logger, self.current_epoch)
        for key in values:
            self.logger.log(key, values[key], self.current_epoch)
        shown = {key.removeprefix("adv_"): value for key, value in values.items() if not math.isnan(value)}
        self.print_to_log_file(self.method_name, ", ".join(f"{key} {value:.4g}" for key, value in shown.items()))
        if values["adv_nonfinite"] > 0:
            self.print_to_log_file(
                f"{int(values['adv_nonfinite'])} attack step(s) were skipped because a gradient was not finite. A few "
                f"are harmless; if they persist, set 'attack_precision: float32' in the settings."
            )

    # Validation, and which epoch is the best

    @property
    def robust_val_iterations(self) -> int:
        """How many validation batches of an epoch are attacked."""
        if not isinstance(self.method, AdversarialMethod) or self.run.warming_up:
            return 0
        number = self.settings.robust_val_iterations
        return max(1, self.num_val_iterations_per_epoch // 10) if number is None else number

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The host's validation step; of the first batches also the Dice under a short attack."""
        if len(self._robust_counts) < self.robust_val_iterations:
            self._robust_counts.append(self._attacked_counts(batch))
        return dict(super().validation_step(batch))

    def _attacked_counts(self, batch: dict[str, Any]) -> Any:
        """TP, FP and FN of a batch under attack at ``eps``, summed over its samples, (3, classes)."""
        images, target = self.to_device(batch)
        target = target.clone() if isinstance(target, Tensor) else [t.clone() for t in target]  # the host writes there
        assert self.terms is not None
        assert self.settings.eps is not None
        network = _bare(self.network)
        objective = SegmentationObjective(network, network, self.loss, self.terms, target, self._attack_precision)
        attack = PGD(_ROBUST_STEPS, 2.3, self.settings.p, schedule="decreasing")
        with self.autocast():
            images = attack(objective, images, self.settings.eps, bounds=self.settings.bounds, final_pass=False).images
            with torch.no_grad():
                output = network(images)
        full = output if isinstance(output, Tensor) else output[0]
        true = target if isinstance(target, Tensor) else target[0]
        counts = segmentation_counts(self.label_manager, full, true)
        return np.stack([np.asarray(part.sum(0).cpu(), dtype=float) for part in counts])

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """The host's, and the robust Dice with its moving average, as the host's pseudo Dice has one."""
        super().on_validation_epoch_end(val_outputs)
        robust = average = math.nan
        counts, self._robust_counts = self._robust_counts, []
        if self.is_ddp:
            counts = [count for part in gathered(counts) for count in part]
        if counts:
            true, false, missed = np.sum(counts, 0)
            size = 2 * true + false + missed
            robust = float(np.nanmean(np.where(size > 0, 2 * true / np.maximum(size, 1), math.nan)))
            known = [value for value in self._logged("adv_ema_robust_dice") if not math.isnan(value)]
            average = 0.9 * known[-1] + 0.1 * robust if known else robust
            self.print_to_log_file(f"Pseudo dice at noise level {self.settings.eps:g}: {robust:.4f}")
        for key, value in (("adv_robust_dice", robust), ("adv_ema_robust_dice", average)):
            self.logger.log(key, value, self.current_epoch)

    def _logged(self, key: str) -> list[float]:
        return list(self.logger.local_logger.my_fantastic_logging.get(key, []))

    def on_epoch_end(self) -> None:
        """As the host; but the best epoch is that of the best robust Dice, and never one of the clean warm-up."""
        if not isinstance(self.method, AdversarialMethod):
            super().on_epoch_end()
            return
        key = "adv_ema_robust_dice" if self.robust_val_iterations else "ema_fg_dice"
        score = self._logged(key)[-1]
        if not self.run.warming_up and score > self._best_robust:
            self._best_robust = score
            self.print_to_log_file(f"New best EMA {'robust' if key.startswith('adv') else 'pseudo'} Dice: {score:.4f}")
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_best.pth"))
        clean = [self._best_ema, self.logger.get_value("ema_fg_dice", step=-1)]
        self._best_ema = math.inf  # no epoch is better: the host saves no best one by itself
        super().on_epoch_end()
        self._best_ema = max(value for value in clean if value is not None)

    # Checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """The host's checkpoint, with our state added and the stock trainer's name; replaced in one go."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        buffer = io.BytesIO()
        super().save_checkpoint(buffer)
        buffer.seek(0)
        checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)
        # Prediction looks the class up by this name; ours may not be installed there, and the network is the same.
        checkpoint["trainer_name"] = self.stock_name
        if checkpoint["_best_ema"] == math.inf:  # on_epoch_end is at work
            checkpoint["_best_ema"] = max(self._logged("ema_fg_dice"))
        own = {"epochs": self.num_epochs, "best_robust": self._best_robust}
        checkpoint[STATE] = self.run.state_dict() | {"nnunet": own}
        with replacing(filename) as temporary:
            torch.save(checkpoint, temporary)
        if isinstance(self.method, AdaptiveRadiusMethod):
            self.method.store.to_csv(Path(self.output_folder) / "margins.csv")

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """The host's checkpoint, and our state in it."""
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint = torch.load(filename_or_checkpoint, map_location="cpu", weights_only=False)
        self._saved_state = checkpoint.get(STATE)
        if self._saved_state is None and self._resuming:
            raise ValueError(
                f"{filename_or_checkpoint} is not a checkpoint of {type(self).__name__}: it holds no margins or "
                f"counters. To start from its weights, train without --c and with -pretrained_weights "
                f"{filename_or_checkpoint}."
            )
        if self._saved_state is not None and self.settings.epochs is None:
            self.num_epochs = self._saved_state["nnunet"]["epochs"]  # whatever became of the standard training
            if hasattr(self.lr_scheduler, "max_steps"):
                self.lr_scheduler.max_steps = self.num_epochs
        if self._saved_state is not None:
            self._best_robust = self._saved_state["nnunet"]["best_robust"]

    def _thresholds_of(self, state: dict[str, Any]) -> Thresholds | RunningThresholds:
        assert self.terms is not None
        saved = saved_thresholds(state, self.terms.names, self._self_calibrated)
        if isinstance(saved, Thresholds):
            self.print_to_log_file(f"Thresholds from the checkpoint: {saved}")
        return saved

    def _load_method(self, state: dict[str, Any]) -> None:
        for line in self.run.load_state_dict(state):
            self.print_to_log_file(line)
        if isinstance(self.method, AdaptiveRadiusMethod):
            training, _ = self.get_tr_and_val_datasets()
            cases = set(training.identifiers)
            known = (sample for sample in self.method.store.ids() if case_of(sample) in cases)
            self.method.store.require_known(
                self.sample_ids() or known,
                "The checkpoint was trained on other samples (another data set, fold, splits_final.json or sample_id): "
                "restore them, or start a new training without --c.",
            )

    def hard_dice(self, outputs: Tensor | list[Tensor], targets: Tensor | list[Tensor]) -> float:
        """Mean Dice of the predictions of a batch at full resolution, over samples and classes that occur."""
        output = outputs if isinstance(outputs, Tensor) else outputs[0]
        target = targets if isinstance(targets, Tensor) else targets[0]
        counts = segmentation_counts(self.label_manager, output, target)
        return float(torch.as_tensor(dice_per_sample(counts)).nanmean())


class nnUNetTrainerSTD(AdversarialTraining, nnUNetTrainer):
    """Standard training, as nnUNetTrainer does it, with the schedule of the settings: the baseline of a comparison.

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerSTD``, with ``epochs: 50`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerSTD
        >>> type(Settings(epochs=50).make_method(nnUNetTrainerSTD.method_name)).__name__
        'STD'
    """

    method_name = "STD"


class nnUNetTrainerAT(AdversarialTraining, nnUNetTrainer):
    """Adversarial training (Madry et al. 2018): only attacked images, one noise level.

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerAT``, with ``eps: 5`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerAT
        >>> Settings(eps=5).make_method(nnUNetTrainerAT.method_name).eps
        5.0
    """

    method_name = "AT"


class nnUNetTrainerSAT(AdversarialTraining, nnUNetTrainer):
    """Standard adversarial training: clean and attacked images, one noise level (arXiv 2206.01736, eq. 1).

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerSAT``, with ``eps: 5`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerSAT
        >>> Settings(eps=5).make_method(nnUNetTrainerSAT.method_name).eps
        5.0
    """

    method_name = "SAT"


class nnUNetTrainerAMAT(AdversarialTraining, nnUNetTrainer):
    """Adaptive-margin adversarial training: a noise level for every sample (arXiv 2206.01736, Algorithm 1).

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerAMAT``, with ``delta: 0.5`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerAMAT
        >>> from advmed import Thresholds
        >>> method = Settings(delta=0.5).make_method(nnUNetTrainerAMAT.method_name, Thresholds((-0.7,), ("ce+dice",)))
        >>> method.margins.get(["hippocampus_001"])  # the noise level of a sample that was never met
        tensor([0.5000])
    """

    method_name = "AMAT"


class nnUNetTrainerTRADES(AdversarialTraining, nnUNetTrainer):
    """TRADES (Zhang et al. 2019): predictions on attacked images are drawn to those on clean ones.

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerTRADES``, with ``eps: 5`` and ``beta: 1`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerTRADES
        >>> Settings(eps=5, beta=1).make_method(nnUNetTrainerTRADES.method_name).beta
        1.0
    """

    method_name = "TRADES"


class nnUNetTrainerDPAAT(AdversarialTraining, nnUNetTrainer):
    """Dynamic perturbation-adaptive adversarial training: a noise level for every sample (arXiv 2403.06798).

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerDPAAT``, with ``eps: 5`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerDPAAT
        >>> method = Settings(eps=5).make_method(nnUNetTrainerDPAAT.method_name)
        >>> method.sizes.get(["hippocampus_001"]), method.step_size  # its first size, and how far it moves
        (tensor([5.]), 0.5)
    """

    method_name = "DPAAT"


class nnUNetTrainerMART(AdversarialTraining, nnUNetTrainer):
    """MART (Wang et al. 2020), voxel by voxel: attacks count more where the clean prediction is unsure.

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerMART``, with ``eps: 5`` and ``kl_weight: 6`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerMART
        >>> Settings(eps=5, kl_weight=6).make_method(nnUNetTrainerMART.method_name).kl_weight
        6.0
    """

    method_name = "MART"


class nnUNetTrainerFAT(AdversarialTraining, nnUNetTrainer):
    """Friendly adversarial training (Zhang et al. 2020): a sample's attack ends soon after it has succeeded.

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerFAT``, with ``eps: 5`` and ``tau: 2`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerFAT
        >>> Settings(eps=5, tau=2).make_method(nnUNetTrainerFAT.method_name).tau
        2
    """

    method_name = "FAT"


_SHARE_OF_STANDARD = 4
"""Epochs of a standard training for each epoch of the preset "fast" that starts from it."""
_ROBUST_STEPS = 5
"""Of the attack on validation batches."""


def stock_class(kind: type) -> type:
    """The stock trainer that a class of ours derives from: the first base that lives in nnunetv2."""
    return next(base for base in kind.__mro__ if base.__module__.startswith("nnunetv2."))


def _bare(network: torch.nn.Module) -> torch.nn.Module:
    """The network without DistributedDataParallel, compiled or not."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def _channels(trainer: Any) -> int:
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    return int(determine_num_input_channels(trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json))


def _open_log(logger: Any, epoch: int) -> None:
    """Gives the host's log our keys; epochs before ours began (a stock checkpoint continued) are NaN."""
    lists = logger.local_logger.my_fantastic_logging
    for key in LOG_KEYS:
        lists.setdefault(key, [float("nan")] * epoch)


def require_environment(raw: bool = True) -> None:
    """Raises RuntimeError if a variable that nnU-Net needs is not set.

    Args:
        raw: whether nnUNet_raw and nnUNet_preprocessed and nnUNet_results are needed, or only the last two.
    """
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")[0 if raw else 1 :]
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise RuntimeError(
            f"nnU-Net does not know where its data is: the environment variable(s) {', '.join(missing)} are not set. "
            f"Set them to folders (export NAME=FOLDER), as nnU-Net's installation asks."
        )


TRAINERS = {kind.method_name: kind for kind in AdversarialTraining.__subclasses__()}
"""The trainers by the names of their methods."""

__all__ = ["AdversarialTraining", *(kind.__name__ for kind in TRAINERS.values())]
