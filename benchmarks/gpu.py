"""The trainers of every host on a GPU, a few steps each: whether they run there, and what a step costs.

    python benchmarks/gpu.py [--minutes 9] [--only nnunet yolo classify landmark] [--json build/gpu.json]

One command for a machine with one GPU, from a checkout of this repository (installed or not) with the extras nnunet,
yolo, classify and landmark. Nothing is downloaded; the data is that in examples/data. Each host trains under its own
mixed precision, with its gradient scaler, by its own trainer: nnU-Net 2D and 3D, as it is and compiled, YOLOv8n, a
classifier and a landmark U-Net; STD, SAT, AMAT and DPAAT with the default preset, on samples that were met before, and
where time is left the other methods, and SAT with perturbed weights. Of
each training there are:

- the time of a step, synchronised, the median of a few after the first; also over that of STD's;
- the passes it is made of, a training pass and n input-gradient passes less those that are shared, measured in the
  same training, and the step over their sum (what is left is the method, the optimizer and the host);
- the most memory that a step adds to what was held before it, also over STD's;
- kernels launched in a step, in each attack step, and in the bare input-gradient pass of one;
- how often the host waits for the GPU in a step (what torch's sync debug mode tells of);
- optimizer steps skipped by the scaler, attack steps lost to gradients that were not finite, and whether losses and
  weights are finite.

A part that fails does not stop the others; its traceback is shown, and the exit code is 1. Every part has its share of
the time, and what is left undone then is named. ``--device cpu`` tries the same on small networks: bfloat16 for
float16, no scaler, operators of ATen for kernels, and ``--backend aot_eager`` for the compiler.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

# This checkout, where it is not installed.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(2, str(Path(__file__).resolve().parents[1] / "common"))

import torch
import yaml
from timing import PeakMemory
from torch import Tensor, nn

from advmed.guard import preserved
from advmed.methods import AdversarialMethod
from advmed.objective import Objective, inspecting, model_of, training_pass
from advmed.thresholds import Thresholds
from advmed.training.run import MethodRun

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
METHODS = ("STD", "SAT", "AMAT", "DPAAT")
OTHERS = ("SAT, awp", "AT", "FAT", "TRADES", "MART")
"""What comes last where there is time: adversarial weight perturbation, and the other methods."""
MORE = 2
"""Attack steps that are added to see what one of them launches."""
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel")
SHARES = {"yolo": 2.0, "classify": 1.5, "landmark": 2.0, "nnunet": 4.5}
"""The parts in their order, and their shares of the time; what one leaves over the next ones have."""
RESERVE = 15
"""Seconds for the end."""


# What is measured of a training


@dataclass
class Found:
    """What was seen of the steps of one training; None: not to be had."""

    steps: int = 0
    step_ms: float | None = None
    passes_ms: float | None = None
    forward_ms: float | None = None
    input_gradient_ms: float | None = None
    training_pass_ms: float | None = None
    peak_mib: float | None = None
    launches: int | None = None
    launches_per_attack_step: float | None = None
    launches_of_a_pass: int | None = None
    waits: int | None = None
    waiting: dict[str, int] = field(default_factory=dict)
    skipped: int | None = None
    lost: int | None = None
    finite: bool = False
    attack_steps: int | None = None
    first_step_s: float | None = None
    graphs: int | None = None
    graphs_late: int | None = None


class Meter:
    """Looks at the steps of a training, one thing in each.

    A host calls :meth:`watch` once, then :meth:`begin` and :meth:`end` around every step until :meth:`end` says that
    all was seen.

    Args:
        device: of the training.
        warm: steps that come first, in which every sample is met.
        repeats: steps whose time is taken.
        compiled: whether the network is.
    """

    def __init__(self, device: torch.device, warm: int, repeats: int, compiled: bool = False) -> None:
        self.device, self.compiled, self.cuda = device, compiled, device.type == "cuda"
        self.plan = ["warm"] * warm + ["time"] * repeats
        self.plan += ["memory", *(["waits"] if self.cuda else []), "launches", "more", "passes"]
        self.found = Found()
        self._method: Any = None
        self._moves = False
        self._seconds: list[float] = []
        self._held = ExitStack()
        self._losses: list[Any] = []
        self._lost: list[Tensor] = []
        self._scales: list[Any] = []
        self._graphs = 0

    @property
    def now(self) -> str:
        return self.plan[self.found.steps] if self.found.steps < len(self.plan) else ""

    def watch(self, run: MethodRun | None, scaler: Any) -> None:
        """Looks into the steps of a method, if there is one, and at the scaler, if it does anything."""
        if run is not None:
            self._method, self._moves, own = run.method, run.moves_weights, run.step

            def step(objective: Objective, images: Tensor, ids: Sequence[str], backward: Any = None) -> Any:
                if self.now == "passes":
                    self._measure_passes(objective, images)
                made = own(objective, images, ids, backward)
                if "nonfinite" in made.logs:
                    self._lost.append(made.logs["nonfinite"])
                return made

            run.step = step  # type: ignore[method-assign]  # a recorder around it
        if scaler is not None and scaler.is_enabled():
            update = scaler.update
            self._scales.append(float(scaler.get_scale()))

            def updated(*arguments: Any, **named: Any) -> None:
                update(*arguments, **named)
                self._scales.append(scaler._scale.clone())

            scaler.update = updated

    def begin(self) -> None:
        self._wait()
        if self.now == "memory":
            self._peak = self._held.enter_context(PeakMemory(self.device))
        elif self.now == "waits":
            self._caught = self._held.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self._held.callback(torch.cuda.set_sync_debug_mode, "default")
        elif self.now in ("launches", "more"):
            if self.now == "more" and isinstance(self._method, AdversarialMethod):
                usual = self._method.attack
                self._method.attack = replace(usual, steps=usual.steps + MORE)
                self._held.callback(setattr, self._method, "attack", usual)
            self._profile = self._held.enter_context(profiler(self.device))
        elif self.compiled and self.now == "time" and self.plan[self.found.steps - 1] == "warm":
            self._graphs = graphs()
        self._start = clock(self.device)

    def end(self, loss: Any) -> bool:
        """Whether everything was seen."""
        kind = self.now
        if kind == "waits":
            self._held.close()  # what follows is no wait of the host's
        self._wait()
        seconds = clock(self.device) - self._start
        self._held.close()
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if self.found.steps == 0:
            self.found.first_step_s = seconds
        if kind == "time":
            self._seconds.append(seconds)
        elif kind == "memory":
            self.found.peak_mib = self._peak.bytes / 2**20
        elif kind == "waits":
            told = [w for w in self._caught if "synchronizing CUDA operation" in str(w.message)]
            places = Counter(f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}" for w in told)
            self.found.waits, self.found.waiting = len(told), dict(places.most_common(8))
        elif kind == "launches":
            self.found.launches = launches(self._profile, self.device)
        elif kind == "more" and isinstance(self._method, AdversarialMethod):
            more = launches(self._profile, self.device)
            if more is not None and self.found.launches is not None:
                self.found.launches_per_attack_step = (more - self.found.launches) / MORE
        if self.compiled and kind == "time":
            self.found.graphs, self.found.graphs_late = graphs(), graphs() - self._graphs
        self.found.steps += 1
        return self.found.steps >= len(self.plan)

    def close(self, network: nn.Module) -> Found:
        """What was found; to be called at the end."""
        found, method = self.found, self._method
        if self._seconds:
            found.step_ms = 1000 * statistics.median(self._seconds)
        losses = [bool(torch.as_tensor(loss).isfinite().all()) for loss in self._losses]
        weights = [bool(weight.isfinite().all()) for weight in network.parameters()]
        found.finite = all(losses) and all(weights)
        if self._lost:
            found.lost = int(torch.stack([lost.cpu() for lost in self._lost]).sum())
        if self._scales:
            scales = [float(scale) for scale in self._scales]
            found.skipped = sum(after < before for before, after in itertools.pairwise(scales))
        training, gradient = found.training_pass_ms, found.input_gradient_ms
        if method is not None and training is not None:
            found.passes_ms = training
            if isinstance(method, AdversarialMethod) and gradient is not None:
                found.attack_steps = method.attack.steps
                shared = method.shared if method.learns_from_clean and method.clean_gradients is not None else 0
                found.passes_ms = training * (2 if method.learns_from_clean else 1) + gradient * found.attack_steps
                found.passes_ms += 2 * training if self._moves else 0.0
                found.passes_ms -= {0: 0.0, 1: found.forward_ms or 0.0, 2: gradient}[shared]
        return found

    def release(self) -> None:
        """Undoes what a step that has failed left behind."""
        self._held.close()

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def _measure_passes(self, objective: Objective, images: Tensor) -> None:
        """A forward pass, one with the gradient of the images, and one with those of the weights."""
        model, clean = model_of(objective), images.detach().clone()
        assert model is not None
        plainly = partial(torch.autocast, self.device.type, enabled=False)  # of backward passes

        def forward() -> None:
            objective(clean)

        def gradient() -> None:
            inputs = clean.detach().requires_grad_()
            loss = objective(inputs).sum()
            with plainly():
                torch.autograd.grad(loss, inputs)

        def training() -> None:
            loss, _ = training_pass(objective, clean)
            with plainly():
                loss.backward()
            model.zero_grad(set_to_none=True)

        if isinstance(self._method, AdversarialMethod):
            with preserved(model):
                self.found.input_gradient_ms = self._median(gradient)
                with profiler(self.device) as profile:
                    gradient()
                    self._wait()
                self.found.launches_of_a_pass = launches(profile, self.device)
            if not self.compiled or self._method.shared == 1:  # one more graph to compile
                with inspecting(objective):
                    self.found.forward_ms = self._median(forward)
        self.found.training_pass_ms = self._median(training)

    def _median(self, part: Callable[[], None], repeats: int = 5) -> float:
        seconds = []
        for repeat in range((repeats if self.cuda else 2) + 2):
            self._wait()
            start = clock(self.device)
            part()
            self._wait()
            if repeat > 1:
                seconds.append(clock(self.device) - start)
        return 1000 * statistics.median(seconds)


def read(method: str) -> tuple[str, dict[str, Any]]:
    """A method's name, and its settings beside the defaults."""
    name, _, awp = method.partition(", ")
    return name, {"awp": 0.005} if awp else {}


