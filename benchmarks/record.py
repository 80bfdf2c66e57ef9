"""Records what the core computes, bit for bit, so that a new structure of the code can be shown to change no number.

    python benchmarks/record.py write FILE.json      before the change
    python benchmarks/record.py compare FILE.json    after it: exit status 1 if a case differs or is missing

Both take --only REGEX, for some of the cases. A case is a small computation with fixed seeds on one thread; its parts
are tensors, texts and files. The file holds the SHA-256 of every case and, of each part, type, shape, the begin of its
own SHA-256 and its sum in float64 to read. Equal bits need the same machine and the same libraries.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

# Before the hosts are imported: the user's settings stay as they are, and nothing asks the network.
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="record-")
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["YOLO_VERBOSE"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from matplotlib.figure import Figure
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import IterableSimpleNamespace

# All that this script knows of the project's modules and names; a change of structure touches these lines alone.
from adv_classify.evaluate import accuracy, balanced_accuracy, correct, mean_ap
from adv_classify.evaluate import parse as parse_classify_attacks
from adv_classify.objective import ClassificationObjective
from adv_landmark.maps import decode, encode, split_maps
from adv_landmark.objective import LandmarkObjective
from adv_nnunet.evaluate import InferenceObjective
from adv_nnunet.objective import SampleTerms, SegmentationObjective, inference_loss
from adv_yolo.objective import DetectionObjective, ImageTerms, per_image_losses
from advmed.attacks import APGD, PGD, CosineWeighted, Margin, Noise, SquareAttack, ifgsm, parse_attacks, pgd
from advmed.attacks.losses import margin as margin_of
from advmed.distances import bernoulli_divergence, sigmoid_divergence, softmax_divergence
from advmed.evaluation.auc import auc_robust, auc_robust_of_curves
from advmed.evaluation.checks import check, level_to_check, probes, strongest
from advmed.evaluation.dice import (
    Counts,
    adi,
    confusion_counts,
    dice_per_class,
    dice_per_sample,
    region_confusion_counts,
    tvdi,
)
from advmed.evaluation.intervals import interval, resamples, seed_of
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch, at_levels, evaluate
from advmed.evaluation.metric import Metric
from advmed.margins import MarginStore
from advmed.methods import AMAT, AT, DPAAT, SAT, STD, TRADES
from advmed.norms import norm as norm_of
from advmed.norms import project, random_in_ball, steepest
from advmed.objective import ClassScores
from advmed.report import Entry, findings, format_table, tabulate, write_report
from advmed.thresholds import RunningThresholds, TermStatistics, Thresholds
from advmed.training.run import MethodRun, self_calibrated
from advmed.training.settings import TrainingSettings


class MarginAttack:
    """PGD on the margin of the logits."""

    def __new__(cls, *, targets: int, **settings: Any) -> Any:
        """The attack."""
        return PGD(**settings, loss=Margin(targets))


Parts = Mapping[str, Any]
Case = tuple[str, Callable[[], Parts]]

FORMAT = "advmed.record/1"
SCRATCH = os.environ["YOLO_CONFIG_DIR"]  # a folder of this run's own
NORMS = {"L2": 2.0, "Linf": math.inf}
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
SPACES = {1: (12,), 2: (8, 7), 3: (6, 5, 4)}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
LEVELS = (0.0, 0.3, 0.6, 1.2)


# What all cases share


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Drawn in float64, so that every dtype has the same numbers."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def laid_out(images: Tensor, last: bool) -> Tensor:
    return images.contiguous(memory_format=LAST[images.ndim - 2]) if last else images


def gradients(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value.sum(), leaves))


def network(space: int = 2, *, channels: int = 3, classes: int = 4, noisy: bool = False) -> nn.Sequential:
    """A small classifier of 1D, 2D or 3D images; noisy: with BatchNorm and dropout."""
    convolution, norm, pool, drop = (
        getattr(nn, f"{name}{space}d") for name in ("Conv", "BatchNorm", "AdaptiveAvgPool", "Dropout")
    )
    with torch.random.fork_rng():
        torch.manual_seed(space)
        return nn.Sequential(
            convolution(channels, 6, 3, padding=1),
            norm(6) if noisy else nn.Identity(),
            nn.Tanh(),
            drop(0.2) if noisy else nn.Identity(),
            convolution(6, 8, 3, stride=2),
            nn.Tanh(),
            pool(2),
            nn.Flatten(),
            nn.Linear(8 * 2**space, classes),
        )


class Classifier:
    """Cross-entropy and up to two more terms of a classifier, with a batch loss of its own, and predictions.

    Args:
        model: images to logits.
        labels: class numbers, (B,).
        count: number of terms, 1 to 3.
        scale: of the terms.
        broken: the second sample's gradient is NaN, and the third one's loss infinite.
    """

    def __init__(
        self, model: nn.Module, labels: Tensor, count: int = 1, scale: float = 1.0, broken: bool = False
    ) -> None:
        self.model, self.labels, self.count, self.scale, self.broken = model, labels, count, scale, broken
        self.names = ("ce", "sharp", "sum")[:count]

    def _terms(self, images: Tensor, logits: Tensor) -> Tensor:
        ce = F.cross_entropy(logits, self.labels, reduction="none")
        terms = torch.stack([ce, logits.square().mean(1), logits.logsumexp(1)][: self.count], 1) * self.scale
        if self.broken:
            extra = torch.zeros_like(terms)
            extra[1], extra[2] = (images[1].sum() * 0).sqrt(), math.inf
            terms = terms + extra
        return terms

    def __call__(self, images: Tensor) -> Tensor:
        return self._terms(images, self.model(images))

    def predictions(self, images: Tensor) -> Tensor:
        return self.model(images)

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.model(images)
        terms = self._terms(images, logits)
        return terms.square().sum().sqrt(), terms, logits

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss_and_predictions(images)[:2]

    def class_scores(self, predictions: Tensor) -> ClassScores:
        truth = F.one_hot(self.labels, predictions.shape[1]).to(predictions.dtype)
        return ClassScores(predictions, truth, None, exclusive=True)

    def distance(self, clean: Tensor, other: Tensor) -> Tensor:
        return softmax_divergence(clean, other)


def of_result(result: Any) -> Parts:
    """The parts of an attack's result."""
    return {name: getattr(result, name) for name in ("images", "terms", "norms", "crossing", "nonfinite")}


def of_step(step: Any) -> Parts:
    """The parts of a method's step."""
    return {"loss": step.loss, "logs": step.logs, "terms": step.terms, "images": step.adversarial}


def of_model(model: nn.Module) -> Tensor:
    """All weights and buffers."""
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


# Norms and distances


def norm_cases() -> Iterator[Case]:
    def compute(function: str, space: int, dtype: torch.dtype) -> Parts:
        parts: dict[str, Any] = {}
        radius = torch.tensor([0.0, 1.0, 0.5, 2.0, 30.0])
        for (name, p), last in itertools.product(NORMS.items(), (False, True)):
            delta = normal(5, 3, *SPACES[space], dtype=dtype)
            delta[1] = 0
            delta[2] *= 1e-4
            delta[3] *= 50
            delta = laid_out(delta, last)
            if function == "norm":
                found = [norm_of(delta, p), norm_of(delta, p, keepdim=True)]
            elif function == "project":
                found = [project(delta, r, p) for r in (0.0, 1.0, radius)]
            elif function == "steepest":
                found = [steepest(delta, p), steepest(delta, p, norm_of(delta, math.inf, keepdim=True))]
            else:
                found = [random_in_ball(delta, r, p, seeded(k)) for k, r in enumerate((1.0, radius))]
            parts[f"{name} {'channels_last' if last else 'contiguous'}"] = found
        return parts

    functions = ("norm", "project", "steepest", "random_in_ball")
    for function, space, (name, dtype) in itertools.product(functions, (2, 3), DTYPES.items()):
        yield f"{function}/{space}d {name}", partial(compute, function, space, dtype)


