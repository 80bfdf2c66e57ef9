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

from helpers.detection import CLASSES, TERMS, VAL, DataSet, fit, save  # before anything imports ultralytics

# isort: split
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, SETTINGS, IterableSimpleNamespace

from adv_yolo.api import make_batch
from advmed.thresholds import Thresholds
from helpers.hosts import listening


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
    several, second, _, other = (data.labels(name) for name in data.names("val"))
    assert len(several) > 3
    return make_batch(data.images("val", 64), [several, second[:1], several[:0], other])


@pytest.fixture(scope="session")
def networks(data: DataSet) -> Callable[..., DetectionModel]:
    """Networks that have seen a few images a few times, each test's its own copy.

    Untrained networks make no objects to test: their gradients are next to nothing, or their rounding errors are not.
    """
    made: dict[str, DetectionModel] = {}
    batch = make_batch(data.images("val", 64), [data.labels(name) for name in data.names("val")])

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
    """A network that half knows the validation images, at 96 pixels."""
    model = networks("yolov8n")
    fit(model, data.known_batch(), 70)
    return save(model, tmp_path_factory.mktemp("trained") / "run" / "weights" / "best.pt", 96)


@pytest.fixture
def known(data: DataSet) -> dict[str, Any]:
    """The images that it knows, with all objects, with one and with none."""
    batch = data.known_batch()
    index = batch["batch_idx"]
    kept = (index != 2) & ((index != 1) | (torch.arange(len(index)) == (index == 1).nonzero()[0]))
    chosen = {key: batch[key][kept] for key in ("batch_idx", "cls", "bboxes")}
    assert [int((chosen["batch_idx"] == i).sum()) for i in range(VAL)][1:3] == [1, 0]
    return {"img": batch["img"], **chosen}


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
