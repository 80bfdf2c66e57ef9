"""Thresholds for AMAT from a trained standard model: its loss terms over the clean training images."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import torch
from ultralytics.data import build_dataloader, build_yolo_dataset
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import TQDM

from adv_yolo.objective import ImageTerms, check_model
from advmed.thresholds import TermStatistics, Thresholds, sha256

SPLITS = ("train", "val", "test")
FILE = "thresholds.json"
"""Name of the file beside the checkpoint that was measured."""


def measure(
    path: str | Path, data: dict[str, Any], args: Any, *, rule: str, device: torch.device, split: str = "train"
) -> Thresholds:
    """Measures a trained model on the clean images of a split, and applies the rule to each of its loss terms.

    The images are those of the training, without augmentation; the model is in evaluation mode.

    Args:
        path: a checkpoint of Ultralytics (``best.pt``).
        data: the host's data set, as its ``check_det_dataset`` returns it.
        args: the host's arguments: image size, batch size, workers.
        rule: ``mean`` or ``mean+2std``.
        device: where to measure.
        split: of the data set.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: for a model of another task.
        ValueError: if model and data do not have the same number of classes.
    """
    path = Path(path)
    model = load_network(path, data, device)
    terms = ImageTerms(model, one_to_one=args.nms is False)
    statistics = TermStatistics(terms.names)
    with torch.no_grad():
        for batch in TQDM(CleanBatches(model, data, args, device, split), desc="thresholds"):
            statistics.update(terms(model(batch["img"]), batch))
    notes = {"data": str(data.get("yaml_file", "")), "split": split, "imgsz": int(args.imgsz)}
    return statistics.thresholds(rule, source=str(path), source_sha256=sha256(path), notes=notes)


class CleanBatches:
    """The images of a split without augmentation, in their order, padded to one size, on the device, in [0, 1]."""

    def __init__(self, model: Any, data: dict[str, Any], args: Any, device: torch.device, split: str = "train") -> None:
        settings = copy(args)
        settings.rect, settings.fraction, settings.task = False, 1.0, "detect"
        if not data.get(split):
            raise ValueError(
                f"the data set has no split {split!r}; there are {', '.join(k for k in SPLITS if data.get(k))}"
            )
        stride = max(int(model.stride.max()), 32)
        batch_size = max(1, int(args.batch))
        dataset = build_yolo_dataset(settings, data[split], batch_size, data, mode="val", rect=False, stride=stride)
        self.dataset, self.device = dataset, device
        workers = 0 if device.type in {"cpu", "mps"} else int(args.workers)
        self.loader = build_dataloader(
            dataset, batch=batch_size, workers=workers, shuffle=False, rank=-1, device=device
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        for batch in self.loader:
            yield on_device(batch, self.device)


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of the host's loader on a device, its images in [0, 1]."""
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    moved["img"] = moved["img"].float() / 255
    return moved


def load_network(path: Path, data: dict[str, Any], device: torch.device) -> Any:
    """A trained detection model that fits a data set, in evaluation mode, on the device.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: for a model of another task.
        ValueError: if it does not predict the classes of the data set.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no model {path}")
    model, _ = load_checkpoint(path)
    check_classes(check_model(model), data, path)
    return model.to(device).eval()


def check_classes(model: Any, data: dict[str, Any], path: str | Path) -> None:
    """Raises ValueError if a model does not predict the classes of a data set."""
    classes = int(model.model[-1].nc)
    if classes != int(data["nc"]):
        raise ValueError(
            f"{path} predicts {classes} class(es) {list(model.names.values())[:10]}, the data set has {data['nc']} "
            f"{list(data['names'].values())[:10]}; name a model that was trained on this data set"
        )
