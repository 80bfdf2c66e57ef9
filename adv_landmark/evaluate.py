"""How well landmarks are found under attack: MRE and SDR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from adv_landmark.data import BOUNDS, LandmarkData, LandmarkDataset
from adv_landmark.maps import decode
from adv_landmark.module import RobustLandmarks, check_model
from advmed.attacks import Attack
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch, at_levels
from advmed.evaluation.metric import Metric, Scores
from advmed.integrations.lightning import MARGINS
from advmed.integrations.lightning.evaluation import LightningEvaluation, in_batches, picture
from advmed.margins import read_margins
from advmed.report import Example, View


@dataclass
class TrainedModel:
    """A trained U-Net, ready to be attacked."""

    name: str
    path: Path
    module: RobustLandmarks
    dataset: LandmarkDataset
    margins: np.ndarray | None
    batch_size: int

    def read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch on the device."""
        device = self.module.device
        batch = default_collate([self.dataset[i] for i in indices])
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def load_model(name: str, path: str | Path, data: LandmarkData, split: str, device: torch.device) -> TrainedModel:
    """A trained model and the images that it is evaluated on; BatchNorm in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is no checkpoint of ours, or of other landmarks, channels or sizes than the data.
    """
    path = Path(path)
    module = RobustLandmarks.from_checkpoint(path)
    check_model(module, path, data)
    module.unit = data.unit
    dataset = data.dataset(split)
    if dataset.samples.without_points() == len(dataset):
        raise ValueError(f"no image of the split {split} has a known landmark to compare with")
    return TrainedModel(
        name, path, module.to(device), dataset, read_margins(path.parent.parent / MARGINS), data.batch_size
    )


def make_batches(model: TrainedModel, *limits: int | None) -> list[EvaluationBatch]:
    """The images in batches, or some of them; see :func:`advmed.integrations.lightning.evaluation.in_batches`."""
    return in_batches(model.dataset.samples.ids, model.batch_size, partial(load, model), *limits)


def load(model: TrainedModel, indices: Sequence[int]) -> LoadedBatch:
    """Images of the data set as a batch ready to be attacked."""
    batch = model.read(indices)
    objective = model.module.objective_of(batch["image"], batch["points"])
    targets = [value for name, value in sorted(batch.items()) if name != "image" and isinstance(value, Tensor)]
    return LoadedBatch(batch["image"], objective, partial(score, model, batch), targets)


