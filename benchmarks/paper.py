"""A table of the AMAT paper (arXiv 2206.01736), trained and attacked anew, with the paper's numbers beside ours.

    python benchmarks/paper.py table2 --data FOLDER [--scale cpu|paper] [--work build/paper] [--device cpu] [--jobs 2]
    python benchmarks/paper.py table2 --show            what is there, without running anything
    python benchmarks/paper.py list                     the tables, and the data that each needs

Tables 1, 2, 3, 6 and 7 are the methods under attack, 4 the standard networks by Dice of all voxels together, 5 the
time of an epoch, and 8 to 12 AMAT over its delta. `--scale paper` is the paper's schedule, for a GPU; `cpu` a reduced
one. Levels and deltas are the paper's where images are of its size, and otherwise scaled as an L2 norm is (the table
says by how much). All on validation data. Nothing is downloaded: the hearts and prostates of the Medical Segmentation
Decathlon and the radiographs of ISBI 2015 are to be had from their owners.

Everything can be interrupted and called again. The table is written to WORK/TABLE.md, its numbers to WORK/TABLE.json.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bccd
import hippocampus
import landmark
import torch

PAPER = Path(__file__).resolve().parents[1] / "tests" / "data"
"""The paper's tables as data."""
ATTACKS = ("pgd100", "ifgsm10")
Curves = dict[str, dict[str, list[float]]]
"""Method, attack, the metric at the paper's levels, the first of which is 0."""


@dataclass(frozen=True)
class Found:
    """What was measured for a table.

    Attributes:
        curves: by the methods' names in the paper.
        scale: what the paper's levels are multiplied by here.
        samples: validation samples under attack.
        seconds: of an epoch, by method, where the host writes them down.
    """

    curves: Curves
    scale: float
    samples: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    data: Path
    work: Path
    scale: str
    device: str
    jobs: int
    show: bool


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


def rows(name: str) -> list[dict[str, str]]:
    with (PAPER / name).open(newline="") as file:
        return list(csv.DictReader(file))


def published(table: Table) -> Curves:
    """The paper's numbers; a cell that the scan of the paper has lost is not a number."""
    found: Curves = {}
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


def deltas_of(dataset: str) -> list[float]:
    return [float(row["delta"]) for row in rows("auc_robust_appendix_a.csv") if row["dataset"] == dataset]


def sats_of(dataset: str) -> list[float]:
    """The levels of SAT in the paper's table."""
    names = {row["method"] for row in rows("results_tables_1_to_7.csv") if row["dataset"] == dataset}
    return sorted(float(name[3:]) for name in names if name.startswith("SAT"))


# The hosts


def segmentation(options: Options, table: Table) -> Found:
    """Hearts, hippocampi and prostates by nnU-Net."""
    preset = hippocampus.PRESETS[options.scale]
    # A tenth of the paper's visits: a margin needs larger steps to come as far.
    visits = float(preset.adversarial["delta"]) / 0.5
    amat = {f"{delta:g}": ("nnUNetTrainerAMAT", {"delta": delta * visits}) for delta in deltas_of(table.dataset)}
    best = {"heart": 5.0, "hippocampus": 0.5, "prostate": 3.0}[table.dataset]
    if table.deltas:
        runs = {f"AMAT.{name}": run for name, run in amat.items()}
        names = {f"delta {name}": f"AMAT.{name}" for name in amat}
    elif table.of == "clean":
        runs, names = {}, {"STD": "STD"}
    else:
        sats = {f"SAT{eps:g}": ("nnUNetTrainerSAT", {"eps": eps}) for eps in sats_of(table.dataset)}
        runs = {**sats, "AMAT.paper": amat[f"{best:g}"]}
        names = {"STD": "STD", **{name: name for name in sats}, "AMAT": "AMAT.paper"}
    runs = {
        name: (kind, {"refinement": "paper", **own} if "AMAT" in name else own) for name, (kind, own) in runs.items()
    }
    levels = tuple(f"{level:g}" for level in levels_of(table))
    preset = replace(preset, runs=runs, levels=levels)
    data = {"heart": "Dataset002_Heart", "hippocampus": "Dataset004_Hippocampus", "prostate": "Dataset005_Prostate"}
    work = options.work / table.dataset / ("deltas" if table.deltas else "methods")
    bench = hippocampus.Benchmark(preset, options.data, work, options.device, options.jobs, data[table.dataset])
    if not options.show:
        bench.run()
    report = json.loads((work / "report" / "report.json").read_text())
    seconds = {name: epoch_seconds(bench.log(ours)) for name, ours in names.items()}
    return found_in(report, table, names, 1.0, seconds)


