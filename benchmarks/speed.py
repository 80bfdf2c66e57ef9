"""What our steps cost, as ratios of things measured in the same run, interleaved, on one machine.

    python benchmarks/speed.py [--threads 1] [--device cpu] [--repeats 15] [--json FILE]

(a) PGD-20 of `advmed` against torchattacks' PGDL2 on the same model and batch: as the training methods call it, which
    gives what torchattacks gives; and as `pgd`, which looks at the last iterate once more for its loss terms.
(b) An AMAT step against the sum of its parts: two stock forward-backward passes, and n forward and input-only
    backward passes of the same network and loss.
(c) An AMAT step, with either refinement, against a SAT step with as many attack steps.
(d) Peak memory of an AMAT step against a stock step, with both ways of back-propagating; and of a step of the default
    preset, as our nnU-Net trainers make it.
(e) A step of the default preset against a standard step, each with the host's optimizer: samples that were met before,
    and for AMAT also samples that are met for the first time.
(f) A look at the strength of the attack against 2 % of the steps between two looks.

A time is the median over repeats; a ratio is the median of the ratios within one repeat.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchattacks
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from timing import PeakMemory, default_rows, interleaved, new_samples, ratio
from torch import Tensor, nn

from adv_nnunet.objective import SampleTerms, SegmentationObjective
from adv_nnunet.settings import Settings
from advmed.attacks import PGD, pgd
from advmed.methods import AMAT, SAT, Method
from advmed.thresholds import Thresholds
from advmed.training.run import strength_check

STEPS = 20
MARK = 0.02
"""What looking at the strength of the attack may add to the time of a training."""


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
        # nnU-Net's optimizer, at a rate that leaves the network where it is
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), 1e-5, weight_decay=3e-5, momentum=0.99, nesterov=True
        )
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

    def standard(self) -> None:
        """The stock training step, on a CPU."""
        self.stock()
        self.optimize()

    def optimize(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.optimizer.step()

    def method(self, name: str) -> Method:
        """A training method of the default preset, as nnU-Net's settings make it."""
        settings = Settings().resolved(1, self.images.shape[2:])
        return settings.make_method(name, Thresholds((1.0,), self.terms.names))

    def default(self, method: Method, ids: Sequence[str] | None = None) -> None:
        """The training step of our trainers: where the first gradient is shared, they back-propagate at once."""
        self.step(method, sequential=True, ids=ids)
        self.optimize()

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

    def step(self, method: Method, sequential: bool = False, ids: Sequence[str] | None = None) -> None:
        self.network.zero_grad(set_to_none=True)
        if sequential:
            method.step(self.objective, self.images, ids or self.ids, backward=lambda loss: loss.backward())
        else:
            method.step(self.objective, self.images, ids or self.ids).loss.backward()


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


def default_preset(repeats: int, device: torch.device) -> dict[str, float]:
    work = Segmentation(device)
    sat, amat, new, strangers = work.method("SAT"), work.method("AMAT"), work.method("AMAT"), new_samples(16)
    steps: dict[str, Callable[[], object]] = {
        "e. SAT": lambda: work.default(sat),
        "e. AMAT": lambda: work.default(amat),
        "e. AMAT, new samples": lambda: work.default(new, next(strangers)),
    }
    return default_rows(work.standard, steps, repeats, device)


def looking(repeats: int, device: torch.device) -> dict[str, float]:
    work = Segmentation(device)
    found = {}
    for name in ("SAT", "AMAT"):
        method = work.method(name)
        check = strength_check(method)
        assert check is not None
        adversarial = method.step(work.objective, work.images, work.ids).adversarial
        assert adversarial is not None
        seconds = interleaved(
            {
                "look": partial(check.look, work.objective, work.images, adversarial),
                "step": partial(work.default, method),
            },
            repeats,
            device,
        )
        row = f"f. {name}: look at the attack's strength / {MARK:.0%} of the {check.every} steps between two"
        found[row] = ratio(seconds, "look", "step") / (MARK * check.every)
    return found


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    run()
    with PeakMemory(device) as peak:
        run()
    return peak.bytes


def memory(device: torch.device) -> dict[str, float]:
    work = Segmentation(device)
    amat, default = AMAT(1.0, [0.0], steps=3), work.method("AMAT")
    stock = peak_memory(work.stock, device)
    return {
        "d. peak memory, AMAT step / stock step": peak_memory(lambda: work.step(amat), device) / stock,
        "d. the same, backward: sequential": peak_memory(lambda: work.step(amat, sequential=True), device) / stock,
        "d. the same, default preset": peak_memory(lambda: work.step(default, sequential=True), device) / stock,
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
    results |= default_preset(args.repeats, device) | looking(args.repeats, device)
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:{width}}  {value:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "threads": args.threads, **results}, indent=1))


if __name__ == "__main__":
    main()
