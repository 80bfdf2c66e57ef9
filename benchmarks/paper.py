"""A table of the AMAT paper (arXiv 2206.01736), trained and attacked anew, with the paper's numbers beside ours.

    python benchmarks/paper.py table2 --data FOLDER [--scale cpu|paper|smoke] [--work build/paper] [--device cpu]
    python benchmarks/paper.py table2 --show            what is there, without running anything
    python benchmarks/paper.py list                     the tables, and the data that each needs

Tables 1, 2, 3, 6 and 7 are the methods under attack, 4 the standard networks by Dice of all voxels together, 5 the
time of an epoch, and 8 to 12 AMAT over its delta. `--scale paper` is the paper's schedule, for a GPU; `cpu` a reduced
one; `smoke` tries in minutes whether everything runs, and its numbers mean nothing. Levels and deltas are the paper's
where images are of its size, and otherwise scaled as an L2 norm is (the table says by how much). All on validation
data. Nothing is downloaded: the hearts and prostates of the Medical Segmentation Decathlon and the radiographs of ISBI
2015 are to be had from their owners.

Everything can be interrupted and called again. The table is written to WORK/TABLE.md, its numbers to WORK/TABLE.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import bccd
import hippocampus
import landmark
import torch

from advmed.evaluation.auc import auc_robust

PAPER = Path(__file__).resolve().parents[1] / "tests" / "data"
"""The paper's tables as data."""
ATTACKS = ("pgd100", "ifgsm10")
SEED = 0
"""Of every training."""
Curves = dict[str, dict[str, list[float]]]
"""Method, attack, the metric at the paper's levels, the first of which is 0."""


@dataclass(frozen=True)
class Found:
    """What was measured for a table.

    Attributes:
        curves: by the methods' names in the paper.
        scale: what the paper's levels are multiplied by here.
        delta_scale: what AMAT's deltas are.
        samples: validation samples under attack.
        steps: of the attack in training; the authors' release has 20.
        seconds: by method, for the tables of seconds.
        hours: of the training of each row by itself; None where it was interrupted.
        per: what the seconds are of.
        notes: sentences for the caption.
    """

    curves: Curves
    scale: float
    delta_scale: float
    samples: int
    steps: int
    seconds: dict[str, float]
    hours: dict[str, float | None] = field(default_factory=dict)
    per: str = "epoch"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    data: Path
    work: Path
    scale: str
    device: str
    jobs: int
    show: bool
    spacing: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: what it shows.
        dataset: the name in the paper's tables.
        metric: the same, in the report of the host.
        run: trains and attacks, or reads what is there.
        deltas: whether its rows are AMAT's deltas.
        of: what it is made of where it has no numbers at levels: "clean" or "seconds".
    """

    title: str
    dataset: str
    metric: str
    run: Callable[[Options, Table], Found]
    deltas: bool = False
    of: str = "levels"


PAPER_STEPS = 20
FINE_TUNED = (
    "adversarial networks are fine-tuned from the standard one, which is itself not trained on: theirs is the longer "
    "training"
)
NNUNET = "a data set in nnU-Net's raw layout (dataset.json, imagesTr, labelsTr) and, beside them, splits_final.json"
LAYOUTS = {  # of the folder that --data names
    "heart": f"Medical Segmentation Decathlon, task 2: {NNUNET}, a list whose first entry has train and val",
    "hippocampus": f"Medical Segmentation Decathlon, task 4: {NNUNET}, a list whose first entry has train and val",
    "prostate": f"Medical Segmentation Decathlon, task 5: {NNUNET}, a list whose first entry has train and val",
    "bccd": "BCCD: bccd.yaml (names, and train and val without a path before them), images and labels, as Ultralytics",
    "cephalometric": "ISBI 2015 as it is distributed (TrainingData, Test1Data, 400_senior, 400_junior, at any depth); "
    "or landmarks.csv, split.csv and images, with mm per pixel in a column spacing of split.csv or by --spacing",
}


def missing(dataset: str, folder: Path) -> list[str]:
    """What a folder of --data lacks; the landmarks' reader looks for itself."""
    needed = {"bccd": ("bccd.yaml", "images", "labels"), "cephalometric": ()}
    every = needed.get(dataset, ("dataset.json", "imagesTr", "labelsTr", "splits_final.json"))
    return [name for name in every if not (folder / name).exists()]


