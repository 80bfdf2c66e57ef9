"""Our trainers: nnU-Net's own, whose training step asks a method for its loss.

:class:`AdversarialTraining` is a mixin, so that it can be put before any trainer that keeps nnU-Net's loss::

    class MyTrainer(AdversarialTraining, nnUNetTrainerNoMirroring):
        method_name = "AMAT"
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from adv_nnunet import calibration as standard
from adv_nnunet import host
from adv_nnunet.checkpoints import CHECKPOINTS, TABLE, read_checkpoint, with_names, without_names
from adv_nnunet.data import check_cases
from adv_nnunet.loader import (
    BACKGROUND,
    CellLoader,
    PartLoader,
    SliceLoader,
    case_of,
    drawn_slices,
    has_foreground,
    slice_ids,
    with_loader,
    without_measuring,
)
from adv_nnunet.objective import SampleTerms, SegmentationObjective, check_terms
from adv_nnunet.picture import add_panels
from adv_nnunet.scores import segmentation_counts
from adv_nnunet.settings import FILE, STATE, find_settings
from advmed.attacks.pgd import PGD
from advmed.distributed import from_first_rank, gathered, patient
from advmed.evaluation.dice import dice_per_sample
from advmed.files import replacing, write_whole
from advmed.methods import AdaptiveRadiusMethod, AdversarialMethod, Method, method_class
from advmed.thresholds import BOUNDARY, RunningThresholds, Thresholds, at_boundary
from advmed.training.rate import LateDecay
from advmed.training.run import LOG_KEYS as RUN_KEYS
from advmed.training.run import MethodRun, ingredients_of, saved_thresholds, self_calibrated, without_use
from advmed.training.settings import settings_text
from advmed.versions import tell_if_newer

_REMEDY = "Check the images, or lower 'initial_lr'."
_OF_VALIDATION = ("adv_robust_dice", "adv_ema_robust_dice")
LOG_KEYS = (*(f"adv_{key}" for key in RUN_KEYS), *_OF_VALIDATION)
"""What we add to nnU-Net's log, one value per epoch; NaN where a method has no such value."""


if TYPE_CHECKING:

    class _Host(nnUNetTrainer):
        """A mixin has the attributes of the trainer that it is put before, as type checkers must be told."""

else:
    _Host = object


