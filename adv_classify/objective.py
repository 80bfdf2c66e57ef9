"""The objective of a classifier: cross-entropy per image, and its logits. Needs PyTorch only."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from advmed.distances import at_least_float32, softmax_divergence
from advmed.objective import ClassScores


class ClassificationObjective:
    """The objective of one batch: ``images (B, C, H, W) -> terms (B, 1)``; also gives predictions, the logits.

    Args:
        model: images in the attack's units (here [0, 1]) to logits, (B, classes). Normalisation belongs inside.
        labels: class numbers, (B,), int64.
        weight: of the classes, (classes,), or None. The loss is the mean over the batch of weighted cross-entropies, so
            that weights whose mean over the data is 1 leave its scale as it is.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`; for the training loss, not for the attack.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import pgd
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
        >>> images, objective = torch.rand(4, 1, 8, 8), ClassificationObjective(model, torch.tensor([0, 1, 0, 1]))
        >>> found = pgd(objective, images, 0.5, steps=10, step_scale=4, bounds=(0.0, 1.0))
        >>> bool((found.terms > objective(images)).all())
        True
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
        logits = at_least_float32(logits)
        loss = functional.cross_entropy(logits, self.labels, reduction="none", label_smoothing=label_smoothing)
        if self.weight is not None:
            loss = loss * self.weight[self.labels]
        return loss[:, None]
