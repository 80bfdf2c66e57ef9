"""DPAAT in a training loop of your own, with plain PyTorch.

python examples/classify/plain_pytorch.py [--epochs 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from adv_classify import ClassificationObjective
from advmed import DPAAT

DATA = Path(__file__).parents[1] / "data" / "pneumoniamnist" / "pneumoniamnist.npz"


def main(epochs: int = 3, steps: int = 5) -> float:
    """Trains a small network; the accuracy on validation images."""
    torch.manual_seed(0)
    archive = np.load(DATA)
    images, labels = (torch.from_numpy(archive[f"train_{part}"]) for part in ("images", "labels"))
    images, labels = images[:, None].float() / 255, labels.flatten().long()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    # The four lines that matter. eps_0 is an L2 norm over an image in [0, 1].
    method = DPAAT(eps_0=0.4, steps=steps, bounds=(0.0, 1.0))
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            ids = [f"train/{i}" for i in chosen.tolist()]  # the same image has the same id in every epoch
            step = method.step(ClassificationObjective(model, labels[chosen]), images[chosen], ids)
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
        low, median, high = method.sizes.quantiles()
        print(f"epoch {epoch}: loss {step.loss.item():.3f}, sizes {low:.2f} / {median:.2f} / {high:.2f}")

    torch.save({"model": model.state_dict(), "method": method.state_dict()}, "plain_pytorch.pth")  # to go on later
    with torch.no_grad():
        predicted = model(torch.from_numpy(archive["val_images"])[:, None].float() / 255).argmax(1)
    return float((predicted == torch.from_numpy(archive["val_labels"]).flatten()).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="attack steps")
    print(f"accuracy on validation images: {main(**vars(parser.parse_args())):.3f}")
