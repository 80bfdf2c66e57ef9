"""What our steps cost, as ratios of things measured in the same run, interleaved, on one machine.

    python benchmarks/speed.py [--threads 1] [--device cpu] [--repeats 15] [--json FILE]

(a) PGD-20 of `advmed` against torchattacks' PGDL2 on the same model and batch: as the training methods call it, which
    gives what torchattacks gives; and as `pgd`, which looks at the last iterate once more for its loss terms.
(b) An AMAT step against the sum of its parts: two stock forward-backward passes, and n forward and input-only
    backward passes of the same network and loss.
(c) An AMAT step, with either refinement, against a SAT step with as many attack steps.
(d) Peak memory of an AMAT step against a stock step, with both ways of back-propagating.

A time is the median over repeats; a ratio is the median of the ratios within one repeat.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchattacks
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from timing import interleaved, ratio
from torch import Tensor, nn

from adv_nnunet.objective import SampleTerms, SegmentationObjective
from advmed.attacks import PGD, pgd
from advmed.methods import AMAT, SAT

STEPS = 20


def against_torchattacks(repeats: int, device: torch.device) -> dict[str, float]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)).to(device).eval()
    images, labels = torch.rand(16, 3, 64, 64, device=device), torch.randint(10, (16,), device=device)
    eps, alpha = 1.0, 0.2
    theirs = torchattacks.PGDL2(model, eps=eps, alpha=alpha, steps=STEPS, random_start=True)

    def objective(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), labels, reduction="none")[:, None]

    objective.model = model

    scale = alpha * STEPS / eps
    attack = PGD(STEPS, scale, random_start=True)
    seconds = interleaved(
        {
            "attack": lambda: attack(objective, images, eps, bounds=(0.0, 1.0), final_pass=False),
            "pgd": lambda: pgd(objective, images, eps, steps=STEPS, step_scale=scale, bounds=(0.0, 1.0)),
            "torchattacks": lambda: theirs(images, labels),
        },
        repeats,
        device,
    )
    return {
        "a. PGD-20 of advmed / torchattacks PGDL2": ratio(seconds, "attack", "torchattacks"),
        "a. the same, with the last iterate's loss terms": ratio(seconds, "pgd", "torchattacks"),
    }


class Segmentation:
    """nnU-Net's 2d network and loss for hippocampus at half width, with one batch."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        features = [16, 32, 64, 128]
        self.network = PlainConvUNet(
            1,
            len(features),
            features,
            nn.Conv2d,
            3,
            [1, 2, 2, 2],
            2,
            3,
            2,
            conv_bias=True,
            norm_op=nn.InstanceNorm2d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=True,
        ).to(device)
        dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
        weights = np.array([1, 0.5, 0])
        inner = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        self.loss = DeepSupervisionWrapper(inner, weights / weights.sum())
        self.images = torch.randn(16, 1, 56, 40, device=device)
        sizes = [(56, 40), (28, 20), (14, 10)]
        self.target = [torch.randint(0, 3, (16, 1, *size), device=device) for size in sizes]
        self.terms = SampleTerms(self.loss, "sum")
        self.objective = SegmentationObjective(self.network, self.network, self.loss, self.terms, self.target)
        self.ids = [str(i) for i in range(16)]

    def stock(self) -> None:
        """Forward and backward of the stock training step."""
        self.network.zero_grad(set_to_none=True)
        self.loss(self.network(self.images), self.target).backward()

    def input_gradient(self) -> None:
        """A forward pass and a backward pass to the input only: the least that one attack step can cost."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        images = self.images.detach().requires_grad_()
        torch.autograd.grad(self.terms(self.network(images), self.target).sum(), images)
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)

    def parts(self) -> None:
        for _ in range(STEPS):
            self.input_gradient()
        self.stock()
        self.stock()

    def step(self, method: AMAT | SAT, sequential: bool = False) -> None:
        self.network.zero_grad(set_to_none=True)
        if sequential:
            method.step(self.objective, self.images, self.ids, backward=lambda loss: loss.backward())
        else:
            method.step(self.objective, self.images, self.ids).loss.backward()


def training_steps(repeats: int, device: torch.device) -> dict[str, float]:
    work = Segmentation(device)
    sat = SAT(1.0, steps=STEPS)
    paper, crossing = (AMAT(1.0, [0.0], steps=STEPS, refinement=r) for r in ("paper", "crossing"))
    seconds = interleaved(
        {
            "parts": work.parts,
            "SAT": lambda: work.step(sat),
            "AMAT paper": lambda: work.step(paper),
            "AMAT crossing": lambda: work.step(crossing),
            "stock": work.stock,
        },
        repeats,
        device,
    )
    return {
        "b. AMAT step / (2 stock passes + 20 input-gradient passes)": ratio(seconds, "AMAT paper", "parts"),
        "b. the same, refinement crossing": ratio(seconds, "AMAT crossing", "parts"),
        "c. AMAT step / SAT step": ratio(seconds, "AMAT paper", "SAT"),
        "c. the same, refinement crossing": ratio(seconds, "AMAT crossing", "SAT"),
        "AMAT step / stock forward-backward pass": ratio(seconds, "AMAT paper", "stock"),
    }


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes held at once beyond what was held before, by torch's allocator."""
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory(device: torch.device) -> dict[str, float]:
    work = Segmentation(device)
    amat = AMAT(1.0, [0.0], steps=3)
    stock = peak_memory(work.stock, device)
    return {
        "d. peak memory, AMAT step / stock step": peak_memory(lambda: work.step(amat), device) / stock,
        "d. the same, backward: sequential": peak_memory(lambda: work.step(amat, sequential=True), device) / stock,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    results = against_torchattacks(args.repeats, device) | training_steps(args.repeats, device) | memory(device)
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:{width}}  {value:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "threads": args.threads, **results}, indent=1))


if __name__ == "__main__":
    main()
