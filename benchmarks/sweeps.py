"""Fronts on whole classification data: every method's dial, with as many passes each, three seeds, and a figure.

    python benchmarks/sweeps.py pneumonia --data FILE [--seeds 0 1 2] [--attack apgd50] [--jobs 2] [--only REGEX]
    python benchmarks/sweeps.py ham10000 --data FOLDER
    python benchmarks/sweeps.py lesions --data FOLDER --device cuda --jobs 14
    python benchmarks/sweeps.py pneumonia --table [--write docs/results]

--data: MedMNIST's npz file of PneumoniaMNIST, or a folder of HAM10000 with images and labels.csv; "lesions" is the same
at twice the size, with ResNet-18, for a GPU. Per seed a standard
network is trained; every run begins with its weights and makes as many passes (a forward pass and each half of a
backward pass count alike) as the standard training did. What is finished is not done again. --write puts a figure, and
the numbers behind it, into a folder; rows whose numbers lie there stay, if their standard networks were the same.

A method's front is the line through its dial's settings, from the standard network on. "At STD's clean - 1" is the
highest worst-case metric on that line where the clean metric is at most a point below the standard network's; a method
that costs nothing has it at the end of its line.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import matplotlib.pyplot as plt
import numpy as np
from fronts import SMOOTHED, Classify, Settings, amat, controls, curve, growing, margins, run_all, said
from numpy.typing import NDArray

from advmed.files import write_whole
from advmed.methods import METHODS
from advmed.methods.base import AttackOptions
from advmed.report.front import attainable

DIALS = ("SAT", "AT", "TRADES", "AMAT", "AMAT0.8", "DPAAT")
XRAYS: Settings = {"classes": ["normal", "pneumonia"], "flip": 0, "rotate": 10, "zoom": 0.1}
LESIONS: Settings = {"rotate": 180, "zoom": 0.2, "color": 0.1}
"""What the readers are told."""
LOSSES = (0.5, 1.0, 2.0)
"""Points of the clean metric that a network may lose in the table of fronts."""


def equal_passes(method: str, epochs: int) -> Settings:
    """How long a method of the preset "fast" is trained to make as many passes as so many standard epochs."""
    kind = METHODS[method]
    fast = {name: value for name, value in kind.presets["fast"].items() if name in AttackOptions.__annotations__}
    own = {"STD": {}, "AMAT": {"delta": 1.0, "thresholds": 1.0}, "DPAAT": {"eps_0": 1.0}}.get(method, {"eps": 1.0})
    cost = kind(**own, **fast).cost
    whole = math.ceil(epochs / cost)
    return {"trainer.max_epochs": whole, "trainer.limit_train_batches": min(epochs / cost / whole, 1.0)}


def sweep(
    epochs: int, eps: Sequence[float], stds: Sequence[float], sizes: Sequence[float], capped: Sequence[float] = ()
) -> dict[str, Settings]:
    """The dials of all methods of classification, and what they are held against; as many passes each."""
    fixed = {
        f"{method} {level:g}": {"method": method, "eps": level, **equal_passes(method, epochs)}
        for method in ("SAT", "AT", "TRADES")
        for level in eps
    }
    adaptive = {
        f"AMAT mean+{std:g}std": amat(std, eps=0.5, margin_max=4.0, **equal_passes("AMAT", epochs)) for std in stds
    }
    adaptive |= {
        f"AMAT0.8 mean+{std:g}std": amat(std, eps=0.5, margin_max=0.8, **equal_passes("AMAT", epochs)) for std in capped
    }
    adaptive |= {f"DPAAT {size:g}": {"method": "DPAAT", "eps": size, **equal_passes("DPAAT", epochs)} for size in sizes}
    for cap in (0.8, 1.0, 4.0):
        bounded: Settings = {"method": "AMAT", "rule": "boundary", "eps": 0.5, "margin_max": cap}
        adaptive[f"AMAT{cap:g} at the boundary"] = {**bounded, **equal_passes("AMAT", epochs)}
    learnt = f"AMAT0.8 mean+{capped[0]:g}std" if capped else f"AMAT mean+{stds[-2]:g}std"
    against = growing(eps, **equal_passes("SAT", epochs))
    against |= controls(learnt, equal_passes("STD", epochs), **equal_passes("SAT", epochs))
    return fixed | adaptive | against


def dials(epochs: int) -> dict[str, Settings]:
    """The dials of SAT, AMAT and DPAAT by sizes for twice the side of an image, and TRADES once."""
    found: dict[str, Settings] = {f"SAT {eps:g}": {"method": "SAT", "eps": eps} for eps in (0.1, 0.2, 0.4, 0.8, 1.6)}
    found |= {"TRADES 0.8": {"method": "TRADES", "eps": 0.8}}
    found |= {f"AMAT1.6 mean+{std}std": amat(std, eps=1.0, margin_max=1.6) for std in (0, 1)}
    found |= {"AMAT2 at the boundary": {"method": "AMAT", "rule": "boundary", "eps": 1.0, "margin_max": 2.0}}
    found |= {f"DPAAT {eps:g}": {"method": "DPAAT", "eps": eps} for eps in (0.2, 0.8)}
    return {name: {**run, **equal_passes(str(run["method"]), epochs)} for name, run in found.items()}


def changed(runs: dict[str, Settings], names: Sequence[str]) -> dict[str, Settings]:
    """These runs with a learning rate that falls late, and with smoothed labels."""
    ways: dict[str, Settings] = {"late": {"decay": "late"}, "smoothed": SMOOTHED}
    return {f"{name}, {way}": {**runs[name], **more} for name in names for way, more in ways.items()}


def dealt(runs: dict[str, Settings], begin: str) -> dict[str, Settings]:
    """The runs of AMAT whose names begin so, with the margin of any image in place of each image's own."""
    return {f"{name}, any's margin": {**runs[name], "margin_of": "any"} for name in runs if re.match(begin, name)}