def distance_cases() -> Iterator[Case]:
    def compute(function: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Parts:
        clean, other = ((3 * normal(4, 5, *shape, seed=k)).to(dtype).requires_grad_() for k in (0, 1))
        value = function(clean, other)
        return {"distance": value, "gradients": gradients(value, clean, other), "same": function(clean, clean)}

    functions = (softmax_divergence, sigmoid_divergence, bernoulli_divergence)
    for function, space, (name, dtype) in itertools.product(functions, (0, 2, 3), DTYPES.items()):
        yield f"{function.__name__}/{space}d {name}", partial(compute, function, SPACES.get(space, ()), dtype)


# Attacks


@dataclass(frozen=True)
class Situation:
    """What is attacked, and under which conditions."""

    space: int = 2
    dtype: torch.dtype = torch.float32
    last: bool = False  # channels_last
    outside: bool = False  # images exceed [0, 1]
    bounds: Any = None
    per_sample: bool = False  # radii of their own, one of them 0
    count: int = 1  # loss terms
    scale: float = 1.0
    broken: bool = False
    noisy: bool = False
    training: bool = True
    bare: bool = False  # an objective that names no model
    context: Callable[[], Any] = nullcontext

    @property
    def images(self) -> Tensor:
        images = uniform(4, 3, *SPACES[self.space], seed=1)
        images = 1.6 * images - 0.3 if self.outside else images
        return laid_out(images.to(self.dtype), self.last)

    @property
    def objective(self) -> Classifier:
        model = network(self.space, noisy=self.noisy).to(self.dtype).train(self.training)
        return Classifier(model, torch.arange(4), self.count, self.scale, self.broken)

    def radius(self, p: float) -> float | Tensor:
        radius = 1.0 if p == 2 else 0.1
        return radius * torch.tensor([1.0, 0.0, 0.5, 3.0]) if self.per_sample else radius


TENSORS = (torch.tensor([0.0, 0.1, -1.0, 0.2]), torch.tensor([1.0, 0.8, 2.0, 0.9]))
SITUATIONS = {
    "plain": Situation(),
    "1d": Situation(space=1),
    "3d": Situation(space=3),
    "float64": Situation(dtype=torch.float64),
    "float16": Situation(dtype=torch.float16),
    "bfloat16": Situation(dtype=torch.bfloat16),
    "channels_last": Situation(last=True, bounds=(0.0, 1.0)),
    "channels_last_3d": Situation(space=3, last=True),
    "bounds": Situation(bounds=(0.0, 1.0)),
    "bounds, images outside": Situation(bounds=(0.0, 1.0), outside=True),
    "bounds of the sample": Situation(bounds="sample", outside=True),
    "bounds as tensors": Situation(bounds=TENSORS),
    "radius per sample": Situation(per_sample=True, bounds=(0.0, 1.0)),
    "three terms": Situation(count=3),
    "three terms, float16, steep": Situation(count=3, dtype=torch.float16, scale=2000.0, bounds=(0.0, 1.0)),
    "noisy model": Situation(noisy=True),
    "noisy model, evaluation mode": Situation(noisy=True, training=False),
    "noisy model, not named": Situation(noisy=True, bare=True),
    "autocast": Situation(context=partial(torch.autocast, "cpu", torch.bfloat16)),
    "autocast float16": Situation(context=partial(torch.autocast, "cpu", torch.float16)),
    "inference mode": Situation(context=torch.inference_mode),
    "broken gradients": Situation(broken=True, count=3),
    "everything": Situation(
        space=3,
        last=True,
        outside=True,
        bounds="sample",
        per_sample=True,
        count=3,
        noisy=True,
        context=partial(torch.autocast, "cpu", torch.bfloat16),
    ),
}


def attacked(make: Callable[[float], Callable[..., Any]], situation: Situation, **how: Any) -> Parts:
    """An attack in both norms: what it finds, and what it leaves behind in the model and in the random states."""
    parts = {}
    for name, p in NORMS.items():
        own = situation.objective
        objective = (lambda images, own=own: own(images)) if situation.bare else own
        generator = seeded(5)
        with situation.context():
            result = make(p)(
                objective, situation.images, situation.radius(p), bounds=situation.bounds, generator=generator, **how
            )
        random = {"global": torch.get_rng_state(), "generator": generator.get_state()}
        parts[name] = {**of_result(result), "buffers": dict(own.model.named_buffers()), "random": random}
    return parts


def named_attack_cases() -> Iterator[Case]:
    def make(parse: Callable[..., Any], name: str, p: float) -> Any:
        return parse([name], norm=p)[name]

    ours = ("pgd5", "pgd5x2", "apgd8", "apgd8x2", "ifgsm4", "square20", "gaussian", "uniform")
    for name, (where, situation) in itertools.product(ours, SITUATIONS.items()):
        yield f"{name}/{where}", partial(attacked, partial(make, parse_attacks, name), situation)
    for name, (where, situation) in itertools.product(("margin5", "margin5x2", "targeted5"), SITUATIONS.items()):
        if situation.space == 2 and not situation.bare and not situation.broken:
            yield f"{name}/{where}", partial(attacked, partial(make, parse_classify_attacks, name), situation)


def attack_setting_cases() -> Iterator[Case]:
    def compute(kind: Callable[..., Any], settings: dict[str, Any], limits: Sequence[float] = (), **how: Any) -> Parts:
        """Attacks in some situations; kind: a class, or a function that attacks; limits: thresholds of three terms."""

        def make(p: float) -> Callable[..., Any]:
            return kind(norm=p, **settings) if isinstance(kind, type) else partial(kind, norm=p, **settings)

        parts = {}
        for where in ("plain",) if kind is MarginAttack else ("plain", "three terms", "everything"):
            situation = SITUATIONS[where]
            more = {"thresholds": limits[: situation.count], **how} if limits else how
            parts[where] = attacked(make, situation, **more)
        return parts

    steps = {"steps": 6, "step_scale": 4.0}
    pgds = {
        "last": {},
        "best": {"keep": "best"},
        "restarts": {"restarts": 3},
        "restarts, best, without random start": {"restarts": 2, "keep": "best", "random_start": False},
        "part of the radius": {"random_start": 0.3},
        "small steps": {"step_scale": 0.5, "random_start": False},
        "one step": {"steps": 1, "random_start": False},
    }
    for what, settings in pgds.items():
        yield f"pgd/{what}", partial(compute, pgd, {**steps, **settings})
    for keep in ("last", "best"):
        yield f"ifgsm/{keep}", partial(compute, ifgsm, {"steps": 4, "keep": keep})
    crossings = {"low": (1.0, 0.0, 1.0), "middle": (1.5, 0.15, 1.6), "high": (9.0, 9.0, 9.0)}
    for what, limits in crossings.items():
        for restarts, keep in ((1, "last"), (1, "best"), (3, "last")):
            settings = {**steps, "restarts": restarts, "keep": keep}
            yield f"pgd/crossing {what}, {keep} x{restarts}", partial(compute, pgd, settings, limits)
        yield f"ifgsm/crossing {what}", partial(compute, ifgsm, {"steps": 4}, limits)
        settings = {"steps": 3, "step_scale": 2.0}
        yield (
            f"pgd/crossing {what}, no final pass",
            partial(compute, PGD, settings, limits, final_pass=False),
        )
    for kind, options in (
        (APGD, [{"steps": n} for n in (1, 2, 7, 30)]),
        (APGD, [{"steps": 12, "momentum": 1.0}, {"steps": 12, "rho": 0.2}, {"steps": 12, "rho": 1.0}]),
        (APGD, [{"steps": 9, "random_start": 0.0, "restarts": n} for n in (1, 3)]),
        (SquareAttack, [{"steps": n} for n in (1, 120)]),
        (SquareAttack, [{"steps": 30, "share": share} for share in (0.02, 0.5, 1.0)]),
        (Noise, [{"kind": kind} for kind in ("gaussian", "uniform")]),
        (MarginAttack, [{**steps, "targets": n, "keep": keep} for n in (0, 1, 2) for keep in ("last", "best")]),
    ):
        for settings in options:
            what = " ".join(f"{key}={value}" for key, value in settings.items())
            yield f"{kind.__name__}/{what}", partial(compute, kind, settings)


# CosPGD


class Segmentation:
    """A small network whose voxels are classes or regions; some voxels do not count."""

    names = ("ce",)

    def __init__(self, space: int, dtype: torch.dtype, exclusive: bool, ignored: bool) -> None:
        convolution = getattr(nn, f"Conv{space}d")
        torch.manual_seed(space)
        self.model = nn.Sequential(convolution(3, 8, 3, padding=1), nn.Tanh(), convolution(8, 3, 1)).to(dtype)
        self.images = normal(4, 3, *SPACES[space], seed=2, dtype=dtype)
        labels = torch.randint(0, 3, (4, 1, *SPACES[space]), generator=seeded(3))
        regions = torch.zeros(4, 3, *SPACES[space])
        self.truth = regions.scatter_(1, labels, 1) if exclusive else (uniform(*regions.shape, seed=4) > 0.5).float()
        self.valid = uniform(4, 1, *SPACES[space], seed=5) < 0.7 if ignored else None
        self.exclusive = exclusive

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images).float()
        loss = F.binary_cross_entropy_with_logits(logits, self.truth, reduction="none")
        return loss.flatten(1).mean(1, keepdim=True)

    def predictions(self, images: Tensor) -> Tensor:
        return self.model(images)

    def class_scores(self, predictions: Tensor) -> ClassScores:
        return ClassScores(predictions, self.truth, self.valid, self.exclusive)


