"""Rules for AMAT's margins, thresholds and attack steps, beside SAT, on slices of the hippocampus data; a small U-Net.

    python benchmarks/margins.py --data FOLDER --work FOLDER --jobs 2 [--seeds 0 1 2] [--only REGEX]
    python benchmarks/margins.py --work FOLDER --table [--stronger]

FOLDER of --data holds the data set in nnU-Net's raw layout with splits_final.json. A standard network is trained for
each seed, thresholds are measured on what training sees, and every run starts from that network, with as many slices.
One thread a run; a run that is finished is not done again. The whole list takes hours: --only chooses. What was found
is in docs/results/margins.md. Every network is kept, and evaluated under two attacks: PGD-40, and the stronger
APGD-50, whose numbers --stronger tabulates.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from fronts import beyond
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adv_nnunet.objective import SampleTerms, SegmentationObjective
from advmed import AMAT, APGD, PGD, SAT, STD, TermStatistics, WeightPerturbation
from advmed.evaluation.auc import auc_robust
from advmed.guard import preserved
from advmed.methods import AdversarialMethod, Method

SHAPE, BATCH, LEVELS = (56, 40), 16, (0.0, 2.0, 6.0, 10.0)
STANDARD_STEPS, STEPS, RATE, FINE_RATE = 4000, 1000, 0.01, 0.01  # a quarter, as the hosts' preset has it
AVERAGE = 0.99  # decay of the average of the weights, which is evaluated, too, of some runs
AVERAGED = ("SAT 3.5", "AMAT secant, on the crossing, estimate, mean+2std")
FAST: dict[str, Any] = {"steps": 3, "step_scale": 1.75, "schedule": "decreasing", "share_gradient": True}
PAPER: dict[str, Any] = {"steps": 20, "step_scale": 4.0}
AWP, AS_LONG = 0.005, 1600
"""Share by which weights are moved, and the steps of a training without that make as many passes: 16 thirds for 10."""
LENGTHS = {2: 1.5, 3: 1.75, 5: 2.3}
"""Of all steps together, in radii, by their number."""


def amat(rule: str, std: float, **changes: Any) -> dict[str, Any]:
    """An AMAT run with xi = mean + std standard deviations and margins up to 20.

    The hosts' bounds come from eps, 4.7 for slices of this size: margins to 8 eps, their first values to eps.
    """
    return {"method": "AMAT", "std": std, **FAST, "delta": 0.5, "refinement": rule, "margin_max": 20.0, **changes}


CROSSING: dict[str, Any] = {"train_on": "crossing"}
ESTIMATE: dict[str, Any] = {"start": "estimate", "start_max": 5.0}
START: dict[str, Any] = {**CROSSING, **ESTIMATE}
RUNS: dict[str, dict[str, Any]] = {
    "STD on": {"method": "STD"},
    **{f"SAT 3.5, rate {rate}": {"method": "SAT", "eps": 3.5, **FAST, "rate": rate} for rate in (0.0005, 0.002, 0.005)},
    **{f"SAT {eps:g}": {"method": "SAT", "eps": eps, **FAST} for eps in (1, 2, 3.5, 5, 7)},
    **{f"SAT {eps:g}, PGD-20": {"method": "SAT", "eps": eps, **PAPER} for eps in (2, 5)},
    **{f"AMAT paper, mean+{std:g}std": amat("paper", std, delta=1.0) for std in (0, 1, 2)},
    **{f"AMAT secant, mean+{std:g}std": amat("secant", std) for std in (1, 2)},
    **{f"AMAT secant, estimate, mean+{std:g}std": amat("secant", std, **ESTIMATE) for std in (0, 1, 2, 4)},
    **{f"AMAT secant, on the crossing, mean+{std:g}std": amat("secant", std, **CROSSING) for std in (1, 2)},
    **{
        f"AMAT secant, on the crossing, estimate, mean+{std:g}std": amat("secant", std, **START) for std in (0, 1, 2, 4)
    },
    **{
        f"AMAT secant, estimate, median+{spread}spread": amat(
            "secant", 0, **ESTIMATE, threshold_rule=f"median+{spread}spread"
        )
        for spread in (2, 3)
    },
    **{
        f"AMAT secant, estimate, mean+{std:g}std, floor {floor:g}": amat("secant", std, **ESTIMATE, margin_min=floor)
        for std, floor in ((1, 1), (2, 1), (2, 2), (2, 3), (1, 2))
    },
    **{f"SAT {eps:g}, long": {"method": "SAT", "eps": eps, **FAST, "train_steps": 3 * STEPS} for eps in (3.5, 5)},
    **{
        f"AMAT secant, estimate, mean+{std:g}std, long": amat("secant", std, **ESTIMATE, train_steps=3 * STEPS)
        for std in (1, 2)
    },
    **{f"AMAT balanced, on the crossing, estimate, mean+{std:g}std": amat("balanced", std, **START) for std in (1, 2)},
    "AMAT balanced, mean+2std": amat("balanced", 2),
    **{f"AMAT paper, on the crossing, mean+{std:g}std": amat("paper", std, **CROSSING) for std in (1, 2)},
    **{
        f"AMAT secant, on the crossing, estimate, mean+2std, {steps} steps": amat(
            "secant", 2, **START, **{"steps": steps, "step_scale": LENGTHS[steps]}
        )
        for steps in (2, 5)
    },
    **{
        f"AMAT secant, estimate, mean+{std:g}std, 5 steps": amat(
            "secant", std, **ESTIMATE, **{"steps": 5, "step_scale": LENGTHS[5]}
        )
        for std in (2, 3)
    },
    **{
        f"SAT {eps:g}, {steps} steps": {
            "method": "SAT",
            "eps": eps,
            **FAST,
            "steps": steps,
            "step_scale": LENGTHS[steps],
        }
        for eps in (2, 3.5, 5)
        for steps in (2, 5)
    },
    "SAT 3.5, AWP": {"method": "SAT", "eps": 3.5, **FAST, "awp": AWP},
    "SAT 3.5, as long as with AWP": {"method": "SAT", "eps": 3.5, **FAST, "train_steps": AS_LONG},
    "AMAT secant, estimate, mean+2std, AWP": amat("secant", 2, **ESTIMATE, awp=AWP),
    "AMAT secant, estimate, mean+2std, as long as with AWP": amat("secant", 2, **ESTIMATE, train_steps=AS_LONG),
    **{
        f"{name}, {decay}": {**run, "decay": kind}
        for name, run in (
            ("SAT 3.5", {"method": "SAT", "eps": 3.5, **FAST}),
            ("AMAT secant, estimate, mean+2std", amat("secant", 2, **ESTIMATE)),
        )
        for decay, kind in (("a late decay", "step"), ("a late line", "line"))
    },
    **{
        f"AMAT secant, estimate, any's margin, mean+{std:g}std": amat("secant", std, **ESTIMATE, margin_of="any")
        for std in (1, 2, 4)
    },
    **{
        f"{name}, as short as the demo{decay}": {**run, "train_steps": 250, "rate": 0.03, "decay": kind}
        for name, run in (
            ("SAT 3.5", {"method": "SAT", "eps": 3.5, **FAST}),
            ("AMAT secant, estimate, mean+2std", amat("secant", 2, **ESTIMATE)),
        )
        for decay, kind in (("", "host"), (", a late decay", "step"), (", a late line", "line"))
    },
    **{f"SAT {eps:g}, growing": {"method": "SAT", "eps": eps, **FAST, "ramp": 0.8} for eps in (3.5, 5, 7)},
    **{
        f"AMAT paper, PGD-20, mean+{std:g}std": {
            **{"method": "AMAT", "std": std, "delta": 0.5, "refinement": "paper", "share_gradient": False},
            **PAPER,
        }
        for std in (1, 2)
    },
}


DECAYS: dict[str, Callable[[float], float]] = {
    "host": lambda done: (1 - done) ** 0.9,
    "step": lambda done: 1.0 if done < 0.75 else 0.1,
    "line": lambda done: min(1.0, 4 * (1 - done)),
}
"""What is left of the learning rate after that share of the steps."""


def load(folder: Path, cases: list[str]) -> tuple[Tensor, Tensor]:
    """Slices with at least ten voxels of foreground, cut or padded to one size, (n, 1, *SHAPE) and (n, *SHAPE)."""
    images, labels = [], []
    for case in cases:
        volume = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "imagesTr" / f"{case}_0000.nii.gz")))
        truth = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz")))
        volume = (volume - volume.mean()) / volume.std()
        for image, label in zip(volume.astype(np.float32), truth.round().astype(np.int64), strict=True):
            if (label > 0).sum() >= 10:
                images.append(_fitted(image, image.min()))
                labels.append(_fitted(label, 0))
    return torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(labels))


def _fitted(array: Any, fill: Any) -> Any:
    whole = np.full(SHAPE, fill, array.dtype)
    cut = tuple(min(have, want) for have, want in zip(array.shape, SHAPE, strict=True))
    source = tuple(slice((have - n) // 2, (have - n) // 2 + n) for have, n in zip(array.shape, cut, strict=True))
    target = tuple(slice((want - n) // 2, (want - n) // 2 + n) for want, n in zip(SHAPE, cut, strict=True))
    whole[target] = array[source]
    return whole


def augmented(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mirrored, moved by up to three pixels, with another contrast."""
    if torch.rand(()) < 0.5:
        images, labels = images.flip(-1), labels.flip(-1)
    shift = tuple(int(n) for n in torch.randint(-3, 4, (2,)))
    contrast = 1 + 0.1 * torch.randn(len(images), 1, 1, 1)
    return images.roll(shift, (-2, -1)) * contrast, labels.roll(shift, (-2, -1))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return PlainConvUNet(
        1, 3, (12, 24, 48), nn.Conv2d, 3, (1, 2, 2), 2, 3, 2,
        norm_op=nn.InstanceNorm2d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, conv_bias=False,
    )  # fmt: skip


