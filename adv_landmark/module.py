"""The LightningModule: the multi-task U-Net, trained by a method of the core."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional

from adv_landmark.data import BOUNDS, scale_points
from adv_landmark.maps import decode
from adv_landmark.network import Network, make_network
from adv_landmark.objective import Heatmap, LandmarkObjective
from advmed.files import replacing
from advmed.integrations.lightning import MethodOptions, RobustModule, plain
from advmed.integrations.lightning.calibration import Judgement
from advmed.integrations.lightning.images import read_image
from advmed.methods import AttackSettings
from advmed.training.settings import TrainingSettings

PREDICTIONS, OVERLAYS = "predictions.csv", "overlays"
RULE = "mean+2std"
"""Rule of the thresholds (AMAT paper, section 3.6)."""
RADIUS = 0.05
"""Of the heatmap's disk, in the longer side of the image (Yao et al. 2020)."""
HEATMAP_WEIGHT = {"bce": 2.0, "dice": 0.5}
"""Of the heatmap term: with BCE as Yao et al. released it, with Dice as the AMAT authors did."""
SDR = (2.0, 2.5, 3.0, 4.0)
"""Radii of the successful detection rate, in mm (ISBI 2015)."""

# The AMAT paper's delta and smallest SAT level are 1 for 3 x 200 x 160 values in [-1, 1]; in L2 the norm grows with the
# square root of the number of values.
_L2_PER_VALUE = 1 / math.sqrt(3 * 200 * 160)
_LINF_EPS, _LINF_DELTA = 2 / 255, 0.5 / 255
_UNTRAINED, _MEDIOCRE = 0.75, 0.5
"""Of the error of a network that does not look at the image: with more, a network counts as untrained, or mediocre."""


@dataclass(frozen=True, kw_only=True)
class LandmarkAttack(AttackSettings):
    """The attack of the training, on images in [-1, 1]; its fields are those of :class:`advmed.AttackSettings`.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from adv_landmark import LandmarkAttack
        >>> attack = LandmarkAttack(steps=10)
        >>> attack.p, attack.bounds
        (2.0, (-1.0, 1.0))
    """

    bounds: tuple[float, float] | Literal["sample"] | None = BOUNDS


