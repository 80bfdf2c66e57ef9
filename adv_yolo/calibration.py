"""Thresholds for AMAT from a trained standard model: its loss terms over the training images as a training sees them.

Margins are compared with thresholds while the network is trained: on augmented images, and normalised by the statistics
of their batch. Plain images in evaluation mode have lower losses, and thresholds from them would let no margin grow.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ultralytics.data import build_dataloader, build_yolo_dataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.checks import check_imgsz

from adv_yolo.checkpoint import read_checkpoint
from adv_yolo.objective import ImageTerms, check_model
from adv_yolo.scores import joined, make_validator, mean_average_precision, score
from advmed.evaluation.subjects import spread
from advmed.files import sha256
from advmed.guard import preserved
from advmed.progress import watched
from advmed.thresholds import TermStatistics, Thresholds
from advmed.training.run import fingerprint

SPLITS = ("train", "val", "test")
FILE = "thresholds.json"
"""Name of the file beside the checkpoint that was measured."""
AUGMENTATION = (
    *("hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "bgr"),
    *("mosaic", "mixup", "cutmix", "copy_paste", "copy_paste_mode", "multi_scale", "fraction"),
)
"""The host's arguments that decide which images a training sees."""
CUSTOM = "augmentations"
"""The host's argument for transforms of Albumentations, in Python only; it has no default."""
GAINS = ("box", "cls", "dfl", "cls_pw")
"""The host's weights of the loss terms, and what its weights of the classes are made by."""
UNTRAINED = 0.05
"""A network whose mAP50 on plain training images is below this has not learnt them: its losses say nothing."""
MEDIOCRE = 0.3
"""Below this mAP50 thresholds are worth a warning."""
QUALITY_IMAGES = 256
"""The most images that this mAP50 is measured on."""


def measure(
    path: str | Path, data: dict[str, Any], args: Any, *, rule: str, device: torch.device, split: str = "train"
) -> Thresholds:
    """Measures a trained model in a file, see :func:`measure_network`.

    Args:
        path: a checkpoint of Ultralytics (``best.pt``).
        data: the host's data set, as its ``check_det_dataset`` returns it.
        args: the host's arguments: augmentation, loss weights, image size, batch size, workers, seed.
        rule: such as ``mean``, ``mean+2std``, ``median+2spread``.
        device: where to measure.
        split: of the data set.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: for a model of another task.
        ValueError: if model and data do not have the same number of classes, the model was trained with other
            ``classes`` or ``single_cls``, or it detects next to nothing.
    """
    path = Path(path)
    network = load_network(path, data, device)
    if (trained := labels(network.args)) != labels(vars(args)):
        raise ValueError(
            f"{path} was trained with {_words(trained)}, and is to be measured with {_words(labels(vars(args)))}: it "
            f"has not learnt these labels, and its losses say nothing about them"
        )
    args = copy(args)
    args.imgsz = image_size(args.imgsz, network)
    found = quality(network, data, args, device, path.parent, split)
    check_quality(found, path)
    return measure_network(network.train(), data, args, rule=rule, device=device, split=split, source=path, found=found)


def measure_network(
    network: Any,
    data: dict[str, Any],
    args: Any,
    *,
    rule: str,
    device: torch.device,
    split: str,
    source: Path,
    found: float,
) -> Thresholds:
    """Measures a network over the images of a split as a training sees them, and applies the rule to its loss terms.

    They are augmented as the host's arguments say, once, by the seed of the run. Nothing moves in the network, and no
    random state.

    Args:
        network: in the modes of the training, on the device; BatchNorm uses the statistics of the batch.
        data: see :func:`measure`, as ``args``, ``rule``, ``device`` and ``split``.
        args: of the host.
        rule: of the thresholds.
        device: of the network.
        split: of the data set.
        source: its checkpoint.
        found: its quality, to be noted.
    """
    network.args = SimpleNamespace(**{**DEFAULT_CFG_DICT, **vars(args)})  # the loss weights of this run
    with seeded(int(args.seed)):
        set_class_weights(network, data, args, device)
    terms = ImageTerms(network, one_to_one=args.nms is False)
    statistics = TermStatistics(terms.names, keep=True)
    with seeded(int(args.seed)), preserved(network), torch.no_grad():
        batches = TrainingBatches(network, data, args, device, split)
        for batch in watched(batches, "thresholds", "batches"):
            statistics.update(terms(network(batch["img"]), batch))
    notes = {
        "data": Path(data.get("yaml_file", "")).name,
        "split": split,
        **demands(args, data, terms),
        "samples": fingerprint(set(relative_names(batches.files, data.get("path")))),
        "batch": int(args.batch),
        "images": round(statistics.n),
        "measured": "under augmentation, with batch statistics",
        "augmentation": conditions(args),
        "mAP50": round(found, 4),
    }
    return statistics.thresholds(rule, source=str(source), source_sha256=sha256(source), notes=notes)


