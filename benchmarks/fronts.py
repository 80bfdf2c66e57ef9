"""AMAT's rules, thresholds and bounds beside SAT's levels on the demos' data, by the installed commands; with seeds.

    python benchmarks/fronts.py landmark|yolo|classify [--seeds 0 1 2] [--jobs 2] [--only REGEX] [--work build/fronts]
    python benchmarks/fronts.py landmark --table [--attack apgd50] [--metric 'SDR 2 mm']

Per seed a standard network is trained as the host's demo has it; every run begins with its weights, for a quarter of
its epochs, and is attacked by PGD-20, or as --attack says. What is finished is not done again, unless its command has
changed, or a training that it begins with was done anew. The last column is what fronts are compared by: the mean of
the curve, less the best that SAT's line, from the standard network on, has in the same seed where it is at least as
good on clean images; the mean of the seeds, and its standard error.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo_classify  # noqa: E402  # found by the line above
import demo_landmark  # noqa: E402  # found by the line above
import demo_yolo  # noqa: E402  # found by the line above

from advmed.report.front import attainable  # noqa: E402  # after the demos, which need the path

Settings = dict[str, Any]
"""Of a training by its method, beside the defaults."""


def slug(name: str) -> str:
    """A run's name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name)


def amat(std: float, **settings: Any) -> Settings:
    return {"method": "AMAT", "rule": f"mean+{std:g}std", **settings}


AWP: Settings = {"awp": 0.005}
"""Adversarial weight perturbation."""


AVERAGED: Settings = {"trainer.callbacks+": "EMAWeightAveraging", "trainer.callbacks.decay": 0.99}
"""Lightning's average of the weights, which its checkpoints then hold."""