def rows(name: str) -> list[dict[str, str]]:
    with (PAPER / name).open(newline="") as file:
        return list(csv.DictReader(file))


def published(table: Table) -> Curves:
    """The paper's numbers; a cell that the scan of the paper has lost is not a number."""
    found: Curves = {}
    if table.of == "clean":
        for row in rows("tvdi_table_4.csv"):
            if row["dataset"] == table.dataset:
                found[row["method"]] = {attack: [float(row["value"])] for attack in ATTACKS}
        return found
    if table.deltas:
        for row in rows("auc_robust_appendix_a.csv"):
            if row["dataset"] == table.dataset:
                found[f"delta {float(row['delta']):g}"] = {"pgd100": [float(v) for v in row["values"].split(";")]}
        return found
    of = [row for row in rows("results_tables_1_to_7.csv") if row["dataset"] == table.dataset]
    levels = sorted({float(row["level"]) for row in of if row["level"].replace(".", "", 1).isdigit()})
    for row in of:
        if row["level"] == "avg":
            continue
        for attack in ATTACKS if row["attack"] == "clean" else (row["attack"],):
            curve = found.setdefault(row["method"], {}).setdefault(attack, [float("nan")] * len(levels))
            curve[levels.index(float(row["level"]))] = float(row["value"])
    return found


def levels_of(table: Table) -> list[float]:
    """The paper's noise levels, with 0."""
    if table.deltas:
        row = next(row for row in rows("auc_robust_appendix_a.csv") if row["dataset"] == table.dataset)
        return [float(level) for level in row["levels"].split(";")]
    of = [row for row in rows("results_tables_1_to_7.csv") if row["dataset"] == table.dataset]
    return sorted({float(row["level"]) for row in of if row["level"] != "avg"})


def deltas_of(dataset: str, scale: str = "paper") -> list[float]:
    """The deltas of the paper's table; of a trial the first and the last."""
    found = [float(row["delta"]) for row in rows("auc_robust_appendix_a.csv") if row["dataset"] == dataset]
    return [found[0], found[-1]] if scale == "smoke" else found


def sats_of(dataset: str) -> list[float]:
    """The levels of SAT in the paper's table."""
    names = {row["method"] for row in rows("results_tables_1_to_7.csv") if row["dataset"] == dataset}
    return sorted(float(name[3:]) for name in names if name.startswith("SAT"))


# The hosts


