"""Do attacks of other libraries find what `standard` does not? Minimum-norm and fixed-radius ones, on trained networks.

    python benchmarks/others.py digits [--images 300]            foolbox and torchattacks, L2 and Linf
    python benchmarks/others.py xrays --model zoo/pneumonia/AMAT [--images 100]            foolbox, L2
    python benchmarks/others.py nnunet --model FOLDER [--samples 24] [--levels 0.05 0.1]     adv-lib, Linf
    python benchmarks/others.py yolo --model last.pt --data bccd.yaml [--samples 12] [--level 0.004]   ART, Linf

Needs foolbox, adv-lib or adversarial-robustness-toolbox, which are no dependencies of ours. The model folder is one of
nnU-Net's, with its environment variables set. An attack that looks for the smallest noise has succeeded at a level if
it needs no more. For every level: the metric under `standard`, and under each of the others.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from autoattack import LEVELS, trained
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import stock  # found by the line above

from advmed import ClassificationObjective, Standard
from advmed.attacks.problem import broadcast
from advmed.attacks.standard import judge_of
from advmed.evaluation.loop import EvaluationBatch, evaluate
from advmed.norms import norm as lengths

Attack = Callable[[float], Tensor]
"""A level to images."""


def within(images: Tensor, found: Tensor, level: float, norm: float) -> Tensor:
    """What was found where its noise is within the level, the image elsewhere."""
    inside = lengths(found - images, norm) <= level * (1 + 1e-5)
    return torch.where(broadcast(inside, images), found, images)


def digits(options: argparse.Namespace) -> None:
    """Accuracy of a small network on digits."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    count = options.images
    x, y = images[:count], labels[:count]
    for norm, levels in LEVELS.items():
        model = trained(0, norm, images[count:], labels[count:])
        classify(model, x, y, norm, levels, 10)


def xrays(options: argparse.Namespace) -> None:
    """Accuracy of a network of the zoo on the first chest X-rays that validate it."""
    with np.load(stock.DATA / "pneumoniamnist" / "pneumoniamnist.npz") as archive:
        images, labels = (archive[f"val_{name}"][: options.images] for name in ("images", "labels"))
    x, y = torch.from_numpy(images).float()[:, None] / 255, torch.from_numpy(labels).flatten().long()
    classify(stock.classifier(options.model), x, y, 2, (0.2, 0.4, 0.8), 2)


def classify(model: nn.Module, x: Tensor, y: Tensor, norm: float, levels: Sequence[float], classes: int) -> None:
    """Accuracy under `standard`, foolbox and torchattacks, whose AutoAttack wants four classes."""
    import foolbox

    objective = ClassificationObjective(model, y)
    theirs = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    if norm == 2:
        kinds: dict[str, Any] = {
            "foolbox L2PGD, 100 steps": foolbox.attacks.L2PGD(steps=100),
            "foolbox DDN, 100 steps": foolbox.attacks.DDNAttack(steps=100),
            "foolbox Carlini-Wagner, 9 x 200 steps": foolbox.attacks.L2CarliniWagnerAttack(9, 200),
            "foolbox FMN, 100 steps": foolbox.attacks.L2FMNAttack(steps=100),
        }
    else:
        kinds = {
            "foolbox LinfPGD, 100 steps": foolbox.attacks.LinfPGD(steps=100),
            "foolbox FMN, 100 steps": foolbox.attacks.LInfFMNAttack(steps=100),
        }
    smallest = {name: kind(theirs, x, y, epsilons=None)[0] for name, kind in kinds.items() if "PGD" not in name}
    print(f"clean {(~objective.terms_and_errors(x)[1]).float().mean():.3f}")
    for level in levels:
        found = Standard("classification", norm)(
            objective,
            x,
            level,
            bounds=(0.0, 1.0),
            generator=torch.Generator().manual_seed(0),
            judge=judge_of(objective),
        )
        right = ~objective.terms_and_errors(found.images)[1]
        print(f"\nL{norm:g}, {level:g}: standard {right.float().mean():.3f}")
        others = {name: within(x, value, level, norm) for name, value in smallest.items()}
        others |= {name: kind(theirs, x, y, epsilons=level)[1] for name, kind in kinds.items() if "PGD" in name}
        if classes >= 4:
            import torchattacks

            torch.manual_seed(0)
            single = torchattacks.AutoAttack(model, "L2" if norm == 2 else "Linf", level, n_classes=classes)
            others["torchattacks AutoAttack"] = single(x, y)
        for name, value in others.items():
            own = ~objective.terms_and_errors(value)[1]
            print(f"  {name}: {own.float().mean():.3f}; only it succeeds: {int((right & ~own).sum())}", flush=True)


class Rescaled(nn.Module):
    """A network for images in [0, 1], which adv-lib takes for granted."""

    def __init__(self, model: nn.Module, low: float, width: float) -> None:
        super().__init__()
        self.model, self.low, self.width = model, low, width

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images * self.width + self.low)
        return logits