def cospgd_cases() -> Iterator[Case]:
    def compute(make: Callable[[float], Any], objective: Callable[[], Any], **how: Any) -> Parts:
        parts = {}
        for name, p in NORMS.items():
            own = objective()
            parts[name] = of_result(make(p)(own, own.images, 1.0 if p == 2 else 0.1, generator=seeded(6), **how))
        return parts

    def named(name: str, p: float) -> Any:
        return parse_attacks([name], norm=p)[name]

    def restarted(p: float) -> Any:
        return PGD(steps=4, step_scale=4.0, norm=p, random_start=1.0, restarts=2, loss=CosineWeighted())

    for space, exclusive, ignored in itertools.product((1, 2, 3), (True, False), (True, False)):
        what = f"{space}d {'classes' if exclusive else 'regions'}{' ignored' if ignored else ''}"
        objective = partial(Segmentation, space, torch.float32, exclusive, ignored)
        yield f"cospgd4/{what}", partial(compute, partial(named, "cospgd4"), objective)
        yield f"restarts/{what}", partial(compute, restarted, objective, bounds="sample")
    for (name, dtype), exclusive in itertools.product(list(DTYPES.items())[1:], (True, False)):
        objective = partial(Segmentation, 2, dtype, exclusive, True)
        what = f"{name} {'classes' if exclusive else 'regions'}"
        yield f"cospgd4/{what}", partial(compute, partial(named, "cospgd4"), objective)
    for name in ("pgd5", "apgd8", "square20"):
        objective = partial(Segmentation, 2, torch.float32, True, False)
        yield f"{name}/classes", partial(compute, partial(named, name), objective)


# Methods


TERMS = ("ce", "sharp")
IDS = [f"sample {letter}" for letter in "abcdefgh"]


def fixed() -> Thresholds:
    return Thresholds(values=(1.5, 0.1), names=TERMS)


def running(begun: bool = True) -> RunningThresholds:
    thresholds = RunningThresholds(TERMS, rule="mean+2std", memory=8)
    thresholds.update(torch.tensor([1.45, 0.08]) + 0.05 * normal(6, 2, seed=8))
    if begun:
        thresholds.begin()
    return thresholds


def method_makers() -> dict[str, Callable[..., Any]]:
    """Methods by name, each made from a radius and the settings of its attack."""

    def amat_of(thresholds: Callable[[], Any], lowest: float, highest: float, **settings: Any) -> Callable[..., Any]:
        def make(radius: float, **how: Any) -> Any:
            limits = {"margin_min": lowest * radius, "margin_max": highest * radius} if highest else {}
            return AMAT(delta=radius / 4, thresholds=thresholds(), **limits, **settings, **how)

        return make

    def dpaat(**settings: Any) -> Callable[..., Any]:
        return lambda radius, **how: DPAAT(radius, **settings, **how)

    makers: dict[str, Callable[..., Any]] = {
        "STD": lambda radius, **how: STD(),
        "AT": AT,
        "SAT": SAT,
        "SAT random start": lambda radius, **how: SAT(radius, random_start=0.5, **how),
        "TRADES": TRADES,
        "TRADES beta 1": lambda radius, **how: TRADES(radius, beta=1.0, random_start=0.3, **how),
        "AMAT numbers": amat_of(lambda: [1.5, 0.1], 0, 0),
        "DPAAT range": lambda radius, **how: DPAAT(
            radius, eps_min=radius / 2, eps_max=1.1 * radius, step_size=radius / 4, **how
        ),
    }
    for refinement, (kind, thresholds) in itertools.product(
        ("paper", "crossing"), {"fixed": fixed, "running": running, "warming": partial(running, False)}.items()
    ):
        makers[f"AMAT {refinement} {kind}"] = amat_of(thresholds, 0, 0, refinement=refinement)
        makers[f"AMAT {refinement} {kind} limits"] = amat_of(thresholds, 0.2, 0.6, refinement=refinement)
    for average, weight in itertools.product(("batch", "epoch"), (0.0, 1.0)):
        makers[f"DPAAT {average} sync {weight:g}"] = dpaat(average=average, sync_weight=weight)
    return makers


def trained(
    make: Callable[..., Any], *, backward: bool = False, noisy: bool = False, resumed: bool = False, size: int = 4
) -> Parts:
    """Six steps of a method in both norms; resumed: the last three by another object with the state of the first."""
    parts = {}
    for name, p in NORMS.items():
        torch.manual_seed(7)  # of dropout
        radius = 1.0 if p == 2 else 0.1
        how = {"steps": 3, "step_scale": 2.0, "norm": p, "bounds": (0.0, 1.0), "seed": 4}
        model, method = network(noisy=noisy).train(), make(radius, **how)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        images, labels = uniform(8, 3, *SPACES[2], seed=9), torch.arange(8) % 4
        steps = []
        for number in range(6):
            if number % 3 == 0:
                method.begin_epoch()
            if resumed and number == 3:
                state = copy.deepcopy(method.state_dict())
                method = make(radius, **how)
                method.load_state_dict(state)
            rows = torch.randperm(8, generator=seeded(number))[:size]
            objective = Classifier(model, labels[rows], count=2)
            optimizer.zero_grad()
            step = method.step(
                objective, images[rows], [IDS[row] for row in rows.tolist()], Tensor.backward if backward else None
            )
            if not backward:
                step.loss.backward()
            optimizer.step()
            steps.append(of_step(step))
        method.merge()
        parts[name] = {
            "steps": dict(enumerate(steps)),
            "state": method.state_dict(),
            "margins": method.store.state_dict() if hasattr(method, "store") else None,
            "weights": of_model(model),
        }
    return parts


