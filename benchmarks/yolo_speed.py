"""What our steps cost on a YOLO detector, as ratios of things measured in the same run, interleaved.

    python benchmarks/yolo_speed.py [--model yolov8n.yaml] [--imgsz 320] [--batch 8] [--threads 1] [--repeats 5]

(a) An AMAT step with n attack steps against the sum of its parts: two stock forward-backward passes, and n forward and
    input-only backward passes of the same network and the stock loss.
(b) The per-image losses against the stock batch loss: forward and backward of the loss alone, on given predictions.
(c) An AMAT step, with either refinement, against a SAT step with as many attack steps.

A time is the median over repeats; a ratio is the median of the ratios within one repeat. The images are those of the
embedded blood cell data, with their labels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, ratio
from torch import Tensor
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_det_dataset

from adv_yolo.calibration import CleanBatches
from adv_yolo.objective import DetectionObjective, ImageTerms, make_criterion
from advmed.guard import preserved
from advmed.methods import AMAT, SAT

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

    def step(self, method: Any) -> None:
        """A step as our trainer makes it: the host's forward pass, then the method."""
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
    for name, value in sorted(found.items()):
        print(f"{name:<62} {value:.3f}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
