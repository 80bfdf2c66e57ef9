"""What a host on Lightning owes its users, as tests: training, resuming, thresholds, checkpoints, mistakes, evaluation.

Describe a host in a subclass of :class:`LightningHost`, and have pytest collect a subclass of
:class:`LightningInputContract` and :class:`LightningTrainingContract`, in a file of tests::

    @pytest.fixture(scope="session")
    def host(tmp_path_factory):
        return MyHost(tmp_path_factory.mktemp("host"))

    class TestInput(LightningInputContract):
        pass

    class TestTraining(LightningTrainingContract):
        pass

The description must be importable (``from my_tests.my_host import MyHost``), because some tests start processes of
their own. With ``pytest.register_assert_rewrite("advmed.testing.lightning")`` in the conftest of all tests, a failed
comparison shows its values. What is particular to a host, its loss, its metrics and its data, needs tests beside these.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from advmed.attacks import PGD
from advmed.cli.runner import report_line
from advmed.integrations.lightning import RobustModule, SampleData
from advmed.integrations.lightning.calibration import Judgement, look, measure
from advmed.methods import METHODS, SAT, AdaptiveRadiusMethod, AdversarialMethod, method_class
from advmed.thresholds import DEFAULT_RULE, Thresholds
from advmed.training.run import fingerprint

Options = Mapping[str, Any]
"""Options of the command by their names, with ``__`` for a dot; one that is None is left out."""


@dataclass(frozen=True)
class Run:
    """A training's folder and what is in it."""

    folder: Path

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch."""
        return self.folder / "checkpoints" / "best.ckpt"

    @property
    def last(self) -> Path:
        """The checkpoint of the last epoch."""
        return self.folder / "checkpoints" / "last.ckpt"

    def table(self, name: str = "metrics.csv") -> list[dict[str, str]]:
        """The rows of a CSV file."""
        with (self.folder / name).open(newline="") as file:
            return list(csv.DictReader(file))

    def logged(self, name: str) -> list[float]:
        """The values of a column of metrics.csv."""
        return [float(row[name]) for row in self.table() if row.get(name)]

    def yaml(self, name: str = "config.yaml") -> Any:
        """The content of a YAML file."""
        return yaml.safe_load((self.folder / name).read_text(encoding="utf-8"))

    def state(self, name: str = "last") -> dict[str, Any]:
        """The content of a checkpoint."""
        found: dict[str, Any] = torch.load(self.last.with_stem(name), weights_only=True)
        return found

    def weights(self, name: str = "last") -> dict[str, Tensor]:
        """The network of a checkpoint."""
        found: dict[str, Tensor] = self.state(name)["state_dict"]
        return found

    @property
    def margins(self) -> dict[str, Any]:
        """(noise level, visits) of every id, as the run has written them down."""
        return {row["id"]: (float(row["margin"]), int(row["visits"])) for row in self.table("margins.csv")}


class LightningHost(ABC):
    """A host under test: what the contract must know of it, and its command, run in this process.

    Beside what :class:`RobustModule` and the command give every host, the module is expected to have the arguments
    ``network``, with a file of ``weights``, and ``validation_steps``, of the attack in validation at ``eps``; and
    ``predict`` to write ``predictions.csv``, whose first column is the id.

    Args:
        folder: where its images and trainings are kept.
    """

    entry: ClassVar[str]
    """The function of its command, as ``package.cli:main``."""
    module: ClassVar[type[RobustModule]]
    data: ClassVar[type[SampleData]]
    """The class of the images that :meth:`write` writes."""
    counts: ClassVar[Mapping[str, int]] = {"train": 8, "val": 4, "test": 3}
    """Number of images of each split."""
    batch_size: ClassVar[int] = 4
    network: ClassVar[Options]
    """A small network, without dropout."""
    batch_norms: ClassVar[Sequence[Options]]
    """Small networks with BatchNorm."""
    other_network: ClassVar[Options]
    """Another network, which no checkpoint of the first fits."""
    monitor: ClassVar[tuple[str, str]]
    """The logged value that the best checkpoint of a standard training is chosen by, and "max" or "min"; that of an
    adversarial one by the same of attacked images.
    """
    noise: ClassVar[Mapping[str, tuple[float, float]]]
    """eps and delta for these images where the user gives none, by the norm, "2" and ".inf"."""
    rule: ClassVar[str] = DEFAULT_RULE
    """How thresholds are made where the user does not say."""
    middling: ClassVar[Sequence[float]]
    """Thresholds that some of the images are below and some above, for two processes."""
    learning: ClassVar[Options]
    """A training that learns the images, with ``trainer__max_epochs`` and ``model__lr``."""
    easy: ClassVar[Options] = {"trainer__max_epochs": 2}
    """A training of two epochs or more by any method."""
    target: ClassVar[float | None] = None
    """What the monitored value must have reached at the end of the easy training; None: it is too short."""
    wavering: ClassVar[Options]
    """A training whose best epoch is neither its worst nor its last."""
    augmented: ClassVar[Options]
    """Random augmentation."""
    stateful: ClassVar[Options] = {}
    """What else there is to be resumed: a network with statistics and dropout, another order of images."""
    metric: ClassVar[str]
    """The metric of an evaluation whose value of each image :meth:`per_image` computes."""
    evaluation: ClassVar[Sequence[object]] = ()
    """More words for an evaluation."""
    levels: ClassVar[Mapping[str, Sequence[float]]]
    """Noise levels of an evaluation of these images where the user gives none, by "L2" and "Linf"."""
    norms: ClassVar[Sequence[str]] = ("L2", "Linf")
    """What is evaluated where the user does not say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = self.write(folder / "images", self.counts)
        self.said: list[str] = []
        self._kept: dict[str, Run] = {}

    # What a host gives

    @property
    def together(self) -> Options:
        """More for trainings by two processes."""
        return {}

    @abstractmethod
    def write(self, folder: Path, counts: Mapping[str, int]) -> dict[str, Any]:
        """Writes images into a new folder; returns the options of :attr:`data` that read them."""

    @abstractmethod
    def other_truth(self, folder: Path) -> dict[str, Any]:
        """The same images under the same ids with another truth; returns the options."""

    @abstractmethod
    def scores(self, model: Any, batch: dict[str, Any]) -> dict[str, float]:
        """What validation must log of a batch, by the names without split and slash, computed by other means."""

    @abstractmethod
    def terms(self, model: Any, batch: dict[str, Any]) -> NDArray[Any]:
        """The loss terms of a batch, (B, K), computed by other means."""

    @abstractmethod
    def per_image(self, model: Any, batch: dict[str, Any]) -> Sequence[float]:
        """The value of :attr:`metric` of each image of a batch, computed by other means."""

    @classmethod
    def independent(cls) -> AbstractContextManager[None]:
        """Where the images of a batch do not know of each other; a host with BatchNorm replaces it."""
        return nullcontext()

    # Its commands

    @classmethod
    def main(cls, words: Sequence[object]) -> int:
        """Runs the command in this process."""
        sys.argv[1:] = [str(word) for word in words]
        status: int = resolve_name(cls.entry)()
        return status

    def call(self, *words: object) -> tuple[int, str, str]:
        """Runs the command; returns its status and what it prints. :attr:`said` is what Lightning's loggers say."""
        out, err = io.StringIO(), io.StringIO()
        with unchanged_process(), listening() as self.said, redirect_stdout(out), redirect_stderr(err):
            status = self.main(words)
        return status, out.getvalue(), err.getvalue()

    def ok(self, *words: object) -> str:
        """Runs a command that must succeed; returns what it prints."""
        status, out, err = self.call(*words)
        assert status == 0, err
        return out

    def fails(self, *words: object) -> str:
        """Runs a command that must fail; returns its one message."""
        status, _, err = self.call(*words)
        assert status == 1, err
        assert "Traceback" not in err
        told = err[err.index(f"{self.module.command}: ") :].removeprefix(f"{self.module.command}: ").strip()
        assert "Union" not in told
        assert told.count("\n") <= 2
        return told

    def words(self, folder: Path, **changes: object) -> list[str]:
        """The options of a short training whose runs go to a folder."""
        given = {
            "data": self.data.__name__,
            **{f"data__{name}": value for name, value in self.images.items()},
            "data__batch_size": self.batch_size,
            "data__workers": 0,
            **self.network,
            "model__attack__steps": 2,
            "trainer__accelerator": "cpu",
            "trainer__enable_progress_bar": "false",
            "trainer__enable_model_summary": "false",
            "trainer__log_every_n_steps": 1,
            "trainer__max_epochs": 1,
            "trainer__default_root_dir": folder,
        }
        return in_words({**given, **changes})

    def reading(self, images: Options | None = None, **changes: object) -> list[str]:
        """The words by which a command reads images, those of :attr:`folder` if none are given, on the CPU."""
        options = {**(self.images if images is None else images), "workers": 0, **changes}
        quick = {"trainer__accelerator": "cpu", "trainer__enable_progress_bar": "false"}
        return in_words({"data": self.data.__name__, **{f"data__{k}": v for k, v in options.items()}, **quick})

    def fit(self, folder: Path, **changes: object) -> Run:
        """Trains by the command."""
        self.ok("fit", *self.words(folder, **changes))
        return runs(folder)[-1]

    def refused(self, **changes: object) -> str:
        """The message of a training that must not begin."""
        with tempfile.TemporaryDirectory() as name:
            message = self.fails("fit", *self.words(Path(name), **changes))
            left = {path.name for path in Path(name).rglob("*") if path.is_file()}
        left = {name for name in left if not name.startswith(".advmed_")}  # what is remembered of images
        assert left <= {"config.yaml", "hparams.yaml"}  # Lightning writes them before it asks anybody
        return message

    def kept(self, name: str, **changes: object) -> Run:
        """A training that several tests look at, done once."""
        if name not in self._kept:
            self._kept[name] = self.fit(self.folder / name, **changes)
        return self._kept[name]

    @property
    def standard(self) -> Run:
        """A standard training that has learnt the images, validated under attack."""
        attacked = {"model__validation_steps": 3, "model__method__eps": 1.5}
        return self.kept("standard", **attacked, **self.learning)

    @property
    def adaptive(self) -> Run:
        """A training by AMAT, of augmented images."""
        return self.kept("adaptive", trainer__max_epochs=3, model__method__name="AMAT", **self.augmented)

    def read(self, **changes: object) -> Any:
        """The data module of the images."""
        return self.data(**{**self.images, "batch_size": self.batch_size, "workers": 0, **changes})

    def ids(self, split: str) -> list[str]:
        """The ids of a split, in their order."""
        return list(self.read().splits[split].ids)

    def batch(self, split: str) -> dict[str, Any]:
        """All images of a split as one batch."""
        found: dict[str, Any] = default_collate(list(self.read().dataset(split)))
        return found

    @property
    def robust(self) -> str:
        """The logged value that the best checkpoint of an adversarial training is chosen by."""
        return self.monitor[0].replace("val/", "val/robust_")

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.counts["train"] / self.batch_size)

    @cached_property
    def report(self) -> Path:
        """The reports of an evaluation of the standard training, "plain", and the adaptive one, "own"."""
        self.ok(
            "evaluate", self.standard.last, self.adaptive.last, "--names", "[plain,own]", "--norm", "[2,inf]",
            "--levels", "[0,0.5,1.5]", "--levels_inf", "[0,0.02]", "--attacks", "[pgd2,ifgsm2]",
            "--examples", 2, "--checks", 3, "--out", self.folder / "report", *self.evaluation,
        )  # fmt: skip
        return self.folder / "report"