def method_cases() -> Iterator[Case]:
    for (name, make), backward in itertools.product(method_makers().items(), (False, True)):
        yield f"{name}/{'backward' if backward else 'loss'}", partial(trained, make, backward=backward)
    for name, make in method_makers().items():
        yield f"{name}/noisy model", partial(trained, make, noisy=True)
        if name.startswith(("AMAT", "DPAAT")):
            yield f"{name}/resumed", partial(trained, make, resumed=True)
            yield f"{name}/batches of one", partial(trained, make, size=1)


# Margins, thresholds, runs


def margin_cases() -> Iterator[Case]:
    def store(additive: bool, rank: int = 0) -> MarginStore:
        """A store after a merge, and some visits since then that differ by rank."""
        margins = MarginStore(0.5, additive=additive)
        margins.set(IDS[:4], torch.tensor([1.0, 0.3, 0.7, 0.0]))
        margins.merge([margins.changes()])
        margins.set(IDS[rank : rank + 4], [(0.2 + 0.1 * k) * (rank + 1) for k in range(4)])
        margins.set([IDS[1], IDS[1], IDS[2]], torch.tensor([0.9, 0.15, math.nan]))
        return margins

    def shown(margins: MarginStore) -> Parts:
        path = Path(SCRATCH) / "margins.csv"
        margins.to_csv(path)
        return {
            "state": margins.state_dict(),
            "get": margins.get([*IDS, "a stranger"]),
            "quantiles": margins.quantiles(),
            "histogram": list(margins.histogram(5)),
            "changes": margins.changes(),
            "csv": path.read_bytes(),
        }

    def merged(additive: bool, ranks: int) -> Parts:
        stores = [store(additive, rank) for rank in range(ranks)]
        states = [one.changes() for one in stores]
        for one in stores:
            one.merge(states)
        clamped = copy.deepcopy(stores[0])
        clamped.clamp(0.25, 0.8)
        loaded = MarginStore()
        loaded.load_state_dict(clamped.state_dict())
        return {"first": shown(stores[0]), "last": shown(stores[-1]), "clamped": shown(clamped), "load": shown(loaded)}

    for additive in (False, True):
        kind = "additive" if additive else "multiplied"
        yield f"store/{kind}", lambda additive=additive: shown(store(additive))
        for ranks in (1, 2, 4):
            yield f"merge/{kind} {ranks}", partial(merged, additive, ranks)


def threshold_cases() -> Iterator[Case]:
    def batches() -> list[Tensor]:
        terms = [2 + normal(n, 2, seed=n) for n in (4, 1, 7)]
        terms[0][1, 1], terms[2][3, 0] = math.nan, math.inf
        return [*terms, torch.full((2, 2), math.nan)]

    def state(statistics: TermStatistics) -> Parts:
        return {
            "state": statistics.state_dict(),
            "std": statistics.std,
            "tensors": [statistics.tensor(rule) for rule in ("mean", "mean+2std", "mean+0.5std")],
            "thresholds": asdict(statistics.thresholds("mean+2std", source="a file")),
        }

    def updated(memory: float | None, dtype: torch.dtype) -> Parts:
        statistics = TermStatistics(TERMS, memory)
        parts = {}
        for number, terms in enumerate(batches()):
            statistics.update(terms.to(dtype))
            parts[str(number)] = state(statistics)
        return parts

    def merged(average: bool, memory: float | None) -> Parts:
        every = []
        for terms in batches()[:3]:
            every.append(TermStatistics(TERMS, memory))
            every[-1].update(terms)
        every[0].merge([one.state_dict() for one in every], average=average)
        return state(every[0])

    def followed(rule: str, memory: float | None) -> Parts:
        thresholds = RunningThresholds(TERMS, rule, memory)
        parts: dict[str, Any] = {}
        for number, terms in enumerate([*batches(), 1 - normal(8, 2, seed=1), 4 + normal(8, 2, seed=2)]):
            thresholds.update(terms)
            if number == 2:
                thresholds.begin()
            parts[str(number)] = {
                "tensor": [thresholds.tensor(torch.zeros(1, dtype=dtype)) for dtype in DTYPES.values()],
                "current": asdict(thresholds.current()),
                "text": str(thresholds),
            }
        again = RunningThresholds(TERMS, rule, memory)
        again.load_state_dict(thresholds.state_dict())
        return {**parts, "state": thresholds.state_dict(), "again": again.state_dict()}

    def saved() -> Parts:
        path = Path(SCRATCH) / "thresholds.json"
        made = running().statistics.thresholds("mean+2std", source="a file", notes={"fold": 0})
        made.save(path)
        loaded = Thresholds.load(path)
        rules = [str(loaded.by_rule(rule)) for rule in ("mean", "mean+1std", None)]
        return {"file": path.read_bytes(), "rules": rules, "tensor": loaded.tensor(torch.zeros(1))}

    for memory in (None, 5.0):
        for name, dtype in DTYPES.items():
            yield f"statistics/{name} memory {memory}", partial(updated, memory, dtype)
        for average in (False, True):
            yield f"merge/{'average' if average else 'sum'} memory {memory}", partial(merged, average, memory)
        for rule in ("mean", "mean+2std"):
            yield f"running/{rule} memory {memory}", partial(followed, rule, memory)
    yield "file", saved


def run_cases() -> Iterator[Case]:
    def compute(name: str, kind: str | None, changes: dict[str, Any], noisy: bool) -> Parts:
        settings = TrainingSettings(
            **{"delta": 0.25, "eps": 1.0, "steps": 3, "step_scale": 2.0, "bounds": (0.0, 1.0), "seed": 3, **changes}
        )

        def make() -> MethodRun:
            made = {None: None, "fixed": fixed(), "running": self_calibrated(TERMS, settings, 8)}[kind]
            return MethodRun(name, settings, made, epochs=5)

        torch.manual_seed(7)
        run, model = make(), network(noisy=noisy).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        images, labels = uniform(8, 3, *SPACES[2], seed=9), torch.arange(8) % 4
        parts: dict[str, Any] = {"outlook": [run.outlook(8, 8), run.outlook(8, 2, "images")]}
        for number, epoch in enumerate((0, 1, 2, 2, 3, 4)):  # the third begins again
            if number == 4:
                state = copy.deepcopy(run.state_dict())
                run = make()
                parts["resumed"] = run.load_state_dict(state)
            lines, losses = run.begin_epoch(epoch), []
            for rows in torch.randperm(8, generator=seeded(number)).split(4):
                optimizer.zero_grad()
                objective = Classifier(model, labels[rows], count=2)
                backward = Tensor.backward if settings.backward == "sequential" else None
                step = run.step(objective, images[rows], [IDS[row] for row in rows.tolist()], backward)
                if backward is None:
                    step.loss.backward()
                losses.append(step.loss)
                optimizer.step()
            logs = {key: value for key, value in run.end_epoch().items() if key != "attack_seconds"}
            parts[str(number)] = {"lines": lines, "loss": torch.stack(losses), "logs": logs, "warm": run.warming_up}
        state = {key: value for key, value in run.state_dict().items() if key != "settings"}
        return {**parts, "state": state, "weights": of_model(model)}

    for name, kind, changes in (
        ("STD", None, {}),
        ("AT", None, {"norm": math.inf, "eps": 0.1}),
        ("SAT", None, {"warmup_epochs": 2}),
        ("SAT", None, {"random_start": 1.0, "backward": "sequential"}),
        ("TRADES", None, {"beta": 3.0}),
        ("AMAT", "fixed", {}),
        ("AMAT", "fixed", {"warmup_epochs": 1, "refinement": "crossing", "margin_max": 0.6}),
        ("AMAT", "running", {}),
        ("AMAT", "running", {"warmup_epochs": 2, "rule": "mean+2std", "refinement": "crossing"}),
        ("AMAT", "running", {"norm": math.inf, "delta": 0.02, "eps": 0.1, "backward": "sequential"}),
        ("DPAAT", None, {}),
        ("DPAAT", None, {"average": "epoch", "sync_weight": 0.0, "eps_min": 0.5, "warmup_epochs": 1}),
        ("DPAAT", None, {"bounds": "sample", "eps_max": 1.1, "step_size": 0.3}),
    ):
        what = " ".join(f"{key}={value}" for key, value in changes.items())
        for noisy in (False, True):
            label = f"{name}/{kind or ''} {what}{' noisy' if noisy else ''}".replace("/ ", "/")
            yield label, partial(compute, name, kind, changes, noisy)


