"""Detections against the true objects, by the host's own validator: what mAP and IoU are computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.metrics import DetMetrics, box_iou

CONFIDENCE = 0.25
"""A detection counts for the average IoU, and is drawn, above this confidence: the host's default for prediction."""


def make_validator(
    network: Any, data: dict[str, Any], args: Any, device: torch.device, loader: Any, folder: Path
) -> Any:
    """The host's validator, ready to score the predictions of a network, whose head is set to the one that predicts.

    Args:
        network: in evaluation mode, on the device.
        data: as the host's ``check_det_dataset`` returns it.
        args: the host's arguments.
        device: where the network is.
        loader: of the images.
        folder: which the host wants to exist.
    """
    network.end2end = args.nms is False  # which head predicts, as the host's validator decides it
    quiet = {**vars(args), "plots": False, "save_json": False, "save_txt": False}
    validator = DetectionValidator(dataloader=loader, save_dir=folder, args=quiet)
    validator.device, validator.data, validator.training = device, data, False
    validator.init_metrics(network)
    return validator


def score(network: Any, validator: Any, batch: dict[str, Any], images: Tensor) -> dict[str, Tensor]:
    """What mAP and IoU are computed from, per image.

    Args:
        network: in evaluation mode.
        validator: the host's, for its post-processing and matching.
        batch: the host's, with the true objects.
        images: shape (B, 3, H, W) in [0, 1], those of the batch or what an attack made of them.

    Returns:
        ``tp`` (B, M, 10) and ``found`` (B, M, 2), confidence and class, of M = max_det detections, of which ``number``
        (B,) are real; ``truth`` (B, classes), objects per class; ``iou`` (B,), summed best IoU over the objects.
    """
    count, places, classes = len(images), int(validator.args.max_det), int(network.model[-1].nc)
    tp = torch.zeros(count, places, validator.niou, dtype=torch.bool)
    kept = torch.zeros(count, places, 2)
    number = torch.zeros(count, dtype=torch.int64)
    truth = torch.zeros(count, classes, dtype=torch.int64)
    iou = torch.zeros(count, dtype=torch.float64)
    attacked = {**batch, "img": images}
    for i, detections in enumerate(detected(validator, network(images))):
        objects = validator._prepare_batch(i, attacked)
        found = validator._prepare_pred(detections)
        n = number[i] = len(found["cls"])
        tp[i, :n] = torch.from_numpy(validator._process_batch(found, objects)["tp"])
        kept[i, :n] = torch.stack([found["conf"], found["cls"]], 1).cpu()
        truth[i] = torch.bincount(objects["cls"].long().cpu(), minlength=classes)
        iou[i] = best_overlaps(objects, found).sum()
    return {"tp": tp, "found": kept, "number": number, "truth": truth, "iou": iou}


def detected(validator: Any, predictions: Any) -> list[dict[str, Tensor]]:
    """What the host's post-processing finds in every image, however long that takes.

    The host looks at its clock behind an image, and leaves the others of a batch without detections when it is late.
    One image at a time leaves no others.

    Args:
        validator: the host's.
        predictions: of the network in evaluation mode, for B images.

    Returns:
        B of the host's dictionaries: ``bboxes`` (n, 4), ``conf`` (n,), ``cls`` (n,) and ``extra``.
    """
    found = predictions[0] if isinstance(predictions, (list, tuple)) else predictions
    return [validator.postprocess(found[i : i + 1])[0] for i in range(len(found))]


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """The scores of several batches as those of one."""
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def best_overlaps(objects: dict[str, Any], found: dict[str, Tensor], confidence: float = CONFIDENCE) -> Tensor:
    """For every object the best IoU of a detection of its class above the confidence, 0 without one; (n,)."""
    sure = found["conf"] >= confidence
    boxes, classes = found["bboxes"][sure], found["cls"][sure]
    if not len(objects["cls"]) or not len(classes):
        return torch.zeros(len(objects["cls"]))
    overlap = box_iou(objects["bboxes"], boxes) * (objects["cls"][:, None] == classes)
    return overlap.amax(1).cpu()


def host_results(scores: Mapping[str, np.ndarray], names: dict[int, str]) -> dict[str, float]:
    """The host's own metrics of stored scores, by its own names, ``fitness`` among them."""
    host = DetMetrics(names)
    for i, n in enumerate(scores["number"]):
        counts = scores["truth"][i]
        host.stats["tp"].append(scores["tp"][i, :n])
        host.stats["conf"].append(scores["found"][i, :n, 0])
        host.stats["pred_cls"].append(scores["found"][i, :n, 1])
        host.stats["target_cls"].append(np.repeat(np.arange(len(counts)), counts).astype(np.float32))
        host.stats["target_img"].append(np.flatnonzero(counts).astype(np.float32))
    host.process()
    return {name: float(value) for name, value in host.results_dict.items()}


def mean_average_precision(scores: Mapping[str, np.ndarray], names: dict[int, str]) -> tuple[float, float]:
    """mAP50-95 and mAP50 of stored scores."""
    results = host_results(scores, names)
    return results["metrics/mAP50-95(B)"], results["metrics/mAP50(B)"]
