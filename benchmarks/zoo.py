"""The networks of zoo/: trained, attacked by the ensemble, and packed with a card each.

    python benchmarks/zoo.py hippocampus --data FOLDER [--work build/zoo] [--jobs 2]
    python benchmarks/zoo.py bccd --data FOLDER
    python benchmarks/zoo.py pneumonia --data FILE
    python benchmarks/zoo.py pneumonia --data FILE --attack-only

--data is the whole data set (hippocampus: nnU-Net's raw layout; bccd: images, labels, bccd.yaml; pneumonia: the npz
file of MedMNIST), of which examples/data has a part. Everything goes through the installed commands; what is finished
is not done again. Then the networks are copied to zoo/, without what is left of their training (the optimiser's state,
ids of samples, paths), and the stock host says what each is worth on the embedded validation data. --attack-only
attacks the networks that lie in zoo/, and writes what it finds into their cards.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from jinja2 import Environment, StrictUndefined, Template
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import bccd  # noqa: E402  # a neighbour, as are the next ones
import hippocampus  # noqa: E402
import stock  # noqa: E402  # found by the line above

from advmed.files import sha256, write_whole  # noqa: E402
from advmed.zoo import CARD, Embedded, Network, networks, read_card  # noqa: E402

ZOO = ROOT / "zoo"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
OVERVIEW = Path(__file__).with_name("zoo.md.jinja")
NAMES = {
    "STD": "standard training",
    "SAT": "adversarial training with one noise level (SAT)",
    "AMAT": "adversarial training with a noise level for each sample (AMAT)",
    "DPAAT": "adversarial training with a noise level for each sample (DPAAT)",
}
NOT_FOR = (
    "Not for patients: a small network, trained for minutes to hours on a CPU, to show what adversarial training does "
    "and to be attacked. It withstands the attacks of its table, at their levels, no others. Its validation data are "
    "those of the table: no test data were seen, and nothing was chosen by the table."
)


@dataclass
class Task:
    """What a task gives to its cards.

    Attributes:
        data, work, jobs: of the command line.
    """

    data: Path
    work: Path
    jobs: int
    name: ClassVar[str] = ""
    host: ClassVar[str] = ""
    finds: ClassVar[str] = ""
    source: ClassVar[str] = ""
    split: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    metric: ClassVar[str] = ""
    norm: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    attack: ClassVar[str] = "standard"

    def prepare(self) -> None:
        """What an attack on packed networks needs."""
        raise NotImplementedError

    def train(self) -> None:
        """What is not trained yet."""
        raise NotImplementedError

    def attack_all(self) -> None:
        """The packed networks; writes the report."""
        raise NotImplementedError

    def trained(self) -> dict[str, str]:
        """Name in the report, by method."""
        raise NotImplementedError

    def folder(self, method: str) -> Path:
        """Where a network is packed."""
        return ZOO / self.name / method

    def report(self) -> Path:
        raise NotImplementedError

    def pack(self, method: str, folder: Path) -> list[str]:
        """Puts a network into an empty folder; the names of its files."""
        raise NotImplementedError

    def commands(self, method: str) -> list[str]:
        """That trained it."""
        raise NotImplementedError

    def seconds(self, method: str) -> float:
        """That its training took, the standard one included."""
        raise NotImplementedError

    def predict(self, method: str) -> list[str]:
        """Commands of the stock host."""
        raise NotImplementedError

    def embedded(self, folder: Path) -> Embedded:
        raise NotImplementedError

    def beside(self) -> dict[str, str]:
        """Files that the networks of a task share, by name."""
        return {}


def in_all(starts: Sequence[float], ends: Sequence[float]) -> float:
    """Seconds of a training, by the median of its epochs: it may have been interrupted."""
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    return statistics.median(lengths) * len(lengths)


def half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in half precision, once each; a host makes them single again when it loads them."""
    made: dict[tuple[int, torch.Size], Tensor] = {}  # nnU-Net names most of its weights several times
    return {
        name: made.setdefault((value.data_ptr(), value.shape), value.half()) if value.is_floating_point() else value
        for name, value in weights.items()
    }


