"""Thresholds for AMAT from a trained standard model: its loss terms over training samples, as a training meets them.

The training compares thresholds with losses of augmented images, by a network in training mode, so that is where they
are measured: the training samples with their augmentation, BatchNorm with the statistics of the batch, dropout at work.
On plain images in evaluation mode losses are lower, and every sample would begin above its threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from advmed.distributed import place
from advmed.files import sha256
from advmed.guard import preserved
from advmed.integrations.lightning.data import SampleData
from advmed.progress import watched
from advmed.thresholds import TermStatistics, Thresholds
from advmed.training.run import fingerprint

FILE = "thresholds.json"
"""Name of the file beside the checkpoint that was measured."""
LEAST, MOST = 500, 10_000
"""Samples that are drawn: whole epochs until there are as many, and never more."""
HOW = "images as the training draws them, augmented, in training mode"
"""In the notes of thresholds of the training samples."""
IMAGES = "images"
"""The note that tells the images from others, by their names."""
_PLAIN = "images without augmentation, in training mode"


@dataclass(frozen=True)
class Judgement:
    """How good a network is by its own metric: thresholds of a poor one are of no use.

    Attributes:
        metric: the name of the number.
        value: the number.
        beside: what it is to be compared with, in words.
        untrained: whether the network is hardly better than one that does not look at the image.
        mediocre: whether it is far from a well-trained one.
    """

    metric: str
    value: float
    beside: str
    untrained: bool
    mediocre: bool

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.3g} ({self.beside})"


def measure(
    model: Any,
    path: str | Path,
    data: SampleData,
    *,
    rule: str,
    device: torch.device,
    split: str = "train",
    seed: int = 0,
) -> Thresholds:
    """Measures a trained model on a split as the training would meet it, and applies the rule.

    The same seed gives the same numbers, whatever the number of workers. The random state of the process is afterwards
    what it was.

    Args:
        model: a :class:`advmed.integrations.lightning.module.RobustModule`.
        path: the checkpoint that it is from.
        data: the data.
        rule: such as ``mean``, ``mean+2std``, ``median+2spread``.
        device: where to measure.
        split: of the data; that of the training is augmented.
        seed: of the order, the augmentation and the dropout.

    Returns:
        The thresholds. Their ``notes`` say how they were measured, and how good the network is by its own metric on
        the same images.

    Raises:
        ValueError: for a network that is clearly untrained by that metric.
    """
    statistics, judged = look(model.to(device).train(), data, split, seed, device=device)
    if judged.untrained:
        raise ValueError(
            f"{path} is no trained network: on images of the split {split} it reaches {judged}. Thresholds of it "
            f"mean nothing: finish its standard training, or name the checkpoint of another one"
        )
    if judged.mediocre:
        rank_zero_warn(
            f"{path} is a mediocre network: on images of the split {split} it reaches {judged}. Its losses are high, "
            f"and so are thresholds made of them: margins will come out larger than those of a well-trained network"
        )
    notes: dict[str, Any] = {"split": split, "measured": HOW if split == "train" else _PLAIN, "seed": seed}
    notes[IMAGES] = fingerprint(data.splits[split].ids)
    notes |= {"metric": judged.metric, "value": round(judged.value, 4), "beside": judged.beside}
    return statistics.thresholds(rule, source=str(path), source_sha256=sha256(Path(path)), notes=notes)


def look(
    model: Any,
    data: SampleData,
    split: str,
    seed: int,
    *,
    device: torch.device,
    most: int = MOST,
    convert: Callable[[Any], Any] = lambda batch: batch,
) -> tuple[TermStatistics, Judgement]:
    """The losses of images as :func:`measure` meets them, and how good the network is on them.

    Args:
        model: in training mode, on the device.
        data: the data.
        split: of the data.
        seed: of the order, the augmentation and the dropout.
        device: where to measure.
        most: images at most.
        convert: what is made of a batch on the device, such as another precision.
    """
    statistics = TermStatistics(model.terms, keep=True)
    found: list[dict[str, torch.Tensor]] = []
    with preserved(model), torch.no_grad():
        torch.manual_seed(seed)  # of dropout
        for batch in watched(data.draws(split, LEAST, most, seed), "thresholds", "batches", shown=place()[0] == 0):
            batch = convert(model.transfer_batch_to_device(batch, device, 0))
            objective, images, _ = model.objective(batch)
            _, terms, predictions = objective.loss_and_predictions(images)
            statistics.update(terms)
            found.append({k: v.cpu() for k, v in model.evidence(objective, predictions, batch).items()})
    return statistics, model.judge({name: torch.cat([part[name] for part in found]) for name in found[0]})


def quality(measured: Thresholds) -> str:
    """How good the network is that thresholds of :func:`measure` were measured on, in words."""
    return "{metric} {value:.3g} ({beside})".format(**measured.notes)
