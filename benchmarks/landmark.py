"""STD with BCE and with Dice, SAT at three levels, AMAT and DPAAT on cephalometric radiographs, trained and attacked.

    python benchmarks/landmark.py --source FOLDER --work FOLDER [--seeds 0] [--jobs 2]
    python benchmarks/landmark.py --source FOLDER --work FOLDER --preset full --device gpu

The folder has landmarks.csv, split.csv and images, or is the ISBI 2015 challenge's. Everything goes through the
installed command adv-landmark; see lightning_runs.py.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_runs import Runs, add_arguments, spread
from PIL import Image

ATTACKS = ("pgd100", "ifgsm10")
HAMEDAN, HAMEDAN_SPACING = (402, 501), 0.422
"""Width and height of the collection that docs/results/landmark.md is of, and its spacing, measured from its ruler."""


def reader(source: Path, spacing: float | None) -> tuple[str, dict[str, Any]]:
    """Which class reads a folder, and its arguments: what lies there decides, and ``spacing``, mm per pixel, if given.

    Raises:
        SystemExit: for a folder that is neither, or whose errors would not be in mm, as the paper's are.
    """
    given = {} if spacing is None else {"spacing": spacing}
    if (source / "landmarks.csv").is_file():
        with (source / "split.csv").open(newline="") as file:
            heads = next(csv.reader(file), [])
        if not given and not {"spacing", "spacing_x"} & set(heads):
            first = min(path for path in (source / "images").iterdir() if not path.name.startswith("."))
            with Image.open(first) as opened:
                if opened.size != HAMEDAN:
                    raise SystemExit(
                        f"{source} has no pixel spacing: give split.csv the column spacing, mm per pixel, or say "
                        f"--spacing"
                    )
            given = {"spacing": HAMEDAN_SPACING}
        return "adv_landmark.data.LandmarkTable", {"root": str(source), "origin": "corner", **given}
    if any(source.rglob("TrainingData")):
        return "adv_landmark.data.ISBI2015", {"root": str(source), **given}  # which knows the challenge's spacing
    raise SystemExit(f"{source} has neither landmarks.csv nor TrainingData: it is no table of points, nor ISBI 2015")


@dataclass(frozen=True)
class Preset:
    """What is trained, and how long. ``scale`` is what the paper's levels, 0, 0.5, 1 and 2, are multiplied by.

    ``calibrated``: AMAT calibrates itself, and takes no thresholds from the standard network.
    """

    network: dict[str, Any]
    data: dict[str, Any]
    scale: float
    epochs: int
    steps: int
    lr: float
    evaluate: tuple[str, ...] = ()
    calibrated: bool = False


PRESETS = {
    # One channel for the paper's three: the same noise in every value has a norm smaller by sqrt(3).
    "cpu": Preset(
        {"encoder": "tu-test_resnet", "decoder_channels": [64, 32, 32, 16, 16]},
        {"size": [200, 160], "channels": 1, "batch_size": 8, "rotate": 5, "zoom": 0.05, "shift": 0.02},
        3**-0.5,
        40,
        4,
        3e-3,
    ),
    "full": Preset({"encoder": "vgg19_bn"}, {"size": [200, 160], "channels": 3, "batch_size": 8}, 1.0, 500, 20, 1e-3),
    # Whether everything runs, in a minute: a network of an epoch has no thresholds to give; AMAT makes its own.
    "smoke": Preset(
        {"encoder": "tu-test_resnet", "decoder_channels": [16, 16, 8, 8, 8]},
        {"size": [64, 64], "channels": 1, "batch_size": 16},
        0.2,
        2,
        2,
        3e-3,
        ("--samples", "4", "--checks", "0"),
        True,
    ),
}


@dataclass
class Landmark(Runs):
    """The runs of one preset."""

    preset: Preset
    source: Path
    spacing: float | None = None

    tool = "adv-landmark"

    def every_method(self) -> dict[str, dict[str, Any]]:
        level = self.preset.scale
        sat = {f"SAT{k}": {"name": "SAT", "eps": round(k * level, 4)} for k in (1, 3, 5)}
        amat = self.amat(1)
        dpaat = {"name": "DPAAT", "eps": round(level, 4)}
        std = {name: {"name": "STD"} for name in ("STD.bce", "STD.bce20", "STD")}
        return {**std, **sat, "AMAT": amat, "DPAAT": dpaat}

    def amat(self, delta: float) -> dict[str, Any]:
        """AMAT of the paper's delta."""
        thresholds = {"warmup_epochs": 1} if self.preset.calibrated else {"thresholds": "STD"}
        return {"name": "AMAT", "delta": round(delta * self.preset.scale, 4), **thresholds}

    def epochs(self) -> int:
        return self.preset.epochs

    def content(self, network: str, method: str, seed: int) -> dict[str, Any]:
        kind, data = reader(self.source, self.spacing)
        return {
            "model": {
                "network": self.preset.network,
                "method": {"preset": "paper"},
                "attack": {"steps": self.preset.steps},
                "heatmap": "bce" if ".bce" in method else "dice",
                # The control STD.bce20: a mean over all pixels, of which the disk is one in a hundred, teaches little
                # in so few epochs at its published weight, 2.
                "heatmap_weight": 40.0 if method == "STD.bce20" else None,
                "lr": self.preset.lr,
            },
            "data": {"class_path": kind, "init_args": {**data, **self.preset.data}},
        }

    def evaluation(self) -> list[str]:
        levels = [round(level * self.preset.scale, 4) for level in (0, 0.5, 1, 2)]
        return ["--levels", json.dumps(levels), "--attacks", json.dumps(ATTACKS), *self.preset.evaluate]

    def tables(self) -> list[str]:
        """MRE clean and at every level of the paper, and their mean; then SDR at 2 mm."""
        lines = []
        for metric, digits in (("MRE", 2), ("SDR 2 mm", 3)):
            for attack in ATTACKS:
                heads = ["clean", "0.5", "1", "2", "mean"]
                lines += [f"| {metric}, {attack} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
                for method in self.methods:
                    rows = []
                    for seed in self.seeds:
                        found = self.results(self.networks[0], method, seed, "L2")[metric]
                        attacked = found["attacks"][attack]
                        rows.append([found["clean"], *attacked["values"][1:], attacked["attacked_mean"]])
                    cells = [spread(values, digits) for values in zip(*rows, strict=True)]
                    lines.append(f"| {method} | " + " | ".join(cells) + " |")
                lines.append("")
        return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the data set's folder")
    parser.add_argument("--spacing", type=float, default=None, help="mm per pixel; default: the data's own")
    add_arguments(parser, "build/landmark", [0], networks=False)
    args = parser.parse_args()
    runs = (
        args.work.resolve(),
        [PRESETS[args.preset].network["encoder"]],
        args.seeds,
        args.only,
        args.device,
        args.jobs,
    )
    Landmark(*runs, PRESETS[args.preset], args.source.resolve(), args.spacing).run()


if __name__ == "__main__":
    main()
