"""What our steps cost on the landmark U-Net, as ratios of things measured in the same run, interleaved.

    python benchmarks/landmark_speed.py [--encoder resnet18] [--height 96] [--width 64] [--threads 1] [--repeats 9]

(a) An AMAT step with n attack steps against the sum of its passes: two forward-backward passes, and n forward and
    input-only backward ones, each with the loss.
(b) An AMAT step against a SAT step.
(c) Decoding a batch against a forward pass of it.
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

from adv_landmark import LandmarkAttack, MethodOptions, RobustLandmarks
from adv_landmark.maps import decode
from adv_landmark.network import Network, make_network
from adv_landmark.objective import LandmarkObjective
from advmed.guard import preserved
from advmed.methods import AMAT, SAT, Method
from advmed.thresholds import Thresholds

LANDMARKS = 19


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size, radius = (args.height, args.width), 0.05 * max(args.height, args.width)
    network = make_network(Network(encoder=args.encoder), LANDMARKS, 3).to(device).train()
    images = torch.rand(args.batch, 3, *size, device=device) * 2 - 1
    points = torch.rand(args.batch, LANDMARKS, 2, device=device) * torch.tensor((args.width - 1, args.height - 1)).to(
        device
    )
    ids = [str(i) for i in range(args.batch)]

    def objective() -> LandmarkObjective:
        return LandmarkObjective(network, points, size, radius=radius)

    def passes() -> None:
        loss = objective()
        for _ in range(2):
            loss(images).sum(1).mean().backward()
        with preserved(network):
            for _ in range(args.steps):
                inputs = images.detach().requires_grad_()
                torch.autograd.grad(loss(inputs).sum(), inputs)

    def step(method: Method) -> None:
        method.step(objective(), images, ids).loss.backward()

    def forward() -> None:
        with torch.no_grad():
            network(images)

    attack: dict[str, Any] = {"steps": args.steps, "bounds": (-1.0, 1.0)}
    amat, sat = AMAT(1.0, [1.0, 1.0, 1.0], **attack), SAT(1.0, **attack)
    with torch.no_grad():
        maps = network(images)
    work = {
        "passes": passes,
        "AMAT": lambda: step(amat),
        "SAT": lambda: step(sat),
        "forward": forward,
        "decode": lambda: decode(maps, radius),
    }
    seconds = interleaved(work, args.repeats, device)
    found = {
        f"a. AMAT step / (2 training passes + {args.steps} input-gradient passes)": ratio(seconds, "AMAT", "passes"),
        "b. AMAT step / SAT step": ratio(seconds, "AMAT", "SAT"),
        "c. decoding / forward pass": ratio(seconds, "decode", "forward"),
    }
    # The host's default optimizer, at a rate that leaves the network where it is.
    optimizer = torch.optim.AdamW(network.parameters(), 1e-6, weight_decay=1e-4)

    def make(name: str) -> Method:
        settings = MethodOptions(name=name).with_attack(LandmarkAttack())
        settings = RobustLandmarks.resolved(settings, images[0].numel())
        return settings.make_method(name, Thresholds((1.0, 1.0, 1.0), LandmarkObjective.names))

    def standard() -> None:
        loss = objective()(images).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def default(method: Method, ids: Sequence[str] = ids) -> None:
        loss = method.step(objective(), images, ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    new, strangers = make("AMAT"), new_samples(args.batch)
    steps: dict[str, Callable[[], object]] = {f"d. {name}": partial(default, make(name)) for name in ("SAT", "AMAT")}
    steps["d. AMAT, new images"] = lambda: default(new, next(strangers))
    found |= default_rows(standard, steps, args.repeats, device)
    for name, value in found.items():
        print(f"{name:<70} {value:.3f}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
