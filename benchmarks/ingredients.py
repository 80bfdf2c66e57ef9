"""Controls, and cheaper trainings, as callbacks for Lightning: measured by fronts.py, not in Advmed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from advmed import PGD, Step
from advmed.norms import project, steepest
from advmed.objective import training_pass


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


class Halved(Callback):
    """Clean and attacked half-batches: the method has the second half of every batch, the first is trained on as it is.

    Two thirds of the loss are the method's, so that a third of it is of attacked images; a step costs half of a
    standard one and half of one of the method.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Stands before the method's step."""
        method = pl_module.run.method
        step = method.step

        def halved(objective: Any, images: Tensor, ids: Any, backward: Any = None) -> Any:
            first, second = torch.arange(len(images)).tensor_split(2)
            made = step(objective.take(second), images[second], [ids[row] for row in second.tolist()])
            clean, _ = training_pass(objective.take(first), images[first])
            return replace(made, loss=2 / 3 * made.loss + clean / 3, adversarial=None)

        method.step = halved


class Replayed(Callback):
    """A fixed-level method that goes back through a batch once for two uses: the weights' gradients and the noise's.

    Every batch is trained on several times in turn, at first clean, then with the noise that the pass before has
    found, in steps of the attack's own lengths (A. Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019,
    arXiv 1904.12843, but that noise begins anew with each batch, whose images are others). A step costs a standard one.

    Args:
        times: passes of each batch.
    """

    def __init__(self, times: int = 4) -> None:
        self.times = times
        self.kept: tuple[Any, Tensor, Any] | None = None
        self.noise = torch.zeros(0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the place of the method's step."""
        method, number = pl_module.run.method, 0
        lengths = PGD(self.times - 1, 1.75, schedule="decreasing").lengths

        def replayed(objective: Any, images: Tensor, ids: Any, backward: Any = None) -> Step:
            nonlocal number
            turn, number = number % self.times, number + 1
            if turn == 0 or self.kept is None:
                self.kept, self.noise = (objective, images, ids), torch.zeros_like(images)
            objective, images, ids = self.kept
            leaf = (images + self.noise).detach().requires_grad_()

            def further(gradient: Tensor) -> None:
                if turn < self.times - 1:
                    noise = self.noise + method.eps * lengths[turn] * steepest(gradient, 2)
                    inside = project(noise, torch.full((len(images), 1, 1, 1), method.eps), 2)
                    self.noise = (images + inside).clamp(0, 1) - images

            leaf.register_hook(further)
            method.steps_done += 1  # as if it had attacked: the host asks whether anything was
            loss, terms = training_pass(objective, leaf)
            return Step(loss, {}, terms, leaf.detach())

        method.step = replayed