def set_class_weights(network: Any, data: dict[str, Any], args: Any, device: torch.device) -> None:
    """Gives a network the weights of the classes that a training has: the host's, by its training images.

    Args:
        network: whose criterion is yet to be made.
        data: see :func:`measure`, as ``args`` and ``device``.
        args: of the host.
        device: of the network.
    """
    network.class_weights = None  # those of its own training
    if args.cls_pw:
        host = object.__new__(DetectionTrainer)  # of which it takes these
        vars(host).update(model=network, data=data, args=args, device=device)
        host.train_loader = SimpleNamespace(dataset=_training_images(network, data, args, "train"))
        host.set_class_weights()


def conditions(args: Any) -> dict[str, Any]:
    """Under what augmentation losses are measured, in plain values."""
    values = {name: getattr(args, name, None) for name in (*AUGMENTATION, CUSTOM)}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))  # as in a file: tuples are lists
    return plain


def demands(args: Any, data: dict[str, Any], terms: ImageTerms) -> dict[str, Any]:
    """What thresholds and the run that takes them must have in common: other values make other losses.

    Args:
        args: of the host, with the image size as it rounds it.
        data: see :func:`measure`.
        terms: of the network.
    """
    return {
        "imgsz": int(args.imgsz),
        "names": [str(name) for name in data["names"].values()],
        "head": terms.branch,
        **labels(vars(args)),
        **{name: float(getattr(args, name)) for name in GAINS},
    }


