"""APGD against PGD at equal gradients, from reports of any host: the loss that each reaches, and the metric.

    adv-nnunet evaluate ... --attacks pgd20 apgd20 pgd100 apgd100 --checks 0 -o REPORT
    python benchmarks/apgd_on_hosts.py REPORT [REPORT ...]

Prints a table in Markdown for each report: a row for each model and each pair pgd<N>, apgd<N>; at every noise level the
mean loss over samples, and the metric that --metric names (the report's first one otherwise), under PGD -> under APGD.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any


def pairs(attacks: list[str]) -> list[tuple[str, str]]:
    """The attacks of a report that have a partner with as many gradients."""
    return [(name, f"a{name}") for name in attacks if re.fullmatch(r"pgd\d+", name) and f"a{name}" in attacks]


def table(record: dict[str, Any], metric: str | None) -> list[list[str]]:
    metric = metric or next(iter(record["results"]))
    if metric not in record["results"]:
        raise SystemExit(f"the report has no metric {metric!r}; it has: {', '.join(record['results'])}")
    levels = record["configuration"]["evaluation"]["levels"][1:]
    lines = [["model", "gradients", *(f"level {level:g}" for level in levels)]]
    for model, attacks in record["attacks"].items():
        values = record["results"][metric]["models"][model]["attacks"]
        for pgd, apgd in pairs(list(attacks)):
            cells = []
            for k in range(len(levels)):
                losses = [attacks[attack]["mean_loss"][k] for attack in (pgd, apgd)]
                metrics = [values[attack]["values"][k + 1] for attack in (pgd, apgd)]
                cells.append(f"{losses[0]:.4g} → {losses[1]:.4g}; {metric} {metrics[0]:.3g} → {metrics[1]:.3g}")
            lines.append([model, str(attacks[pgd]["gradients_per_image"]), *cells])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="report.json files, or their folders")
    parser.add_argument("--metric", help="default: the first of each report")
    args = parser.parse_args()
    for path in args.reports:
        file = path / "report.json" if path.is_dir() else path
        head, *lines = table(json.loads(file.read_text()), args.metric)
        if not lines:
            raise SystemExit(f"{file} has no pair of attacks pgd<N> and apgd<N> with the same N")
        print(f"\n{file}\n")
        print("\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines]))


if __name__ == "__main__":
    main()
