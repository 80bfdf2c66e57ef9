"""The fast suite on every Python that is supported, and on the lowest versions that pyproject.toml allows.

python tools/matrix.py                        every cell, one after the other
python tools/matrix.py 3.12 lowest            these cells
python tools/matrix.py lowest --sample        what is most likely to break, in minutes
python tools/matrix.py --table                what has been run so far, and run nothing

Each cell has an environment of its own in build/matrix/CELL, made by uv, which is taken from the PATH or installed into
build/matrix/uv. The tests run room by room; a room that has passed with the same sources and the same packages is not
run again, so that a run that was stopped goes on where it stopped. The interpreters must be on the machine (pyenv, or
deadsnakes, or `uv python install`). Results: build/matrix/CELL/results.json, and a table in build/matrix/table.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "matrix"
CELLS = {
    "3.11": ("3.11", "highest"),
    "3.12": ("3.12", "highest"),
    "3.13": ("3.13", "highest"),
    "lowest": ("3.11", "lowest-direct"),
}
"""Cell: its Python, and which versions uv takes of what pyproject.toml allows."""
EXTRAS = "nnunet,yolo,classify,landmark,search"
TOOLS = (
    *("pytest>=8.2", "pytest-xdist>=3.6", "hatchling>=1.27", "hatch-fancy-pypi-readme>=24.1", "editables>=0.5"),
    *("shtab>=1.7", "setuptools"),  # which the Triton of PyTorch 2.4 imports without asking for it
)
"""What runs the tests, at its newest in every cell: it is not what is tested."""
PEERS = ("torchattacks>=3.5.1",)
"""What the tests compare with, without what it asks for: its requests of 2021 would hold the rest back."""
OWN = ("advmed", "editables")
"""What is installed of this repository, and what the build puts beside it."""
SHOWN = (
    *("torch", "torchvision", "numpy", "scipy", "jsonargparse", "nnunetv2", "ultralytics", "lightning", "timm"),
    *("segmentation_models_pytorch", "optuna"),
)
"""The packages whose versions the table shows."""
SAMPLE = (
    *("tests/test_install.py", "tests/test_packaging.py", "tests/test_public_names.py", "tests/training"),
    "tests/hosts/lightning/test_documentation.py::test_the_commands_of_a_page_work",
    "tests/hosts/nnunet/test_trainer.py::test_a_whole_std_training_ends_with_the_stock_weights",
    "tests/hosts/nnunet/test_trainer.py::test_a_margin_is_the_radius_of_its_sample",
    "tests/hosts/yolo/test_trainer.py::test_self_calibrated_thresholds_begin_after_the_warm_up",
    *("tests/ground", "tests/methods", "tests/attacks", "tests/cli"),
)
"""The rooms of --sample: what is installed, the example of every public name, a tiny training on each host (on those of
Lightning by the commands of the README, their report included), and the core."""


def rooms(sample: bool) -> list[str]:
    """Folders and files of tests, each of which is one process of pytest."""
    if sample:
        return list(SAMPLE)
    # tests/docs is about packages of others (MONAI, transformers) beside ours: they would choose the versions.
    apart = {ROOT / "tests", ROOT / "tests" / "hosts", ROOT / "tests" / "docs"}
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")} - apart
    files = [*(ROOT / "tests").glob("test_*.py"), *(ROOT / "tests" / "hosts").glob("test_*.py")]
    return [str(path.relative_to(ROOT)) for path in sorted((*folders, *files))]


def sources() -> str:
    """A digest of everything that a test can see of this repository."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    digest = hashlib.sha256()
    for name in sorted(filter(None, names)):
        path = ROOT / name
        if path.is_file() and path.suffix != ".md":
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def uv() -> list[str]:
    """The command uv: the user's, or one of our own."""
    if found := shutil.which("uv"):
        return [found]
    own = BUILD / "uv" / "bin" / "uv"
    if not own.is_file():
        print("Installing uv", flush=True)
        subprocess.run([sys.executable, "-m", "venv", BUILD / "uv"], check=True)
        subprocess.run([own.with_name("python"), "-m", "pip", "install", "--quiet", "uv"], check=True)
    return [str(own)]


def located(version: str) -> str:
    """An interpreter of a version that is on the machine, or the version, for uv to look for it.

    A shim of pyenv (`python3.13` on the PATH) runs nothing until a version is chosen, and uv takes it for none.
    """
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for found in (
        shutil.which(f"python{version}"),
        *sorted(root.glob(f"versions/{version}.*/bin/python"), reverse=True),
    ):
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return str(found)
    return version


def make(cell: str, torch: list[str]) -> Path:
    """The environment of a cell; a finished one is kept until pyproject.toml changes. Returns its interpreter."""
    version, resolution = CELLS[cell]
    folder = BUILD / cell / "env"
    interpreter, stamp = folder / "bin" / "python", folder / ".complete"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + repr((TOOLS, PEERS, torch)).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return interpreter
    print(f"{cell}: making the environment (Python {version}, {resolution} versions)", flush=True)
    if not interpreter.is_file():
        subprocess.run([*uv(), "venv", "--quiet", "--python", located(version), folder], check=True)
    stamp.unlink(missing_ok=True)
    install = [*uv(), "pip", "install", "--quiet", "--python", interpreter]
    subprocess.run([*install, "--resolution", resolution, *torch, "-e", f".[{EXTRAS}]"], cwd=ROOT, check=True)
    # Apart, so that "lowest" is not about them, and without touching what the line above has chosen.
    kept = BUILD / cell / "kept.txt"
    chosen = {name: version for name, version in packages(interpreter).items() if name not in OWN}
    kept.write_text("".join(f"{name}=={version}\n" for name, version in chosen.items()))
    subprocess.run([*install, "--constraint", kept, *TOOLS], cwd=ROOT, check=True)
    subprocess.run([*install, "--no-deps", *PEERS], cwd=ROOT, check=True)
    stamp.write_text(wanted)
    return interpreter


