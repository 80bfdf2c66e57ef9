"""STD, SAT and AMAT on the blood cell data of the AMAT paper (BCCD): training, attack, report.

    python benchmarks/bccd.py --data FOLDER --work FOLDER --preset cpu --jobs 2
    python benchmarks/bccd.py --data FOLDER --work FOLDER --preset paper --device 0

FOLDER of --data holds images, labels and bccd.yaml. Everything goes through the installed command adv-yolo. A training
that is finished is not done again, one that was cut off is resumed, and the evaluation resumes; so the script can be
called until it is done. A working folder is of one command: what was trained with another model, seed or setting is
neither taken for this one's nor trained over, but an error that asks for another --work.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from ultralytics.nn.tasks import yaml_model_load

from advmed.files import sha256


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


SELF_CALIBRATED = ("thresholds=auto", "clean_epochs=1")


def runs(
    scale: float, delta: float, extra: dict[str, tuple[str, ...]] | None = None, calibrated: bool = False
) -> dict[str, tuple[str, ...]]:
    """SAT 1, 10, 15 and AMAT, their levels multiplied by ``scale``; and, as a control, SAT at AMAT's delta.

    ``calibrated``: AMAT calibrates itself, and takes no thresholds from the standard network.
    """
    found = {f"SAT{eps:g}": ("method=sat", f"eps={eps * scale:g}") for eps in (1, 3.5, 10, 15)}
    amat = ("method=amat", f"delta={delta:g}", *(SELF_CALIBRATED if calibrated else ()))
    return found | {"AMAT": amat} | (extra or {})


def measured(arguments: tuple[str, ...]) -> bool:
    """Whether a training takes the thresholds that are measured on the standard network."""
    return "method=amat" in arguments and "thresholds=auto" not in arguments


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
# Batch and length are the paper's, the optimizer that of YOLO v5 6.1, which it names; Ultralytics would choose another.
# Mosaic is off, unlike there: a margin belongs to one image, and the paper does not say to which of the four.
PAPER = ("epochs=300", "batch=32", "optimizer=SGD", "lr0=0.01", "patience=0", "mosaic=0")
PRESETS = {
    "paper": Preset(
        imgsz=320,
        standard=PAPER,
        adversarial=(*PAPER, "preset=paper"),
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
    # Whether everything runs, in a minute: a network that has seen a few images detects nothing, and has no thresholds
    # to give, so AMAT calibrates itself.
    "smoke": Preset(
        imgsz=64,
        standard=("epochs=1", "fraction=0.1", "warmup_epochs=0", "mosaic=0"),
        adversarial=("epochs=2", "fraction=0.1", "warmup_epochs=0", "mosaic=0", "preset=paper", "steps=2"),
        from_standard=True,
        runs=runs(0.2, 0.7, calibrated=True),
        levels="0,1,2,3",
        evaluate=("samples=2", "checks=0"),
    ),
}
NARROW = "narrow"
"""YOLOv8 with half the width of its smallest size: 0.9 million weights."""
HOST = ("batch=16", "amp=False", "val=False", "plots=False")
OTHER_WORK = "take another --work"


def differences(now: str, then: str) -> list[str]:
    """Of two commands, a word in each line."""
    new, old = (dict(line.split("=", 1) for line in text.splitlines()) for text in (now, then))
    return [
        f"{key} is {new.get(key, 'not set')}, and was {old.get(key, 'not set')}"
        for key in {**new, **old}
        if new.get(key) != old.get(key)
    ]


def files_in(folder: Path) -> set[str]:
    """The images, labels and lists of a data set by their names; what the hosts keep beside them is not its."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        path.as_posix()
        for path in files
        if path.suffix != ".cache" and (len(path.parts) > 1 or path.suffix in (".yaml", ".txt"))
    }


def is_finished(checkpoint: Path) -> bool:
    """Whether a training has nothing left to do, so that Ultralytics would refuse to resume it.

    It may have been killed after its last epoch, before or after the host removed from the file what resuming needs.
    """
    found = torch.load(checkpoint, map_location="cpu", weights_only=False)
    epoch = int(found.get("epoch", -1))
    return epoch < 0 or epoch + 1 >= int(found["train_args"]["epochs"])


