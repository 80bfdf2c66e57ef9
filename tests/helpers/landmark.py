"""A few small pictures with shapes whose corners and centres are landmarks, and their U-Net as a host under test."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from adv_landmark import module
from adv_landmark.data import LandmarkTable
from adv_landmark.maps import decode
from adv_landmark.module import RobustLandmarks
from adv_landmark.network import make_network
from advmed.testing.lightning import LightningHost
from helpers.hosts import table

NAMES = ("corner", "dot", "end")
FILE, SIZE = (40, 48), (32, 48)  # height and width of a file, and what it is resized to: another scale in y than in x
SPACING = (0.4, 0.5)  # in x and y
UNKNOWN = {"train2.png": ("dot",), "val1.png": ("corner", "end")}
RADIUS = 2.4  # a twentieth of 48
LEVEL = round(math.sqrt(SIZE[0] * SIZE[1] / (3 * 200 * 160)), 5)
TINY = {"encoder": "tu-test_efficientnet", "decoder_channels": (16, 16, 8, 8, 8)}


def picture(seed: int) -> tuple[np.ndarray, dict[str, tuple[float, float]]]:
    """A rectangle and a disk on noise, and the landmarks: two corners and a centre, (x, y) from pixel to pixel."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 50, FILE, dtype=np.uint8)
    x, y = int(random.integers(6, 12)), int(random.integers(5, 11))
    right, below = x + int(random.integers(9, 13)), y + int(random.integers(9, 13))
    image[y : below + 1, x : right + 1] += 110
    dot = float(random.integers(35, 42)), float(random.integers(12, 25))
    rows, columns = np.ogrid[: FILE[0], : FILE[1]]
    image[(columns - dot[0]) ** 2 + (rows - dot[1]) ** 2 <= 9] += 200
    return image, {"corner": (x, y), "dot": dot, "end": (right, below)}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_points(
    root: Path,
    points: Mapping[str, Mapping[str, Sequence[Any]]],
    split: Mapping[str, str],
    files: Mapping[str, np.ndarray],
    *,
    column: str = "landmark_index",
    extra: Mapping[str, Sequence[Any]] | None = None,
) -> Path:
    """``landmarks.csv``, ``split.csv``, with ``extra`` columns, and the images that they name."""
    (root / "images").mkdir(parents=True)
    for name in points:
        Image.fromarray(files[name]).save(root / "images" / f"{name.removesuffix('.png')}.png")
    marks = [(name, mark, x, y) for name, own in points.items() for mark, (x, y) in own.items()]
    write_csv(root / "landmarks.csv", [dict(zip(("image", column, "x", "y"), mark, strict=True)) for mark in marks])
    more = [{key: values[k] for key, values in (extra or {}).items()} for k in range(len(split))]
    rows = [{"image": name, "split": part} for name, part in split.items()]
    write_csv(root / "split.csv", [row | own for row, own in zip(rows, more, strict=True)])
    return root


def write_table(
    root: Path,
    counts: Mapping[str, int] = LightningHost.counts,
    *,
    names: Sequence[str] = NAMES,
    spacing: tuple[float, float] | None = SPACING,
    mode: str = "L",
) -> Path:
    """Pictures, some of whose landmarks are not known, and their tables."""
    split = {f"{part}{i}.png": part for part, count in counts.items() for i in range(count)}
    points, files = {}, {}
    for name, part in split.items():
        image, own = picture(100 * len(part) + int(name[len(part) : -4]))
        files[name] = np.array(Image.fromarray(image).convert(mode))
        known = {k: own.get(k, own["dot"]) for k in names}
        points[name] = known | {k: ("", "") for k in UNKNOWN.get(name, ()) if k in names}
    extra = {f"spacing_{axis}": [value] * len(split) for axis, value in zip("xy", spacing or (), strict=False)}
    return write_points(root, points, split, files, extra=extra)


def scaled(points: np.ndarray) -> np.ndarray:
    """Points of a file of 40 x 48 pixels in an image of 32 x 48: edges stay edges."""
    return np.stack([points[..., 0], (points[..., 1] + 0.5) * 0.8 - 0.5], -1)


def plain_terms(maps: Tensor, points: np.ndarray, heatmap: str, weight: float, radius: float = RADIUS) -> Tensor:
    """The loss terms of one image, landmark by landmark, of the landmarks that are known."""
    count, each = len(points), []
    rows, columns = torch.meshgrid(*(torch.arange(n).double() for n in maps.shape[1:]), indexing="ij")
    for k, (x, y) in enumerate(points):
        if math.isnan(x):
            continue
        squared = (rows - y) ** 2 + (columns - x) ** 2
        inside = squared <= radius**2
        heat = maps[k].sigmoid()
        if heatmap == "dice":
            loss = 1 - (2 * heat[inside].sum() + 1) / (heat.sum() + inside.sum() + 1)
        else:
            target = torch.where(inside, torch.exp(-squared / (2 * radius**2)), 0.0)
            loss = -(target * heat.log() + (1 - target) * (1 - heat).log()).mean()
        down = (maps[count + k] - (y - rows) / radius)[inside].abs().mean()
        across = (maps[2 * count + k] - (x - columns) / radius)[inside].abs().mean()
        each.append(torch.stack([weight * loss, down, across]))
    return torch.stack(each).mean(0)


