"""A few blood cell images, tiny batches of them, untrained networks, and one that has learnt them by heart."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before ultralytics is imported: the user's settings stay as they are, and nothing asks the network.
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="ultralytics-")
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"

import cv2
import pytest
import torch
import yaml
from torch import Tensor
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER, SETTINGS, IterableSimpleNamespace
from ultralytics.utils.tal import make_anchors

from advmed.thresholds import Thresholds
from helpers.hosts import binary_divergence, class_divergence, listening, table

SOURCE = Path(__file__).parents[3] / "examples" / "data" / "bccd"
CLASSES = ["RBC", "WBC", "Platelets"]
TRAIN, VAL, MOST = 8, 4, 6
QUIET: dict[str, Any] = {
    # The host's arguments of every short run.
    "imgsz": 64,
    "batch": 4,
    "epochs": 2,
    "device": "cpu",
    "workers": 0,
    "plots": False,
    "amp": False,
    "seed": 3,
    "warmup_epochs": 0,
    "optimizer": "SGD",
    "lr0": 0.01,
    "nbs": 4,
    "max_det": 50,
    "exist_ok": True,
}
STILL: dict[str, Any] = {
    # Without augmentation an epoch is a function of its seed.
    **dict.fromkeys(("hsv_h", "hsv_s", "hsv_v", "fliplr", "translate", "scale", "mosaic", "erasing"), 0.0),
    "auto_augment": None,
}


CONVOLUTIONS = [[-1, 1, "Conv", [width, 3, 2]] for width in (8, 16, 16, 32, 32)]
HEAD = [[[2, 3, 4], 1, "Detect", ["nc"]]]


def architecture(name: str, **more: Any) -> str:
    """The file of a network whose training takes a tenth of a nano model's time."""
    path = Path(os.environ["YOLO_CONFIG_DIR"]) / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"nc": 80, **more, "backbone": CONVOLUTIONS, "head": HEAD}))
    return str(path)


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["YOLO_CONFIG_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def settings() -> Iterator[None]:
    SETTINGS.update(sync=False)
    gc.collect()
    gc.freeze()  # the host collects garbage after every epoch, which then takes a tenth of the time
    yield
    gc.unfreeze()


class DataSet:
    """A copy of some images with lists of our own; the host writes its label caches beside them."""

    def __init__(self, folder: Path, train: int = TRAIN, val: int = VAL) -> None:
        self.folder = folder
        names = sorted(path.stem for path in (SOURCE / "images").glob("*.jpg"))[: train + val]
        for kind, suffix in (("images", ".jpg"), ("labels", ".txt")):
            (folder / kind).mkdir(parents=True)
            for name in names:
                shutil.copy(SOURCE / kind / f"{name}{suffix}", folder / kind)
        self.yaml = folder / "cells.yaml"
        self.describe(CLASSES)
        self.list("train", names[:train])
        self.list("val", names[train:])
        for name in names:  # the largest cells; at 64 pixels the others are a few pixels wide
            rows = self.labels(name)
            self.write_labels(name, rows[(rows[:, 3] * rows[:, 4]).sort(descending=True, stable=True).indices[:MOST]])
        self.write_labels(names[1], [])  # a background image trains like any other

    def describe(self, names: list[str], **more: Any) -> None:
        content = {"train": "train.txt", "val": "val.txt", "names": dict(enumerate(names)), **more}
        self.yaml.write_text(yaml.safe_dump(content))

    def list(self, split: str, names: list[str]) -> None:
        (self.folder / f"{split}.txt").write_text("".join(f"./images/{name}.jpg\n" for name in names))

    def names(self, split: str) -> list[str]:
        return [Path(line).stem for line in (self.folder / f"{split}.txt").read_text().split()]

    def write_labels(self, name: str, rows: Any) -> None:
        lines = [" ".join([str(int(row[0])), *(f"{float(x):.6f}" for x in row[1:])]) for row in rows]
        (self.folder / f"labels/{name}.txt").write_text("".join(f"{line}\n" for line in lines))

    def labels(self, name: str) -> Tensor:
        rows = [[float(x) for x in line.split()] for line in (self.folder / f"labels/{name}.txt").open()]
        return torch.tensor(rows).reshape(-1, 5)

    def image(self, name: str, size: int) -> Tensor:
        picture = cv2.imread(str(self.folder / f"images/{name}.jpg"))[..., ::-1]
        picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., DataSet]:
    """A data set of the test's own, to be changed."""
    return lambda name="own", **sizes: DataSet(tmp_path / name, **sizes)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return DataSet(tmp_path_factory.mktemp("cells") / "data")


def join(images: list[Tensor], labels: list[Tensor]) -> dict[str, Any]:
    """The host's batch."""
    index = torch.cat([torch.full((len(rows),), float(i)) for i, rows in enumerate(labels)])
    rows = torch.cat(labels)
    return {"img": torch.stack(images), "batch_idx": index, "cls": rows[:, :1], "bboxes": rows[:, 1:]}


@pytest.fixture
def batch(data: DataSet) -> dict[str, Any]:
    """Images with several objects, one and none."""
    names = data.names("val")
    several, other = data.labels(names[0]), data.labels(names[3])
    assert len(several) > 3
    return join([data.image(name, 64) for name in names], [several, data.labels(names[1])[:1], several[:0], other])


