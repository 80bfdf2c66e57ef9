"""Attacks of torchattacks (the extra ``eval``) in the place of our own, for a second opinion in the same report.

Most of them leave an image that they do not manage to have misclassified as it is, so that their accuracy is to be
read, and not what depends on probabilities, such as mAP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from advmed.attacks import AttackResult
from advmed.attacks.names import EXPECTED
from advmed.guard import preserved
from advmed.norms import norm

DESCRIPTIONS = {
    "autoattack": "AutoAttack (Croce & Hein 2020) of torchattacks: APGD-CE, targeted APGD-DLR, targeted FAB, Square",
    "apgd": "APGD on the cross-entropy (Croce & Hein 2020) of torchattacks",
    "apgdt": "targeted APGD on the DLR loss (Croce & Hein 2020) of torchattacks",
    "fab": "FAB (Croce & Hein 2020) of torchattacks, untargeted",
    "square": "Square (Andriushchenko et al. 2020) of torchattacks: a search without gradients",
}
LEAST_CLASSES = {"autoattack": 4, "apgdt": 4}
"""The DLR loss needs the third largest of the other logits."""
NEEDS_SQUARES = ("autoattack", "square")
"""Square of torchattacks 3.5 stops at images whose height is not their width."""


@dataclass(frozen=True)
class TorchAttack:
    """An attack of torchattacks, called as ours are.

    Args:
        name: one of :data:`DESCRIPTIONS`.
        norm: 2 or inf.
        description: for the report.
    """

    name: str
    norm: float
    description: str

    gradients: ClassVar[None] = None
    queries: ClassVar[None] = None

    @property
    def access(self) -> str:
        """What it knows of the model."""
        return "black box" if self.name == "square" else "white box"

    def __call__(
        self,
        objective: Any,
        images: Tensor,
        radius: float | Tensor,
        *,
        bounds: Any = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Attacks a batch; see :class:`advmed.attacks.PGD`.

        Args:
            objective: a :class:`adv_classify.objective.ClassificationObjective`.
            images: (B, C, H, W) in [0, 1].
            radius: noise bound, > 0; torchattacks knows one for all images.
            bounds: must be (0, 1), which torchattacks takes for granted.
            generator: source of the seed.

        Raises:
            ValueError: for other bounds, or fewer classes than the attack needs.
        """
        if bounds is None or tuple(bounds) != (0.0, 1.0):
            raise ValueError(f"{self.name} of torchattacks needs images in [0, 1], got bounds {bounds}")
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        with torch.inference_mode(False), torch.enable_grad(), preserved(objective.model):
            classes = objective.model(images[:1]).shape[1]
            if classes < LEAST_CLASSES.get(self.name, 2):
                raise ValueError(
                    f"{self.name} needs {LEAST_CLASSES[self.name]} classes or more, the model has {classes}"
                )
            torch.manual_seed(seed)  # torchattacks draws from the global state, which is put back
            model, inputs = objective.model, images.clone()
            height, width = images.shape[2:]
            if self.name in NEEDS_SQUARES and height != width:
                side = max(height, width)
                model, inputs = Corner(model, height, width), pad(inputs, (0, side - width, 0, side - height))
            attacked = self._attack(model, radius, classes, seed)(inputs, objective.labels).detach()
            attacked = attacked[..., :height, :width]
            with torch.no_grad():
                terms = objective(attacked)
        nonfinite = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return AttackResult(attacked, terms, norm(attacked - images, self.norm), None, nonfinite)

    def _attack(self, model: nn.Module, radius: float | Tensor, classes: int, seed: int) -> Any:
        import torchattacks

        kind = "Linf" if self.norm == math.inf else "L2"
        if self.name == "autoattack":
            return torchattacks.AutoAttack(model, norm=kind, eps=radius, n_classes=classes, seed=seed)
        if self.name == "apgd":
            return torchattacks.APGD(model, norm=kind, eps=radius, steps=100, seed=seed)
        if self.name == "apgdt":
            return torchattacks.APGDT(model, norm=kind, eps=radius, steps=100, n_classes=classes, seed=seed)
        if self.name == "fab":
            return torchattacks.FAB(model, norm=kind, eps=radius, steps=100, n_classes=classes, seed=seed)
        return torchattacks.Square(model, norm=kind, eps=radius, n_queries=2000, seed=seed)


class Corner(nn.Module):
    """A model that sees the top left corner of its input; noise elsewhere is of no use, and is cut off again."""

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.model, self.height, self.width = model, height, width
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.model(images[..., : self.height, : self.width])
        return logits


def torch_attack(name: str, norm: float) -> TorchAttack:
    """An attack of torchattacks by its command-line name.

    Raises:
        ValueError: for an unknown name, or where torchattacks is not installed.
    """
    if name not in DESCRIPTIONS:
        raise ValueError(
            f"unknown attack {name!r}: expected {EXPECTED}; margin<steps> or targeted<steps>, either with x<restarts>; "
            f"or one of {', '.join(DESCRIPTIONS)}"
        )
    try:
        import torchattacks  # noqa: F401 - is it there?
    except ImportError as error:
        raise ValueError(f"{name} needs torchattacks: pip install 'advmed[eval]'") from error
    return TorchAttack(name, norm, DESCRIPTIONS[name])
