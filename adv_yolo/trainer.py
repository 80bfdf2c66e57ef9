"""Our trainers: Ultralytics' detection trainer, whose loss is asked of a method.

The host's loop calls ``model(batch)``: a forward pass on the clean images, then ``model.criterion(predictions,
batch)``. Our :class:`MethodCriterion` stands in the criterion's place and hands the predictions to the method as its
clean pass; the attack and the adversarial pass happen there, inside the host's autocast and distributed wrapper. Where
the attack begins with the gradient of that pass, the images of the batch ask for it until the criterion has answered.
(A method that learns from attacked images only, AT or DPAAT without its synchronisation loss, pays for that one forward
pass and keeps it out of the running statistics.) The network's class is untouched, and the criterion is left out of
every copy and checkpoint.
"""

from __future__ import annotations

import copy
import csv
import io
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import yaml
from torch import Tensor
from ultralytics.cfg import check_dict_alignment
from ultralytics.data.utils import find_dataset_yaml
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT, LOGGER, RANK, YAML, colorstr
from ultralytics.utils.checks import check_file
from ultralytics.utils.torch_utils import unwrap_model

from adv_yolo import calibration as standard
from adv_yolo.checkpoint import (
    MARKED,
    STATE,
    complete,
    read_checkpoint,
    strip_states,
    to_resume,
    unfinished_mark,
    without_mark,
)
from adv_yolo.objective import DetectionObjective, ImageTerms, check_head, check_model
from adv_yolo.scores import host_results, joined, score
from adv_yolo.settings import RULE, Settings, argument_names, arguments_of, our_names, settings_of, split_arguments
from advmed.attacks import PGD
from advmed.copies import Sample, contents, warnings_of_copies
from advmed.distributed import from_first_rank, patient
from advmed.evaluation.subjects import spread
from advmed.files import write_whole
from advmed.guard import frozen_statistics
from advmed.methods import AdaptiveRadiusMethod, AdversarialMethod, method_class
from advmed.objective import inspecting
from advmed.thresholds import BOUNDARY, RunningThresholds, Thresholds, at_boundary
from advmed.training.rate import LateDecay, late_decay
from advmed.training.run import (
    LOG_KEYS,
    MethodRun,
    differing_notes,
    fingerprint,
    ingredients_of,
    load_thresholds,
    saved_thresholds,
    self_calibrated,
    without_use,
)
from advmed.versions import tell_if_newer

PACKAGES = ("ultralytics",)
"""Whose releases may break us: a newer one than those that were tested is pointed out."""
FILE = "adversarial.yaml"
"""The resolved settings, in the run's folder."""
MARGINS = "margins.csv"
COLUMNS = {key: f"{'metrics' if key.startswith('margin') else 'train'}/adv_{key}" for key in LOG_KEYS}
"""What we add to results.csv and the loggers; the host plots those with ``loss`` or ``metric`` in their name."""
_OLD_COLUMNS = {f"train/adv_{key}": name for key, name in COLUMNS.items()}
"""Of earlier releases, whose runs can be resumed."""
ROBUST = "metrics/robust_mAP50-95(B)"
"""The column of mAP50-95 on attacked validation images."""
_KNOWS_CLASSES = "advmed_knows_classes"
"""Attribute of a network that was made to be trained, until its training is set up: it alone gets into the processes
that the host starts for several GPUs."""
_JUDGE_STEPS, _JUDGE_SCALE = 5, 2.0
"""Of the attack behind it: it only has to put epochs into an order."""
_LOGGED_AT = ("on_pretrain_routine_start", "on_pretrain_routine_end", "on_train_start")
"""Events at which the host's loggers write down the arguments of a run: ClearML and Comet, before some of ours are
chosen; W&B and MLflow; DVC."""
MIXING = ("mosaic", "mixup", "cutmix", "copy_paste")
"""Augmentations that put several images into one."""
_AGAIN = (
    "Measure again, with the arguments of this run: adv-yolo thresholds ... scale=0.5 imgsz=320, or thresholds=BEST.pt"
)

T = TypeVar("T")

if TYPE_CHECKING:

    class _Host(DetectionTrainer):
        """A mixin has the attributes of the trainer that it is put before, as type checkers must be told."""

else:
    _Host = object


