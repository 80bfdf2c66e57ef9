"""What our steps cost on a classifier, as ratios of things measured in the same run, interleaved.

    python benchmarks/classify_speed.py [--network resnet18] [--size 64] [--batch 16] [--threads 1] [--repeats 9]

(a) A DPAAT step with n attack steps against an AT step with as many: it needs the clean pass, too.
(b) A DPAAT step against the sum of its passes: two forward-backward passes, and n forward and input-only backward ones.
(c) A TRADES step against the same sum; its attack starts from the clean pass that it makes anyway.
(d) A step of the default preset against a standard step, each with the host's optimizer: images that were met before,
    and for AMAT also images that are met for the first time.

A time is the median over repeats; a ratio is the median of the ratios within one repeat. Images are random.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import default_rows, interleaved, new_samples, ratio
from torch.nn.functional import cross_entropy

from adv_classify import ClassificationObjective, ClassifierAttack, MethodOptions, RobustClassifier
from adv_classify.network import Network, make_network
from advmed.guard import preserved
from advmed.methods import AT, DPAAT, TRADES, Method
from advmed.thresholds import Thresholds

CLASSES = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    network = make_network(Network(name=args.network), CLASSES, 3).to(device).train()
    images = torch.rand(args.batch, 3, args.size, args.size, device=device)
    labels = torch.randint(CLASSES, (args.batch,), device=device)
    ids = [str(i) for i in range(args.batch)]

    def passes() -> None:
        for _ in range(2):
            cross_entropy(network(images), labels).backward()
        with preserved(network):
            for _ in range(args.steps):
                inputs = images.detach().requires_grad_()
                torch.autograd.grad(cross_entropy(network(inputs), labels), inputs)

    def step(method: Method) -> None:
        method.step(ClassificationObjective(network, labels), images, ids).loss.backward()

    attack: dict[str, Any] = {"steps": args.steps, "bounds": (0.0, 1.0)}
    methods = {
        "AT": AT(1.0, **attack),
        "DPAAT": DPAAT(1.0, **attack),
        "no sync": DPAAT(1.0, sync_weight=0, **attack),
        "TRADES": TRADES(1.0, **attack),
    }
    work: dict[str, Any] = {"passes": passes}
    work |= {name: lambda method=method: step(method) for name, method in methods.items()}
    seconds = interleaved(work, args.repeats, device)
    found = {
        "a. DPAAT step / AT step": ratio(seconds, "DPAAT", "AT"),
        "a. the same, without the synchronisation loss": ratio(seconds, "no sync", "AT"),
        f"b. DPAAT step / (2 training passes + {args.steps} input-gradient passes)": ratio(seconds, "DPAAT", "passes"),
        "c. TRADES step / the same sum": ratio(seconds, "TRADES", "passes"),
    }
    # The host's default optimizer, at a rate that leaves the network where it is.
    optimizer = torch.optim.AdamW(network.parameters(), 1e-6, weight_decay=0.01)

    def make(name: str) -> Method:
        settings = MethodOptions(name=name).with_attack(ClassifierAttack())
        settings = RobustClassifier.resolved(settings, images[0].numel())
        return settings.make_method(name, Thresholds((2.0,), ClassificationObjective.names))

    def standard() -> None:
        loss = cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def default(method: Method, ids: Sequence[str] = ids) -> None:
        loss = method.step(ClassificationObjective(network, labels), images, ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    new, strangers = make("AMAT"), new_samples(args.batch)
    steps: dict[str, Callable[[], object]] = {
        f"d. {name}": partial(default, make(name)) for name in ("SAT", "AMAT", "DPAAT")
    }
    steps["d. AMAT, new images"] = lambda: default(new, next(strangers))
    found |= default_rows(standard, steps, args.repeats, device)
    for name, value in found.items():
        print(f"{name:<70} {value:.3f}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
