"""STD, AT, SAT, AMAT, TRADES, DPAAT and DPAAT's two ablations on classification data: training, attack, one table.

    python benchmarks/classify.py --data pneumonia --source FILE --work FOLDER [--seeds 0 1 2] [--jobs 2]
    python benchmarks/classify.py --data ham10000 --source FOLDER --work FOLDER --preset full --device gpu

Everything goes through the installed command adv-classify; see lightning_runs.py.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning_runs import Runs, add_arguments, spread

METRICS, NORMS = ("accuracy", "balanced accuracy", "mAP"), ("L2", "Linf")


@dataclass(frozen=True)
class Preset:
    """What is trained, and how long."""

    networks: tuple[str, ...]
    data: dict[str, Any]
    eps: float
    levels: tuple[float, ...]
    epochs: int
    steps: int
    model: dict[str, Any]
    attacks: tuple[str, ...] = ("pgd100", "ifgsm10")

    def methods(self) -> dict[str, dict[str, Any]]:
        """The arguments of every run. AMAT's delta lets a margin reach twice eps in the course of a run.

        AT.wide is a control: AT at 1.5 eps, about the mean of the sizes that DPAAT ends with.
        """
        return {
            "STD": {"name": "STD"},
            "AT": {"name": "AT"},
            "SAT": {"name": "SAT"},
            "TRADES": {"name": "TRADES"},
            "AMAT": {"name": "AMAT", "delta": round(self.eps / 5, 4), "thresholds": "STD"},
            "DPAAT": {"name": "DPAAT"},
            "DPAAT.fixed": {"name": "DPAAT", "step_size": 0.0},
            "DPAAT.nosync": {"name": "DPAAT", "sync_weight": 0.0},
            "AT.wide": {"name": "AT", "eps": round(1.5 * self.eps, 4)},
        }


PNEUMONIA = {"batch_size": 64, "flip": 0, "rotate": 10, "zoom": 0.1}
HAM = {"batch_size": 32, "rotate": 180, "zoom": 0.2, "color": 0.1}
PRESETS = {
    ("pneumonia", "cpu"): Preset(
        ("test_resnet", "test_efficientnet"),
        PNEUMONIA,
        0.4,
        (0, 0.2, 0.4, 0.8),
        10,
        5,
        {"lr": 3e-3},
    ),
    ("pneumonia", "full"): Preset(
        ("resnet18", "test_efficientnet"), PNEUMONIA, 0.4, (0, 0.2, 0.4, 0.8), 50, 10, {"lr": 1e-3}
    ),
    ("ham10000", "cpu"): Preset(
        ("test_resnet", "test_efficientnet"),
        HAM | {"size": [36, 48]},
        0.4,
        (0, 0.2, 0.4, 0.8),
        15,
        4,
        {"lr": 3e-3, "class_weights": "balanced"},
    ),
    ("ham10000", "full"): Preset(
        ("resnet18", "mobilenetv3_small_050"),
        HAM | {"size": [112, 150]},
        1.5,
        (0, 0.75, 1.5, 3),
        100,
        10,
        {"lr": 1e-3, "class_weights": "balanced"},
    ),
}
READERS = {"pneumonia": ("adv_classify.data.MedMNIST", "file"), "ham10000": ("adv_classify.data.ImageTable", "root")}


@dataclass
class Classify(Runs):
    """The runs of one preset."""

    data: str
    preset: Preset
    source: Path

    tool = "adv-classify"

    def every_method(self) -> dict[str, dict[str, Any]]:
        return self.preset.methods()

    def epochs(self) -> int:
        return self.preset.epochs

    def content(self, network: str, method: str, seed: int) -> dict[str, Any]:
        reader, argument = READERS[self.data]
        return {
            "model": {
                "network": {"name": network, "channels_last": True},
                "method": {"eps": self.preset.eps, "preset": "paper"},
                "attack": {"steps": self.preset.steps},
                **self.preset.model,
            },
            "data": {"class_path": reader, "init_args": {argument: str(self.source), **self.preset.data}},
        }

    def evaluation(self) -> list[str]:
        return ["--levels", json.dumps(self.preset.levels), "--attacks", json.dumps(self.preset.attacks)]

    def tables(self) -> list[str]:
        """For each network and attack the metrics, mean and standard deviation over the seeds."""
        lines = []
        for network in self.networks:
            for number, attack in enumerate(self.preset.attacks):
                lines += self.table(network, attack, clean=number == 0)
            if "DPAAT" in self.methods:
                lines += self.differences(network)
        return lines

    def differences(self, network: str) -> list[str]:
        """DPAAT's accuracy less that of every other method, in points, with 95 % intervals by a bootstrap over images.

        Under attack: the first one, the mean over the levels. With several seeds, their mean is what is drawn from.
        """
        others = [method for method in self.methods if method != "DPAAT"]
        heads = ["clean", *(f"{norm}, {self.preset.attacks[0]}" for norm in NORMS)]
        lines = [f"| {network}, DPAAT less | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for other in others:
            cells = []
            for head, norm in zip(heads, ("L2", *NORMS), strict=True):
                parts = [
                    [self.correct(network, method, seed, norm, clean=head == "clean") for method in ("DPAAT", other)]
                    for seed in self.seeds
                ]
                cells.append(interval(np.mean([own - theirs for own, theirs in parts], axis=0)))
            lines.append(f"| {other} | " + " | ".join(cells) + " |")
        return [*lines, ""]

    def correct(self, network: str, method: str, seed: int, norm: str, *, clean: bool) -> np.ndarray:
        """Of every image, whether it is classified rightly, clean or as a mean over the attacked levels; (N,)."""
        path = self.work / "reports" / f"{network}_{method}_{seed}" / norm / "samples.csv"
        wanted, found = "clean" if clean else self.preset.attacks[0], defaultdict(list)
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["attack"] == wanted:
                    found[row["id"]].append(float(row["accuracy"]))
        return np.array([np.mean(found[name]) for name in sorted(found)])

    def table(self, network: str, attack: str, clean: bool) -> list[str]:
        """Under attack: the mean over the levels of accuracy and of mAP (mARP), and AUC_robust by mAP."""
        heads = list(METRICS) if clean else []
        heads += [f"{norm} {metric}" for norm in NORMS for metric in ("accuracy", "mARP", "AUC_robust")]
        lines = [f"| {network}, {attack} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for method in self.methods:
            rows = [self.numbers(network, method, seed, attack, clean) for seed in self.seeds]
            lines.append(f"| {method} | " + " | ".join(spread(cells) for cells in zip(*rows, strict=True)) + " |")
        return [*lines, ""]

    def numbers(self, network: str, method: str, seed: int, attack: str, clean: bool) -> list[float]:
        """The cells of one training."""
        found: list[float] = []
        for norm in NORMS:
            models = self.results(network, method, seed, norm)
            if clean and not found:
                found += [models[metric]["clean"] for metric in METRICS]
            found += [models[metric]["attacks"][attack]["attacked_mean"] for metric in ("accuracy", "mAP")]
            found.append(models["mAP"]["attacks"][attack]["auc_robust"])
        return found


def interval(differences: np.ndarray, draws: int = 4000) -> str:
    """Mean and 95 % interval, in points."""
    generator = np.random.default_rng(0)
    count = len(differences)
    means = [differences[generator.integers(0, count, count)].mean() for _ in range(draws)]
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{100 * differences.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=READERS, required=True)
    parser.add_argument("--source", type=Path, required=True, help="the .npz file, or HAM10000's folder")
    add_arguments(parser, "build/classify", [0, 1, 2])
    args = parser.parse_args()
    preset = PRESETS[args.data, args.preset]
    runs = (args.work.resolve(), args.networks or preset.networks, args.seeds, args.only, args.device, args.jobs)
    Classify(*runs, args.data, preset, args.source.resolve()).run()


if __name__ == "__main__":
    main()
