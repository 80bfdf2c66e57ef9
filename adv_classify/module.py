"""The LightningModule: a timm network, trained by a method of the core."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.functional.classification import multiclass_average_precision

from adv_classify.network import Network, make_network
from adv_classify.objective import ClassificationObjective
from advmed.files import replacing
from advmed.integrations.lightning import MethodOptions, RobustModule, plain
from advmed.integrations.lightning.calibration import Judgement
from advmed.methods import AttackSettings
from advmed.training.settings import TrainingSettings

PREDICTIONS = "predictions.csv"


@dataclass(frozen=True, kw_only=True)
class ClassifierAttack(AttackSettings):
    """The attack of the training, on images in [0, 1]; its fields are those of :class:`advmed.AttackSettings`.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from adv_classify import ClassifierAttack
        >>> attack = ClassifierAttack(steps=10, norm="inf")
        >>> attack.p, attack.bounds
        (inf, (0.0, 1.0))
    """

    bounds: tuple[float, float] | Literal["sample"] | None = (0.0, 1.0)


# Defaults, per value of an image: a noise that no eye sees. In L2 the norm grows with the square root of the number of
# values; 4/255 in every value is the level most work on Linf begins with, and 1/255 of it AMAT's step.
_EPS_PER_VALUE, _DELTA_PER_VALUE = 2 / 255, 0.5 / 255
_CAP_OF_EPS = 2.0
"""Of AMAT's margins: of an image that noise has made another class of, cross-entropy says little about how much more it
bears, so that margins run to their cap wherever it is (docs/results/fronts.md)."""
_LINF_EPS, _LINF_DELTA = 4 / 255, 1 / 255
_UNTRAINED, _MEDIOCRE = 0.1, 0.5
"""Of the way from chance to all classes right: with less, a network counts as untrained, or as mediocre."""


class RobustClassifier(RobustModule):
    """A timm network that is trained by a method, on images in [0, 1].

    Args:
        network: the network.
        method: the training method. ``eps`` None: 2/255 of every value (4/255 in Linf); ``delta`` None: 0.5/255
            (1/255 in Linf).
        attack: its attack.
        class_weights: "balanced" weighs the training loss of every class by its inverse frequency.
        label_smoothing: of the training loss.
        lr: learning rate of the default optimizer, AdamW with a cosine schedule over all epochs.
        weight_decay: of the default optimizer.
        validation_steps: steps of the PGD attack that validation images are attacked with at ``eps`` of the method; 0:
            none; None: 5 for adversarial methods, by whose robust metrics the best epoch is chosen.
        num_classes: from the data.
        channels: from the data.
        class_counts: from the data.
        class_names: from the data.
        image_size: from the data.
        image_bits: from the data.

    Raises:
        ValueError: for an argument out of its range, or a network or a method that cannot be made of its settings.
        FileNotFoundError: for weights that are not there.

    Example:
        ``lightning.Trainer(max_epochs=20).fit(model, data)`` trains it, with data such as a :class:`MedMNIST`:

        >>> import torch
        >>> from adv_classify import MethodOptions, Network, RobustClassifier
        >>> model = RobustClassifier(Network(name="resnet10t"), MethodOptions(name="SAT", eps=1.5), num_classes=2)
        >>> model(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 2])
    """

    command = "adv-classify"
    packages = ("lightning", "timm")
    objective_class = ClassificationObjective
    sections: ClassVar = {"network": Network, "method": MethodOptions, "attack": ClassifierAttack}
    better: ClassVar = {"accuracy": "max", "balanced_accuracy": "max", "mAP": "max"}

    class_weight: Tensor | None

    def __init__(
        self,
        network: Network = Network(),  # noqa: B008 - frozen, as the next two
        method: MethodOptions = MethodOptions(),  # noqa: B008 - frozen
        attack: ClassifierAttack = ClassifierAttack(),
        *,
        class_weights: Literal["none", "balanced"] = "none",
        label_smoothing: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        validation_steps: int | None = None,
        num_classes: int,
        channels: int = 3,
        class_counts: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        image_size: tuple[int, int] | None = None,
        image_bits: int | None = None,
    ) -> None:
        super().__init__(
            method,
            attack,
            ClassificationObjective.names,
            lr=lr,
            weight_decay=weight_decay,
            validation_steps=validation_steps,
            begins_with=network.weights,
        )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if class_weights == "balanced" and class_counts is None:
            raise ValueError("class_weights 'balanced' needs class_counts, the number of training images of each class")
        begun = replace(network, weights=None)  # what a checkpoint of ours needs no more
        given = {"network": begun, "method": method, "attack": attack, "class_weights": class_weights}
        given |= {"label_smoothing": label_smoothing, "lr": lr, "weight_decay": weight_decay}
        given |= {"validation_steps": validation_steps, "num_classes": num_classes, "channels": channels}
        given |= {"class_counts": class_counts and [*class_counts], "class_names": class_names and [*class_names]}
        given |= {"image_size": image_size, "image_bits": image_bits}
        self.save_hyperparameters(plain(given))
        self.network = make_network(network, num_classes, channels)
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        weight = None
        if class_weights == "balanced":
            assert class_counts is not None
            weight = sum(class_counts) / (num_classes * torch.tensor([float(count) for count in class_counts]))
        self.register_buffer("class_weight", weight, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, classes), of images (B, C, H, W) in [0, 1]."""
        return self.network(images)

    # Training

    def setup(self, stage: str) -> None:
        """See :meth:`RobustModule.setup`.

        Raises:
            ValueError: also where rare classes would be weighed twice.
        """
        super().setup(stage)
        if stage != "fit" or self.class_weight is None:
            return
        if getattr(getattr(self.trainer, "datamodule", None), "sampler", None) == "balanced":
            raise ValueError(
                "sampler: balanced of the data and class_weights: balanced of the model both make up for rare classes, "
                "which would be weighed twice: leave one of them out"
            )

    def objective(self, batch: dict[str, Any]) -> tuple[ClassificationObjective, Tensor, Sequence[str]]:
        """See :meth:`RobustModule.objective`."""
        objective = ClassificationObjective(
            self.network, batch["label"], weight=self.class_weight, label_smoothing=self.label_smoothing
        )
        return objective, batch["image"], batch["id"]

    @classmethod
    def standard(cls, path: str | Path, data: Any, like: RobustClassifier | None = None) -> RobustClassifier:
        """See :meth:`RobustModule.standard`; the classes must be those of the data.

        Raises:
            ValueError: if they are not.
        """
        model = cls.from_checkpoint(path)
        if model.num_classes != data.num_classes:
            raise ValueError(
                f"{path} predicts {model.num_classes} classes, the data has {data.num_classes} ({data.class_names})"
            )
        check_classes(model.hparams["class_names"], data.class_names, path)
        check_images(model.hparams, data.image_size, data.image_bits, path)
        if like is not None and like.class_weight is not None:
            model.class_weight = like.class_weight
        return model

    def evidence(
        self, objective: ClassificationObjective, predictions: Tensor, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Which labels are predicted."""
        return {"label": batch["label"], "right": (predictions.argmax(1) == batch["label"]).float()}

    def judge(self, evidence: Mapping[str, Tensor]) -> Judgement:
        """By balanced accuracy, of which a network that does not look at the image has 1 / classes."""
        label, right = evidence["label"], evidence["right"]
        value = float(balanced(right, label))
        chance = 1 / self.num_classes
        least, good = (chance + share * (1 - chance) for share in (_UNTRAINED, _MEDIOCRE))
        return Judgement("balanced accuracy", value, f"by chance {chance:.3g}", value < least, value < good)

    @staticmethod
    def resolved(settings: TrainingSettings, values: int) -> TrainingSettings:
        """See :meth:`RobustModule.resolved`."""
        size = 1.0 if settings.norm == math.inf else math.sqrt(values)
        eps, delta = (_LINF_EPS, _LINF_DELTA) if settings.norm == math.inf else (_EPS_PER_VALUE, _DELTA_PER_VALUE)
        settings = replace(
            settings,
            eps=round(eps * size, 4) if settings.eps is None else settings.eps,
            delta=round(delta * size, 5) if settings.delta is None else settings.delta,
        )
        return replace(settings, margin_max=settings.for_method("AMAT").cap(settings.eps, _CAP_OF_EPS))

    @staticmethod
    def made_of(values: Mapping[str, Any]) -> str | None:
        """See :meth:`RobustModule.made_of`."""
        if not {"network", "num_classes", "channels"} <= values.keys():
            return None
        name = values["network"]["name"]
        return f"{name} for {values['num_classes']} classes and {values['channels']} channel(s)"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`RobustModule.on_load_checkpoint`; classes, their order and sizes must be those of the data."""
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get("hyper_parameters", {})
        check_classes(found.get("class_names"), self.hparams["class_names"], "the checkpoint")
        check_images(found, self.hparams["image_size"], self.hparams["image_bits"], "the checkpoint")

    # Validation, test, prediction

    def scores(self, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """Probabilities, (B, classes)."""
        return self(images).float().softmax(1)

    def truth(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The labels."""
        return {"label": batch["label"]}

    def metrics(self, scores: Tensor, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Accuracy, plain and balanced, and mAP."""
        label = truth["label"]
        right = (scores.argmax(1) == label).float()
        return {
            "accuracy": right.mean(),
            "balanced_accuracy": balanced(right, label),
            "mAP": mean_average_precision(scores, label),
        }

    def evidence_of(self, scores: Tensor, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Accuracy hides a network that answers with the most frequent class."""
        label = truth["label"]
        return {"label": label, "right": (scores.argmax(1) == label).float()}

    def attacked_objective(self, batch: dict[str, Any]) -> ClassificationObjective:
        """The cross-entropy alone, without what the training loss weighs and smooths."""
        return ClassificationObjective(self.network, batch["label"])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Probabilities and ids."""
        return {"id": batch["id"], "probability": self(batch["image"]).float().softmax(1)}


def check_classes(found: Sequence[str] | None, wanted: Sequence[str] | None, path: str | Path) -> None:
    """Compares the classes of a checkpoint with those of the data; names that are mere numbers name nothing.

    Raises:
        ValueError: if they are others, or in another order.
    """
    named = [list(names) for names in (found, wanted) if names and list(names) != [str(k) for k in range(len(names))]]
    if len(named) == 2 and named[0] != named[1]:
        ours, theirs = (", ".join(names[:20]) for names in named)
        raise ValueError(
            f"{path} knows the classes {ours}, in this order, and the data has {theirs}: set the data's classes to the "
            f"checkpoint's"
        )


def check_images(found: Mapping[str, Any], size: Sequence[int] | None, bits: int | None, path: str | Path) -> None:
    """Compares the images that a checkpoint was trained on with those of the data; a warning where that is not known.

    Args:
        found: the checkpoint's hyperparameters.
        size: (height, width) of the data's images; None: not known, and nothing is compared.
        bits: that those of more than 8 bits use; None: there are none.
        path: the checkpoint.

    Raises:
        ValueError: if they are of another size.
    """
    if size is None:
        return
    own = found.get("image_size")
    if own is None:
        rank_zero_warn(
            f"{path} does not say the size of the images that it was trained on: see yourself that it was "
            f"{size[0]} x {size[1]}, as the data's"
        )
    elif tuple(own) != tuple(size):
        raise ValueError(
            f"{path} was trained on images of {own[0]} x {own[1]}, the data's are {size[0]} x {size[1]}: set size of "
            f"the data to [{own[0]}, {own[1]}]"
        )
    depth = found.get("image_bits")
    if None not in (depth, bits) and depth != bits:
        rank_zero_warn(
            f"{path} was trained on images of {depth} bits, and those of the data are read as of {bits}: if they are "
            f"the same images, set bits of the data to {depth}"
        )


def balanced(right: Tensor, label: Tensor) -> Tensor:
    """The mean over the classes that occur of the share of their images that are right, (N,) and (N,)."""
    return torch.stack([right[label == k].mean() for k in label.unique()]).mean()


def mean_average_precision(probabilities: Tensor, labels: Tensor) -> Tensor:
    """mAP: the mean over the classes that occur of the average precision of one class against the others."""
    classes = probabilities.shape[1]
    present = torch.bincount(labels, minlength=classes) > 0
    precision = multiclass_average_precision(probabilities, labels, classes, average=None, validate_args=False)
    return precision[present].mean()


def write_predictions(path: Path, batches: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Writes the columns id, prediction and one probability for each class."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "prediction", *names))
        for batch in batches:
            for sample, row in zip(batch["id"], batch["probability"].tolist(), strict=True):
                writer.writerow((sample, names[row.index(max(row))], *(f"{value:.6f}" for value in row)))


__all__ = ["ClassifierAttack", "MethodOptions", "Network", "RobustClassifier"]
