"""What the ensemble `standard` finds beyond single attacks, ours and others', on trained networks; and what it costs.

    python benchmarks/standard.py FOLDER -- adv-landmark evaluate STD.ckpt AMAT.ckpt --attacks '[standard,pgd100]' ...
    python benchmarks/standard.py FOLDER [--metric MRE]

Runs a host's own `evaluate`, whose report goes to FOLDER (its option for that is added), or reads one that is there.
Prints, for each model and attack, the metric at every level, the most by which the attack undercuts `standard`,
gradients a sample and level, and seconds; then for how many samples each member of the ensemble is the worst, alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any


def table(record: dict[str, Any], metric: str) -> str:
    """Of a report, as Markdown."""
    levels = record["configuration"]["evaluation"]["levels"]
    head = [metric, *(f"{level:g}" for level in levels), "beyond `standard`", "gradients", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    higher = record["configuration"]["metrics"][metric]["higher_is_better"]
    for model, found in record["results"][metric]["models"].items():
        own = found["attacks"]["standard"]["values"]
        for attack, curve in found["attacks"].items():
            values, cost = curve["values"], record["attacks"][model][attack]
            gain = max((a - b if higher else b - a) for a, b in zip(own[1:], values[1:], strict=True))
            shown = "" if attack in ("standard", "worst attack") else f"{gain:+.3f}"
            cells = [f"{model}, {attack}", *(f"{value:.3f}" for value in values), shown]
            cells += [str(cost["gradients_per_image"] or "–"), f"{sum(cost['seconds']):.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def deciders(folder: Path, record: dict[str, Any]) -> str:
    """For how many samples and levels a member of the ensemble is the worst, by the metric of single samples."""
    rows = list(csv.DictReader((folder / "samples.csv").open()))
    criterion = record["configuration"]["evaluation"]["criterion"]["name"]
    sign = 1 if record["configuration"]["metrics"][criterion]["higher_is_better"] else -1
    seen: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["attack"].startswith("standard/") and row[criterion]:
            seen[row["model"], row["id"], row["level"]][row["attack"].split("/")[1]] = sign * float(row[criterion])
    alone: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for values in seen.values():
        least = min(values.values())
        winners = [name for name, value in values.items() if value <= least + 1e-9]
        shared.update(winners)
        alone.update(winners if len(winners) == 1 else [])
    members = record["configuration"]["evaluation"]["attacks"]["standard"]["members"]
    told = ", ".join(f"{name} {shared[name]} ({alone[name]})" for name in members)
    return f"The worst by {criterion} of {len(seen)} samples at a level, alone in brackets: {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--metric")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    if options.command:
        out = {"adv-yolo": [f"out={options.folder}"]}.get(options.command[0], ["--out", str(options.folder)])
        subprocess.run([*options.command, *out], check=True)
    for path in sorted(options.folder.rglob("report.json")):
        record = json.loads(path.read_text())
        for metric in [options.metric] if options.metric else list(record["results"])[:2]:
            print(f"\n{table(record, metric)}")
        print(f"\n{deciders(path.parent, record)}")


if __name__ == "__main__":
    main()
