"""How the decisions of trained classifiers suffer under attack: accuracy, mAP, and what the decisions rest on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from adv_classify.data import ClassificationData, ImageDataset
from adv_classify.external import torch_attack
from adv_classify.gradcam import GradCam, agreement
from adv_classify.module import RobustClassifier, check_classes, check_images, mean_average_precision
from adv_classify.objective import ClassificationObjective
from advmed.attacks import PGD, Attack, Margin, parse_attacks
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch, at_levels
from advmed.evaluation.metric import Metric, Scores
from advmed.integrations.lightning import MARGINS
from advmed.integrations.lightning.evaluation import LightningEvaluation, in_batches, picture
from advmed.margins import read_margins
from advmed.report import Example, View

BOUNDS = (0.0, 1.0)


@dataclass
class TrainedModel:
    """A trained classifier, ready to be attacked."""

    name: str
    path: Path
    network: torch.nn.Module
    dataset: ImageDataset
    device: torch.device
    margins: np.ndarray | None
    cam: GradCam | None
    batch_size: int

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        """Images, labels and ids on the device."""
        batch = default_collate([self.dataset[i] for i in indices])
        return batch["image"].to(self.device), batch["label"].to(self.device), batch["id"]


def load_model(
    name: str, path: str | Path, data: ClassificationData, split: str, device: torch.device, *, gradcam: bool = True
) -> TrainedModel:
    """A trained model and the images that it is evaluated on.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is no checkpoint of ours, or of other classes, in another order, channels or sizes than the
            data.
    """
    path = Path(path)
    model = RobustClassifier.from_checkpoint(path)
    channels = int(model.hparams["channels"])
    if model.num_classes != data.num_classes or channels != data.channels:
        raise ValueError(
            f"{path} predicts {model.num_classes} classes from {channels} channel(s), the data has {data.num_classes} "
            f"classes and {data.channels} channel(s)"
        )
    check_classes(model.hparams["class_names"], data.class_names, path)
    check_images(model.hparams, data.image_size, data.image_bits, path)
    network, dataset = model.network.to(device), data.dataset(split)
    cam = GradCam(network, dataset[0]["image"][None].to(device)) if gradcam else None
    return TrainedModel(
        name, path, network, dataset, device, read_margins(path.parent.parent / MARGINS), cam, data.batch_size
    )


def parse(names: Sequence[str], norm: float) -> dict[str, Attack]:
    """Our attacks and those of torchattacks by their names.

    ``margin100`` is ``pgd100`` on the margin of the logits; ``targeted100`` the same for up to 9 wrong classes, one
    after the other, as many as AutoAttack tries.

    Raises:
        ValueError: for a name that is none, or given twice.
    """
    attacks: dict[str, Attack] = {}
    for name in names:
        if name in attacks:
            raise ValueError(f"attack {name!r} is given twice")
        margin = re.fullmatch(r"(margin|targeted)([1-9][0-9]*(?:x[1-9][0-9]*)?)", name)
        if margin:
            (like,) = parse_attacks([f"pgd{margin[2]}"], norm=norm).values()
            attacks[name] = replace(cast(PGD, like), loss=Margin(targets=9 if margin[1] == "targeted" else 0))
            continue
        try:
            attacks |= parse_attacks([name], norm=norm, task="classification")
        except ValueError:  # of torchattacks, or of no one
            attacks[name] = torch_attack(name, norm)
    return attacks


def make_batches(model: TrainedModel, *limits: int | None) -> list[EvaluationBatch]:
    """The images in batches, or some of them; see :func:`advmed.integrations.lightning.evaluation.in_batches`."""
    return in_batches(model.dataset.samples.ids, model.batch_size, partial(load, model), *limits)


def load(model: TrainedModel, indices: Sequence[int]) -> LoadedBatch:
    """Images of the data set as a batch ready to be attacked."""
    images, labels, _ = model.read(indices)
    return prepare(model, images, labels, Explained(model, images))


def prepare(model: TrainedModel, images: Tensor, labels: Tensor, explained: Explained) -> LoadedBatch:
    """Images and labels as a batch ready to be attacked."""
    objective = ClassificationObjective(model.network, labels)
    judged = partial(decisions, model, labels)
    return LoadedBatch(images, objective, partial(score, model, labels, explained), [labels], judged)


class Explained:
    """Grad-CAM of a batch: the class that is predicted on the clean image, and its map there."""

    def __init__(self, model: TrainedModel, images: Tensor) -> None:
        self.cam = model.cam
        if self.cam is not None:
            with torch.no_grad():
                self.classes = model.network(images).argmax(1)
            self.clean = self.cam(images, self.classes)

    def agreement(self, images: Tensor) -> Tensor:
        """How alike the maps of clean and attacked images are, (B,); NaN without Grad-CAM."""
        if self.cam is None:
            return torch.full((len(images),), torch.nan, dtype=torch.float64)
        return agreement(self.clean, self.cam(images, self.classes))


def score(model: TrainedModel, labels: Tensor, explained: Explained, images: Tensor) -> dict[str, Tensor]:
    """``probability`` (B, classes), ``label`` (B,) and ``cam`` (B,), the agreement of the Grad-CAM maps."""
    return {**decisions(model, labels, images), "cam": explained.agreement(images)}


def decisions(model: TrainedModel, labels: Tensor, images: Tensor) -> dict[str, Tensor]:
    """``probability`` (B, classes) and ``label`` (B,)."""
    return {"probability": model.network(images).float().softmax(1), "label": labels}


def metrics(gradcam: bool = True) -> list[Metric]:
    """Accuracy, balanced accuracy, mAP, and the agreement of Grad-CAM."""
    found = [
        Metric(
            "mAP",
            mean_ap,
            description="Mean over classes of average precision; its mean over levels is mARP.",
            resamples=200,
        ),
        Metric(
            "accuracy",
            accuracy,
            description="Share of images whose class is predicted.",
            per_sample=correct,
            fails_at=0.5,
            lost_at=0.0,
            is_mean=True,
        ),
        Metric("balanced accuracy", balanced_accuracy, description="Mean over classes of the share that is predicted."),
    ]
    if gradcam:
        found.append(
            Metric(
                "Grad-CAM agreement",
                mean_agreement,
                description="Mean correlation of the Grad-CAM maps of clean and attacked image, for the class that is "
                "predicted on the clean one; images whose map is empty are left out.",
                per_sample=lambda scores: scores["cam"],
                monotone=False,  # of the images that accuracy is measured on, whatever their maps are
            )
        )
    return found


def mean_ap(scores: Scores) -> float:
    """MAP of stored scores."""
    probability, label = torch.from_numpy(scores["probability"]), torch.from_numpy(scores["label"])
    return float(mean_average_precision(probability, label))


def correct(scores: Scores) -> np.ndarray:
    """1 where the class is predicted, else 0; (N,)."""
    return (scores["probability"].argmax(1) == scores["label"]).astype(np.float64)


def accuracy(scores: Scores) -> float:
    """Share of images whose class is predicted."""
    return float(correct(scores).mean())


def mean_agreement(scores: Scores) -> float:
    """Mean over the images whose map is not empty; NaN where all are."""
    known = scores["cam"][~np.isnan(scores["cam"])]
    return float(np.clip(known.mean(), 0, 1)) if known.size else float("nan")


def balanced_accuracy(scores: Scores) -> float:
    """Mean over the classes that occur of the share that is predicted."""
    right, label = correct(scores), scores["label"]
    return float(np.mean([right[label == k].mean() for k in np.unique(label)]))


def make_examples(
    models: Sequence[TrainedModel],
    class_names: Sequence[str],
    attack: tuple[str, Attack],
    levels: Sequence[float],
    ids: Sequence[str],
    *,
    seed: int = 0,
) -> list[Example]:
    """Images by their ids, clean and attacked, with the predicted classes and Grad-CAM of every model."""
    name, method = attack
    dataset = models[0].dataset
    examples = []
    for index in map(dataset.samples.ids.index, ids):
        views: list[View] = []
        for model in models:
            images, labels, _ = model.read([index])
            explained = Explained(model, images)
            loaded = prepare(model, images, labels, explained)
            for level, attacked in at_levels(loaded, method, levels, bounds=BOUNDS, seed=seed):
                with torch.no_grad():
                    probability = model.network(attacked).float().softmax(1)[0]
                best = int(probability.argmax())
                note = f"{class_names[best]} {float(probability[best]):.0%}"
                heat = None
                if model.cam is not None:
                    found = model.cam(attacked, explained.classes)[0]
                    heat = (found / found.max().clamp_min(1e-12)).cpu().numpy()
                views.append(
                    View(model.name, name if level > 0 else "", level, picture(attacked), note=note, heat=heat)
                )
        truth = class_names[int(labels[0])]
        examples.append(Example(f"{dataset.samples.ids[index]} ({truth})", picture(images), None, views))
    return examples


class ClassifierEvaluation(LightningEvaluation):
    """See :class:`LightningEvaluation`; the command's own option is ``gradcam``."""

    bounds = BOUNDS
    packages = ("timm", "torchvision")
    task = "classification"
    data: ClassificationData

    def parse_attacks(self, names: Sequence[str], norm: float) -> Mapping[str, Attack]:
        """See :func:`parse`."""
        return parse(names, norm)

    @cached_property
    def values(self) -> int:
        """Number of values of an image."""
        return self.data.dataset(self.split)[0]["image"].numel()

    def default_levels(self, norm: float) -> list[float]:
        """The same noise in every value whatever the norm: 0, 2, 4 and 8 / 255."""
        scale = 1.0 if norm == float("inf") else self.values**0.5
        return [round(level / 255 * scale, 4 if scale > 1 else 8) for level in (0, 2, 4, 8)]

    def load_model(self, name: str, path: Path) -> TrainedModel:
        """See :func:`load_model`."""
        return load_model(name, path, self.data, self.split, self.device, gradcam=self.given.gradcam)

    def batches(self, model: TrainedModel, *limits: int | None) -> list[EvaluationBatch]:
        """See :func:`make_batches`."""
        return make_batches(model, *limits)

    @property
    def metrics(self) -> list[Metric]:
        """See :func:`metrics`."""
        return metrics(self.given.gradcam)

    def examples(
        self, attack: tuple[str, Attack], levels: Sequence[float], ids: Sequence[str], *, seed: int
    ) -> list[Example]:
        """See :func:`make_examples`."""
        return make_examples(self.models, self.data.class_names, attack, levels, ids, seed=seed)

    @property
    def measured_over(self) -> str:
        """See :attr:`EvaluationHost.measured_over`."""
        return f"the image in [0, 1] ({self.values} values)"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Grad-CAM is among the scores that are kept."""
        return {**super().fingerprint, "cam": self.given.gradcam}
