"""Does the test suite notice what it should? Faults of faults.yaml are planted one at a time, and its tests are run.

::

    python benchmarks/faults.py                          # all; exit status 1 if a fault was not found
    python benchmarks/faults.py --room attacks methods   # some rooms
    python benchmarks/faults.py --only NAME --again      # one fault, also if there is a result of it
    python benchmarks/faults.py --check                  # only looks whether every snippet is there exactly once

A fault has ``name``, ``room``, ``old`` (a line or a part of one that occurs once in the product's files, in whichever),
``new``, ``why`` (what would be silently wrong), and may have ``file`` (where ``old`` must occur once, if it occurs in
several), ``tests`` (instead of those of its room) and ``k`` (as pytest's -k). It is found if pytest ends with 1 (a test
failed) or 2 (the tests could not be collected), and not found with 0; a time-out or another end counts as not found,
and is named. Results are kept, and a fault that has one is not planted again unless its text or its tests have changed,
or ``--again`` is given.

No fault ever touches the repository: its tracked files are copied, and the tests run on the copy, in forks of a process
that has imported what takes long. Tests must pass without a fault before any is planted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

# Where things are; to be changed when files move. Tests are files, globs, or node ids of pytest.

PRODUCT = ("adv_*", "common")
"""Folders of the product's Python files."""
IMPORT_FROM = (".", "common")
"""Folders that the product's packages are imported from."""
ROOMS: dict[str, tuple[str, ...]] = {
    "norms": ("tests/ground/test_norms.py",),
    "distances": ("tests/ground/test_distances.py",),
    "guard": ("tests/ground/test_guard.py",),
    "objective": ("tests/ground/test_objective.py",),
    "margins": ("tests/ground/test_margins.py",),
    "thresholds": ("tests/ground/test_thresholds.py",),
    "files": ("tests/ground/test_files.py", "tests/ground/test_copies.py"),
    "attacks": ("tests/attacks/test_pgd.py", "tests/attacks/test_gradients.py", "tests/attacks/test_contract.py"),
    "methods": (
        *("tests/methods/test_methods.py", "tests/methods/test_amat.py", "tests/methods/test_dpaat.py"),
        *("tests/methods/test_trades.py", "tests/methods/test_mart.py", "tests/methods/test_fat.py"),
    ),
    "run": ("tests/training/test_run.py",),
    "settings": ("tests/training/test_settings.py",),
    "evaluation": ("tests/evaluation/test_loop.py",),
    "checks": ("tests/evaluation/test_checks.py",),
    "bootstrap": ("tests/evaluation/test_intervals.py",),
    "metrics": ("tests/evaluation/test_metrics.py",),
    "comparison": ("tests/evaluation/test_subjects.py",),
    "report": ("tests/report/test_report.py", "tests/report/test_failures.py", "tests/report/test_pictures.py"),
    "compare": ("tests/report/test_comparison.py",),
    "search": ("tests/search/test_search.py",),
    "cli": ("tests/cli/test_runner.py", "tests/cli/test_evaluate_options.py"),
    "lightning": ("tests/hosts/classify/test_data.py", "tests/hosts/classify/test_network.py"),
    "nnunet": ("tests/hosts/nnunet/test_objective.py",),
    "yolo": ("tests/hosts/yolo/test_objective.py",),
    "classify": ("tests/hosts/classify/test_objective.py", "tests/hosts/classify/test_data.py"),
    "landmark": ("tests/hosts/landmark/test_objective.py", "tests/hosts/landmark/test_maps.py"),
}

HERE = Path(__file__).resolve().parent
TIMEOUT = 600
"""Seconds after which a run of pytest is ended."""
FOUND = {1: "test failed", 2: "not collected"}
"""Exit status of pytest: how a fault was found."""
PRELOADED = (
    *("pytest", "numpy", "yaml", "jinja2", "tqdm", "matplotlib.figure", "torch", "torch._dynamo", "scipy.ndimage"),
    *("torchvision", "torchmetrics", "lightning.pytorch", "timm", "segmentation_models_pytorch"),
    *("pandas", "sklearn.metrics", "skimage.transform", "SimpleITK", "batchgenerators", "cv2", "polars", "optuna"),
)
"""What takes long to import and is no part of the product; no host that reads variables when it is imported."""


