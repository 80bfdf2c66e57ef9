"""SIGKILL at random moments of trainings and of an evaluation, which are then called again: nothing is lost or doubled.

    python benchmarks/kills.py [classify landmark nnunet yolo evaluate] [--kills 100] [--seed 0] [--work build/kills]

Each host trains AMAT on a few of the demos' images. A run is killed after a random time, called again the way its
documentation says, killed again, and so on to its end. Where the host repeats its random draws (the Lightning hosts,
the evaluation), the end must be that of a run that nobody killed: weights, margins, thresholds, tables, bit for bit.
nnU-Net and YOLO draw other batches after a resumption: there every visit of every finished epoch must be counted once,
and the checkpoint must be of the last epoch. Commands are processes forked from one that has imported the host, so that
a kill costs seconds. The status is 1 if one differed.
"""

from __future__ import annotations

import argparse
import atexit
import csv
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
MOST = 50
"""Kills of one run, after which it is left to end."""


class Host:
    """What is killed.

    Args:
        work: its folder.
    """

    entry = ""
    """The function of its command, ``module:name``."""
    words: list[str]
    """Of the command line, with {run} for the folder of a run."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True)

    def begin(self, run: Path) -> None:
        """Called before every call."""

    def run(self, command: Callable[..., Any], words: list[str]) -> int:
        """The command, in the child; its status."""
        status: int = command(words)
        return status

    def again(self, run: Path) -> list[str]:
        """More words for a run that was killed."""
        raise NotImplementedError

    def ended(self, run: Path) -> bool:
        """Whether a run that was killed had nothing left to do that it is to be called for again."""
        return False

    def result(self, run: Path) -> dict[str, Any]:
        """What must be as in a run that nobody killed."""
        raise NotImplementedError


def margins(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Lightning(Host):
    epochs = 6

    def configure(self, **data: Any) -> None:
        content = {
            "model": {"method": {"name": "AMAT", "delta": 0.1, "eps": 0.4}, "attack": {"steps": 2}},
            "data": data,
            "trainer": {"max_epochs": self.epochs, "accelerator": "cpu", "enable_progress_bar": False},
            "seed_everything": 1,
        }
        (self.work / "config.yaml").write_text(yaml.safe_dump(content))
        self.words = ["fit", "--config", str(self.work / "config.yaml"), "--trainer.default_root_dir", "{run}"]

    def last(self, run: Path) -> Path | None:
        found = run.glob("lightning_logs/version_*/checkpoints/last.ckpt")
        return max(found, key=lambda path: int(path.parts[-3].rpartition("_")[2]), default=None)

    def again(self, run: Path) -> list[str]:
        last = self.last(run)
        return [] if last is None else ["--ckpt_path", str(last)]

    def result(self, run: Path) -> dict[str, Any]:
        import torch

        last = self.last(run)
        assert last is not None
        state = torch.load(last, weights_only=True)
        weights = {name: value.numpy().tobytes() for name, value in state["state_dict"].items()}
        return {"weights": weights, "epoch": state["epoch"], "margins": margins(last.parents[1] / "margins.csv")}


class Classify(Lightning):
    entry = "adv_classify.cli:main"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        with np.load(DATA / "pneumoniamnist" / "pneumoniamnist.npz") as archive:
            few = {"train": 48, "val": 16, "test": 16}
            parts = {name: archive[name][: few[name.partition("_")[0]]] for name in archive.files}
        np.savez(work / "few.npz", **parts)
        given = {"file": str(work / "few.npz"), "batch_size": 16, "flip": 0, "workers": 0, "rotate": 10}
        self.configure(class_path="adv_classify.data.MedMNIST", init_args=given)
        self.words += ["--model.network.name", "test_resnet"]


class Landmark(Lightning):
    entry = "adv_landmark.cli:main"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        sys.path.insert(0, str(DATA.parent))
        demo = importlib.import_module("demo_landmark")
        content = demo.CONTENT
        self.configure(**content["data"])
        self.words += [word for key, value in flat(content["model"]) for word in (f"--model.{key}", str(value))]
        self.words += ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values by dotted names."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


class Yolo(Host):
    entry = "adv_yolo.cli:main"
    epochs = 5

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        shutil.copytree(DATA / "bccd", work / "data")
        for split, number in (("train", 12), ("val", 4)):
            listed = work / "data" / f"{split}.txt"
            listed.write_text("\n".join(listed.read_text().splitlines()[:number]) + "\n")
        names = yaml.safe_load((work / "data" / "bccd.yaml").read_text())["names"]
        layers = [[-1, 1, "Conv", [width, 3, 2]] for width in (8, 16, 16, 32, 32)]
        model = {"nc": len(names), "backbone": layers, "head": [[[2, 3, 4], 1, "Detect", ["nc"]]]}
        (work / "tiny.yaml").write_text(yaml.safe_dump(model))
        os.environ |= {"YOLO_CONFIG_DIR": str(work), "YOLO_OFFLINE": "true"}
        common = (
            "imgsz=64 batch=4 device=cpu workers=0 plots=False amp=False exist_ok=True mosaic=0 method=amat steps=2"
        )
        self.words = [
            "detect",
            "train",
            f"model={work / 'tiny.yaml'}",
            f"data={work / 'data' / 'bccd.yaml'}",
            *common.split(),
        ]
        self.words += [f"epochs={self.epochs}", "warmup_epochs=0", "project={run}", "name=amat"]

    def again(self, run: Path) -> list[str]:
        last = run / "amat" / "weights" / "last.pt"
        return ["RESUME", str(last)] if last.exists() else []

    def ended(self, run: Path) -> bool:
        last = run / "amat" / "weights" / "last.pt"
        if not last.exists():
            return False
        import torch

        try:
            epoch = torch.load(last, weights_only=False)["epoch"]
        except Exception:  # a damaged file, which the next call stumbles over
            return False
        return epoch in (-1, self.epochs - 1)  # killed behind its last epoch

    def result(self, run: Path) -> dict[str, Any]:
        with (run / "amat" / "results.csv").open(newline="") as file:
            # Ultralytics writes the row of an epoch before its checkpoint, and again if it was killed in between.
            epochs = list(dict.fromkeys(row["epoch"] for row in csv.DictReader(file)))
        import torch

        for path in (run / "amat" / "weights").glob("*.pt"):
            if hasattr(torch.load(path, weights_only=False)["model"], "advmed"):
                return {"names in": path.name}
        return {"epochs": epochs, "visits": {row["id"]: row["visits"] for row in margins(run / "amat" / "margins.csv")}}


class NnUNet(Host):
    entry = "nnunetv2.run.run_training:run_training_entry"
    epochs, iterations = 5, 4

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        source, name = DATA / "Dataset004_Hippocampus", "Dataset004_Hippocampus"
        raw, preprocessed = work / "raw" / name, work / "preprocessed" / name
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (source / "labelsTr").iterdir())[:8]
        for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            (raw / folder).mkdir(parents=True)
            for case in cases:
                shutil.copy(source / folder / f"{case}{ending}", raw / folder)
        description = json.loads((source / "dataset.json").read_text()) | {"numTraining": len(cases)}
        (raw / "dataset.json").write_text(json.dumps(description))
        os.environ |= {f"nnUNet_{kind}": str(work / kind) for kind in ("raw", "preprocessed", "results")}
        os.environ |= {"nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
        plan = Path(sysconfig.get_path("scripts")) / "nnUNetv2_plan_and_preprocess"
        subprocess.run([str(plan), "-d", "4", "-c", "2d", "-np", "1"], check=True, stdout=subprocess.DEVNULL)
        os.environ["nnUNet_n_proc_DA"] = "0"  # not before: planning would set its threads to 0
        plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
        configuration = plans["configurations"]["2d"]
        configuration["batch_size"] = 4
        network = configuration["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [4] * network["n_stages"]
        (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
        (preprocessed / "splits_final.json").write_text(json.dumps([{"train": cases[:6], "val": cases[6:]}]))
        settings = {"epochs": self.epochs, "iterations_per_epoch": self.iterations, "val_iterations_per_epoch": 1}
        settings |= {"steps": 2, "save_every": 1, "warmup_epochs": 1}
        (preprocessed / "adversarial.yaml").write_text(yaml.safe_dump(settings))
        self.words = ["4", "2d", "0", "-tr", "nnUNetTrainerAMAT", "-device", "cpu"]

    def begin(self, run: Path) -> None:
        run.mkdir(exist_ok=True)
        results = self.work / "results"  # nnU-Net reads its variables once, when it is imported
        results.unlink(missing_ok=True)
        results.symlink_to(run)

    def run(self, command: Callable[..., Any], words: list[str]) -> int:
        sys.argv[1:] = words
        os.cpu_count = lambda: 1  # of this child: nnU-Net would take a thread for every core
        command()
        return 0

    def folder(self, run: Path) -> Path:
        return run / "Dataset004_Hippocampus" / "nnUNetTrainerAMAT__nnUNetPlans__2d" / "fold_0"

    def again(self, run: Path) -> list[str]:
        return ["--c"] if any(self.folder(run).glob("checkpoint_*.pth")) else []

    def result(self, run: Path) -> dict[str, Any]:
        import torch

        final = torch.load(self.folder(run) / "checkpoint_final.pth", weights_only=False)
        visits = sum(int(row["visits"]) for row in margins(self.folder(run) / "margins.csv"))
        return {
            "epoch": final["current_epoch"],
            "visits": visits,
            "summary": (self.folder(run) / "validation").exists(),
        }


class Evaluate(Classify):
    """An evaluation of a network of which nobody asks that it is good."""

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        command = importlib.import_module("adv_classify.cli").main
        words = [word.replace("{run}", str(work / "model")) for word in self.words]
        if forked(lambda: command([*words, "--trainer.max_epochs=2"]), work / "model.log", None):
            sys.exit(f"the training ended with an error, see {work / 'model.log'}")
        self.words = ["evaluate", str(self.last(work / "model")), "--out", "{run}", "--device", "cpu", "--checks", "8"]
        self.words += ["--attacks", "[pgd20,apgd10]", "--levels", "[0,0.2,0.4]", "--examples", "1"]

    def again(self, run: Path) -> list[str]:
        return []

    def result(self, run: Path) -> dict[str, Any]:
        return {name: (run / "L2" / name).read_text() for name in ("results.csv", "samples.csv", "table.csv")}


HOSTS: dict[str, type[Host]] = {"classify": Classify, "landmark": Landmark, "nnunet": NnUNet, "yolo": Yolo}
HOSTS["evaluate"] = Evaluate


def forked(work: Callable[[], int], log: Path, seconds: float | None) -> int | None:
    """Runs it in a child; its status, or None if it was killed after so many seconds."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with log.open("ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        try:
            status = work()
        except BaseException as error:  # whatever a command raises: the log has it
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    end = None if seconds is None else time.monotonic() + seconds
    atexit.register(_end, child)
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if end is not None and time.monotonic() >= end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.005)
    finally:
        atexit.unregister(_end)


