"""Do `standard` and AutoAttack (of torchattacks) agree on a classifier, in L2 and Linf, and what does each cost?

    python benchmarks/autoattack.py [--images 1000] [--seeds 0]
    python benchmarks/autoattack.py --savings [--images 200]      what early stopping and the like save, and cost

Digits of scikit-learn (8 x 8 pixels, 10 classes; real, and nothing is downloaded) and a small network, trained for some
seconds with SAT from a seed. Prints, for every norm and level, the accuracy under each, on how many images only one of
them succeeds, seconds, and passes of the network, where a backward pass counts as two.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from adv_classify.external import torch_attack
from advmed import APGD, SAT, ClassificationObjective, Standard
from advmed.attacks.standard import judge_of

LEVELS = {2.0: (0.5, 1.0), math.inf: (0.1, 0.2)}
EPS = {2.0: 1.0, math.inf: 0.15}


def network() -> nn.Module:
    """Three convolutions."""
    layers: list[nn.Module] = []
    for channels, width, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 10))


def trained(seed: int, norm: float, images: Tensor, labels: Tensor, epochs: int = 15) -> nn.Module:
    """Trained by SAT from a seed; the same on one machine."""
    torch.manual_seed(seed)
    model = network()
    method = SAT(EPS[norm], steps=5, norm=norm, bounds=(0.0, 1.0))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            step = method.step(ClassificationObjective(model, labels[rows]), images[rows], rows.tolist())
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
    return model.eval()


class Counter(nn.Module):
    """Counts passes, weighted by the images in them; those with a gradient three times."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += len(images) * (3 if torch.is_grad_enabled() and images.requires_grad else 1)
        logits: Tensor = self.model(images)
        return logits


class Whole:
    """An objective that cannot be taken apart."""

    def __init__(self, objective: ClassificationObjective) -> None:
        self.inner, self.model, self.names = objective, objective.model, objective.names
        self.predictions, self.class_scores = objective.predictions, objective.class_scores

    def __call__(self, images: Tensor) -> Tensor:
        return self.inner(images)


class Plain(Standard):
    """The ensemble with balls of one size."""

    @property
    def members(self) -> Any:
        return {
            name: replace(member, shrink=False) if isinstance(member, APGD) else member
            for name, member in super().members.items()
        }


def savings(options: argparse.Namespace, images: Tensor, labels: Tensor) -> None:
    """The ensemble at three levels, as it is, and without each of what makes it cheaper or stronger."""
    tested, learnt = slice(0, options.images), slice(options.images, None)
    print("| L2 at 0.25, 0.5, 1 | accuracy | passes an image |\n|---|---|---|")
    for seed in options.seeds:
        model = Counter(trained(seed, 2.0, images[learnt], labels[learnt]))
        objective = ClassificationObjective(model, labels[tested])
        judge, x, levels = judge_of(objective), images[tested], (0.25, 0.5, 1.0)
        standard = Standard("classification")
        variants: dict[str, tuple[Standard, Any, Any, bool]] = {
            "as it is": (standard, objective, judge, True),
            "samples that are lost go on": (standard, objective, replace(judge, lost_at=math.inf), True),
            "lost samples stay in the batch": (standard, Whole(objective), judge, True),
            "each level begins anew": (standard, objective, judge, False),
            "balls of one size": (Plain("classification"), objective, judge, True),
        }
        for name, (attack, own, told, together) in variants.items():
            model.passes, right = 0, []
            groups = [levels] if together else [(level,) for level in levels]
            for group in groups:
                wrong = torch.zeros(len(x), dtype=torch.bool)
                worst = {}
                for found in attack.search(
                    own,
                    x,
                    group,
                    judge=told,
                    generator=lambda member, level: torch.Generator().manual_seed(crc32(f"{member} {level}".encode())),
                    bounds=(0.0, 1.0),
                ):
                    wrong = wrong | (told.value(found.images) > 0.5)
                    worst[found.level] = wrong
                right += [(~worst[level]).float().mean().item() for level in group]
            passes = model.passes / len(x)
            print(f"| {name}, seed {seed} | {' / '.join(f'{v:.3f}' for v in right)} | {passes:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--savings", action="store_true")
    options = parser.parse_args()
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    if options.savings:
        savings(options, images, labels)
        return
    tested, learnt = slice(0, options.images), slice(options.images, None)
    print("| norm, level | seed | clean | `standard` | AutoAttack | only one of them | seconds | passes |")
    print("|---" * 8 + "|")
    for norm, levels in LEVELS.items():
        for seed in options.seeds:
            model = Counter(trained(seed, norm, images[learnt], labels[learnt]))
            objective = ClassificationObjective(model, labels[tested])
            x = images[tested]
            clean = ~objective.terms_and_errors(x)[1]
            for level in levels:
                right, seconds, passes = [], [], []
                for attack in (Standard("classification", norm), torch_attack("autoattack", norm)):
                    start, model.passes = time.perf_counter(), 0
                    how = {"judge": judge_of(objective)} if isinstance(attack, Standard) else {}
                    generator = torch.Generator().manual_seed(seed)
                    found = attack(objective, x, level, bounds=(0.0, 1.0), generator=generator, **how)
                    seconds.append(time.perf_counter() - start)
                    passes.append(model.passes / len(x))
                    right.append(~objective.terms_and_errors(found.images)[1])
                ours, theirs = right
                print(
                    f"| L{norm:g}, {level:g} | {seed} | {clean.float().mean():.3f} | {ours.float().mean():.3f} | "
                    f"{theirs.float().mean():.3f} | {(theirs & ~ours).sum()} / {(ours & ~theirs).sum()} | "
                    f"{seconds[0]:.0f} / {seconds[1]:.0f} | {passes[0]:.0f} / {passes[1]:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