def segmentation(options: Options, table: Table) -> Found:
    """Hearts, hippocampi and prostates by nnU-Net."""
    preset = hippocampus.PRESETS[options.scale]
    standard, adversarial = dict(preset.standard), dict(preset.adversarial)
    if options.scale == "paper":
        epochs = {"heart": 50, "hippocampus": 100, "prostate": 50}[table.dataset]  # section 3.5
        standard |= {"epochs": epochs, "compile": False}  # nor do the others compile, and seconds are compared
        adversarial |= {"epochs": epochs}
    # A tenth of the paper's visits: a margin needs larger steps to come as far.
    visits = float(adversarial["delta"]) / 0.5
    best = {"heart": 5.0, "hippocampus": 0.5, "prostate": 3.0}[table.dataset]
    runs: dict[str, tuple[str, dict[str, Any]]]
    if table.deltas:
        deltas = deltas_of(table.dataset, options.scale)
        runs = {f"AMAT.{delta:g}": ("nnUNetTrainerAMAT", {"delta": delta * visits}) for delta in deltas}
        names = {f"delta {delta:g}": f"AMAT.{delta:g}" for delta in deltas}
    elif table.of == "clean":
        runs, names = {}, {"STD": "STD"}
    else:
        sats = {f"SAT{eps:g}": ("nnUNetTrainerSAT", {"eps": eps}) for eps in sats_of(table.dataset)}
        runs = {**sats, "AMAT.paper": ("nnUNetTrainerAMAT", {"delta": best * visits})}
        names = {"STD": "STD", **{name: name for name in sats}, "AMAT": "AMAT.paper"}
    runs = {
        name: (kind, {"refinement": "paper", **own} if "AMAT" in name else own) for name, (kind, own) in runs.items()
    }
    levels = tuple(f"{level:g}" for level in levels_of(table))
    preset = replace(preset, standard=standard, adversarial=adversarial, runs=runs, levels=levels)
    data = {"heart": "Dataset002_Heart", "hippocampus": "Dataset004_Hippocampus", "prostate": "Dataset005_Prostate"}
    work = options.work / table.dataset / ("deltas" if table.deltas else "methods")
    bench = hippocampus.Benchmark(preset, options.data, work, options.device, options.jobs, data[table.dataset])
    steps = int(adversarial.get("steps", PAPER_STEPS))
    notes: tuple[str, ...] = (FINE_TUNED,) if "start_from" in adversarial and table.of == "levels" else ()
    if table.of == "seconds":
        if not options.show:
            bench.train_all()
        seconds = {}
        for name, ours in names.items():
            iterations = (standard if ours == "STD" else adversarial)["iterations_per_epoch"]
            seconds[name] = epoch_seconds(bench.log(ours)) / iterations
        lengths = f"{standard['iterations_per_epoch']} (standard) and {adversarial['iterations_per_epoch']}"
        notes += (f"epochs have {lengths} iterations, so that their seconds, validation included, are divided by them",)
        notes += together([work / "settings" / f"{ours}.jobs" for ours in names.values()])
        return Found({}, 1.0, visits, 0, steps, seconds, per="iteration", notes=notes)
    if table.of == "clean":  # of the standard network alone, whose part the tables of all methods go on with
        if not options.show:
            bench.train_all()
            bench.evaluate(["STD"])
        report = json.loads((work / "parts" / "STD" / "report.json").read_text())
    else:
        if not options.show:
            bench.run()
        report = json.loads((work / "report" / "report.json").read_text())
    hours: dict[str, float | None] = {}
    for name, ours in names.items():
        log = bench.log(ours)
        hours[name] = epoch_seconds(log) * len(log["epoch_end_timestamps"]) / 3600
    return Found(curves_in(report, table, names), 1.0, visits, samples_in(report), steps, {}, hours, notes=notes)


def epoch_seconds(log: dict[str, list[float]]) -> float:
    """The median, from nnU-Net's own log."""
    starts, ends = log["epoch_start_timestamps"], log["epoch_end_timestamps"]
    return statistics.median(end - start for start, end in zip(starts, ends, strict=False))


def together(files: Sequence[Path]) -> tuple[str, ...]:
    """What is to be said where seconds are not those of one training at a time."""
    if not all(file.exists() for file in files):
        return ("how many trainings ran side by side was not recorded",)
    most = max(int(file.read_text()) for file in files)
    return () if most == 1 else (f"{most} trainings ran side by side, so that NO SECONDS HERE CAN BE COMPARED",)