class Landmark(LightningHost):
    entry = "adv_landmark.cli:main"
    module = RobustLandmarks
    data = LandmarkTable
    network: ClassVar = {
        "model__network__encoder": TINY["encoder"],
        "model__network__decoder_channels": list(TINY["decoder_channels"]),
    }
    batch_norms: ClassVar = ({}, {"model__network__encoder": "tu-test_resnet"})
    other_network: ClassVar = {"model__network__encoder": "tu-test_resnet"}
    monitor: ClassVar = ("val/MRE", "min")
    noise: ClassVar = {"2": (LEVEL, LEVEL), ".inf": (0.00784, 0.00196)}
    rule = "mean+2std"
    middling: ClassVar = (1.0, 0.42, 0.42)
    learning: ClassVar = {"trainer__max_epochs": 60, "model__lr": 5e-3, "trainer__check_val_every_n_epoch": 30}
    wavering: ClassVar = {"trainer__max_epochs": 5, "model__lr": 3e-2}
    augmented: ClassVar = {"data__rotate": 10, "data__zoom": 0.1, "data__shift": 0.05, "data__color": 0.1}
    stateful: ClassVar = {"model__network__encoder": "tu-test_resnet", "model__heatmap": "bce"}
    together: ClassVar = {"optimizer__lr": 0.05}
    metric = "MRE"
    evaluation: ClassVar = ("--radii", "[2,5.5]")
    levels: ClassVar = {
        "L2": [round(level * math.sqrt(SIZE[0] * SIZE[1] / 96000), 4) for level in (0, 0.5, 1, 2)],
        "Linf": [level / 255 for level in (0, 1, 2, 4)],
    }
    norms: ClassVar = ("L2",)

    @property
    def root(self) -> Path:
        """The folder of the pictures."""
        return self.folder / "images"

    def truth(self, *images: str) -> np.ndarray:
        """The points of images as the table has them, (N, L, 2), in the order of their names."""
        rows = {(r["image"], r["landmark_index"]): r for r in table(self.root / "landmarks.csv")}
        return np.array([[[float(rows[i, k][axis] or "nan") for axis in "xy"] for k in NAMES] for i in images])

    def errors(self, model: Any, images: Tensor, ids: Sequence[str]) -> np.ndarray:
        """Radial errors in NumPy, in mm of the files, (N, L); NaN where the table is empty."""
        with torch.no_grad():
            found = decode(model(images), model.radius)[0].double().numpy()
        place = np.stack([found[..., 0], (found[..., 1] + 0.5) / 0.8 - 0.5], -1)
        away = (place - self.truth(*ids)) * SPACING
        return np.hypot(away[..., 0], away[..., 1])

    def write(self, folder: Path, counts: Mapping[str, int]) -> dict[str, Any]:
        return {"root": str(write_table(folder, counts)), "size": list(SIZE)}

    def other_truth(self, folder: Path) -> dict[str, Any]:
        options = self.write(folder, self.counts)
        rows = table(folder / "landmarks.csv")
        write_csv(folder / "landmarks.csv", [{**r, "x": "1"} if r["image"] == "val0.png" else r for r in rows])
        return options

    def scores(self, model: Any, batch: dict[str, Any]) -> dict[str, float]:
        error = self.errors(model, batch["image"], batch["id"])
        known = error[~np.isnan(error)]
        return {"MRE": known.mean(), **{f"SDR_{r}mm": (known <= r).mean() for r in (2, 2.5, 3, 4)}}

    def terms(self, model: Any, batch: dict[str, Any]) -> np.ndarray:
        with torch.no_grad():
            maps = model(batch["image"])
        points = scaled(self.truth(*batch["id"]))
        weight = {"dice": 0.5, "bce": 2.0}[model.heatmap]
        return np.stack([plain_terms(m, p, model.heatmap, weight).numpy() for m, p in zip(maps, points, strict=True)])

    def per_image(self, model: Any, batch: dict[str, Any]) -> list[float]:
        return list(np.nanmean(self.errors(model, batch["image"], batch["id"]), 1))

    @classmethod
    @contextmanager
    def independent(cls) -> Iterator[None]:
        """With GroupNorm in the place of BatchNorm."""
        module.make_network = without_batch_norm
        try:
            yield
        finally:
            module.make_network = make_network


def without_batch_norm(*given: Any) -> nn.Module:
    """The network with GroupNorm."""

    def replace(part: nn.Module) -> None:
        for name, child in part.named_children():
            if isinstance(child, nn.BatchNorm2d):  # timm's own kind has its activation within
                act = getattr(child, "act", nn.Identity())
                setattr(part, name, nn.Sequential(nn.GroupNorm(1, child.num_features), act))
            else:
                replace(child)

    network = make_network(*given)
    replace(network)
    return network
