"""What our steps cost on a YOLO detector, as ratios of things measured in the same run, interleaved.

    python benchmarks/yolo_speed.py [--model yolov8n.yaml] [--imgsz 320] [--batch 8] [--threads 1] [--repeats 5]

(a) An AMAT step with n attack steps against the sum of its parts: two stock forward-backward passes, and n forward and
    input-only backward passes of the same network and the stock loss.
(b) The per-image losses against the stock batch loss: forward and backward of the loss alone, on given predictions.
(c) An AMAT step, with either refinement, against a SAT step with as many attack steps.
(d) A step of the default preset, as our trainers make it, against a standard step, each with the host's optimizer:
    images that were met before, and for AMAT also images that are met for the first time.

A time is the median over repeats; a ratio is the median of the ratios within one repeat. The images are those of the
embedded blood cell data, with their labels.
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
from torch import Tensor
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_det_dataset

from adv_yolo.calibration import CleanBatches
from adv_yolo.objective import DetectionObjective, ImageTerms, make_criterion
from adv_yolo.settings import Settings
from advmed.guard import frozen_statistics, preserved
from advmed.methods import AMAT, SAT, Method
from advmed.thresholds import Thresholds

DATA = Path(__file__).resolve().parents[1] / "examples" / "data" / "bccd" / "bccd.yaml"


class Detector:
    """A network from scratch with one real batch."""

    def __init__(self, model: str, imgsz: int, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.network = YOLO(model).model.to(device).train()
        arguments = get_cfg(overrides={"imgsz": imgsz, "batch": batch, "task": "detect"})
        source = CleanBatches(self.network, check_det_dataset(str(DATA)), arguments, device)
        self.batch: dict[str, Any] = next(iter(source))
        self.images: Tensor = self.batch["img"]
        self.criterion = make_criterion(self.network)
        self.terms = ImageTerms(self.network)
        self.ids = list(self.batch["im_file"])
        # SGD as the host has it, at a rate that leaves the network where it is
        self.optimizer = torch.optim.SGD(self.network.parameters(), 1e-6, momentum=0.937, nesterov=True)

    def stock(self) -> None:
        """A forward-backward pass as the host makes it."""
        loss, _ = self.criterion(self.network(self.images), self.batch)
        loss.sum().backward()

    def input_gradients(self, steps: int) -> None:
        """The passes that no attack can do without."""
        with preserved(self.network):
            for _ in range(steps):
                images = self.images.detach().requires_grad_()
                loss, _ = self.criterion(self.network(images), self.batch)
                torch.autograd.grad(loss.sum(), images)

    def optimize(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 10)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def standard(self) -> None:
        """A training step as the host makes it."""
        self.stock()
        self.optimize()

    def method(self, name: str) -> Method:
        """A training method of the default preset, as the settings make it."""
        settings = Settings().resolved(3, self.images.shape[-1], 0)
        return settings.make_method(name, Thresholds((5.0,) * len(self.terms.names), self.terms.names))

    def default(self, method: Method, ids: Sequence[str] | None = None) -> None:
        """A training step of our trainers, whose attack begins with the gradient of the host's forward pass."""
        self.images.requires_grad_()
        given, hold = self.network(self.images), partial(frozen_statistics, self.network)
        objective = DetectionObjective(self.network, self.terms, self.batch, given, hold)
        loss = method.step(objective, self.images, ids or self.ids).loss
        self.images.requires_grad_(False)
        loss.backward()
        self.optimize()

    def step(self, method: Any) -> None:
        """The host's forward pass, then the method."""
        objective = DetectionObjective(self.network, self.terms, self.batch, self.network(self.images))
        method.step(objective, self.images, self.ids).loss.backward()


def loss_alone(detector: Detector, repeats: int, device: torch.device) -> dict[str, float]:
    with torch.no_grad():
        given = detector.network(detector.images)
    leaves = {key: value.detach().requires_grad_() for key, value in given.items() if isinstance(value, Tensor)}
    given = {**given, **leaves}

    def stock() -> None:
        loss, _ = detector.criterion(given, detector.batch)
        torch.autograd.grad(loss.sum(), list(leaves.values()))

    def per_image() -> None:
        torch.autograd.grad(detector.terms(given, detector.batch).sum(), list(leaves.values()))

    seconds = interleaved({"stock": stock, "per image": per_image}, max(20, repeats), device)
    return {"b. per-image losses / stock batch loss, forward and backward": ratio(seconds, "per image", "stock")}


def steps(detector: Detector, number: int, repeats: int, device: torch.device) -> dict[str, float]:
    attack: dict[str, Any] = {"steps": number, "bounds": (0.0, 1.0)}
    thresholds = [1e9] * len(detector.terms.names)
    methods = {
        "AMAT": AMAT(3.5, thresholds, **attack),
        "crossing": AMAT(3.5, thresholds, refinement="crossing", **attack),
        "SAT": SAT(3.5, **attack),
    }

    def parts() -> None:
        detector.stock()
        detector.stock()
        detector.input_gradients(number)

    work = {"parts": parts, "stock": detector.stock} | {
        name: lambda method=method: detector.step(method) for name, method in methods.items()
    }
    seconds = interleaved(work, repeats, device)
    return {
        f"a. AMAT step / (2 stock passes + {number} input-gradient passes)": ratio(seconds, "AMAT", "parts"),
        "a. the same, refinement crossing": ratio(seconds, "crossing", "parts"),
        "c. AMAT step / SAT step": ratio(seconds, "AMAT", "SAT"),
        "c. the same, refinement crossing": ratio(seconds, "crossing", "SAT"),
        "AMAT step / stock forward-backward pass": ratio(seconds, "AMAT", "stock"),
    }


def default_preset(detector: Detector, repeats: int, device: torch.device) -> dict[str, float]:
    sat, amat, new = (detector.method(name) for name in ("SAT", "AMAT", "AMAT"))
    strangers = new_samples(len(detector.ids))
    steps: dict[str, Callable[[], object]] = {
        "d. SAT": lambda: detector.default(sat),
        "d. AMAT": lambda: detector.default(amat),
        "d. AMAT, new images": lambda: detector.default(new, next(strangers)),
    }
    return default_rows(detector.standard, steps, repeats, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolov8n.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    detector = Detector(args.model, args.imgsz, args.batch, device)
    found = loss_alone(detector, args.repeats, device) | steps(detector, args.steps, args.repeats, device)
    found |= default_preset(detector, args.repeats, device)
    for name, value in sorted(found.items()):
        print(f"{name:<64} {value:.3f}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
