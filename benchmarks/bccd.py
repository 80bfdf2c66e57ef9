"""STD, SAT and AMAT on the blood cell data of the AMAT paper (BCCD): training, attack, report.

    python benchmarks/bccd.py --data FOLDER --work FOLDER --preset cpu --jobs 2
    python benchmarks/bccd.py --data FOLDER --work FOLDER --preset paper --device 0

FOLDER of --data holds images, labels and bccd.yaml. Everything goes through the installed command adv-yolo. A training
that is finished is not done again, one that was cut off is resumed, and the evaluation resumes; so the script can be
called until it is done.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from ultralytics.nn.tasks import yaml_model_load


@dataclass(frozen=True)
class Preset:
    """What distinguishes a run that fits on a CPU from the paper's (arXiv 2206.01736, section 3.7)."""

    imgsz: int
    standard: tuple[str, ...]
    adversarial: tuple[str, ...]
    from_standard: bool
    runs: dict[str, tuple[str, ...]]
    levels: str
    evaluate: tuple[str, ...] = ()


def runs(scale: float, delta: float, extra: dict[str, tuple[str, ...]] | None = None) -> dict[str, tuple[str, ...]]:
    """SAT 1, 10, 15 and AMAT, their levels multiplied by ``scale``; and, as a control, SAT at AMAT's delta."""
    found = {f"SAT{eps:g}": ("method=sat", f"eps={eps * scale:g}") for eps in (1, 3.5, 10, 15)}
    return found | {"AMAT": ("method=amat", f"delta={delta:g}")} | (extra or {})


# Sides of 128 instead of 320 pixels, so that all L2 levels are 0.4 times the paper's; a fine-tuning of the standard
# network, few epochs.
SMALL = Preset(
    imgsz=128,
    standard=("epochs=50", "optimizer=AdamW", "lr0=0.002", "warmup_epochs=1", "mosaic=0"),
    adversarial=("epochs=15", "optimizer=AdamW", "lr0=0.001", "warmup_epochs=0", "mosaic=0", "preset=paper", "steps=4"),
    from_standard=True,
    runs=runs(
        0.4,
        1.4,
        {
            "AMAT.delta1": ("method=amat", "delta=0.4"),
            "AMAT.self": ("method=amat", "delta=1.4", "thresholds=auto", "clean_epochs=2"),
        },
    ),
    levels="0,2,4,6",
)
PRESETS = {
    "paper": Preset(
        imgsz=320,
        standard=("epochs=300", "patience=0", "mosaic=0"),
        adversarial=("epochs=300", "patience=0", "mosaic=0", "preset=paper"),
        from_standard=False,
        runs=runs(1, 3.5, {"AMAT.crossing": ("method=amat", "delta=3.5", "refinement=crossing")}),
        levels="0,5,10,15",
    ),
    "cpu": SMALL,
    # Which passes the running statistics of BatchNorm should learn from; in the working folder of "cpu" it begins with
    # the same standard network, and SAT10 of "cpu" is the third choice, bn=clean.
    "batchnorm": replace(
        SMALL, runs={f"SAT10.{bn}": ("method=sat", "eps=4", f"bn={bn}") for bn in ("both", "adversarial")}
    ),
    # The networks of zoo/ (with --model narrow): the product's default preset.
    "zoo": Preset(
        imgsz=256,
        standard=("epochs=120", "optimizer=AdamW", "lr0=0.002", "warmup_epochs=1", "mosaic=0"),
        adversarial=("optimizer=AdamW", "lr0=0.001", "warmup_epochs=0", "mosaic=0"),
        from_standard=True,
        runs={"SAT3": ("method=sat", "eps=3"), "AMAT": ("method=amat", "eps=3", "rule=mean+4std")},
        levels="0,2,4,8",
        evaluate=("attacks=apgd100", "checks=8"),
    ),
}
NARROW = "narrow"
"""YOLOv8 with half the width of its smallest size: 0.9 million weights."""
HOST = ("batch=16", "amp=False", "val=False", "plots=False")