class Pneumonia(Classify):
    """All of PneumoniaMNIST, 4,708 + 524 images, with the demo's network and augmentation."""

    data: ClassVar[Path | None] = None
    workers = 0
    metric = "balanced accuracy"  # three of four images have pneumonia
    runs = sweep(Classify.demo.EPOCHS, (0.2, 0.4, 0.8, 1.2), (0, 1, 2, 4), (0.1, 0.2, 0.4, 0.8), capped=(1, 0, 2, 4))
    runs |= dealt(runs, "AMAT0.8 mean.1std|AMAT(0.8|1) at")
    attack = "apgd50"
    curves = (0.4, 0.5, 0.6)
    """Means under attack at which methods are compared by their clean metric."""

    @property
    def content(self) -> Settings:
        content = super().content
        content["trainer"] = content["trainer"] | {"accelerator": "cpu" if self.device == "cpu" else "gpu"}
        return content | {"data": self.reader("MedMNIST", file=str(self.data), **XRAYS)}

    def reader(self, name: str, **own: Any) -> Settings:
        return {
            "class_path": f"adv_classify.data.{name}",
            "init_args": {**own, "batch_size": 64, "workers": self.workers},
        }


class Ham(Pneumonia):
    """The subset of HAM10000, 3,144 + 452 dermatoscopic images of seven kinds of lesions, at 36 x 48 pixels.

    Within a cap of 4, which was the default, eight times 0.5, most margins come to rest on it; so AMAT has a second
    dial, whose margins are 0.8 at most, the largest level of the evaluation.
    """

    curves = (0.25, 0.3, 0.35)
    size: ClassVar[list[int]] = [36, 48]
    runs = sweep(
        Classify.demo.EPOCHS,
        (0.05, 0.1, 0.2, 0.4, 0.8, 1.2),
        (0, 1, 2, 4, 8),
        (0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
        capped=(0, 1, 2),
    )
    runs |= changed(runs, ("SAT 0.2", "AMAT0.8 mean+1std", "DPAAT 0.1"))
    runs |= dealt(runs, "AMAT0.8")

    @property
    def content(self) -> Settings:
        content = super().content
        model = content["model"] | {"class_weights": "balanced"}
        return content | {
            "model": model,
            "data": self.reader("ImageTable", root=str(self.data), size=self.size, **LESIONS),
        }


class Lesions(Ham):
    """The same subset of HAM10000 at 72 x 96 pixels, with ResNet-18; levels, sizes and caps are twice as large."""

    size: ClassVar[list[int]] = [72, 96]
    runs: ClassVar[dict[str, Settings]] = dials(Classify.demo.EPOCHS)

    @property
    def content(self) -> Settings:
        content = super().content
        return content | {"model": content["model"] | {"network": {"name": "resnet18"}, "lr": 1e-3}}

    def evaluate(self, name: str) -> list[str]:
        words = super().evaluate(name)
        words[words.index("--levels") + 1] = json.dumps([0, 0.4, 0.8, 1.6])
        return words


SETS: dict[str, type[Pneumonia]] = {"pneumonia": Pneumonia, "ham10000": Ham, "lesions": Lesions}


def found(kind: type[Pneumonia], work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Everything that was measured, as JSON has it."""
    rows: dict[str, Any] = {}
    levels: list[float] = []
    for name in ["STD", *kind.runs]:
        hosts = [kind(work / str(seed), seed) for seed in seeds]
        hosts = [host for host in hosts if host.report(name).is_file()]
        if hosts:
            values = {str(host.seed): curve(host, name) for host in hosts}
            rows[name] = {"curves": values, "margins": {str(host.seed): margins(host, name) for host in hosts}}
            rows[name]["measured"] = time.strftime("%Y-%m-%d", time.gmtime(hosts[0].report(name).stat().st_mtime))
            levels = levels_of(hosts[0].report(name), kind)
    if not rows:
        raise SystemExit(f"nothing has been attacked by {kind.attack} in {work}: leave out --table")
    packages = {name: version(name) for name in ("advmed", "torch", "timm", "lightning")}
    rows = {name: {**row, "versions": packages} for name, row in rows.items()}
    found = {"metric": kind.metric, "attack": kind.attack, "levels": levels, "points": list(kind.curves)}
    return {**found, "runs": rows}


def joined(kind: type[Pneumonia], earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What was measured before and what there is now, in the order of the runs.

    Args:
        kind: the data set.
        earlier: the content of the file that --write has written.
        result: of the work folder; it replaces what was measured before of the same run and seed.

    Raises:
        SystemExit: the metric, attack, levels or a standard network differ, so that rows cannot stand side by side; or
            there are rows that no run has today.
    """
    if gone := sorted(set(earlier["runs"]) - {"STD", *kind.runs}):
        raise SystemExit(f"the file there has rows that are no runs any more, {', '.join(gone)}: take them out of it")
    for what in ("metric", "attack", "levels"):
        if earlier[what] != result[what]:
            raise SystemExit(f"the file there has {what} {earlier[what]}, these rows {result[what]}: move it away")
    for seed, curve_now in result["runs"]["STD"]["curves"].items():
        before = earlier["runs"]["STD"]["curves"].get(seed, curve_now)
        if not np.allclose(before, curve_now, atol=1e-6):
            raise SystemExit(f"the rows there began with another standard network of seed {seed}: move the file away")
    rows: dict[str, Any] = {}
    for name in ["STD", *kind.runs]:
        both = [one["runs"][name] for one in (earlier, result) if name in one["runs"]]
        if both:
            values = {part: {k: v for row in both for k, v in row[part].items()} for part in ("curves", "margins")}
            rows[name] = {part: dict(sorted(by_seed.items())) for part, by_seed in values.items()}
            rows[name] |= {"measured": both[-1].get("measured"), "versions": both[-1].get("versions")}
    return {**result, "runs": rows}


def levels_of(report: Path, kind: type[Pneumonia]) -> list[float]:
    (model,) = json.loads(report.read_text())["results"][kind.metric]["models"].values()
    levels: list[float] = model["attacks"][kind.attack]["levels"]
    return levels


def of_dial(result: dict[str, Any], method: str) -> list[str]:
    """The settings of a method's dial, in their order."""
    return [name for name in result["runs"] if re.fullmatch(rf"{re.escape(method)} [0-9a-z.+]+", name)]


def points(result: dict[str, Any], names: Sequence[str], seed: str) -> NDArray[np.float64]:
    """Clean metric and mean over the levels of each, (settings, 2)."""
    return np.array([[curve[0], curve[-1]] for curve in (result["runs"][name]["curves"][seed] for name in names)])


def seeds_of(result: dict[str, Any], method: str) -> list[str]:
    """The seeds that all settings of a dial have, and the standard network."""
    names = ["STD", *of_dial(result, method)]
    return sorted(set.intersection(*(set(result["runs"][name]["curves"]) for name in names)))


def at_loss(result: dict[str, Any], method: str, loss: float) -> dict[str, float]:
    """By seed: the best of a method's line that loses at most so many points of the standard network's clean metric."""
    names = ["STD", *of_dial(result, method)]
    if len(names) < 2:
        return {}
    lines = {seed: points(result, names, seed) for seed in seeds_of(result, method)}
    return {seed: float(attainable(*line.T, line[0, 0] - loss / 100)) for seed, line in lines.items()}


def at_curve(result: dict[str, Any], method: str, mean: float) -> dict[str, float]:
    """By seed: the best clean metric of a method's line where its mean under attack is at least that."""
    names = ["STD", *of_dial(result, method)]
    if len(names) < 2:
        return {}
    lines = {seed: points(result, names, seed) for seed in seeds_of(result, method)}
    found = {seed: float(attainable(*line.T[::-1], np.asarray(mean))) for seed, line in lines.items()}
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def tables(result: dict[str, Any]) -> str:
    """A row for each run, and one for each method's front; means over the seeds, ± their standard error.

    In brackets, what a front has more than SAT's in the same seeds.
    """
    levels = " / ".join(f"{level:g}" for level in result["levels"][1:])
    heads = [result["metric"], "seeds", "clean", levels, "mean of the curve", "AUC_robust"]
    lines = ["| " + " | ".join([*heads, "margins: least, quartiles, largest"]) + " |", "|---" * 7 + "|"]
    for name, row in result["runs"].items():
        values = np.array(list(row["curves"].values()))
        means = values.mean(0)
        cells = [name, f"{len(values)}", said(values[:, 0]), " / ".join(f"{value:.3f}" for value in means[1:-1])]
        cells += [said(values[:, -1]), said(np.sqrt(values[:, 0] * values[:, -1]))]  # the area is by the largest level
        learnt = [one for one in row["margins"].values() if one]
        cells.append(" / ".join(f"{value:.2f}" for value in np.mean(learnt, 0)) if learnt else "")
        lines.append("| " + " | ".join(cells) + " |")
    fronts = ("mean of the curve at STD's clean, less", [f"{loss:g} points" for loss in LOSSES], at_loss, LOSSES)
    other = ("clean at a mean of the curve of", [f"{mean:g}" for mean in result["points"]], at_curve, result["points"])
    for title, heads, read, places in (fronts, other):
        lines += ["", f"| {title} | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
        for method in DIALS:
            if not of_dial(result, method) or not seeds_of(result, method):
                continue
            cells = [method]
            for place in places:
                own, against = read(result, method, place), read(result, "SAT", place)
                both = [value - against[seed] for seed, value in own.items() if seed in against]
                more = f" ({said(both, '+')})" if both and method != "SAT" else ""
                cells.append(said(list(own.values())) + more if own else "not reached")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(result: dict[str, Any], file: Path) -> None:
    """The fronts: means over the seeds with their standard errors."""
    figure_, axes = plt.subplots(figsize=(7, 5), constrained_layout=True)
    for method in DIALS:
        names = ["STD", *of_dial(result, method)]
        if len(names) < 2:
            continue
        values = [np.array(list(result["runs"][name]["curves"].values()))[:, [0, -1]] for name in names]
        means = np.array([one.mean(0) for one in values])
        errors = np.array([one.std(0, ddof=min(1, len(one) - 1)) / math.sqrt(len(one)) for one in values])
        axes.errorbar(*means.T, *errors.T[::-1], marker="o", capsize=2, label=method)
        for name, (x, y) in zip(names[1:], means[1:], strict=True):
            axes.annotate(name.split()[-1], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    for name, marker in (("SAT at the median of AMAT's levels", "s"), ("SAT dealt AMAT's levels", "D")):
        if name in result["runs"]:
            x, y = np.array(list(result["runs"][name]["curves"].values()))[:, [0, -1]].mean(0)
            axes.plot(x, y, marker, color="black", markersize=5, linestyle="none", label=name)
    axes.set_xlabel(f"clean {result['metric']}")
    axes.set_ylabel(f"{result['metric']} under {result['attack'].upper()}, mean of the curve")
    axes.legend(fontsize=8)
    figure_.savefig(file, dpi=130)
    plt.close(figure_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data", type=Path, help="the file or folder of the data")
    parser.add_argument("--work", type=Path, default=Path("build/sweeps"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, which all jobs share; default: cpu")
    parser.add_argument("--workers", type=int, default=0, help="that load the images of a job, default: none")
    parser.add_argument("--only", default="", help="a regular expression; runs whose name it matches")
    parser.add_argument("--attack", default="apgd50", help="of the evaluation, default: apgd50")
    parser.add_argument("--table", action="store_true", help="print what there is")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="for the figure and the numbers behind it")
    options = parser.parse_args()
    kind, work = SETS[options.set], options.work.resolve() / options.set
    kind.attack, kind.device, kind.workers = options.attack, options.device, options.workers
    if not options.table:
        if options.data is None:
            parser.error("--data is needed, the file or folder of the data")
        kind.data = options.data.resolve()
        run_all(kind, work, options.seeds, options.jobs, options.only)
    result = found(kind, work, options.seeds)
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        file = options.write / f"fronts_{options.set}.json"
        if file.is_file():
            result = joined(kind, json.loads(file.read_text()), result)
        write_whole(file, json.dumps(result, indent=1) + "\n")
    print(tables(result))
    if options.write:
        figure(result, options.write / f"fronts_{options.set}.png")


if __name__ == "__main__":
    main()
