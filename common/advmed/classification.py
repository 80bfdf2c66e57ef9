"""The objective of a classifier: cross-entropy per image, and its logits. For loops of one's own, too."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from advmed.distances import at_least_float32, softmax_divergence
from advmed.objective import ClassScores, ordinary


class ClassificationObjective:
    """The objective of one batch: ``images (B, C, H, W) -> terms (B, 1)``; also gives predictions, the logits.

    Args:
        model: images in the attack's units (here [0, 1]) to logits, (B, classes). Normalisation belongs inside.
        labels: class numbers, (B,), integers.
        weight: of the classes, (classes,), or None. The training loss is the mean over the batch of weighted
            cross-entropies, so that weights whose mean over the data is 1 leave its scale as it is. The terms know no
            weights: how far the loss of an image may rise must not depend on how common its class is (AMAT).
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`; for the training loss, too.

    Raises:
        ValueError: for labels that are no class numbers; when it is called, for anything but two or more logits an
            image.

    Example:
        >>> import torch
        >>> from advmed import ClassificationObjective, pgd
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
        >>> images, objective = torch.rand(4, 1, 8, 8), ClassificationObjective(model, torch.tensor([0, 1, 0, 1]))
        >>> found = pgd(objective, images, 0.5, steps=10, step_scale=4, bounds=(0.0, 1.0))
        >>> bool((found.terms > objective(images)).all())
        True
    """

    names = ("ce",)
    boundary: ClassVar[tuple[float, ...]] = (math.log(2),)
    """The terms at which the right class is as probable as all others together."""

    def __init__(
        self, model: nn.Module, labels: Tensor, *, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> None:
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels must be class numbers, integers of shape (B,), got {labels.dtype} of shape "
                f"{tuple(labels.shape)}; of a one-hot row it is argmax(1)"
            )
        self.model, self.labels = model, ordinary(labels).long()
        self.weight, self.label_smoothing = weight, label_smoothing

    def __call__(self, images: Tensor) -> Tensor:
        """The terms, for an attack."""
        return self._terms(self.model(images))

    def predictions(self, images: Tensor) -> Tensor:
        """The logits, (B, classes)."""
        logits: Tensor = self.model(images)
        return logits

    def take(self, rows: Tensor) -> ClassificationObjective:
        """The objective of some images of the batch, by their numbers."""
        return ClassificationObjective(
            self.model, self.labels[rows], weight=self.weight, label_smoothing=self.label_smoothing
        )

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The training loss, and the terms of the same pass (without weights and label smoothing)."""
        return self.loss_and_predictions(images)[:2]

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The training loss, the terms and the logits of one pass."""
        logits = self.model(images)
        terms = self._terms(logits)
        if self.weight is None and not self.label_smoothing:
            return terms.mean(), terms, logits
        trained = self._terms(logits, self.label_smoothing)[:, 0]
        if self.weight is not None:
            trained = trained * self.weight[self.labels]
        return trained.mean(), terms.detach(), logits

    def terms_and_errors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The terms, and whether the class is wrong, of one pass."""
        logits = self.model(images)
        return self._terms(logits), logits.argmax(1) != self.labels

    def class_scores(self, predictions: Tensor) -> ClassScores:
        """The logits beside the true classes."""
        truth = functional.one_hot(self.labels, predictions.shape[1]).to(predictions.dtype)
        return ClassScores(predictions, truth, None, exclusive=True)

    def distance(self, clean: Tensor, other: Tensor) -> Tensor:
        """KL divergence of the softmax outputs, (B,)."""
        return softmax_divergence(clean, other)

    def _terms(self, logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
        if logits.ndim != 2 or logits.shape[1] < 2:
            # Of a single logit the softmax is 1 and the loss 0 whatever the image: robust, as it seems.
            raise ValueError(
                f"a classifier's output must be logits of two or more classes, (B, classes), got "
                f"{tuple(logits.shape)}; a network with one logit z has the two logits torch.cat([0 * z, z], 1)"
            )
        logits = at_least_float32(logits)
        return functional.cross_entropy(logits, self.labels, reduction="none", label_smoothing=label_smoothing)[:, None]
