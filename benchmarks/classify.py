"""STD, AT, SAT, AMAT, TRADES, DPAAT and DPAAT's two ablations on classification data: training, attack, one table.

    python benchmarks/classify.py --data pneumonia --source FILE --work FOLDER [--seeds 0 1 2] [--jobs 2]
    python benchmarks/classify.py --data ham10000 --source FOLDER --work FOLDER --preset full --device gpu

Everything goes through the installed command adv-classify. A training that is finished is not done again, one that was
cut off is resumed, and the evaluation resumes; so the script can be called until it is done.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

METRICS = ("accuracy", "balanced accuracy", "mAP")


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
        """The arguments of every run. AMAT's delta lets a margin reach twice eps in the course of a run."""
        return {
            "STD": {"name": "STD"},
            "AT": {"name": "AT"},
            "SAT": {"name": "SAT"},
            "TRADES": {"name": "TRADES"},
            "AMAT": {"name": "AMAT", "delta": round(self.eps / 5, 4)},
            "DPAAT": {"name": "DPAAT"},
            "DPAAT.fixed": {"name": "DPAAT", "step_size": 0.0},
            "DPAAT.nosync": {"name": "DPAAT", "sync_weight": 0.0},
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
        ("pgd100", "ifgsm10"),
    ),
    ("pneumonia", "full"): Preset(
        ("resnet18", "test_efficientnet"), PNEUMONIA, 0.4, (0, 0.2, 0.4, 0.8), 50, 10, {"lr": 1e-3}
    ),
    ("ham10000", "cpu"): Preset(
        ("test_resnet", "test_efficientnet"),
        HAM | {"size": [48, 64]},
        0.5,
        (0, 0.25, 0.5, 1),
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
class Benchmark:
    """The runs of one preset in one working folder."""

    data: str
    preset: Preset
    source: Path
    work: Path
    seeds: list[int]
    only: list[str]
    device: str
    jobs: int

    def run(self) -> None:
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        runs = [(n, m, s) for s in self.seeds for n in self.preset.networks for m in self.methods if m != "AMAT"]
        # AMAT takes its thresholds from the standard network of its seed.
        after = [(n, "AMAT", s) for s in self.seeds for n in self.preset.networks if "AMAT" in self.methods]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda run: self.train(*run), runs))
            list(pool.map(lambda run: self.train(*run), after))
            list(pool.map(lambda run: self.evaluate(*run), [*runs, *after]))
        self.write_tables()

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        every = self.preset.methods()
        return {name: every[name] for name in (self.only or every)}

    def folder(self, network: str, method: str, seed: int) -> Path:
        return self.work / f"{network}_{method}_{seed}"

    def checkpoint(self, network: str, method: str, seed: int) -> Path:
        """The last checkpoint: of the newest version, as a resumed run opens a new one."""
        folder = self.folder(network, method, seed) / "lightning_logs"
        found = sorted(folder.glob("version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else folder / "version_0" / "checkpoints" / "last.ckpt"

    def configuration(self, network: str, method: str, seed: int) -> Path:
        reader, argument = READERS[self.data]
        workers = 0 if self.device == "cpu" else 8
        arguments = dict(self.methods[method]) | {"eps": self.preset.eps}
        if method == "AMAT":
            arguments["thresholds"] = str(self.checkpoint(network, "STD", seed))
        data = {argument: str(self.source), "workers": workers, "seed": seed, **self.preset.data}
        content = {
            "seed_everything": seed,
            "model": {
                "network": {"name": network, "channels_last": True},
                "method": arguments,
                "attack": {"steps": self.preset.steps},
                **self.preset.model,
            },
            "data": {"class_path": reader, "init_args": data},
            "trainer": {
                "max_epochs": self.preset.epochs,
                "accelerator": self.device,
                "devices": 1,
                "enable_progress_bar": False,
                "default_root_dir": str(self.folder(network, method, seed)),
            },
        }
        path = self.work / f"{network}_{method}_{seed}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def train(self, network: str, method: str, seed: int) -> None:
        done = self.work / "logs" / f"{network}_{method}_{seed}.done"
        if done.exists():
            return
        command = ["fit", "--config", str(self.configuration(network, method, seed))]
        checkpoint = self.checkpoint(network, method, seed)
        if checkpoint.exists():
            command += ["--ckpt_path", str(checkpoint)]
        self.command(f"train_{network}_{method}_{seed}", command)
        done.touch()

    def evaluate(self, network: str, method: str, seed: int) -> None:
        output = self.work / "reports" / f"{network}_{method}_{seed}"
        if (output / "L2" / "report.json").exists() and (output / "Linf" / "report.json").exists():
            return
        command = ["evaluate", str(self.checkpoint(network, method, seed)), "--names", f"[{method}]"]
        command += ["--config", str(self.configuration(network, method, seed)), "--out", str(output)]
        command += ["--levels", json.dumps(self.preset.levels), "--attacks", json.dumps(self.preset.attacks)]
        command += ["--device", "cuda" if self.device == "gpu" else "cpu", "--examples", "1"]
        self.command(f"evaluate_{network}_{method}_{seed}", command)

    def write_tables(self) -> None:
        """results.md: for each network, norm and attack the metrics, mean and standard deviation over the seeds."""
        lines = []
        for network in self.preset.networks:
            for norm in ("L2", "Linf"):
                for attack in self.preset.attacks:
                    lines += self.table(network, norm, attack)
        path = self.work / "results.md"
        path.write_text("\n".join(lines) + "\n")
        print(f"{path}\n\n" + "\n".join(lines))

    def table(self, network: str, norm: str, attack: str) -> list[str]:
        heads = [f"{metric}{part}" for metric in METRICS for part in (" clean", ", attacked mean", " AUC_robust")]
        lines = [f"| {network}, {norm}, {attack} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for method in self.methods:
            columns: dict[str, list[float]] = {head: [] for head in heads}
            for seed in self.seeds:
                path = self.work / "reports" / f"{network}_{method}_{seed}" / norm / "report.json"
                results = json.loads(path.read_text())["results"]
                for metric in METRICS:
                    found = results[metric]["models"][method]
                    columns[f"{metric} clean"].append(found["clean"])
                    columns[f"{metric}, attacked mean"].append(found["attacks"][attack]["attacked_mean"])
                    columns[f"{metric} AUC_robust"].append(found["attacks"][attack]["auc_robust"])
            lines.append(f"| {method} | " + " | ".join(spread(values) for values in columns.values()) + " |")
        return [*lines, ""]

    def command(self, log: str, arguments: list[str]) -> None:
        start = time.monotonic()
        environment = os.environ | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        if self.jobs > 1:
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        executable = Path(sysconfig.get_path("scripts")) / "adv-classify"
        with (self.work / "logs" / f"{log}.log").open("a") as out:
            status = subprocess.call(
                [str(executable), *arguments], env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=self.work
            )
        print(
            f"{log}: {'failed, see its log' if status else 'done'} after {time.monotonic() - start:.0f} s", flush=True
        )
        if status:
            sys.exit(1)


def spread(values: list[float]) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=READERS, required=True)
    parser.add_argument("--source", type=Path, required=True, help="the .npz file, or HAM10000's folder")
    parser.add_argument("--work", type=Path, default=Path("build/classify"))
    parser.add_argument("--preset", choices=("cpu", "full"), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=[], help="methods; default: all")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (each on one thread if above 1)")
    args = parser.parse_args()
    preset = PRESETS[args.data, args.preset]
    source, work = args.source.resolve(), args.work.resolve()
    Benchmark(args.data, preset, source, work, args.seeds, args.only, args.device, args.jobs).run()


if __name__ == "__main__":
    main()
