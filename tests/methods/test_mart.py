"""MART against its formula, written out sample by sample and place by place in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from advmed.attacks import pgd
from advmed.methods import MART
from advmed.methods.mart import mart_losses
from advmed.objective import ClassScores
from helpers.tensors import assert_close, comparing, gradients, loss_by_hand, names, seeded


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def at_a_place(z: np.ndarray, z_adv: np.ndarray, y: int) -> tuple[float, float]:
    """Equation 11 of the paper, for one choice among classes."""
    p, q = softmax(z), softmax(z_adv)
    boosted = -math.log(q[y]) - math.log(1 - max(q[k] for k in range(len(q)) if k != y))
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * (1 - p[y])
    return boosted, divergence


def by_hand(clean: Tensor, adversarial: Tensor, truth: Tensor, valid: Tensor | None, exclusive: bool) -> np.ndarray:
    """Both losses, (B, 2): the mean over the places that count; regions are choices of two, and summed."""
    found = []
    for b in range(len(clean)):
        z, w, t = (
            x[b].flatten(1).numpy() if x.ndim > 2 else x[b][:, None].numpy() for x in (clean, adversarial, truth)
        )
        counted = np.ones(z.shape[1], bool) if valid is None else valid[b].flatten().numpy()
        places = []
        for place in np.flatnonzero(counted):
            if exclusive:
                places.append(at_a_place(z[:, place], w[:, place], int(t[:, place].argmax())))
            else:
                pairs = [
                    at_a_place(np.array([z[r, place], 0]), np.array([w[r, place], 0]), int(t[r, place] == 0))
                    for r in range(len(z))
                ]
                places.append(tuple(np.sum(pairs, 0)))
        found.append(np.mean(places, 0) if places else np.zeros(2))
    return np.array(found)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("places", [(), (4,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_loss_is_the_papers(classes: int, places: tuple[int, ...], exclusive: bool, ignored: bool) -> None:
    generator = seeded(classes + len(places))
    shape = (4, classes, *places)
    clean, adversarial = (3 * torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    if exclusive:
        labels = torch.randint(classes, (4, 1, *places), generator=generator)
        truth = torch.zeros_like(clean).scatter_(1, labels, 1)
    else:
        truth = (torch.rand(shape, generator=generator) < 0.5).double()
    valid = None
    if ignored and places:  # a class of an image is never ignored
        valid = torch.rand((4, 1, *places), generator=generator) < 0.6
        valid[0] = False  # nothing of this sample counts

    def losses(*logits: Tensor) -> tuple[Tensor, Tensor]:
        return mart_losses(*(ClassScores(z, truth, valid, exclusive) for z in logits))

    found = torch.stack(losses(clean, adversarial), 1)
    np.testing.assert_allclose(found, by_hand(clean, adversarial, truth, valid, exclusive), rtol=1e-9)
    assert torch.autograd.gradcheck(losses, (clean.requires_grad_(), adversarial.requires_grad_()))


def test_sure_predictions_lose_no_digits() -> None:
    """Where a wrong class has nearly all of the probability, 1 - q_k is the rest and not 0; in half precision, too."""
    logits = torch.tensor([[0.0, 60.0, -10.0]])
    scores = ClassScores(logits, torch.tensor([[1.0, 0.0, 0.0]]), None, exclusive=True)
    boosted, divergence = mart_losses(scores, scores)
    assert float(boosted) == pytest.approx(60 + 60 - math.log1p(math.exp(-10)), rel=1e-6)
    assert float(divergence) == 0
    half = scores._replace(logits=logits.half())
    assert mart_losses(half, half)[0].dtype == torch.float32
    assert torch.isfinite(mart_losses(half, half)[0]).all()


def test_a_step_is_an_attack_on_the_loss_of_the_host_and_the_papers_loss() -> None:
    objective, images = comparing()
    model, attack = objective.model, {"steps": 4, "step_scale": 2.0}
    step = MART(0.6, kl_weight=2.5, **attack).step(objective, images, names(5))
    attacked = pgd(objective, images, 0.6, random_start=False, **attack).images
    assert torch.equal(step.adversarial, attacked)
    scores = [objective.class_scores(model(x)) for x in (images, attacked)]
    wanted = by_hand(*(found.logits.detach() for found in scores), scores[0].truth, None, True)
    assert step.loss.item() == pytest.approx((wanted @ [1, 2.5]).mean())
    assert step.logs["loss_sync"].item() == pytest.approx(wanted[:, 1].mean())
    for key, x in (("loss_clean", images), ("loss_adversarial", attacked)):
        torch.testing.assert_close(step.logs[key], loss_by_hand(objective, x)[0].detach())
    step.loss.backward()
    found = gradients(model)
    boosted, divergence = mart_losses(*scores)
    (boosted + 2.5 * divergence).mean().backward()
    assert_close(found, gradients(model))


def test_a_task_without_classes_is_refused() -> None:
    objective, images = comparing()
    objective.class_scores = None
    with pytest.raises(TypeError, match=r"^MART is for predictions that are classes, .* it has no class_scores"):
        MART(1.0).step(objective, images, names(5))