def detection(options: Options, table: Table) -> Found:
    """Blood cells by YOLO."""
    preset = bccd.PRESETS[options.scale]
    levels = levels_of(table)
    scale = float(preset.levels.split(",")[-1]) / levels[-1]
    calibrated = options.scale == "smoke"
    if table.deltas:
        own = bccd.SELF_CALIBRATED if calibrated else ()
        deltas = deltas_of(table.dataset, options.scale)
        names = {f"delta {delta:g}": f"AMAT.{delta:g}" for delta in deltas}
        runs = {f"AMAT.{delta:g}": ("method=amat", f"delta={delta * scale:g}", *own) for delta in deltas}
    else:
        names = {name: name for name in ("STD", *(f"SAT{eps:g}" for eps in sats_of(table.dataset)), "AMAT")}
        every = bccd.runs(scale, 3.5 * scale, calibrated=calibrated)
        runs = {name: every[name] for name in names if name != "STD"}
    bccd.PRESETS["paper's table"] = replace(preset, runs=runs)
    work = options.work / table.dataset / ("deltas" if table.deltas else "methods")
    network = "yolov5s" if options.scale == "paper" else "yolov5n"
    bench = bccd.Benchmark("paper's table", options.data, work, f"{network}.yaml", options.device, options.jobs, SEED)
    steps = int(dict(word.split("=", 1) for word in preset.adversarial).get("steps", PAPER_STEPS))
    built = f"{network} as Ultralytics builds it today (the paper: YOLO v5s 6.1), images of {preset.imgsz} (320)"
    notes: tuple[str, ...] = (built,)
    notes += (FINE_TUNED,) if preset.from_standard and table.of == "levels" else ()
    if table.of == "seconds":
        if not options.show:
            bench.train_all()
        seconds = {name: bccd.epoch_seconds(bench.folder(ours) / "results.csv") for name, ours in names.items()}
        notes += ("every epoch is one pass over the same images, without validation",)
        notes += together([work / "logs" / f"{ours}.jobs" for ours in names.values()])
        return Found({}, scale, scale, 0, steps, seconds, notes=notes)
    if not options.show:
        bench.run()
    report = json.loads((work / "report_paper's table" / "report.json").read_text())
    hours: dict[str, float | None] = {}
    for name, ours in names.items():
        log = bench.folder(ours) / "results.csv"
        hours[name] = bccd.epoch_seconds(log) * (len(log.read_text().splitlines()) - 1) / 3600
    return Found(curves_in(report, table, names), scale, scale, samples_in(report), steps, {}, hours, notes=notes)


def landmarks(options: Options, table: Table) -> Found:
    """Cephalograms by the multi-task U-Net."""
    preset = landmark.PRESETS["full" if options.scale == "paper" else options.scale]
    deltas = deltas_of(table.dataset, options.scale)
    if table.deltas:
        names = {f"delta {delta:g}": f"AMAT.{delta:g}" for delta in deltas}
    else:
        names = {"STD(BCE)": "STD.bce", "STD(Dice)": "STD", **{f"SAT{k}": f"SAT{k}" for k in (1, 3, 5)}, "AMAT": "AMAT"}

    class Chosen(landmark.Landmark):
        def every_method(self) -> dict[str, dict[str, Any]]:
            if not table.deltas:
                return super().every_method()
            return {"STD": {"name": "STD"}} | {f"AMAT.{delta:g}": self.amat(delta) for delta in deltas}

    work = options.work / table.dataset / ("deltas" if table.deltas else "methods")
    encoder = preset.network["encoder"]
    only = [] if table.deltas else list(names.values())
    device = "cpu" if options.device == "cpu" else "gpu"
    bench = Chosen(work, [encoder], [SEED], only, device, options.jobs, preset, options.data, options.spacing)
    if not options.show:
        bench.run()
    curves: Curves = {}
    hours: dict[str, float | None] = {}
    for name, ours in names.items():
        model = bench.results(encoder, ours, SEED, "L2")[table.metric]
        curves[name] = {attack: model["attacks"][attack]["values"] for attack in ATTACKS}
        seconds = bench.seconds(encoder, ours, SEED)
        hours[name] = None if seconds is None else seconds / 3600
    report = json.loads(
        (work / "reports" / f"{encoder}_{next(iter(names.values()))}_{SEED}" / "L2" / "report.json").read_text()
    )
    notes: tuple[str, ...] = (f"encoder {encoder} (the paper's: VGG19), {preset.epochs} epochs (500)",)
    if preset.data["channels"] == 1:
        notes += ("one channel for the paper's three",)
    return Found(curves, preset.scale, preset.scale, samples_in(report), preset.steps, {}, hours, notes=notes)


