"""STD, SAT and AMAT on the hippocampus data of the AMAT paper, or others, 2d, fold 0: training, attack, report.

    python benchmarks/hippocampus.py --data FOLDER --work FOLDER --preset cpu --jobs 2
    python benchmarks/hippocampus.py --data FOLDER --work FOLDER --preset paper --device cuda
    python benchmarks/hippocampus.py --data FOLDER --work FOLDER/0 --preset front --seed 0; advmed compare --repeats
        --front STD 'SAT*' FOLDER/*/report

FOLDER of --data holds the data set in nnU-Net's raw layout with splits_final.json. Everything goes through the
installed commands (nnUNetv2_plan_and_preprocess, nnUNetv2_train, adv-nnunet). A training that is finished is not done
again, one that was cut off goes on with --c, and the evaluation resumes; so the script can be called until it is done.
A working folder is of one preset and seed: what was trained with others is neither taken for these nor trained over,
but an error that asks for another --work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from advmed.files import sha256

CONFIGURATION, FOLD = "2d", "0"


@dataclass(frozen=True)
class Preset:
    """What distinguishes a run that fits on a CPU from the paper's."""

    training_cases: int  # take every n-th
    batch_size: int | None  # None: as nnU-Net plans it
    features: tuple[int, ...] | None
    standard: dict[str, Any]  # settings of the standard training
    adversarial: dict[str, Any]  # settings of all others
    runs: dict[str, tuple[str, dict[str, Any]]]  # name: trainer, further settings
    evaluate: tuple[str, ...] = ()
    levels: tuple[str, ...] = ("0", "2", "6", "10")


FLOOR = {"empty_samples": "floor", "margin_max": 10}
_SAT = {f"SAT{eps}": ("nnUNetTrainerSAT", {"eps": eps}) for eps in (1, 5, 10)}

PRESETS = {
    # The paper's schedule and plan (arXiv 2206.01736, section 3.5): 100 epochs of 50 iterations, nnU-Net's own plan,
    # PGD-20, delta 0.5, xi = mean, from scratch.
    "paper": Preset(
        training_cases=1,
        batch_size=None,
        features=None,
        standard={"epochs": 100, "iterations_per_epoch": 50, "seed": 0},
        adversarial={"preset": "paper", "epochs": 100, "iterations_per_epoch": 50, "seed": 0, "delta": 0.5},
        runs=_SAT
        | {
            "AMAT.paper": ("nnUNetTrainerAMAT", {"refinement": "paper"}),
            "AMAT.crossing": ("nnUNetTrainerAMAT", {"refinement": "crossing"}),
        },
    ),
    # A quarter of the training cases, a small network, and fine-tuning from the standard training. delta is raised,
    # because a sample is met a few times only.
    "cpu": Preset(
        training_cases=4,
        batch_size=24,
        features=(12, 24, 48, 96),
        standard={"epochs": 10, "iterations_per_epoch": 250, "val_iterations_per_epoch": 5, "seed": 0},
        adversarial={
            "epochs": 5,
            "iterations_per_epoch": 100,
            "val_iterations_per_epoch": 5,
            "seed": 0,
            "start_from": "standard",
            "preset": "paper",
            "steps": 10,
            "delta": 1.5,
            "attack_precision": "bfloat16",
        },
        runs=_SAT
        | {
            "AMAT.paper": ("nnUNetTrainerAMAT", {"refinement": "paper"}),
            "AMAT.crossing": ("nnUNetTrainerAMAT", {"refinement": "crossing"}),
            "AMAT.paper.2std": ("nnUNetTrainerAMAT", {"refinement": "paper", "rule": "mean+2std"}),
        },
        evaluate=("--samples", "100"),
    ),
    # The networks of zoo/: all training cases, a network of a megabyte, the product's default preset.
    "zoo": Preset(
        training_cases=1,
        batch_size=24,
        features=(16, 32, 64, 128),
        standard={
            "epochs": 100,
            "iterations_per_epoch": 60,
            "val_iterations_per_epoch": 5,
            "initial_lr": 0.03,
            "seed": 0,
        },
        adversarial={
            "iterations_per_epoch": 60,
            "val_iterations_per_epoch": 5,
            "initial_lr": 0.01,
            "seed": 0,
        },
        runs={
            "SAT3.5": ("nnUNetTrainerSAT", {"eps": 3.5}),
            "AMAT": ("nnUNetTrainerAMAT", {"rule": "mean+2std"}),
        },
    ),
}
# The same networks, more levels of SAT and more of AMAT's dial; slices without a structure at the floor.
PRESETS["front"] = replace(
    PRESETS["zoo"],
    runs={
        **{f"SAT{eps:g}": ("nnUNetTrainerSAT", {"eps": eps}) for eps in (2, 3.5, 5, 7)},
        "AMAT": ("nnUNetTrainerAMAT", {"rule": "mean+2std"}),
        **{f"AMAT.floor{std}": ("nnUNetTrainerAMAT", {"rule": f"mean+{std}std", **FLOOR}) for std in (1, 2, 3)},
    },
    evaluate=("--samples", "256", "--attacks", "pgd20", "apgd50", "--checks", "0"),
)
# Whether everything runs, in minutes: a network that has seen eight slices has learnt nothing, and is asked all the
# same for thresholds.
_SMOKE = {"epochs": 1, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1, "seed": 0}
PRESETS["smoke"] = replace(
    PRESETS["cpu"],
    training_cases=20,
    batch_size=4,
    features=(4, 8, 16, 32),
    standard=_SMOKE,
    adversarial={
        **_SMOKE,
        "start_from": "standard",
        "preset": "paper",
        "steps": 2,
        "delta": 1.5,
        "check_standard": False,
    },
    evaluate=("--samples", "4", "--checks", "0"),
)
OTHER_WORK = "take another --work"


