"""A few small pictures whose classes are easy to learn, and the classifiers as a host under test."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from torch import Tensor, nn

from adv_classify.data import MedMNIST
from adv_classify.module import RobustClassifier
from advmed.testing.lightning import LightningHost, Options

SIZE = 16
VALUES = 3 * SIZE * SIZE
COUNTS = {"train": 24, "val": 12, "test": 9}


def pictures(labels: np.ndarray, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """Noise in which the channel of the class is brighter, (N, size, size, 3)."""
    images = np.random.default_rng(seed).integers(0, 60, (len(labels), size, size, 3), dtype=np.uint8)
    images[np.arange(len(labels)), :, :, labels % 3] += 120
    return images


def write_npz(path: Path, counts: Mapping[str, int] = COUNTS, classes: int = 3, **replaced: Any) -> Path:
    """A MedMNIST file; arrays of the same name are replaced, those that are None left out."""
    arrays: dict[str, Any] = {}
    for seed, (split, count) in enumerate(counts.items()):
        labels = np.arange(count) % classes
        arrays |= {f"{split}_images": pictures(labels, seed=seed), f"{split}_labels": labels[:, None]}
    arrays |= replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def write_uneven(path: Path, *counts: int) -> Path:
    """A MedMNIST file with so many training images of each class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return write_npz(path, train_images=pictures(labels), train_labels=labels[:, None])


def write_table(root: Path, rows: Sequence[dict[str, Any]] | None = None, size: int = SIZE, grey: bool = False) -> Path:
    """``labels.csv`` and the images that it names."""
    if rows is None:
        rows = [
            {"image": f"{split}{i}.png", "label": i % 3, "dx": "abc"[i % 3], "split": split}
            for split, count in COUNTS.items()
            for i in range(count)
        ]
    (root / "images").mkdir(parents=True)
    for i, row in enumerate(rows):
        if "image" in row:
            array = pictures(np.array([i]), size, seed=i)[0]
            Image.fromarray(array[..., 0] if grey else array).save(root / "images" / row["image"])
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def write_folders(root: Path, splits: Sequence[str] = ("train", "val", "test"), each: int = 2) -> Path:
    """Folders of images, ``each`` in a class."""
    for split in splits:
        for label, name in enumerate(("cat", "ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i, array in enumerate(pictures(np.full(each, label), seed=label)):
                Image.fromarray(array).save(root / split / name / f"{i}.png")
    return root


class Small(nn.Sequential):
    """A classifier of grey or colour images without timm."""

    def __init__(self, channels: int = 3, classes: int = 4, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            first, last = nn.Conv2d(channels, 6, 3, padding=1), nn.Linear(24, classes)
            super().__init__(first, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), last)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def mean_average_precision(label: np.ndarray, probability: np.ndarray) -> float:
    """By scikit-learn, over the classes that occur."""
    return float(np.mean([average_precision_score(label == k, probability[:, k]) for k in np.unique(label)]))


def found_by(model: Any, batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits in float64."""
    with torch.no_grad():
        return batch["label"].numpy(), model(batch["image"]).double().numpy()


class Classify(LightningHost):
    entry = "adv_classify.cli:main"
    module = RobustClassifier
    data = MedMNIST
    counts = COUNTS
    batch_size = 8
    network: ClassVar = {
        "model__network__name": "test_efficientnet_gn"
    }  # no BatchNorm: images do not know of each other
    batch_norms: ClassVar = ({"model__network__name": "test_resnet"}, {"model__network__name": "test_efficientnet"})
    other_network: ClassVar = {"model__network__name": "test_resnet"}
    monitor: ClassVar = ("val/mAP", "max")
    noise: ClassVar = {"2": (round(2 / 255 * VALUES**0.5, 4), 0.05434), ".inf": (0.0157, 0.00392)}
    middling: ClassVar = (0.6,)
    learning: ClassVar = {"trainer__max_epochs": 3, "model__lr": 1e-3}
    easy: ClassVar = {"trainer__max_epochs": 4, "model__lr": 3e-3, "model__method__eps": 0.1}
    target = 0.9
    wavering: ClassVar = {"trainer__max_epochs": 4, "model__lr": 3e-4}
    augmented: ClassVar = {"data__flip": 0.5}
    stateful: ClassVar = {
        "model__network__name": "test_resnet",
        "model__network__drop_rate": 0.3,  # draws from the state of the process, as flips do
        "data__sampler": "balanced",
    }
    metric = "accuracy"
    levels: ClassVar = {
        "L2": [round(level / 255 * VALUES**0.5, 4) for level in (0, 2, 4, 8)],
        "Linf": [level / 255 for level in (0, 2, 4, 8)],
    }

    @property
    def together(self) -> Options:
        """All begin with weights that have learnt something, so that their losses differ."""
        return {"model__network__weights": self.standard.last, "model__class_weights": "balanced"}

    def write(self, folder: Path, counts: Mapping[str, int]) -> dict[str, Any]:
        return {"file": str(write_npz(folder / "own.npz", counts)), "flip": 0.0}

    def other_truth(self, folder: Path) -> dict[str, Any]:
        labels = (np.arange(COUNTS["val"]) + 1)[:, None] % 3
        return {"file": str(write_npz(folder / "own.npz", val_labels=labels)), "flip": 0.0}

    def scores(self, model: Any, batch: dict[str, Any]) -> dict[str, float]:
        label, logits = found_by(model, batch)
        probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return {
            "accuracy": np.mean(logits.argmax(1) == label),
            "balanced_accuracy": float(balanced_accuracy_score(label, logits.argmax(1))),
            "mAP": mean_average_precision(label, probability),
        }

    def terms(self, model: Any, batch: dict[str, Any]) -> np.ndarray:
        label, logits = found_by(model, batch)
        return np.log(np.exp(logits - logits[np.arange(len(label)), label, None]).sum(1, keepdims=True))

    def per_image(self, model: Any, batch: dict[str, Any]) -> list[float]:
        label, logits = found_by(model, batch)
        return [float(right) for right in logits.argmax(1) == label]
