"""How the detections of trained models suffer under attack: mAP by the host's own validator, and IoU.

What is attacked is the image tensor in [0, 1] that the network receives, padding included; the loss is the host's, of
the head that predicts. The host's validator does the rest: non-maximum suppression, matching and average precision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from adv_yolo.calibration import CleanBatches, batch_of, image_size, load_network, relative_names
from adv_yolo.objective import DetectionObjective, ImageTerms
from adv_yolo.scores import CONFIDENCE, best_overlaps, make_validator, mean_average_precision, score
from advmed.attacks import Attack
from advmed.cli.evaluate import EvaluationHost
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch, at_levels
from advmed.evaluation.metric import Metric, Scores
from advmed.evaluation.subjects import Subject, spread
from advmed.margins import read_margins
from advmed.report import Example, View

BOUNDS = (0.0, 1.0)


@dataclass(frozen=True)
class TrainedModel:
    """A trained detection model and the images it is evaluated on.

    Attributes:
        name: as shown in the report.
        path: the checkpoint.
        network: in evaluation mode, on the device.
        source: the images.
        validator: the host's, for its post-processing and metrics.
        margins: the margins that its training ended with, or None.
    """

    name: str
    path: Path
    network: Any
    source: CleanBatches
    validator: Any
    margins: np.ndarray | None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.source.device


def load_model(
    name: str, path: str | Path, data: dict[str, Any], arguments: dict[str, Any], device: torch.device, folder: Path
) -> TrainedModel:
    """Loads a checkpoint of the host and the images of a split.

    Args:
        name: as shown in the report.
        path: ``best.pt`` or the like.
        data: as the host's ``check_det_dataset`` returns it.
        arguments: of the host: imgsz, batch, split, conf, iou, max_det, nms.
        device: where to evaluate.
        folder: of the report.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: for a model of another task.
        ValueError: if model and data do not fit, or the split has no images.
    """
    path = Path(path)
    network = load_network(path, data, device)
    args = get_cfg(DEFAULT_CFG_DICT, {**arguments, "imgsz": image_size(arguments["imgsz"], network)})
    source = CleanBatches(network, data, args, device, args.split)
    if not any(len(label["cls"]) for label in source.dataset.labels):
        raise ValueError(f"none of the {len(source.dataset)} images of the split {args.split!r} has an object")
    twice = [file for file, times in Counter(source.dataset.im_files).items() if times > 1]
    if twice:
        raise ValueError(
            f"the split {args.split!r} names {len(twice)} image(s) more than once, such as {twice[0]}; in an "
            f"evaluation each counts once: remove the other lines from the list of the split"
        )
    validator = make_validator(network, data, args, device, source.loader, folder)
    return TrainedModel(name, path, network, source, validator, read_margins(path.parent.parent / "margins.csv"))


def make_batches(model: TrainedModel, root: Any, *limits: int | None) -> list[EvaluationBatch]:
    """The images in batches; each limit takes as many of them, at even distances, None all."""
    dataset = model.source.dataset
    names = relative_names(dataset.im_files, root)
    chosen = list(range(len(names)))
    for limit in limits:
        chosen = chosen if limit is None else spread(chosen, limit)
    size = max(1, int(model.validator.args.batch))
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [EvaluationBatch([names[i] for i in part], partial(load, model, part)) for part in parts]


def load(model: TrainedModel, indices: Sequence[int]) -> LoadedBatch:
    """Images of the data set as a batch ready to be attacked."""
    batch = read(model, indices)
    objective = DetectionObjective(model.network, ImageTerms(model.network), batch)
    targets = [batch[name] for name in ("batch_idx", "cls", "bboxes")]
    return LoadedBatch(batch["img"], objective, partial(score, model.network, model.validator, batch), targets)


def read(model: TrainedModel, indices: Sequence[int]) -> dict[str, Any]:
    """The host's batch of some images, on the device."""
    return batch_of(model.source.dataset, indices, model.device)


def metrics(names: dict[int, str]) -> list[Metric]:
    """mAP50-95 and mAP50 by the host's own code, and the average IoU."""
    return [
        Metric(
            "mAP50-95",
            lambda scores: mean_average_precision(scores, names)[0],
            description="Mean average precision over IoU thresholds 0.50 to 0.95, by Ultralytics.",
            resamples=200,
        ),
        Metric(
            "mAP50",
            # of the first threshold alone, whatever the others are: four times as fast, which draws need
            lambda scores: mean_average_precision({**scores, "tp": scores["tp"][..., :1]}, names)[1],
            description="Mean average precision at IoU 0.50, by Ultralytics.",
            resamples=200,
        ),
        Metric(
            "IoU",
            average_iou,
            description=f"Mean over objects of the best IoU of a detection of the same class with a confidence of "
            f"{CONFIDENCE} or more; 0 where there is none.",
            per_sample=image_iou,
            fails_at=0.5,
        ),
    ]


def average_iou(scores: Scores) -> float:
    """Mean over all objects."""
    return float(scores["iou"].sum() / max(1, int(scores["truth"].sum())))


def image_iou(scores: Scores) -> np.ndarray:
    """Mean over the objects of each image, NaN for an image without objects."""
    objects = scores["truth"].sum(1)
    return np.where(objects > 0, scores["iou"] / np.maximum(objects, 1), np.nan)