def nnunet(options: argparse.Namespace) -> None:
    """Dice of an nnU-Net's slices in Linf."""
    from adv_lib.attacks.segmentation import alma_prox, dag, pdpgd

    from adv_nnunet import evaluate as host

    model = host.load_model("model", options.model, 0, torch.device("cpu"), file="checkpoint_final.pth")
    cases = host.validation_cases(model, 0)
    samples = host.list_samples(model, cases, options.samples)
    metric = host.metrics(model.planar)[0]
    loaded = host.make_batches(model, cases, samples, options.samples)[0].load()
    x, target = loaded.images, loaded.targets[0][:, 0].clamp_min(0).long()
    low, high = float(x.min()), float(x.max())
    bounds, width = (low, high), high - low
    scaled, inputs = Rescaled(model.window, low, width), (x - low) / width
    found = evaluate(
        [EvaluationBatch([s.id for s in samples[: len(x)]], lambda: loaded)],
        {"standard": Standard("segmentation", math.inf)},
        [0, *options.levels],
        bounds=bounds,
        criterion=metric,
    )

    def dice(images: Tensor) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(metric.per_sample({k: v.numpy() for k, v in loaded.score(images).items()}))

    # Only the voxels of structures are to turn, where there are any: nine in ten others are background, and an attack
    # that wants them all finds no small noise. (Constraint masking, on by default, fails where a structure is small.)
    organ = target > 0
    masks = torch.where(organ.flatten(1).any(1)[:, None, None], organ, torch.ones_like(organ))
    kinds: dict[str, Callable[[], Tensor]] = {
        f"ALMA-prox, 500 steps, {share:.0%} of a structure": lambda share=share: alma_prox(
            scaled, inputs, target, masks=masks, adv_threshold=share, constraint_masking=False
        )
        for share in (0.99, 0.5)
    }
    kinds["PDPGD, 500 steps"] = lambda: pdpgd(scaled, inputs, target, norm=float("inf"), masks=masks, primal_lr=0.01)
    kinds["DAG, 200 steps of 0.003"] = lambda: dag(scaled, inputs, target, masks=masks, γ=0.003)
    print(f"clean {np.nanmean(dice(x)):.4f}")
    others = {}
    for name, kind in kinds.items():
        others[name] = kind().detach() * width + low
        print(f"{name}: done", flush=True)
    for level in options.levels:
        own = np.asarray(metric.per_sample(found.scores("standard", level)))
        print(f"\nLinf {level:g}: standard {np.nanmean(own):.4f}")
        for name, value in others.items():
            lengths_ = lengths(value - x, math.inf)
            within_ = dice(within(x, value, level, math.inf))
            # Noise that is too large is cut off at the level: kinder to the attack than to say that it has failed.
            cut = dice((x + (value - x).clamp(-level, level)).clamp(*bounds))
            beyond = float(np.nanmax(np.nan_to_num(own, nan=1.0) - np.nan_to_num(cut, nan=1.0)))
            print(
                f"  {name}: {np.nanmean(within_):.4f}, cut off there {np.nanmean(cut):.4f} (of one slice at most "
                f"{beyond:+.3f} beyond standard); smallest noise, median {lengths_.median():.3f}",
                flush=True,
            )


def yolo(options: argparse.Namespace) -> None:
    """MAP50 of a detector in Linf, under ART's PGD through its estimator."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.object_detection import PyTorchYolo
    from ultralytics import YOLO
    from ultralytics.data.utils import check_det_dataset

    from adv_yolo import evaluate as host

    info = check_det_dataset(str(options.data))
    given = {"imgsz": options.size, "batch": options.samples, "split": "val", "workers": 0}
    model = host.load_model("model", options.model, info, given, torch.device("cpu"), Path("build"))
    metrics = host.metrics(model.network.names)
    batch = host.make_batches(model, None, options.samples)[0]
    loaded = batch.load()
    x = loaded.images
    found = evaluate(
        [EvaluationBatch(batch.ids, lambda: loaded)],
        {"standard": Standard("detection", math.inf)},
        [0, options.level],
        bounds=(0.0, 1.0),
        criterion=metrics[2],
    )
    print(f"clean {metrics[1].of(found.clean.scores):.4f}; standard {found.curve('standard', metrics[1])[1]:.4f}")
    index, classes, boxes = loaded.targets
    sides = torch.tensor([x.shape[3], x.shape[2]] * 2)
    targets = []
    for i in range(len(x)):
        centre, size = (boxes[index == i] * sides).split(2, 1)
        corners = torch.cat([centre - size / 2, centre + size / 2], 1).numpy()
        targets.append({"boxes": corners, "labels": classes[index == i].flatten().long().numpy()})
    wrapped = YOLO(str(options.model)).model
    estimator = PyTorchYolo(
        wrapped,
        input_shape=tuple(x.shape[1:]),
        clip_values=(0, 1),
        attack_losses=("loss_total",),
        device_type="cpu",
        is_ultralytics=True,
        model_name=options.name,
    )
    # ART's wrapper takes the parts of the loss for a list; Ultralytics names them since 8.4.
    whole = estimator.model.model.criterion
    estimator.model.model.criterion = lambda *given: (lambda loss, parts: (loss, [*parts.values()]))(*whole(*given))
    attack = ProjectedGradientDescent(
        estimator, eps=options.level, eps_step=options.level / 20, max_iter=100, verbose=False
    )
    noisy = torch.from_numpy(attack.generate(x.numpy(), targets)).float()
    with torch.no_grad():
        scores = {name: value.numpy() for name, value in loaded.score(noisy).items()}
    print(f"ART's PGD, 100 steps: {metrics[1].of(scores):.4f}; noise {float((noisy - x).abs().max()):.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "xrays", "nnunet", "yolo"))
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--name", default="yolov8n", help="of the architecture, for ART")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--level", type=float, default=2 / 255)
    options = parser.parse_args()
    {"digits": digits, "xrays": xrays, "nnunet": nnunet, "yolo": yolo}[options.what](options)


if __name__ == "__main__":
    main()
