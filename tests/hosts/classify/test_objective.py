"""Cross-entropy per image against numpy in float64, and what differs between the attack's loss and the training's."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adv_classify import ClassificationObjective
from advmed.attacks.losses import Margin, margin
from advmed.objective import PredictingObjective
from helpers.classify import Small, noise
from helpers.hosts import class_divergence

LABELS = torch.tensor([3, 0, 1, 1, 2])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25])


class Counted(nn.Module):
    """Counts its passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return self.model(images)


@pytest.fixture
def images() -> Tensor:
    return noise(len(LABELS), 3, 8, 8)


@pytest.fixture
def model() -> Counted:
    model = Counted(Small())
    model.model[-1].weight.data *= 10  # sure predictions, right and wrong
    return model


def reference(logits: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> np.ndarray:
    """(B,), float64."""
    z = logits.detach().double().numpy()
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    target = np.full(z.shape, smoothing / z.shape[1])
    target[np.arange(len(z)), LABELS] += 1 - smoothing
    loss = -(target * log_p).sum(1)
    return loss if weight is None else loss * weight.double().numpy()[LABELS]


@pytest.mark.parametrize("precision", ["single", "autocast", "half"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_terms_and_training_loss_are_the_cross_entropy_of_every_image(
    model: Counted, images: Tensor, weight: Tensor | None, smoothing: float, precision: str
) -> None:
    """Of one pass each, in single precision whatever the network's. The terms are never smoothed or weighted, the loss
    is if wished: then the terms carry no graph."""
    plain_loss = weight is None and not smoothing
    objective = ClassificationObjective(model, LABELS, weight=weight, label_smoothing=smoothing)
    assert isinstance(objective, PredictingObjective)
    assert objective.names == ("ce",)
    if precision == "half":
        model.bfloat16()
        images = images.bfloat16()
    images.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss, last, logits = objective.loss_and_predictions(images)
        attacked, trained = objective(images), objective.loss(images)[1]
        assert torch.equal(objective.predictions(images), logits)
    assert model.passes == 4
    assert logits.dtype == (torch.float32 if precision == "single" else torch.bfloat16)
    wanted = reference(logits, None)
    assert wanted.max() > 2 > 1 > wanted.min() > 0
    for terms in (attacked, trained, last):
        assert (terms.shape, terms.dtype, loss.dtype) == ((len(LABELS), 1), torch.float32, torch.float32)
        np.testing.assert_allclose(terms.detach().numpy()[:, 0], wanted, rtol=1e-5, atol=1e-6)
    assert attacked.requires_grad
    assert trained.requires_grad == last.requires_grad == plain_loss
    assert loss.item() == pytest.approx(reference(logits, weight, smoothing).mean(), rel=1e-5)
    assert (loss.item() == pytest.approx(last.mean().item())) == plain_loss
    for result in (attacked.sum(), loss):
        (gradient,) = torch.autograd.grad(result, images, retain_graph=True)
        assert gradient.flatten(1).norm(dim=1).min() > 0
    if precision == "single":
        found = torch.autograd.grad(loss, list(model.parameters()))
        plain = nn.functional.cross_entropy(model(images), LABELS, reduction="none", label_smoothing=smoothing)
        mean = (plain * (1 if weight is None else weight[LABELS])).mean()
        for one, other in zip(found, torch.autograd.grad(mean, list(model.parameters())), strict=True):
            torch.testing.assert_close(one, other)


def test_the_distance_is_the_divergence_of_the_predictions(model: Counted, images: Tensor) -> None:
    """In single precision, too, of predictions in half."""
    objective = ClassificationObjective(model, LABELS, weight=WEIGHT)
    clean, other = objective.predictions(images), objective.predictions(noise(*images.shape, seed=1))
    for one, two in ((clean, other), (clean.bfloat16(), other.bfloat16())):
        wanted = class_divergence(one, two).float()
        torch.testing.assert_close(objective.distance(one, two), wanted, rtol=1e-4, atol=1e-6)
    assert (objective.distance(clean, other) - objective.distance(other, clean)).abs().max() > 1e-4
    assert torch.equal(objective.distance(clean, clean), torch.zeros(len(LABELS)))


def test_the_margin_is_above_zero_where_an_image_is_misclassified(model: Counted, images: Tensor) -> None:
    logits = model(images).detach()
    z = logits.double().numpy()
    wanted = [max(np.delete(row, y)) - row[y] for row, y in zip(z, LABELS.tolist(), strict=True)]
    objective = ClassificationObjective(model, LABELS)
    (climbed,) = Margin().objectives(objective, images)
    found = climbed(images)
    assert found.shape == (len(LABELS), 1)
    np.testing.assert_allclose(found.detach()[:, 0], wanted, rtol=1e-4, atol=1e-5)
    wrong = logits.argmax(1) != LABELS
    assert 0 < wrong.sum() < len(LABELS)
    assert torch.equal(found[:, 0] > 0, wrong)
    targets = (LABELS + 2) % 4
    one = margin(objective.class_scores(logits), targets)
    wanted = [row[t] - row[y] for row, y, t in zip(z, LABELS.tolist(), targets.tolist(), strict=True)]
    np.testing.assert_allclose(one[:, 0], wanted, rtol=1e-4, atol=1e-5)


def test_needs_no_host() -> None:
    """For a plain PyTorch loop, PyTorch is enough."""
    code = (
        "import sys; from adv_classify import ClassificationObjective; from advmed.methods import DPAAT; "
        "print(*{'lightning', 'timm', 'torchvision', 'jsonargparse'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == ""
