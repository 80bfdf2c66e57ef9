"""What the benchmarks of both Lightning tools share: trainings and evaluations through the installed command.

A training that is finished is not done again, one that was cut off is resumed, and the evaluation resumes; so a
benchmark can be called until it is done. What was trained with other settings in the same working folder is neither
taken for these nor trained over, but an error that asks for another --work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Runs(ABC):
    """Every method on every network with every seed, in one working folder."""

    work: Path
    networks: Sequence[str]
    seeds: list[int]
    only: list[str]
    device: str
    jobs: int

    tool = ""
    """The command."""

    @abstractmethod
    def every_method(self) -> dict[str, dict[str, Any]]:
        """The methods by their names in the tables; thresholds "STD" are those of the standard network of the seed."""

    @abstractmethod
    def content(self, network: str, method: str, seed: int) -> dict[str, Any]:
        """The sections model and data of a configuration."""

    @abstractmethod
    def epochs(self) -> int:
        """Length of a training."""

    @abstractmethod
    def evaluation(self) -> list[str]:
        """Words for the command's evaluate."""

    @abstractmethod
    def tables(self) -> list[str]:
        """results.md, in lines."""

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        every = self.every_method()
        return {name: every[name] for name in (self.only or every)}

    def run(self) -> None:
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        runs = [(n, m, s) for s in self.seeds for n in self.networks for m in self.methods]
        trained: dict[tuple[str, str, int], Future[None]] = {}

        def train(network: str, method: str, seed: int) -> None:
            needed = self.methods[method].get("thresholds")
            if (network, needed, seed) in trained:
                trained[network, needed, seed].result()  # began earlier, so it cannot wait for this one
            self.train(network, method, seed)

        def evaluate(network: str, method: str, seed: int) -> None:
            trained[network, method, seed].result()
            self.evaluate(network, method, seed)

        with ThreadPoolExecutor(self.jobs) as pool:
            for run in sorted(runs, key=lambda run: self.methods[run[1]].get("thresholds") is not None):
                trained[run] = pool.submit(train, *run)
            for measured in [pool.submit(evaluate, *run) for run in runs]:
                measured.result()
        lines, path = self.tables(), self.work / "results.md"
        path.write_text("\n".join(lines) + "\n")
        print(f"{path}\n\n" + "\n".join(lines))

    def folder(self, network: str, method: str, seed: int) -> Path:
        return self.work / f"{network}_{method}_{seed}"

    def checkpoint(self, network: str, method: str, seed: int) -> Path:
        """The last checkpoint: of the newest version, as a resumed run opens a new one."""
        folder = self.folder(network, method, seed) / "lightning_logs"
        found = sorted(folder.glob("version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else folder / "version_0" / "checkpoints" / "last.ckpt"

    def results(self, network: str, method: str, seed: int, norm: str) -> dict[str, Any]:
        """The numbers of a report: by metric, of the model."""
        path = self.work / "reports" / f"{network}_{method}_{seed}" / norm / "report.json"
        results = json.loads(path.read_text())["results"]
        return {metric: found["models"][method] for metric, found in results.items()}

    def configuration(self, network: str, method: str, seed: int) -> Path:
        arguments = dict(self.methods[method])
        if "thresholds" in arguments:
            arguments["thresholds"] = str(self.checkpoint(network, arguments["thresholds"], seed))
        content: dict[str, Any] = {"seed_everything": seed, **self.content(network, method, seed)}
        content["model"]["method"] = {**content["model"].get("method", {}), **arguments}
        content["data"]["init_args"] |= {"workers": 0 if self.device == "cpu" else 8, "seed": seed}
        content["trainer"] = {
            "max_epochs": self.epochs(),
            "accelerator": self.device,
            "devices": 1,
            "enable_progress_bar": False,
            "default_root_dir": str(self.folder(network, method, seed)),
        }
        path = self.work / f"{network}_{method}_{seed}.yaml"
        text = yaml.safe_dump(content, sort_keys=False)
        if path.exists() and self.checkpoint(network, method, seed).exists():
            now, then = (self.settings(yaml.safe_load(words)) for words in (text, path.read_text()))
            if other := [name for name in {**now, **then} if now.get(name) != then.get(name)]:
                told = (f"{name} is {now.get(name, 'not set')}, and was {then.get(name, 'not set')}" for name in other)
                folder = self.folder(network, method, seed)
                raise SystemExit(f"{folder} was trained otherwise ({'; '.join(told)}): take another --work")
        path.write_text(text)
        return path

    def settings(self, content: dict[str, Any]) -> dict[str, Any]:
        """Of a configuration what decides what comes out, by dotted names.

        Not: on which device and where. A working folder may be moved, and another version of a standard network's
        checkpoint is of its resumed run.
        """
        found: dict[str, Any] = {}

        def walk(part: dict[str, Any], before: str) -> None:
            for key, value in part.items():
                if isinstance(value, dict):
                    walk(value, f"{before}{key}.")
                else:
                    found[f"{before}{key}"] = value

        walk(content, "")
        for name in ("trainer.accelerator", "trainer.default_root_dir", "data.init_args.workers"):
            found.pop(name, None)
        thresholds = found.get("model.method.thresholds")
        if isinstance(thresholds, str) and thresholds.endswith(".ckpt"):
            found["model.method.thresholds"] = Path(thresholds).parents[3].name
        return found

    def train(self, network: str, method: str, seed: int) -> None:
        done = self.work / "logs" / f"{network}_{method}_{seed}.done"
        command = ["fit", "--config", str(self.configuration(network, method, seed))]
        if done.exists():
            return
        checkpoint, start = self.checkpoint(network, method, seed), time.monotonic()
        if resumed := checkpoint.exists():
            command += ["--ckpt_path", str(checkpoint)]
        self.command(f"train_{network}_{method}_{seed}", command)
        done.write_text("" if resumed else f"{time.monotonic() - start:.0f}")

    def seconds(self, network: str, method: str, seed: int) -> float | None:
        """That a training took; None where it was interrupted, or is of before they were noted."""
        text = (self.work / "logs" / f"{network}_{method}_{seed}.done").read_text()
        return float(text) if text else None

    def evaluate(self, network: str, method: str, seed: int) -> None:
        log = f"evaluate_{network}_{method}_{seed}"
        output, done = self.work / "reports" / f"{network}_{method}_{seed}", self.work / "logs" / f"{log}.done"
        words = self.evaluation()
        # A report that is there is gone on with, and refused by the command itself where it is of another evaluation;
        # so are those of before the marker held its words.
        if done.exists() and done.read_text() == "\n".join(words):
            return
        command = ["evaluate", str(self.checkpoint(network, method, seed)), "--names", f"[{method}]"]
        command += ["--config", str(self.configuration(network, method, seed)), "--out", str(output)]
        command += ["--device", "cuda" if self.device == "gpu" else "cpu", "--examples", "1", *words]
        self.command(log, command)
        done.write_text("\n".join(words))

    def command(self, log: str, arguments: list[str]) -> None:
        start = time.monotonic()
        environment = os.environ | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        if self.jobs > 1:
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        executable = Path(sysconfig.get_path("scripts")) / self.tool
        with (self.work / "logs" / f"{log}.log").open("a") as out:
            status = subprocess.call(
                [str(executable), *arguments], env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=self.work
            )
        result = "failed, see its log" if status else "done"
        print(f"{log}: {result} after {time.monotonic() - start:.0f} s", flush=True)
        if status:
            sys.exit(1)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def add_arguments(parser: argparse.ArgumentParser, work: str, seeds: list[int], networks: bool = True) -> None:
    """The arguments that every benchmark of this kind has."""
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--preset", choices=("cpu", "full"), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    if networks:
        parser.add_argument("--networks", nargs="+", default=None, help="default: those of the preset")
    parser.add_argument("--only", nargs="*", default=[], help="methods; default: all")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (each on one thread if above 1)")