class AdversarialTraining(_Host):
    """Puts a training method (:data:`advmed.METHODS`) into an Ultralytics detection trainer; a base class before it.

    Data, augmentation, schedule, optimizer, gradient accumulation, precision, EMA, validation, logs, plots and
    checkpoints stay the host's. Our arguments (:class:`adv_yolo.Settings`) are passed as the host's are. A subclass
    gives ``method_name``; the host makes the trainer.

    Args:
        cfg: the host's defaults.
        overrides: the arguments of the user, the host's and ours.

    Raises:
        ValueError: for an argument that is unknown, out of range, or does not go together with the others.
        TypeError: for another task than detection.
        FileNotFoundError: for a file of thresholds that is not there.

    Example:
        >>> from adv_yolo import AdversarialTraining
        >>> from ultralytics.models.yolo.detect import DetectionTrainer
        >>> class MyTrainer(AdversarialTraining, DetectionTrainer):  # for YOLO(...).train(trainer=MyTrainer, eps=5)
        ...     method_name = "SAT"
        >>> MyTrainer.validate is AdversarialTraining.validate, MyTrainer.get_dataset is DetectionTrainer.get_dataset
        (True, True)
    """

    method_name: ClassVar[str]
    best_fitness: float | None
    args: Any
    epochs: int
    wdir: Path
    last: Path
    best: Path

    def __init__(
        self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict[str, Any] | None = None
    ) -> None:
        given = dict(overrides or {})
        check_dict_alignment({**DEFAULT_CFG_DICT, "session": None, **dict.fromkeys(argument_names())}, given)
        host, own = split_arguments(given)
        self.settings = settings_of(own)
        check_early(self.settings, host, self.method_name)
        if host.get("resume") and own:
            LOGGER.warning(f"Resume ignores {list(own)}, using checkpoint values. Start a new run to change them.")
        if method_class(self.method_name, DetectionObjective).keeps_sizes and not host.get("resume"):
            separate_images(host, self.method_name)
        if self.settings.norm != math.inf and host.get("multi_scale") and not host.get("resume"):
            LOGGER.warning(
                f"{self.method_name} with multi_scale={host['multi_scale']}: a level in L2 stays while the image's "
                f"size changes from batch to batch, and is a stronger change of a small image than of a large one. "
                f"Set multi_scale=0, or norm=inf, for levels that mean one thing."
            )
        tell_if_newer(PACKAGES, lambda line: _log(f"WARNING: {line}"))
        self.run: MethodRun | None = None
        self.terms: ImageTerms | None = None
        self._held = ExitStack()
        self._empty: list[bool] | None = None  # of the batch at hand: images without an object
        self._ids: dict[str, str] = {}
        self._epoch_values: dict[str, float] = {}
        self._knows_classes = False
        self._robust = math.nan
        self._in_epoch = False
        self._batch = 0
        if cfg is DEFAULT_CFG and "epochs" not in host and not host.get("resume") and not host.get("time"):
            self._shorten(host)
        super().__init__(cfg, host, _callbacks)
        if self.settings.backward == "sequential" and self.world_size > 1:
            raise ValueError("backward=sequential works in a single process; use backward=together on several GPUs")

    def _shorten(self, host: dict[str, Any]) -> None:
        """A network that was trained on these classes already needs fewer epochs, unless the user says how many."""
        if self.settings.preset != "fast" or not issubclass(method_class(self.method_name), AdversarialMethod):
            return
        epochs = epochs_of(host.get("model"), host.get("data"), bool(host.get("single_cls")))
        if epochs is not None:
            host["epochs"] = math.ceil(epochs / 4)
            _log(
                f"epochs={host['epochs']}, a quarter of the {epochs} that {host['model']} was trained for (epochs=... "
                f"or preset=paper change it)"
            )

    def train(self) -> None:
        """Trains; on several GPUs the host starts processes, which find our arguments among its own.

        Raises:
            RuntimeError: if one of those processes failed.
        """
        if self.ddp and not self.resume:  # a resumed run takes them from the checkpoint
            self.args.__dict__.update(arguments_of(self.settings))
        try:
            super().train()
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"one of the processes of the training failed (status {error.returncode}); what it said is above"
            ) from error

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """The host's check, which reads the arguments of the run that goes on; see :mod:`adv_yolo.checkpoint`."""
        path = to_resume(self.args.resume) if self.args.resume else None
        if path is None:  # nothing to resume, or nothing found, which the host says
            super().check_resume(overrides)
            return
        complete(path)  # if it is of a training that was killed behind its last epoch, the host says that it has ended
        with without_mark(path) as file:
            self.args.resume = str(file)
            super().check_resume(overrides)
        self.args.model = self.args.resume = str(path)

    # Before training: everything that can go wrong goes wrong here.

    def get_model(self, *arguments: object, **named: object) -> Any:
        """The host's model, if it is one for detection; notes whether it begins with weights that know the classes."""
        cfg = named["cfg"] if "cfg" in named else arguments[0] if arguments else None
        if cfg is not None:  # another kind of model may fail while it is made, and not say why
            check_head(cfg if isinstance(cfg, dict) else yaml_model_load(cfg))
        model = check_model(super().get_model(*arguments, **named))
        weights = named["weights"] if "weights" in named else arguments[1] if len(arguments) > 1 else None
        knows = (
            weights is not None
            and has_learnt(weights, model, self.data["names"])
            and standard.labels(dict(getattr(weights, "args", {}))) == standard.labels(vars(self.args))
        )
        setattr(model, _KNOWS_CLASSES, knows)
        return model

    def setup_model(self) -> Any:
        """The host's, which makes no model where it was made before, by another process perhaps."""
        checkpoint = super().setup_model()
        self._knows_classes = self.model.__dict__.pop(_KNOWS_CLASSES, False)
        return checkpoint

    def _build_train_pipeline(self) -> None:
        super()._build_train_pipeline()
        dataset = self.train_loader.dataset
        if not any(len(label["cls"]) for label in dataset.labels):
            raise ValueError(
                f"none of the {len(dataset.labels)} training images has an object in its labels. Check that the "
                f"labels lie beside the images (images/a.jpg, labels/a.txt) and are not empty."
            )
        self._ids = dict(
            zip(dataset.im_files, standard.relative_names(dataset.im_files, self.data.get("path")), strict=True)
        )
        for line in on_first_rank(self._copies):
            _log(f"WARNING: {line}")

    def _setup_scheduler(self) -> None:
        """The host's, with another schedule where the settings have one; it follows the host's warm-up."""
        super()._setup_scheduler()
        if self.settings.decay == "late":
            self.lf = lambda epoch: late_decay(epoch, self.epochs)
            self.scheduler = LateDecay(self.optimizer, lambda: float(self.epochs))

    def _copies(self) -> list[str]:
        """What is to be said of images that are there under two names."""
        loaded = {"train": self.train_loader.dataset, "val": self.test_loader.dataset}
        images = [
            (split, file, label)
            for split, d in loaded.items()
            for file, label in zip(d.im_files, d.labels, strict=True)
        ]
        labels = Path(loaded["train"].label_files[0]).parent  # beside what the host remembers
        memory = [labels.with_suffix(".advmed.json"), Path(self.save_dir) / ".advmed_contents.json"]
        found = contents([Path(file) for _, file, _ in images], memory, self.args.workers)
        names = standard.relative_names([file for _, file, _ in images], self.data.get("path"))
        samples = [
            Sample(split, name, content, content and [label["cls"].tolist(), label["bboxes"].tolist()])
            for (split, _, label), name, content in zip(images, names, found, strict=True)
        ]
        return warnings_of_copies(samples)

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Resumes as the host does, and sets the method up: the last thing before the first epoch.

        Raises:
            ValueError: for a checkpoint that is no unfinished training by this method, or thresholds of another model.
        """
        super().resume_training(ckpt)
        model = unwrap_model(self.model)
        self.terms = ImageTerms(model, getattr(model, "criterion", None), one_to_one=self.args.nms is False)
        state = None
        if ckpt is not None and self.resume:
            state = getattr(ckpt.get("ema") or ckpt.get("model"), STATE, None)
            if state is None or state["method"]["method"] != self.method_name:
                raise ValueError(
                    f"{self.args.model} is no unfinished training of {type(self).__name__}: it holds "
                    + ("no margins or counters" if state is None else f"a run of {state['method']['method']}")
                    + ". To start from its weights, train without resume."
                )
            # A run of an earlier release had no presets, and a best fitness of clean images: it goes on so.
            self.settings = settings_of({"preset": "paper", "robust_batches": 0, **state["arguments"]})
            self._setup_scheduler()  # the host made it before these settings were known
        channels = int(self.data.get("channels", 3))
        for line in without_use(self.method_name, self.settings) if state is None else ():  # else filled in long ago
            _log(line)
        settings = self.settings.resolved(channels, int(self.args.imgsz), int(self.args.seed))
        self.settings = self._follow_head(settings.for_method(self.method_name))
        visits = len(self.train_loader.dataset)  # an image that a list names twice is met twice in an epoch
        thresholds = self._thresholds(state)
        with our_names():
            self.run = MethodRun(
                self.method_name,
                self.settings,
                thresholds,
                epochs=self.epochs,
                steps_per_epoch=len(self.train_loader),
                say=_log,
                doubts=self._doubts,
                every_epoch=True,
            )
        if state is not None:
            self._check_images(state)
            for line in self.run.load_state_dict(state):
                _log(line)
            _log(f"goes on as {_sentence(self.run.summary(self.start_epoch))}")
        model.criterion = MethodCriterion(self)
        for line in self.run.outlook(len(set(self._ids.values())), visits, "images"):
            _log(line)
        self._write_down(self.start_epoch)

    def _write_down(self, epochs: int) -> None:
        """What the run is after so many epochs, and its settings, in its folder."""
        assert self.run is not None
        if RANK in {-1, 0}:
            notes = [f"# {key}: {value}\n" for key, value in self.run.summary(epochs).items() if value is not None]
            text = yaml.safe_dump(arguments_of(self.settings), sort_keys=False)
            write_whole(self.save_dir / FILE, "".join(notes) + text)

    def _follow_head(self, settings: Settings) -> Settings:
        """Without a shared gradient where it is that of another head than the one that is attacked."""
        assert self.terms is not None
        if self.terms.branch != "one2one" or not settings.share_gradient:
            return settings
        _log(
            "share_gradient is off: with nms=False the attack follows the one-to-one head, whose gradient the training "
            "pass keeps from the image"
        )
        return replace(settings, share_gradient=False)

    def _thresholds(self, state: dict[str, Any] | None) -> Thresholds | RunningThresholds | None:
        """From the checkpoint, from a file, from a trained model, or by self-calibration; and says which."""
        if not method_class(self.method_name).needs_thresholds(DetectionObjective):
            return None
        assert self.terms is not None
        names, settings = self.terms.names, self.settings
        running = partial(self_calibrated, names, settings, len(self.train_loader.dataset), RULE)
        if state is not None:
            return saved_thresholds(state, names, running)
        if settings.rule == BOUNDARY:
            return at_boundary(DetectionObjective)
        path = settings.thresholds
        if path == "auto":
            measured, found = self._measured_on_itself()
            if measured is not None:
                _log(f"thresholds measured on the network that is trained on ({self.args.model}): {measured}")
                self._warn_of_quality(found)
                return measured
            if settings.warmup_epochs == 0:
                raise ValueError(
                    f"{self.method_name} has no thresholds: clean_epochs=0 rules out self-calibration. Name a file of "
                    "'adv-yolo thresholds' or a trained model with thresholds=PATH, or remove clean_epochs."
                )
            if found is not None:
                _log(
                    f"{self.args.model} detects next to nothing on the training images (mAP50 {found:.3f}), so that no "
                    f"thresholds can be measured on it"
                )
            _log("thresholds are self-calibrated: clean epochs first, then the statistics of the clean loss")
            return running()
        if path.endswith(".pt"):
            measured = on_first_rank(
                lambda: standard.measure(
                    path, self.data, self._own_batch(), rule=settings.rule or RULE, device=self.device
                )
            )
            measured.require(names, f"the thresholds of {path}")
            _log(f"thresholds measured on {path}: {measured}")
            self._warn_of_quality(measured.notes["mAP50"])
            return measured
        taken, remark = load_thresholds(settings, path, names)
        _log(f"thresholds from the file {path}{remark}: {taken}")
        if wrong := differing_notes(taken.notes, self._of_this_run(taken)):
            raise ValueError(f"thresholds={path} are not those of this training: {', '.join(wrong)}. {_AGAIN}")
        self._warn_of_quality(taken.notes.get("mAP50"))
        if taken.notes and "augmentation" not in taken.notes:
            _log(f"WARNING: {path} was measured on plain images, not on those of a training. {_AGAIN}")
        if other := standard.other_conditions(taken.notes, self.args):
            _log(f"WARNING: this run's losses are not those of {path}: {', '.join(other)}. {_AGAIN}")
        return taken

    def _of_this_run(self, thresholds: Thresholds) -> dict[str, Any]:
        """What the notes of thresholds must say to be those of this run."""
        assert self.terms is not None
        run = standard.demands(self.args, self.data, self.terms) | {"samples": fingerprint(self._ids.values())}
        others = thresholds.notes.get("split") != "train"
        if others or dict(thresholds.notes.get("augmentation", {})).get("fraction") != self.args.fraction:
            del run["samples"]  # measured on other images of the data, as the user asked for
        return run

    def _measured_on_itself(self) -> tuple[Thresholds | None, float | None]:
        """Thresholds of the network as it is, and its mAP50 on training images; None where it was not trained."""
        if not self._knows_classes or not str(self.args.model).endswith(".pt"):
            return None, None
        source = Path(self.args.model)
        self._model_train()
        network = copy.deepcopy(unwrap_model(self.model))
        modes = {name: module.training for name, module in network.named_modules()}

        def look() -> tuple[Thresholds | None, float]:
            args = self._own_batch()
            found = standard.quality(network.eval(), self.data, args, self.device, self.save_dir)
            if found < standard.UNTRAINED:
                return None, found
            for name, module in network.named_modules():
                module.training = modes[name]
            measured = standard.measure_network(
                network,
                self.data,
                args,
                rule=self.settings.rule or RULE,
                device=self.device,
                split="train",
                source=source,
                found=found,
            )
            return measured, found

        return on_first_rank(look)

    def _own_batch(self) -> Any:
        """The host's arguments, with the images that one process has at once."""
        args = copy.copy(self.args)
        args.batch = max(1, self.batch_size // max(1, self.world_size))
        return args

    def _warn_of_quality(self, found: float | None) -> None:
        if found is not None and found < standard.MEDIOCRE:
            _log(
                f"WARNING: the network that the thresholds are of is poorly trained (mAP50 {found:.3f} on training "
                f"images); they are too lenient, or too strict, by luck. Train it for longer"
            )

    def _doubts(self) -> str | None:
        """After a clean warm-up, against the network."""
        found = (self.metrics or {}).get("metrics/mAP50(B)") if self.args.val else None  # zeros before the first
        return None if found is None or found >= standard.MEDIOCRE else f"mAP50 {found:.3f} on validation images"

    def _check_images(self, state: dict[str, Any]) -> None:
        now = fingerprint(self._ids.values())
        if now == state["images"]:
            return
        hint = (
            f"The training images have changed since the checkpoint ({state['images']['count']} then, {now['count']} "
            f"now): restore them, or start a new training without resume."
        )
        assert self.run is not None
        if isinstance(self.run.method, AdaptiveRadiusMethod):
            self.run.method.store.load_state_dict(state["method"]["margins"])
            self.run.method.store.require_known(self._ids.values(), hint)
        raise ValueError(hint)

    # Training

    def run_callbacks(self, event: str) -> None:
        """The host's callbacks, with ours at the beginning and the end of an epoch."""
        if self.run is not None and event == "on_train_epoch_start":
            self._robust, self._in_epoch = math.nan, True
            self.run.steps_per_epoch = len(self.train_loader)  # more of them where a batch did not fit the memory
            self._batch = 0
            for line in self.run.begin_epoch(self.epoch):
                _log(line)
        # The host sets the rates of its warm-up after this, so that these do not touch them.
        if event == "on_train_batch_start" and isinstance(self.scheduler, LateDecay):
            self.scheduler.within(self.epoch + self._batch / len(self.train_loader))
            self._batch += 1
        if self.run is not None and event == "on_train_epoch_end":
            if self.scaler.is_enabled():
                self.run.check_scale(self.scaler.get_scale(), "Train with amp=False, or a smaller lr0.")
            self._epoch_values = self.run.end_epoch()
            if isinstance(self.run.method, AdaptiveRadiusMethod) and not self.run.warming_up:
                _log(
                    "noise levels {margin_q05:.2f} / {margin_q50:.2f} / {margin_q95:.2f} (5, 50, 95 %), {expanded:.0%} "
                    "of the visits let one grow".format(**self._epoch_values)
                )
            if self._epoch_values["nonfinite"] > 0:
                _log(
                    f"WARNING: {int(self._epoch_values['nonfinite'])} attack step(s) were skipped because a gradient "
                    f"was not finite. A few are harmless; if they persist, train with amp=False."
                )
        # The host has estimated them anew, each process for itself; what follows the length must not differ between
        # them. After the training it calls this again, in the processes that have the best checkpoint at hand.
        if self.run is not None and event == "on_fit_epoch_end" and self._in_epoch:
            self._in_epoch = False
            if self.args.time:
                self.epochs = self.args.epochs = from_first_rank(self.epochs)
                self.run.set_epochs(self.epochs)
        if event not in _LOGGED_AT:
            super().run_callbacks(event)
            return
        with self._arguments_shown():
            super().run_callbacks(event)

    def _arguments(self) -> dict[str, Any]:
        """What a log of this run is to say: the method, and our arguments as far as they are known."""
        known = {name: value for name, value in arguments_of(self.settings).items() if value is not None}
        return {"method": self.method_name, **known}

    @contextmanager
    def _arguments_shown(self) -> Iterator[None]:
        """Our arguments among the host's, where its loggers read those; its checkpoints must not have them."""
        if self.run is None and self.args.resume:  # they come with the checkpoint
            yield
            return
        shown = {name: value for name, value in self._arguments().items() if name not in self.args.__dict__}
        self.args.__dict__.update(shown)
        try:
            yield
        finally:
            for name in shown:
                self.args.__dict__.pop(name, None)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The host's batch; what the host's forward pass on it may teach BatchNorm is decided here.

        Its images ask for their gradient where an attack is to begin with that of the host's pass.
        """
        objects = set(batch["batch_idx"].tolist())  # in the host's memory still: nothing waits for the device
        self._empty = [number not in objects for number in range(len(batch["img"]))]
        batch = super().preprocess_batch(batch)
        self._held.close()
        if self._shares():
            batch["img"].requires_grad_()
        if self.run is not None and not self.run.warming_up:
            adversarial_only = not self.run.method.learns_from_clean or self.settings.bn == "adversarial"
            if adversarial_only:
                self._held.enter_context(frozen_statistics(unwrap_model(self.model)))
        return batch

    def method_loss(self, predictions: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's loss of a batch and the host's loss items, in place of the host's loss.

        Args:
            predictions: of the host's forward pass on the batch.
            batch: the host's, on the device.
        """
        self._held.close()
        assert self.run is not None
        assert self.terms is not None
        model = unwrap_model(self.model)
        hold = partial(frozen_statistics, model) if self._only_clean() else ExitStack
        # What is multiplied by it is known to the host's scaler only: gradients that are taken at once need it, too.
        scale = self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else None
        objective = DetectionObjective(model, self.terms, batch, predictions, hold, scale)
        objective.empty = self._empty
        sequential = self.settings.backward == "sequential"
        ids = [self._ids.get(name, name) for name in batch["im_file"]]
        step = self.run.step(objective, batch["img"], ids, self._backward if sequential else None)
        batch["img"].requires_grad_(False)  # for the host's plots, and whoever else looks at the batch
        loss = step.loss
        if sequential:  # its gradients are in place; the host's backward pass finds nothing more
            loss = loss + torch.zeros((), device=loss.device, requires_grad=True)
        assert objective.items is not None
        return loss, objective.items

    def _shares(self) -> bool:
        """Whether an attack begins with the gradient of the host's own forward pass."""
        if self.run is None or self.run.warming_up:
            return False
        method = self.run.method
        return isinstance(method, AdversarialMethod) and method.learns_from_clean and bool(method.clean_gradients)

    def _only_clean(self) -> bool:
        return self.settings.bn == "clean" and self.run is not None and self.run.method.learns_from_clean

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            self.scaler.scale(loss).backward()

    # Validation

    def validate(self) -> tuple[dict[str, Any] | None, float | None]:
        """The host's validation; of an adversarial training, the fitness is that under attack.

        By it the host keeps ``best.pt`` and stops early. An epoch of the clean warm-up has none, as where the host
        does not validate: it can neither win nor lose.
        """
        before = self.best_fitness
        metrics, fitness = super().validate()
        if metrics is None or self.run is None or not isinstance(self.run.method, AdversarialMethod):
            return metrics, fitness
        if self.run.warming_up:
            self.best_fitness = before
            return metrics, None
        found = self._under_attack() if self._judges() else None
        if found is None:
            return metrics, fitness
        self._robust, fitness = found["metrics/mAP50-95(B)"], found["fitness"]
        self.best_fitness = fitness if before is None or before < fitness else before
        return metrics, fitness

    def _judges(self) -> bool:
        """Whether epochs are judged under attack."""
        settings = self.settings
        adversarial = self.run is not None and isinstance(self.run.method, AdversarialMethod)
        return adversarial and settings.robust_batches > 0 and bool(settings.eps)

    def _under_attack(self) -> dict[str, float] | None:
        """The host's metrics of the EMA network on some attacked validation images; None where these have no objects.

        The images are the same in every epoch, at even distances.
        """
        dataset, network, settings = self.test_loader.dataset, self.ema.ema, self.settings
        # The host validates on twice as many images at once as it trains on, which are of one shape.
        size = max(1, int(dataset.batch_size or 1) // 2)
        parts = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
        parts = [part for part in parts if any(len(dataset.labels[i]["cls"]) for i in part)]
        attack, terms = PGD(_JUDGE_STEPS, _JUDGE_SCALE, settings.p), ImageTerms(network)
        scores = []
        for part in spread(parts, settings.robust_batches):
            batch = standard.batch_of(dataset, part, self.device)
            objective = DetectionObjective(network, terms, batch)
            attacked = attack(objective, batch["img"], settings.eps or 0.0, bounds=settings.bounds, final_pass=False)
            with inspecting(objective):
                scores.append(score(network, self.validator, batch, attacked.images))
        if not scores:
            return None
        results = host_results(joined(scores), network.names)
        images = sum(len(part["number"]) for part in scores)
        _log(f"mAP50-95 {results['metrics/mAP50-95(B)']:.4f} under attack ({images} images, eps {settings.eps:g})")
        return results

    # Logs and checkpoints

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """The host's results.csv, with our columns last; the loggers and the checkpoint get them, too.

        A column begins with its first value: the host's plot has none that stays empty.
        """
        values = {COLUMNS.get(key, f"train/adv_{key}"): value for key, value in self._epoch_values.items()}
        ours = {key: value for key, value in (values | {ROBUST: self._robust}).items() if not math.isnan(value)}
        hosts = {key: value for key, value in metrics.items() if not _is_ours(key)}
        self.metrics: dict[str, Any] = {k: v for k, v in self.metrics.items() if not _is_ours(k)} | ours
        columns = widened(self.csv, ours)
        super().save_metrics(hosts | dict.fromkeys(columns, math.nan) | ours)

    def save_model(self) -> bool:
        """The host's checkpoints, in which our state rides as an attribute of the network: one write, one state."""
        assert self.run is not None
        state = self.run.state_dict() | {
            "arguments": arguments_of(self.settings),
            "images": fingerprint(self._ids.values()),
            "summary": self.run.summary(self.epoch + 1),
            "host": {MARKED: getattr(self.args, MARKED)},
        }
        args, marked = self.args, copy.copy(self.args)
        setattr(marked, MARKED, unfinished_mark(self.method_name, type(self).__name__))
        setattr(self.ema.ema, STATE, state)
        self.args = marked
        try:
            with self._written_whole():
                return bool(super().save_model())
        finally:
            self.args = args
            delattr(self.ema.ema, STATE)
            if isinstance(self.run.method, AdaptiveRadiusMethod):
                self.run.method.store.to_csv(self.save_dir / MARGINS)

    @contextmanager
    def _written_whole(self) -> Iterator[None]:
        """Inside, the host writes its checkpoints to a folder beside, from which they take their places in one go: a
        kill while it writes would leave a file cut off, and no other to go on from."""
        places = self.wdir, self.last, self.best
        beside = self.wdir / ".writing"
        shutil.rmtree(beside, ignore_errors=True)
        self.wdir, self.last, self.best = beside, beside / self.last.name, beside / self.best.name
        try:
            yield
            for path in sorted(beside.iterdir(), key=lambda path: path.name == self.last.name):  # which says how far
                os.replace(path, places[0] / path.name)
        finally:
            self.wdir, self.last, self.best = places
            shutil.rmtree(beside, ignore_errors=True)

    def final_eval(self) -> None:
        """The host's final evaluation; then our state leaves all checkpoints, as the optimizer has left the last one.

        Raises:
            RuntimeError: if no epoch was attacked. Such a run is not over: it can be resumed.
        """
        assert self.run is not None
        if isinstance(self.run.method, AdversarialMethod) and self.epoch < self.run.warmup_epochs:
            raise RuntimeError(
                f"the run ended within its {self.run.warmup_epochs} clean epochs: no network of it was trained under "
                f"attack, that in best.pt neither. Go on for longer (adv-yolo detect train resume model={self.last}, "
                f"with a larger time= if it was that), or train anew with fewer clean epochs"
            )
        super().final_eval()
        self._write_down(self.epoch + 1)
        _log(f"this was {_sentence(self.run.summary(self.epoch + 1))}")
        if RANK in {-1, 0}:
            strip_states(self.wdir)


class MethodCriterion:
    """Stands in the place of ``model.criterion`` during training; copies and pickles of it are None."""

    def __init__(self, trainer: AdversarialTraining) -> None:
        self._trainer = trainer

    def __call__(self, predictions: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's loss and the host's loss items."""
        return self._trainer.method_loss(predictions, batch)

    def __getattr__(self, name: str) -> Any:
        terms = self._trainer.terms  # such as ``update``, which moves the weights of two heads
        return getattr(None if terms is None else terms.criterion, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class AMATDetectionTrainer(AdversarialTraining, DetectionTrainer):
    """Adaptive-margin adversarial training: a noise level for every image (arXiv 2206.01736, Algorithm 1).

    See :class:`advmed.AMAT`; with the preset "fast" margins follow their images, "paper" is the algorithm as printed.

    Example:
        ``YOLO("yolov8n.yaml").train(trainer=AMATDetectionTrainer, data="data.yaml", delta=3.5)``, or
        ``adv-yolo detect train model=yolov8n.yaml data=data.yaml method=amat delta=3.5``:

        >>> from adv_yolo import AMATDetectionTrainer, Settings
        >>> from advmed import Thresholds
        >>> thresholds = Thresholds((2.0, 1.0, 1.5), ("box_loss", "cls_loss", "dfl_loss"))
        >>> method = Settings(delta=3.5).make_method(AMATDetectionTrainer.method_name, thresholds)
        >>> method.margins.get(["images/train/a.jpg"])  # the noise level of an image that was never met
        tensor([3.5000])
    """

    method_name = "AMAT"


class SATDetectionTrainer(AdversarialTraining, DetectionTrainer):
    """Standard adversarial training: clean and attacked images, one noise level (arXiv 2206.01736, eq. 1).

    See :class:`advmed.SAT`.

    Example:
        ``YOLO("yolov8n.yaml").train(trainer=SATDetectionTrainer, data="data.yaml", eps=5)``, or
        ``adv-yolo detect train model=yolov8n.yaml data=data.yaml method=sat eps=5``:

        >>> from adv_yolo import SATDetectionTrainer, Settings
        >>> Settings(eps=5).make_method(SATDetectionTrainer.method_name).eps
        5.0
    """

    method_name = "SAT"


class ATDetectionTrainer(AdversarialTraining, DetectionTrainer):
    """Adversarial training (Madry et al. 2018, eq. 2.1): only attacked images, one noise level; see :class:`advmed.AT`.

    Example:
        ``YOLO("yolov8n.yaml").train(trainer=ATDetectionTrainer, data="data.yaml", eps=5)``, or
        ``adv-yolo detect train model=yolov8n.yaml data=data.yaml method=at eps=5``:

        >>> from adv_yolo import ATDetectionTrainer, Settings
        >>> Settings(eps=5).make_method(ATDetectionTrainer.method_name).eps
        5.0
    """

    method_name = "AT"


class TRADESDetectionTrainer(AdversarialTraining, DetectionTrainer):
    """TRADES (Zhang et al. 2019, eq. 5): predictions on attacked images are drawn to those on clean ones.

    See :class:`advmed.TRADES`.

    Example:
        ``YOLO("yolov8n.yaml").train(trainer=TRADESDetectionTrainer, data="data.yaml", eps=5, beta=1)``, or
        ``adv-yolo detect train model=yolov8n.yaml data=data.yaml method=trades eps=5 beta=1``:

        >>> from adv_yolo import Settings, TRADESDetectionTrainer
        >>> Settings(eps=5, beta=1).make_method(TRADESDetectionTrainer.method_name).beta
        1.0
    """

    method_name = "TRADES"


class DPAATDetectionTrainer(AdversarialTraining, DetectionTrainer):
    """Dynamic perturbation-adaptive adversarial training: a noise level for every image (arXiv 2403.06798).

    See :class:`advmed.DPAAT`; only a summary of the paper was at hand.

    Example:
        ``YOLO("yolov8n.yaml").train(trainer=DPAATDetectionTrainer, data="data.yaml", eps=5)``, or
        ``adv-yolo detect train model=yolov8n.yaml data=data.yaml method=dpaat eps=5``:

        >>> from adv_yolo import DPAATDetectionTrainer, Settings
        >>> method = Settings(eps=5).make_method(DPAATDetectionTrainer.method_name)
        >>> method.sizes.get(["images/train/a.jpg"]), method.step_size  # its first size, and how far it moves
        (tensor([5.]), 0.5)
    """

    method_name = "DPAAT"


class FATDetectionTrainer(AdversarialTraining, DetectionTrainer):
    """Friendly adversarial training (Zhang et al. 2020, Algorithm 1): an attack ends soon after it has succeeded.

    See :class:`advmed.FAT`.

    Example:
        ``YOLO("yolov8n.yaml").train(trainer=FATDetectionTrainer, data="data.yaml", eps=5, tau=2)``, or
        ``adv-yolo detect train model=yolov8n.yaml data=data.yaml method=fat eps=5 tau=2``:

        >>> from adv_yolo import FATDetectionTrainer, Settings
        >>> Settings(eps=5, tau=2).make_method(FATDetectionTrainer.method_name).tau
        2
    """

    method_name = "FAT"


TRAINERS: dict[str, type[AdversarialTraining]] = {
    kind.method_name.lower(): kind for kind in AdversarialTraining.__subclasses__()
}
"""The trainers by the values of ``method=``."""


def check_early(settings: Settings, arguments: dict[str, Any], method: str) -> None:
    """Raises for what can be seen to be impossible before anything is loaded."""
    task = arguments.get("task") or "detect"
    if task != "detect":
        raise TypeError(
            f"adv_yolo trains detection models, not task={task}; train it with the stock trainer, or choose a "
            f"detection model such as yolov8n.yaml"
        )
    if arguments.get("distill_model") is not None:
        raise ValueError("distill_model and adversarial training do not go together; train without distillation")
    settings.check_method(method)
    path = settings.thresholds
    if path != "auto" and not arguments.get("resume") and not Path(path).is_file():
        raise FileNotFoundError(
            f"thresholds={path}: there is no such file. Make one with 'adv-yolo thresholds model=std_best.pt "
            f"data=...', or leave the argument out for self-calibration."
        )


def separate_images(arguments: dict[str, Any], method: str) -> None:
    """Switches mosaic off unless the user set it, and warns of augmentations that mix images."""
    if "mosaic" not in arguments:
        arguments["mosaic"] = 0.0
        LOGGER.info(
            f"{colorstr(method + ':')} mosaic=0.0, so that a noise level belongs to one image (mosaic=1.0 turns it on)"
        )
    mixing = [f"{name}={arguments[name]}" for name in MIXING if arguments.get(name)]
    if mixing:
        LOGGER.warning(
            f"{method} with {', '.join(mixing)}: several images become one, and its noise level is kept under the name "
            f"of the first. Levels mean less so; set them to 0 for those of single images."
        )


def epochs_of(model: Any, data: Any, single: bool) -> int | None:
    """How many epochs a model in a file was to be trained for; None if it is none, or of other classes than the data.

    Args:
        model: the host's argument.
        data: the host's argument.
        single: whether all classes of the data are one (the host's ``single_cls``).
    """
    path = Path(str(model))
    if path.suffix != ".pt" or not path.is_file():
        return None
    network, checkpoint = read_checkpoint(path)
    epochs = (checkpoint.get("train_args") or {}).get("epochs")
    if not epochs:
        return None
    names = ["item"] if single else class_names(data)
    if names is None:
        _log(
            f"whether {path} knows the classes of data={data} cannot be told before that is here: the epochs are not "
            f"a quarter of its {epochs} (epochs=... says how many)"
        )
        return None
    return int(epochs) if [str(name) for name in dict(network.names).values()] == names else None


def class_names(data: Any) -> list[str] | None:
    """The classes of a data set, found as the host finds it, but for what it would have to download or to unpack.

    Args:
        data: the host's argument: a YAML file, the name of one that the host comes with, or a folder.

    Returns:
        Their names; None where there is no description of them yet.
    """
    for name in [data] if Path(str(data)).exists() else [f"{data}.yaml", f"{data}.yml", data]:
        found = Path(check_file(name, download=False, hard=False) or "no file")
        if found.is_dir():
            with suppress(AssertionError):  # there are none, or several
                found = find_dataset_yaml(found)
        if found.suffix in {".yaml", ".yml"} and found.is_file():
            names = YAML.load(found).get("names") or {}
            return [str(name) for name in (names.values() if isinstance(names, dict) else names)]
    return None


def has_learnt(weights: Any, model: Any, names: Mapping[int, str]) -> bool:
    """Whether all of a model is in weights that were trained for these classes."""
    mine, theirs = model.state_dict(), weights.state_dict()
    fits = mine.keys() == theirs.keys() and all(mine[name].shape == theirs[name].shape for name in mine)
    return fits and [str(name) for name in dict(weights.names).values()] == [str(name) for name in names.values()]


def on_first_rank(look: Callable[[], T]) -> T:
    """What the first process finds, in all of them, which wait as long as it takes; so is its error."""
    with patient():
        found: Any = None
        if RANK in {-1, 0}:
            try:
                found = look(), None
            except (OSError, TypeError, ValueError, RuntimeError) as error:
                found = None, error
        value, problem = from_first_rank(found)
    if problem is not None:
        raise problem
    result: T = value
    return result


def _is_ours(column: str) -> bool:
    return column == ROBUST or column.partition("/")[2].startswith("adv_")


def widened(path: Path, columns: Iterable[str]) -> list[str]:
    """Makes room for columns in results.csv, where there is one; returns those of ours that it has then.

    Rows that are there have no value in a new column. Those of earlier releases get the names that they have today.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    names = [_OLD_COLUMNS.get(name, name) for name in head]
    new = [name for name in columns if name not in names]
    if new or names != head:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [[*names, *new], *([*row, *["nan"] * len(new)] for row in rows)]
        )
        write_whole(path, text.getvalue())
    return [name for name in [*names, *new] if _is_ours(name)]


def _sentence(summary: Mapping[str, Any]) -> str:
    """What a run is, for the log."""
    text = f"{summary['method']}, {summary['attacked_epochs']} of {summary['epochs']} epochs under attack"
    text += ingredients_of(summary)
    if summary["thresholds_from"] is None:
        return text
    return f"{text}; thresholds {summary['thresholds'] or 'to come'}, {summary['thresholds_from']}"


def _log(line: str) -> None:
    if RANK in {-1, 0}:
        if line.startswith("WARNING: "):
            LOGGER.warning(line.removeprefix("WARNING: "))
        else:
            LOGGER.info(f"{colorstr('advmed:')} {line}")
