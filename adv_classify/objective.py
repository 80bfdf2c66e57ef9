"""The objective of a classifier: cross-entropy per image, and its logits. Needs PyTorch only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.distances import at_least_float32, softmax_divergence


class ClassificationObjective:
    """The objective of one batch: ``images (B, C, H, W) -> terms (B, 1)``; also gives predictions, the logits.

    Args:
        model: images in the attack's units (here [0, 1]) to logits, (B, classes). Normalisation belongs inside.
        labels: class numbers, (B,), int64.
        weight: of the classes, (classes,), or None. The loss is the mean over the batch of weighted cross-entropies, so
            that weights whose mean over the data is 1 leave its scale as it is.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`; for the training loss, not for the attack.
    """

    names = ("ce",)

    def __init__(
        self, model: nn.Module, labels: Tensor, *, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> None:
        self.model, self.labels, self.weight, self.label_smoothing = model, labels, weight, label_smoothing

    def __call__(self, images: Tensor) -> Tensor:
        """The terms, for an attack."""
        return self._terms(self.model(images))

    def predictions(self, images: Tensor) -> Tensor:
        """The logits, (B, classes)."""
        return self.model(images)

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The training loss, and the terms of the same pass (without label smoothing)."""
        return self.loss_and_predictions(images)[:2]

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The training loss, the terms and the logits of one pass."""
        logits = self.model(images)
        terms = self._terms(logits)
        if not self.label_smoothing:
            return terms.mean(), terms, logits
        return self._terms(logits, self.label_smoothing).mean(), terms.detach(), logits

    def distance(self, clean: Tensor, other: Tensor) -> Tensor:
        """KL divergence of the softmax outputs, (B,)."""
        return softmax_divergence(clean, other)

    def _terms(self, logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
        logits = at_least_float32(logits)
        loss = functional.cross_entropy(logits, self.labels, reduction="none", label_smoothing=label_smoothing)
        if self.weight is not None:
            loss = loss * self.weight[self.labels]
        return loss[:, None]


class MarginObjective:
    """How far the best wrong class is above the true one: ``images (B, C, H, W) -> (B, 1)``.

    max_{j != y} z_j - z_y of the logits z, above 0 where the image is misclassified, and nowhere else (Carlini and
    Wagner 2017, the function inside f_6). Cross-entropy rises for other reasons, too, where there are many classes.

    Args:
        model: images to logits, (B, classes).
        labels: class numbers, (B,), int64.
        targets: wrong classes, (B,), int64: z_j - z_y of these alone; None for the best of all.
    """

    names = ("margin",)

    def __init__(self, model: nn.Module, labels: Tensor, targets: Tensor | None = None) -> None:
        self.model, self.labels, self.targets = model, labels, targets

    def __call__(self, images: Tensor) -> Tensor:
        """The margin."""
        logits = at_least_float32(self.model(images))
        true = self.labels[:, None]
        if self.targets is not None:
            return logits.gather(1, self.targets[:, None]) - logits.gather(1, true)
        return logits.scatter(1, true, -torch.inf).amax(1, keepdim=True) - logits.gather(1, true)
