"""Whether the demos show what they are there to show, whatever the seed: they are run, and their reports tabulated.

    python benchmarks/demos.py [nnunet yolo classify landmark] [--seeds 0 1 2] [--threads 2] [--work build/demos]
    python benchmarks/demos.py --table
    python benchmarks/demos.py landmark --again        two runs with one seed: are their reports equal?

One demo at a time, as `make demo` runs it; what is finished is not run again. --threads: OMP_NUM_THREADS, as another
machine would have it. A row for each method, means over the seeds with the standard error; below it, in how many of the
runs the adaptive method has the larger AUC_robust than the standard network, and is better than SAT on clean images, on
the curve, or on both, and worse on both. Runs of another number of threads are another table.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
METRICS = {"nnunet": ("TVDI", "AMAT"), "yolo": ("mAP50", "AMAT"), "classify": ("accuracy", "DPAAT")}
METRICS["landmark"] = ("MRE", "AMAT")
"""What a demo is judged by, and its adaptive method."""


def run(demo: str, folder: Path, seed: int, threads: int) -> None:
    """The demo in a folder of its own, and how long it took in all."""
    if (folder / "seconds").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    words = [sys.executable, str(EXAMPLES / f"demo_{demo}.py"), "--work", str(folder), "--seed", str(seed)]
    start = time.monotonic()
    with (folder / "demo.log").open("w") as log:
        done = subprocess.run(words, env=os.environ | variables | {"MPLBACKEND": "Agg"}, stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\nfailed; its log: {log.name}")
    (folder / "seconds").write_text(f"{time.monotonic() - start:.0f}")
    print(f"{time.strftime('%H:%M:%S')} {demo} seed {seed}, {threads} threads\n{rows(demo, [folder])}", flush=True)


def report(folder: Path) -> Path:
    """The folder of the report; that of L2 where there are several norms."""
    return folder / "report" / "L2" if (folder / "report" / "L2").is_dir() else folder / "report"


def curves(demo: str, folder: Path) -> dict[str, list[float]]:
    """By method: clean, at every level of PGD-20, the mean over the levels, AUC_robust."""
    found: dict[str, Any] = json.loads((report(folder) / "report.json").read_text())["results"][METRICS[demo][0]]
    curves = {}
    for name, model in found["models"].items():
        attack = model["attacks"]["pgd20"]
        mean = float(np.trapezoid(attack["values"], attack["levels"]) / attack["levels"][-1])
        curves[name] = [*attack["values"], mean, attack["auc_robust"]]
    return curves


def rows(demo: str, folders: list[Path]) -> str:
    """The table of a demo, and what its runs have in common."""
    runs = [curves(demo, folder) for folder in folders]
    metric, adaptive = METRICS[demo]
    lines = [f"| {metric} | clean | at the levels | mean of the curve | AUC_robust |", "|---" * 5 + "|"]
    for name in runs[0]:
        values = np.array([found[name] for found in runs])
        cells = [f"{value:.3f}" for value in values.mean(0)]
        if len(runs) > 1:
            errors = values.std(0, ddof=1) / math.sqrt(len(runs))
            cells = [f"{cell} ± {error:.3f}" for cell, error in zip(cells, errors, strict=True)]
        levels = " / ".join(cell.split()[0] for cell in cells[1:-2])
        lines.append(f"| {name} | {cells[0]} | {levels} | {cells[-2]} | {cells[-1]} |")
    rising = -1 if metric == "MRE" else 1
    gain = np.array([[rising * (a - b) for a, b in zip(found[adaptive], found["SAT"], strict=True)] for found in runs])
    over = np.array([rising * (found[adaptive][-1] - found["STD"][-1]) for found in runs])
    clean, curve = np.sign(gain[:, 0]), np.sign(gain[:, -2])
    better, worse = ((clean > 0) & (curve > 0)).sum(), ((clean < 0) & (curve < 0)).sum()
    lines.append(
        f"\n{len(runs)} runs: {adaptive} above STD in AUC_robust in {(over > 0).sum()} (least {over.min():+.3f}); "
        f"beside SAT better clean in {(clean > 0).sum()}, on the curve in {(curve > 0).sum()}, on both in {better}, "
        f"worse on both in {worse}; seconds: {' '.join((folder / 'seconds').read_text() for folder in folders)}"
    )
    return "\n".join(lines)


def same(one: Path, other: Path) -> bool:
    """Whether two reports say the same of every sample."""
    names = ("samples.csv", "results.csv")
    return all(filecmp.cmp(report(one) / name, report(other) / name, shallow=False) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", help=f"of {', '.join(METRICS)}; default: all")
    parser.add_argument("--work", type=Path, default=Path("build/demos"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="a second run with every seed, compared with the first")
    parser.add_argument("--table", action="store_true", help="print what there is")
    options = parser.parse_args()
    for demo in options.demos or METRICS:
        work = options.work.resolve() / demo
        if not options.table:
            for seed in options.seeds:
                folder = work / f"{seed}_{options.threads}"
                run(demo, folder, seed, options.threads)
                if options.again:
                    second = work / f"again_{seed}_{options.threads}"
                    run(demo, second, seed, options.threads)
                    print(f"{demo}, seed {seed}: two runs {'agree' if same(folder, second) else 'DIFFER'}")
        if done := sorted(path.parent for path in work.glob(f"[0-9]*_{options.threads}/seconds")):
            print(f"{demo}: {', '.join(path.name for path in done)}\n{rows(demo, done)}\n", flush=True)


if __name__ == "__main__":
    main()