def _end(child: int) -> None:
    """Nothing outlives this script."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", nargs="*", help=f"of {', '.join(HOSTS)}; default: all")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, default=Path("build/kills"))
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    differed = [name for name in options.hosts or HOSTS if not killed(name, options)]
    return 1 if differed else 0


def killed(name: str, options: argparse.Namespace) -> bool:
    """Kills a host so many times; whether every end was that of the run that nobody killed."""
    folder = options.work.resolve() / name
    shutil.rmtree(folder, ignore_errors=True)
    host, moments = HOSTS[name](folder), random.Random(options.seed)
    module, _, function = host.entry.partition(":")
    command = getattr(importlib.import_module(module), function)

    def call(run: Path, seconds: float | None = None) -> int | None:
        host.begin(run)
        words = [word.replace("{run}", str(run)) for word in [*host.words, *host.again(run)]]
        if "RESUME" in words:
            words = ["detect", "train", "resume", f"model={words[-1]}", "device=cpu"]
        return forked(lambda: host.run(command, words), folder / f"{run.name}.log", seconds)

    start = time.monotonic()
    if status := call(folder / "whole"):
        sys.exit(f"{name}: the run that nobody kills ended with status {status}, see {folder / 'whole.log'}")
    whole, wanted = time.monotonic() - start, host.result(folder / "whole")
    kills, runs, wrong = 0, 0, []
    while kills < options.kills:
        run, mine = folder / f"run_{runs:03}", 0
        runs += 1
        while (
            status := call(run, moments.uniform(0, whole) if mine < MOST and kills < options.kills else None)
        ) is None:
            kills, mine = kills + 1, mine + 1
            if host.ended(run):
                call(run)  # which has nothing to do but to clear up
                status = 0
                break
        found = host.result(run) if status == 0 else {"status": status}
        different = [key for key in wanted if found.get(key) != wanted[key]]
        if different:
            wrong.append(run.name)
            print(f"{name} {run.name}: after {mine} kills {', '.join(different)} differ, see {folder / run.name}.log")
        else:
            shutil.rmtree(run)
        print(f"{name}: {kills} kills, {runs} runs, {len(wrong)} differ", flush=True)
    (folder / "result.json").write_text(json.dumps({"kills": kills, "runs": runs, "differ": wrong}))
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