def watched_by(run: Run) -> tuple[str, str]:
    """What the best epoch of a run was chosen by, and "max" or "min"."""
    (name,) = (name for name in run.state("best")["callbacks"] if name.startswith("BestCheckpoint"))
    found = ast.literal_eval(name[name.index("{") : name.index("}") + 1])
    return found["monitor"], found["mode"]


def in_words(options: Options) -> list[str]:
    """Options as words of a command line."""
    pairs = {f"--{name.replace('__', '.')}": value for name, value in options.items() if value is not None}
    return [word for name, value in pairs.items() for word in (name, str(value))]


def runs(folder: Path) -> list[Run]:
    """The runs in a folder, the latest last."""
    found = (folder / "lightning_logs").glob("version_*")
    return [Run(path) for path in sorted(found, key=lambda path: int(path.name.split("_")[1]))]


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Undoes what a command does to its process: it sets a seed, which Lightning notes in the environment."""
    before, path, argv = dict(os.environ), list(sys.path), list(sys.argv)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.path[:], sys.argv[:] = path, argv


@contextmanager
def listening() -> Iterator[list[str]]:
    """What Lightning's loggers say."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener, loggers = Listener(), [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    for logger in loggers:
        logger.addHandler(listener)
    yield lines
    for logger in loggers:
        logger.removeHandler(listener)