class Hippocampus(Task):
    name = "hippocampus"
    host = "nnU-Net v2"
    finds = "anterior and posterior hippocampus in MRI, slice by slice (2d)"
    source = "Medical Segmentation Decathlon, Task04_Hippocampus, training part (Antonelli et al. 2022)"
    split = "208 training and 17 validation volumes"
    licence = "CC BY-SA 4.0"
    metric = "ADI"
    norm = "L2 norm over a slice of 56 x 40 pixels, in z-scores"
    packages = ("advmed", "nnunetv2", "torch")

    @property
    def bench(self) -> hippocampus.Benchmark:
        return hippocampus.Benchmark(hippocampus.PRESETS["zoo"], self.data, self.work, "cpu", self.jobs)

    def prepare(self) -> None:
        self.bench.prepare()

    def train(self) -> None:
        self.bench.train_all()

    def attack_all(self) -> None:
        bench = self.bench
        models = [f"{name}={self.folder(method)}" for method, name in self.trained().items()]
        words = ["-d", "4", "-c", "2d", "-f", "0", "-p", bench.plans, "-device", "cpu", "-m", *models]
        words += ["--levels", *bench.preset.levels, "--attacks", self.attack, "--samples", "24"]
        bench.command("attack", ["adv-nnunet", "evaluate", *words, "-o", str(self.report().parent)])

    def trained(self) -> dict[str, str]:
        return {"STD": "STD", "SAT": "SAT3.5", "AMAT": "AMAT"}

    def report(self) -> Path:
        return self.work / "report_zoo" / "report.json"

    def pack(self, method: str, folder: Path) -> list[str]:
        source = self.bench.folder(self.trained()[method])
        for name in ("plans.json", "dataset.json"):
            shutil.copy(source / name, folder)
        found = torch.load(source / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        kept = ("network_weights", "init_args", "trainer_name", "inference_allowed_mirroring_axes", "current_epoch")
        content = {name: found[name] for name in kept}
        content["network_weights"] = half(content["network_weights"])
        content["init_args"] = {name: found["init_args"][name] for name in ("configuration", "fold")}
        (folder / "fold_0").mkdir()
        torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
        return ["plans.json", "dataset.json", "fold_0/checkpoint_final.pth"]

    def commands(self, method: str) -> list[str]:
        names = dict.fromkeys(("STD", method))
        preset = self.bench.preset
        settings = {name: preset.standard if name == "STD" else preset.adversarial for name in names}
        trainers = {name: f"nnUNetTrainer{name}" for name in names}
        for name in names:
            if name != "STD":
                settings[name] = settings[name] | preset.runs[self.trained()[name]][1]
        return [
            f"nnUNetv2_train 4 2d 0 -p nnUNetPlans_cpu -tr {trainers[name]} -device cpu    # adversarial.yaml: "
            + ", ".join(f"{key}: {value}" for key, value in settings[name].items())
            for name in names
        ]

    def seconds(self, method: str) -> float:
        return sum(
            in_all(log["epoch_start_timestamps"], log["epoch_end_timestamps"])
            for log in map(self.bench.log, {"STD", self.trained()[method]})
        )

    def predict(self, method: str) -> list[str]:
        return [
            f"nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m zoo/{self.name}/{method} -f 0 -device cpu"
        ]

    def embedded(self, folder: Path) -> Embedded:
        return Embedded(
            metric="Dice, mean over volumes and labels",
            of="14 validation volumes",
            value=round(stock.measure(folder), 4),
        )


class Bccd(Task):
    name = "bccd"
    host = "Ultralytics"
    finds = (
        "red and white blood cells and platelets, boxes in microscopy at 256 pixels (YOLOv8 of half the width of its "
        "smallest size)"
    )
    source = "BCCD"
    split = "294 training and 33 validation images"
    licence = "MIT"
    metric = "mAP50-95"
    norm = "L2 norm over an image of 256 x 256 x 3 values in [0, 1]"
    packages = ("advmed", "ultralytics", "torch", "torchvision")
    attack = "apgd100"  # on all images; the ensemble would take a CPU core some four hours

    @property
    def bench(self) -> bccd.Benchmark:
        return bccd.Benchmark("zoo", self.data, self.work, bccd.NARROW, "cpu", self.jobs, 0)

    def prepare(self) -> None:
        (self.work / "logs").mkdir(parents=True, exist_ok=True)

    def train(self) -> None:
        self.bench.train_all()

    def attack_all(self) -> None:
        bench, names = self.bench, self.trained()
        models = ",".join(str(self.folder(method) / "weights.pt") for method in names)
        words = [f"model={models}", *bench.common("STD"), f"levels={bench.preset.levels}", "batch=11"]
        words += [*bench.preset.evaluate, f"names={','.join(names.values())}", "overwrite=False"]
        bench.command("attack", ["evaluate", *words, f"out={self.report().parent}"])

    def trained(self) -> dict[str, str]:
        return {"STD": "STD", "SAT": "SAT3", "AMAT": "AMAT"}

    def report(self) -> Path:
        return self.work / "report_zoo" / "report.json"

    def pack(self, method: str, folder: Path) -> list[str]:
        file = self.bench.checkpoint(self.trained()[method])
        found = torch.load(file, map_location="cpu", weights_only=False)
        arguments = {"task": "detect", "imgsz": self.bench.preset.imgsz, "data": "bccd.yaml", "single_cls": False}
        found["model"].args = arguments
        vars(found["model"]).pop("pt_path", None)  # of the model that the training began with
        found["model"].yaml["yaml_file"] = Path(found["model"].yaml["yaml_file"]).name
        kept = {"model": found["model"], "train_args": arguments, "version": found["version"], "ema": None}
        kept |= {"epoch": -1, "date": found["date"], "license": found["license"]}
        torch.save(kept, folder / "weights.pt")
        return ["weights.pt"]

    def commands(self, method: str) -> list[str]:
        preset = self.bench.preset
        common = f"data=bccd.yaml imgsz={preset.imgsz} device=cpu {' '.join(bccd.HOST)} seed=0"
        lines = [f"adv-yolo detect train model=yolov8_narrow.yaml {common} {' '.join(preset.standard)} name=STD"]
        if method != "STD":
            own = " ".join((*preset.adversarial, *preset.runs[self.trained()[method]]))
            lines.append(f"adv-yolo detect train model=STD/weights/last.pt {common} {own} name={method}")
        return lines

    def seconds(self, method: str) -> float:
        total = 0.0
        for name in {"STD", self.trained()[method]}:
            with (self.bench.folder(name) / "results.csv").open(newline="") as file:
                ends = [float(row["time"]) for row in csv.DictReader(file, skipinitialspace=True)]
            total += in_all([0.0, *ends[:-1]], ends)
        return total

    def predict(self, method: str) -> list[str]:
        return [
            f"yolo detect predict model=zoo/{self.name}/{method}/weights.pt source=examples/data/bccd/images imgsz=256"
        ]

    def embedded(self, folder: Path) -> Embedded:
        return Embedded(metric="mAP50-95", of="24 validation images", value=round(stock.measure(folder), 4))


class Pneumonia(Task):
    name = "pneumonia"
    host = "timm (or Lightning)"
    finds = "pneumonia or none, in chest X-rays of children, 28 x 28 pixels (timm's test_resnet)"
    source = "PneumoniaMNIST of MedMNIST v2 (Yang et al. 2023; Kermany et al. 2018)"
    split = (
        "4,708 training and 524 validation images, of which 8 are among the training images, too, as it is published"
    )
    licence = "CC BY 4.0"
    metric = "balanced accuracy"  # three of four images have pneumonia: whoever says so of all has 0.74 of the accuracy
    norm = "L2 norm over an image of 28 x 28 values in [0, 1]"
    packages = ("advmed", "timm", "lightning", "torch")
    epochs = 40
    embedded_data = "examples/data/pneumoniamnist/pneumoniamnist.npz"

    def methods(self) -> dict[str, dict[str, Any]]:
        """Options of each training; but for the standard one they start from its weights."""
        start = {"model.network.weights": self.checkpoint("STD"), "trainer.max_epochs": self.epochs // 4}
        return {
            "STD": {},
            "SAT": start | {"model.method.eps": 0.8},
            "AMAT": start | {"model.method.eps": 0.5, "model.method.rule": "boundary"},
            "DPAAT": start | {"model.method.eps": 0.4},
        }

    def checkpoint(self, method: str) -> Path:
        return self.work / method / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"

    def prepare(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        data = {"file": str(self.data), "classes": ["normal", "pneumonia"], "batch_size": 64, "flip": 0, "workers": 0}
        content = {
            "model": {"network": {"name": "test_resnet"}, "lr": 3e-3},
            "data": {"class_path": "adv_classify.data.MedMNIST", "init_args": data | {"rotate": 10, "zoom": 0.1}},
            "trainer": {"max_epochs": self.epochs, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        }
        (self.work / "pneumonia.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def train(self) -> None:
        self.prepare()
        for method in self.methods():
            words = ["fit", "--config", str(self.work / "pneumonia.yaml"), *self.options(method)]
            self.command(method, [*words, "--trainer.default_root_dir", str(self.work / method)])

    def attack_all(self) -> None:
        models = [str(self.folder(method) / "model.ckpt") for method in self.methods()]
        words = ["--config", str(self.work / "pneumonia.yaml"), "--attacks", f"[{self.attack}]", "--norm", "[2]"]
        words += ["--levels", "[0,0.2,0.4,0.8]", "--device", "cpu"]
        self.command("attack", ["evaluate", *models, *words, "--out", str(self.work / "attack")])

    def beside(self) -> dict[str, str]:
        """The data that ``adv-classify evaluate zoo/pneumonia/*/model.ckpt`` reads, from the clone's root."""
        config = yaml.safe_load((self.work / "pneumonia.yaml").read_text())
        config["data"]["init_args"]["file"] = self.embedded_data
        return {"config.yaml": yaml.safe_dump({"data": config["data"]}, sort_keys=False)}

    def options(self, method: str) -> list[str]:
        own = {"model.method.name": method, "seed_everything": 0, **self.methods()[method]}
        return [word for key, value in own.items() for word in (f"--{key}", str(value))]

    def command(self, name: str, words: list[str]) -> None:
        """A command that is not finished yet, on one thread, and how long it took."""
        log = self.work / f"{name}.log"
        if self.done(name).get("words") != words:
            shutil.rmtree(self.work / name, ignore_errors=True)
            executable = Path(sysconfig.get_path("scripts")) / "adv-classify"
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            start = time.monotonic()
            with log.open("w") as out:
                code = subprocess.call([str(executable), *words], env=environment, stdout=out, stderr=out)
            if code:
                sys.exit(f"adv-classify {' '.join(words)}\nfailed; its log: {log}")
            found = {"words": words, "seconds": round(time.monotonic() - start)}
            log.with_suffix(".done").write_text(json.dumps(found))

    def done(self, name: str) -> dict[str, Any]:
        """The command that has finished, and how long it took; of other words it has not."""
        file = self.work / f"{name}.done"
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def trained(self) -> dict[str, str]:
        return {name: name for name in self.methods()}

    def report(self) -> Path:
        folder = self.work / "attack"
        return (folder / "L2" if (folder / "L2").is_dir() else folder) / "report.json"

    def pack(self, method: str, folder: Path) -> list[str]:
        found = torch.load(self.checkpoint(method), map_location="cpu", weights_only=True)
        kept = ("state_dict", "hyper_parameters", "pytorch-lightning_version", "epoch")
        content = {name: found[name] for name in kept}
        content["state_dict"] = half(content["state_dict"])
        torch.save(content, folder / "model.ckpt")
        return ["model.ckpt"]

    def commands(self, method: str) -> list[str]:
        lines = []
        for name in dict.fromkeys(("STD", method)):
            words = " ".join(self.options(name)).replace(str(self.checkpoint("STD")), "STD/checkpoints/last.ckpt")
            lines.append(f"adv-classify fit --config pneumonia.yaml {words}")
        return lines

    def seconds(self, method: str) -> float:
        total = 0.0
        for name in {"STD", method}:
            total += float(self.done(name)["seconds"])
        return total

    def predict(self, method: str) -> list[str]:
        return [f"python examples/stock.py zoo/{self.name}/{method}"]

    def embedded(self, folder: Path) -> Embedded:
        return Embedded(metric="accuracy", of="400 validation images", value=round(stock.measure(folder), 4))


TASKS = {kind.name: kind for kind in (Hippocampus, Bccd, Pneumonia)}


def card(task: Task, method: str, folder: Path, files: Sequence[str]) -> Network:
    """What the card of a packed network says."""
    return Network(
        folder=folder,
        name=f"{task.name}/{method}",
        host=task.host,
        task=task.finds,
        method=NAMES[method],
        files={file: sha256(folder / file) for file in files},
        data=task.source,
        licence=task.licence,
        seed=0,
        hours=f"{task.seconds(method) / 3600:.1f} hours of one CPU core",
        training=task.commands(method),
        predict=task.predict(method),
        versions={package: version(package) for package in task.packages},
        embedded=task.embedded(folder),
        **measured(task, method),
    )


def measured(task: Task, method: str) -> dict[str, Any]:
    """What the report says of a network, by the names of its card."""
    report = json.loads(task.report().read_text())
    name = task.trained()[method]
    found = report["results"][task.metric]["models"][name]["attacks"][task.attack]
    samples = report["configuration"]["samples"]
    checks = report["checks"].get(name, [])
    failed = [check["name"] for check in checks if check["verdict"] == "failed"]
    said = f"{', '.join(failed)} failed" if failed else f"{len(checks)} run, none failed" if checks else "none"
    recipe = report["attacks"][name][task.attack]["recipe"]
    return {
        "split": task.split,
        "metric": task.metric,
        "samples": f"{len(samples)} validation samples",
        "norm": task.norm,
        "levels": found["levels"],
        "attack": str(recipe or task.attack),
        "values": [round(value, 4) for value in found["values"]],
        "intervals": [
            None if None in interval else [round(value, 4) for value in interval] for interval in found["intervals"]
        ],
        "auc_robust": round(found["auc_robust"], 4),
        "checks": said,
    }


WEIGHTS = {
    "Ultralytics": "The weights hold a network of Ultralytics, which claims AGPL-3.0 for it, as the file itself says",
}
"""What holds for the weights, by host, where that of the data is not all."""


def page(network: Network) -> str:
    """A card: what a program reads, then what a person does."""
    plain = {item.name: getattr(network, item.name) for item in fields(Network) if item.name != "folder"}
    plain["embedded"] = vars(network.embedded)
    head = yaml.safe_dump(json.loads(json.dumps(plain)), sort_keys=False, width=1000, allow_unicode=True)
    return template(TEMPLATE).render(
        head=head, network=network, cells=cells(network), not_for=NOT_FOR, weights=WEIGHTS.get(network.host, "")
    )


def cells(network: Network) -> list[str]:
    """The values, with their intervals."""
    return [
        f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
        for value, interval in zip(network.values, network.intervals, strict=True)
    ]


def template(path: Path) -> Template:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(path.read_text("utf-8"))


NOTES = {
    "bccd": " They were attacked before they were packed, with the same weights in a larger file.",
    "pneumonia": " Whoever calls every image pneumonia has 0.74 of the accuracy, and half of the balanced accuracy.",
}
"""What a reader of a task's table has to know."""


def overview() -> str:
    """docs/zoo.md, of all cards."""
    found = networks(ZOO)
    tasks = [(task, list(some)) for task, some in groupby(found, lambda one: one.folder.parent.name)]
    megabytes = sum(one.size for one in found) / 1e6
    return template(OVERVIEW).render(networks=found, tasks=tasks, megabytes=megabytes, cells=cells, notes=NOTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/zoo"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (each on one thread if above 1)")
    parser.add_argument("--attack-only", action="store_true", help="the networks of zoo/ as they are")
    options = parser.parse_args()
    task = TASKS[options.task](options.data.resolve(), options.work.resolve() / options.task, options.jobs)
    files: dict[str, list[str]] = {}
    if options.attack_only:
        task.prepare()
    else:
        task.train()
        for method in task.trained():
            folder = task.folder(method)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            files[method] = task.pack(method, folder)
    task.attack_all()
    for method in task.trained():
        folder = task.folder(method)
        if options.attack_only:
            network = replace(read_card(folder / CARD), **measured(task, method))
        else:
            network = card(task, method, folder, files[method])
        write_whole(network.folder / CARD, page(network))
        print(f"{network.name}: {network.values} {network.embedded.value} {network.size / 1e6:.1f} MB", flush=True)
    report = json.loads(task.report().read_text())
    write_whole(ZOO / task.name / "report.json", json.dumps(report, indent=1) + "\n")
    for name, text in task.beside().items():
        write_whole(ZOO / task.name / name, text)
    write_whole(ROOT / "docs" / "zoo.md", overview())


if __name__ == "__main__":
    main()
