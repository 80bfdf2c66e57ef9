"""APGD against PGD with as many gradients, and both against torchattacks, on one classifier of chest X-rays.

    python benchmarks/attacks.py [--checkpoint FILE [--config FILE]] [--samples 400] [--processes 5] [--json FILE]

(a) Mean loss and accuracy under PGD (steps of 2.5 and 5 radii / N) and under APGD, at equal numbers of gradients.
(b) Accuracy under APGD on cross-entropy of `advmed` and of torchattacks (the APGD-CE of AutoAttack), equal steps.
(c) Time of PGD with 100 steps of `advmed` over that of torchattacks, same images; `--processes 0` leaves it out.

Without a checkpoint of adv-classify (and its run's configuration, or --config), trains a small ResNet adversarially on
the PneumoniaMNIST subset of examples/data first, in about a minute. A ratio of times is the median over the repeats of
one process; of several processes the median and the range are shown. On a CPU up to a tenth of a small network's time
is memory that the C library gives back and asks for anew, and how much depends on what lies where in the process.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchattacks
import yaml
from jsonargparse import ArgumentParser
from timing import interleaved, ratio
from torch import Tensor, nn

from adv_classify import ClassificationObjective
from adv_classify.data import ClassificationData, MedMNIST
from adv_classify.module import RobustClassifier
from adv_classify.network import Network, make_network
from advmed.attacks import APGD, PGD, Attack
from advmed.methods import AT

SOURCE = Path(__file__).resolve().parents[1] / "examples/data/pneumoniamnist/pneumoniamnist.npz"
BOUNDS = (0.0, 1.0)
SCALES = (2.5, 5.0)
NAMES = {2.0: "L2", math.inf: "Linf"}
TIMED = 100


class Classifier:
    """A trained network and images."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> None:
        self.model, self.images, self.labels, self.batch = model, images, labels, batch

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True)

    def ours(self, attack: Attack, radius: float) -> tuple[float, float]:
        """Mean loss and accuracy, in per cent, under an attack of ours."""
        generator = torch.Generator().manual_seed(0)
        losses, hits = [], []
        for images, labels in self.batches():
            objective = ClassificationObjective(self.model, labels)
            result = attack(objective, images, radius, bounds=BOUNDS, generator=generator)
            losses.append(result.terms.sum(1))
            hits.append(self.hits(result.images, labels))
        return torch.cat(losses).mean().item(), 100 * torch.cat(hits).mean().item()

    def theirs(self, attack: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Accuracy in per cent under an attack of torchattacks."""
        hits = [self.hits(attack(images, labels), labels) for images, labels in self.batches()]
        return 100 * torch.cat(hits).mean().item()

    @torch.no_grad()
    def hits(self, images: Tensor, labels: Tensor) -> Tensor:
        return (self.model(images).argmax(1) == labels).float()


def train(data: ClassificationData, eps: float, epochs: int, device: torch.device) -> nn.Module:
    """A small ResNet, by adversarial training in L2."""
    torch.manual_seed(0)
    model = make_network(Network(name="test_resnet"), data.num_classes, data.channels).to(device).train()
    method = AT(eps, steps=5, bounds=BOUNDS)
    loader = torch.utils.data.DataLoader(data.dataset("train", augment=True), 64, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for batch in loader:
            objective = ClassificationObjective(model, batch["label"].to(device))
            optimizer.zero_grad()
            method.step(objective, batch["image"].to(device), batch["id"]).loss.backward()
            optimizer.step()
            schedule.step()
    return model


def read_data(path: Path) -> ClassificationData:
    """The data of a configuration of adv-classify."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(ClassificationData, "data")
    given = parser.parse_object({"data": yaml.safe_load(path.read_text(encoding="utf-8"))["data"]})
    # jsonargparse 4.49 has renamed it, and 5 will have the new name only.
    data: ClassificationData = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(given).data
    return data


def take(data: ClassificationData, splits: Sequence[str], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first images of some splits, and their labels."""
    sets = [data.dataset(split) for split in splits]
    samples = [samples[i] for samples in sets for i in range(len(samples))][:count]
    images, labels = zip(*((sample["image"], int(sample["label"])) for sample in samples), strict=True)
    return torch.stack(images).to(device), torch.tensor(labels, device=device)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{title}\n")
    print(f"| {' | '.join(header)} |")
    print("|" + "---|" * len(header))
    for row in rows:
        print(f"| {' | '.join(f'{cell:.4g}' if isinstance(cell, float) else str(cell) for cell in row)} |", flush=True)


def against_pgd(classifier: Classifier, radii: dict[float, float], steps: Sequence[int]) -> list[list[object]]:
    rows: list[list[object]] = []
    for p, radius in radii.items():
        for number in steps:
            attacks: list[Attack] = [PGD(number, s, p, random_start=1.0, keep="best") for s in SCALES]
            found = [classifier.ours(attack, radius) for attack in (*attacks, APGD(number, p))]
            rows.append([NAMES[p], number, *(loss for loss, _ in found), *(accuracy for _, accuracy in found)])
    return rows


def against_torchattacks(classifier: Classifier, radii: dict[float, float], steps: Sequence[int]) -> list[list[object]]:
    rows: list[list[object]] = []
    for p, radius in radii.items():
        for number in steps:
            reference = torchattacks.APGD(classifier.model, norm=NAMES[p], eps=radius, steps=number, loss="ce")
            rows.append([NAMES[p], number, classifier.ours(APGD(number, p), radius)[1], classifier.theirs(reference)])
    return rows


def times(model: nn.Module, images: Tensor, labels: Tensor, radii: dict[float, float], args: Namespace) -> list[float]:
    """The ratio per radius, of one process. Both look at their last iterate only, as PGD of torchattacks does."""
    torch.set_num_threads(args.threads)
    classifier = Classifier(model.to(args.device), images.to(args.device), labels.to(args.device), args.batch)
    ratios = []
    for p, radius in radii.items():
        settings = {"eps": radius, "alpha": 5 * radius / TIMED, "steps": TIMED, "random_start": True}
        kind = torchattacks.PGDL2 if p == 2 else torchattacks.PGD
        reference = kind(classifier.model, **settings)
        attack = PGD(TIMED, 5.0, p, random_start=1.0)

        def ours(attack: PGD = attack, radius: float = radius) -> None:
            for images, labels in classifier.batches():
                attack(
                    ClassificationObjective(classifier.model, labels), images, radius, bounds=BOUNDS, final_pass=False
                )

        def theirs(reference: Any = reference) -> None:
            for images, labels in classifier.batches():
                reference(images, labels)

        seconds = interleaved({"ours": ours, "theirs": theirs}, args.repeats, classifier.images.device)
        ratios.append(ratio(seconds, "ours", "theirs"))
    return ratios


def times_of_processes(
    classifier: Classifier, radii: dict[float, float], args: Namespace
) -> tuple[list[str], list[list[object]]]:
    task = (classifier.model.cpu(), classifier.images.cpu(), classifier.labels.cpu(), radii, args)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = [pool.apply(times, task) for _ in range(args.processes)]
    header = ["norm", "images", "processes", "repeats", "median", "least", "most"]
    count = [len(classifier.images), args.processes, args.repeats]
    rows = []
    for k, p in enumerate(radii):
        ratios = [ratios[k] for ratios in found]
        rows.append([NAMES[p], *count, statistics.median(ratios), min(ratios), max(ratios)])
    return header, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of adv-classify; default: train a network")
    parser.add_argument("--config", type=Path, help="whose data section is used; default: that of the checkpoint's run")
    parser.add_argument("--split", default="val")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--timed", type=int, default=1000, help="number of images of (c)")
    parser.add_argument("--eps", type=float, default=0.4, help="L2 radius, of the training, too")
    parser.add_argument("--eps_inf", type=float, default=4 / 255)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=10, help="of the training")
    parser.add_argument("--processes", type=int, default=5, help="of (c), one after the other")
    parser.add_argument("--repeats", type=int, default=1, help="in each, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.checkpoint is None:
        data: ClassificationData = MedMNIST(str(SOURCE), flip=0, rotate=10, zoom=0.1)
        model = train(data, args.eps, args.epochs, device)
    else:
        data = read_data(args.config or args.checkpoint.parent.parent / "config.yaml")
        model = RobustClassifier.from_checkpoint(args.checkpoint).network.to(device)
    model = model.eval().requires_grad_(False)
    radii = {2.0: args.eps, math.inf: args.eps_inf}
    classifier = Classifier(model, *take(data, [args.split], args.samples, device), args.batch)
    clean = 100 * classifier.hits(classifier.images, classifier.labels).mean().item()
    print(f"{len(classifier.images)} images, accuracy {clean:.4g} %; L2 radius {args.eps:g}, Linf {args.eps_inf:.4g}")
    columns = [*(f"PGD, {s:g}/N" for s in SCALES), "APGD"]
    header = ["norm", "N", *(f"loss, {c}" for c in columns), *(f"accuracy, {c}" for c in columns)]
    results = {"a": against_pgd(classifier, radii, args.steps)}
    table("(a) Largest loss found, and accuracy (%), with N gradients", header, results["a"])
    results["b"] = against_torchattacks(classifier, radii, args.steps)
    table("(b) Accuracy (%) under APGD-CE", ["norm", "N", "advmed", "torchattacks"], results["b"])
    if args.processes:
        timed = Classifier(model, *take(data, [args.split, "train"], args.timed, device), args.batch)
        header, results["c"] = times_of_processes(timed, radii, args)
        table(f"(c) Time of PGD-{TIMED}, advmed / torchattacks", header, results["c"])
    if args.json:
        about = {"torch": torch.__version__, "threads": args.threads, "device": args.device, "clean": clean}
        args.json.write_text(json.dumps(about | results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