def epoch_seconds(results: Path) -> float:
    """The median over the epochs, of Ultralytics' ``results.csv``, whose clock begins anew where a run is resumed."""
    with results.open(newline="") as file:
        ends = [float(row["time"]) for row in csv.DictReader(file, skipinitialspace=True)]
    pairs = zip([0.0, *ends[:-1]], ends, strict=True)
    return statistics.median(end - start if end > start else end for start, end in pairs)


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
        if self.jobs > 1:  # alone, side by side; else the last call does it all
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(self.evaluate, [[name] for name in names]))
        self.evaluate(names, alone=False)
        self.write_tables()

    def train_all(self) -> None:
        """The standard model, then the others."""
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        if self.model == NARROW:
            self.model = self.narrow()
        self.train("STD", self.model, self.preset.standard)
        if any(map(measured, self.preset.runs.values())):
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
            part = data.with_name(f"{name}.part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(self.data, part)
            part.rename(data)
        elif files_in(data) != files_in(self.data):
            raise SystemExit(f"{data} is a copy of other data than {self.data}: {OTHER_WORK}")
        return [f"data={data / 'bccd.yaml'}", f"imgsz={self.preset.imgsz}", f"device={self.device}"]

    def train(self, name: str, model: str, arguments: tuple[str, ...]) -> None:
        """Trains, goes on, or finds that it is done; ``logs/NAME.command`` and ``.done`` hold what it is done by."""
        own = [f"thresholds={self.work / 'thresholds.json'}"] if measured(arguments) else []
        place = [f"project={self.work / 'runs'}", f"name={name}", "exist_ok=True"]
        words = [f"model={model}", *self.common(name), *HOST, f"seed={self.seed}", *arguments, *own, *place]
        given = dict(word.split("=", 1) for word in words)  # the last of a name, so that a preset has its own batch
        text = "".join(f"{key}={value}\n" for key, value in given.items() if key != "device")
        text = text.replace(str(self.work), "WORK")  # a folder may be moved
        begun, done = (self.work / "logs" / f"{name}.{kind}" for kind in ("command", "done"))
        known = next((file.read_text() for file in (done, begun) if file.exists() and file.stat().st_size), None)
        trained = self.checkpoint(name).exists()
        if trained and (other := differences(text, known) if known else self.unlike_the_host(name, given)):
            raise SystemExit(f"{self.folder(name)} was trained otherwise ({'; '.join(other)}): {OTHER_WORK}")
        if not trained:  # what a run left before its first checkpoint, to which the host would append
            shutil.rmtree(self.folder(name), ignore_errors=True)
        if not (trained and (done.exists() or is_finished(self.checkpoint(name)))):
            begun.write_text(text)
            self.note_jobs(name)
            resume = ["resume", f"model={self.checkpoint(name)}"]
            fresh = [f"{key}={value}" for key, value in given.items()]
            self.command(f"train_{name}", ["detect", "train", *(resume if trained else fresh)])
        done.write_text(text)

    def unlike_the_host(self, name: str, given: dict[str, str]) -> list[str]:
        """What a training without a record of ours was made with else, by what Ultralytics and adv-yolo wrote down."""
        found: dict[str, Any] = {}
        for file in (self.folder(name) / "args.yaml", self.folder(name) / "adversarial.yaml"):
            if file.exists():
                text = file.read_text()
                found |= yaml.safe_load(text) or {}
                if "# method: " in text:
                    found["method"] = text.partition("# method: ")[2].split()[0].lower()
        if not found:
            return ["there is no args.yaml to tell"]
        if Path(str(found.get("model"))).parts[-3:] == self.checkpoint(name).parts[-3:]:
            del found["model"]  # it was resumed, and names itself
        ignored, paths = ("device", "project", "name", "exist_ok"), ("model", "data", "thresholds")
        other = []
        for key in (key for key in given if key in found and key not in ignored):
            now, then = yaml.safe_load(given[key]), found[key]
            if (Path(str(now)).name != Path(str(then)).name) if key in paths else now != then:
                other.append(f"{key} is {now}, and was {then}")
        return other

    def note_jobs(self, name: str) -> None:
        """Keeps how many trainings ran side by side, which seconds depend on; the most, if it was interrupted."""
        file = self.work / "logs" / f"{name}.jobs"
        file.write_text(str(max(self.jobs, int(file.read_text()) if file.exists() else 1)))

    def thresholds(self) -> None:
        file = self.work / "thresholds.json"
        if not file.exists():
            model = f"model={self.checkpoint('STD')}"
            self.command("thresholds", ["thresholds", model, *self.common("STD"), f"out={file}"])
        elif json.loads(file.read_text())["source_sha256"] != sha256(self.checkpoint("STD")):
            raise SystemExit(f"{file} is of another network than {self.checkpoint('STD')}: {OTHER_WORK}")

    def evaluate(self, names: list[str], alone: bool | None = None) -> None:
        """Single models, so that they can run side by side; the last call puts their parts together.

        ``alone``: None for a single name.
        """
        alone = len(names) == 1 if alone is None else alone
        output = self.work / "parts" / names[0] if alone else self.work / f"report_{self.name}"
        if not alone:
            for name in names:
                source = self.work / "parts" / name / name
                if source.exists():
                    shutil.copytree(source, output / name, dirs_exist_ok=True)
        models = ",".join(str(self.checkpoint(name)) for name in names)
        command = ["evaluate", f"model={models}", *self.common(names[-1]), f"levels={self.preset.levels}", "batch=11"]
        command += [*self.preset.evaluate, f"names={','.join(names)}", f"out={output}", "overwrite=False"]
        done = self.work / "logs" / f"evaluate_{names[0]}.done"
        if alone and (output / "report.json").exists() and done.exists() and done.read_text() == "\n".join(command):
            return
        # A report that is there is gone on with, and refused by the command itself where it is of another evaluation.
        self.command(f"evaluate_{'all' if not alone else names[0]}", command)
        if alone:
            done.write_text("\n".join(command))

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