def curves_in(report: dict[str, Any], table: Table, names: dict[str, str]) -> Curves:
    """The curves of a report of several models."""
    models = report["results"][table.metric]["models"]
    return {
        name: {attack: models[ours]["attacks"][attack]["values"] for attack in ATTACKS} for name, ours in names.items()
    }


def samples_in(report: dict[str, Any]) -> int:
    return len(report["configuration"]["samples"])


TABLES = {
    "table1": Table("ADI of hearts, nnU-Net", "heart", "ADI", segmentation),
    "table2": Table("ADI of hippocampi, nnU-Net", "hippocampus", "ADI", segmentation),
    "table3": Table("ADI of prostates, nnU-Net", "prostate", "ADI", segmentation),
    "table4": Table("TVDI of the standard network of hippocampi", "hippocampus", "TVDI", segmentation, of="clean"),
    "table5": Table("seconds of training, hippocampi", "hippocampus", "ADI", segmentation, of="seconds"),
    "table5-bccd": Table("seconds of training, blood cells", "bccd", "mAP50-95", detection, of="seconds"),
    "table6": Table("MRE of cephalograms in mm, multi-task U-Net", "cephalometric", "MRE", landmarks),
    "table7": Table("mAP50-95 of blood cells, YOLOv5", "bccd", "mAP50-95", detection),
    "table8": Table("ADI of hearts over delta", "heart", "ADI", segmentation, deltas=True),
    "table9": Table("ADI of hippocampi over delta", "hippocampus", "ADI", segmentation, deltas=True),
    "table10": Table("ADI of prostates over delta", "prostate", "ADI", segmentation, deltas=True),
    "table11": Table("MRE of cephalograms in mm over delta", "cephalometric", "MRE", landmarks, deltas=True),
    "table12": Table("average IoU of blood cells over delta", "bccd", "IoU", detection, deltas=True),
}


def sums_of(table: Table, curves: Curves) -> dict[str, dict[str, tuple[float, float]]]:
    """By method and attack: the mean over the levels above 0 ("Avg." of the paper), and AUC_robust.

    Where less is better, values are divided by the largest of the paper's table, so that ours and theirs are alike. A
    curve with a number that the scan has lost has none.
    """
    levels, higher = levels_of(table), table.metric != "MRE"
    known = [v for rows in published(table).values() for curve in rows.values() for v in curve if v == v]
    return {
        method: {
            attack: (
                statistics.mean(curve[1:]),
                auc_robust(levels, curve, higher_is_better=higher, scale=None if higher else max(known)),
            )
            for attack, curve in by_attack.items()
            if all(value == value for value in curve)
        }
        for method, by_attack in curves.items()
    }


def beside(own: Sequence[float], theirs: Sequence[float]) -> list[str]:
    """Cells: ours and, in brackets, the paper's, where it has one."""
    pairs = zip_longest(own, theirs[: len(own)], fillvalue=math.nan)
    return [f"{ours:.3f}" + (f" ({other:.3f})" if other == other else "") for ours, other in pairs]


def caption(table: Table, found: Found, scale: str) -> str:
    """How the numbers came about, and what about it is not the paper's."""
    parts = [f"scale {scale}", f"one seed ({SEED})"]
    if found.samples:
        parts.append(f"{found.samples} validation samples")
    if table.of == "levels":
        parts.append(f"noise levels of the paper times {found.scale:.3g}, AMAT's deltas times {found.delta_scale:.3g}")
    if table.of != "clean":
        parts.append(f"{found.steps} attack steps in training (its authors' release: {PAPER_STEPS})")
    text = f"Ours (the paper's in brackets): {'; '.join([*parts, *found.notes])}; torch {torch.__version__}."
    return f"**These numbers mean nothing: almost nothing was trained.** {text}" if scale == "smoke" else text