def packages(interpreter: Path) -> dict[str, str]:
    """What is installed, with versions."""
    command = [*uv(), "pip", "list", "--quiet", "--python", interpreter, "--format", "json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {entry["name"]: entry["version"] for entry in listed}


def run(cell: str, interpreter: Path, wanted: list[str], limit: float) -> bool:
    """Runs the rooms of a cell that have not passed yet; whether all have passed."""
    record = BUILD / cell / "results.json"
    script = "import platform; print(platform.python_version())"
    python = subprocess.run([interpreter, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    state: dict[str, Any] = {"python": python, "packages": packages(interpreter)}
    found = json.loads(record.read_text()) if record.is_file() else {}
    if {name: found.get(name) for name in state} != state:
        found = {**state, "machine": platform.platform(), "rooms": {}}
    now = sources()

    def passed(room: str) -> bool:
        outcome = found["rooms"].get(room, {})
        return outcome.get("failed") == 0 and outcome["sources"] == now

    begun = time.monotonic()
    for room in wanted:
        if passed(room):
            continue
        if limit and time.monotonic() - begun > limit:
            print(f"{cell}: stopped after {limit:.0f} s; call again to go on", flush=True)
            break
        found["rooms"][room] = outcome = {**pytest(cell, interpreter, room), "sources": now}
        print(f"{cell}: {room}: {outcome}", flush=True)
        record.write_text(json.dumps(found, indent=1))
    return all(map(passed, wanted))


def pytest(cell: str, interpreter: Path, room: str) -> dict[str, Any]:
    """How many tests of a room passed, failed and were skipped."""
    report = BUILD / cell / "junit.xml"
    report.unlink(missing_ok=True)
    log = BUILD / cell / f"{room.replace('/', '-').replace('::', '-')}.log"
    command = [interpreter, "-m", "pytest", "-q", f"--junitxml={report}", room]
    if "::" not in room:  # a test that is named is run, however long it takes
        command += ["-m", "not slow"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = os.pathsep.join([str(interpreter.parent), environment["PATH"]])
    begun = time.monotonic()
    with log.open("w") as out:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT).returncode
    seconds = round(time.monotonic() - begun)
    if status not in (0, 1, 5) or not report.is_file():  # 5: a room whose tests are all slow
        return {"passed": 0, "failed": 1, "skipped": 0, "seconds": seconds, "status": status, "log": str(log)}
    (suite,) = ElementTree.parse(report).getroot()
    total, bad, skipped = (
        int(suite.get("tests", 0)),
        int(suite.get("failures", 0)) + int(suite.get("errors", 0)),
        int(suite.get("skipped", 0)),
    )
    return {"passed": total - bad - skipped, "failed": bad, "skipped": skipped, "seconds": seconds}


def table() -> str:
    """What has been run of these sources in each cell, and with which versions, as Markdown."""
    lines = [f"| cell | Python | {' | '.join(SHOWN)} | rooms | passed | failed | skipped |"]
    lines.append("|---" * (len(SHOWN) + 6) + "|")
    now = sources()
    for cell in CELLS:
        record = BUILD / cell / "results.json"
        if not record.is_file():
            continue
        found = json.loads(record.read_text())
        versions = [found["packages"].get(name) or found["packages"].get(name.replace("_", "-"), "") for name in SHOWN]
        rooms = [room for room in found["rooms"].values() if room["sources"] == now]
        sums = [sum(room[what] for room in rooms) for what in ("passed", "failed", "skipped")]
        cells = [cell, found["python"], *versions, len(rooms), *sums]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs what is asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(CELLS)}; default: all")
    parser.add_argument("--sample", action="store_true", help="the core, the packaging and a tiny training per host")
    parser.add_argument("--room", action="append", default=[], help="only this folder, file or test; repeatable")
    parser.add_argument("--install-only", action="store_true", help="make the environments, and run nothing")
    parser.add_argument("--limit", type=float, default=0, help="begin no room after so many seconds; 0: no limit")
    parser.add_argument(
        "--torch", nargs="+", default=[], help="what uv is told of PyTorch builds, such as torch==2.13.0"
    )
    parser.add_argument("--table", action="store_true", help="print what has been run, and run nothing")
    args = parser.parse_args()
    if unknown := set(args.cells) - set(CELLS):
        parser.error(f"there is no cell {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")
    if unknown := [room for room in args.room if not (ROOT / room.partition("::")[0]).exists()]:
        parser.error(f"there is no {', '.join(unknown)}")
    if args.table:
        print(table(), end="")
        return 0
    passed = True
    for cell in args.cells or CELLS:
        (BUILD / cell).mkdir(parents=True, exist_ok=True)
        interpreter = make(cell, args.torch)
        if not args.install_only:
            passed &= run(cell, interpreter, args.room or rooms(args.sample), args.limit)
    if not args.install_only:
        (BUILD / "table.md").write_text(table())
        print(f"\n{table()}\nWritten to {BUILD / 'table.md'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