class AdversarialTraining(_Host):
    """Puts a training method (:data:`advmed.METHODS`) into an nnU-Net trainer; to be listed before it as a base class.

    Everything but the loss stays the host's: data, augmentation, network, optimizer, schedule, gradient scaling and
    clipping, validation, logs, checkpoints, distributed training. Checkpoints name the trainer that builds the same
    network, a stock one as a rule, so they predict where this package is not installed.

    A subclass gives ``method_name``. The settings are found by the name of the data set (:class:`Settings`); the
    arguments are the host's, which makes the trainer.

    Args:
        plans: the host's plans.
        configuration: of the plans, such as "2d".
        fold: of the data set.
        dataset_json: the data set's description.
        device: that the network is trained on.

    Raises:
        RuntimeError: for the second stage of a cascade, or without the host's folders in the environment.
        TypeError: for a base with a training step of its own, whose place the method's would take.
        ValueError: for a setting that is unknown, out of range, or not meant for this configuration.
        FileNotFoundError: for settings or weights that are named and are not there.

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
        host.require_environment("nnUNet_preprocessed", "nnUNet_results")
        dataset_folder = Path(os.environ["nnUNet_preprocessed"]) / plans["dataset_name"]
        settings, self.settings_origin = find_settings(dataset_folder)
        self._resuming = bool(plans.get("continue_training"))
        named = host.standard_class(type(self), AdversarialTraining)
        self.stock_name = named.__name__
        self._prediction_works = named is type(self) or host.is_found(named)
        self.standard_names = [] if named is type(self) else [named.__name__]
        if host.owner_of(type(self), "build_network_architecture") is nnUNetTrainer:
            self.standard_names.append(nnUNetTrainerSTD.__name__)
        self.samples_made_by = host.owners_of(type(self), host.MAKERS_OF_SAMPLES, AdversarialTraining)
        self.loss_made_by = host.owners_of(type(self), host.MAKERS_OF_LOSS, AdversarialTraining)
        self._steps_as_its_base = self._leaves_its_step()
        if settings.tag:  # the host names its output folder after the class
            self.__class__ = type(f"{type(self).__name__}_{settings.tag}", (type(self),), {})
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_cascaded:
            raise RuntimeError(
                f"{type(self).__name__} does not train the second stage of a cascade ({configuration}): the first "
                f"stage's segmentation is part of the input and no image noise. Train 3d_fullres or 3d_lowres with it, "
                f"alone; a cascade takes its first stage from a 3d_lowres training of the same trainer, so train both "
                f"of its stages with the stock one."
            )
        self._unused = without_use(self.method_name, settings)
        settings = settings.resolved(host.channels(self), self.configuration_manager.patch_size)
        self.settings = settings.for_method(self.method_name)
        if self.settings.sample_id == "slice" and len(self.configuration_manager.patch_size) != 2:
            raise ValueError(f"sample_id: slice is for 2d; {configuration} is 3D, use 'case' or 'cell'")
        for ours, theirs in (
            ("epochs", "num_epochs"),
            ("iterations_per_epoch", "num_iterations_per_epoch"),
            ("val_iterations_per_epoch", "num_val_iterations_per_epoch"),
            ("initial_lr", "initial_lr"),
            ("save_every", "save_every"),
        ):
            if (value := getattr(self.settings, ours)) is not None:
                setattr(self, theirs, value)
        self.run = MethodRun("STD", self.settings, epochs=self.num_epochs)  # until on_train_start
        self.terms: SampleTerms | None = None
        self._saved_state: dict[str, Any] | None = None
        self._standard: Path | None = None  # whose weights training starts with
        self._iteration = 0
        self._ended = False
        self._best_robust = -math.inf
        self._robust_counts: list[Any] = []
        self._datasets: tuple[Any, Any] | None = None

    @property
    def method(self) -> Method:
        """The training method."""
        return self.run.method

    @property
    def _attacks(self) -> bool:
        """Whether it is no standard training."""
        return issubclass(method_class(self.method_name), AdversarialMethod)

    # Before training: everything that can go wrong goes wrong here.

    def _leaves_its_step(self) -> bool:
        """Whether standard training is the training step of a base that has one of its own.

        Raises:
            TypeError: for a method whose step would take the place of that one, and of all that it does differently.
        """
        base = host.class_below(type(self), AdversarialTraining, "train_step")
        if base is nnUNetTrainer:
            return False
        if self._attacks and type(self).train_step is AdversarialTraining.train_step:
            raise TypeError(
                f"{base.__name__} has a training step of its own (other clipping or precision, for example), which "
                f"{self.method_name} would take the place of. Define train_step in {type(self).__name__}, after "
                f"AdversarialTraining.train_step and with what {base.__name__} does differently; or train with a base "
                f"that keeps nnUNetTrainer's."
            )
        return not self._attacks

    def initialize(self) -> None:
        """Builds network, optimizer and loss, and the per-sample form of the loss."""
        if self.settings.seed is not None:
            torch.manual_seed(self.settings.seed)
        self.oversampling = self.oversample_foreground_percent  # of a whole batch, before ranks have their parts
        super().initialize()
        self.terms = SampleTerms(self.loss, self.settings.terms, self.settings.absent_classes)
        check_terms(self.loss, self.label_manager, len(self.configuration_manager.patch_size), self.device)
        self._tell_about_the_host()

    def configure_optimizers(self, *given: Any, **named: Any) -> Any:
        """The host's, with another schedule where the settings have one.

        Raises:
            ValueError: for such a setting beside a base whose rate warms up (nnUNetTrainer_warmup tells a stage).
        """
        optimizer, schedule = super().configure_optimizers(*given, **named)
        if self.settings.decay == "late":
            if given or named or getattr(self, "training_stage", None) is not None:
                raise ValueError(
                    f"'decay: late' would take the place of the warm-up that {type(self).__name__} has for its "
                    f"learning rate: leave 'decay' at 'host', or take another base"
                )
            schedule = LateDecay(optimizer, lambda: float(self.num_epochs))
        return optimizer, schedule

    def _tell_about_the_host(self) -> None:
        """What is not as a user of the host expects it, or not as it was when this was written."""
        tell_if_newer(host.PACKAGES, lambda line: self.print_to_log_file(f"WARNING: {line}"))
        for line in self._unused:
            self.print_to_log_file(line)
        if self._host_compiles() != self._do_i_compile():
            self.print_to_log_file(
                f"{self.method_name} is trained without torch.compile, where nnU-Net compiles by default, because its "
                f"attack and its training are compiled apart. To compile set 'compile: true' or "
                f"{host.COMPILE}=true; for times that can be compared, the same for all trainers."
                if self.settings.compile is None
                else f"'compile: false' goes before nnU-Net's own choice ({host.COMPILE})"
            )
        elif self.settings.compile and not self._do_i_compile():
            self.print_to_log_file(
                f"'compile: true' does nothing: nnU-Net does not compile on this device, or not with "
                f"{host.COMPILE}={os.environ.get(host.COMPILE, '')}"
            )
        if not self._prediction_works:
            self.print_to_log_file(
                f"WARNING: nnUNetv2_predict will not find {self.stock_name}, whose network this is and which the "
                f"checkpoints name. Put its file into a folder that nnUNet_extTrainer names."
            )
        if host.fingerprint_of_step() not in (None, host.READ_STEP) and not self._steps_as_its_base:
            self.print_to_log_file(
                "WARNING: this release of nnU-Net has another training step than the one that ours was written after. "
                "What it does differently is not done here; look for a newer release of Advmed."
            )

    def on_train_start(self) -> None:
        """Checks output folder, data and thresholds, sets the method up, and starts as the host does."""
        self._check_output_folder()
        begins = self._saved_state is None  # (--c may have found nothing)
        if begins:
            self._choose_start(given=self.was_initialized)  # before the host makes its schedule, as a rule
        if not self.was_initialized:
            self.initialize()
        if begins:
            if self.settings.start_from not in (None, "scratch"):
                self._load_weights(str(self.settings.start_from))
            elif self._standard is not None:
                self._load_weights("standard")
        with patient():  # one rank may take longer than others, for data or thresholds
            self._check_data()
            self._set_up_method()
        self._remove_old_checkpoints()
        super().on_train_start()
        if self.local_rank == 0:
            resolved = settings_text(
                self.settings,
                method=self.method_name,
                read_from=self.settings_origin,
                thresholds=getattr(self.method, "thresholds", None),
            )
            write_whole(Path(self.output_folder) / FILE, resolved)
            if begins:  # W&B lets a run that goes on change nothing
                self.logger.update_config({"adversarial": {"method": self.method_name, **asdict(self.settings)}})

    def _check_output_folder(self) -> None:
        checkpoints = sorted(p.name for p in Path(self.output_folder).glob("checkpoint_*.pth"))
        if checkpoints and not self._resuming and not self.settings.overwrite:
            raise FileExistsError(
                f"{self.output_folder} holds {', '.join(checkpoints)} of an earlier training. Continue it with --c, "
                f"move it away, give this run a 'tag' in the settings, or set 'overwrite: true' to lose it."
            )

    def _remove_old_checkpoints(self) -> None:
        """With ``overwrite: true``: --c would go on with those of the earlier training, which went further."""
        if self.local_rank == 0 and not self._resuming and self.settings.overwrite and not self.disable_checkpointing:
            for path in Path(self.output_folder).glob("checkpoint_*.pth"):
                path.unlink()

    def _choose_start(self, given: bool) -> None:
        """Whether the preset starts from the standard training, and for how long it then trains.

        Args:
            given: whether weights were named on the command line: the host has made network and schedule for them.
        """
        settings = self.settings
        if settings.preset != "fast" or not self._attacks:
            return
        if settings.start_from not in (None, "standard"):
            return
        if given and settings.start_from is None:
            if settings.epochs is None:
                self.print_to_log_file(
                    f"Preset fast: {self.method_name} starts from the weights of the command line and trains all "
                    f"{self.num_epochs} epochs; a quarter is enough only from the standard training (another number: "
                    f"'epochs')"
                )
            return
        self._standard = from_first_rank(standard.find_checkpoint(self))
        if self._standard is None:
            self.print_to_log_file(
                f"There is no finished standard training in {standard.searched(self)}: "
                f"{self.method_name} trains from scratch, {self.num_epochs} epochs. With one (the stock trainer, same "
                f"fold) a quarter of its epochs is enough."
            )
        elif settings.epochs is None:
            epochs = read_checkpoint(self._standard)["current_epoch"]
            self.num_epochs = max(1, math.ceil(epochs / _SHARE_OF_STANDARD))
            self.print_to_log_file(
                f"Preset fast: a quarter of the {epochs} epochs of the standard training, {self.num_epochs} "
                f"(another number: 'epochs')"
            )
            if given:
                self.optimizer, self.lr_scheduler = self.configure_optimizers()

    def _load_weights(self, source: str) -> None:
        path = standard.find_checkpoint(self) if source == "standard" else Path(source)
        if path is None or not path.is_file():
            raise FileNotFoundError(
                f"'start_from: {source}' found no checkpoint: there is no "
                + (
                    f"{standard.CHECKPOINT} in {standard.searched(self)}. Train the fold with the stock trainer first"
                    if source == "standard"
                    else f"{path}. Name a checkpoint file"
                )
                + ", or remove 'start_from'."
            )
        network = host.bare(self.network)
        standard.load_weights(getattr(network, "_orig_mod", network), path)
        self.print_to_log_file(f"Starting from the weights of {path}")

    def _check_data(self) -> None:
        """Stops at a split or a case that cannot be trained on, and says which cases have no foreground."""
        training, validation = self.get_tr_and_val_datasets()
        for dataset, name in ((training, "train"), (validation, "validate")):
            if not dataset.identifiers:
                raise ValueError(
                    f"fold {self.fold} has no case to {name} on. Give it some in splits_final.json in "
                    f"{self.preprocessed_dataset_folder_base}, or train fold 'all'."
                )
        if self.settings.check_data:
            name = f"advmed_checked_{self.configuration_manager.data_identifier}.json"
            memory = [Path(folder) / name for folder in (self.preprocessed_dataset_folder_base, self.output_folder)]
            check_cases(
                (training, validation),
                self.label_manager,
                Path(self.preprocessed_dataset_folder),
                memory,
                self.print_to_log_file,
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
            doubts=self._doubts,
            every_epoch=True,
        )
        if state is not None:
            if state["method"]["method"] == self.method_name:
                state = with_names(state, Path(self.output_folder), settings)
            self._load_method(state)
        self._saved_state = None  # the host writes all that a trainer has into debug.json
        self._announce(resumed=state is not None)

    def _resolve_thresholds(self) -> Thresholds | RunningThresholds:
        """From a file, from a finished standard training, or by self-calibration; and says which."""
        assert self.terms is not None
        settings = self.settings
        if settings.rule == BOUNDARY:
            return at_boundary(SegmentationObjective)
        if settings.thresholds != "auto":
            path = Path(settings.thresholds)
            found, changed = standard.load_named(self, path)
            self.print_to_log_file(f"Thresholds from the file {path}{changed}: {found}")
            return found
        # The first rank looks for all: another could look later, and find what the first has just written.
        found_for_all, checkpoint = from_first_rank(self._find_thresholds() if self.local_rank == 0 else (None, None))
        if found_for_all is not None:
            return found_for_all
        if checkpoint is not None:
            self.print_to_log_file(f"Thresholds are measured on the standard training {checkpoint} ...")
            measured = standard.measure(self, checkpoint)
            if self.local_rank == 0:
                written = standard.keep(measured, checkpoint, Path(self.output_folder))
                self.print_to_log_file(
                    f"... {measured}; mean Dice of that network on clean training samples "
                    f"{measured.notes['training_dice']}; written to {written}"
                )
            return measured
        if settings.warmup_epochs == 0:
            raise ValueError(
                f"{self.method_name} has no thresholds. There is no {standard.FILE} and no finished standard training "
                f"({standard.CHECKPOINT}) in {standard.searched(self)}, and 'warmup_epochs: 0' rules out "
                f"self-calibration. Train the fold with the stock trainer first, name a file with 'thresholds: PATH' "
                f"in the settings, or remove 'warmup_epochs'."
            )
        self.print_to_log_file(
            "Thresholds are self-calibrated: a clean warm-up first, then the statistics of the clean training loss."
        )
        return self._self_calibrated()

    def _find_thresholds(self) -> tuple[Thresholds | None, Path | None]:
        """Those beside the standard training, and the checkpoint to measure where there are none of this run."""
        path, checkpoint = standard.find_file(self), standard.find_checkpoint(self)
        found = None if path is None else standard.load_found(self, path, self.print_to_log_file)
        if found is None:
            return None, checkpoint
        self.print_to_log_file(
            f"Thresholds from the file {path} (found beside the standard training){found[1]}: {found[0]}"
        )
        wanted = standard.default_rule(self.settings.preset)
        if self.settings.rule is None and found[0].rule not in (None, wanted):
            self.print_to_log_file(
                f"That file has the rule {found[0].rule}, and keeps it. By default the preset "
                f"{self.settings.preset} has {wanted}: 'rule: {wanted}' in the settings takes that"
            )
        return found[0], None

    def _self_calibrated(self) -> RunningThresholds:
        assert self.terms is not None
        rule = standard.default_rule(self.settings.preset)
        return self_calibrated(self.terms.names, self.settings, self._samples_per_epoch(), rule)

    def _announce(self, resumed: bool) -> None:
        if resumed:
            self.print_to_log_file(f"Continued: {self._summary()}")
        self.print_to_log_file(
            f"Adversarial training: {self.method_name}, settings from {self.settings_origin}; "
            f"{self.run.warmup_epochs} epoch(s) of clean warm-up"
        )
        samples = self._drawn_ids() if method_class(self.method_name).keeps_sizes else None
        if samples is not None:
            number, what = len(samples), f"samples ({self.settings.sample_id})"
            if self.settings.sample_id == "part":  # of which a case may never show one
                number, what = number // 2, "cases (whose patches with and without a structure have margins apart)"
            for line in self.run.outlook(number, self._samples_per_epoch(), what):
                self.print_to_log_file(line)

    def _doubts(self) -> str | None:
        """After a clean warm-up, against the network."""
        dice = self._logged("mean_fg_dice")[-1:]
        return f"a pseudo Dice of {dice[0]:.3f}" if dice and not dice[0] >= standard.POOR else None

    def _summary(self) -> str:
        """What the network is by now."""
        summary, thresholds = self.run.summary(self.current_epoch), self.run.thresholds
        told = f"{self.method_name}, {summary['attacked_epochs']} of {self.current_epoch} epoch(s) under attack"
        told += ingredients_of(summary)
        if summary["thresholds"] is not None:
            told += f"; thresholds {summary['thresholds']}, {summary['thresholds_from']}"
            if isinstance(thresholds, Thresholds) and thresholds.source is not None:
                told += f" ({thresholds.source})"
        return told

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

    def get_training_transforms(self, *args: object, **kwargs: object) -> Any:
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

    def _drawn_ids(self) -> list[str] | None:
        """Those of :meth:`sample_ids` that the host draws: where there is an ignore label, no slice without others."""
        if self.settings.sample_id != "slice" or not self.label_manager.has_ignore_label:
            return self.sample_ids()
        training, _ = self.get_tr_and_val_datasets()
        return drawn_slices({case: training.load_case(case) for case in training.identifiers}, self.label_manager)

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
        chosen = self.settings.compile
        if chosen is None:  # standard training is the host's; the others only where the user asks the host for it
            chosen = not self._attacks or host.COMPILE in os.environ
        return chosen and self._host_compiles()

    def _host_compiles(self) -> bool:
        return bool(super()._do_i_compile())

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
        self._iteration = 0
        for line in self.run.begin_epoch(self.current_epoch):
            self.print_to_log_file(line)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The host's training step with the method's loss."""
        if isinstance(self.lr_scheduler, LateDecay):
            self.lr_scheduler.within(self.current_epoch + self._iteration / self.num_iterations_per_epoch)
            self._iteration += 1
        if self._steps_as_its_base:
            return dict(super().train_step(batch))
        images, target = self.to_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        assert self.terms is not None
        objective = SegmentationObjective(
            self.network, host.bare(self.network), self.loss, self.terms, target, self._attack_precision
        )
        if self.settings.empty_samples == "floor":  # of the batch as it came, in the host's memory: no device waits
            found = has_foreground(batch["target"], self.label_manager.ignore_label)
            objective.empty = [not some for some in found]
        # A shared first gradient, or one at moved weights, needs the passes' own backward passes: with the host's
        # scaler, and through its distributed wrapper, which knows no other.
        shares = getattr(self.method, "clean_gradients", None) is not None and not self.run.warming_up
        at_once = shares or self.run.moves_weights or self.settings.backward == "sequential"
        scaled = self._backward if at_once else None
        with self.autocast():
            step = self.run.step(objective, images, batch.get("ids", batch["keys"]), scaled)
        if scaled is None:
            self._backward(step.loss)

        # From here on as in nnUNetTrainer.train_step, see host.READ_STEP.
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
        """Makes the ranks' margins equal, and adds our values to the host's log.

        Raises:
            FloatingPointError: if the loss was not finite in any step of the epoch.
        """
        super().on_train_epoch_end(train_outputs)
        losses = [float(output["loss"]) for output in train_outputs]
        if not np.isfinite(losses).any():
            raise FloatingPointError(
                f"the training loss was not finite in any step of epoch {self.current_epoch}. The checkpoints on disk "
                f"are of earlier epochs. {_REMEDY} Where only attacks overflow: set 'attack_precision: float32'."
            )
        if self.grad_scaler is not None:
            self.run.check_scale(self.grad_scaler.get_scale(), _REMEDY)
        values = {f"adv_{key}": value for key, value in self.run.end_epoch().items()}
        _open_log(self.logger, self.current_epoch, values)
        for key in host.logged(self.logger):
            if key.startswith("adv_") and key not in _OF_VALIDATION:
                self.logger.log(key, values.get(key, math.nan), self.current_epoch)
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
        network = host.bare(self.network)
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
        for key, value in zip(_OF_VALIDATION, (robust, average), strict=True):
            self.logger.log(key, value, self.current_epoch)

    def _logged(self, key: str) -> list[float]:
        return list(host.logged(self.logger).get(key, []))

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
        if self.local_rank == 0:
            try:
                add_panels(Path(self.output_folder) / "progress.png", host.logged(self.logger))
            except (OSError, ValueError) as error:  # a training is worth more than a picture of it
                self.print_to_log_file(f"WARNING: progress.png is without our panels: {error}")

    # Checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """The host's checkpoint, with our state added and the stock trainer's name; replaced in one go."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        buffer = io.BytesIO()
        super().save_checkpoint(buffer)
        buffer.seek(0)
        checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)  # what was written just now
        # Prediction looks the class up by this name; ours may not be installed there, and the network is the same.
        checkpoint["trainer_name"] = self.stock_name
        if checkpoint["_best_ema"] == math.inf:  # on_epoch_end is at work
            checkpoint["_best_ema"] = max(self._logged("ema_fg_dice"))
        own = {"epochs": self.num_epochs, "best_robust": self._best_robust}
        summary = self.run.summary(checkpoint["current_epoch"])
        checkpoint[STATE] = self.run.state_dict() | {"nnunet": own, "summary": summary}
        if isinstance(self.method, AdaptiveRadiusMethod):
            self.method.store.to_csv(Path(self.output_folder) / TABLE)
        with replacing(filename) as temporary:
            torch.save(without_names(checkpoint) if self._ended else checkpoint, temporary)

    def on_train_end(self) -> None:
        """As the host; says what was trained, and takes the ids of samples out of the checkpoints that stay."""
        self.print_to_log_file(f"Trained: {self._summary()}")
        self._ended = True
        best = Path(self.output_folder) / "checkpoint_best.pth"
        if self.local_rank == 0 and not self.disable_checkpointing and best.is_file():
            stripped = without_names(read_checkpoint(best))
            with replacing(best) as temporary:
                torch.save(stripped, temporary)
        super().on_train_end()

    def _save_debug_information(self) -> None:
        """The host's file, without the user's folders."""
        super()._save_debug_information()
        if self.local_rank == 0:
            paths = ("settings", "settings_origin", "_standard", "hostname")
            host.strip_debug_file(Path(self.output_folder) / "debug.json", paths)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """The host's checkpoint, and our state in it; to be continued, the one that went furthest.

        The host prefers the final one, then the latest, which it writes every 50 epochs, then the best.

        Raises:
            ValueError: if a training is to go on from a checkpoint that is not one of ours.
        """
        if self._resuming and Path(filename_or_checkpoint).name in CHECKPOINTS:
            filename_or_checkpoint = self._furthest(Path(filename_or_checkpoint))
        state = read_checkpoint(filename_or_checkpoint).get(STATE)
        if state is not None and self.settings.epochs is None:  # whatever became of the standard training
            self.num_epochs = state["nnunet"]["epochs"]  # before the host makes its schedule
        super().load_checkpoint(filename_or_checkpoint)
        self._saved_state = state
        if self._saved_state is None and self._resuming:
            raise ValueError(
                f"{filename_or_checkpoint} is not a checkpoint of {type(self).__name__}: it holds no margins or "
                f"counters. To start from its weights, train without --c and with -pretrained_weights "
                f"{filename_or_checkpoint}."
            )
        if self._saved_state is not None:
            self._best_robust = self._saved_state["nnunet"]["best_robust"]

    def _furthest(self, asked: Path) -> str:
        """The host's choice, or, where a training went on after it and was interrupted, what was written then."""
        paths = [asked, *(path for name in CHECKPOINTS if (path := asked.with_name(name)) != asked)]
        epochs = {path: read_checkpoint(path)["current_epoch"] for path in paths if path.is_file()}
        chosen = max(epochs, key=lambda path: epochs[path])
        if chosen != asked:
            self.print_to_log_file(f"{chosen.name} went further than {asked.name}: the training is continued from it")
        return str(chosen)

    def _thresholds_of(self, state: dict[str, Any]) -> Thresholds | RunningThresholds:
        assert self.terms is not None
        saved = saved_thresholds(state, self.terms.names, self._self_calibrated)
        if isinstance(saved, Thresholds):
            self.print_to_log_file(f"Thresholds from the checkpoint: {saved}")
        return saved

    def _load_method(self, state: dict[str, Any]) -> None:
        for line in self.run.load_state_dict(state):
            self.print_to_log_file(line)
        if isinstance(self.method, AdversarialMethod) and self.run.warmup_epochs >= self.num_epochs:
            raise ValueError(
                f"the training that is continued has {self.run.warmup_epochs} epoch(s) of clean warm-up, which leaves "
                f"no adversarial epoch of {self.num_epochs}; raise 'epochs', or start a new training without --c"
            )
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
    """Adversarial training (Madry et al. 2018, eq. 2.1): only attacked images, one noise level; see :class:`advmed.AT`.

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerAT``, with ``eps: 5`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerAT
        >>> Settings(eps=5).make_method(nnUNetTrainerAT.method_name).eps
        5.0
    """

    method_name = "AT"