def ingredients(sat: float, wide: Settings, epochs: int) -> dict[str, Settings]:
    """What may move a front, on Lightning's hosts: perturbed weights; 20 steps from scratch, at equal visits.

    A step with perturbed weights costs two training passes more, 16 thirds in place of 10: so the same method without,
    for as long.
    """
    sphere = {**wide, "train_on": "sphere"}
    scratch = {"preset": "paper", "scratch": True}
    longer = {"trainer.max_epochs": round(epochs // 4 * 1.6)}
    return {
        f"SAT {sat:g}, AWP": {"method": "SAT", "eps": sat, **AWP},
        "AMAT wide on the sphere, mean+4std, AWP": amat(4, **sphere, **AWP),
        f"SAT {sat:g}, as long as with AWP": {"method": "SAT", "eps": sat, **longer},
        "AMAT wide on the sphere, mean+4std, as long as with AWP": amat(4, **sphere, **longer),
        f"SAT {sat:g}, 20 steps from scratch": {"method": "SAT", "eps": sat, **scratch},
        "AMAT wide, 20 steps from scratch, mean+4std": amat(4, **sphere, refinement="secant", **scratch),
    }


def growing(levels: Sequence[float], **length: Any) -> dict[str, Settings]:
    """SAT whose level grows from 0 in the first four fifths of its steps."""
    return {f"SAT {eps:g}, growing": {"method": "SAT", "eps": eps, "ramp": 0.8, **length} for eps in levels}


def shorter(sat: float, wide: Settings, epochs: int) -> dict[str, Settings]:
    """A robust network for 1.5 times the standard training, which is part of that; the preset takes 1.8 times.

    The attack of fewer steps has more epochs.
    """
    made: dict[str, Settings] = {}
    for name, steps in (("", 3), (", 2 steps", 2), (", 1 step", 1)):
        length = epochs * 0.5 * 3 / (2 * steps + 4)  # a step costs so many thirds of a standard one
        whole = math.ceil(length)
        short: Settings = {"trainer.max_epochs": whole, "trainer.limit_train_batches": min(length / whole, 1.0)}
        if steps < 3:
            short |= {"steps": steps, "step_scale": {1: 1.0, 2: 1.5}[steps]}
        made |= {
            f"SAT {sat:g}, 1.5 times in all{name}": {"method": "SAT", "eps": sat, **short},
            f"AMAT wide, 1.5 times in all{name}, mean+4std": amat(4, **wide, train_on="sphere", **short),
            f"SAT {sat:g}, 1.5 times in all{name}, late": {"method": "SAT", "eps": sat, **short, "decay": "late"},
            f"AMAT wide, 1.5 times in all{name}, late, mean+4std": amat(
                4, **wide, train_on="sphere", **short, decay="late"
            ),
        }
    return made


def cheaper(sat: float, wide: Settings, epochs: int) -> dict[str, Settings]:
    """Other ways to 1.5 times the standard training in all: clean and attacked half-batches, and replays.

    Their steps cost (3 + 10) / 6 standard ones, and one; what is left for them is half of the standard training.
    """

    def length(cost: float) -> Settings:
        whole = math.ceil(epochs * 0.5 / cost)
        return {"trainer.max_epochs": whole, "trainer.limit_train_batches": min(epochs * 0.5 / cost / whole, 1.0)}

    halved = {"trainer.callbacks+": "ingredients.Halved", **length(13 / 6)}
    replayed = {"trainer.callbacks+": "ingredients.Replayed", **length(1)}
    return {
        f"SAT {sat:g}, 1.5 times in all, half-batches": {"method": "SAT", "eps": sat, **halved},
        "AMAT wide, 1.5 times in all, half-batches, mean+4std": amat(4, **wide, train_on="sphere", **halved),
        f"SAT {sat:g}, 1.5 times in all, replays": {"method": "SAT", "eps": sat, **replayed},
    }


def decays(sat: float, wide: Settings, demo: Any, weight_decay: float) -> dict[str, Settings]:
    """Other learning rates than the default's, which falls to 0 by a cosine: one that stays, and a tenth of it from
    three quarters of the training on (L. Rice et al. 2020, arXiv 2002.11569)."""
    rate = {"optimizer": "AdamW", "optimizer.lr": demo.CONTENT["model"]["lr"], "optimizer.weight_decay": weight_decay}
    made: dict[str, Settings] = {}
    for name, epoch in (("a constant rate", 999), ("a late decay", round(demo.EPOCHS // 4 * 0.75))):
        adamw = {**rate, "lr_scheduler": "MultiStepLR", "lr_scheduler.milestones": f"[{epoch}]"}
        made[f"SAT {sat:g}, {name}"] = {"method": "SAT", "eps": sat, **adamw}
        made[f"AMAT wide on the sphere, mean+4std, {name}"] = amat(4, **wide, train_on="sphere", **adamw)
    return made | late(sat, wide)


def late(sat: float, wide: Settings) -> dict[str, Settings]:
    """The product's own: it stays for three quarters, and falls from there in a line."""
    return {
        f"SAT {sat:g}, late": {"method": "SAT", "eps": sat, "decay": "late"},
        "AMAT wide on the sphere, mean+4std, late": amat(4, **wide, train_on="sphere", decay="late"),
        "AMAT wide on the sphere, any's margin, mean+4std, late": amat(
            4, **wide, train_on="sphere", margin_of="any", decay="late"
        ),
    }


def controls(learnt: str, longer: Settings, **length: Any) -> dict[str, Settings]:
    """What AMAT is held against beside SAT's front.

    SAT with the levels that AMAT's images had in the same epoch: dealt out to other images, or their median for all. So
    they grow as AMAT's do, and what is left of a difference is which image gets which. And the standard network,
    trained on for as many passes.

    Args:
        learnt: the run of AMAT.
        longer: how long the standard network is trained on.
        **length: of SAT's trainings.
    """
    of = {"method": "SAT", "of": learnt, **length}
    return {
        "STD, as long again": {"method": "STD", **longer},
        "SAT dealt AMAT's levels": {**of, "median": False},
        "SAT at the median of AMAT's levels": {**of, "median": True},
    }


def fronts_controls(epochs: int) -> dict[str, Settings]:
    """Of a run of a quarter of the epochs whose steps cost ten thirds of a standard one."""
    return controls("AMAT wide on the sphere, mean+4std", {"trainer.max_epochs": round(epochs // 4 * 10 / 3)})


def runs(sat: list[float], wide: Settings) -> dict[str, Settings]:
    """The runs of a host: SAT's levels, and AMAT within wider bounds of its margins than the default's."""
    return {
        **{f"SAT {eps:g}": {"method": "SAT", "eps": eps} for eps in sat},
        **{f"AMAT, mean+{std:g}std": amat(std, train_on="crossing") for std in (0, 1, 2, 4)},
        **{f"AMAT wide, mean+{std:g}std": amat(std, **wide, train_on="crossing") for std in (0, 1, 2, 4)},
        **{f"AMAT wide on the sphere, mean+{std:g}std": amat(std, **wide, train_on="sphere") for std in (0, 1, 2, 4)},
        **{f"AMAT wide balanced, mean+{std:g}std": amat(std, **wide, refinement="balanced") for std in (1, 2)},
        **{
            f"AMAT paper, mean+{std:g}std": amat(std, refinement="paper", train_on="sphere", start="delta")
            for std in (0, 2)
        },
        **{
            f"AMAT wide on the sphere, median+{spread}spread": amat(0, **wide, train_on="sphere")
            | {"rule": f"median+{spread}spread"}
            for spread in (2, 4)
        },
        **{
            f"AMAT wide on the sphere, {rule}, mean+4std": amat(4, **wide, train_on="sphere", refinement=rule)
            for rule in ("balanced", "crossing", "paper")
        },
        **{
            f"AMAT wide on the sphere, any's margin, mean+{std}std": amat(
                std, **wide, train_on="sphere", margin_of="any"
            )
            for std in (2, 4, 8)
        },
        "AMAT wide on the sphere, equal steps, mean+4std": amat(4, **wide, train_on="sphere", schedule="equal"),
        **{f"SAT {eps:g}, equal steps": {"method": "SAT", "eps": eps, "schedule": "equal"} for eps in sat},
        "AMAT wide on the sphere, mean+4std, averaged": amat(4, **wide, train_on="sphere", **AVERAGED),
        "AMAT wide on the sphere, 5 steps, mean+4std": amat(4, **wide, train_on="sphere", steps=5, step_scale=2.3),
        **{f"SAT {eps:g}, 5 steps": {"method": "SAT", "eps": eps, "steps": 5, "step_scale": 2.3} for eps in sat},
        "AMAT wide, 5 steps, mean+2std": amat(2, **wide, steps=5, step_scale=2.3),
        "AMAT wide, 2 steps, mean+2std": amat(2, **wide, steps=2, step_scale=1.5),
    }


SMOOTHED: Settings = {"model.label_smoothing": 0.1}
"""The training loss of a classifier; attacks climb the plain one."""


class Host:
    """The commands of a host.

    Args:
        work: the folder of one seed.
        seed: of the trainings.
    """

    runs: ClassVar[dict[str, Settings]] = {}
    metric = ""
    rising = True
    """Whether more is better."""
    attack = "pgd20"

    @property
    def reports(self) -> Path:
        """Of this attack."""
        return self.work / f"reports_{self.attack}"

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        work.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """What all trainings need."""

    def checkpoint(self, name: str) -> Path:
        raise NotImplementedError

    @property
    def decides(self) -> str:
        """What decides about all runs beside their commands, where the package lies apart."""
        return ""

    def parents(self, name: str) -> list[str]:
        """The runs that a run begins with, or learns from."""
        if name == "STD":
            return []
        return ["STD", *([self.runs[name]["of"]] if "of" in self.runs[name] else [])]

    def clear(self, name: str) -> None:
        """What a training that was cut off has left, where the next one would not write over it."""

    def train(self, name: str) -> list[str]:
        raise NotImplementedError

    def evaluate(self, name: str) -> list[str]:
        raise NotImplementedError

    def report(self, name: str) -> Path:
        raise NotImplementedError


class Lightning(Host):
    """Both tools on Lightning: the demo's configuration."""

    demo: Any
    tool = ""
    device = "cpu"
    only: ClassVar[tuple[str, ...]] = ()
    """Words of the evaluation that leave out what is not looked at."""

    @property
    def content(self) -> Settings:
        """Of the configuration."""
        return dict(self.demo.CONTENT)

    @property
    def decides(self) -> str:
        content = json.dumps(self.content, sort_keys=True, default=str).replace(str(EXAMPLES), "")
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def checkpoint(self, name: str) -> Path:
        return self.work / slug(name) / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"

    def levels(self, name: str) -> Path:
        """The noise levels that a run has given its images, epoch by epoch, where it has noted them."""
        return self.work / slug(name) / "levels.csv"

    def clear(self, name: str) -> None:
        shutil.rmtree(self.work / slug(name), ignore_errors=True)  # or the next one would be its "version_1"

    def prepare(self) -> None:
        (self.work / "demo.yaml").write_text(yaml.safe_dump(self.content, sort_keys=False))

    def train(self, name: str) -> list[str]:
        words = [self.tool, "fit", "--config", str(self.work / "demo.yaml"), "--seed_everything", str(self.seed)]
        settings: Settings = {"method": "STD"} if name == "STD" else dict(self.runs[name])
        if name in {run.get("of") for run in self.runs.values()}:
            settings |= {"trainer.callbacks+": "ingredients.Noted", "trainer.callbacks.file": self.levels(name)}
        if of := settings.pop("of", None):
            settings |= {"trainer.callbacks+": "ingredients.Dealt", "trainer.callbacks.file": self.levels(of)}
            settings |= {"trainer.callbacks.seed": self.seed, "trainer.callbacks.median": settings.pop("median")}
            settings["eps"] = 1.0  # of the configuration; the callback has others for every batch
        chosen = {"model.method.name": settings.pop("method"), "trainer.default_root_dir": self.work / slug(name)}
        if settings.pop("scratch", False):  # as many visits of an image as the other runs have in all
            chosen["trainer.max_epochs"] = self.demo.EPOCHS + self.demo.EPOCHS // 4
            if chosen["model.method.name"] == "AMAT":
                chosen["model.method.thresholds"] = self.checkpoint("STD")
        elif name != "STD":
            chosen |= {"model.network.weights": self.checkpoint("STD"), "trainer.max_epochs": self.demo.EPOCHS // 4}
        for key, value in settings.items():
            where = "attack" if key in ("steps", "step_scale", "norm", "schedule") else "method"
            whole = key.startswith(("model.", "trainer.", "optimizer", "lr_scheduler"))
            chosen[key if whole else f"model.{where}.{key}"] = value
        return words + [str(word) for key, value in chosen.items() for word in (f"--{key}", value)]

    def evaluate(self, name: str) -> list[str]:
        levels = self.demo.EVALUATE[self.demo.EVALUATE.index("--levels") + 1]
        words = [
            "--attacks",
            f"[{self.attack}]",
            "--checks",
            "0",
            "--examples",
            "1",
            "--device",
            self.device,
            "--levels",
            levels,
        ]
        return [
            self.tool,
            "evaluate",
            str(self.checkpoint(name)),
            "--out",
            str(self.reports / slug(name)),
            *words,
            *self.only,
        ]

    def report(self, name: str) -> Path:
        return self.reports / slug(name) / "L2" / "report.json"


class Landmark(Lightning):
    demo, tool, metric, rising = demo_landmark, "adv-landmark", "MRE", False
    runs: ClassVar[dict[str, Settings]] = {
        **runs([0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0], {"margin_min": 0.05, "margin_max": 6.0}),
        **{
            f"AMAT wide on the sphere, mean+{std}std": amat(
                std, margin_min=0.05, margin_max=1.5 * std, train_on="sphere"
            )
            for std in (8, 16)
        },
        **{f"AMAT, margins to 2, mean+{std}std": amat(std, margin_min=0.05, margin_max=2.0) for std in (4, 8)},
        "SAT 0.7, averaged": {"method": "SAT", "eps": 0.7, **AVERAGED},
        **ingredients(1.0, {"margin_min": 0.05, "margin_max": 6.0}, demo_landmark.EPOCHS),
        **shorter(1.0, {"margin_min": 0.05, "margin_max": 6.0}, demo_landmark.EPOCHS),
        **cheaper(1.0, {"margin_min": 0.05, "margin_max": 6.0}, demo_landmark.EPOCHS),
        **decays(1.0, {"margin_min": 0.05, "margin_max": 6.0}, demo_landmark, 1e-4),
        **growing((1.0, 2.0, 3.0, 5.0, 8.0)),
        **fronts_controls(demo_landmark.EPOCHS),
    }


class Classify(Lightning):
    demo, tool, metric = demo_classify, "adv-classify", "accuracy"
    only = ("--norm", "[2]", "--gradcam", "false")
    runs: ClassVar[dict[str, Settings]] = {
        **runs([0.1, 0.2, 0.4, 0.8], {"margin_min": 0.01, "margin_max": 4.0}),
        **{f"AMAT, margins to 0.8, mean+{std}std": amat(std, margin_min=0.01, margin_max=0.8) for std in (2, 4)},
        "AMAT at the boundary": {"method": "AMAT", "rule": "boundary"},
        "AMAT wide, first margins to 0.8, mean+4std": amat(4, margin_min=0.01, margin_max=4.0, eps=0.8),
        **{f"DPAAT {eps:g}": {"method": "DPAAT", "eps": eps} for eps in (0.1, 0.2, 0.4, 0.8)},
        **{f"DPAAT 0.4, rate {lr:g}": {"method": "DPAAT", "eps": 0.4, "model.lr": lr} for lr in (3e-4, 1e-3)},
        "SAT 0.4, averaged": {"method": "SAT", "eps": 0.4, **AVERAGED},
        **ingredients(0.8, {"margin_min": 0.01, "margin_max": 4.0}, demo_classify.EPOCHS),
        **shorter(0.8, {"margin_min": 0.01, "margin_max": 4.0}, demo_classify.EPOCHS),
        **cheaper(0.8, {"margin_min": 0.01, "margin_max": 4.0}, demo_classify.EPOCHS),
        **decays(0.8, {"margin_min": 0.01, "margin_max": 4.0}, demo_classify, 0.01),
        **growing((0.4, 0.8)),
        **fronts_controls(demo_classify.EPOCHS),
        **{f"SAT {eps:g}, smoothed": {"method": "SAT", "eps": eps, **SMOOTHED} for eps in (0.4, 0.8)},
        "AMAT wide on the sphere, mean+4std, smoothed": amat(
            4, margin_min=0.01, margin_max=4.0, train_on="sphere", **SMOOTHED
        ),
        **{f"SAT 0.4, rate {lr:g}": {"method": "SAT", "eps": 0.4, "model.lr": lr} for lr in (3e-4, 1e-3)},
    }


class Yolo(Host):
    metric = "mAP50"
    runs: ClassVar[dict[str, Settings]] = {
        **runs([0.5, 1.0, 1.5, 2.0, 3.0], {"margin_min": 0.1, "margin_max": 16.0}),
        **growing((1.0, 2.0, 3.0, 5.0)),
        **late(2.0, {"margin_min": 0.1, "margin_max": 16.0}),
    }

    def prepare(self) -> None:
        if not (self.work / "bccd").exists():
            shutil.copytree(demo_yolo.SOURCE, self.work / "bccd")
        (self.work / "settings").mkdir(exist_ok=True)
        os.environ |= {"YOLO_CONFIG_DIR": str(self.work / "settings"), "YOLO_OFFLINE": "true"}

    def _common(self) -> list[str]:
        return [f"data={self.work / 'bccd' / 'bccd.yaml'}", f"imgsz={demo_yolo.IMAGE_SIZE}", "device=cpu"]

    def checkpoint(self, name: str) -> Path:
        return self.work / "runs" / slug(name) / "weights" / "last.pt"

    def train(self, name: str) -> list[str]:
        words = ["adv-yolo", "detect", "train", *self._common(), *demo_yolo.COMMON, f"seed={self.seed}"]
        words += [f"project={self.work / 'runs'}", f"name={slug(name)}", "exist_ok=True"]
        if name == "STD":
            return [*words, f"model={demo_yolo.MODEL}", *demo_yolo.STANDARD]
        settings = [
            f"{key}={str(value).lower() if key == 'method' else value}" for key, value in self.runs[name].items()
        ]
        return [*words, f"model={self.checkpoint('STD')}", *demo_yolo.ATTACK, *settings]

    def evaluate(self, name: str) -> list[str]:
        words = [
            f"model={self.checkpoint(name)}",
            *self._common(),
            "levels=0,1,2,4",
            f"attacks={self.attack}",
            "checks=0",
        ]
        return ["adv-yolo", "evaluate", *words, "batch=8", "examples=1", f"out={self.reports / slug(name)}"]

    def report(self, name: str) -> Path:
        return self.reports / slug(name) / "report.json"


HOSTS: dict[str, type[Host]] = {"landmark": Landmark, "classify": Classify, "yolo": Yolo}


def call(words: list[str], log: Path, needs: Sequence[str] = ()) -> str:
    """A command that is not finished yet, on one thread; its log, and how long it took.

    Args:
        words: of the command.
        log: its file; beside it, a note of what was done.
        needs: what this function has returned for the calls whose results are used.

    Returns:
        A name of this very run: another one when it is done anew.
    """
    if found := finished(words, log, needs):
        return found
    done = log.with_suffix(".done")
    done.unlink(missing_ok=True)
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]  # the first for ingredients.py
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    executable = Path(sysconfig.get_path("scripts")) / words[0]
    with log.open("w") as out:
        code = subprocess.run([str(executable), *words[1:]], env=environment, stdout=out, stderr=out).returncode
    if code:
        sys.exit(f"{' '.join(words)}\nfailed; its log: {log}")
    name = uuid.uuid4().hex
    seconds = round(time.monotonic() - start, 1)
    what = {"command": words, "needs": list(needs), "id": name, "seconds": seconds, "code": code_of()}
    done.write_text(json.dumps(what))
    return name


@cache
def code_of() -> str:
    """Tells the product's code from another: a hash of its source, 12 hex digits."""
    names = ("advmed", "adv_classify", "adv_landmark", "adv_yolo")
    places = [Path(str(spec.origin)).parent for name in names if (spec := importlib.util.find_spec(name))]
    files = [file for place in places for file in sorted(place.rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def codes(work: Path, found: Mapping[str, Mapping[int, Any]]) -> str:
    """A line that says which code trained which rows; a row whose seeds are of several stands under each."""
    rows: dict[str, list[str]] = {}
    for name, by_seed in found.items():
        for seed in by_seed:
            done = noted(work / str(seed) / "logs" / f"{slug(name)}.train.done") or {}
            of_code = rows.setdefault(str(done.get("code", "not noted")), [])
            if name not in of_code:
                of_code.append(name)
    if len(rows) == 1:
        return f"Trained by one version of the code: {next(iter(rows))}"
    return "\n".join(f"Trained by code {code}: {', '.join(names)}" for code, names in rows.items())


def finished(words: Sequence[str], log: Path, needs: Sequence[str]) -> str:
    """The name of the run that has finished this very call; empty if there is none."""
    found = noted(log.with_suffix(".done"))
    return str(found["id"]) if found and (found["command"], found["needs"]) == (list(words), list(needs)) else ""


def noted(done: Path) -> dict[str, Any] | None:
    """What is known of a finished call."""
    try:
        found = json.loads(done.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) else None


def work_on(host: Host, name: str) -> None:
    logs = host.work / "logs"
    logs.mkdir(exist_ok=True)
    words, log = host.train(name), logs / f"{slug(name)}.train.log"
    parents = [noted(logs / f"{slug(one)}.train.done") for one in host.parents(name)]
    needs = [host.decides, *(parent["id"] for parent in parents if parent)]
    if not finished(words, log, needs):
        host.clear(name)
    trained = call(words, log, needs)
    words, log = host.evaluate(name), logs / f"{slug(name)}.{host.attack}.log"
    if not finished(words, log, [trained]):
        shutil.rmtree(host.reports / slug(name), ignore_errors=True)  # of another network
    call(words, log, [trained])
    print(f"{time.strftime('%H:%M:%S')} {host.work.name} {name} {curve(host, name)}", flush=True)


def curve(host: Host, name: str) -> list[float]:
    """Clean, then at every level, then the mean over all levels: the area under the curve by the largest level."""
    (model,) = json.loads(host.report(name).read_text())["results"][host.metric]["models"].values()
    attack = model["attacks"][host.attack]
    values = [*attack["values"]]
    levels = attack["levels"]
    area = sum((b - a) * (x + y) / 2 for a, b, x, y in zip(levels, levels[1:], values, values[1:], strict=False))
    return [*values, area / levels[-1]]


def margins(host: Host, name: str) -> list[float]:
    """Quartiles of the margins, least and largest; nothing where there are none."""
    for found in json.loads(host.report(name).read_text())["margins"].values():
        return [float(value) for value in found["quantiles"].values()]
    return []


def said(values: Sequence[float] | np.ndarray, sign: str = "") -> str:
    """Mean and standard error."""
    mean = f"{np.mean(values):{sign}.3f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


def beyond(rising: bool, curves: dict[int, list[float]], dial: list[dict[int, list[float]]]) -> str:
    """How much better a run is than the best of a dial's line that is as good on clean images, seed by seed.

    Args:
        rising: whether more is better.
        curves: of the run, by seed: the clean metric first, the mean of the curve last.
        dial: of the dial's settings in their order.

    Returns:
        The mean of the seeds that all have, and its standard error; in how many the run is better on clean images than
        any point of the line, so that nothing can be said.
    """
    sign = 1 if rising else -1
    seeds = [seed for seed in curves if all(seed in one for one in dial)]
    if len(dial) < 2 or not seeds:
        return ""
    gains = []
    for seed in seeds:
        line = sign * np.array([[one[seed][0], one[seed][-1]] for one in dial])
        own = sign * np.array([curves[seed][0], curves[seed][-1]])
        gains.append(float(own[1] - attainable(line[:, 0], line[:, 1], own[0])))
    known = [gain for gain in gains if not math.isnan(gain)]
    if not known:
        return "cleaner than all of it"
    left = f"; {len(known)} of {len(seeds)} seeds, cleaner than all of it in the others"
    return said(known, "+") + (left if len(known) < len(seeds) else "")


def table(kind: type[Host], work: Path, seeds: list[int]) -> str:
    """A row for each run, means over the seeds, ± their standard error."""
    found = measured(kind, work, seeds)
    learnt = {name: [margins(kind(work / str(seed), seed), name) for seed in curves] for name, curves in found.items()}
    dial = ["STD", *(name for name in found if re.fullmatch("SAT [0-9.]+", name))]
    heads = [kind.metric, "seeds", "clean", "at the levels", "mean over all levels", "better than SAT's front by"]
    lines = ["| " + " | ".join([*heads, "margins, quartiles"]) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, by_seed in found.items():
        rows = np.array(list(by_seed.values()))
        over = "" if name in dial else beyond(kind.rising, by_seed, [found[one] for one in dial])
        cells = [name, f"{len(rows)}", said(rows[:, 0]), " / ".join(f"{value:.3f}" for value in rows.mean(0)[1:-1])]
        cells += [said(rows[:, -1]), over]
        cells.append(" / ".join(f"{value:.2f}" for value in np.mean(learnt[name], 0)) if learnt[name][0] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured(kind: type[Host], work: Path, seeds: Sequence[int]) -> dict[str, dict[int, list[float]]]:
    """The curve of every run, by its name and seed."""
    found: dict[str, dict[int, list[float]]] = {}
    for name in ["STD", *kind.runs]:
        hosts = [kind(work / str(seed), seed) for seed in seeds]
        if curves := {host.seed: curve(host, name) for host in hosts if host.report(name).is_file()}:
            found[name] = curves
    return found


def paired(rising: bool, curves: dict[str, dict[int, list[float]]], other: str) -> str:
    """How much better every run is than that other one, clean and in the mean of the curve, in the seeds of both."""
    sign = 1 if rising else -1
    lines = [f"| better than {other} by | seeds | clean | mean over all levels |", "|---" * 4 + "|"]
    for name, own in curves.items():
        seeds = [seed for seed in own if seed in curves[other] and name != other]
        gains = sign * np.array([np.subtract(own[seed], curves[other][seed]) for seed in seeds])
        if seeds:
            lines.append(f"| {name} | {len(seeds)} | {said(gains[:, 0], '+')} | {said(gains[:, -1], '+')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("--work", type=Path, default=Path("build/fronts"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="a regular expression; runs whose name it matches")
    parser.add_argument("--attack", default="pgd20", help="of the evaluation, default: pgd20")
    parser.add_argument("--table", action="store_true", help="print what there is")
    parser.add_argument("--metric", help="of the table, another one of the reports than the host's first")
    parser.add_argument("--beside", nargs="+", default=[], metavar="RUN", help="print differences to it, seed by seed")
    options = parser.parse_args()
    kind, work = HOSTS[options.host], options.work.resolve() / options.host
    kind.attack, kind.metric = options.attack, options.metric or kind.metric
    if not options.table:
        run_all(kind, work, options.seeds, options.jobs, options.only)
    print(table(kind, work, options.seeds))
    curves = measured(kind, work, options.seeds)
    if curves:
        print("\n" + codes(work, curves))
    if unknown := [name for name in options.beside if name not in curves]:
        parser.error(f"--beside: no run is called {unknown[0]!r}; there are {', '.join(curves)}")
    for name in options.beside:
        print("\n" + paired(kind.rising, curves, name))


def run_all(kind: type[Host], work: Path, seeds: list[int], jobs: int, only: str) -> None:
    """Whatever is not finished; standard networks first."""
    hosts = [kind(work / str(seed), seed) for seed in seeds]
    for host in hosts:
        host.prepare()
    chosen = [name for name in kind.runs if re.search(only, name)]
    later = [name for name in chosen if "of" in kind.runs[name]]  # they need what another one has learnt
    learnt = {kind.runs[name]["of"] for name in later}
    first = [name for name in kind.runs if name not in later and (name in chosen or name in learnt)]
    for names in (["STD"], first, later):
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda one: work_on(*one), [(host, name) for host in hosts for name in names]))


if __name__ == "__main__":
    main()