def task(model: nn.Module, labels: Tensor) -> SegmentationObjective:
    dice = {"batch_dice": False, "do_bg": False, "smooth": 1e-5, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    return SegmentationObjective(model, model, loss, SampleTerms(loss, "sum", "skip"), labels[:, None])


def train(
    model: nn.Module,
    method: Method | WeightPerturbation,
    images: Tensor,
    labels: Tensor,
    steps: int,
    rate: float,
    *,
    decay: str = "host",
    ramp: float = 0.0,
) -> tuple[float, nn.Module]:
    """Trains as nnU-Net does; seconds of processor time, and the network of averaged weights.

    Args:
        model: to be trained.
        method: of the training.
        images: all of them.
        labels: theirs.
        steps: batches.
        rate: the learning rate.
        decay: how it falls: "host", as nnU-Net's; or it stays for three quarters of the steps, and is a tenth from
            there on ("step"), or falls from there to 0 in a straight line ("line").
        ramp: share of the steps in which the level of SAT grows from 0.
    """
    eps = method.eps if isinstance(method, SAT) else None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.99, weight_decay=3e-5, nesterov=True)
    start = time.process_time()
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * DECAYS[decay](number / steps)
        if ramp and eps is not None and isinstance(method, SAT):
            method.eps = eps * min(1.0, (number + 1) / (ramp * steps))
        chosen = torch.randint(len(images), (BATCH,))
        x, y = augmented(images[chosen], labels[chosen])
        optimizer.zero_grad()
        method.step(task(model, y), x, [str(i) for i in chosen.tolist()]).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 12)
        optimizer.step()
        average.update_parameters(model)
    return time.process_time() - start, average.module