@dataclass
class Benchmark:
    """The steps of one preset in one working folder."""

    name: str
    data: Path
    work: Path
    model: str
    device: str
    jobs: int
    seed: int

    @property
    def preset(self) -> Preset:
        return PRESETS[self.name]

    def run(self) -> None:
        self.train_all()
        names = ["STD", *self.preset.runs]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self.evaluate, [[name] for name in names]))
        self.evaluate(names)
        self.write_tables()

    def train_all(self) -> None:
        """The standard model, then the others."""
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        if self.model == NARROW:
            self.model = self.narrow()
        self.train("STD", self.model, self.preset.standard)
        self.thresholds()
        start = str(self.checkpoint("STD")) if self.preset.from_standard else self.model
        jobs = [(name, start, (*self.preset.adversarial, *own)) for name, own in self.preset.runs.items()]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda job: self.train(*job), jobs))

    def narrow(self) -> str:
        """A model's file like that of Ultralytics, with one size."""
        layers = yaml_model_load("yolov8n.yaml")
        for key in ("scales", "scale", "yaml_file"):
            layers.pop(key)
        file = self.work / "yolov8_narrow.yaml"
        file.write_text(yaml.safe_dump(layers | {"depth_multiple": 0.33, "width_multiple": 0.125}))
        return str(file)

    def folder(self, name: str) -> Path:
        return self.work / "runs" / name

    def checkpoint(self, name: str) -> Path:
        return self.folder(name) / "weights" / "last.pt"

    def common(self, name: str) -> list[str]:
        data = self.work / "data" / name
        if not data.exists():  # one each: Ultralytics writes a cache beside the labels, and two runs would collide
            shutil.copytree(self.data, data)
        return [f"data={data / 'bccd.yaml'}", f"imgsz={self.preset.imgsz}", f"device={self.device}"]

    def train(self, name: str, model: str, arguments: tuple[str, ...]) -> None:
        done = self.work / "logs" / f"{name}.done"
        if done.exists():
            return
        resume = self.checkpoint(name).exists()
        if resume:
            command = ["detect", "train", "resume", f"model={self.checkpoint(name)}"]
        else:
            thresholds = self.work / "thresholds.json"
            measured = "method=amat" in arguments and "thresholds=auto" not in arguments
            own = [f"thresholds={thresholds}"] if measured else []
            place = [f"project={self.work / 'runs'}", f"name={name}", "exist_ok=True"]
            command = [
                "detect",
                "train",
                f"model={model}",
                *self.common(name),
                *HOST,
                f"seed={self.seed}",
                *arguments,
                *own,
                *place,
            ]
        self.command(f"train_{name}", command)
        done.touch()

    def thresholds(self) -> None:
        file = self.work / "thresholds.json"
        if not file.exists():
            model = f"model={self.checkpoint('STD')}"
            self.command("thresholds", ["thresholds", model, *self.common("STD"), f"out={file}"])

    def evaluate(self, names: list[str]) -> None:
        """Single models first, so that they can run side by side; the last call puts their parts together."""
        alone = len(names) == 1
        output = self.work / "parts" / names[0] if alone else self.work / f"report_{self.name}"
        if not alone:
            for name in names:
                shutil.copytree(self.work / "parts" / name / name, output / name, dirs_exist_ok=True)
        models = ",".join(str(self.checkpoint(name)) for name in names)
        command = ["evaluate", f"model={models}", *self.common(names[-1]), f"levels={self.preset.levels}", "batch=11"]
        command += [*self.preset.evaluate, f"names={','.join(names)}", f"out={output}", "overwrite=False"]
        if alone and (output / "report.json").exists():
            return
        self.command(f"evaluate_{'all' if not alone else names[0]}", command)

    def write_tables(self) -> None:
        """results.md: every metric of every run, margins over the epochs."""
        report = json.loads((self.work / f"report_{self.name}" / "report.json").read_text())
        levels = self.preset.levels.split(",")
        lines = []
        for metric in ("mAP50-95", "mAP50", "IoU"):
            for attack in report["configuration"]["evaluation"]["attacks"]:
                lines += [
                    f"| {metric}, {attack} | clean | {' | '.join(levels[1:])} | mean | AUC_robust |",
                    "|---" * (len(levels) + 3) + "|",
                ]
                for name, model in report["results"][metric]["models"].items():
                    found = model["attacks"][attack]
                    cells = [*found["values"], found["attacked_mean"], found["auc_robust"]]
                    lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
                lines.append("")
        margins = {}
        for name in (name for name in self.preset.runs if name.startswith("AMAT")):
            with (self.folder(name) / "results.csv").open() as file:
                margins[name] = list(csv.DictReader(file))
        if margins:
            lines += [
                "| margins 5 / 50 / 95 %, visits that let one grow; epoch | " + " | ".join(margins) + " |",
                "|---" * (len(margins) + 1) + "|",
            ]
        for rows in zip(*margins.values(), strict=True):
            lines.append(f"| {rows[0]['epoch']} | " + " | ".join(margin_cell(row) for row in rows) + " |")
        path = self.work / f"results_{self.name}.md"
        path.write_text("\n".join(lines) + "\n")
        print(f"{path}\n\n" + "\n".join(lines))

    def command(self, log: str, arguments: list[str]) -> None:
        start = time.monotonic()
        environment = os.environ | {
            "YOLO_OFFLINE": "true",
            "YOLO_CONFIG_DIR": str(self.work),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        }
        if self.jobs > 1:
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        executable = Path(sysconfig.get_path("scripts")) / "adv-yolo"
        with (self.work / "logs" / f"{log}.log").open("a") as out:
            status = subprocess.call(
                [str(executable), *arguments], env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=self.work
            )
        seconds = time.monotonic() - start
        print(f"{log}: {'failed, see its log' if status else 'done'} after {seconds:.0f} s", flush=True)
        if status:
            sys.exit(1)


def margin_cell(row: dict[str, str]) -> str:
    """The margins of an epoch, and the share of its visits that let one grow (none in a clean epoch)."""
    margins = " / ".join(f"{float(row[f'metrics/adv_margin_{q}']):.2f}" for q in ("q05", "q50", "q95"))
    grown = float(row["train/adv_expanded"] or "nan")
    return f"{margins}, clean" if math.isnan(grown) else f"{margins}, {grown:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/bccd"))
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--model", default="yolov8n.yaml", help="yolov8n.yaml (default), yolov5n.yaml, narrow, ...")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (each on one thread if above 1)")
    args = parser.parse_args()
    work = args.work.resolve()
    Benchmark(args.preset, args.data.resolve(), work, args.model, args.device, args.jobs, args.seed).run()


if __name__ == "__main__":
    main()
