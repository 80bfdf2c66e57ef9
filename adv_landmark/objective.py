"""The objective of the multi-task U-Net: heatmap, y offset and x offset for each image. Needs PyTorch only."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from adv_landmark.maps import encode, split_maps
from advmed.distances import bernoulli_divergence
from advmed.objective import ordinary

Heatmap = Literal["dice", "bce"]


class LandmarkObjective:
    """The objective of one batch: ``images (B, C, H, W) -> terms (B, 3)``; also gives predictions, the maps.

    Heatmap: "bce" is the original loss (Yao et al. 2020), the cross-entropy with a Gaussian as wide as the radius,
    cut off at it, averaged over the pixels; "dice" is 1 - Dice with the disk of that radius, which the AMAT paper
    (arXiv 2206.01736, section 3.6) finds more robust. Offsets: the mean absolute error within the disk, in radii. Each
    term is a mean over the landmarks that are present; an image without any has the loss 0.

    Args:
        model: images to maps, (B, 3L, H, W): heatmap logits, then y offsets, then x offsets in radii.
        points: true landmarks, (B, L, 2), each (x, y) in pixels; NaN where one is not known.
        size: (H, W) of the images, in pixels.
        radius: within which a pixel speaks for a landmark, in pixels.
        heatmap: "dice" or "bce".
        heatmap_weight: of the heatmap term.

    Example:
        >>> import torch
        >>> from adv_landmark import LandmarkObjective
        >>> points = torch.tensor([[[3.0, 2.0]]])
        >>> objective = LandmarkObjective(torch.nn.Identity(), points, size=(8, 8), radius=2)  # images are maps
        >>> objective(torch.zeros(1, 3, 8, 8))  # smoothed: 1 - (2 * 6.5 + 1) / (32 + 13 + 1); 10 / 2 / 13
        tensor([[0.6957, 0.3846, 0.3846]])
    """

    names = ("heatmap", "offset_y", "offset_x")

    def __init__(
        self,
        model: nn.Module,
        points: Tensor,
        size: tuple[int, int],
        *,
        radius: float,
        heatmap: Heatmap = "dice",
        heatmap_weight: float = 1.0,
    ) -> None:
        self.model, self.heatmap, self.heatmap_weight = model, heatmap, heatmap_weight
        self.size, self.radius = size, radius
        with torch.inference_mode(False):  # what a backward pass meets later
            self.points = ordinary(points)
            self.targets = encode(self.points, size, radius)
            self._area = self.targets.disk.sum((2, 3))
            self._count = self.targets.present.sum(1).clamp_min(1)

    def __call__(self, images: Tensor) -> Tensor:
        """The terms, for an attack."""
        return self._terms(self.model(images))

    def of(self, points: Tensor) -> LandmarkObjective:
        """The same objective with other landmarks, (B, L, 2)."""
        return LandmarkObjective(
            self.model,
            points,
            self.size,
            radius=self.radius,
            heatmap=self.heatmap,
            heatmap_weight=self.heatmap_weight,
        )

    def take(self, rows: Tensor) -> LandmarkObjective:
        """The objective of some images of the batch, by their numbers."""
        return self.of(self.points[rows])

    def expected_error(self, images: Tensor) -> Tensor:
        """Where the network expects the landmarks, and how far that is from where they are, in radii, (B, 1).

        Each pixel votes for the place that its offsets point at, as when they are read, with the square of its heat,
        so that the few that will be read decide; the mean is over the votes, then over the landmarks that are known.
        """
        heat, offset_y, offset_x = split_maps(self.model(images))
        targets = self.targets
        weight = (2 * functional.logsigmoid(heat)).flatten(2).softmax(2)
        away = ((offset_y - targets.offset_y).square() + (offset_x - targets.offset_x).square() + 1e-12).sqrt()
        errors = (weight * away.flatten(2)).sum(2)
        return torch.where(targets.present, errors, 0.0).sum(1, keepdim=True) / self._count[:, None]

    def towards(self, images: Tensor) -> Elsewhere:
        """See :class:`Elsewhere`; the landmarks are put as far from where they are as the image lets them."""
        height, width = self.size
        limits = torch.tensor((width - 1.0, height - 1.0), dtype=self.points.dtype, device=self.points.device)
        return Elsewhere(self.of(torch.where(self.points < limits / 2, limits - 1, torch.ones_like(limits))))

    def predictions(self, images: Tensor) -> Tensor:
        """The maps, (B, 3L, H, W)."""
        return self.model(images)

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The training loss, the terms and the maps of one pass."""
        maps = self.model(images)
        terms = self._terms(maps)
        return terms.sum(1).mean(), terms, maps

    def distance(self, clean: Tensor, other: Tensor) -> Tensor:
        """How far other maps are from clean ones, (B,).

        The Bernoulli KL divergence of the heatmaps, summed over the pixels in units of the heat on the clean image,
        plus the mean absolute difference of the offsets where the clean heat is, each averaged over the landmarks.
        """
        heat, *offsets = split_maps(clean)
        other_heat, *other_offsets = split_maps(other)
        where = heat.sigmoid().detach()
        amount = where.sum((2, 3)).clamp_min(1)
        found = bernoulli_divergence(heat, other_heat).sum((2, 3)) / amount
        for one, two in zip(offsets, other_offsets, strict=True):
            found = found + ((one - two).abs() * where).sum((2, 3)) / amount
        return found.mean(1)

    def _terms(self, maps: Tensor) -> Tensor:
        return self.per_landmark(maps).sum(1) / self._count[:, None]

    def per_landmark(self, maps: Tensor) -> Tensor:
        """The three terms of each landmark, (B, L, 3), 0 for one that is not there."""
        heat, offset_y, offset_x = split_maps(maps)
        targets = self.targets
        if self.heatmap == "bce":
            found = functional.binary_cross_entropy_with_logits(heat, targets.gaussian, reduction="none").mean((2, 3))
        else:
            probability = heat.sigmoid()
            overlap = (probability * targets.disk).sum((2, 3))
            found = 1 - (2 * overlap + 1) / (probability.sum((2, 3)) + self._area + 1)
        area = self._area.clamp_min(1)
        errors_y = ((offset_y - targets.offset_y).abs() * targets.disk).sum((2, 3)) / area
        errors_x = ((offset_x - targets.offset_x).abs() * targets.disk).sum((2, 3)) / area
        terms = torch.stack([self.heatmap_weight * found, errors_y, errors_x], 2)  # (B, L, 3)
        return torch.where(targets.present[..., None], terms, 0.0)


class Elsewhere:
    """How near the maps are to those of landmarks elsewhere: the adaptive targeted attack of Yao et al. 2020.

    The loss of each landmark, with the other place as its target, is weighted by its share of the sum over the
    landmarks, as ATI-FGSM does: what has arrived already leaves the noise to those that have not.

    Args:
        objective: with the landmarks where they are to go.
    """

    names = ("loss",)

    def __init__(self, objective: LandmarkObjective) -> None:
        self.objective, self.model = objective, objective.model

    def __call__(self, images: Tensor) -> Tensor:
        """Minus the weighted loss, (B, 1)."""
        loss = self.objective.per_landmark(self.model(images)).sum(2)
        weight = loss.detach() / loss.detach().sum(1, keepdim=True).clamp_min(1e-12)
        return -(weight * loss).sum(1, keepdim=True)