def thresholds(model: nn.Module, images: Tensor, labels: Tensor) -> TermStatistics:
    """The loss of slices as training sees them."""
    found = TermStatistics(["ce+dice"], keep=True)
    with torch.no_grad(), preserved(model):
        for chosen in torch.arange(len(images)).split(64):
            x, y = augmented(images[chosen], labels[chosen])
            found.update(task(model, y)(x))
    return found


ATTACKS = {"dice": PGD(40, 4.0, random_start=0.5, keep="best"), "apgd": APGD(50)}


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, name: str = "dice") -> list[float]:
    """Mean Dice of the slices and both classes at every level, under the attack of that name."""
    model.eval()
    attack, results = ATTACKS[name], []
    for level in LEVELS:
        parts = []
        for chosen in torch.arange(len(images)).split(64):
            x, y = images[chosen], labels[chosen]
            if level:
                x = attack(task(model, y), x, level, generator=torch.Generator().manual_seed(1)).images
            with torch.no_grad():
                found = model(x).argmax(1)
            for k in (1, 2):
                one, two = (found == k).flatten(1), (y == k).flatten(1)
                size = one.sum(1) + two.sum(1)
                parts.append(torch.where(size > 0, 2 * (one & two).sum(1) / size, math.nan))
        results.append(torch.cat(parts).nanmean().item())
    return results