def page(name: str, table: Table, found: Found, scale: str) -> str:
    """The table in Markdown, each cell ours and, in brackets, the paper's."""
    theirs, levels = published(table), levels_of(table)
    lines = [f"## {name}: {table.title}", "", caption(table, found, scale), ""]
    if table.of == "seconds":
        paper = {row["method"]: float(row[table.dataset]) for row in rows("epoch_seconds_table_5.csv")}
        lines += [f"| | seconds of an {found.per} | times standard |", "|---|---|---|"]
        for method, value in found.seconds.items():
            times = next(paper[kind] / paper["STD"] for kind in ("SAT", "AMAT", "STD") if method.startswith(kind))
            lines.append(f"| {method} | {value:.3g} | {value / found.seconds['STD']:.2f} ({times:.2f}) |")
        return "\n".join(lines) + "\n"
    attacks: Iterable[str] = ("pgd100",) if table.deltas else ATTACKS
    sums, known = [sums_of(table, curves) if table.of == "levels" else {} for curves in (found.curves, theirs)]
    for attack in attacks:
        shown = levels[:1] if table.of == "clean" else levels
        what = table.metric if table.of == "clean" else f"{table.metric}, {attack}"
        heads = [what, "clean", *(f"{level:g}" for level in shown[1:])]
        heads += [] if table.of == "clean" else ["Avg.", "AUC_robust", "hours"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for method, curves in found.curves.items():
            cells = beside(curves[attack][: len(shown)], theirs.get(method, {}).get(attack, ()))
            if table.of != "clean":
                cells += beside(sums[method][attack], known.get(method, {}).get(attack, ()))
                hours = found.hours.get(method)
                cells.append("" if hours is None else f"{hours:.2f}")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
        if table.of == "clean":
            break
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("list", *TABLES))
    parser.add_argument("--data", type=Path, help="the data set's folder")
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument("--scale", choices=("cpu", "paper", "smoke"), default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (each on one thread if above 1)")
    parser.add_argument("--spacing", type=float, default=None, help="mm per pixel of radiographs; default: the data's")
    parser.add_argument("--show", action="store_true", help="print what an earlier run has measured")
    given = parser.parse_args()
    if given.table == "list":
        for name, table in TABLES.items():
            print(f"{name:12} {table.title} (data: {table.dataset})")
        print("\nWhat the folder of --data holds:")
        for name, layout in LAYOUTS.items():
            print(f"{name:14} {layout}")
        return
    table = TABLES[given.table]
    if not given.show:
        if given.data is None or not given.data.is_dir():
            parser.error(f"--data FOLDER is needed: {LAYOUTS[table.dataset]}; got {given.data}")
        if absent := missing(table.dataset, given.data):
            parser.error(f"{given.data} has no {', '.join(absent)}. Needed: {LAYOUTS[table.dataset]}")
        if table.of == "seconds" and given.jobs > 1:
            parser.error(f"{given.table} measures seconds, which trainings side by side change: leave out --jobs")
    work = given.work.resolve() / given.scale
    data = Path() if given.data is None else given.data.resolve()
    options = Options(data, work, given.scale, given.device, given.jobs, given.show, given.spacing)
    try:
        found = table.run(options, table)
    except FileNotFoundError as error:
        if not given.show:
            raise
        parser.error(f"{given.table} has not been measured in {work} ({error.filename} is missing): leave out --show")
    text = page(given.table, table, found, given.scale)
    work.mkdir(parents=True, exist_ok=True)
    (work / f"{given.table}.md").write_text(text)
    record = {"table": given.table, "scale": given.scale, "levels": levels_of(table), "paper": published(table)}
    record |= {"seed": SEED, "hours": found.hours}
    if table.of == "levels":
        record |= {"avg_and_auc_robust": sums_of(table, found.curves), "papers": sums_of(table, published(table))}
    record |= {"curves": found.curves, "level_scale": found.scale, "delta_scale": found.delta_scale}
    record |= {"samples": found.samples, "steps": found.steps, "notes": found.notes}
    record |= {"seconds": found.seconds, "seconds_of": found.per if found.seconds else None}
    (work / f"{given.table}.json").write_text(json.dumps(record, indent=1))
    print(text)


if __name__ == "__main__":
    main()