class RobustLandmarks(RobustModule):
    """The multi-task U-Net (Yao et al. 2020) that is trained by a method, on images in [-1, 1].

    (Q. Yao et al. 2020, "Miss the point: targeted adversarial attack on multiple landmark detection"; AMAT paper, arXiv
    2206.01736, section 3.6.)

    Args:
        network: the network.
        method: the training method. ``eps`` and ``delta`` None: 1 in L2 for an image of 3 x 200 x 160 values, and so
            much for every value of others (2/255 and 0.5/255 in Linf).
        attack: its attack.
        heatmap: the loss of the heatmaps, "dice" or "bce".
        heatmap_weight: of that loss beside those of the offsets; None: 0.5 with dice, 2 with bce.
        radius: within which a pixel speaks for a landmark, in pixels of the network's input; None: a twentieth of the
            longer side.
        lr: learning rate of the default optimizer, AdamW with a cosine schedule over all epochs.
        weight_decay: of the default optimizer.
        validation_steps: steps of the PGD attack that validation images are attacked with at ``eps`` of the method; 0:
            none; None: 5 for adversarial methods, by whose robust metrics the best epoch is chosen.
        landmark_names: from the data.
        channels: from the data.
        size: from the data.
        unit: from the data.

    Raises:
        ValueError: for an argument out of its range, or a network or a method that cannot be made of its settings.
        FileNotFoundError: for weights that are not there.

    Example:
        ``lightning.Trainer(max_epochs=20).fit(model, data)`` trains it, with data such as a :class:`LandmarkTable`:

        >>> import torch
        >>> from adv_landmark import MethodOptions, Network, RobustLandmarks
        >>> method = MethodOptions(name="SAT", eps=1.0)
        >>> model = RobustLandmarks(Network(encoder="resnet18"), method, landmark_names=["tip", "end"], size=(64, 64))
        >>> model.eval()(torch.zeros(1, 3, 64, 64)).shape  # heatmap, y and x offsets of two landmarks
        torch.Size([1, 6, 64, 64])
    """

    command = "adv-landmark"
    packages = ("lightning", "segmentation-models-pytorch", "timm")
    objective_class = LandmarkObjective
    sections: ClassVar = {"network": Network, "method": MethodOptions, "attack": LandmarkAttack}
    better: ClassVar = {"MRE": "min", "SDR": "max"}

    def __init__(
        self,
        network: Network = Network(),  # noqa: B008 - frozen, as the next two
        method: MethodOptions = MethodOptions(),  # noqa: B008 - frozen
        attack: LandmarkAttack = LandmarkAttack(),
        *,
        heatmap: Heatmap = "dice",
        heatmap_weight: float | None = None,
        radius: float | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        validation_steps: int | None = None,
        landmark_names: Sequence[str],
        channels: int = 3,
        size: tuple[int, int],
        unit: Literal["mm", "px"] = "px",
    ) -> None:
        super().__init__(
            method,
            attack,
            LandmarkObjective.names,
            RULE,
            lr=lr,
            weight_decay=weight_decay,
            validation_steps=validation_steps,
            begins_with=network.weights,
        )
        if heatmap_weight is not None and not (math.isfinite(heatmap_weight) and heatmap_weight > 0):
            raise ValueError(f"heatmap_weight must be > 0, got {heatmap_weight}")
        self.radius = round(RADIUS * max(size), 6) if radius is None else float(radius)
        if not 1 <= self.radius < min(size) / 2:
            raise ValueError(
                f"the radius of a landmark, {self.radius:g} pixels, must be at least 1 and fit into the images, which "
                f"are resized to {size[0]} x {size[1]}: choose another size or radius"
            )
        begun = replace(network, weights=None)  # what a checkpoint of ours needs no more
        given = {"network": begun, "method": method, "attack": attack, "heatmap": heatmap, "radius": self.radius}
        given |= {"heatmap_weight": heatmap_weight, "lr": lr, "weight_decay": weight_decay}
        given |= {"validation_steps": validation_steps, "landmark_names": list(landmark_names)}
        self.save_hyperparameters(plain({**given, "channels": channels, "size": list(size), "unit": unit}))
        self.network = make_network(network, len(landmark_names), channels)
        self.heatmap, self.unit, self.size = heatmap, unit, tuple(size)
        self.heatmap_weight = HEATMAP_WEIGHT[heatmap] if heatmap_weight is None else heatmap_weight
        self.landmark_names = list(landmark_names)

    @staticmethod
    def resolved(settings: TrainingSettings, values: int) -> TrainingSettings:
        """See :meth:`RobustModule.resolved`."""
        level = _L2_PER_VALUE * math.sqrt(values)
        eps, delta = (_LINF_EPS, _LINF_DELTA) if settings.norm == math.inf else (level, level)
        return replace(
            settings,
            eps=round(eps, 5) if settings.eps is None else settings.eps,
            delta=round(delta, 5) if settings.delta is None else settings.delta,
        )

    @staticmethod
    def made_of(values: Mapping[str, Any]) -> str | None:
        """See :meth:`RobustModule.made_of`."""
        if not {"network", "landmark_names", "channels", "radius"} <= values.keys():
            return None
        names, encoder = values["landmark_names"], values["network"]["encoder"]
        shown = ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])}, ..."
        return (
            f"a U-Net on {encoder} for {len(names)} landmarks ({shown}), {values['channels']} channel(s), radius "
            f"{values['radius']:g}"
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`RobustModule.on_load_checkpoint`; images must be as large as those of the training.

        Raises:
            ValueError: also for others.
        """
        super().on_load_checkpoint(checkpoint)
        size = tuple(checkpoint.get("hyper_parameters", {}).get("size", self.size))
        if size != self.size:
            raise ValueError(f"the checkpoint was trained on images of {size}, the data's are resized to {self.size}")

    def forward(self, images: Tensor) -> Tensor:
        """Maps, (B, 3L, H, W), of images (B, C, H, W) in [-1, 1]."""
        maps: Tensor = self.network(images)
        return maps

    # Training

    def objective(self, batch: dict[str, Any]) -> tuple[LandmarkObjective, Tensor, Sequence[str]]:
        """See :meth:`RobustModule.objective`."""
        return self.objective_of(batch["image"], batch["points"]), batch["image"], batch["id"]

    def objective_of(self, images: Tensor, points: Tensor) -> LandmarkObjective:
        """The objective of images and their points."""
        size = (images.shape[-2], images.shape[-1])
        return LandmarkObjective(
            self.network,
            points,
            size,
            radius=self.radius,
            heatmap=self.heatmap,
            heatmap_weight=self.heatmap_weight,
        )

    @classmethod
    def standard(cls, path: str | Path, data: Any, like: RobustLandmarks | None = None) -> RobustLandmarks:
        """See :meth:`RobustModule.standard`; the landmarks and channels must be those of the data.

        Raises:
            ValueError: if they are not, or the loss is another one.
        """
        model = cls.from_checkpoint(path)
        check_model(model, path, data)
        if like is not None:
            for name in ("heatmap", "heatmap_weight", "radius"):
                if getattr(model, name) != getattr(like, name):
                    raise ValueError(
                        f"{path} was trained with {name} {getattr(model, name)}, this training has "
                        f"{getattr(like, name)}: their losses cannot be compared"
                    )
        return model

    def evidence(self, objective: LandmarkObjective, predictions: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Errors and true places of the landmarks that are in their images, in the data's unit; NaN for others."""
        present = objective.targets.present
        place = batch["points"] * self._step(predictions, batch)[:, None]
        return {
            "error": self.errors(predictions, batch).where(present, math.nan),
            "place": place.where(present[..., None], math.nan),
        }

    def judge(self, evidence: Mapping[str, Tensor]) -> Judgement:
        """By the mean radial error, beside that of finding every landmark at its mean place."""
        away = (evidence["place"] - evidence["place"].nanmean(0)).norm(dim=2)
        value, blind = float(evidence["error"].nanmean()), float(away.nanmean())
        beside = f"{self.unit}; {blind:.3g} for every landmark at its mean place"
        return Judgement("MRE", value, beside, value > _UNTRAINED * blind, value > _MEDIOCRE * blind)

    # Validation, test, prediction

    def scores(self, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """See :meth:`errors`."""
        return self.errors(self(images), batch)

    def truth(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The places of the landmarks, in the data's unit."""
        size = batch["image"].shape[:1:-1]
        return {"place": batch["points"] * self._step_of(size, batch)[:, None]}

    def evidence_of(self, scores: Tensor, truth: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """An error says little by itself; of one image there is no mean place to compare it with."""
        if len(scores) < 2:
            return None
        return {"error": scores, "place": truth["place"].where(~scores.isnan()[..., None], math.nan)}

    def metrics(self, scores: Tensor, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """MRE and, in mm, SDR."""
        found = scores[~scores.isnan()]
        values = {"MRE": found.mean()}
        if self.unit == "mm":
            values |= {f"SDR_{r:g}mm": (found <= r).float().mean() for r in SDR}
        return values

    def errors(self, maps: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Distance of every found landmark from the true one, in the data's unit, (B, L); NaN where none is known."""
        found, _ = decode(maps, self.radius)
        return ((found - batch["points"]) * self._step(maps, batch)[:, None]).norm(dim=2)

    def _step(self, maps: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """A pixel's width and height in the data's unit, (B, 2)."""
        return self._step_of(maps.shape[:1:-1], batch)

    def _step_of(self, size: Sequence[int], batch: Mapping[str, Any]) -> Tensor:
        """The same of images of this width and height."""
        of_file: Tensor = batch["file_size"]
        step: Tensor = of_file / torch.tensor(size, device=of_file.device)
        return step * (batch["spacing"] if self.unit == "mm" else 1)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Ids, points in pixels of the files (B, L, 2), and confidences (B, L)."""
        maps = self(batch["image"])
        found, confidence = decode(maps, self.radius)
        size = torch.tensor((maps.shape[-1], maps.shape[-2]), device=maps.device)
        points = scale_points(found, size, batch["file_size"][:, None])
        return {"id": batch["id"], "points": points.cpu(), "confidence": confidence.cpu()}


def check_model(model: RobustLandmarks, path: str | Path, data: Any) -> None:
    """Raises ValueError if a trained model's landmarks or channels are not those of the data."""
    own, channels = model.landmark_names, model.hparams["channels"]
    if own != data.landmark_names:
        raise ValueError(
            f"{path} finds {len(own)} landmarks ({', '.join(own[:20])}), the data has {len(data.landmark_names)} "
            f"({', '.join(data.landmark_names[:20])})"
        )
    if channels != data.channels:
        raise ValueError(f"{path} takes images of {channels} channel(s), the data has {data.channels}")
    if model.size != tuple(data.size):
        raise ValueError(f"{path} was trained on images of {model.size}, the data's are resized to {tuple(data.size)}")


def write_predictions(folder: Path, batches: Sequence[dict[str, Any]], data: Any) -> Path:
    """Writes ``predictions.csv`` (image, landmark, x, y, confidence; in the data's pixels) and the overlays.

    Returns:
        The path of the table.
    """
    names, origin = data.landmark_names, getattr(data, "origin", 0.0)
    split = "test" if "test" in data.splits else "val"
    files = dict(zip(data.splits[split].ids, data.splits[split].images, strict=True))
    path = folder / PREDICTIONS
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "landmark_index", "x", "y", "confidence"))
        for batch in batches:
            for sample, points, confidence in zip(batch["id"], batch["points"], batch["confidence"], strict=True):
                for name, (x, y), sure in zip(names, points.tolist(), confidence.tolist(), strict=True):
                    writer.writerow((sample, name, f"{x + origin:.2f}", f"{y + origin:.2f}", f"{sure:.4f}"))
                picture = folder / OVERLAYS / f"{sample}.png"  # an id may hold folders
                picture.parent.mkdir(parents=True, exist_ok=True)
                overlay(files[sample], points.tolist(), names).save(picture)
    return path


def overlay(path: Path, points: Sequence[Sequence[float]], names: Sequence[str]) -> Image.Image:
    """The image with its points and their names."""
    pixels = functional.to_dtype(read_image(path, 3), torch.uint8, scale=True)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    draw, radius = ImageDraw.Draw(image), max(1.0, max(image.size) / 200)
    for (x, y), name in zip(points, names, strict=True):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(230, 60, 30))
        draw.text((x + 1.5 * radius, y - 1.5 * radius), name, fill=(255, 210, 0))
    return image


__all__ = ["LandmarkAttack", "MethodOptions", "Network", "RobustLandmarks"]