def features_for(first: Sequence[int], stages: int) -> list[int]:
    """Features of each stage of a plan: the first ones, and beyond them twice as many each, up to 16 times the first.

    As nnU-Net's own go, from 32 to 512; its plans have more stages for larger images.
    """
    found = list(first[:stages])
    while len(found) < stages:
        found.append(min(2 * found[-1], 16 * found[0]))
    return found


def differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """Of two settings; a working folder may have been moved, so of thresholds the file's name counts."""
    new, old = (
        {key: Path(value).name if key == "thresholds" else value for key, value in found.items()}
        for found in (now, then)
    )
    return [
        f"{key} is {new.get(key, 'not set')}, and was {old.get(key, 'not set')}"
        for key in {**new, **old}
        if new.get(key) != old.get(key)
    ]


@dataclass
class Benchmark:
    """The steps of one preset in one working folder."""

    preset: Preset
    data: Path
    work: Path
    device: str
    jobs: int
    name: str = "Dataset004_Hippocampus"
    number: str = field(init=False)
    plans: str = field(init=False)

    def __post_init__(self) -> None:
        self.number = str(int(self.name.removeprefix("Dataset").partition("_")[0]))
        self.plans = "nnUNetPlans" if self.preset.batch_size is None else "nnUNetPlans_cpu"
        self.folders = {n: self.work / n for n in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for folder in (*self.folders.values(), self.work / "logs", self.work / "settings"):
            folder.mkdir(parents=True, exist_ok=True)
        self.environment = (
            {"nnUNet_def_n_proc": "2", "nnUNet_n_proc_DA": "1"}
            | dict(os.environ)
            | {name: str(folder) for name, folder in self.folders.items()}
        )
        if self.jobs > 1:
            self.environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def run(self) -> None:
        self.train_all()
        names = ["STD", *self.preset.runs]
        if self.jobs > 1:  # alone, side by side; else the last call does it all
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(self.evaluate, [[name] for name in names]))
        self.evaluate(names, alone=False)
        self.write_tables()

    def train_all(self) -> None:
        """The standard network, then those that begin with it."""
        self.prepare()
        self.train("STD", "nnUNetTrainerSTD", self.preset.standard)
        runs = [
            (name, trainer, {**self.preset.adversarial, **own, "tag": name.removeprefix("SAT").removeprefix("AMAT.")})
            for name, (trainer, own) in self.preset.runs.items()
        ]
        for rule in sorted({settings.get("rule", "mean") for _, _, settings in runs}):
            file = self.thresholds(rule)
            for _, trainer, settings in runs:
                if trainer == "nnUNetTrainerAMAT" and settings.get("rule", "mean") == rule:
                    settings["thresholds"] = str(file)
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda run: self.train(*run), runs))

    def write_tables(self) -> None:
        """results.md: ADI and AUC_robust of every run, margins over the epochs, time of an epoch."""
        report = json.loads((self.work / "report" / "report.json").read_text())
        levels = [float(level) for level in self.preset.levels]
        lines = []
        for attack in report["configuration"]["evaluation"]["attacks"]:
            heads = [f"{level:g}" for level in levels[1:]]
            lines += [
                f"| {attack} | clean | {' | '.join(heads)} | mean | AUC_robust |",
                "|---" * (len(heads) + 4) + "|",
            ]
            for name, model in report["results"]["ADI"]["models"].items():
                found = model["attacks"][attack]
                cells = [*found["values"], sum(found["values"][1:]) / len(heads), found["auc_robust"]]
                lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
            lines.append("")
        logs = {name: self.log(name) for name in ("STD", *self.preset.runs)}
        margins = {name: log for name, log in logs.items() if name.startswith("AMAT")}
        epochs = range(max((len(log["adv_margin_q50"]) for log in margins.values()), default=0))
        if margins:
            lines += [
                "| margins 5 / 50 / 95 % after epoch | " + " | ".join(margins) + " |",
                "|---" * (len(margins) + 1) + "|",
            ]
        for epoch in epochs:
            cells = [
                " / ".join(f"{log[f'adv_margin_{q}'][epoch]:.2f}" for q in ("q05", "q50", "q95"))
                for log in margins.values()
            ]
            lines.append(f"| {epoch + 1} | " + " | ".join(cells) + " |")
        (self.work / "results.md").write_text("\n".join(lines) + "\n")
        print(f"{self.work / 'results.md'}\n\n" + "\n".join(lines))

    def log(self, name: str) -> dict[str, list[float]]:
        checkpoint = torch.load(self.folder(name) / f"fold_{FOLD}" / "checkpoint_final.pth", weights_only=False)
        log: dict[str, list[float]] = checkpoint["logging"]
        return log

    def prepare(self) -> None:
        raw, preprocessed = (self.folders[n] / self.name for n in ("nnUNet_raw", "nnUNet_preprocessed"))
        if not raw.exists():
            shutil.copytree(self.data, raw)
        if not (preprocessed / "nnUNetPlans_2d").exists() or not (preprocessed / "splits_final.json").exists():
            arguments = ["-d", self.number, "-c", CONFIGURATION, "-np", "2", "--verify_dataset_integrity"]
            self.command("preprocess", ["nnUNetv2_plan_and_preprocess", *arguments])
        splits = json.loads((self.data / "splits_final.json").read_text())
        splits[0]["train"] = splits[0]["train"][:: self.preset.training_cases]
        self.write_once(preprocessed / "splits_final.json", splits)
        if self.preset.batch_size is not None:
            plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
            plans["plans_name"] = self.plans
            plans["configurations"][CONFIGURATION]["batch_size"] = self.preset.batch_size
            network = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
            network["features_per_stage"] = features_for(self.preset.features or (), network["n_stages"])
            self.write_once(preprocessed / f"{self.plans}.json", plans)

    def write_once(self, file: Path, content: Any) -> None:
        """Writes what the trainings are made with, unless there are trainings that were made with something else."""
        if file.exists() and json.loads(file.read_text()) == content:
            return
        if any((self.folders["nnUNet_results"] / self.name).glob(f"*__{self.plans}__*/fold_*/checkpoint_*.pth")):
            raise SystemExit(f"{self.work} has trainings with another {file.name} than this one's: {OTHER_WORK}")
        file.write_text(json.dumps(content, indent=1))

    def folder(self, name: str) -> Path:
        trainer = "nnUNetTrainerSTD" if name == "STD" else self.preset.runs[name][0]
        tag = "" if name == "STD" else "_" + name.removeprefix("SAT").removeprefix("AMAT.")
        return self.folders["nnUNet_results"] / self.name / f"{trainer}{tag}__{self.plans}__{CONFIGURATION}"

    def train(self, name: str, trainer: str, settings: dict[str, Any]) -> None:
        fold, file = self.folder(name) / f"fold_{FOLD}", self.work / "settings" / f"{name}.yaml"
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())
        begun = any(fold.glob("checkpoint_*.pth"))
        if begun:
            then = yaml.safe_load(file.read_text()) if file.exists() else {"settings": f"in no {file}"}
            if other := differences(yaml.safe_load(text), then):
                raise SystemExit(f"{fold} was trained otherwise ({'; '.join(other)}): {OTHER_WORK}")
        if (fold / "checkpoint_final.pth").exists():
            return
        file.write_text(text)
        jobs = file.with_suffix(".jobs")  # trainings side by side, which seconds depend on; the most, if interrupted
        jobs.write_text(str(max(self.jobs, int(jobs.read_text()) if jobs.exists() else 1)))
        arguments = [self.number, CONFIGURATION, FOLD, "-p", self.plans, "-tr", trainer, "-device", self.device]
        if begun:
            arguments.append("--c")
        self.command(f"train_{name}", ["nnUNetv2_train", *arguments], nnUNet_adversarial=str(file))

    def thresholds(self, rule: str) -> Path:
        file = self.work / "settings" / f"thresholds_{rule}.json"
        standard = self.folder("STD") / f"fold_{FOLD}" / "checkpoint_final.pth"
        if file.exists() and json.loads(file.read_text())["source_sha256"] != sha256(standard):
            raise SystemExit(f"{file} is of another network than {standard}: {OTHER_WORK}")
        if not file.exists():
            arguments = [
                "-d",
                self.number,
                "-c",
                CONFIGURATION,
                "-f",
                FOLD,
                "-p",
                self.plans,
                "-tr",
                "nnUNetTrainerSTD",
            ]
            arguments += ["--rule", rule, "-device", self.device, "-o", str(file)]
            self.command(f"thresholds_{rule}", ["adv-nnunet", "thresholds", *arguments])
        return file

    def evaluate(self, names: list[str], alone: bool | None = None) -> None:
        """Parts of single models, so that they can run side by side; the last call puts them together.

        ``alone``: None for a single name.
        """
        alone = len(names) == 1 if alone is None else alone
        output = self.work / "report" if not alone else self.work / "parts" / names[0]
        if not alone:
            for name in names:
                source = self.work / "parts" / name / name
                if source.exists():
                    shutil.copytree(source, output / name, dirs_exist_ok=True)
        arguments = ["-d", self.number, "-c", CONFIGURATION, "-f", FOLD, "-p", self.plans, "-device", self.device]
        arguments += ["-m", *(f"{name}={self.folder(name)}" for name in names), "--levels", *self.preset.levels]
        arguments += [*self.preset.evaluate, "-o", str(output)]
        self.command(f"evaluate_{'all' if not alone else names[0]}", ["adv-nnunet", "evaluate", *arguments])

    def command(self, log: str, arguments: list[str], **variables: str) -> None:
        start = time.monotonic()
        module = {
            "nnUNetv2_train": "from nnunetv2.run.run_training import run_training_entry as main",
            "nnUNetv2_plan_and_preprocess": "from nnunetv2.experiment_planning."
            "plan_and_preprocess_entrypoints import plan_and_preprocess_entry as main",
            "adv-nnunet": "from adv_nnunet.cli import main",
        }[arguments[0]]
        # nnU-Net gives every process all cores on a CPU; two side by side would wait for each other.
        share = (
            "import multiprocessing, os; multiprocessing.cpu_count = os.cpu_count = lambda: 1; "
            if self.jobs > 1
            else ""
        )
        code = f"{share}import sys; sys.argv[0] = {arguments[0]!r}; {module}; sys.exit(main())"
        with (self.work / "logs" / f"{log}.log").open("a") as out:
            status = subprocess.call(
                [sys.executable, "-c", code, *arguments[1:]],
                env=self.environment | variables,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        print(
            f"{log}: {'failed, see its log' if status else 'done'} after {time.monotonic() - start:.0f} s", flush=True
        )
        if status:
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/hippocampus"))
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (each on one thread if above 1)")
    parser.add_argument("--name", default=Benchmark.name, help="of the data set, as nnU-Net has it")
    parser.add_argument("--seed", type=int, default=0, help="of all trainings; each seed wants a --work of its own")
    args = parser.parse_args()
    places = (args.data.resolve(), args.work.resolve())
    preset = PRESETS[args.preset]
    seed = {"seed": args.seed}
    preset = replace(preset, standard={**preset.standard, **seed}, adversarial={**preset.adversarial, **seed})
    Benchmark(preset, *places, args.device, args.jobs, args.name).run()


if __name__ == "__main__":
    main()