def run(name: str, seed: int, data: Path, work: Path, attacks: Sequence[str]) -> None:
    torch.set_num_threads(1)
    fold = json.loads((data / "splits_final.json").read_text())[0]
    images, labels = load(data, fold["train"][:100])
    method: Method
    taken: Method | WeightPerturbation
    average: nn.Module | None
    result: dict[str, Any] = {"name": name, "seed": seed}
    standard = work / f"standard_{seed}.pt"
    model = network(seed)
    if name == "STD":
        if standard.is_file():
            model.load_state_dict(torch.load(standard)["weights"])
            seconds = torch.load(standard)["seconds"]
        else:
            whole, _ = train(model, STD(), images, labels, STANDARD_STEPS, RATE)
            seconds = whole / STANDARD_STEPS
            torch.save({"weights": model.state_dict(), "seconds": seconds}, standard)
        method, average = STD(), None
    else:
        saved = torch.load(standard)
        model.load_state_dict(saved["weights"])
        settings = dict(RUNS[name])
        kind, std, rate = settings.pop("method"), settings.pop("std", None), settings.pop("rate", FINE_RATE)
        threshold_rule, steps = settings.pop("threshold_rule", None), settings.pop("train_steps", STEPS)
        awp, decay, ramp = settings.pop("awp", None), settings.pop("decay", "host"), settings.pop("ramp", 0.0)
        torch.manual_seed(100 + seed)
        if kind == "AMAT":
            settings["thresholds"] = thresholds(model, images, labels).thresholds(threshold_rule or f"mean+{std:g}std")
            result["xi"] = settings["thresholds"].values[0]
        method = {"STD": STD, "SAT": SAT, "AMAT": AMAT}[kind](**settings)
        torch.manual_seed(200 + seed)
        taken = method
        if awp is not None and isinstance(method, AdversarialMethod):
            taken = WeightPerturbation(method, awp)
        whole, average = train(model, taken, images, labels, steps, rate, decay=decay, ramp=ramp)
        seconds = whole / steps
    val_images, val_labels = load(data, fold["val"][:10])
    result["seconds"] = seconds
    for attack in attacks:
        result[attack] = evaluate(model, val_images[::2], val_labels[::2], attack)
    torch.save(model.state_dict(), work / f"{re.sub(r'[^a-z0-9.]+', '_', name.lower())}_{seed}.pt")
    if average is not None and name in AVERAGED:
        result["average"] = evaluate(average, val_images[::2], val_labels[::2])
        result["average_auc"] = auc_robust(LEVELS, result["average"])
    if isinstance(method, AMAT):
        result["margins"] = method.margins.quantiles()
    with (work / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def finished(work: Path) -> list[dict[str, Any]]:
    path = work / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(work: Path, attack: str) -> str:
    """A row for each run under this attack, means over the seeds; the distance to SAT's front is read in each seed."""
    rows = defaultdict(list)
    for found in finished(work):
        if attack in found:
            rows[found["name"]].append(found)
    standard = statistics.mean(r["seconds"] for r in rows.get("STD on", rows["STD"]))
    curves = {
        name: {r["seed"]: [*r[attack], auc_robust(LEVELS, r[attack])] for r in found} for name, found in rows.items()
    }
    dial = [curves[name] for name in ("STD", *RUNS) if name in curves and re.fullmatch(r"STD|SAT [0-9.]+", name)]
    heads = ["run", "seeds", "time of a step", *(f"{level:g}" for level in LEVELS), "AUC_robust"]
    lines = ["| " + " | ".join([*heads, "beyond SAT's front by", "margins"]) + " |"]
    lines.append("|---" * (len(heads) + 2) + "|")
    for name in ["STD", *RUNS]:
        if not (found := rows.get(name)):
            continue
        dice = [statistics.mean(r[attack][k] for r in found) for k in range(len(LEVELS))]
        auc = [auc_robust(LEVELS, r[attack]) for r in found]
        spread = f" ± {statistics.stdev(auc) / math.sqrt(len(auc)):.4f}" if len(auc) > 1 else ""
        margins = [statistics.mean(r["margins"][k] for r in found) for k in range(3)] if "margins" in found[0] else []
        over = "" if curves[name] in dial else beyond(True, curves[name], dial)
        lines.append(
            f"| {name} | {len(found)} | {statistics.mean(r['seconds'] for r in found) / standard:.2f} | "
            + " | ".join(f"{value:.4f}" for value in dice)
            + f" | {statistics.mean(auc):.4f}{spread} | {over} | {' / '.join(f'{m:.1f}' for m in margins)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/margins"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="a regular expression; runs whose name it matches")
    parser.add_argument("--table", action="store_true", help="print what there is")
    parser.add_argument("--stronger", action="store_true", help="print what APGD-50 found")
    parser.add_argument(
        "--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="dice: PGD-40; apgd: APGD-50"
    )
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.run:
        run(options.run[0], int(options.run[1]), options.data, options.work, options.attacks)
        return
    if not options.table:
        words = [sys.executable, __file__, "--data", str(options.data), "--work", str(options.work)]
        words += ["--attacks", *options.attacks, "--run"]
        done = {(found["name"], found["seed"]) for found in finished(options.work)}
        for names in (["STD"], [name for name in RUNS if re.search(options.only, name)]):
            waiting = [(n, s) for s in options.seeds for n in names if (n, s) not in done]
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(lambda one: subprocess.run([*words, one[0], str(one[1])], check=True), waiting))
    print(table(options.work, "apgd" if options.stronger else "dice"))


if __name__ == "__main__":
    main()