@dataclass(frozen=True)
class Fault:
    """A fault, as faults.yaml has it."""

    name: str
    room: str
    old: str
    new: str
    why: str
    file: str = ""
    tests: tuple[str, ...] = ()
    k: str = ""

    @property
    def selection(self) -> tuple[str, ...]:
        """The tests that should find it."""
        return self.tests or ROOMS[self.room]

    @property
    def mark(self) -> str:
        """Tells whether a result is of this fault with these tests."""
        text = "\n".join((self.room, self.file, self.old, self.new, *self.selection, self.k))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Run:
    """What pytest said.

    Attributes:
        status: its exit status; -1 after a time-out.
        seconds: how long it took.
        failed: the first test that failed, if one did.
        output: the end of its output.
    """

    status: int
    seconds: float
    failed: str = ""
    output: str = field(default="", repr=False)


def read_faults(path: Path) -> list[Fault]:
    """Reads the list of faults.

    Raises:
        ValueError: for what is no fault, or names given twice.
    """
    faults, problems = [], []
    for content in yaml.safe_load(path.read_text(encoding="utf-8")):
        fault = Fault(**{**content, "tests": tuple(content.get("tests", ()))})
        if fault.room not in ROOMS:
            problems.append(f"{fault.name}: there is no room {fault.room!r}")
        if not fault.old or "\n" in fault.old + fault.new or fault.old == fault.new:
            problems.append(f"{fault.name}: old must be one line, and new another")
        faults.append(fault)
    names = [fault.name for fault in faults]
    problems += [f"{name} is there twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise ValueError("\n".join(problems))
    return faults


def tracked(repository: Path) -> list[str]:
    """The files that git knows, as far as they are there."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=repository, check=True, capture_output=True).stdout.decode()
    return [name for name in found.split("\0") if name and (repository / name).is_file()]


def product_files(root: Path, names: Iterable[str]) -> list[Path]:
    """The product's Python files."""
    return [
        root / name
        for name in names
        if name.endswith(".py") and any(Path(name.split("/")[0]).match(pattern) for pattern in PRODUCT)
    ]


def locate(faults: Sequence[Fault], files: Sequence[Path], root: Path) -> dict[str, Path]:
    """The file that each fault's snippet is in.

    Raises:
        ValueError: for snippets that do not occur exactly once.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    found, problems = {}, []
    for fault in faults:
        possible = [root / fault.file] if fault.file else texts
        places = [path for path in possible for _ in range(texts.get(path, "").count(fault.old))]
        if len(places) == 1:
            found[fault.name] = places[0]
        else:
            problems.append(f"{fault.name}: {len(places)} times {fault.old!r}")
    if problems:
        raise ValueError("snippets must occur exactly once:\n" + "\n".join(problems))
    return found


class Copy:
    """A copy of the repository's tracked files, for one worker, and the process that runs pytest on it.

    Args:
        repository: what is copied.
        names: its files.
        folder: where the copy goes.
    """

    def __init__(self, repository: Path, names: Sequence[str], folder: Path) -> None:
        self.repository, self.root, self._log = repository, folder / "copy", folder / "log"
        for name in names:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, self.root / name)
        self._server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(self.root), "--repository", str(repository)],
            cwd=self.root,
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """Ends the process."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    @contextmanager
    def planted(self, fault: Fault, path: Path) -> Iterator[None]:
        """Puts a fault into a file, and takes it out again."""
        file = self.root / path.relative_to(self.repository)
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(text, encoding="utf-8")

    def run(self, selection: Iterable[str], k: str = "", *, first: bool = True) -> Run:
        """Runs tests on the copy; ``first`` stops at the first that fails."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        words = ["-q", "-p", "no:cacheprovider", "--tb=line", *(["-x"] if first else []), *(["-k", k] if k else [])]
        start = time.monotonic()
        print(json.dumps([str(self._log), *words, *self._expanded(selection)]), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        output = self._log.read_text(encoding="utf-8", errors="replace")
        match = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return Run(status, time.monotonic() - start, match[1] if match and status else "", output[-3000:])

    def _expanded(self, selection: Iterable[str]) -> list[str]:
        words = []
        for test in selection:
            pattern, colons, node = test.partition("::")
            files = sorted(str(path.relative_to(self.root)) for path in self.root.glob(pattern))
            if not files:
                raise ValueError(f"there are no tests {pattern}")
            words += [file + colons + node for file in files]
        return list(dict.fromkeys(words))

    def _environment(self) -> dict[str, str]:
        # nnU-Net's variable names a folder of the repository where this Python runs, and would come before the copy's.
        kept = {name: value for name, value in os.environ.items() if name != "nnUNet_extTrainer"}
        return kept | {
            "PYTHONPATH": os.pathsep.join(str((self.root / folder).resolve()) for folder in IMPORT_FROM),
            # A file that changes twice a second with its size unchanged would be taken from the cache.
            "PYTHONDONTWRITEBYTECODE": "1",
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            "MPLBACKEND": "Agg",
        }


# The process that runs pytest: each time in a fork of itself, which has all but the product imported already.


class Origin:
    """A plugin of pytest: the product must come from the copy, whoever imported it.

    Args:
        copy: the copy.
        repository: what it is a copy of.
    """

    def __init__(self, copy: Path, repository: Path) -> None:
        self.copy, self.repository = copy.resolve(), repository

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        """Ends with status 3 if it does not."""
        import pytest

        modules = [module for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
        files = [file for module in modules if (file := Path(module.__file__).resolve()) != Path(__file__).resolve()]
        strangers = [f for f in files if f.is_relative_to(self.repository) and "site-packages" not in f.parts]
        ours = [f for f in files if f.is_relative_to(self.copy) and f.relative_to(self.copy).parts[0] != "tests"]
        if strangers or (exitstatus == 0 and not ours):
            pytest.exit(f"the product does not come from the copy: {[str(f) for f in strangers[:3]]}", returncode=3)


def serve(copy: Path, repository: Path) -> None:
    """Reads a line of JSON, the log and the words for pytest, and answers with its exit status; -1 for a time-out."""
    sys.path.remove(str(HERE))  # a script's folder comes first
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import may print is no answer
    for name in PRELOADED:
        with suppress(ImportError), warnings.catch_warnings(action="ignore"):
            import_module(name)
    for line in sys.stdin:
        log, *words = json.loads(line)
        Path(log).write_bytes(b"")
        child = os.fork()
        if child == 0:
            os.setsid()
            for number, file in ((0, os.devnull), (1, log), (2, log)):
                os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
            sys.argv, status = ["pytest", *words], 3
            try:
                status = int(import_module("pytest").main(words, plugins=[Origin(copy, repository)]))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        end, status = time.monotonic() + TIMEOUT, -1
        while time.monotonic() < end:
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.02)
        _end_group(child)  # what tests left behind
        if status == -1:
            os.waitpid(child, 0)
        print(status, file=answers, flush=True)


def _end_group(group: int) -> None:
    try:
        os.killpg(group, 9)
    except (ProcessLookupError, PermissionError):
        return


class Results:
    """The file of results, written after every fault."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.content = {result["name"]: result for result in json.loads(path.read_text())["faults"]}

    def known(self, fault: Fault) -> bool:
        """Whether there is a result of this very fault."""
        return self.content.get(fault.name, {}).get("mark") == fault.mark

    def add(self, fault: Fault, place: str, run: Run) -> None:
        """Adds a result and writes the file."""
        end = FOUND.get(run.status) or {0: "not found", -1: "timed out"}.get(run.status, f"pytest ended {run.status}")
        self.content[fault.name] = {
            "name": fault.name,
            "room": fault.room,
            "file": place,
            "found": run.status in FOUND,
            "end": end,
            "by": run.failed,
            "seconds": round(run.seconds, 1),
            "mark": fault.mark,
        }
        self.write(self.content)

    def write(self, names: Iterable[str]) -> None:
        """Writes the results of those faults."""
        kept = [self.content[name] for name in names if name in self.content]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text(json.dumps({"faults": kept}, indent=1) + "\n")
        os.replace(temporary, self.path)


class Copies:
    """Copies of the repository, each used by one thread at a time."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self.count = len(copies)
        self._free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for copy in copies:
            self._free.put(copy)

    @contextmanager
    def one(self) -> Iterator[Copy]:
        """A copy that is free."""
        copy = self._free.get()
        try:
            yield copy
        finally:
            self._free.put(copy)


def check_clean(copies: Copies, faults: Sequence[Fault]) -> None:
    """The tests of some faults must pass without a fault: once a room, and once more for every ``k`` in it.

    Raises:
        RuntimeError: if they do not.
    """
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for fault in faults:
        groups.setdefault((fault.room, fault.k), {}).update(dict.fromkeys(fault.selection))

    def one(group: tuple[str, str]) -> str:
        with copies.one() as copy:
            run = copy.run(groups[group], group[1], first=False)
        return f"{group[0]}: pytest ended with {run.status} without a fault:\n{run.output}" if run.status else ""

    with ThreadPoolExecutor(copies.count) as pool:
        found = list(tqdm(pool.map(one, groups), total=len(groups), desc="without a fault", unit="run", disable=None))
    if any(found):
        raise RuntimeError("\n".join(filter(None, found)))


def plant(faults: Sequence[Fault], places: Mapping[str, Path], copies: Copies, root: Path, results: Results) -> None:
    """Plants the faults one after the other, as many at a time as there are copies."""

    def one(fault: Fault) -> tuple[Fault, Run]:
        with copies.one() as copy, copy.planted(fault, places[fault.name]):
            return fault, copy.run(fault.selection, fault.k)

    with (
        ThreadPoolExecutor(copies.count) as pool,
        tqdm(total=len(faults), desc="faults", unit="fault", disable=None) as bar,
    ):
        for future in as_completed([pool.submit(one, fault) for fault in faults]):
            fault, run = future.result()
            results.add(fault, places[fault.name].relative_to(root).as_posix(), run)
            if run.status not in FOUND:
                bar.write(f"{fault.name}: {results.content[fault.name]['end']} ({fault.why})")
            bar.update()


def summary(faults: Sequence[Fault], results: Results) -> tuple[str, bool]:
    """A table by room, what was not found, and whether all was found."""
    rows = [("room", "faults", "found", "seconds")]
    done = [results.content[fault.name] for fault in faults if fault.name in results.content]
    for room in [*ROOMS, ""]:
        mine = [result for result in done if room in ("", result["room"])]
        if mine:
            seconds = sum(result["seconds"] for result in mine)
            found = sum(result["found"] for result in mine)
            rows.append((room or "all", str(len(mine)), str(found), f"{seconds:.0f}"))
    lines = [f"{a:12}{b:>8}{c:>8}{d:>9}" for a, b, c, d in rows]
    missed = [result for result in done if not result["found"]]
    lines += [f"{result['name']} ({result['file']}): {result['end']}" for result in missed]
    return "\n".join(lines), not missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser("faults.py", description="Plants faults and looks whether the tests find them.")
    parser.add_argument("--list", type=Path, default=HERE / "faults.yaml", help="the faults")
    parser.add_argument("--repository", type=Path, default=Path.cwd(), help="default: this folder")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=None, help="these faults")
    parser.add_argument("--room", nargs="+", choices=list(ROOMS), default=None, help="the faults of these rooms")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--out", type=Path, default=Path("build/faults.json"), help="results, which are gone on from")
    parser.add_argument("--again", action="store_true", help="also faults that have a result")
    parser.add_argument("--check", action="store_true", help="only look for the snippets")
    parser.add_argument("--serve", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    repository = args.repository.resolve()
    if args.serve is not None:
        serve(args.serve, repository)
        return 0
    try:
        every = read_faults(args.list)
        strangers = sorted(set(args.only or ()) - {fault.name for fault in every})
        if strangers:
            raise ValueError(f"there are no faults {', '.join(strangers)}")
        names = tracked(repository)
        places = locate(every, product_files(repository, names), repository)
        if args.check:
            print(f"{len(every)} faults, each in one place")
            return 0
        faults = [f for f in every if f.name in (args.only or (f.name,)) and f.room in (args.room or (f.room,))]
        results = Results(args.out)
        left = [fault for fault in faults if args.again or not results.known(fault)]
        with tempfile.TemporaryDirectory(prefix="faults-") as scratch, ExitStack() as stack:
            copies = []
            for number in range(min(max(1, args.jobs), len(left))):
                folder = Path(scratch) / str(number)
                folder.mkdir()
                copies.append(stack.enter_context(closing(Copy(repository, names, folder))))
            if left:
                shared = Copies(copies)
                check_clean(shared, left)
                plant(left, places, shared, repository, results)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"faults.py: {error}", file=sys.stderr)
        return 2
    results.write([fault.name for fault in every])
    text, complete = summary(faults, results)
    print(text)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