def one_image(batch: dict[str, Any], i: int) -> dict[str, Any]:
    """The batch of one of its images."""
    rows = batch["batch_idx"] == i
    return {
        "img": batch["img"][i : i + 1],
        "batch_idx": torch.zeros(int(rows.sum())),
        "cls": batch["cls"][rows],
        "bboxes": batch["bboxes"][rows],
    }


def of_image(predictions: Any, i: int) -> Any:
    """The predictions of one image of a batch."""
    if isinstance(predictions, dict):
        return {key: of_image(value, i) for key, value in predictions.items()}
    if isinstance(predictions, (list, tuple)):
        return type(predictions)(of_image(value, i) for value in predictions)
    return predictions[i : i + 1]


def heads_of(predictions: Any) -> list[dict[str, Any]]:
    """The raw predictions of each head, in training or evaluation mode."""
    raw = predictions[1] if isinstance(predictions, tuple) else predictions
    return [raw["one2many"], raw["one2one"]] if "one2many" in raw else [raw]


def divergence(model: DetectionModel, clean: Any, other: Any) -> Tensor:
    """What the distance of two predictions must be, (B,): in float64, with torch's distributions, and in pixels."""
    heads = zip(heads_of(clean), heads_of(other), strict=True)
    return torch.stack([_divergence_of_head(model, first, second) for first, second in heads]).mean(0)


def _divergence_of_head(model: DetectionModel, clean: dict[str, Any], other: dict[str, Any]) -> Tensor:
    classes = binary_divergence(clean["scores"], other["scores"])
    confidence = clean["scores"].detach().double().sigmoid().amax(1)
    boxes = [predictions["boxes"].double().unflatten(1, (4, -1)) for predictions in (clean, other)]
    if boxes[0].shape[2] > 1:
        sides = class_divergence(*boxes, axis=2)
    else:  # left, top, right and bottom in cells of the anchor's level
        _, cells = make_anchors(clean["feats"], model.stride)
        height, width = (float(n * model.stride[0]) for n in clean["feats"][0].shape[2:])
        pixels = (boxes[0] - boxes[1]).squeeze(2).abs() * cells.squeeze(1)
        sides = pixels / torch.tensor([width, height, width, height])[:, None]
    return (classes + confidence * sides.mean(1)).sum(1) / confidence.sum(1).clamp(min=1)


def fit(model: DetectionModel, batch: dict[str, Any], steps: int) -> None:
    """Trains on one batch; the running statistics keep pace."""
    torch.set_num_threads(1)
    layers = [module for module in model.train().modules() if isinstance(module, torch.nn.BatchNorm2d)]
    usual = layers[0].momentum
    for layer in layers:
        layer.momentum = 0.3
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch)[0].sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    for layer in layers:
        layer.momentum = usual
    model.criterion = None


@pytest.fixture(scope="session")
def networks(data: DataSet) -> Callable[..., DetectionModel]:
    """Networks that have seen a few images a few times, each test's its own copy.

    Untrained networks make no objects to test: their gradients are next to nothing, or their rounding errors are not.
    """
    made: dict[str, DetectionModel] = {}
    names = data.names("val")
    batch = join([data.image(name, 64) for name in names], [data.labels(name) for name in names])

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


def save(model: DetectionModel, path: Path, size: int = 64) -> Path:
    """A finished checkpoint of the host."""
    network = copy.deepcopy(model)
    network.criterion = None
    network.names = dict(enumerate(CLASSES))
    network.args = {**DEFAULT_CFG_DICT, "imgsz": size, "task": "detect", "model": "x.yaml"}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": network.half(), "ema": None, "train_args": network.args, "epoch": -1, "optimizer": None}, path)
    return path


def known_batch(data: DataSet) -> dict[str, Any]:
    dataset_info = check_det_dataset(str(data.yaml))
    args = get_cfg(overrides={"imgsz": 96, "task": "detect"})
    dataset = build_yolo_dataset(args, dataset_info["val"], VAL, dataset_info, mode="val", rect=False, stride=32)
    batch = dataset.collate_fn([dataset[i] for i in range(VAL)])
    return {**batch, "img": batch["img"].float() / 255}


@pytest.fixture(scope="session")
def trained(data: DataSet, networks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that half knows the validation images, at 96 pixels."""
    model = networks("yolov8n")
    fit(model, known_batch(data), 70)
    return save(model, tmp_path_factory.mktemp("trained") / "run" / "weights" / "best.pt", 96)


@pytest.fixture
def known(data: DataSet) -> dict[str, Any]:
    """The images that it knows, with all objects, with one and with none."""
    batch = known_batch(data)
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

    def write(value: float, names: tuple[str, ...] = ("box_loss", "cls_loss", "dfl_loss")) -> str:
        path = folder / f"{value}-{len(names)}-{names[-1]}.json"
        Thresholds((value,) * len(names), names).save(path)
        return str(path)

    return write


def epochs(folder: Path) -> list[int]:
    return [int(row["epoch"]) for row in table(folder / "results.csv")]


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    return SimpleNamespace(
        join=join,
        save=save,
        known_batch=known_batch,
        ONE_HEAD=architecture("one-head"),
        TWO_HEADS=architecture("two-heads", end2end=True, reg_max=1),
        namespace=lambda arguments: IterableSimpleNamespace(**{**DEFAULT_CFG_DICT, **dict(arguments)}),
        heads_of=heads_of,
        divergence=divergence,
        one_image=one_image,
        of_image=of_image,
        epochs=epochs,
        QUIET=QUIET,
        STILL=STILL,
        CLASSES=CLASSES,
    )