def score(model: TrainedModel, batch: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """``error``: the radial error of every landmark in the data's unit, (B, L); NaN where none is known."""
    return {"error": model.module.errors(model.module(images), batch)}


def metrics(unit: str, radii: Sequence[float]) -> list[Metric]:
    """MRE, the standard deviation of radial errors, and SDR at every radius.

    Args:
        unit: "mm" or "px".
        radii: of SDR, in that unit.

    Raises:
        ValueError: unless the radii are > 0 and increase.
    """
    if not all(r > 0 for r in radii) or list(radii) != sorted(set(radii)):
        raise ValueError(f"the radii of SDR must be > 0 and increase, got {list(radii)}")
    found = [
        Metric(
            "MRE",
            mean_radial_error,
            higher_is_better=False,
            unit=unit,
            description="Mean radial error: the mean distance of found and true landmarks; unknown ones are left out.",
            per_sample=mean_of_image,
            fails_at=max(radii, default=None),
        ),
        Metric(
            "radial error SD",
            deviation,
            higher_is_better=False,
            unit=unit,
            description="Standard deviation of the radial errors over all landmarks.",
            monotone=False,
        ),
    ]
    return found + [
        Metric(
            f"SDR {radius:g} {unit}",
            partial(detection_rate, radius=radius),
            description=f"Successful detection rate: the share of landmarks found within {radius:g} {unit}.",
        )
        for radius in radii
    ]


def known(scores: Scores) -> np.ndarray:
    """The errors of all known landmarks, (n,)."""
    error = scores["error"].astype(np.float64)
    return error[~np.isnan(error)]


def mean_radial_error(scores: Scores) -> float:
    """MRE (ISBI 2015)."""
    return float(known(scores).mean())


def deviation(scores: Scores) -> float:
    """Standard deviation of the radial errors, with n - 1; NaN for a single one."""
    error = known(scores)
    return float(error.std(ddof=1)) if len(error) > 1 else float("nan")


def detection_rate(scores: Scores, radius: float) -> float:
    """SDR (ISBI 2015): the share of landmarks whose error is not above the radius."""
    return float((known(scores) <= radius).mean())


def mean_of_image(scores: Scores) -> np.ndarray:
    """The mean radial error of each image, (N,); NaN for one without known landmarks."""
    error = scores["error"].astype(np.float64)
    count = (~np.isnan(error)).sum(1)
    return np.where(count > 0, np.nansum(error, 1) / np.maximum(count, 1), np.nan)


def make_examples(
    models: Sequence[TrainedModel],
    attack: tuple[str, Attack],
    levels: Sequence[float],
    ids: Sequence[str],
    *,
    seed: int = 0,
) -> list[Example]:
    """Images by their ids, clean and attacked, with true and found landmarks."""
    name, method = attack
    dataset = models[0].dataset
    examples = []
    for index in map(dataset.samples.ids.index, ids):
        views: list[View] = []
        for model in models:
            loaded, batch = load(model, [index]), model.read([index])
            for level, attacked in at_levels(loaded, method, levels, bounds=BOUNDS, seed=seed):
                with torch.no_grad():
                    maps = model.module(attacked)
                error = model.module.errors(maps, batch)
                note = f"MRE {float(error.nanmean()):.2f} {model.module.unit}"
                points = decode(maps, model.module.radius)[0][0].cpu().numpy()
                shown = name if level > 0 else ""
                views.append(View(model.name, shown, level, picture(attacked), note=note, points=points))
        item = dataset[index]
        truth = item["points"].numpy()
        examples.append(Example(item["id"], picture(item["image"][None]), None, views, points=truth))
    return examples


class LandmarkEvaluation(LightningEvaluation):
    """See :class:`LightningEvaluation`; the command's own option is ``radii``."""

    bounds = BOUNDS
    packages = ("segmentation-models-pytorch", "timm", "torchvision")
    task = "landmarks"
    data: LandmarkData

    def default_levels(self, norm: float) -> list[float]:
        """The paper's levels, 0, 0.5, 1 and 2 in L2 for 3 x 200 x 160 values, and as much for every value of others."""
        if norm == float("inf"):
            return [0, 1 / 255, 2 / 255, 4 / 255]
        scale = (self.data.channels * self.data.size[0] * self.data.size[1] / (3 * 200 * 160)) ** 0.5
        return [round(level * scale, 4) for level in (0, 0.5, 1, 2)]

    def load_model(self, name: str, path: Path) -> TrainedModel:
        """See :func:`load_model`."""
        return load_model(name, path, self.data, self.split, self.device)

    def batches(self, model: TrainedModel, *limits: int | None) -> list[EvaluationBatch]:
        """See :func:`make_batches`."""
        return make_batches(model, *limits)

    @property
    def metrics(self) -> list[Metric]:
        """See :func:`metrics`."""
        return metrics(self.data.unit, self.given.radii)

    def examples(
        self, attack: tuple[str, Attack], levels: Sequence[float], ids: Sequence[str], *, seed: int
    ) -> list[Example]:
        """See :func:`make_examples`."""
        return make_examples(self.models, attack, levels, ids, seed=seed)

    @property
    def measured_over(self) -> str:
        """See :attr:`EvaluationHost.measured_over`."""
        height, width = self.data.size
        return f"the image in [-1, 1] ({self.data.channels} x {height} x {width} values)"

    @property
    def own_settings(self) -> dict[str, Any]:
        """The landmarks."""
        names = self.data.landmark_names
        return {"landmarks": f"{len(names)}: {', '.join(names)}"}
