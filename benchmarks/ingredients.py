"""What others add to adversarial training, and a control, as callbacks for Lightning: measured by fronts.py, and no
part of Advmed.

Adversarial weight perturbation: D. Wu, S.-T. Xia, Y. Wang, "Adversarial Weight Perturbation Helps Robust
Generalization", NeurIPS 2020, arXiv 2004.05884: the gradient that the optimizer gets is taken at weights that were
moved, layer by layer, uphill by a share of their own length.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from advmed.margins import read_margins
from advmed.objective import training_pass

GAMMA = 0.005
"""The paper's share of a layer's length."""


class AWP(Callback):
    """Two more passes a step: one that says where uphill is, the method's own, and one at the moved weights.

    The images under attack are the method's; uphill is told by its whole loss, half of it of clean images.

    Args:
        gamma: share of a layer's length that it is moved by.
        after: share of the epochs that are trained as ever.
    """

    def __init__(self, gamma: float = GAMMA, after: float = 0.0) -> None:
        self.gamma, self.after = gamma, after
        self._last: tuple[Any, Tensor, Tensor] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Notes what the method attacks, and what it makes of it."""
        method = pl_module.run.method
        step = method.step

        def noted(objective: Any, images: Tensor, ids: Any, backward: Any = None) -> Any:
            made = step(objective, images, ids, backward)
            self._last = objective, images, made.adversarial
            return made

        method.step = noted

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Takes the gradient anew, at the moved weights."""
        if trainer.current_epoch < self.after * trainer.max_epochs:
            return
        assert self._last is not None
        objective, images, adversarial = self._last
        moved = self._moved(pl_module)
        for weight, by in moved:
            weight.data.add_(by)
        for weight in pl_module.parameters():
            weight.grad = None
        with torch.enable_grad():
            losses = [training_pass(objective, shown)[0] for shown in (images.detach(), adversarial)]
            (sum(losses) / 2).backward()
        for weight, by in moved:
            weight.data.sub_(by)

    def _moved(self, module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Weights of more than one axis, as the paper has it: no biases, and nothing of normalisation."""
        found = []
        for weight in module.parameters():
            if weight.grad is not None and weight.dim() > 1:
                length = weight.grad.norm()
                found.append((weight, self.gamma * weight.detach().norm() / (length + 1e-12) * weight.grad))
        return found


class Drawn(Callback):
    """SAT with a level for each sample of the batch, drawn anew from the margins that AMAT has learnt.

    The control that says whether it matters *which* sample gets which level.

    Args:
        margins: AMAT's margins.csv.
        seed: of the draws.
    """

    def __init__(self, margins: str, seed: int = 0) -> None:
        found = read_margins(margins)
        if found is None:
            raise ValueError(f"there are no margins in {margins}")
        self.levels = torch.as_tensor(found, dtype=torch.float32)
        self.generator = torch.Generator().manual_seed(seed)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Gives the method its levels for this batch."""
        images = batch["image"]
        chosen = torch.randint(len(self.levels), (len(images),), generator=self.generator)
        pl_module.run.method.eps = self.levels[chosen].to(images.device)
