"""What the ensemble `standard` finds beyond single attacks, ours and others', on trained networks; and what it costs.

    python benchmarks/standard.py classify NAME=CHECKPOINT ... --levels 0 0.2 0.4 --out FOLDER [--attacks pgd100 ...]
    python benchmarks/standard.py yolo NAME=CHECKPOINT ... --data bccd.yaml --levels 0 1 2
    python benchmarks/standard.py --table FOLDER       of a report that is there

Runs the host's own `evaluate` with `standard` and the other attacks, and reads the report: for each model and attack
the metric at every level, by how much the attack undercuts `standard`, gradients and seconds; and which member of the
ensemble is the worst for how many samples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

METRICS = {"nnunet": "ADI", "yolo": "mAP50", "landmark": "MRE", "classify": "accuracy"}
OTHERS = ["pgd100", "pgd1000x5", "apgd100", "square1000"]


def command(options: argparse.Namespace) -> list[str]:
    """The host's command; each has a syntax of its own."""
    names, paths = zip(*(pair.split("=", 1) for pair in options.models), strict=True)
    attacks, levels = ["standard", *options.attacks], [f"{level:g}" for level in options.levels]
    shared = {"samples": options.samples, "batch": options.batch, "norm": options.norm, "device": "cpu", "checks": 0}
    if options.host == "yolo":
        words = [f"model={','.join(paths)}", f"names={','.join(names)}", f"attacks={','.join(attacks)}"]
        words += [f"levels={','.join(levels)}", f"data={options.data}", f"out={options.out}", "examples=0"]
        return [
            "adv-yolo",
            "evaluate",
            *words,
            f"imgsz={options.size}",
            *(f"{k}={v}" for k, v in shared.items() if v is not None),
        ]
    words = [
        *paths,
        "--names",
        f"[{','.join(names)}]",
        "--attacks",
        f"[{','.join(attacks)}]",
        "--levels",
        f"[{','.join(levels)}]",
    ]
    words += [
        "--out",
        str(options.out),
        "--examples",
        "0",
        "--checks",
        "0",
        "--device",
        "cpu",
        "--norm",
        f"[{options.norm}]",
    ]
    if options.samples:
        words += ["--samples", str(options.samples)]
    if options.host == "classify":
        words += ["--gradcam", "false"]
    return [f"adv-{options.host}", "evaluate", *words]


def table(record: dict[str, Any], metric: str) -> str:
    """Of a report, as Markdown."""
    levels = record["configuration"]["evaluation"]["levels"]
    head = [metric, *(f"{level:g}" for level in levels), "beyond `standard`, at most", "gradients", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    higher = record["configuration"]["metrics"][metric]["higher_is_better"]
    for model, found in record["results"][metric]["models"].items():
        own = found["attacks"]["standard"]["values"]
        for attack, curve in found["attacks"].items():
            values, cost = curve["values"], record["attacks"][model][attack]
            gain = max((a - b if higher else b - a) for a, b in zip(own[1:], values[1:], strict=True))
            shown = "" if attack in ("standard", "worst attack") else f"{gain:+.4f}"
            seconds = f"{sum(cost['seconds']):.0f}"
            cells = [f"{model}, {attack}", *(f"{value:.3f}" for value in values), shown]
            lines.append(f"| {' | '.join([*cells, str(cost['gradients_per_image'] or '–'), seconds])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", nargs="?", choices=METRICS)
    parser.add_argument("models", nargs="*", metavar="NAME=CHECKPOINT")
    parser.add_argument("--levels", type=float, nargs="+", default=[0])
    parser.add_argument("--attacks", nargs="*", default=OTHERS)
    parser.add_argument("--norm", default="2")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, default=160, help="imgsz of YOLO")
    parser.add_argument("--data", help="of YOLO")
    parser.add_argument("--out", type=Path, default=Path("build/standard"))
    parser.add_argument("--metric")
    parser.add_argument("--table", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if options.table is None:
        subprocess.run(command(options), check=True)
    for path in sorted((options.table or options.out).rglob("report.json")):
        record = json.loads(path.read_text())
        for metric in [options.metric] if options.metric else list(record["results"])[:2]:
            print(f"{path.parent}\n\n{table(record, metric)}\n")


if __name__ == "__main__":
    sys.exit(main())
