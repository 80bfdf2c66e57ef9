"""Blood cell images, untrained networks, and one that has learnt them by heart."""

from __future__ import annotations

import copy
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Before anything imports ultralytics.
from helpers.detection import CLASSES, ONE_HEAD, QUIET, TERMS, DataSet, fit, save, thinned

# isort: split
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, SETTINGS, IterableSimpleNamespace

from adv_yolo.trainer import TRAINERS
from advmed.thresholds import Thresholds
from helpers.hosts import Interrupted, listening


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["YOLO_CONFIG_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def settings() -> Iterator[None]:
    SETTINGS.update(sync=False)
    gc.collect()
    gc.freeze()  # the host collects garbage after every epoch, which then takes a tenth of the time
    yield
    gc.unfreeze()


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., DataSet]:
    """A data set of the test's own, to be changed."""
    return lambda name="own": DataSet(tmp_path / name)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return DataSet(tmp_path_factory.mktemp("cells") / "data")


@pytest.fixture
def batch(data: DataSet) -> dict[str, Any]:
    """Images with several objects, one and none."""
    return thinned(data.small_batch())


@pytest.fixture(scope="session")
def networks(data: DataSet) -> Callable[..., DetectionModel]:
    """Networks that have seen a few images a few times, each test's its own copy.

    Untrained networks make no objects to test: their gradients are next to nothing, or their rounding errors are not.
    """
    made: dict[str, DetectionModel] = {}
    batch = data.small_batch()

    def make(name: str = "yolov8n", end2end: bool | None = None) -> DetectionModel:
        if name not in made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = DetectionModel(f"{name}.yaml", nc=len(CLASSES), verbose=False)
            model.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
            fit(model, batch, 40)
            made[name] = model
        model = copy.deepcopy(made[name]).eval()
        if end2end is not None:
            model.end2end = end2end
        return model

    return make


@pytest.fixture(scope="session")
def trained(data: DataSet, networks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that half knows the validation images."""
    model = networks("yolov8n")
    fit(model, data.batch(), 70)
    return save(model, tmp_path_factory.mktemp("trained") / "run" / "weights" / "best.pt", 96)


@pytest.fixture(scope="session")
def make(data: Any) -> Callable[..., Any]:
    """A trainer with quick settings: the stock one, or one of ours by the name of its method or its class."""

    def made(kind: str | type[Any], folder: Path, source: Any = None, model: str = ONE_HEAD, **arguments: Any) -> Any:
        given = {"model": model, "data": str((source or data).yaml), "project": str(folder), "name": "run"}
        given |= {} if kind == "stock" else {"steps": 1, "step_scale": 1.0}
        trainer = {"stock": DetectionTrainer, **TRAINERS}.get(kind, kind)
        return trainer(overrides={**QUIET, **given, **arguments})

    return made


@pytest.fixture
def broken(make: Any, tmp_path: Path) -> Callable[..., Path]:
    """The last.pt of a run that was interrupted in its third epoch of four."""

    def interrupt(trainer: Any) -> None:
        if trainer.epoch == 2:
            raise Interrupted

    def stopped(kind: str, **arguments: Any) -> Path:
        trainer = make(kind, tmp_path / "broken" / kind, epochs=4, **arguments)
        trainer.add_callback("on_train_batch_end", interrupt)
        with pytest.raises(Interrupted):
            trainer.train()
        return Path(trainer.last)

    return stopped


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the host's logger says, as "LEVEL: message"."""
    with listening(LOGGER) as lines:
        yield lines


@pytest.fixture(scope="session")
def thresholds(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A thresholds file in which all terms have one value."""
    folder = tmp_path_factory.mktemp("thresholds")

    def write(value: float, names: tuple[str, ...] = TERMS) -> str:
        path = folder / f"{value}-{len(names)}-{names[-1]}.json"
        Thresholds((value,) * len(names), names).save(path)
        return str(path)

    return write
