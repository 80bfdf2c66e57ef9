"""The objective of the contracts: a tiny classifier that gives all that an attack or a method may ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmed.distances import softmax_divergence
from advmed.objective import ClassScores


class Classification:
    """Two terms of a classifier, a batch loss that is not the mean of their sums, predictions and classes.

    Args:
        model: images -> logits, (B, classes).
        labels: (B,), int64.
        named: whether the objective names its model, which is then held still under attack.

    Attributes:
        passes: what was asked for so far, in order: "terms", "predictions" or "training", and " without gradient"
            where none could be asked for.
        calls: how many passes that were.
    """

    names = ("ce", "sharp")

    def __init__(self, model: nn.Module, labels: Tensor, *, named: bool = True) -> None:
        self.labels, self.passes, self._network = labels, list[str](), model
        if named:
            self.model = model

    @property
    def calls(self) -> int:
        """Number of passes."""
        return len(self.passes)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights of the model, named or not."""
        return list(self._network.parameters())

    def _logits(self, kind: str, images: Tensor) -> Tensor:
        self.passes.append(kind if torch.is_grad_enabled() else f"{kind} without gradient")
        logits: Tensor = self._network(images)
        return logits

    def terms_of(self, logits: Tensor) -> Tensor:
        """Cross-entropy and mean square of logits, (B, 2)."""
        cross_entropy = functional.cross_entropy(logits, self.labels, reduction="none")
        return torch.stack((cross_entropy, logits.square().mean(1)), 1)

    def __call__(self, images: Tensor) -> Tensor:
        """The terms."""
        return self.terms_of(self._logits("terms", images))

    def terms_and_errors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The terms, and whether the class is wrong, (B,)."""
        logits = self._logits("terms", images)
        return self.terms_of(logits), logits.argmax(1) != self.labels

    def predictions(self, images: Tensor) -> Tensor:
        """The logits."""
        return self._logits("predictions", images)

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The length of all terms, the terms, and the logits."""
        logits = self._logits("training", images)
        terms = self.terms_of(logits)
        return terms.square().sum().sqrt(), terms, logits

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The length of all terms, and the terms."""
        return self.loss_and_predictions(images)[:2]

    def distance(self, clean: Tensor, other: Tensor) -> Tensor:
        """The divergence of softmax outputs, (B,)."""
        return softmax_divergence(clean, other)

    def class_scores(self, predictions: Tensor) -> ClassScores:
        """One class an image."""
        truth = functional.one_hot(self.labels, predictions.shape[1]).to(predictions.dtype)
        return ClassScores(predictions, truth, None, exclusive=True)


def network(
    channels: int = 3,
    classes: int = 4,
    *,
    dimensions: int = 2,
    normalise: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Sequential:
    """A network for images with so many spatial dimensions, 0 to 3; the same weights for the same seed."""
    kinds: dict[int, tuple[Any, Any, Any]] = {
        0: (_PointWise, nn.BatchNorm1d, nn.Identity),
        1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
        2: (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
        3: (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d),
    }
    convolution, normal, pool = kinds[dimensions]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            convolution(channels, 6, 3, padding=1),
            normal(6) if normalise else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(dropout) if dropout else nn.Identity(),
            convolution(6, 8, 3, stride=2),
            nn.Tanh(),
            pool(2),
            nn.Flatten(),
            nn.Linear(8 * 2**dimensions, classes),
        )


class _PointWise(nn.Linear):
    """What a convolution is where there is no space."""

    def __init__(self, channels: int, features: int, size: int, **_: int) -> None:
        super().__init__(channels, features)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers in [0, 1), the same for the same seed."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
