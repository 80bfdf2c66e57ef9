"""PGD (Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks") and I-FGSM (Kurakin et al.
2017, "Adversarial examples in the physical world"): the two attacks of the AMAT paper (arXiv 2206.01736, section 3.3),
which trains with PGD-20 and evaluates with PGD-100 and I-FGSM-10, all in L2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from common.attacks.gradient import GradientAttack
from common.attacks.problem import AttackResult, Bounds
from common.objective import Objective


def pgd(
    objective: Objective,
    images: Tensor,
    radius: float | Tensor,
    *,
    steps: int,
    step_scale: float,
    norm: float = 2,
    bounds: Bounds = None,
    random_start: float | bool = True,
    restarts: int = 1,
    thresholds: Tensor | Sequence[float] | None = None,
    keep: Literal["last", "best"] = "last",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Projected gradient ascent from a random point of the ball, with step alpha = step_scale * radius / steps.

    Args:
        objective: images -> (B, K) loss terms.
        images: shape (B, C, *spatial).
        radius: one number or (B,), >= 0, Lp norm of the noise over a sample's whole input.
        steps: number of gradient steps.
        step_scale: a in alpha = a * radius / steps.
        norm: 2 or inf.
        bounds: None, or (lowest, highest): numbers or (B,) tensors.
        random_start: True (anywhere in the ball), False (at the image), or a fraction of the radius.
        restarts: number of runs, of which the worst for the model is kept per sample.
        thresholds: K thresholds; with them the result has ``crossing``.
        keep: "last" iterate, or the "best" (largest loss) of all.
        generator: makes random starts repeatable.

    Returns:
        The adversarial images, their terms, norms and crossings.

    Raises:
        ValueError: settings out of range, a radius that is negative or not finite, terms that are not (B, K).
    """
    _check_radius(radius)
    attack = GradientAttack(steps, step_scale, norm, random_start, restarts, keep)
    return attack(objective, images, radius, bounds=bounds, thresholds=thresholds, generator=generator)


def ifgsm(
    objective: Objective,
    images: Tensor,
    radius: float | Tensor,
    *,
    steps: int,
    norm: float = 2,
    bounds: Bounds = None,
    thresholds: Tensor | Sequence[float] | None = None,
    keep: Literal["last", "best"] = "last",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Iterative FGSM, or basic iterative method: PGD from the image itself with step alpha = radius / steps.

    Arguments, result and errors as in :func:`pgd`; nothing is random (``generator`` is accepted and not used).
    """
    _check_radius(radius)
    attack = GradientAttack(steps, 1.0, norm, 0.0, 1, keep)
    return attack(objective, images, radius, bounds=bounds, thresholds=thresholds, generator=generator)


def _check_radius(radius: float | Tensor) -> None:
    values = torch.as_tensor(radius)
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(f"radius must be >= 0 and finite, got {radius if values.ndim == 0 else values.min().item()}")