def close(first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, atol: float = 1e-5, rtol: float = 1e-4) -> None:
    """Two networks are the same but for rounding."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


def moved(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The largest difference of two networks."""
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def learnt_by_gradients(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network without the running statistics of its BatchNorm, which learn from every pass."""
    return {k: v for k, v in weights.items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))}


def only_plain(value: Any) -> bool:
    """Whether a value is made of plain types, which need no package to be read."""
    if isinstance(value, dict):
        return all(only_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple)):
        return all(map(only_plain, value))
    return value is None or type(value) in (str, int, float, bool)


@dataclass
class Steps:
    """What a training met: the ids of every batch, and the network that it began with."""

    ids: list[list[str]] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)


def watched_steps(patch: pytest.MonkeyPatch, module: type[RobustModule]) -> Steps:
    """What trainings meet from here on."""
    found, step = Steps(), module.training_step

    def noted(self: RobustModule, batch: Any, batch_idx: int) -> Tensor:
        if not found.ids:
            found.start.update({name: value.detach().clone() for name, value in self.named_parameters()})
        found.ids.append(list(batch["id"]))
        return step(self, batch, batch_idx)

    patch.setattr(module, "training_step", noted)
    return found


def noted_rates(patch: pytest.MonkeyPatch, module: type[RobustModule]) -> list[float]:
    """The learning rate of every step from here on."""
    rates, step = list[float](), module.training_step

    def noted(self: RobustModule, batch: Any, batch_idx: int) -> Tensor:
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return step(self, batch, batch_idx)

    patch.setattr(module, "training_step", noted)
    return rates


def counted_passes(patch: pytest.MonkeyPatch, module: type[RobustModule]) -> list[bool]:
    """An entry for every pass through a network in training mode that steps from here on make."""
    found: list[bool] = []
    start = module.on_fit_start

    def begun(self: RobustModule) -> None:
        start(self)
        network: Any = self.network
        network.register_forward_pre_hook(lambda part, _: found.append(True) if part.training else None)

    patch.setattr(module, "on_fit_start", begun)
    return found


def watched_attacks(patch: pytest.MonkeyPatch, module: type[RobustModule]) -> list[bool]:
    """Whether the network is in training mode, for every attack from here on, none of which may leave a trace in it:
    weights, running statistics, training flags, gradients, to the last bit.
    """
    attack, start = PGD.__call__, module.on_fit_start
    models: list[RobustModule] = []
    found: list[bool] = []

    def begun(self: RobustModule) -> None:
        models.append(self)
        start(self)

    def watched(self: PGD, *given: Any, **how: Any) -> Any:
        (model,) = models
        before = {key: value.clone() for key, value in model.state_dict().items()}
        flags = [part.training for part in model.modules()]
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        result = attack(self, *given, **how)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert flags == [part.training for part in model.modules()]
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert (p.grad is None) == (gradient is None)
            assert gradient is None or p.grad is None or torch.equal(p.grad, gradient)
        found.append(flags[1])  # of the network; the module itself comes first
        return result

    patch.setattr(module, "on_fit_start", begun)
    patch.setattr(PGD, "__call__", watched)
    return found


SGD: Options = {"optimizer": "SGD", "optimizer__lr": 0.005, "optimizer__momentum": 0.9}
PLAIN: Options = {"trainer__max_epochs": 2, "model__method__name": "STD", **SGD}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
}
"""A Trainer of one's own that leaves nothing."""
BOTH = {"loss_clean", "loss_adversarial"}
LOSSES = {
    "STD": {"loss_clean"},
    "AT": {"loss_adversarial"},
    "SAT": BOTH,
    "AMAT": BOTH,
    "TRADES": {*BOTH, "loss_sync"},
    "DPAAT": {*BOTH, "loss_sync"},
}
"""What the methods log of an epoch beside the attack and the noise levels."""
FORKS = """
import json, os, signal, sys
from pkgutil import resolve_name
main, module = map(resolve_name, sys.argv[1:])
step = module.training_step
def stop(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == (2, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
statuses = []
for name, words in json.loads(os.environ["ADVMED_RUNS"]).items():
    sys.stderr.flush()
    child = os.fork()
    if not child:
        module.training_step = stop if name == "killed" else step
        sys.argv[1:] = words
        status = main()
        sys.stderr.flush()
        os._exit(status)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""
"""Runs each of several commands in a process of its own, and kills one of them; all begin with the same imports."""
EPOCHS = 3
PROCESSES: dict[str, dict[str, Any]] = {
    "dpaat": {"model__method__name": "DPAAT"},
    "moved": {"model__method__name": "DPAAT", "model__method__awp": 0.01, "optimizer__lr": 0.002},
    "amat": {
        "model__method__name": "AMAT",
        "model__method__delta": 0.2,
        "model__method__refinement": "crossing",
        "model__method__margin_min": 0.3,  # or all begin at 0, and grow alike
        "model__method__margin_max": 0.8,  # far out, an attack makes much of the last bit
        "checkpoint__save_on_train_epoch_end": "false",
    },
    "calibrated": {
        "model__method__name": "AMAT",
        "model__method__delta": 0.2,
        "model__network__weights": None,  # those of a standard network would come with thresholds
    },
}
"""Options of the trainings by two processes, of so many epochs."""


class OwnFolder:
    """Tests in whose folder nothing is but what the command leaves there."""

    @pytest.fixture(autouse=True)
    def own_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Goes to the folder of the test."""
        monkeypatch.chdir(tmp_path)


class LightningInputContract(OwnFolder):
    """Images in their order, and mistakes: tests that train nothing. The fixture ``host`` gives the host."""

    # Images

    def test_images_come_once_an_epoch_in_an_order_of_their_seed(self, host: LightningHost) -> None:
        """With ids that are the same whatever is done with the images."""

        def order(**changes: Any) -> list[list[str]]:
            loader = host.read(**changes).train_dataloader()
            return [[i for batch in loader for i in batch["id"]] for _ in range(3)]

        first = order(seed=3)
        assert order(seed=3) == first
        assert order(seed=4) != first
        assert len({tuple(epoch) for epoch in first}) == 3
        assert all(sorted(epoch) == sorted(set(host.ids("train"))) == sorted(host.read().train_ids) for epoch in first)
        batch = next(iter(host.read(batch_size=3).train_dataloader()))
        assert (batch["image"].shape[0], batch["image"].dtype, len(batch["id"])) == (3, torch.float32, 3)

    def test_the_order_and_the_augmentation_go_on_where_a_saved_state_ends(self, host: LightningHost) -> None:
        changes = {key.removeprefix("data__"): v for key, v in host.augmented.items() if key.startswith("data__")}
        data, resumed = (host.read(seed=3, **changes) for _ in range(2))
        loader = data.train_dataloader()
        for _ in range(2):
            list(loader)
        state = data.state_dict()
        wanted = list(loader)
        resumed.load_state_dict(state)
        for one, other in zip(wanted, resumed.train_dataloader(), strict=True):
            assert one["id"] == other["id"]
            assert torch.equal(one["image"], other["image"])

    def test_a_last_batch_of_one_image_is_left_out_in_training(self, host: LightningHost, tmp_path: Path) -> None:
        """BatchNorm cannot work with it."""
        for count, sizes in ((9, [4, 4]), (10, [4, 4, 2]), (8, [4, 4])):
            images = host.write(tmp_path / f"{count}", {"train": count, "val": 5})
            data = host.data(**images, batch_size=4, workers=0)
            assert [len(batch["id"]) for batch in data.train_dataloader()] == sizes
            assert [len(batch["id"]) for batch in data.val_dataloader()] == [4, 1]
            assert {i for batch in data.val_dataloader() for i in batch["id"]} == set(data.splits["val"].ids)
        assert len(host.read(batch_size=1).train_dataloader()) == host.counts["train"]
        assert next(iter(data.predict_dataloader()))["id"] == data.splits["val"].ids[:4]
        assert next(iter(host.read().predict_dataloader()))["id"][0] == host.ids("test")[0]
        with pytest.raises(ValueError, match="the data has no split 'test'; there are train, val"):
            data.test_dataloader()

    def test_workers_read_the_same_images(self, host: LightningHost) -> None:
        alone, helped = (next(iter(host.read(workers=workers).val_dataloader())) for workers in (0, 1))
        assert alone["id"] == helped["id"]
        assert torch.equal(alone["image"], helped["image"])

    # Mistakes

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"model__method__epz": 1}, ["unrecognized arguments: --model.method.epz 1"]),
            ({"data__colour": 1}, ["'colour' is not accepted", "fit --data.help", "lists what is"]),
            ({"model__method": "AMAT"}, ["there is no file AMAT; single settings: --model.method.name AMAT"]),
            ({"model__attack": 7}, ["--model.attack.steps 7"]),
            ({"data": "Pictures"}, ["Pictures"]),
            ({"data__batch_size": 0}, ["batch_size must be >= 1, got 0"]),
            ({"config": "none.yaml"}, ["none.yaml"]),
            ({"model__method__eps": "high"}, ['"model.method.eps"', "Got value: high"]),
            ({"model__method__eps": -1}, ["eps must be a finite number >= 0, got -1.0"]),
            ({"model__method__name": "FREE"}, ["unknown method 'FREE'; there are STD, AT, "]),
            (
                {"model__method__name": "DPAAT", "model__method__eps": 1, "model__method__eps_min": 2},
                ["need eps_min <= eps", "got eps_min 2"],
            ),
            ({"model__method__name": "DPAAT", "model__method__eps_min": 9.0}, ["got eps_min 9"]),
            ({"model__method__name": "AMAT", "model__method__warmup_epochs": 0}, ["rules out self-calibration"]),
            ({"model__method__name": "AMAT"}, ["leaves no adversarial epoch"]),  # the one epoch is warm-up
            ({"model__method__backward": "sequential"}, ["backward 'sequential' is not to be had with Lightning"]),
            ({"model__attack__norm": 1}, ["norm must be 2 or inf (L2 or Linf), got 1.0"]),
            ({"model__attack__steps": 0}, ["steps must be a whole number >= 1, got 0"]),
            ({"model__attack__bounds": "[1,0]"}, ["bounds must be (lowest, highest) with lowest < highest"]),
            ({"trainer__max_epochs": -1}, ["set max_epochs, got -1"]),
            ({"trainer__max_epochs": None, "trainer__max_steps": 3}, ["set max_epochs, got -1"]),
            ({"trainer__accelerator": "tpu"}, []),
        ],
    )
    def test_mistakes_are_told_before_anything_is_trained(
        self, host: LightningHost, changes: dict[str, Any], parts: list[str]
    ) -> None:
        message = host.refused(**changes)
        for part in parts:
            assert part in message

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"model": {"method": {"epz": 1}}}, "model.method.epz"),
            ({"model": {"methods": {"eps": 1}}}, "model.methods"),
            ({"model": {"network": {"neurons": 1}}}, "model.network.neurons"),
            ({"trainer": {"epochs": 3}}, "trainer.epochs"),
            ({"data": {"init_args": {"colour": "x"}}}, "'colour'"),
            ({"surprise": 1}, "surprise"),
        ],
    )
    def test_unknown_keys_of_a_configuration(self, host: LightningHost, content: dict[str, Any], message: str) -> None:
        words = host.words(Path("runs"))
        if "data" in content:
            content["data"]["class_path"] = host.data.__name__
            words = [w for pair in zip(words[::2], words[1::2], strict=True) if "data" not in pair[0] for w in pair]
        Path("own.yaml").write_text(yaml.safe_dump(content))
        assert message in host.fails("fit", "--config", "own.yaml", *words)
        assert not list(Path().rglob("*.ckpt"))

    @pytest.mark.parametrize("words", [["train"], [], ["fit"], ["evaluate"], ["thresholds"]])
    def test_commands_that_are_none(self, host: LightningHost, words: list[str]) -> None:
        message = host.fails(*words)
        assert "\n" not in message
        assert any(part in message for part in ("invalid choice: 'train'", "required", "expected"))

    def test_a_traceback_for_those_who_look_for_it_and_for_what_is_nobodys_mistake(
        self, host: LightningHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def bug(*_: Any) -> None:
            raise KeyError("a bug")

        with pytest.raises(ValueError, match="batch_size must be >= 1"):
            host.call("--debug", "fit", *host.words(Path("runs"), data__batch_size=0))
        monkeypatch.setattr(host.module, "configure_optimizers", bug)
        with pytest.raises(KeyError, match="a bug"):
            host.call("fit", *host.words(Path("runs")))

    @pytest.mark.parametrize("command", ["validate", "test", "predict"])
    def test_an_untrained_network_is_not_judged(self, host: LightningHost, command: str) -> None:
        words = [*host.reading(), *in_words(host.network)]
        wanted = f"{command} needs a trained network: name its checkpoint with --ckpt_path"
        assert host.fails(command, *words).endswith(wanted)
        assert "none.ckpt" in host.fails(command, *words, "--ckpt_path", "none.ckpt")
        assert not list(Path().rglob("predictions.csv"))

    @pytest.mark.parametrize("content", [None, {"state_dict": {}}, b"nothing", {"hyper_parameters": {"network": {}}}])
    def test_what_is_no_checkpoint(self, host: LightningHost, tmp_path: Path, content: Any) -> None:
        path = tmp_path / "other.ckpt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        kind = FileNotFoundError if content is None else ValueError
        with pytest.raises(kind, match="there is no" if content is None else "cannot be read|is no checkpoint of"):
            host.module.from_checkpoint(path)


class LightningTrainingContract(OwnFolder):
    """What needs a trained network, some of it several: minutes. The fixture ``host`` gives the host."""

    # Training

    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_trains_and_says_what_an_epoch_was(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """Its attacks, and those of validation, leave no trace in the network."""
        try:
            kind = method_class(name, host.module.objective_class)
        except TypeError as error:
            assert str(error) in host.refused(model__method__name=name)
            return
        attacked = watched_attacks(monkeypatch, host.module)
        calibrated = kind.needs_thresholds(host.module.objective_class)
        given: dict[str, Any] = {**host.easy, **({"model__method__warmup_epochs": 1} if calibrated else {})}
        given |= {"model__method__name": name, "model__validation_steps": 1, "trainer__num_sanity_val_steps": 0}
        run = host.fit(tmp_path, **given)
        epochs = host.easy["trainer__max_epochs"]
        hostile = (epochs - calibrated) * issubclass(kind, AdversarialMethod)
        assert (sum(attacked), len(attacked) - sum(attacked)) == (
            hostile * host.steps,
            epochs * math.ceil(host.counts["val"] / host.batch_size),
        )
        attack = {"nonfinite", "attack_seconds"} if hostile else set()
        sizes = {"margin_q05", "margin_q50", "margin_q95"} if issubclass(kind, AdaptiveRadiusMethod) else set()
        wanted = attack | sizes | ({"expanded"} if sizes else set()) | LOSSES.get(name, set())
        found = {key.removeprefix("adv/") for key in run.table()[-1] if key.startswith("adv/")}
        assert found == wanted or (name not in LOSSES and found > wanted)
        for key in found:
            values = run.logged(f"adv/{key}")
            times = hostile if key in ("nonfinite", "expanded", "loss_adversarial") else epochs
            assert len(values) == times or (name not in LOSSES and 0 < len(values) < times), key
            assert all(value >= 0 and math.isfinite(value) for value in values), key
        assert len(run.logged("train/loss")) == epochs * host.steps
        reached = run.logged(host.monitor[0])
        assert len(reached) == epochs
        assert all(map(math.isfinite, reached))
        if host.target is not None:
            assert (reached[-1] - host.target) * (1 if host.monitor[1] == "max" else -1) > 0
        assert {"config.yaml", "adversarial.yaml"} <= {path.name for path in run.folder.iterdir()}
        assert (run.folder / "margins.csv").exists() == bool(sizes)
        if sizes:
            assert sorted(run.margins) == sorted(host.ids("train"))
            assert {visits for _, visits in run.margins.values()} == {hostile}
        state = run.state()
        assert state["epoch"] == epochs - 1
        assert all(value.isfinite().all() for value in state["state_dict"].values())
        assert state["advmed"]["method"]["method"] == name

    @pytest.mark.parametrize(("name", "passes"), [("STD", 1), ("AT", 1), ("SAT", 2)])
    def test_batch_norm_learns_from_what_is_trained_on_only(
        self, host: LightningHost, tmp_path: Path, name: str, passes: int
    ) -> None:
        for network in host.batch_norms:
            run = host.fit(tmp_path, **{"model__method__name": name, "model__validation_steps": 2, **network})
            counts = {int(v) for k, v in run.weights().items() if k.endswith("num_batches_tracked")}
            assert counts == {host.steps * passes}, network

    @pytest.mark.parametrize(("name", "passes"), [("AT", 1), ("SAT", 2), ("DPAAT", 2)])
    def test_noise_of_nothing_is_standard_training(
        self, host: LightningHost, tmp_path: Path, name: str, passes: int
    ) -> None:
        def learnt(run: Run) -> dict[str, Tensor]:
            return run.weights() if passes == 1 else learnt_by_gradients(run.weights())

        given = {**PLAIN, "model__method__name": name}
        standard = learnt(host.kept("plain", **PLAIN))
        close(standard, learnt(host.fit(tmp_path, model__method__eps=0.0, **given)), atol=2e-4, rtol=1e-3)
        assert moved(standard, learnt(host.fit(tmp_path, model__method__eps=3.0, **given))) > 1e-3

    def test_accumulated_batches_are_one_large_batch(self, host: LightningHost, tmp_path: Path) -> None:
        given = {"model__method__name": "SAT", **SGD, "optimizer__lr": 0.05}
        half = {"data__batch_size": host.batch_size // 2, "trainer__accumulate_grad_batches": 2}
        with host.independent():
            large = host.fit(tmp_path, **given).weights()
            close(large, host.fit(tmp_path, **given, **half).weights(), atol=2e-4)
            start = host.fit(tmp_path, **{**given, "optimizer__lr": 0.0}).weights()
        assert moved(start, large) > 1e-3

    @pytest.mark.parametrize(
        "changes",
        [
            {
                "trainer__precision": "64-true",
                "trainer__accumulate_grad_batches": 2,
                "trainer__gradient_clip_val": 0.05,
            },
            {"trainer__precision": "bf16-mixed"},
        ],
    )
    def test_a_shared_gradient_changes_no_weight_and_saves_a_pass(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Options
    ) -> None:
        watched = watched_steps(monkeypatch, host.module)
        passes = counted_passes(monkeypatch, host.module)
        given = {"model__method__name": "SAT", "model__method__eps": 0.3, **SGD, **changes}
        given |= {"model__validation_steps": 0, "trainer__limit_val_batches": 0, "checkpoint__monitor": "train/loss"}
        exact = {"atol": 1e-8, "rtol": 1e-7} if "64" in changes["trainer__precision"] else {"atol": 1e-3, "rtol": 1e-2}
        found = []
        for share in ("true", "false"):
            passes.clear()
            run = host.fit(tmp_path, **given, model__attack__share_gradient=share)
            assert run.yaml("adversarial.yaml")["share_gradient"] is (share == "true")
            found.append((run.weights(), len(passes)))
        (shared, fewer), (other, more) = found
        close(shared, other, **exact)
        assert (fewer, more) == (3 * host.steps, 4 * host.steps)  # two of the attack, two that are learnt from
        assert moved(watched.start, shared) > 3 * exact["atol"]

    def test_gradients_are_taken_at_moved_weights(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With weights that are hardly moved they are those of a training without; with others, others."""
        passes = counted_passes(monkeypatch, host.module)
        given: dict[str, Any] = {
            "model__method__name": "SAT",
            "model__method__eps": 0.3,
            **SGD,
            "trainer__precision": "64-true",
        }
        given |= {"model__validation_steps": 0, "trainer__limit_val_batches": 0, "checkpoint__monitor": "train/loss"}
        found = []
        for awp in ("0", "1e-13", "0.5"):
            passes.clear()
            run = host.fit(tmp_path, **given, model__method__awp=awp)
            found.append((run.weights(), len(passes)))
        (plain, fewer), (same, more), (other, _) = found
        assert (fewer, more) == (3 * host.steps, 5 * host.steps)  # clean and attacked once more
        close(same, plain, atol=1e-7, rtol=1e-6)
        assert moved(plain, other) > 1e-4

    def test_a_level_grows_with_the_training(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        levels: list[float] = []
        step = SAT.step

        def noted(self: SAT, *given: Any) -> Any:
            levels.append(self.eps)
            return step(self, *given)

        monkeypatch.setattr(SAT, "step", noted)
        given: dict[str, Any] = {"model__method__name": "SAT", "model__method__eps": 0.3, "model__method__ramp": 0.5}
        host.fit(tmp_path, **given, model__validation_steps=0)
        assert len(levels) == host.steps > 1
        assert levels == pytest.approx([0.3 * min(1.0, 2 * (k + 1) / len(levels)) for k in range(len(levels))])

    def test_the_learning_rate_falls_late(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of our own optimizer; another one's is the user's."""
        rates = noted_rates(monkeypatch, host.module)
        given: dict[str, Any] = {"model__method__name": "SAT", "model__method__decay": "late", "model__lr": 0.004}
        host.fit(tmp_path, **given, model__validation_steps=0, trainer__max_epochs=3)
        count = len(rates)
        assert count == 3 * host.steps
        assert rates == pytest.approx([0.004 * min(1, 4 * (1 - number / count)) for number in range(count)])
        assert rates[0] > rates[-1]
        message = host.refused(**given, **SGD)
        assert "decay 'late' is a schedule of the default optimizer" in message

    def test_weights_are_not_moved_where_a_strategy_takes_gradients_otherwise(self, host: LightningHost) -> None:
        class Own(SingleDeviceStrategy):
            pass

        model = host.module.from_checkpoint(host.standard.last).train()
        model.method_name, model.settings = "SAT", replace(model.settings, awp=0.1)
        trainer = Trainer(strategy=Own("cpu"), max_epochs=1, limit_val_batches=0, **QUIET)
        with pytest.raises(ValueError, match="awp takes a second gradient in each step, at other weights, and Own"):
            trainer.fit(model, datamodule=host.read())
        trainer = Trainer(precision="16-true", max_epochs=1, limit_val_batches=0, **QUIET)
        with pytest.raises(ValueError, match="which weights in float16 lose without a loss scale"):
            trainer.fit(model, datamodule=host.read())

    def test_in_float16_the_gradients_are_scaled_as_the_loss_is(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Against those of a training that shares nothing; by a Trainer of one's own."""
        found, scales = [], list[float]()
        start, step = host.standard.weights(), host.module.training_step

        def noted(self: RobustModule, batch: Any, batch_idx: int) -> Tensor:
            scale = self._loss_scale()
            assert scale is not None
            scales.append(float(scale))
            return step(self, batch, batch_idx)

        monkeypatch.setattr(host.module, "training_step", noted)
        monkeypatch.setattr(host.module, "configure_optimizers", lambda self: torch.optim.SGD(self.parameters(), 0.05))
        passes = counted_passes(monkeypatch, host.module)
        for share in (True, False):
            passes.clear()
            model = host.module.from_checkpoint(host.standard.last).train()
            model.method_name = "SAT"
            model.settings = replace(model.settings, eps=0.3, steps=1, share_gradient=share)
            plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
            trainer = Trainer(plugins=[plugin], max_epochs=1, limit_train_batches=1, limit_val_batches=0, **QUIET)
            trainer.fit(model, datamodule=host.read())
            found.append((dict(model.state_dict()), len(passes)))
        (shared, fewer), (other, more) = found
        assert (fewer, more) == (2, 3)
        assert set(scales) == {1024.0}
        assert moved(start, shared) > 1e-3
        close(learnt_by_gradients(shared), learnt_by_gradients(other), atol=0.1 * moved(start, shared), rtol=1e-2)

    @pytest.mark.parametrize(
        ("scale", "weight", "told"),
        [
            (2.0**10, 1.0, None),
            (
                0.5,
                1.0,
                r"gradients overflow float16, and steps are skipped: its loss scale has fallen to 0\.5",
            ),
            (
                2.0**-25,
                1.0,
                r"the gradients overflow float16 in every step: its loss scale has fallen to 3e-08 in epoch 1",
            ),
            (2.0**10, math.nan, r"the training loss was not finite in any step of epoch 1: .* lower lr, or train with"),
        ],
    )
    def test_a_training_in_float16_that_learns_nothing_says_so(
        self, host: LightningHost, scale: float, weight: float, told: str | None
    ) -> None:
        """Its scaler skips steps and says nothing: a network beyond float16 stays as it is."""
        model = host.module.from_checkpoint(host.standard.last).train()
        model.method_name = "SAT"
        model.settings = replace(model.settings, eps=0.3, steps=1)
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        trainer = Trainer(plugins=[plugin], max_epochs=2, limit_train_batches=1, limit_val_batches=0, **QUIET)
        with torch.no_grad():
            next(model.parameters()).mul_(weight)
        stops = told is not None and not told.startswith("gradients overflow")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(FloatingPointError, match=told) if stops else nullcontext():
                trainer.fit(model, datamodule=host.read())
        lines = [str(one.message) for one in caught if "overflow float16" in str(one.message)]
        assert len(lines) == (told is not None and not stops), lines  # once, not in every epoch
        assert all(re.match(str(told), line) for line in lines)

    def test_no_gradient_is_shared_where_a_strategy_takes_them_otherwise(
        self, host: LightningHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Own(SingleDeviceStrategy):
            pass

        model = host.module.from_checkpoint(host.standard.last).train()
        model.method_name = "SAT"
        trainer = Trainer(strategy=Own("cpu"), max_epochs=1, limit_val_batches=0, **QUIET)
        with listening() as said:
            trainer.fit(model, datamodule=host.read())
        assert sum(line.startswith("share_gradient is off: Own takes gradients in its own way") for line in said) == 1
        assert model.settings.share_gradient is False
        assert model.run is not None
        assert getattr(model.run.method, "clean_gradients", 0) is None

    def test_optimizer_clipping_and_checkpoints_are_the_users(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watched = watched_steps(monkeypatch, host.module)
        given: dict[str, Any] = {"model__method__name": "SAT", "optimizer": "SGD"}
        run = host.fit(tmp_path, **given, optimizer__lr=1.0, trainer__gradient_clip_val=1e-3)
        found = run.weights()
        length = sum(float((found[k] - v).square().sum()) for k, v in watched.start.items()) ** 0.5
        assert 1e-3 < length <= host.steps * 1.001e-3

        watched.ids.clear()
        given |= {
            "optimizer__lr": 0.0,
            "lr_scheduler": "torch.optim.lr_scheduler.ExponentialLR",
            "lr_scheduler__gamma": 0.5,
        }
        host.fit(tmp_path, **given, checkpoint__dirpath=tmp_path / "kept", checkpoint__filename="top")
        assert {path.name for path in (tmp_path / "kept").iterdir()} == {"top.ckpt", "last.ckpt"}
        state = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
        assert state["lr_schedulers"][0]["gamma"] == 0.5
        assert all(torch.equal(state["state_dict"][name], value) for name, value in watched.start.items())

    def test_the_default_optimizer_ends_with_a_rate_of_nothing(self, host: LightningHost) -> None:
        state = host.standard.state()
        (group, *_) = state["optimizer_states"][0]["param_groups"]
        assert group["lr"] == pytest.approx(0, abs=1e-9)
        assert group["initial_lr"] == host.learning["model__lr"]
        assert state["lr_schedulers"][0]["T_max"] == host.learning["trainer__max_epochs"] * host.steps

    @pytest.mark.parametrize("name", ["AMAT", "DPAAT"])
    def test_half_precision(self, host: LightningHost, tmp_path: Path, name: str) -> None:
        run = host.fit(tmp_path, model__method__name=name, trainer__precision="bf16-mixed", trainer__max_epochs=2)
        assert {value.dtype for value in run.weights().values()} <= {torch.float32, torch.int64}
        assert run.logged("adv/nonfinite")[-1] == 0
        assert len(run.margins) == host.counts["train"]

    @pytest.mark.parametrize("norm", ["2", ".inf"])
    def test_noise_levels_by_default_and_validation_under_attack_at_them(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
    ) -> None:
        """In the norm of the training, and without a random start; the run says what it was."""
        attack, attacked = PGD.__call__, []

        def noted(self: PGD, objective: Any, images: Tensor, radius: Any, **how: Any) -> Any:
            if self.steps == 7:
                attacked.append((self.step_scale, self.norm, self.random_start, radius, how["bounds"]))
            return attack(self, objective, images, radius, **how)

        monkeypatch.setattr(PGD, "__call__", noted)
        changes: dict[str, Any] = {"model__validation_steps": 7, "model__attack__norm": norm}
        changes["trainer__num_sanity_val_steps"] = 0
        changes |= {"model__method__name": "DPAAT", "model__method__eps_min": 0.001}
        run = host.fit(tmp_path, **changes)
        text, settings = (run.folder / "adversarial.yaml").read_text(), run.yaml("adversarial.yaml")
        bounds, (eps, delta) = tuple(settings["bounds"]), host.noise[norm]
        assert set(attacked) == {(2.5, float(norm.strip(".")), 0.0, eps, bounds)}
        assert len(attacked) == math.ceil(host.counts["val"] / host.batch_size)
        assert text.startswith("# method: DPAAT\n# thresholds: None\n")
        assert (settings["eps"], settings["delta"]) == (eps, delta)
        assert (settings["eps_min"], settings["norm"], settings["steps"]) == (0.001, float(norm.strip(".")), 2)
        config = run.yaml()
        assert config["model"]["method"]["name"] == changes["model__method__name"]
        assert (config["checkpoint"]["monitor"], config["checkpoint"]["mode"]) == (None, "auto")  # for other methods
        assert watched_by(run) == (host.robust, host.monitor[1])
        for name, value in host.images.items():
            assert str(config["data"]["init_args"][name]) == str(value)

    def test_a_run_is_run_again_by_its_own_configuration(self, host: LightningHost, tmp_path: Path) -> None:
        host.ok("fit", "--config", host.adaptive.folder / "config.yaml", "--trainer.default_root_dir", tmp_path)
        (other,) = runs(tmp_path)
        assert other.margins == host.adaptive.margins
        first, second = host.adaptive.weights(), other.weights()
        assert all(torch.equal(value, second[key]) for key, value in first.items())

    def test_the_best_checkpoint_is_of_the_best_epoch_and_the_last_of_the_last(
        self, host: LightningHost, tmp_path: Path
    ) -> None:
        run = host.fit(tmp_path, **host.wavering)
        values = run.logged(host.monitor[0])
        best, worst = (max, min) if host.monitor[1] == "max" else (min, max)
        assert run.state("best")["epoch"] == values.index(best(values)) != values.index(worst(values))
        assert run.state()["epoch"] == host.wavering["trainer__max_epochs"] - 1  # on some machines it is the best, too
        assert {path.name for path in run.last.parent.iterdir()} == {"best.ckpt", "last.ckpt"}

    def scripted(self, host: LightningHost, patch: pytest.MonkeyPatch, clean: list[float], robust: list[float]) -> None:
        """Puts numbers in the place of the metrics, for each epoch, 1 the best of all and 0 the worst."""
        name, largest = host.monitor[0].removeprefix("val/"), host.monitor[1] == "max"
        log = host.module._log_metrics

        def told(self: RobustModule, split: str) -> None:
            epoch = min(self.current_epoch, len(clean) - 1)
            values = iter((clean[epoch], robust[epoch]))

            def metrics(*_: Any) -> dict[str, Tensor]:
                value = next(values)
                return {name: torch.tensor(value if largest else 1 - value)}

            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(self, "metrics", metrics)
                log(self, split)

        patch.setattr(host.module, "_log_metrics", told)

    def test_no_epoch_of_the_warmup_is_among_the_best_nor_uses_up_patience(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever is watched, and however many are kept; also in a run that is resumed within its warm-up."""
        self.scripted(host, monkeypatch, [0.9, 0.8, 0.3, 0.2, 0.5, 0.4], [0.9, 0.8, 0.3, 0.7, 0.6, 0.5])
        given: dict[str, Any] = {"model__method__name": "SAT", "model__method__warmup_epochs": 2}
        given |= {"trainer__max_epochs": 6, "model__validation_steps": 1, "trainer__num_sanity_val_steps": 0}
        mode = host.monitor[1]
        stop = {"class_path": "EarlyStopping", "init_args": {"monitor": host.robust, "mode": mode, "patience": 2}}
        Path("own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stop]}}))
        run = host.fit(tmp_path, config="own.yaml", checkpoint__save_top_k=3, **given)
        names = {path.name for path in run.last.parent.iterdir()}
        assert names == {"best.ckpt", "last.ckpt", "epoch=3.ckpt", "epoch=4.ckpt", "epoch=5.ckpt"}
        assert (run.state("best")["epoch"], run.state()["epoch"]) == (3, 5)  # stopped by two epochs without a gain

        by_clean = {"checkpoint__monitor": host.monitor[0], "checkpoint__save_weights_only": "true"}
        run = host.fit(tmp_path, **given, **by_clean)
        assert run.state("best")["epoch"] == 4
        host.module.from_checkpoint(run.best)  # weights alone are enough

        cut = host.fit(tmp_path / "cut", **{**given, "trainer__max_epochs": 3}, trainer__limit_train_batches=1)
        assert cut.state("best")["epoch"] == 2
        step = host.module.training_step

        def end(self: RobustModule, batch: Any, batch_idx: int) -> Tensor:
            self.trainer.should_stop = True
            return step(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(host.module, "training_step", end)
            message = host.fails("fit", *host.words(tmp_path / "cut", **given))
            assert "ended within its clean warm-up of 2 epoch(s): nothing was attacked" in message
        *_, cut = runs(tmp_path / "cut")
        assert [path.name for path in cut.last.parent.iterdir()] == ["last.ckpt"]
        run = host.fit(tmp_path / "cut", ckpt_path=cut.last, **given)
        assert (run.state("best")["epoch"], run.state()["epoch"]) == (3, 5)

    def test_what_would_judge_the_warmup_is_named(self, host: LightningHost, monkeypatch: pytest.MonkeyPatch) -> None:
        """And a Trainer of one's own validates under attack, in inference mode as any other."""
        model = host.module.from_checkpoint(host.standard.last).train()
        model.method_name, model.validation_steps = "SAT", 1
        model.settings = replace(model.settings, warmup_epochs=1, steps=1)
        watched = EarlyStopping(host.robust, mode=host.monitor[1])
        trainer = Trainer(callbacks=[watched], max_epochs=2, limit_train_batches=1, inference_mode=True, **QUIET)
        package = host.module.command.replace("-", "_")
        judges = "the EarlyStopping of this Trainer also judges the 1 clean epoch"
        with pytest.warns(UserWarning, match=rf"{judges}.*: use {package}\.BestStopping in its place"):
            trainer.fit(model, datamodule=host.read())
        assert host.robust in trainer.callback_metrics

    def test_what_is_watched_must_be_measured(self, host: LightningHost) -> None:
        given = {"model__method__name": "SAT", "model__validation_steps": 0}
        message = host.refused(checkpoint__monitor=host.robust, **given)
        assert message.startswith(f"{host.robust} is to be watched, but validation images are not attacked: ")
        message = host.refused(**given, trainer__max_steps=1, trainer__max_epochs=5, model__method__warmup_epochs=1)
        assert "leaves no adversarial epoch of 1" in message
        assert "validation_steps must be >= 0" in host.refused(model__validation_steps=-1)

    def test_there_is_a_last_checkpoint_of_every_epoch_validated_or_not(
        self, host: LightningHost, tmp_path: Path
    ) -> None:
        seldom = {"trainer__max_epochs": 3, "trainer__check_val_every_n_epoch": 2}
        run = host.fit(tmp_path, **seldom, model__method__name="DPAAT")
        for name, epoch in (("last", 2), ("best", 1)):
            state = run.state(name)
            assert state["epoch"] == epoch
            assert state["advmed"]["method"]["margins"]["visits"] == [epoch + 1] * host.counts["train"]

    # Validation, test, prediction

    @pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
    def test_a_checkpoint_is_validated_and_tested(
        self, host: LightningHost, tmp_path: Path, command: str, split: str
    ) -> None:
        """With the network of the checkpoint, which is not the default one; clean, and under the attack it names."""
        words = [*host.reading(batch_size=3), "--ckpt_path", host.standard.last]
        host.ok(command, *words, "--trainer.default_root_dir", tmp_path)
        (run,) = runs(tmp_path)
        model, batch = host.module.from_checkpoint(host.standard.last), host.batch(split)
        objective, images, _ = model.objective(batch)
        attacked = PGD(3, 2.5)(objective, images, 1.5, bounds=model.settings.bounds).images
        clean, robust = (host.scores(model, {**batch, "image": x}) for x in (images, attacked))
        wanted = {f"{split}/{k}": v for k, v in clean.items()} | {f"{split}/robust_{k}": v for k, v in robust.items()}
        row = run.table()[0]
        assert {key for key in row if key.startswith(f"{split}/")} == set(wanted)
        for key, value in wanted.items():
            assert float(row[key]) == pytest.approx(value, rel=1e-4, abs=1e-6), key
        name, mode = host.monitor[0].removeprefix("val/"), host.monitor[1]
        assert (clean[name] - robust[name]) * (1 if mode == "max" else -1) > 0
        if split == "val":
            config = ["--config", host.adaptive.folder / "config.yaml", "--trainer.accelerator", "cpu"]
            text = host.ok(command, *config, "--ckpt_path", host.adaptive.last)
            value = host.scores(host.module.from_checkpoint(host.adaptive.last), batch)[name]
            assert f"{value:g}"[:6] in text
            assert len(host.adaptive.logged(host.robust)) == 3  # nobody has to ask for it
            assert not [key for key in host.kept("plain", **PLAIN).table()[0] if "robust" in key]

    def test_predictions_of_the_test_images(self, host: LightningHost, tmp_path: Path) -> None:
        words = [*host.reading(batch_size=2), "--ckpt_path", host.standard.last]
        text = host.ok("predict", *words, "--trainer.default_root_dir", tmp_path)
        (run,) = runs(tmp_path)
        assert f"Predictions: {run.folder / 'predictions.csv'}" in text
        found = [next(iter(row.values())) for row in run.table("predictions.csv")]
        assert list(dict.fromkeys(found)) == host.ids("test")

    @pytest.mark.parametrize(("method", "remedy"), [("STD", "the learning rate"), ("SAT", "Lower eps")])
    @pytest.mark.parametrize("poor", [True, False])
    def test_a_training_that_has_taught_nothing_says_so_at_its_end(
        self,
        host: LightningHost,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        recwarn: pytest.WarningsRecorder,
        method: str,
        remedy: str,
        poor: bool,
    ) -> None:
        """By the last validation, of all of its images."""
        judge, judged = host.module.judge, []

        def judging(self: Any, evidence: Any) -> Judgement:
            judged.append(replace(judge(self, evidence), untrained=poor))
            assert {len(value) for value in evidence.values()} == {host.counts["val"]}
            return judged[-1]

        monkeypatch.setattr(host.module, "judge", judging)
        often = {"trainer__max_epochs": 2, "trainer__num_sanity_val_steps": 2}
        host.fit(tmp_path, model__method__name=method, model__lr=1e-12, **often)
        assert len(judged) == 2, "not before the first batch"
        ends = [str(warning.message) for warning in recwarn if "this training ends with" in str(warning.message)]
        assert len(ends) == poor
        for text in ends:
            assert text.startswith(f"this training ends with {judged[-1]} on the validation images: ")
            assert remedy in text

    # Thresholds

    def test_self_calibrated_thresholds(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By the host's rule, or the user's; how good the network is after the warm-up is looked at."""
        judged = []

        def poor(*told: Any, **how: Any) -> tuple[Any, Judgement]:
            statistics, found = look(*told, **how)
            judged.append(found)
            return statistics, replace(found, mediocre=True)

        monkeypatch.setattr("advmed.integrations.lightning.module.look", poor)
        with pytest.warns(UserWarning, match="after the clean warm-up the network has") as warned:
            run = host.fit(
                tmp_path,
                model__method__name="AMAT",
                model__method__preset="paper",
                model__method__delta=0.3,
                model__method__rule="mean+1std",
                trainer__max_epochs=3,
            )
        terms = host.module.from_checkpoint(run.last).terms
        assert any("thresholds are self-calibrated" in line for line in host.said)
        assert any(line.startswith(f"Warm-up done. Thresholds: {terms[0]} < ") for line in host.said)
        (found,) = judged
        assert sum(f"the network has {found} on training images. " in str(warning.message) for warning in warned) == 1
        assert any(line.startswith(f"{host.counts['train']} images, each met about 2.0 times") for line in host.said)
        for value, visits in run.margins.values():
            assert visits == 2
            assert 0 < value <= 0.9 + 1e-6
        for saved, rule in ((run, "mean+1std"), (host.adaptive, host.rule)):
            state = saved.state()["advmed"]
            assert state["thresholds"] is None
            assert state["method"]["thresholds"]["rule"] == rule
            assert state["method"]["thresholds"]["statistics"]["names"] == list(terms)

    @pytest.mark.parametrize("value", [1e9, -1e9])
    def test_thresholds_of_a_file_and_of_the_run_that_is_resumed(
        self, host: LightningHost, tmp_path: Path, value: float
    ) -> None:
        terms = host.module.from_checkpoint(host.standard.last).terms
        path = tmp_path / "own.json"
        seen = fingerprint(host.ids("train")) if value > 0 else {"count": 3, "sha256": "of others"}
        Thresholds((value,) * len(terms), terms, notes={"images": seen}).save(path)
        given = {"model__method__name": "AMAT", "model__method__delta": 0.25, "model__method__thresholds": path}
        given |= {"model__attack__bounds": "null", "model__method__preset": "paper"}
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            run = host.fit(tmp_path, **given, trainer__max_epochs=2)
        assert any("measured on other images" in str(w.message) for w in warned) == (value < 0)
        assert any("thresholds from the file" in line for line in host.said)
        told = sum(line.startswith("these thresholds lie beyond ") for line in host.said)
        assert told == (value > 0 and hasattr(host.module.objective_class, "boundary"))
        assert run.margins == {i: (pytest.approx(0.75 if value > 0 else 0.25, rel=1e-5), 2) for i in host.ids("train")}
        line = f"# thresholds: {terms[0]} < {value:.6g}"
        assert line in (run.folder / "adversarial.yaml").read_text()
        assert run.state()["advmed"]["thresholds"]["values"] == (value,) * len(terms)
        if value > 0:  # it keeps its thresholds, whatever has become of the file
            Thresholds((-value,) * len(terms), terms).save(path)
            again = host.fit(tmp_path, **given, trainer__max_epochs=3, ckpt_path=run.last)
            assert line in (again.folder / "adversarial.yaml").read_text()
            assert [m for m, _ in again.margins.values()] == pytest.approx([1.0] * host.counts["train"], rel=1e-5)
            path.unlink()
            again = host.fit(tmp_path, **given, trainer__max_epochs=3, ckpt_path=run.last)
            assert len(again.margins) == host.counts["train"]

    @pytest.mark.parametrize(("rule", "factor"), [(None, None), ("mean+1std", 1)])
    def test_thresholds_of_a_standard_checkpoint(
        self, host: LightningHost, tmp_path: Path, rule: str | None, factor: float | None
    ) -> None:
        """Measured in training mode, by a training and by the command, which writes them beside it."""
        checkpoint = host.standard.last
        given = {"model__method__thresholds": checkpoint, "model__method__rule": rule}
        run = host.fit(tmp_path, model__method__name="AMAT", **given)
        said = host.said
        text = host.ok("thresholds", checkpoint, *([] if rule is None else ["--rule", rule]))
        path = checkpoint.with_name("thresholds.json")
        found, saved = Thresholds.load(path), run.state()["advmed"]["thresholds"]
        path.unlink()
        model = host.module.from_checkpoint(checkpoint)
        drawn = list(host.read().draws("train", 500, 10_000, 0))
        met = [name for batch in drawn for name in batch["id"]]
        count = host.counts["train"]
        assert len(met) == math.ceil(500 / count) * count == found.n
        assert set(Counter(met).values()) == {len(met) // count}
        assert met[:count] != met[count : 2 * count]
        model.train()
        terms = np.concatenate([host.terms(model, batch) for batch in drawn])
        mean, std = terms.mean(0), terms.std(0)
        if factor is None:
            factor = {"mean": 0, "mean+2std": 2}[host.rule]
        assert any(line.startswith(f"thresholds measured on {checkpoint}: {model.terms[0]} < ") for line in said)
        assert f"{len(met)} draws from the split train (images as the training draws them, augmented, " in text
        assert f"Written to {path}" in text
        assert found.values == pytest.approx(tuple(mean + factor * std), rel=1e-3)
        assert found.mean == pytest.approx(mean, rel=1e-3)
        assert found.std == pytest.approx(std, rel=1e-3)
        assert saved["values"] == pytest.approx(found.values, rel=1e-5)
        assert found.names == tuple(saved["names"]) == model.terms
        assert (found.n, found.rule, found.source) == (len(met), rule or host.rule, str(checkpoint))
        assert (saved["n"], saved["rule"], saved["source"]) == (len(met), rule or host.rule, str(checkpoint))
        assert found.source_sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        assert found.notes == saved["notes"]
        assert (found.notes["split"], found.notes["seed"]) == ("train", 0)
        assert f"{found.notes['metric']} {found.notes['value']:.3g}" in text

    def test_a_measurement_is_of_augmented_images_and_leaves_no_trace(self, host: LightningHost) -> None:
        """It can be repeated, with other images for another seed."""
        # Little of it: the network was trained without.
        changes = {key.removeprefix("data__"): v / 10 for key, v in host.augmented.items() if key.startswith("data__")}
        model = host.module.from_checkpoint(host.standard.last)
        for part in model.modules():  # whose random state counts, too
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.2
        before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()

        def measured(seed: int = 0, **how: Any) -> Thresholds:
            how = {"rule": "mean", "device": torch.device("cpu"), "seed": seed}
            return measure(model, host.standard.last, host.read(**changes), **how)

        first = measured()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        assert measured() == first
        assert measured(1).mean != first.mean
        assert measure(model, host.standard.last, host.read(), rule="mean", device=torch.device("cpu")) != first
        one, other = (next(iter(host.read(**changes, workers=w).draws("train", 8, 8, 3))) for w in (0, 1))
        assert torch.equal(one["image"], other["image"])

    def test_thresholds_as_told(self, host: LightningHost) -> None:
        words = ["thresholds", host.standard.last, "--split", "val", "--rule", "mean+1std", "--device", "cpu"]
        text = host.ok(*words, *host.reading()[:-4], "--out", "own.json")
        assert "draws from the split val (images without augmentation, " in text
        found = Thresholds.load("own.json")
        assert found.mean is not None
        assert found.std is not None
        assert found.values == pytest.approx([m + s for m, s in zip(found.mean, found.std, strict=True)])
        assert found.notes["split"] == "val"
        host.ok(*words[:2], *data_of(host.standard, batch_size=3), "--out", "other.json")
        assert Thresholds.load("other.json").notes["split"] == "train"
        assert not host.standard.last.with_name("thresholds.json").exists()

    def test_an_untrained_network_gives_no_thresholds(self, host: LightningHost, tmp_path: Path) -> None:
        """Neither to a training nor to the command, nor where a training begins with it."""
        run = host.fit(tmp_path, optimizer="SGD", optimizer__lr=0.0)
        wanted = f"{run.last} is no trained network: on images of the split train it reaches "
        given = {"model__method__name": "AMAT", "trainer__max_epochs": 2}
        for message in (
            host.refused(model__method__thresholds=run.last, **given),
            host.fails("thresholds", run.last),
        ):
            assert message.startswith(wanted)
            assert "finish its standard training" in message
        with pytest.warns(UserWarning, match="no thresholds are taken from the network that this training begins with"):
            other = host.fit(tmp_path / "begun", model__network__weights=run.last, **given)
        assert other.state()["advmed"]["warmup_epochs"] == 1

    def test_a_training_that_begins_with_the_standard_network_takes_its_thresholds(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And needs no warm-up; one that begins with another network calibrates itself."""
        standard = host.standard  # made by now, if this is the first test
        watched = watched_steps(monkeypatch, host.module)
        given = {"model__method__name": "AMAT", "trainer__max_epochs": 2}
        run = host.fit(tmp_path, model__network__weights=standard.last, **given)
        assert any("the standard network that this training begins with: " in line for line in host.said)
        weights = standard.weights()
        assert all(torch.equal(value, weights[name]) for name, value in watched.start.items())
        state = run.state()["advmed"]
        assert (state["warmup_epochs"], state["thresholds"]["source"]) == (0, str(standard.last))
        assert {visits for _, visits in run.margins.values()} == {2}
        other = host.fit(tmp_path, model__network__weights=host.adaptive.last, **given)
        assert any("which this training begins with: it was trained by AMAT" in line for line in host.said)
        assert other.state()["advmed"]["warmup_epochs"] == 1

    def test_thresholds_at_the_decision_boundary(self, host: LightningHost, tmp_path: Path) -> None:
        """Of a classifier they are known without a network and without a warm-up; others refuse them."""
        given = {"model__method__name": "AMAT", "model__method__rule": "boundary"}
        if not hasattr(host.module.objective_class, "boundary"):
            assert "the rule 'boundary' is for classifiers" in host.refused(**given)
            return
        run = host.fit(tmp_path, **given, trainer__max_epochs=2)
        assert sum("thresholds at the decision boundary" in line for line in host.said) == 1
        state = run.state()["advmed"]
        assert (state["warmup_epochs"], state["thresholds"]["rule"]) == (0, "boundary")
        assert state["thresholds"]["values"] == pytest.approx(host.module.objective_class.boundary)
        assert {visits for _, visits in run.margins.values()} == {2}
        again = host.fit(tmp_path, **given, trainer__max_epochs=3, ckpt_path=run.last)
        assert {visits for _, visits in again.margins.values()} == {3}

    def test_thresholds_that_do_not_fit_are_refused(self, host: LightningHost, tmp_path: Path) -> None:
        terms = host.module.from_checkpoint(host.standard.last).terms
        Thresholds((1.0,) * 5, tuple("abcde")).save(tmp_path / "own.json")
        torch.save({"state_dict": {}}, tmp_path / "notes.ckpt")
        given = {"model__method__name": "AMAT"}
        message = host.refused(**given, model__method__thresholds=tmp_path / "own.json")
        other = f"the model's loss has K = {len(terms)} terms {list(terms)}"
        assert f"K = 5 loss terms ['a', 'b', 'c', 'd', 'e'], {other}" in message
        for name, wanted in (
            ("none.json", "there is no thresholds file"),
            ("none.ckpt", "there is no thresholds file"),
            ("notes.ckpt", f"is no checkpoint of {host.module.command}"),
        ):
            assert wanted in host.refused(**given, model__method__thresholds=tmp_path / name)

    def test_noise_levels_move_by_steps_within_their_range(self, host: LightningHost, tmp_path: Path) -> None:
        """And the ablations of DPAAT: sizes that are fixed, and no synchronisation."""
        given = {"model__method__name": "DPAAT", "model__method__eps": 0.4}
        limits = {"model__method__step_size": 0.1, "model__method__eps_min": 0.3, "model__method__eps_max": 0.5}
        run = host.fit(tmp_path, **given, **limits, trainer__max_epochs=4)
        values = [value for value, _ in run.margins.values()]
        steps = [round((value - 0.4) / 0.1) for value in values]
        assert values == pytest.approx([0.4 + 0.1 * step for step in steps], abs=1e-6)
        assert len(set(steps)) > 1
        assert set(steps) <= {-1, 0, 1}
        fixed = host.fit(tmp_path, **given, model__method__step_size=0.0)
        assert [value for value, _ in fixed.margins.values()] == pytest.approx([0.4] * host.counts["train"])
        plain = host.fit(tmp_path, **given, model__method__sync_weight=0.0)
        assert "adv/loss_sync" not in plain.table()[-1]
        assert len({value for value, _ in plain.margins.values()}) > 1

    # Interrupted and resumed

    def check_resumed(self, host: LightningHost, whole: Run, resumed: Run) -> None:
        """The same to the last bit: weights, optimizer, noise levels, visits."""
        first, second = whole.state(), resumed.state()
        assert (first["epoch"], first["global_step"]) == (second["epoch"], second["global_step"])
        assert (first["epoch"], first["global_step"]) == (3, 4 * host.steps)
        assert first["advmed"] == second["advmed"]
        assert first["lr_schedulers"] == second["lr_schedulers"]
        for key, value in first["state_dict"].items():
            assert torch.equal(value, second["state_dict"][key]), key
        one, two = (state["optimizer_states"][0]["state"] for state in (first, second))
        assert all(torch.equal(value, two[i][key]) for i, part in one.items() for key, value in part.items())
        assert whole.margins == resumed.margins
        for name in ("adv/margin_q50", host.monitor[0]):
            assert whole.logged(name)[-2:] == resumed.logged(name)

    def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = host.module.training_step

        def stop(self: RobustModule, batch: Any, batch_idx: int) -> Tensor:
            if (self.current_epoch, batch_idx) == (2, 1):
                raise RuntimeError("a power cut")
            return step(self, batch, batch_idx)

        given: dict[str, Any] = {"trainer__max_epochs": 4, "model__lr": 1e-2, "model__method__name": "DPAAT"}
        given |= {"model__method__average": "epoch", "model__attack__random_start": 0.5}
        given |= {**host.augmented, **host.stateful}
        whole = host.fit(tmp_path / "whole", **given)
        with monkeypatch.context() as patch:
            patch.setattr(host.module, "training_step", stop)
            assert "a power cut" in host.fails("fit", *host.words(tmp_path / "cut", **given))
        (cut,) = runs(tmp_path / "cut")
        assert cut.state()["epoch"] == 1
        self.check_resumed(host, whole, host.fit(tmp_path / "cut", ckpt_path=cut.last, **given))

    def test_a_killed_run_goes_on_as_if_nothing_had_happened(self, host: LightningHost, tmp_path: Path) -> None:
        """All three in processes of their own: what else is imported here may change the last bit of a convolution."""
        given: dict[str, Any] = {"trainer__max_epochs": 4, "model__lr": 1e-2, "model__method__name": "AMAT"}
        given |= {"model__method__refinement": "crossing", "model__method__delta": 0.5, **host.augmented}
        last = tmp_path / "cut" / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
        words = {
            "killed": ["fit", *host.words(tmp_path / "cut", **given)],
            "resumed": ["fit", *host.words(tmp_path / "cut", **given, ckpt_path=last)],
            "whole": ["fit", *host.words(tmp_path / "whole", **given)],
        }
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "ADVMED_RUNS": json.dumps(words)}
        command = [sys.executable, "-c", FORKS, host.entry, name_of(host.module)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == [-signal.SIGKILL, 0, 0], done.stderr
        assert done.stderr.count(f"{host.counts['train']} images, each met about ") == 3
        (whole,), (_, resumed) = (runs(tmp_path / name) for name in ("whole", "cut"))
        self.check_resumed(host, whole, resumed)

    def test_another_run_cannot_be_resumed(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = {"ckpt_path": host.adaptive.last, "trainer__max_epochs": 5, "model__method__name": "AMAT"}
        count = host.counts["train"]
        fewer = host.write(tmp_path / "fewer", {**host.counts, "train": count - 1})
        for changes, message in (
            (
                {"model__method__name": "SAT"},
                "the checkpoint is of a run of AMAT, it cannot be resumed with SAT. To start from its weights, name it "
                "as the network's weights instead",
            ),
            (
                {f"data__{name}": value for name, value in fewer.items()},
                f"the training images are not those of the checkpoint ({count} then, {count - 1} now): restore them, "
                f"or start a new training",
            ),
        ):
            assert host.refused(**{**given, **changes}) == message
        with monkeypatch.context() as patch:  # as many of other names
            patch.setattr(host.data, "train_ids", property(lambda _: [f"other {i}" for i in host.ids("train")]))
            assert f"({count} then, {count} now): restore them" in host.refused(**given)
        message = host.refused(**{**given, **host.other_network})
        here = host.module.made_of(host.adaptive.state()["hyper_parameters"])
        assert message.startswith(f"the checkpoint is of {here}, and cannot be loaded into ")
        assert "not found" in host.refused(**{**given, "ckpt_path": tmp_path / "none.ckpt"})

    def test_other_settings_of_a_resumed_run_are_the_users_and_are_named(
        self, host: LightningHost, tmp_path: Path
    ) -> None:
        """LightningCLI would put the checkpoint's in their place, without a word."""
        bounds = {"model__method__margin_min": 0.01, "model__method__margin_max": 0.01}
        given = {"model__method__name": "AMAT", "trainer__max_epochs": 4, **bounds}
        with pytest.warns(UserWarning, match="settings changed since the checkpoint: .*margin_max") as warned:
            run = host.fit(tmp_path, ckpt_path=host.adaptive.last, **given, **host.augmented)
        told = [str(w.message) for w in warned if "settings changed" in str(w.message)]
        assert not any("delta" in line or "eps" in line for line in told)  # the defaults are those of before
        assert run.margins == {i: (pytest.approx(0.01), 3) for i in host.ids("train")}

    # Checkpoints

    def test_checkpoints_hold_plain_values_beside_the_weights(self, host: LightningHost) -> None:
        for run in (host.standard, host.adaptive):
            state = run.state()
            assert only_plain({k: v for k, v in state["hyper_parameters"].items() if not k.startswith("_")})
            assert only_plain(state["advmed"])

    def test_a_checkpoint_is_read_with_its_settings(
        self, host: LightningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By itself: the weights that the training began with are needed no more."""
        trained: list[RobustModule] = []
        start = host.module.on_fit_start

        def kept(self: RobustModule) -> None:
            trained.append(self)
            start(self)

        weights = tmp_path / "begin.ckpt"
        weights.write_bytes(host.standard.last.read_bytes())  # which may train it
        monkeypatch.setattr(host.module, "on_fit_start", kept)
        given = {"model__method__name": "DPAAT", "model__attack__norm": ".inf", "model__validation_steps": 1}
        run = host.fit(tmp_path, model__network__weights=weights, **given)
        weights.unlink()
        model = host.module.from_checkpoint(run.last)
        assert not any(part.training for part in model.modules())
        assert model.method_name == given["model__method__name"]
        assert (model.settings.norm, model.hparams["validation_steps"]) == (math.inf, 1)
        assert model.settings.bounds == trained[0].settings.bounds
        saved = run.weights()
        assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
        images = host.batch("val")["image"]
        torch.testing.assert_close(model(images), trained[0].cpu().eval()(images))
        host.ok("validate", *host.reading(), "--ckpt_path", run.last)

    # Mistakes

    @pytest.mark.parametrize("command", ["thresholds", "evaluate"])
    def test_mistakes_of_our_own_commands(self, host: LightningHost, tmp_path: Path, command: str) -> None:
        checkpoint = host.standard.last
        moved_file, other = tmp_path / "moved.ckpt", tmp_path / "other.ckpt"
        moved_file.write_bytes(checkpoint.read_bytes())
        torch.save({"epoch": 3}, other)
        Path("empty.yaml").write_text("model: {}\n")
        data = data_of(host.standard)
        for words, message in (
            (["nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
            (["nowhere.ckpt", *data], "there is no checkpoint nowhere.ckpt"),
            ([moved_file], "there is no configuration"),
            ([moved_file], "name one with --config, or the data with --data"),
            ([moved_file, "--config", "none.yaml"], "there is no configuration none.yaml"),
            ([moved_file, "--config", "empty.yaml"], "empty.yaml has no data section"),
            ([checkpoint, "--split", "training"], "the data has no split 'training'"),
            ([checkpoint, "--data.colour", 1], "'colour' is not accepted"),
            ([other, *data], f"{other} is no checkpoint of {host.module.command}"),
            ([checkpoint, "--nothing", "mean"], "unrecognized arguments: --nothing"),
        ):
            assert message in host.fails(command, *words)
        if command == "thresholds":
            assert "must be 'mean' or 'mean+<number>std'" in host.fails(command, checkpoint, "--rule", "mode")
        assert not list(Path().rglob("*.json"))
        assert not list(Path().rglob("*.html"))

    def test_every_process_takes_a_device_of_its_own(
        self, host: LightningHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(self: Any, device: Any) -> None:
            raise ValueError(f"asked for {device}")

        checkpoint = host.standard.last
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(host.module, "to", stop)
        for given, wanted in ((None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
            words = [] if given is None else ["--device", given]
            assert host.fails("thresholds", checkpoint, *words) == f"asked for {wanted}"

    # Evaluation

    def test_the_report_of_two_models(self, host: LightningHost) -> None:
        ids, batch = host.ids("val"), host.batch("val")
        for kind, levels in (("L2", ["0", "0.5", "1.5"]), ("Linf", ["0", "0.02"])):
            folder = Run(host.report / kind)
            page = (folder.folder / "report.html").read_text()
            for text in (f"Robustness of plain, own in {kind}", f"val, {len(ids)} images", f"{kind} norm of the noise"):
                assert text in page
            rows = folder.table("samples.csv")
            assert {row["model"] for row in rows} == {"plain", "own"}
            assert {f"{float(row['level']):g}" for row in rows} == set(levels)
            assert " ".join(sorted({row["attack"] for row in rows})) == "clean gaussian ifgsm2 pgd2 worst attack"
            assert len(rows) == 2 * len(ids) * (1 + 4 * (len(levels) - 1))
            for name, run in (("plain", host.standard), ("own", host.adaptive)):
                values = host.per_image(host.module.from_checkpoint(run.last), batch)
                found = {r["id"]: r[host.metric] for r in rows if (r["model"], r["attack"]) == (name, "clean")}
                assert list(found) == ids
                assert [float(found[i] or "nan") for i in ids] == pytest.approx(values, rel=2e-3, abs=1e-3, nan_ok=True)
            record = json.loads((folder.folder / "report.json").read_text())
            assert list(record["margins"]) == ["own"]
            assert record["margins"]["own"]["n"] == host.counts["train"]
            bounds = host.module.from_checkpoint(host.standard.last).settings.bounds
            assert record["configuration"]["evaluation"]["bounds"] == list(bounds or ())
            assert json.loads(record["configuration"]["models"]["plain"])["split"] == "val"

    def test_an_evaluation_of_some_images_as_told(self, host: LightningHost) -> None:
        checkpoint = host.standard.last
        text = host.ok(
            "evaluate", checkpoint, "--attacks", "[pgd1]", "--norm", "[inf]", "--samples", 2, "--split", "test",
            "--levels_inf", "[0,0.1]", "--examples", 0, "--checks", 0, "--out", "own", "--device", "cpu", "--seed", 5,
            *data_of(host.standard, batch_size=1),
        )  # fmt: skip
        assert "Whether the attacks are strong enough was not checked." in text
        assert "AUC_robust" in text
        folder = Path("own", "Linf")
        assert report_line(folder / "report.html") in text
        assert not Path("own", "L2").exists()
        ids = host.ids("test")
        assert {row["id"] for row in Run(folder).table("samples.csv")} == {ids[0], ids[-1]}
        name = checkpoint.parents[3].name  # of the run's folder
        assert len(list((folder / name / "parts").iterdir())) == 2
        assert json.loads((folder / "report.json").read_text())["configuration"]["evaluation"]["seed"] == 5

    def test_levels_by_default(self, host: LightningHost) -> None:
        words = ["evaluate", host.standard.last, "--attacks", "[ifgsm1]", "--samples", 1, "--examples", 0]
        host.ok(*words, "--checks", 0, "--out", "own")
        assert {path.name for path in Path("own").iterdir()} == set(host.norms)
        for kind in host.norms:
            record = json.loads(Path("own", kind, "report.json").read_text())
            assert record["configuration"]["evaluation"]["levels"] == pytest.approx(host.levels[kind])

    def test_mistakes_of_an_evaluation(self, host: LightningHost) -> None:
        for words, message in (
            (["--attacks", "[pgd]"], "unknown attack 'pgd'"),
            (["--attacks", "[pgd1,pgd1]"], "attack 'pgd1' is given twice"),
            (["--attacks", "[]"], "one or more attacks"),
            (["--norm", "[1]"], "norm must be 2 or inf, got 1"),
            (["--norm", "[L2]"], "norm must be 2 or inf, got 'L2'"),
            (["--levels", "[0.5,1]"], "must be finite, start at 0"),
            (["--levels", "[0,2,1]"], "increase strictly"),
            (["--levels", "[0,a]"], "levels"),
            (["--norm", "[inf]", "--levels_inf", "[0,2,1]"], "increase strictly"),
            (["--names", "[a,b]"], "1 checkpoints need 1 different names, got ['a', 'b']"),
            (["--samples", "many"], "samples"),
            (["--samples", "0"], "samples must be a whole number >= 1, got 0"),
            (["--examples", "-1"], "examples must be a whole number >= 0, got -1"),
            (["--examples", "1.5"], "examples"),
            (["--checks", "-1"], "checks must be a whole number >= 0, got -1"),
            (["--checks", "some"], "checks"),
        ):
            assert message in host.fails("evaluate", host.standard.last, "--samples", 2, *words)
        assert not [path for path in Path().rglob("*") if path.suffix in (".html", ".npz")]

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("runs/dpaat/lightning_logs/version_0/checkpoints/best.ckpt", "dpaat"),
            ("data/runs/dpaat/version_3/checkpoints/last.ckpt", "dpaat"),
            ("dpaat/best.ckpt", "dpaat"),
            ("best.ckpt", "best"),
        ],
    )
    def test_a_model_has_the_name_of_its_run_and_two_need_two(self, host: LightningHost, path: str, name: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(host.standard.last)
        message = host.fails("evaluate", path, path, *data_of(host.standard))
        assert f"2 checkpoints need 2 different names, got ['{name}', '{name}']" in message
        assert "--names" in message
        assert "different names" in host.fails("evaluate", path, path, "--names", "[a,a]", *data_of(host.standard))

    def test_a_killed_evaluation_goes_on(self, host: LightningHost, monkeypatch: pytest.MonkeyPatch) -> None:
        words = ["evaluate", host.standard.last, "--attacks", "[pgd2]", "--norm", "[2]", "--examples", 0]
        words += ["--checks", 0, *data_of(host.standard, batch_size=2), "--levels", "[0,0.4]"]
        batches = math.ceil(host.counts["val"] / 2)
        whole = host.ok(*words, "--out", "whole")
        attack, attacked = PGD.__call__, []

        def counted(self: PGD, objective: Any, images: Tensor, *given: Any, **how: Any) -> Any:
            attacked.append(images)
            if len(attacked) == 2:
                raise RuntimeError("a power cut")
            return attack(self, objective, images, *given, **how)

        monkeypatch.setattr(PGD, "__call__", counted)
        assert "a power cut" in host.fails(*words, "--out", "cut")
        resumed = host.ok(*words, "--out", "cut")
        assert len(attacked) == 2 + batches - 1
        assert torch.equal(attacked[1], attacked[2])
        assert resumed.replace("cut", "whole") == whole
        assert host.ok(*words, "--out", "cut") == resumed
        assert len(attacked) == 1 + batches
        words[-1] = "[0,0.5]"
        assert "was measured with another configuration: levels" in host.fails(*words, "--out", "cut")
        host.ok(*words, "--out", "cut", "--overwrite", "true")
        assert len(attacked) == 1 + 2 * batches

    def test_numbers_of_other_models_and_other_truths_are_not_mixed(self, host: LightningHost, tmp_path: Path) -> None:
        """Under the same names, of images of the same names."""
        words = ["--attacks", "[pgd1]", "--norm", "[2]", "--levels", "[0,1]", "--examples", 0, "--checks", 0]
        words += ["--names", "[own]", "--out", "own"]
        same = host.reading()[:-4]
        other = host.reading(host.other_truth(tmp_path / "other"))[:-4]
        host.ok("evaluate", host.standard.last, *words, *same)
        for run, data in ((host.adaptive, same), (host.standard, other)):
            message = host.fails("evaluate", run.last, *words, *data)
            assert "was measured with another configuration: fingerprint" in message
            assert "\n" not in message
        host.ok("evaluate", host.standard.last, *words, *other, "--overwrite", "true")

    # Two processes

    @pytest.fixture(scope="class")
    @classmethod
    def ranks(
        cls, host: LightningHost, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Path, dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """The folder of the runs, their options, and what each process has found."""
        folder = tmp_path_factory.mktemp("processes")
        terms = host.module.from_checkpoint(host.standard.last).terms
        Thresholds(tuple(host.middling), terms).save(folder / "own.json")
        common: dict[str, Any] = {"data__batch_size": host.batch_size // 2, "optimizer": "SGD", "optimizer__lr": 0.01}
        # In float32, noise in the direction of a gradient makes much of rounding errors.
        common |= {"trainer__max_epochs": EPOCHS, "trainer__precision": "64-true", "model__validation_steps": 2}
        common |= {"model__method__eps": 0.4, **host.together}
        given = {name: {**common, **changes} for name, changes in PROCESSES.items()}
        given["amat"]["model__method__thresholds"] = folder / "own.json"
        two = {"trainer__devices": 2, "trainer__strategy": "ddp"}
        words = {name: ["fit", *host.words(folder / name, **changes, **two)] for name, changes in given.items()}
        last = folder / "dpaat" / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
        small = {"ckpt_path": last, "model__attack__steps": None, "data__batch_size": 1}
        words["predict"] = ["predict", *host.words(folder / "predict", **two, **small)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Lightning finds the other process by its own environment variables, as under SLURM or torchrun.
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["ADVMED_RUNS"] = json.dumps(words)
        command = [sys.executable, "-m", __name__, name_of(type(host)), str(folder)]
        process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
        try:
            status = process.wait(timeout=300)
        finally:
            with suppress(ProcessLookupError):  # one of the two may wait for the other, which has failed
                os.killpg(process.pid, signal.SIGKILL)
        assert status == 0, "\n".join(log.read_text()[-3000:] for log in folder.glob("rank_*.log"))
        return folder, given, [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]

    @pytest.mark.parametrize("name", PROCESSES)
    def test_two_processes_have_one_network_and_one_table(self, host: LightningHost, ranks: Any, name: str) -> None:
        folder, _, found = ranks
        count = host.counts["train"]
        first, second = (rank[name] for rank in found)
        assert first["steps"] == second["steps"]
        assert len(set(first["steps"])) == len(first["steps"]) == EPOCHS * host.steps
        assert first["method"] == second["method"]
        assert first["thresholds"] == second["thresholds"]
        for key, value in first["logged"].items():
            if key.startswith(("adv/margin", "val/")):
                assert second["logged"][key] == value, key
        margins = first["method"]["margins"]
        assert sorted(margins["ids"]) == sorted(host.ids("train"))
        assert margins["visits"] == [EPOCHS - (name == "calibrated")] * count
        written = {i: value for i, (value, _) in runs(folder / name)[-1].margins.items()}
        assert written == pytest.approx(dict(zip(margins["ids"], margins["values"], strict=True)))
        for epoch in range(EPOCHS):
            batches = [rank[name]["batches"][epoch * host.steps :][: host.steps] for rank in found]
            met = [i for part in batches for batch in part for i in batch]
            assert len(met) == len(set(met)) == count
        if name == "amat":  # the checkpoint of validation is written before the epoch ends
            state = runs(folder / name)[-1].state("best")
            assert sorted(state["advmed"]["method"]["margins"]["ids"]) == sorted(host.ids("train"))
            assert state["advmed"]["method"]["margins"]["visits"] == [state["epoch"] + 1] * count

    def test_predictions_of_two_processes_are_in_one_file(self, host: LightningHost, ranks: Any) -> None:
        (run,) = runs(ranks[0] / "predict")
        rows = [tuple(row.values()) for row in run.table("predictions.csv")]
        assert {row[0] for row in rows} == set(host.ids("test"))
        assert len({row[:2] for row in rows}) == len(rows)

    @pytest.mark.parametrize("name", ["dpaat", "amat", "moved"])
    def test_two_processes_learn_what_one_does_from_the_same_global_batches(
        self, host: LightningHost, ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """Self-calibration is left out: the running thresholds of two processes meet at the end of an epoch only."""

        def loader(self: SampleData) -> DataLoader[dict[str, Any]]:
            dataset: Any = self.dataset("train", augment=True)
            sampler: Any = DistributedSampler(dataset, 1, 0, seed=0)  # Lightning's own order, in batches of both
            return DataLoader(dataset, batch_size=2 * self.batch_size, sampler=sampler)

        folder, given, _ = ranks
        watched = watched_steps(monkeypatch, host.module)
        monkeypatch.setattr(host.data, "train_dataloader", loader)
        with host.independent():
            alone = host.fit(tmp_path, **given[name])
        together = runs(folder / name)[-1]
        weights = alone.weights()
        # Moves of weights make much of the last bit, too.
        close(weights, together.weights(), atol=1e-5 if name == "moved" else 1e-7, rtol=1e-6)
        assert {value.dtype for value in weights.values()} <= {torch.float64, torch.int64}
        assert moved(watched.start, weights) > 3e-3
        one, two = alone.margins, together.margins
        assert two == {i: (pytest.approx(value, abs=1e-6), visits) for i, (value, visits) in one.items()}
        assert len({round(value, 6) for value, _ in one.values()}) > 1
        for key in alone.table()[0]:
            if key.startswith("val/"):
                assert together.logged(key) == pytest.approx(alone.logged(key), abs=1e-5), key
                assert all(map(math.isfinite, alone.logged(key))), key
        for key in ("adv/loss_clean", "adv/loss_adversarial", "adv/expanded"):
            assert together.logged(key) == pytest.approx(alone.logged(key), rel=1e-5), key


def data_of(run: Run, **changes: object) -> list[str]:
    """The data section of a run's configuration as a file of its own, with changes."""
    content = {"data": run.yaml()["data"]}
    content["data"]["init_args"].update(changes)
    Path("data.yaml").write_text(yaml.safe_dump(content))
    return ["--config", "data.yaml"]


def name_of(kind: type) -> str:
    """A class as :func:`pkgutil.resolve_name` finds it."""
    return f"{kind.__module__}:{kind.__qualname__}"


def _one_of_two(host: type[LightningHost], folder: Path, words: Mapping[str, list[str]]) -> None:
    """One of two processes: runs the commands, and writes down what it has met."""
    torch.set_num_threads(1)
    module: Any = host.module
    found: dict[str, dict[str, Any]] = {name: {"batches": [], "steps": []} for name in words}
    step, end = module.training_step, module.on_train_end
    now: dict[str, Any] = {}

    def noted(self: RobustModule, batch: Any, batch_idx: int) -> Tensor:
        weights = b"".join(p.detach().numpy().tobytes() for p in self.parameters())
        now["steps"].append(hashlib.sha256(weights).hexdigest())
        now["batches"].append(list(batch["id"]))
        loss: Tensor = step(self, batch, batch_idx)
        return loss

    def ended(self: RobustModule) -> None:
        end(self)
        assert self.run is not None
        now.update(method=self.run.method.state_dict(), thresholds=str(self.run.thresholds))
        now["logged"] = {key: float(value) for key, value in self.trainer.logged_metrics.items()}

    module.training_step, module.on_train_end = noted, ended
    with host.independent():
        for name, given in words.items():
            now = found[name]
            assert host.main(given) == 0, name
    (folder / f"rank_{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found))


def _both(host: type[LightningHost], folder: Path, words: Mapping[str, list[str]]) -> int:
    """Runs the commands in two processes, which share what takes long: the imports."""
    resolve_name(host.entry)
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, sys.stdout.fileno())
            os.dup2(log, sys.stderr.fileno())
            os.environ["LOCAL_RANK"] = str(rank)
            _one_of_two(host, folder, words)
            return 0
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(_both(resolve_name(sys.argv[1]), Path(sys.argv[2]), json.loads(os.environ["ADVMED_RUNS"])))