# The hosts' objectives


def nnunet_cases() -> Iterator[Case]:
    classes, ignore, scales = 3, 3, np.array([1.0, 0.5, 0.0]) / 1.5

    def stock(kind: str, batch_dice: bool, deep: bool, weight: Tensor | None = None) -> nn.Module:
        dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": kind.startswith("regions"), "ddp": False}
        if kind.startswith("labels"):
            label, more = ignore if kind.endswith("ignore") else None, {} if weight is None else {"weight": weight}
            loss = DC_and_CE_loss(dice, more, ignore_label=label, dice_class=MemoryEfficientSoftDiceLoss)
        else:
            loss = DC_and_BCE_loss(
                {}, dice, use_ignore_label=kind.endswith("ignore"), dice_class=MemoryEfficientSoftDiceLoss
            )
        return DeepSupervisionWrapper(loss, scales) if deep else loss

    def target(kind: str, shape: tuple[int, ...], seed: int = 7) -> Tensor:
        more = kind.endswith("ignore")
        if kind.startswith("regions"):
            return uniform(4, 2 + more, *shape, seed=seed) > 0.5
        labels = torch.randint(0, classes + more, (4, 1, *shape), generator=seeded(seed))
        labels[1][labels[1] == 2] = 1  # a class that is not there
        labels[2] = 0
        return labels

    def channels(kind: str) -> int:
        return classes if kind.startswith("labels") else 2

    def split(kind: str, space: int, batch_dice: bool, deep: bool, weight: Tensor | None = None) -> Parts:
        shapes = [tuple(max(2, n // 2**k) for n in SPACES[space]) for k in range(3 if deep else 1)]
        outputs = [normal(4, channels(kind), *shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]
        targets = [target(kind, shape) for shape in shapes]
        loss, parts = stock(kind, batch_dice, deep, weight), {}
        for terms, absent in itertools.product(("separate", "sum"), ("auto", "count", "skip")):
            own = SampleTerms(loss, terms, absent)
            found = own(outputs if deep else outputs[0], targets if deep else targets[0])
            parts[f"{terms} {absent}"] = [found, *gradients(found.square(), *outputs[:2])]
        with torch.no_grad():
            voxels = own.class_scores(outputs[0], targets[0])
            return {
                **parts,
                "full": own.at_full_resolution(outputs[0], targets[0]),
                "distance": own.distance(outputs, [output.flip(0) for output in outputs]),
                "voxels": [voxels.truth, voxels.valid if voxels.valid is not None else torch.zeros(0)],
            }

    def unet(kind: str, space: int) -> nn.Module:
        convolution = getattr(nn, f"Conv{space}d")
        torch.manual_seed(space)
        return nn.Sequential(convolution(3, 6, 3, padding=1), nn.LeakyReLU(), convolution(6, channels(kind), 1))

    def objective(kind: str, space: int, batch_dice: bool) -> Parts:
        model, images = unet(kind, space), normal(4, 3, *SPACES[space], seed=2)
        loss, truth = stock(kind, batch_dice, False), target(kind, SPACES[space])
        whole = SegmentationObjective(model, model, loss, SampleTerms(loss), truth)
        value, terms, output = whole.loss_and_predictions(images)
        value.backward()
        return {
            "loss": [value, terms, output, *(weight.grad for weight in model.parameters())],
            "distance": whole.distance(output, whole.predictions(images + 0.1)),
            "attacked": of_result(PGD(steps=4, step_scale=4.0, norm=2.0)(whole, images, 1.0, bounds="sample")),
            "SAT": of_step(SAT(1.0, steps=3).step(whole, images, IDS[:4])),
            "TRADES": of_step(TRADES(1.0, steps=3).step(whole, images, IDS[:4])),
        }

    def inference(kind: str, space: int) -> Parts:
        model, images = unet(kind, space).eval(), normal(4, 3, *SPACES[space], seed=2)
        labels = SimpleNamespace(
            has_regions=kind.startswith("regions"), ignore_label=ignore if kind.endswith("ignore") else None
        )
        loss, truth = inference_loss(labels), target(kind, SPACES[space])
        whole = InferenceObjective(model, SampleTerms(loss, "separate"), truth)
        attacks = parse_attacks(["cospgd4", "pgd4", "apgd6"])
        return {
            "loss": loss(model(images), truth),
            **{name: of_result(attack(whole, images, 1.0, generator=seeded(1))) for name, attack in attacks.items()},
        }

    kinds = ("labels", "labels+ignore", "regions", "regions+ignore")
    for kind, space, batch_dice in itertools.product(kinds, (2, 3), (False, True)):
        what = f"{space}d {kind}{' batch dice' if batch_dice else ''}"
        for deep in (False, True):
            yield f"terms/{what}{' deep' if deep else ''}", partial(split, kind, space, batch_dice, deep)
        yield f"objective/{what}", partial(objective, kind, space, batch_dice)
    for kind in kinds[:2]:
        yield f"terms/{kind} weighted", partial(split, kind, 2, False, False, torch.tensor([0.2, 1.0, 3.0]))
    for kind, space in itertools.product(kinds, (2, 3)):
        yield f"inference/{space}d {kind}", partial(inference, kind, space)


def yolo_cases() -> Iterator[Case]:
    def model(name: str) -> DetectionModel:
        """A stock architecture, or a small one with one head or two, of which one is followed; untrained."""
        if name != "yolov8n":
            path = Path(SCRATCH) / "small.yaml"
            more = {"end2end": True, "reg_max": 1} if name.startswith("two") else {}
            layers = [[-1, 1, "Conv", [width, 3, 2]] for width in (8, 16, 16, 32, 32)]
            head = [[[2, 3, 4], 1, "Detect", ["nc"]]]
            path.write_text(yaml.safe_dump({"nc": 3, **more, "backbone": layers, "head": head}))
        torch.manual_seed(0)
        made = DetectionModel(f"{name}.yaml" if name == "yolov8n" else str(path), nc=3, verbose=False)
        made.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
        if name.endswith("one-to-one"):
            made.end2end = True
        return made

    def batch() -> dict[str, Any]:
        """Four images with three objects, one, none and two."""
        rows = torch.tensor([0.0, 0, 0, 1, 3, 3])
        boxes = torch.cat([0.3 + 0.4 * uniform(6, 2, seed=1), 0.2 + 0.3 * uniform(6, 2, seed=2)], 1)
        classes = torch.tensor([0.0, 1, 2, 0, 1, 1])[:, None]
        return {"img": uniform(4, 3, 64, 64, seed=3), "batch_idx": rows, "cls": classes, "bboxes": boxes}

    def weight_gradients(detector: nn.Module) -> Tensor:
        return torch.cat([weight.grad.flatten() for weight in detector.parameters() if weight.grad is not None])

    def losses(name: str, training: bool, normalizer: str) -> Parts:
        detector, given = model(name).train(training), batch()
        given["img"].requires_grad_()
        terms = per_image_losses(detector, given, normalizer=normalizer)
        return {"terms": terms, "gradients": gradients(terms.square(), given["img"])}

    def whole(name: str, training: bool) -> Parts:
        detector, given = model(name).train(training), batch()
        terms = ImageTerms(detector)
        objective = DetectionObjective(detector, terms, given)
        value, rows, clean = objective.loss_and_predictions(given["img"])
        other = objective.predictions(given["img"].flip(3))
        distance = objective.distance(clean, other)
        (value + distance.sum()).backward()
        return {
            "loss": value,
            "terms": rows,
            "items": objective.items,
            "distance": distance,
            "gradients": weight_gradients(detector),
            "buffers": torch.cat([buffer.double().flatten() for buffer in detector.buffers()]),
        }

    def attack(name: str, training: bool, p: float) -> Parts:
        detector, given = model(name).train(training), batch()
        objective = DetectionObjective(detector, ImageTerms(detector), given)
        how: dict[str, Any] = {"bounds": (0.0, 1.0), "generator": seeded(2)}
        attacks = {"pgd": PGD(steps=3, step_scale=4.0, norm=p), "apgd": APGD(steps=4, norm=p)}
        radius = 1.0 if p == 2 else 0.02
        return {kind: of_result(one(objective, given["img"], radius, **how)) for kind, one in attacks.items()}

    def step(name: str, method: Any) -> Parts:
        detector, given = model(name).train(), batch()
        one = method.step(DetectionObjective(detector, ImageTerms(detector), given), given["img"], IDS[:4])
        one.loss.backward()
        return {**of_step(one), "gradients": weight_gradients(detector)}

    small = ("one", "two", "two one-to-one")
    for name, training in itertools.product(("yolov8n", *small), (True, False)):
        mode = "training" if training else "evaluation"
        for normalizer in ("image", "batch"):
            yield f"terms/{name} {mode} {normalizer}", partial(losses, name, training, normalizer)
        yield f"objective/{name} {mode}", partial(whole, name, training)
        if name != "yolov8n" or training:
            for kind, p in NORMS.items():
                yield f"attacks/{name} {mode} {kind}", partial(attack, name, training, p)
    how = {"steps": 2, "step_scale": 2.0, "bounds": (0.0, 1.0)}
    for name in small:
        yield f"methods/{name} TRADES", lambda name=name: step(name, TRADES(1.0, **how))
        yield f"methods/{name} DPAAT", lambda name=name: step(name, DPAAT(1.0, **how))
        yield f"methods/{name} AMAT", lambda name=name: step(name, AMAT(0.5, [5.0, 5.0, 5.0], **how))


def landmark_cases() -> Iterator[Case]:
    size, nan = (9, 11), (math.nan, math.nan)
    points = torch.tensor(
        [
            [(3.2, 4.7), (8.0, 2.0), (0.0, 8.3)],
            [nan, (5.5, 5.5), (10.4, -0.4)],
            [nan, nan, (40.0, 3.0)],
            [(2.0, 2.0), nan, (7.7, 6.1)],
        ],
        dtype=torch.float64,
    )

    def maps(dtype: torch.dtype, seed: int = 0) -> Tensor:
        return (2 * normal(4, 9, *size, seed=seed)).to(dtype)

    def encoded(dtype: torch.dtype, radius: float) -> Parts:
        return vars(encode(points.to(dtype), size, radius))

    def decoded(dtype: torch.dtype, radius: float) -> Parts:
        targets = encode(points.float(), size, radius)
        heat = 20 * targets.disk - 10
        true = torch.cat([heat, targets.offset_y.expand_as(heat), targets.offset_x.expand_as(heat)], 1)
        broken = maps(dtype)
        broken[0, 4], broken[1] = math.inf, math.nan
        return {
            name: [*decode(given, radius), *split_maps(given)]
            for name, given in (("random", maps(dtype)), ("true", true.to(dtype)), ("broken", broken))
        }

    def objective(heatmap: str, dtype: torch.dtype, weight: float) -> Parts:
        settings = {"radius": 2.5, "heatmap": heatmap, "heatmap_weight": weight}
        given = LandmarkObjective(nn.Identity(), points.to(dtype), size, **settings)
        clean, other = (maps(dtype, seed).requires_grad_() for seed in (0, 1))
        loss, terms, _ = given.loss_and_predictions(clean)
        distance = given.distance(clean, other)
        return {
            "terms": [loss, terms, *gradients(given(clean).square(), clean)],
            "distance": [distance, *gradients(distance, clean, other)],
        }

    def trained_maps(heatmap: str) -> Parts:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 9, 3, padding=1))
        images = normal(4, 1, *size, seed=2)
        given = LandmarkObjective(model, points.float(), size, radius=2.5, heatmap=heatmap)
        methods = {"AMAT": AMAT(0.5, [1.0, 2.0, 2.0], steps=3, refinement="crossing"), "DPAAT": DPAAT(1.0, steps=3)}
        methods["TRADES"] = TRADES(1.0, steps=3)
        parts: dict[str, Any] = {
            name: of_result(attack(given, images, 1.0, generator=seeded(1)))
            for name, attack in parse_attacks(["pgd4", "apgd6", "square10"]).items()
        }
        for name, method in methods.items():
            step = method.step(given, images, IDS[:4])
            parts[name] = {**of_step(step), "gradients": gradients(step.loss, *model.parameters())}
        return parts

    for (name, dtype), radius in itertools.product(DTYPES.items(), (1.0, 2.5)):
        if dtype.itemsize > 2:
            yield f"encode/{name} {radius}", partial(encoded, dtype, radius)
        yield f"decode/{name} {radius}", partial(decoded, dtype, radius)
    for heatmap in ("dice", "bce"):
        for (name, dtype), weight in itertools.product(list(DTYPES.items())[:2], (1.0, 3.0)):
            yield f"objective/{heatmap} {name} {weight:g}", partial(objective, heatmap, dtype, weight)
        yield f"attacks and methods/{heatmap}", partial(trained_maps, heatmap)


def classify_cases() -> Iterator[Case]:
    weights = torch.tensor([0.4, 1.6, 1.0, 1.0])

    def objective(dtype: torch.dtype, weight: Tensor | None, smoothing: float, step: bool) -> Parts:
        model, images = network().to(dtype), uniform(4, 3, *SPACES[2], seed=1, dtype=dtype)
        given = ClassificationObjective(model, torch.arange(4), weight=weight, label_smoothing=smoothing)
        loss, terms, logits = given.loss_and_predictions(images)
        distance = given.distance(logits, given.predictions(images + 0.1))
        parts = {
            "loss": [loss, terms, given(images), logits, distance],
            "gradients": gradients(loss + distance.sum(), *model.parameters()),
        }
        if step:
            done = SAT(1.0, steps=3).step(given, images, IDS[:4])
            parts["step"] = of_step(done)
        return parts

    def margin(dtype: torch.dtype, targets: Tensor | None) -> Parts:
        model = network().to(dtype)
        images = uniform(4, 3, *SPACES[2], seed=1, dtype=dtype).requires_grad_()
        objective = ClassificationObjective(model, torch.arange(4))
        terms = margin_of(objective.class_scores(objective.predictions(images)), targets)
        return {"terms": terms, "gradients": gradients(terms, images)}

    for (name, dtype), weight, smoothing in itertools.product(DTYPES.items(), (None, weights), (0.0, 0.1)):
        what = f"{name}{' weighted' if weight is not None else ''}{' smoothed' if smoothing else ''}"
        yield f"objective/{what}", partial(objective, dtype, weight, smoothing, dtype == torch.float32)
    for (name, dtype), targets in itertools.product(DTYPES.items(), (None, torch.tensor([1, 0, 3, 2]))):
        yield f"margin/{name}{' targets' if targets is not None else ''}", partial(margin, dtype, targets)


# Metrics, evaluation, report


def metric_cases() -> Iterator[Case]:
    def counted(space: int, ignored: bool, regions: bool) -> Parts:
        shape = (5, *SPACES[space])
        ignore = uniform(*shape, seed=3) < 0.2 if ignored else None
        if regions:
            one, two = (uniform(5, 2, *SPACES[space], seed=k) > 0.6 for k in (0, 1))
            two[1] = one[1] = False
            counts = region_confusion_counts(one, two, ignore=ignore)
        else:
            one, two = (torch.randint(0, 4, shape, generator=seeded(k)) for k in (0, 1))
            two[1] = one[1] = 0
            one[2][one[2] == 3] = two[2][two[2] == 3] = 0
            counts = confusion_counts(one, two, [1, 3], ignore=ignore)
        return {
            **counts._asdict(),
            "per class": dice_per_class(counts),
            "per sample": dice_per_sample(counts),
            "indices": [adi(counts), tvdi(counts), adi(Counts.of(counts._asdict()))],
        }

    def areas() -> Parts:
        curves = uniform(6, 4, seed=2).double().numpy()
        curves[2, 1], curves[3, 3] = np.nan, -0.1
        alone = [auc_robust(LEVELS, row, scale=scale) for row in curves[[0, 1, 4]] for scale in (None, 1.0, 2.5)]
        lower = auc_robust(LEVELS, curves[0], higher_is_better=False, scale=3.0)
        return {"alone": [*alone, lower], "curves": auc_robust_of_curves(LEVELS, curves, 1.5)}

    def scores() -> dict[str, Any]:
        value = uniform(12, seed=1).double().numpy()
        value[3] = np.nan
        counts = {name: (9 * uniform(12, 2, seed=k)).long().numpy() for k, name in enumerate(Counts._fields)}
        return {"value": value, **counts}

    def drawn(groups: list[str] | None) -> Parts:
        ids = [f"{k}" for k in range(12)]
        draws = resamples(ids, groups, count=40)
        mean = Metric("mean", lambda s: float(np.nanmean(s["value"])), per_sample=lambda s: s["value"], is_mean=True)
        every = {
            "mean": mean,
            "the same": replace(mean, is_mean=False),
            "ADI": Metric("ADI", lambda s: adi(Counts.of(s))),
            "TVDI": Metric("TVDI", lambda s: tvdi(Counts.of(s))),
        }
        resampled = {name: metric.resampled(scores(), draws) for name, metric in every.items()}
        failing = [replace(mean, fails_at=0.4, higher_is_better=higher) for higher in (True, False)]
        return {
            "seed": seed_of(ids, groups),
            "draws": np.concatenate(draws),
            "resampled": resampled,
            "intervals": {name: interval(values, units=12) for name, values in resampled.items()},
            "narrow": interval(np.stack([*resampled.values()], 1), units=12, confidence=0.5),
            "failed": [metric.failed(scores()) for metric in failing],
            "words": [metric.failure for metric in failing],
        }

    def classified() -> Parts:
        given = {"probability": normal(20, 3, seed=1).softmax(1).numpy(), "label": np.arange(20) % 3}
        return {"numbers": [mean_ap(given), accuracy(given), balanced_accuracy(given)], "correct": correct(given)}

    for space, ignored, regions in itertools.product((2, 3), (False, True), (False, True)):
        what = f"{space}d {'regions' if regions else 'labels'}{' ignored' if ignored else ''}"
        yield f"counts/{what}", partial(counted, space, ignored, regions)
    yield "AUC", areas
    yield "resampled/samples", partial(drawn, None)
    yield "resampled/groups", partial(drawn, [f"case {k // 5}" for k in range(12)])
    yield "classification", classified


def pictures() -> tuple[Tensor, Tensor]:
    """Noise with a bright quarter, which one is the class."""
    images, labels = 0.6 * uniform(12, 1, 8, 8, seed=1), torch.arange(12) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 0.25
    return images, labels


@cache
def learnt(name: str) -> nn.Module:
    """A small classifier of the pictures, trained by a method or, "broken", not at all."""
    sat = SAT(0.6, steps=3, bounds=(0.0, 1.0))
    method, steps = {"STD": (STD(), 40), "SAT": (sat, 60), "broken": (sat, 0)}[name]
    model, (images, labels) = network(channels=1), pictures()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        method.step(Classifier(model, labels), images, [str(k) for k in range(12)]).loss.backward()
        optimizer.step()
    return model.eval()


def batches(name: str) -> list[EvaluationBatch]:
    """The pictures in batches, of which the last is smaller, with a classifier."""
    model, broken = learnt(name), name == "broken"

    def load(rows: Tensor) -> LoadedBatch:
        images, labels = (values[rows] for values in pictures())

        def score(given: Tensor) -> dict[str, Tensor]:
            logits = model(given)
            return {
                "correct": (logits.argmax(1) == labels).float(),
                "probability": logits.softmax(1),
                "label": labels,
                "error": F.cross_entropy(logits, labels, reduction="none"),
            }

        return LoadedBatch(images, Classifier(model, labels, broken=broken), score)

    return [
        EvaluationBatch([f"picture {row}" for row in rows.tolist()], partial(load, rows))
        for rows in torch.arange(12).split(4 if broken else 5)
    ]


def evaluation_cases() -> Iterator[Case]:
    right = Metric(
        "accuracy",
        lambda s: float(s["correct"].mean()),
        per_sample=lambda s: s["correct"],
        fails_at=0.5,
        resamples=60,
        is_mean=True,
        description="Share of pictures whose class is predicted.",
    )
    metrics = [
        right,
        Metric("mAP", mean_ap, resamples=20),
        Metric("error", lambda s: float(s["error"].mean()), False, unit="nat", per_sample=lambda s: s["error"]),
    ]
    ids = [f"picture {k}" for k in range(12)]

    def measured(name: str, attacks: Sequence[str], p: float = 2.0, **how: Any) -> Any:
        scale = 1.0 if p == 2 else 0.1
        named = parse_attacks(attacks, norm=p)
        return evaluate(batches(name), named, [scale * level for level in LEVELS], **{"bounds": (0.0, 1.0), **how})

    def conditions(evaluation: Any) -> Parts:
        keys = [("clean", 0.0), *evaluation.attacked]
        values = [evaluation.clean, *evaluation.attacked.values()]
        return {
            f"{name} {level:g}": {k: v for k, v in vars(condition).items() if k != "seconds"}
            for (name, level), condition in zip(keys, values, strict=True)
        }

    def loop(attacks: Sequence[str], p: float, **how: Any) -> Parts:
        evaluation = measured("STD", attacks, p, **how)
        curves = [evaluation.curve(attack, metric.of) for attack in attacks for metric in metrics]
        return {"conditions": conditions(evaluation), "curves": curves, "ids": evaluation.ids}

    def resumed() -> Parts:
        """The second batch is measured again, the others are read."""
        folder = Path(SCRATCH) / "resumed"
        how: dict[str, Any] = {"folder": folder, "fingerprint": "a model"}
        first = measured("STD", ["pgd3", "square9"], **how)
        (folder / "parts" / "batch_00001.npz").unlink()
        second = measured("STD", ["pgd3", "square9"], **how)
        return {"first": conditions(first), "second": conditions(second)}

    def shown() -> Parts:
        loaded = batches("STD")[0].load()
        attack = parse_attacks(["pgd3"])["pgd3"]
        return {str(k): images for k, images in at_levels(loaded, attack, LEVELS[1:], bounds=(0.0, 1.0), seed=3)}

    @cache
    def checked(name: str, attack: str) -> tuple[Any, Any, float]:
        """The evaluation of a model, that of the probes, and their level."""
        evaluation = measured(name, [attack, "square9", "gaussian"])
        found = strongest(evaluation.attacks)
        found = found if isinstance(found, str) else found[0]  # its name alone, in an earlier release
        level = level_to_check(evaluation, found, right)
        probing = probes(evaluation.attacks[found])
        return evaluation, evaluate(batches(name), probing, (0.0, level), bounds=(0.0, 1.0)), level

    def checks(name: str, attack: str) -> Parts:
        evaluation, probe, level = checked(name, attack)
        every = [[asdict(one) for one in check(evaluation, attack, given, right)] for given in (probe, None)]
        error = [asdict(one) for one in check(evaluation, attack, probe, metrics[2])]
        return {"level": level, "probes": conditions(probe), "checks": every, "error": error}

    def report(names: Sequence[str], groups: list[str] | None, attack: str = "pgd5") -> Parts:
        entries = []
        for k, name in enumerate(names):
            evaluation, probe, _ = checked(name, attack)
            margins = None if k == 0 else uniform(12, seed=4).double().numpy()
            # Not the checks of a broken model: an earlier release could not write figures that are no numbers.
            found = () if name == "broken" else check(evaluation, attack, probe, right)
            entries.append(Entry(name, evaluation, margins, found))
        folder = Path(tempfile.mkdtemp(dir=SCRATCH))
        with patch.object(Figure, "savefig"):  # pictures take most of the time, and are no numbers
            write_report(folder, entries, metrics, title="A record", level_unit="L2 norm", groups=groups)
        written = json.loads((folder / "report.json").read_text())
        kept = ("results", "failures", "checks", "bootstrap", "margins", "findings", "cautions", "verdict")
        effort = {
            model: {
                key: {k: v for k, v in numbers.items() if k not in ("seconds", "description")}
                for key, numbers in every.items()
            }
            for model, every in written["attacks"].items()
        }
        with np.load(folder / "draws.npz", allow_pickle=False) as archive:
            draws = {name: archive[name] for name in archive.files}
        tables = tabulate(entries, metrics, groups)
        return {
            **{name: (folder / name).read_bytes() for name in ("results.csv", "samples.csv", "table.csv")},
            "draws": draws,
            "report": {name: written[name] for name in kept},
            "effort": effort,
            "tables": [format_table(table) for table in tables],
            "findings": [findings(table) for table in tables],
        }

    three = ("pgd5", "apgd6x2", "square20")
    for kind, p in NORMS.items():
        yield f"evaluate/{kind}", partial(loop, three, p)
        yield f"evaluate/{kind} no bounds, another seed", partial(loop, ("pgd3x2", "ifgsm3"), p, bounds=None, seed=7)
    yield "evaluate/resumed", resumed
    yield "evaluate/pictures", shown
    for name, attack in itertools.product(("STD", "SAT", "broken"), ("pgd5", "apgd6", "pgd1", "ifgsm2")):
        yield f"checks/{name} {attack}", partial(checks, name, attack)
    yield "report/one model", partial(report, ["STD"], None)
    yield "report/two models", partial(report, ["STD", "SAT"], None)
    yield "report/weak and broken", partial(report, ["STD", "broken"], None, "pgd1")
    yield "report/groups", partial(report, ["STD", "SAT"], [f"case {k // 3}" for k in range(len(ids))])


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "norms": norm_cases,
    "distances": distance_cases,
    "attacks": named_attack_cases,
    "settings": attack_setting_cases,
    "cospgd": cospgd_cases,
    "methods": method_cases,
    "margins": margin_cases,
    "thresholds": threshold_cases,
    "runs": run_cases,
    "nnunet": nnunet_cases,
    "yolo": yolo_cases,
    "landmark": landmark_cases,
    "classify": classify_cases,
    "metrics": metric_cases,
    "evaluation": evaluation_cases,
}


# The record


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays, bytes and plain values in a nest of mappings and of sequences that hold arrays."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Tensor, np.ndarray)) for item in value):
        yield from leaves(dict(enumerate(value)), path)
    else:
        yield path, value


def described(value: Any) -> tuple[str, str]:
    """SHA-256 of a part with its type and shape, and a few words on it."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value).copy())
    if isinstance(value, Tensor):
        value = value.detach().contiguous()
        if value.is_floating_point():
            value = torch.where(value.isnan(), math.nan, value)  # one NaN is as good as another
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = f"{str(value.dtype)[6:]} {list(value.shape)}"
        numbers = value.double()[value.isfinite()]
        words = f"sum {float(numbers.sum()):.12g}"
        words += f", {value.numel() - numbers.numel()} not finite" if numbers.numel() < value.numel() else ""
    elif isinstance(value, bytes):
        data, kind, words = value, "bytes", f"{len(value)} of them"
    else:
        text = json.dumps(value)
        data, kind, words = text.encode(), "text", text if len(text) <= 60 else text[:57] + "..."
    sha = hashlib.sha256(f"{kind}\n".encode() + data).hexdigest()
    return sha, f"{kind} {sha[:12]} {words}"


def measure(compute: Callable[[], Parts]) -> dict[str, Any]:
    """One case. An error is a result like any other: of its type alone, for messages may name what was renamed."""
    torch.manual_seed(0)
    try:
        parts = dict(leaves(compute()))
    except Exception as error:
        parts = {"raised": type(error).__name__}
        print(f"  raised {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
    found = {name: described(value) for name, value in parts.items()}
    whole = hashlib.sha256(json.dumps({name: sha for name, (sha, _) in found.items()}, sort_keys=True).encode())
    return {"sha256": whole.hexdigest(), "parts": {name: text for name, (_, text) in found.items()}}


def cases(only: str) -> dict[str, Callable[[], Parts]]:
    """All cases by name, or those whose name the expression is found in."""
    every = [(f"{group}/{name}", compute) for group, made in GROUPS.items() for name, compute in made()]
    twice = [name for name, count in Counter(name for name, _ in every).items() if count > 1]
    assert not twice, twice
    return {name: compute for name, compute in every if re.search(only, name)}


def record(only: str) -> dict[str, dict[str, Any]]:
    """Measures the cases, and says how long each group took."""
    found, seconds = {}, Counter()
    for name, compute in cases(only).items():
        start = time.perf_counter()
        found[name] = measure(compute)
        if "raised" in found[name]["parts"]:
            print(f"  in {name}", file=sys.stderr)
        seconds[name.split("/")[0]] += time.perf_counter() - start
    numbers = Counter(name.split("/")[0] for name in found)
    for group, number in numbers.items():
        print(f"{group:12}{number:5} cases {seconds[group]:6.1f} s")
    return found


def header() -> dict[str, Any]:
    """What equal bits depend on."""
    return {
        "format": FORMAT,
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """A line for each case that differs, is missing or new, and below it one for each part."""
    for name in before.keys() | after.keys():
        if name not in after or name not in before:
            yield f"{'missing' if name not in after else 'new'}: {name}"
        elif before[name]["sha256"] != after[name]["sha256"]:
            old, new = before[name]["parts"], after[name]["parts"]
            parts = [part for part in {**old, **new} if old.get(part) != new.get(part)]
            lines = [f"    {part}: {old.get(part, 'none')} -> {new.get(part, 'none')}" for part in parts]
            more = [f"    and {len(lines) - 8} more parts"] if len(lines) > 8 else []
            yield "\n".join([f"differs: {name}", *lines[:8], *more])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX", help="of all cases those in whose names this is found")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        found = record(options.only)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    if options.command == "write":
        options.file.write_text(json.dumps({"header": header(), "cases": found}, indent=1) + "\n")
        print(f"{len(found)} cases written to {options.file}")
        return 0
    recorded = json.loads(options.file.read_text())
    for key, value in header().items():
        if recorded["header"].get(key) != value:
            print(f"WARNING: {key} was {recorded['header'].get(key)}, now {value}: bits may differ for that alone")
    before = {name: case for name, case in recorded["cases"].items() if re.search(options.only, name)}
    lines = sorted(differences(before, found))
    if lines:
        print("\n".join(lines))
    wrong = sum(not line.startswith("new") for line in lines)
    print(f"{len(found)} cases, " + (f"{len(lines)} of them differ, are missing or new" if lines else "all equal"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
