"""A curriculum, and a control, as callbacks for Lightning: measured by fronts.py, and no part of Advmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor


class Growing(Callback):
    """A fixed-level method whose level grows in a straight line, from 0 to its own.

    A curriculum (Q.-Z. Cai et al., "Curriculum Adversarial Training", IJCAI 2018, arXiv 1805.04807, in its simplest
    form), and what AMAT's margins do in the course of a training.

    Args:
        until: share of the steps after which it has its level.
    """

    def __init__(self, until: float = 0.8) -> None:
        self.until = until
        self.eps = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Notes the level."""
        self.eps = float(pl_module.run.method.eps)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Gives the method the level of this step."""
        share = (trainer.global_step + 1) / (self.until * trainer.estimated_stepping_batches)
        pl_module.run.method.eps = self.eps * min(share, 1.0)


class Noted(Callback):
    """Writes down which noise level every image was given, epoch by epoch: what :class:`Dealt` deals out.

    Args:
        file: the table, a line for each image and epoch.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks on where the method makes its noise."""
        method = pl_module.run.method
        step = method.step
        self.file.write_text("epoch,level\n")

        def noted(objective: Any, images: Tensor, ids: Any, backward: Any = None) -> Any:
            made = step(objective, images, ids, backward)
            levels = (made.adversarial - images).flatten(1).norm(dim=1).tolist()
            with self.file.open("a") as file:
                file.writelines(f"{trainer.current_epoch},{level:.6g}\n" for level in levels)
            return made

        method.step = noted


class Dealt(Callback):
    """A fixed-level method whose images get, in every epoch, the noise levels of another training's same epoch.

    The control that says whether it matters *which* image gets which level: the levels are as large, and grow as they
    did there, and only their owners are others.

    Args:
        file: what :class:`Noted` wrote.
        seed: of the dealing.
        median: all images get the median of the epoch's levels instead.
    """

    def __init__(self, file: str, seed: int = 0, median: bool = False) -> None:
        self.levels: dict[int, Tensor] = {}
        found = np.loadtxt(file, delimiter=",", skiprows=1, ndmin=2)
        for epoch in np.unique(found[:, 0]):
            self.levels[int(epoch)] = torch.as_tensor(found[found[:, 0] == epoch, 1], dtype=torch.float32)
        self.generator = torch.Generator().manual_seed(seed)
        self.median = median
        self._left = torch.zeros(0)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Shuffles the levels of this epoch."""
        levels = self.levels[trainer.current_epoch]
        if self.median:
            levels = levels.median().expand(len(levels))
        self._left = levels[torch.randperm(len(levels), generator=self.generator)]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Gives the method its levels for this batch."""
        images = batch["image"]
        chosen, self._left = self._left[: len(images)], self._left[len(images) :]
        pl_module.run.method.eps = chosen.to(images.device)
