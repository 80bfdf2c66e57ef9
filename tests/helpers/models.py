"""Tiny models and objectives that the tests share."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmed.methods import SAT
from advmed.testing.objectives import Classification as Compared
from advmed.testing.objectives import network as cnn

__all__ = ["Affine", "Classifier", "Compared", "Logistic", "Mean", "cnn", "trained", "xrays"]

DATA = Path(__file__).parents[2] / "examples" / "data" / "pneumoniamnist" / "pneumoniamnist.npz"


class Affine:
    """terms = <x, slopes_k> + offsets_k: the maximum over a ball is offset + <x, slope> + radius * dual norm."""

    def __init__(self, slopes: Tensor, offsets: Tensor) -> None:
        self.slopes, self.offsets = slopes, offsets  # (K, *shape), (K,)

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.slopes.flatten(1).T + self.offsets


class Logistic:
    """K logistic losses of one linear model: terms_k = softplus(-y (c_k w.x + b_k)).

    All terms point along w, so the ball's worst point is the same for each, and is known in closed form.
    """

    def __init__(self, weight: Tensor, labels: Tensor, scales: Tensor, offsets: Tensor) -> None:
        self.model = nn.Linear(weight.numel(), 1, bias=False, dtype=weight.dtype)
        self.model.weight.data.copy_(weight.reshape(1, -1))
        self.labels, self.scales, self.offsets = labels, scales, offsets
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return F.softplus(-self.labels[:, None] * (self.model(images.flatten(1)) * self.scales + self.offsets))

    def largest_radius(self, images: Tensor, thresholds: Tensor, p: float) -> Tensor:
        """Per sample and term, the largest eps with term < threshold anywhere in the ball, (B, K)."""
        weight = self.model.weight.detach().flatten()
        dual = weight.norm(2) if p == 2 else weight.abs().sum()
        clean = self.labels[:, None] * ((images.flatten(1) @ weight)[:, None] * self.scales + self.offsets)
        return (thresholds.expm1().log() + clean) / (self.scales * dual)


class Classifier:
    """Cross-entropy of a small CNN, one term per sample; counts its passes."""

    names = ("ce",)

    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        self.model, self.labels, self.calls = model, labels, 0

    def __call__(self, images: Tensor) -> Tensor:
        return self.terms_and_errors(images)[0]

    def terms_and_errors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        logits = self.model(images)
        return F.cross_entropy(logits, self.labels, reduction="none")[:, None], logits.argmax(1) != self.labels


class Mean(Compared):
    """Its loss is the mean of its samples' first terms; K = 1."""

    names = ("ce",)

    def terms_of(self, logits: Tensor) -> Tensor:
        return super().terms_of(logits)[:, :1]

    def loss_and_predictions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self._logits("training", images)
        return self.terms_of(logits).mean(), self.terms_of(logits), logits


@cache
def xrays() -> tuple[Tensor, Tensor]:
    """Chest X-rays of 14 x 14 pixels, as many of either kind, and whether they show a pneumonia."""
    with np.load(DATA, allow_pickle=False) as archive:
        images = torch.from_numpy(archive["train_images"]).reshape(-1, 1, 28, 28) / 255.0
        labels = torch.from_numpy(archive["train_labels"]).long().flatten()
    both = [torch.nonzero(labels == k).flatten()[:160] for k in (0, 1)]
    order = torch.stack(both, 1).flatten()  # one of each in turn
    return F.avg_pool2d(images[order], 2), labels[order]


@cache
def trained(kind: str, seed: int) -> nn.Module:
    """A linear classifier, a small network, or the same trained by SAT; some seconds of training at most."""
    images, labels = xrays()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = nn.Sequential(
            *(
                [nn.Flatten(), nn.Linear(196, 2)]
                if kind == "linear"
                else [
                    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                    nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 49, 2),
                ]
            )
        )  # fmt: skip
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        method = SAT(0.4, steps=4, step_scale=2.0, bounds=(0.0, 1.0)) if kind == "adversarial" else None
        for _ in range(12 if method is None else 10):
            for batch in torch.randperm(len(images)).split(32):
                objective = Classifier(model, labels[batch])
                ids = [str(i) for i in batch.tolist()]
                if method is None:
                    loss = objective(images[batch]).mean()
                else:
                    loss = method.step(objective, images[batch], ids).loss
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return model.eval().requires_grad_(False)


class Cut(torch.autograd.Function):
    """The identity, from whose gradient some rows come back as something else."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, rows: list[int], value: float) -> Tensor:
        ctx.rows, ctx.value = rows, value
        return images.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0].clone()
        gradient[ctx.rows] = ctx.value
        return gradient, None, None
