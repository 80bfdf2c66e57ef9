"""What our steps cost on a classifier, as ratios of things measured in the same run, interleaved.

    python benchmarks/classify_speed.py [--network resnet18] [--size 64] [--batch 16] [--threads 1] [--repeats 9]

(a) A DPAAT step with n attack steps against an AT step with as many: it needs the clean pass, too.
(b) A DPAAT step against the sum of its passes: two forward-backward passes, and n forward and input-only backward ones.
(c) A TRADES step against the same sum; its attack starts from the clean pass that it makes anyway.

A time is the median over repeats; a ratio is the median of the ratios within one repeat. Images are random.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, ratio
from torch.nn.functional import cross_entropy

from adv_classify import ClassificationObjective
from adv_classify.network import Network, make_network
from advmed.guard import preserved
from advmed.methods import AT, DPAAT, TRADES, Method

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
    for name, value in found.items():
        print(f"{name:<70} {value:.3f}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
