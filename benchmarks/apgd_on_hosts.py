"""APGD against PGD at equal gradients, from reports of any host: the loss that each reaches, and the metric.

    adv-nnunet evaluate ... --attacks pgd20 apgd20 pgd100 apgd100 --checks 0 -o REPORT
    python benchmarks/apgd_on_hosts.py REPORT [REPORT ...]

Prints a table in Markdown: for each model of each report and each pair pgd<N>, apgd<N>, the mean loss over samples and
the first metric at every noise level.
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


def rows(name: str, record: dict[str, Any]) -> list[list[str]]:
    metric, results = next(iter(record["results"].items()))
    found = []
    for model, attacks in record["attacks"].items():
        values = results["models"][model]["attacks"]
        for pgd, apgd in pairs(list(attacks)):
            for k, level in enumerate(record["configuration"]["evaluation"]["levels"][1:]):
                losses = [attacks[attack]["mean_loss"][k] for attack in (pgd, apgd)]
                metrics = [values[attack]["values"][k + 1] for attack in (pgd, apgd)]
                found.append(
                    [name, model, str(attacks[pgd]["gradients_per_image"]), f"{level:g}"]
                    + [f"{loss:.4g}" for loss in losses]
                    + [f"{metric} {metrics[0]:.4g}", f"{metrics[1]:.4g}"]
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="report.json files, or their folders")
    head = ["report", "model", "gradients", "level", "loss, PGD", "loss, APGD", "metric, PGD", "metric, APGD"]
    lines = [head, ["---"] * len(head)]
    for path in parser.parse_args().reports:
        file = path / "report.json" if path.is_dir() else path
        found = rows(path.name if path.is_dir() else path.parent.name, json.loads(file.read_text()))
        if not found:
            raise SystemExit(f"{file} has no pair of attacks pgd<N> and apgd<N> with the same N")
        lines += found
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