def clock(device: torch.device) -> float:
    """On a CPU the processor's time, so that other programs on the machine do not count."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def profiler(device: torch.device) -> Any:
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if device.type == "cuda" else [])])


def launches(profile: Any, device: torch.device) -> int | None:
    """Kernels that were launched; on a CPU the operators that no other has called. None: the profiler saw nothing."""
    if device.type != "cuda":
        return sum(
            event.name.startswith("aten::") and not any(parent.name.startswith("aten::") for parent in above(event))
            for event in profile.events()
        )
    events = profile.profiler.kineto_results.events()
    number = sum(event.name().startswith(LAUNCHES) for event in events)
    if not number:
        cuda = torch.autograd.DeviceType.CUDA
        number = sum(event.device_type() == cuda and not event.name().startswith("Mem") for event in events)
    return number or None


def above(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def graphs() -> int:
    """Graphs that were compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


# The hosts


@dataclass
class Bench:
    """Where and how a part runs."""

    device: torch.device
    work: Path
    until: float
    backend: str

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def thresholds(self, names: Sequence[str], *values: float) -> str:
        """A file of thresholds, with which AMAT needs no warm-up."""
        path = self.work / "thresholds.json"
        Thresholds(values, tuple(names)).save(path)
        return str(path)

    def meter(self, met_after: int, compiled: bool = False) -> Meter:
        return Meter(self.device, max(3, met_after + 1), 7 if self.cuda else 2, compiled)


