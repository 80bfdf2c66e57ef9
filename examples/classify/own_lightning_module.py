"""DPAAT in a LightningModule of your own.

python examples/classify/own_lightning_module.py [--epochs 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adv_classify import ClassificationObjective
from adv_classify.data import MedMNIST
from advmed import DPAAT

DATA = Path(__file__).parents[1] / "data" / "pneumoniamnist" / "pneumoniamnist.npz"


class Mine(LightningModule):
    """A module as you may have one, with four lines more."""

    def __init__(self, steps: int = 5) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 7 * 7, 2),
        )  # fmt: skip
        self.method = DPAAT(eps_0=0.4, steps=steps, bounds=(0.0, 1.0))  # one

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Asks the method instead of ``cross_entropy(self.model(images), labels)``."""
        objective = ClassificationObjective(self.model, batch["label"])
        step = self.method.step(objective, batch["image"], batch["id"])  # two: ids are the data set's own
        self.log("loss", step.loss.detach(), prog_bar=True)
        return step.loss

    def on_validation_epoch_start(self) -> None:
        """Makes the sizes of all processes equal before a checkpoint is saved."""
        self.method.merge()  # three

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the sizes."""
        checkpoint["dpaat"] = self.method.state_dict()  # four, and back in on_load_checkpoint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the sizes back."""
        self.method.load_state_dict(checkpoint["dpaat"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As ever."""
        logits = self.model(batch["image"])
        self.log("val_loss", cross_entropy(logits, batch["label"]))
        self.log("accuracy", (logits.argmax(1) == batch["label"]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As ever."""
        return torch.optim.Adam(self.parameters(), 1e-3)


def main(epochs: int = 3, steps: int = 5) -> float:
    """Trains a small network; the accuracy on validation images."""
    torch.manual_seed(0)
    data = MedMNIST(str(DATA), batch_size=64, flip=0, workers=0)
    trainer = Trainer(max_epochs=epochs, accelerator="auto", devices=1, default_root_dir="runs/own_module")
    trainer.fit(Mine(steps), data)
    return float(trainer.callback_metrics["accuracy"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="attack steps")
    print(f"accuracy on validation images: {main(**vars(parser.parse_args())):.3f}")
