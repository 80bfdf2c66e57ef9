"""A few blood cell images, batches of them, and what the host makes of a batch, for the tests of adv_yolo."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Before ultralytics is imported: the user's settings stay as they are, and nothing asks the network.
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="ultralytics-")
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"

import cv2
import torch
import yaml
from torch import Tensor
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import IterableSimpleNamespace
from ultralytics.utils.tal import make_anchors

from adv_yolo.api import make_batch
from helpers.hosts import ROOT, binary_divergence, class_divergence, table

SOURCE = ROOT / "examples" / "data" / "bccd"
CLASSES = ["RBC", "WBC", "Platelets"]
TERMS = ("box_loss", "cls_loss", "dfl_loss")
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


MODELS = Path(__file__).parents[1] / "data"
ONE_HEAD, TWO_HEADS = (str(MODELS / f"{name}.yaml") for name in ("one-head", "two-heads"))
"""Networks whose training takes a tenth of a nano model's time."""


class DataSet:
    """A copy of some images with lists of our own; the host writes its label caches beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.yaml = folder, folder / "cells.yaml"
        names = sorted(path.stem for path in (SOURCE / "images").glob("*.jpg"))[: TRAIN + VAL]
        for kind, suffix in (("images", ".jpg"), ("labels", ".txt")):
            (folder / kind).mkdir(parents=True)
            for name in names:
                shutil.copy(SOURCE / kind / f"{name}{suffix}", folder / kind)
        self.describe(CLASSES)
        self.list("train", names[:TRAIN])
        self.list("val", names[TRAIN:])
        for name in names:  # the largest cells; at 64 pixels the others are a few pixels wide
            rows = self.labels(name)
            self.write_labels(name, rows[(rows[:, 3] * rows[:, 4]).sort(descending=True, stable=True).indices[:MOST]])
        self.write_labels(names[1], [])  # a background image trains like any other

    def describe(self, names: list[str]) -> None:
        self.yaml.write_text(yaml.safe_dump({"train": "train.txt", "val": "val.txt", "names": dict(enumerate(names))}))

    def list(self, split: str, names: list[str]) -> None:
        (self.folder / f"{split}.txt").write_text("".join(f"./images/{name}.jpg\n" for name in names))

    def names(self, split: str) -> list[str]:
        return [Path(line).stem for line in (self.folder / f"{split}.txt").read_text().split()]

    def ids(self, split: str) -> list[str]:
        """The sample ids of its images."""
        return [f"images/{name}.jpg" for name in self.names(split)]

    def write_labels(self, name: str, rows: Any) -> None:
        lines = [" ".join([str(int(row[0])), *(f"{float(x):.6f}" for x in row[1:])]) for row in rows]
        (self.folder / f"labels/{name}.txt").write_text("".join(f"{line}\n" for line in lines))

    def labels(self, name: str) -> Tensor:
        rows = [[float(x) for x in line.split()] for line in (self.folder / f"labels/{name}.txt").open()]
        return torch.tensor(rows).reshape(-1, 5)

    def small_batch(self) -> dict[str, Any]:
        """The validation images at 64 pixels with their objects."""
        pictures = [cv2.imread(str(self.folder / name))[..., ::-1] for name in self.ids("val")]
        pictures = [cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA) for picture in pictures]
        images = torch.stack([torch.from_numpy(x.copy()).permute(2, 0, 1).float() / 255 for x in pictures])
        return make_batch(images, [self.labels(name) for name in self.names("val")])

    def batch(self) -> dict[str, Any]:
        """The validation images at 96 pixels with their objects, as the host's own data set gives them."""
        info, args = check_det_dataset(str(self.yaml)), get_cfg(overrides={"imgsz": 96, "task": "detect"})
        dataset = build_yolo_dataset(args, info["val"], VAL, info, mode="val", rect=False, stride=32)
        batch = dataset.collate_fn([dataset[i] for i in range(VAL)])
        return {**batch, "img": batch["img"].float() / 255}


def thinned(batch: dict[str, Any]) -> dict[str, Any]:
    """Images with several objects, with one, with none, and with several again."""
    index = batch["batch_idx"]
    kept = (index != 2) & ((index != 1) | (torch.arange(len(index)) == (index == 1).nonzero()[0]))
    chosen = {key: batch[key][kept] for key in ("batch_idx", "cls", "bboxes")}
    numbers = [int((chosen["batch_idx"] == i).sum()) for i in range(VAL)]
    assert numbers[0] > 3
    assert numbers[1:3] == [1, 0]
    return {"img": batch["img"], **chosen}


def one_image(batch: dict[str, Any], i: int) -> dict[str, Any]:
    """The batch of one of its images."""
    rows = batch["batch_idx"] == i
    of_rows = {key: batch[key][rows] for key in ("cls", "bboxes")}
    return {"img": batch["img"][i : i + 1], "batch_idx": torch.zeros(int(rows.sum())), **of_rows}


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


def stock_terms(model: Any, batch: dict[str, Any]) -> Tensor:
    """The stock loss vector of every image alone, (B, K); the model's arguments may be those of a checkpoint."""
    network = copy.copy(model)  # the same modules, with arguments as the criterion reads them
    network.args = IterableSimpleNamespace(**{**DEFAULT_CFG_DICT, **dict(model.args)})
    alone = [one_image(batch, i) for i in range(len(batch["img"]))]
    return torch.stack([network.init_criterion()(model(each["img"]), each)[0] for each in alone])


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


def save(model: DetectionModel, path: Path, size: int = 64) -> Path:
    """A finished checkpoint of the host."""
    network = copy.deepcopy(model)
    network.criterion = None
    network.names = dict(enumerate(CLASSES))
    network.args = {**DEFAULT_CFG_DICT, "imgsz": size, "task": "detect", "model": "x.yaml"}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": network.half(), "ema": None, "train_args": network.args, "epoch": -1, "optimizer": None}, path)
    return path


def epochs(folder: Path) -> list[int]:
    """The epochs that a run has written down."""
    return [int(row["epoch"]) for row in table(folder / "results.csv")]