@dataclass
class Case:
    """A training to be looked at; ``run`` takes a meter, feeds it, and returns the network."""

    setting: str
    method: str
    meter: Meter
    run: Callable[[Meter], nn.Module]


def nnunet(bench: Bench) -> Iterator[Case]:
    """nnU-Net's own plans (smaller ones on a CPU) for the hippocampus, and its augmentation; two batches in turns."""
    variables = {name: str(bench.work / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")}
    os.environ |= {f"nnUNet_{name}": folder for name, folder in variables.items()}
    os.environ |= {"nnUNet_compile": "t", "nnUNet_def_n_proc": "2", "nnUNet_n_proc_DA": "1"}
    os.environ.pop("nnUNet_adversarial", None)
    name = "Dataset004_Hippocampus"
    if find_spec("SimpleITK") is None:  # a large package, which the host imports to read files; nibabel reads them, too
        sys.modules["SimpleITK"] = ModuleType("SimpleITK")
    plans = prepare(bench, name)
    os.environ["nnUNet_n_proc_DA"] = "0"  # batches are made in this process (while plans are made, 0 is no choice)

    from adv_nnunet import trainer as trainers

    folder = bench.work / "nnUNet_preprocessed" / name
    thresholds = bench.thresholds(("ce+dice",), 0.5)

    def make(method: str, configuration: str, compiled: bool, batches: Any) -> Any:
        """A trainer in the first epoch, as nnUNetv2_train makes it."""
        path = bench.work / "adversarial.yaml"
        name, own = read(method)
        tag = f"{configuration}-{'compiled' if compiled else 'plain'}".replace("_", "-")
        path.write_text(
            f"thresholds: {thresholds}\ncheck_standard: false\ncheck_data: false\nstart_from: scratch\nseed: 0\n"
            f"overwrite: true\ncompile: {str(compiled).lower()}\ntag: {tag}\n{yaml.safe_dump(own) if own else ''}"
        )
        os.environ["nnUNet_adversarial"] = str(path)
        content = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": False}
        description = json.loads((folder / "dataset.json").read_text())
        kind = trainers.TRAINERS[name]
        made: Any = kind(content, configuration, 0, description, bench.device)
        if batches is not None:
            made.get_dataloaders = lambda: (iter(()), iter(()))
        if not bench.cuda:  # the host has no mixed precision there, and compiles nothing
            made.autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
            made._do_i_compile = lambda: compiled
        with patch.object(torch, "compile", partial(torch.compile, backend=bench.backend)):
            made.on_train_start()
        made.on_train_epoch_start()
        return made

    @cache
    def batches(configuration: str) -> list[dict[str, Any]]:
        """Of the method that has an id for each sample, for all of them."""
        loader = make("AMAT", configuration, False, None).dataloader_train
        return [next(loader) for _ in range(2)]

    def train(method: str, configuration: str, compiled: bool, meter: Meter) -> nn.Module:
        given = batches(configuration)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = make(method, configuration, compiled, given)
        meter.watch(trainer.run, trainer.grad_scaler)
        for batch in itertools.cycle(given):
            meter.begin()
            if meter.end(trainer.train_step(dict(batch))["loss"]):
                break
        return trainer.network

    plain = itertools.product((False,), ("2d", "3d_fullres"), METHODS)
    late = [(True, kind, method) for method in ("STD", "AMAT", "SAT", "DPAAT") for kind in ("2d", "3d_fullres")]
    others = itertools.product((False,), ("2d",), OTHERS)
    for compiled, configuration, method in (
        *plain,
        *late,
        *others,
    ):  # compiling takes long: what matters most comes first
        setting = f"nnU-Net {configuration}{', compiled' if compiled else ''}"
        yield Case(setting, method, bench.meter(2, compiled), partial(train, method, configuration, compiled))


def prepare(bench: Bench, name: str) -> str:
    """What nnUNetv2_plan_and_preprocess does with some of the cases, in threads of this process; the plans' name."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    raw, folder = bench.work / "nnUNet_raw" / name, bench.work / "nnUNet_preprocessed" / name
    number = 24 if bench.cuda else 6
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (DATA / name / "labelsTr").glob("*.nii.gz"))[:number]
    for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (raw / part).mkdir(parents=True)
        for case in cases:
            shutil.copy(DATA / name / part / f"{case}{ending}", raw / part)
    content = json.loads((DATA / name / "dataset.json").read_text()) | {"numTraining": len(cases)}
    content["overwrite_image_reader_writer"] = "NibabelIO"
    (raw / "dataset.json").write_text(json.dumps(content))
    own = multiprocessing.get_context
    with patch.object(multiprocessing, "get_context", lambda kind=None: Threads if kind == "spawn" else own(kind)):
        extract_fingerprints([4], num_processes=2, verbose=False, show_progress_bar=False)
        plan_experiments([4])
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        if not bench.cuda:
            for configuration in (plans["configurations"][kind] for kind in ("2d", "3d_fullres")):
                configuration["batch_size"] = 2
                network = configuration["architecture"]["arch_kwargs"]
                network["features_per_stage"] = [4, *[8] * (network["n_stages"] - 1)]
        plans["plans_name"] = "gpu"
        (folder / "gpu.json").write_text(json.dumps(plans))
        shutil.copytree(raw / "labelsTr", folder / "gt_segmentations", dirs_exist_ok=True)
        for kind in ("2d", "3d_fullres"):
            DefaultPreprocessor(verbose=False).run(4, kind, "gpu", num_processes=2)
    held_out = max(2, len(cases) // 6)
    split = [{"train": cases[held_out:], "val": cases[:held_out]}]
    (folder / "splits_final.json").write_text(json.dumps(split))
    return "gpu"


class Threads:
    """In place of the "spawn" context: its processes would import torch first, each for seconds."""

    Pool = staticmethod(lambda processes=1, *args, **named: ThreadPool(max(1, processes), *args, **named))


class Seen(Exception):
    """Ends a training."""


def yolo(bench: Bench) -> Iterator[Case]:
    """YOLOv8n from scratch on two batches of blood cells, in the host's own loop."""
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    os.environ["YOLO_CONFIG_DIR"] = str(bench.work / "ultralytics")
    (bench.work / "ultralytics").mkdir()

    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.utils.torch_utils import unwrap_model

    from adv_yolo.trainer import TRAINERS

    size, batch = (640, 16) if bench.cuda else (96, 2)
    cells = bench.work / "cells"  # a copy, beside which the host may write
    names = [Path(line).stem for line in (DATA / "bccd" / "train.txt").read_text().split()][: 2 * batch]
    for part, ending in (("images", ".jpg"), ("labels", ".txt")):
        (cells / part).mkdir(parents=True)
        for name in names:
            shutil.copy(DATA / "bccd" / part / f"{name}{ending}", cells / part)
    for split in ("train", "val"):
        (cells / f"{split}.txt").write_text("".join(f"./images/{name}.jpg\n" for name in names))
    shutil.copy(DATA / "bccd" / "bccd.yaml", cells)
    thresholds = bench.thresholds(("box_loss", "cls_loss", "dfl_loss"), 5.0, 5.0, 5.0)
    arguments: dict[str, Any] = {
        "model": "yolov8n.yaml",
        "data": str(cells / "bccd.yaml"),
        "imgsz": size,
        "batch": batch,
        "nbs": batch,  # an optimizer step for every batch
        "epochs": 1000,
        "device": "0" if bench.cuda else "cpu",
        "amp": bench.cuda,
        "optimizer": "SGD",
        "lr0": 0.001,
        "warmup_epochs": 0,
        "mosaic": 0.0,
        "workers": 0,
        "project": str(bench.work / "runs"),
        "exist_ok": True,
        **dict.fromkeys(("val", "save", "plots", "pretrained"), False),
    }

    # The host would download a model to try mixed precision with, and a font; on a CPU it has no mixed precision.
    changed = {"engine.trainer.check_amp": lambda model: True, "data.utils.check_font": lambda name: None}
    if not bench.cuda:
        changed["engine.trainer.autocast"] = lambda enabled, device: torch.autocast("cpu", torch.bfloat16)

    def train(method: str, meter: Meter) -> nn.Module:
        with ExitStack() as held:
            for name, function in changed.items():
                held.enter_context(patch(f"ultralytics.{name}", function))
            return looked_at(method, meter)

    def looked_at(method: str, meter: Meter) -> nn.Module:
        if method == "STD":
            trainer = DetectionTrainer(overrides=arguments | {"name": method})
        else:
            kind, own = read(method)
            own |= {"thresholds": thresholds} if kind in ("AMAT", "FAT") else {}
            trainer = TRAINERS[kind.lower()](overrides=arguments | {"name": method} | own)

        def watch(host: Any) -> None:
            meter.watch(getattr(host, "run", None), host.scaler)

        def look(host: Any) -> None:
            if meter.end(host.loss):
                raise Seen

        trainer.add_callback("on_train_start", watch)
        trainer.add_callback("on_train_batch_start", lambda host: meter.begin())
        trainer.add_callback("on_train_batch_end", look)
        try:
            trainer.train()
        except Seen:
            return unwrap_model(trainer.model)
        raise RuntimeError(f"the training ended after {meter.found.steps} steps")

    for method in (*METHODS, *OTHERS):
        yield Case(f"YOLOv8n {size}, batch {batch}", method, bench.meter(2), partial(train, method))


def classify(bench: Bench) -> Iterator[Case]:
    """ResNet-18 on chest X-rays, in a Trainer of Lightning."""
    from adv_classify import ClassificationObjective, MethodOptions, Network, RobustClassifier
    from adv_classify.data import MedMNIST

    size, batch = (224, 64) if bench.cuda else (28, 4)
    file = str(DATA / "pneumoniamnist" / "pneumoniamnist.npz")
    thresholds = bench.thresholds(ClassificationObjective.names, 0.5)

    def make(method: str) -> tuple[Any, Any]:
        data = fewer(MedMNIST(file, size=size, channels=3, batch_size=batch, workers=0), 4)
        name, own = read(method)
        options = MethodOptions(name=name, thresholds=thresholds, **own)
        network = Network(name="resnet18" if bench.cuda else "resnet10t")
        return RobustClassifier(network, options, num_classes=data.num_classes, channels=3), data

    yield from lightning(bench, f"ResNet {size}, batch {batch}", make)


def landmark(bench: Bench) -> Iterator[Case]:
    """The landmark U-Net on MRI slices, in a Trainer of Lightning."""
    from adv_landmark import LandmarkObjective, MethodOptions, Network, RobustLandmarks
    from adv_landmark.data import LandmarkTable

    size, batch = (256, 16) if bench.cuda else (64, 2)
    root = str(DATA / "hippocampus_landmarks")
    thresholds = bench.thresholds(LandmarkObjective.names, 1.0, 1.0, 1.0)

    def make(method: str) -> tuple[Any, Any]:
        table = LandmarkTable(root, spacing=1.0, size=size, channels=3, batch_size=batch, workers=0)
        data = fewer(table, 4)
        name, more = read(method)
        options = MethodOptions(name=name, thresholds=thresholds, **more)
        own: dict[str, Any] = {} if bench.cuda else {"encoder": "resnet18"}
        if not bench.cuda:
            own["decoder_channels"] = (16, 8, 8, 8, 8)
        model = RobustLandmarks(
            Network(**own), options, landmark_names=data.landmark_names, channels=3, size=data.size, unit="mm"
        )
        return model, data

    yield from lightning(bench, f"landmark U-Net {size}, batch {batch}", make)


def fewer(data: Any, batches: int) -> Any:
    """The data with as many training samples as make so many batches: each is soon met a second time."""
    samples, number = data.splits["train"], batches * data.batch_size
    # what has an entry for each sample, and nothing else
    parts = {f.name: getattr(samples, f.name) for f in fields(samples)}
    own = {name: value[:number] for name, value in parts.items() if value is not None and len(value) == len(samples)}
    data.splits = dict(data.splits) | {"train": replace(samples, **own)}
    return data


def lightning(bench: Bench, setting: str, make: Callable[[str], tuple[Any, Any]]) -> Iterator[Case]:
    from lightning.pytorch import Callback, Trainer, seed_everything

    class Look(Callback):
        def __init__(self, meter: Meter) -> None:
            self.meter, self.over = meter, False

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.meter.watch(pl_module.run, getattr(trainer.precision_plugin, "scaler", None))

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not self.over:
                self.meter.begin()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not self.over:
                self.over = trainer.should_stop = self.meter.end(outputs["loss"])

    def train(method: str, precision: Any, meter: Meter) -> nn.Module:
        seed_everything(0)
        model, data = make(method)
        trainer = Trainer(
            accelerator="gpu" if bench.cuda else "cpu",
            devices=1,
            precision=precision,
            max_epochs=1000,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=bench.work / "lightning",
            callbacks=[Look(meter)],
        )
        trainer.fit(model, datamodule=data)
        if meter.now:
            raise RuntimeError(f"the training ended after {meter.found.steps} steps")
        return model

    for precision, methods in (("16-mixed", METHODS), ("bf16-mixed", METHODS), ("16-mixed", OTHERS)):
        for method in methods:
            yield Case(f"{setting}, {precision}", method, bench.meter(4), partial(train, method, precision))


PARTS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "yolo": yolo,
    "classify": classify,
    "landmark": landmark,
    "nnunet": nnunet,
}


# A part in a process of its own


def run_part(name: str, bench: Bench, record: Path) -> None:
    """Writes a line of JSON for every training as soon as it is over."""

    def write(content: dict[str, Any]) -> None:
        with record.open("a") as file:
            file.write(json.dumps({"part": name, **content}) + "\n")

    last: dict[bool, float] = {}
    try:
        for case in PARTS[name](bench):
            label = {"setting": case.setting, "method": case.method}
            kind = case.meter.compiled
            left = bench.until - time.time()
            if left < max(5.0, 1.5 * last.get(kind, 0.0)):
                write({**label, "undone": f"{max(0, round(left))} s were left"})
                continue
            start = time.monotonic()
            try:
                network = case.run(case.meter)
                write({**label, **asdict(case.meter.close(network)), "seconds": round(time.monotonic() - start, 1)})
                del network
            except Exception:
                case.meter.release()
                write({**label, "steps": case.meter.found.steps, "error": traceback.format_exc()})
            last[kind] = time.monotonic() - start
            del case
            gc.collect()
            if bench.cuda:
                torch.cuda.empty_cache()
    except Exception:
        write({"setting": name, "method": "", "error": traceback.format_exc()})


def watch_part(
    name: str, options: argparse.Namespace, work: Path, until: float, told: set[str]
) -> list[dict[str, Any]]:
    """Runs a part until its time is over, and says what it finds as it finds it."""
    record, log, folder = work / f"{name}.jsonl", work / f"{name}.log", work / name
    record.touch()
    folder.mkdir()
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--work", str(folder)]
    command += ["--until", str(until), "--record", str(record), "--device", options.device]
    command += ["--backend", options.backend]
    found: list[dict[str, Any]] = []
    with log.open("w") as out, record.open() as lines:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"MPLBACKEND": "Agg"},
        )
        killed = False
        try:
            while True:
                over = process.poll() is not None
                for line in lines:
                    found.append(json.loads(line))
                    say(found[-1], told)
                if over:
                    break
                if time.time() > until + 5 and not killed:
                    stop(process)
                    killed = True
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                stop(process)
    if killed or process.returncode:
        what = "was stopped, its time was over" if killed else f"ended with exit code {process.returncode}"
        tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:])
        found.append(
            {"part": name, "setting": name, "method": "", "error": f"The part {what}. Its last lines:\n{tail}"}
        )
        say(found[-1], told)
    return found


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a part: its own session, with all that it has started."""
    os.killpg(process.pid, signal.SIGKILL)


def say(record: dict[str, Any], told: set[str]) -> None:
    """One line; and the traceback of an error that was not ``told`` before."""
    label = f"{record['setting']} {record['method']}".strip()
    if "error" in record:
        error = record["error"].rstrip()
        cause = error.rpartition("\n")[2]
        print(f"{label}: FAILED\n{'... ' + cause if cause in told else error}\n", flush=True)
        told.add(cause)
    elif "undone" in record:
        print(f"{label}: not done, {record['undone']}", flush=True)
    else:
        print(f"{label}: {record['step_ms']:.1f} ms a step ({record['seconds']:.0f} s in all)", flush=True)


# The report


COLUMNS = (
    "training",
    "method",
    "step ms",
    "/ STD",
    "passes ms",
    "step / passes",
    "peak MiB",
    "/ STD",
    "launches",
    "in an attack step",
    "in its pass",
    "waits",
    "skipped",
    "lost",
    "finite",
)


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """The measurements as a table in Markdown."""
    measured = [record for record in records if "step_ms" in record]
    standard = {record["setting"]: record for record in measured if record["method"] == "STD"}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for record in measured:
        base = standard.get(record["setting"], {})
        cells = [
            record["setting"],
            record["method"],
            number(record["step_ms"], 1),
            number(over(record["step_ms"], base.get("step_ms")), 2),
            number(record["passes_ms"], 1),
            number(over(record["step_ms"], record["passes_ms"]), 2),
            number(record["peak_mib"], 1),
            number(over(record["peak_mib"], base.get("peak_mib")), 2),
            number(record["launches"], 0),
            number(record["launches_per_attack_step"], 0),
            number(record["launches_of_a_pass"], 0),
            number(record["waits"], 0),
            number(record["skipped"], 0),
            number(record["lost"], 0),
            "yes" if record["finite"] else "NO",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def over(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def number(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def remarks(records: Sequence[dict[str, Any]]) -> list[str]:
    """What is not in the table: where the host waits, what was compiled late, what failed or was not done."""
    lines = []
    for part in PARTS:
        waiting: Counter[str] = Counter()
        for record in records:
            if record["part"] == part and record["method"] == "AMAT":
                waiting.update(record.get("waiting", {}))
        if waiting:
            places = ", ".join(f"{place} ({count})" for place, count in waiting.most_common(8))
            lines.append(f"{part}, waits in all AMAT steps seen: {places}")
    for record in records:
        label = f"{record['setting']} {record['method']}".strip()
        if record.get("graphs_late"):
            lines.append(f"{label}: {record['graphs_late']} of {record['graphs']} graphs were compiled while timed")
        if "error" in record:
            reason = record["error"].rstrip().splitlines()
            lines.append(f"FAILED: {label}: {(reason[-1] if reason else '')[:200]}")
    undone = [f"{record['setting']} {record['method']}" for record in records if "undone" in record]
    return [*lines, f"not done for want of time: {', '.join(undone)}"] if undone else lines


def described(device: torch.device) -> dict[str, Any]:
    """The machine and what runs on it."""
    from importlib.metadata import PackageNotFoundError, version

    def known(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    packages = ("numpy", "nnunetv2", "ultralytics", "lightning", "timm", "segmentation-models-pytorch")
    card = platform.processor() or platform.machine()
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    return {
        "device": card,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: known(name) for name in packages},
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--json", type=Path, default=Path("build/gpu.json"))
    parser.add_argument("--backend", default=None, help="of torch.compile (default: inductor; on a CPU aot_eager)")
    # What a part is called with:
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.backend = options.backend or ("inductor" if options.device == "cuda" else "aot_eager")
    if options.part:
        device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        run_part(options.part, Bench(device, options.work, options.until, options.backend), options.record)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here that torch can use; --device cpu tries the same on small networks")

    start = time.time()
    end = start + 60 * options.minutes - RESERVE
    facts = described(torch.device(options.device))
    records: list[dict[str, Any]] = []
    told: set[str] = set()
    waiting = [name for name in SHARES if name in options.only]
    with tempfile.TemporaryDirectory(prefix="advmed-gpu-", ignore_cleanup_errors=True) as work:
        while waiting:
            share = SHARES[waiting[0]] / sum(SHARES[name] for name in waiting)
            name = waiting.pop(0)
            until = time.time() + share * (end - time.time())
            records += watch_part(name, options, Path(work), until, told)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({**facts, "records": records}, indent=1) + "\n")
    title = f"{facts['device']}, torch {facts['torch']}, CUDA {facts['cuda']}, Python {facts['python']}, "
    title += ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    print("\n".join(["", title, "", *table(records), "", *remarks(records)]))
    failed = sum("error" in record for record in records)
    broken = sum(not record["finite"] for record in records if "step_ms" in record)
    print(f"{time.time() - start:.0f} s; {failed} failed, {broken} not finite; all numbers in {options.json}")
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