def epoch_seconds(log: dict[str, list[float]]) -> float:
    """The median, from nnU-Net's own log."""
    starts, ends = log["epoch_start_timestamps"], log["epoch_end_timestamps"]
    lengths = sorted(end - start for start, end in zip(starts, ends, strict=False))
    return lengths[len(lengths) // 2]


def detection(options: Options, table: Table) -> Found:
    """Blood cells by YOLO."""
    preset = bccd.PRESETS[options.scale]
    levels = levels_of(table)
    scale = float(preset.levels.split(",")[-1]) / levels[-1]
    if table.deltas:
        names = {f"delta {delta:g}": f"AMAT.{delta:g}" for delta in deltas_of(table.dataset)}
        runs = {f"AMAT.{delta:g}": ("method=amat", f"delta={delta * scale:g}") for delta in deltas_of(table.dataset)}
    else:
        names = {name: name for name in ("STD", *(f"SAT{eps:g}" for eps in sats_of(table.dataset)), "AMAT")}
        every = bccd.runs(scale, 3.5 * scale)
        runs = {name: every[name] for name in names if name != "STD"}
    bccd.PRESETS["paper's table"] = replace(preset, runs=runs)
    work = options.work / table.dataset / ("deltas" if table.deltas else "methods")
    bench = bccd.Benchmark(
        "paper's table",
        options.data,
        work,
        "yolov5s.yaml" if options.scale == "paper" else "yolov5n.yaml",
        options.device,
        options.jobs,
        0,
    )
    if not options.show:
        bench.run()
    report = json.loads((work / "report_paper's table" / "report.json").read_text())
    seconds = {}
    for name, ours in names.items():
        with (bench.folder(ours) / "results.csv").open(newline="") as file:
            times = [float(row["time"]) for row in csv.DictReader(file)]
        seconds[name] = times[-1] / len(times)
    return found_in(report, table, names, scale, seconds)


def landmarks(options: Options, table: Table) -> Found:
    """Cephalograms by the multi-task U-Net."""
    preset = landmark.PRESETS["full" if options.scale == "paper" else "cpu"]
    if table.deltas:
        names = {f"delta {delta:g}": f"AMAT.{delta:g}" for delta in deltas_of(table.dataset)}
        methods = {"STD": {"name": "STD"}} | {
            f"AMAT.{delta:g}": {"name": "AMAT", "delta": round(delta * preset.scale, 4), "thresholds": "STD"}
            for delta in deltas_of(table.dataset)
        }
    else:
        names = {"STD(BCE)": "STD.bce", "STD(Dice)": "STD", **{f"SAT{k}": f"SAT{k}" for k in (1, 3, 5)}, "AMAT": "AMAT"}
        methods = None

    class Chosen(landmark.Landmark):
        def every_method(self) -> dict[str, dict[str, Any]]:
            return super().every_method() if methods is None else methods

    work = options.work / table.dataset / ("deltas" if table.deltas else "methods")
    encoder = preset.network["encoder"]
    only = list(names.values()) if methods is None else []
    device = "cpu" if options.device == "cpu" else "gpu"
    bench = Chosen(work, [encoder], [0], only, device, options.jobs, preset, options.data)
    if not options.show:
        bench.run()
    curves: Curves = {}
    for name, ours in names.items():
        model = bench.results(encoder, ours, 0, "L2")[table.metric]
        curves[name] = {attack: model["attacks"][attack]["values"] for attack in ATTACKS}
    report = json.loads(
        (work / "reports" / f"{encoder}_{next(iter(names.values()))}_0" / "L2" / "report.json").read_text()
    )
    return Found(curves, preset.scale, samples_in(report), {})


def found_in(
    report: dict[str, Any], table: Table, names: dict[str, str], scale: float, seconds: dict[str, float]
) -> Found:
    """The curves of a report of several models."""
    models = report["results"][table.metric]["models"]
    curves = {
        name: {attack: models[ours]["attacks"][attack]["values"] for attack in ATTACKS} for name, ours in names.items()
    }
    return Found(curves, scale, samples_in(report), seconds)


def samples_in(report: dict[str, Any]) -> int:
    return len(report["configuration"]["samples"])


TABLES = {
    "table1": Table("ADI of hearts, nnU-Net", "heart", "ADI", segmentation),
    "table2": Table("ADI of hippocampi, nnU-Net", "hippocampus", "ADI", segmentation),
    "table3": Table("ADI of prostates, nnU-Net", "prostate", "ADI", segmentation),
    "table4": Table("TVDI of the standard network of hippocampi", "hippocampus", "TVDI", segmentation, of="clean"),
    "table5": Table("seconds of an epoch, hippocampi", "hippocampus", "ADI", segmentation, of="seconds"),
    "table5-bccd": Table("seconds of an epoch, blood cells", "bccd", "mAP50-95", detection, of="seconds"),
    "table6": Table("MRE of cephalograms in mm, multi-task U-Net", "cephalometric", "MRE", landmarks),
    "table7": Table("mAP50-95 of blood cells, YOLOv5", "bccd", "mAP50-95", detection),
    "table8": Table("ADI of hearts over delta", "heart", "ADI", segmentation, deltas=True),
    "table9": Table("ADI of hippocampi over delta", "hippocampus", "ADI", segmentation, deltas=True),
    "table10": Table("ADI of prostates over delta", "prostate", "ADI", segmentation, deltas=True),
    "table11": Table("MRE of cephalograms in mm over delta", "cephalometric", "MRE", landmarks, deltas=True),
    "table12": Table("average IoU of blood cells over delta", "bccd", "IoU", detection, deltas=True),
}


def page(name: str, table: Table, found: Found, scale: str) -> str:
    """The table in Markdown, each cell ours and, in brackets, the paper's."""
    theirs, levels = published(table), levels_of(table)
    lines = [f"## {name}: {table.title}", ""]
    lines.append(
        f"Ours (the paper's in brackets); scale {scale}, {found.samples} validation samples, one seed; noise levels "
        f"and deltas of the paper times {found.scale:.3g}; torch {torch.__version__}."
    )
    lines.append("")
    if table.of == "seconds":
        column = {"hippocampus": "hippocampus", "bccd": "bccd"}[table.dataset]
        paper = {row["method"]: float(row[column]) for row in rows("epoch_seconds_table_5.csv")}
        lines += ["| | seconds of an epoch | times standard | paper |", "|---|---|---|---|"]
        for method, value in found.seconds.items():
            known = next((paper[kind] / paper["STD"] for kind in ("SAT", "AMAT", "STD") if method.startswith(kind)), 0)
            lines.append(f"| {method} | {value:.1f} | {value / found.seconds['STD']:.2f} | {known:.2f} |")
        return "\n".join(lines) + "\n"
    attacks: Iterable[str] = ("pgd100",) if table.deltas else ATTACKS
    for attack in attacks:
        shown = levels[:1] if table.of == "clean" else levels
        heads = [f"{table.metric}, {attack}", "clean", *(f"{level:g}" for level in shown[1:])]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for method, curves in found.curves.items():
            known = theirs.get(method, {}).get(attack, [float("nan")] * len(levels))
            cells = [
                f"{own:.3f}" + (f" ({other:.3f})" if other == other else "")
                for own, other in zip(curves[attack][: len(shown)], known, strict=False)
            ]
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
    parser.add_argument("--scale", choices=("cpu", "paper"), default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (each on one thread if above 1)")
    parser.add_argument("--show", action="store_true", help="print what an earlier run has measured")
    given = parser.parse_args()
    if given.table == "list":
        for name, table in TABLES.items():
            print(f"{name:12} {table.title} (data: {table.dataset})")
        return
    if given.data is None or not given.data.is_dir():
        parser.error(f"--data FOLDER is needed, the {TABLES[given.table].dataset} data; got {given.data}")
    work = given.work.resolve() / given.scale
    options = Options(given.data.resolve(), work, given.scale, given.device, given.jobs, given.show)
    table = TABLES[given.table]
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
    record |= {"curves": found.curves, "level_scale": found.scale, "samples": found.samples, "seconds": found.seconds}
    (work / f"{given.table}.json").write_text(json.dumps(record, indent=1))
    print(text)


if __name__ == "__main__":
    main()