class nnUNetTrainerSAT(AdversarialTraining, nnUNetTrainer):
    """Standard adversarial training: clean and attacked images, one noise level (arXiv 2206.01736, eq. 1).

    See :class:`advmed.SAT`.

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerSAT``, with ``eps: 5`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerSAT
        >>> Settings(eps=5).make_method(nnUNetTrainerSAT.method_name).eps
        5.0
    """

    method_name = "SAT"


class nnUNetTrainerAMAT(AdversarialTraining, nnUNetTrainer):
    """Adaptive-margin adversarial training: a noise level for every sample (arXiv 2206.01736, Algorithm 1).

    See :class:`advmed.AMAT`; with the preset "fast" margins follow their samples, "paper" is the algorithm as printed.

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
    """TRADES (Zhang et al. 2019, eq. 5): predictions on attacked images are drawn to those on clean ones.

    See :class:`advmed.TRADES`.

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerTRADES``, with ``eps: 5`` and ``beta: 1`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerTRADES
        >>> Settings(eps=5, beta=1).make_method(nnUNetTrainerTRADES.method_name).beta
        1.0
    """

    method_name = "TRADES"


class nnUNetTrainerDPAAT(AdversarialTraining, nnUNetTrainer):
    """Dynamic perturbation-adaptive adversarial training: a noise level for every sample (arXiv 2403.06798).

    See :class:`advmed.DPAAT`; only a summary of the paper was at hand.

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerDPAAT``, with ``eps: 5`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerDPAAT
        >>> method = Settings(eps=5).make_method(nnUNetTrainerDPAAT.method_name)
        >>> method.sizes.get(["hippocampus_001"]), method.step_size  # its first size, and how far it moves
        (tensor([5.]), 0.5)
    """

    method_name = "DPAAT"


class nnUNetTrainerMART(AdversarialTraining, nnUNetTrainer):
    """MART (Wang et al. 2020, eq. 11), voxel by voxel: attacks count more where the clean prediction is unsure.

    See :class:`advmed.MART`.

    Example:
        ``nnUNetv2_train 4 2d 0 -tr nnUNetTrainerMART``, with ``eps: 5`` and ``kl_weight: 6`` in ``adversarial.yaml``:

        >>> from adv_nnunet import Settings, nnUNetTrainerMART
        >>> Settings(eps=5, kl_weight=6).make_method(nnUNetTrainerMART.method_name).kl_weight
        6.0
    """

    method_name = "MART"


class nnUNetTrainerFAT(AdversarialTraining, nnUNetTrainer):
    """Friendly adversarial training (Zhang et al. 2020, Algorithm 1): an attack ends soon after it has succeeded.

    See :class:`advmed.FAT`.

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


def _open_log(logger: Any, epoch: int, more: Iterable[str] = ()) -> None:
    """Gives the host's log our keys, and those that a method has more; epochs before they began are NaN."""
    lists = host.logged(logger)
    for key in (*LOG_KEYS, *more):
        lists.setdefault(key, [float("nan")] * epoch)


TRAINERS = {kind.method_name: kind for kind in AdversarialTraining.__subclasses__()}
"""The trainers by the names of their methods."""

__all__ = ["AdversarialTraining", *(kind.__name__ for kind in TRAINERS.values())]
