"""Time of an evaluation by one process over that by several, and whether they find the same.

    python benchmarks/processes.py [--processes 2] [--repeats 3] adv-landmark evaluate CHECKPOINT ... --out {out}

The command of any host, with {out} where it names the folder of its report. Every process gets one thread, so that one
leaves the other cores free; wall-clock time of the whole command, start and report included, median over repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

SCRIPTS = Path(sysconfig.get_path("scripts"))


def seconds(words: list[str], processes: int, out: Path) -> float:
    """Runs the command; the seconds it takes."""
    command = [str(SCRIPTS / words[0]), *(word.replace("{out}", str(out)) for word in words[1:])]
    if processes > 1:
        team = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*team, "--no-python", *command]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return time.perf_counter() - start


def results(out: Path) -> dict[str, Any]:
    """The numbers of all reports in a folder."""
    found = {str(path.relative_to(out)): json.loads(path.read_text())["results"] for path in out.rglob("report.json")}
    if not found:
        raise SystemExit(f"the command left no report.json in {out}; does it name {{out}}?")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    ratios = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            one, several = Path(folder) / "one", Path(folder) / "several"
            alone, shared = seconds(args.command, 1, one), seconds(args.command, args.processes, several)
            ratios.append(alone / shared)
            same = results(one) == results(several)
            print(f"{alone:.0f} s alone, {shared:.0f} s shared, {ratios[-1]:.2f}; the same results: {same}", flush=True)
            if not same:
                raise SystemExit("the results differ")
    print(f"one process / {args.processes} processes: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