def make_examples(
    models: Sequence[TrainedModel],
    root: Any,
    attack: tuple[str, Attack],
    levels: Sequence[float],
    ids: Sequence[str],
    *,
    seed: int = 0,
) -> list[Example]:
    """Images by their names, clean and attacked, with the true boxes and those of every model.

    The pictures are of an attack of their own with the settings of the evaluation, not of its very noise.
    """
    name, method = attack
    first = models[0]
    names = relative_names(first.source.dataset.im_files, root)
    examples = []
    for index in map(names.index, ids):
        views, picture, truth = [], None, None
        for model in models:
            loaded, batch = load(model, [index]), read(model, [index])
            if picture is None:
                objects = model.validator._prepare_batch(0, batch)
                picture, truth = _picture(loaded.images), _rows(objects["cls"], objects["bboxes"])
            for level, images in at_levels(loaded, method, levels, bounds=BOUNDS, seed=seed):
                with torch.no_grad():
                    found = model.validator.postprocess(model.network(images))[0]
                objects = model.validator._prepare_batch(0, batch)
                overlap = float(best_overlaps(objects, found).mean())
                sure = found["conf"] >= CONFIDENCE
                boxes = _rows(found["cls"][sure], found["bboxes"][sure])
                views.append(
                    View(
                        model.name,
                        name if level > 0 else "",
                        level,
                        _picture(images),
                        note=f"{len(boxes)} boxes, IoU {overlap:.2f}",
                        boxes=boxes,
                    )
                )
        assert picture is not None
        examples.append(Example(names[index], picture, None, views, boxes=truth))
    return examples


def _picture(images: Tensor) -> np.ndarray:
    """The first image in colours, (H, W, 3); of other than three channels their mean, (H, W)."""
    image = images[0].cpu()
    return (image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)).numpy()


def _rows(classes: Tensor, boxes: Tensor) -> np.ndarray:
    """(n, 5): label (class + 1, as 0 is the background of a picture), x1, y1, x2, y2 in pixels."""
    return torch.cat([classes[:, None].float() + 1, boxes.float()], 1).cpu().numpy()


@dataclass
class DetectionEvaluation(EvaluationHost):
    """What YOLO's models give to an evaluation.

    Attributes:
        paths: of the checkpoints, by the models' names.
        data: as the host's ``check_det_dataset`` returns it.
        data_file: which it is from.
        device: where the models are evaluated.
        arguments: of the host, with the split.
        samples: how many images are evaluated, None for all.
        folder: of the report.
    """

    paths: Mapping[str, Path]
    data: dict[str, Any]
    data_file: Path
    device: torch.device
    arguments: dict[str, Any]
    samples: int | None
    folder: Path

    bounds = BOUNDS
    packages = ("ultralytics",)
    task = "detection"

    @cached_property
    def models(self) -> list[TrainedModel]:
        """The models, loaded."""
        return [
            load_model(name, path, self.data, self.arguments, self.device, self.folder)
            for name, path in self.paths.items()
        ]

    @cached_property
    def subjects(self) -> list[Subject]:
        """See :attr:`EvaluationHost.subjects`."""
        found = []
        for model in self.models:
            batches = partial(make_batches, model, self.data.get("path"), self.samples)
            found.append(Subject(model.name, model.path, batches(), model.margins, batches))
        return found

    def default_levels(self, norm: float) -> list[float]:
        """In L2 the paper's levels for 320 pixels in colours, growing as the norm does with the image's values; in Linf
        2, 4 and 8 / 255."""
        if norm == math.inf:
            return [round(level / 255, 6) for level in (0, 2, 4, 8)]
        scale = int(self.arguments["imgsz"]) / 320 * math.sqrt(int(self.data.get("channels", 3)) / 3)
        return [round(level * scale, 6) for level in (0, 5, 10, 15)]

    @property
    def _names(self) -> dict[int, str]:
        return {int(k): str(v) for k, v in self.models[0].network.names.items()}

    @property
    def metrics(self) -> list[Metric]:
        """See :func:`metrics`."""
        return metrics(self._names)

    def examples(
        self, attack: tuple[str, Attack], levels: Sequence[float], ids: Sequence[str], *, seed: int
    ) -> list[Example]:
        """See :func:`make_examples`."""
        return make_examples(self.models, self.data.get("path"), attack, levels, ids, seed=seed)

    @property
    def data_name(self) -> str:
        """Of the data set."""
        return self.data_file.stem

    @property
    def measured_over(self) -> str:
        """See :attr:`EvaluationHost.measured_over`."""
        return f"the image tensor in [0, 1] ({self.arguments['imgsz']} pixels)"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See :attr:`EvaluationHost.fingerprint`."""
        return {"arguments": self.arguments}

    @property
    def class_names(self) -> dict[int, str]:
        """Label 0 is the background of a picture."""
        return {label + 1: name for label, name in self._names.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`EvaluationHost.settings`."""
        images = sum(len(batch.ids) for batch in self.subjects[0].batches)
        return {
            "data set": self.data_file.name,
            "split": f"{self.arguments['split']}, {images} images",
            "host arguments": {name: value for name, value in self.arguments.items() if name != "split"},
            "checkpoints": {name: "/".join(path.parts[-3:]) for name, path in self.paths.items()},
        }
