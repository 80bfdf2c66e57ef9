"""What an eye sees of a noise level: a table and a picture, of the embedded chest X-rays.

python examples/noise_levels.py [--out docs/howto/levels.png]

The noise is that of PGD on a small network, which is trained for a few seconds, beside Gaussian noise of the same norm.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from advmed import ClassificationObjective, Noise, pgd

DATA = Path(__file__).parent / "data" / "pneumoniamnist" / "pneumoniamnist.npz"
STEPS = (2, 4, 8, 16, 32)
"""Root mean square changes of a value, in 255ths of the range."""
SHOWN = 1
"""The image of the picture."""


def cells(objective: ClassificationObjective, images: Tensor, changed: Tensor) -> list[str]:
    """What an eye sees, and a network, means over the images: root mean square change of a value, PSNR, SSIM, the SSIM
    under Gaussian noise of each image's same L2 norm, and the accuracy."""
    lengths, generator = (changed - images).flatten(1).norm(dim=1), torch.Generator().manual_seed(0)
    unaimed = Noise("gaussian")(objective, images, lengths, bounds=(0.0, 1.0), generator=generator).images
    rms = float(lengths.mean()) / math.sqrt(images[0].numel())
    psnr = peak_signal_noise_ratio(changed, images, data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    ssim, control = (structural_similarity_index_measure(x, images, data_range=1.0) for x in (changed, unaimed))
    right = objective.model(changed).argmax(1) == objective.labels
    psnr_shown = f"{float(psnr):.1f} dB" if rms else ""
    return [f"{255 * rms:.1f}/255", psnr_shown, f"{ssim:.2f}", f"{control:.2f}", f"{right.float().mean():.2f}"]


def trained(images: Tensor, labels: Tensor) -> nn.Module:
    """A small network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 2)
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(3):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval()


def main(out: Path) -> list[str]:
    """Writes the picture; the table, as lines of Markdown."""
    archive = np.load(DATA)
    images = torch.from_numpy(archive["train_images"])[:, None].float() / 255
    labels = torch.from_numpy(archive["train_labels"]).flatten().long()
    model = trained(images, labels)
    images, labels = images[:100], labels[:100]
    objective = ClassificationObjective(model, labels)
    size = images[0].numel()

    lines = [
        "| norm | level | RMS change of a value | PSNR | SSIM | SSIM, Gaussian noise as large | accuracy |",
        "|---|---|---|---|---|---|---|",
        f"| | {' | '.join(['0', *cells(objective, images, images)])} |",
    ]
    rows = {2.0: [images], math.inf: [images]}
    for norm in rows:
        for step in STEPS:
            level = step / 255 * (math.sqrt(size) if norm == 2 else 1)
            changed = pgd(
                objective, images, level, steps=20, step_scale=4, norm=norm, bounds=(0.0, 1.0), random_start=False
            ).images
            name = f"{level:.2f}" if norm == 2 else f"{step}/255"
            shown = [f"L{norm:g}", name, *cells(objective, images, changed)]
            lines.append(f"| {' | '.join(shown)} |")
            rows[norm].append(changed)

    figure, axes = plt.subplots(2, len(STEPS) + 1, figsize=(9, 3.6), dpi=100, layout="constrained")
    for line, (norm, found) in zip(axes, rows.items(), strict=True):
        for axis, step, batch in zip(line, (0, *STEPS), found, strict=True):
            axis.imshow(batch[SHOWN, 0], cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            name = f"L2 {step / 255 * math.sqrt(size):.2f}" if norm == 2 else f"Linf {step}/255"
            axis.set_title(name if step else "as it is", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("noise_levels.png"), help="the picture")
    print("\n".join(main(**vars(parser.parse_args()))))