def labels(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What arguments of the host, of a run or in a checkpoint, make of the labels, in plain values."""
    classes = arguments.get("classes")
    return {
        "classes": None if classes is None else sorted({int(k) for k in np.atleast_1d(classes)}),
        "single_cls": bool(arguments.get("single_cls")),
    }


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def other_conditions(notes: Any, args: Any) -> list[str]:
    """In what the augmentation of thresholds differs from that of a run: ``scale 0.5 -> 0.9``."""
    measured = dict(notes.get("augmentation", {}))  # with the weights of the loss terms in files of earlier releases
    now = conditions(args) | {name: getattr(args, name) for name in GAINS}
    return [f"{name} {was} -> {now[name]}" for name, was in measured.items() if name in now and now[name] != was]


def quality(
    network: Any, data: dict[str, Any], args: Any, device: torch.device, folder: Path, split: str = "train"
) -> float:
    """mAP50 on plain images of a split, by the host's validator; of :data:`QUALITY_IMAGES` at even distances.

    Args:
        network: in evaluation mode, on the device; its head is set to the one that predicts.
        data: see :func:`measure`, as ``args`` and ``device``.
        args: of the host.
        device: of the network.
        folder: which the host wants to exist.
        split: of the data set.
    """
    size, parts = max(1, int(args.batch)), []
    with seeded(int(args.seed)), torch.no_grad():  # the host times the reading of a few images, drawn at random
        source = CleanBatches(network, data, args, device, split)
        validator = make_validator(network, data, args, device, source.loader, folder)
        labels = source.dataset.labels
        chosen = spread([i for i, label in enumerate(labels) if len(label["cls"])], QUALITY_IMAGES)
        for start in watched(range(0, len(chosen), size), "how good the network is", "batches"):
            batch = batch_of(source.dataset, chosen[start : start + size], device)
            parts.append(score(network, validator, batch, batch["img"]))
    return mean_average_precision(joined(parts), network.names)[1] if parts else 0.0


def check_quality(found: float, origin: object) -> None:
    """Raises ValueError for the mAP50 of a network that has not learnt its training images."""
    if not found >= UNTRAINED:
        raise ValueError(
            f"{origin} detects next to nothing on the training images (mAP50 {found:.3f}, below {UNTRAINED}): "
            f"thresholds from it mean nothing. Train the standard model first, for longer, or leave 'thresholds' out "
            f"for self-calibration."
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and PyTorch's CPU begin with a seed, and afterwards go on where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class TrainingBatches:
    """The images of a split as the host's training draws them in an epoch, on the device, in [0, 1]."""

    def __init__(self, model: Any, data: dict[str, Any], args: Any, device: torch.device, split: str = "train") -> None:
        self._host = SimpleNamespace(args=_arguments(args), device=device, stride=_stride(model))
        dataset, size = _training_images(model, data, args, split), max(1, int(args.batch))
        self.files: list[str] = dataset.im_files
        workers = 0 if device.type in {"cpu", "mps"} else int(args.workers)
        shuffle = not getattr(dataset, "rect", False)
        self._loader = build_dataloader(dataset, batch=size, workers=workers, shuffle=shuffle, rank=-1, device=device)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Any:
        try:
            for batch in self._loader:
                yield DetectionTrainer.preprocess_batch(self._host, batch)
        finally:
            self._loader.close()


def _training_images(model: Any, data: dict[str, Any], args: Any, split: str) -> Any:
    """The host's data set of a split, as of a training; it writes into the arguments."""
    size, stride = max(1, int(args.batch)), _stride(model)
    return build_yolo_dataset(_arguments(args), _images(data, split), size, data, mode="train", stride=stride)


def _arguments(args: Any) -> Any:
    """The host's arguments for a data set of our own."""
    settings = copy(args)
    settings.task, settings.cache = "detect", False
    return settings


def _images(data: dict[str, Any], split: str) -> Any:
    if not data.get(split):
        raise ValueError(
            f"the data set has no split {split!r}; there are {', '.join(k for k in SPLITS if data.get(k))}"
        )
    return data[split]


def _stride(model: Any) -> int:
    return max(int(model.stride.max()), 32)


def image_size(size: Any, model: Any) -> int:
    """The side that the host makes of its argument ``imgsz``: a multiple of the model's stride.

    Raises:
        TypeError, ValueError: if it is no size.
    """
    stride = _stride(model)
    return int(check_imgsz(size, stride=stride, floor=stride, max_dim=1))


def relative_names(files: Sequence[str], root: Any) -> list[str]:
    """Sample ids: image files relative to the data set's folder, so that a moved data set keeps its margins.

    The host follows symbolic links in some of its paths and not in others; either way is the same file. Images outside
    of the folder are named from the folder that all of those have in common, with ``../`` before it: no id says where
    on a machine an image lies.
    """
    given = [os.path.abspath(file) for file in files]
    roots = [] if root is None else list(dict.fromkeys([os.path.abspath(root), os.path.realpath(root)]))
    inside = [next((os.path.relpath(file, r) for r in roots if _within(file, r)), None) for file in given]
    outside = [os.path.dirname(file) for file, name in zip(given, inside, strict=True) if name is None]
    common = os.path.commonpath(outside) if outside else ""
    return [
        Path(os.path.join("..", os.path.relpath(file, common)) if name is None else name).as_posix()
        for file, name in zip(given, inside, strict=True)
    ]


def _within(file: str, folder: str) -> bool:
    return file.startswith(os.path.join(folder, ""))


class CleanBatches:
    """The images of a split without augmentation, in their order, padded to one size, on the device, in [0, 1]."""

    def __init__(self, model: Any, data: dict[str, Any], args: Any, device: torch.device, split: str = "train") -> None:
        settings = _arguments(args)
        settings.rect, settings.fraction = False, 1.0
        images, stride, batch_size = _images(data, split), _stride(model), max(1, int(args.batch))
        dataset = build_yolo_dataset(settings, images, batch_size, data, mode="val", rect=False, stride=stride)
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


def batch_of(dataset: Any, indices: Sequence[int], device: torch.device) -> dict[str, Any]:
    """The host's batch of some images of a data set, on the device."""
    return on_device(dataset.collate_fn([dataset[i] for i in indices]), device)


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
    model, _ = read_checkpoint(path)
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
