"""``advmed doctor``: what a bug report needs, on one page, and what is wrong with the installation.

Every package is imported in a process of its own, so that one that is broken, or ends the interpreter, does not end the
page. Nothing is asked of the network. A host adds what is particular to it in its module ``doctor``, by a function
``examine(page)``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from advmed.documentation import page as documentation
from advmed.lazy import OURS
from advmed.versions import installed, newer_than_tested, ranges

COMPLETION = "shtab"
"""What no extra brings and ``--print-completion`` needs."""
PATIENCE = 180
"""Seconds that a process may take: the first import of a framework on a slow disk takes one or two minutes."""
QUIET = {"YOLO_OFFLINE": "true", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
"""Environment of the processes: hosts ask the network at their import otherwise."""
IMPORTS = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        found = ""
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    print("\\n" + json.dumps([name, found]), flush=True)
"""
DEVICES = """
import json, os, torch
found = {"build": torch.__version__, "CUDA of the build": str(torch.version.cuda), "threads": torch.get_num_threads()}
found["cores"] = os.cpu_count()
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
else:
    found["cuda"] = "none that PyTorch can use"
found["mps"] = "yes" if torch.backends.mps.is_available() else "none"
print("\\n" + json.dumps(found))
"""


@dataclass
class Page:
    """The page, as it grows.

    Attributes:
        sections: titles, and lines of name and value.
        broken: what does not work, with what to do.
        notes: what to know.
    """

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, title: str, name: str, value: object) -> None:
        """A line of a section."""
        self.sections.setdefault(title, []).append((name, str(value)))

    def folder(self, title: str, name: str, path: str | None, *, write: bool = True) -> None:
        """A line for a folder that a host needs; one that is not there, or cannot be written, is broken."""
        if not path:
            self.add(title, name, "not set")
            return
        place = Path(path)
        wrong = "" if place.is_dir() else "is a file" if place.exists() else "does not exist"
        if not wrong and write and not _writable(place):
            wrong = "cannot be written"
        self.add(title, name, f"{path} ({wrong})" if wrong else path)
        if wrong:
            self.broken.append(f"{name} names the folder {path}, which {wrong}")

    def text(self) -> str:
        """The page; the user's home folder is shown as ~."""
        lines: list[str] = []
        for title, rows in self.sections.items():
            width = max(len(name) for name, _ in rows)
            lines += [title, *(f"  {name:<{width}}  {value}".rstrip() for name, value in rows), ""]
        for title, found in (("Broken", self.broken), ("To know", self.notes)):
            if found:
                lines += [title, *(f"  - {line}" for line in found), ""]
        lines.append("Something is broken, see above." if self.broken else "Nothing is broken.")
        text, home = "\n".join(lines), os.path.expanduser("~").rstrip("/")
        return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if home else text


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def ask(code: str, *words: str) -> tuple[list[str], str]:
    """What code prints in a fresh interpreter of this environment.

    Returns:
        Its lines, and why it ended, empty for well.
    """
    command = [sys.executable, "-P", "-c", code, *words]
    given = {**os.environ, **QUIET}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=given, check=False)
    except subprocess.TimeoutExpired:
        return [], f"no answer within {PATIENCE} s"
    if done.returncode == 0:
        return done.stdout.splitlines(), ""
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return done.stdout.splitlines(), last or f"ended with status {done.returncode}"


# What every host has


def requirements() -> dict[str, list[Requirement]]:
    """What this distribution asks for, by extra; "" for what it always needs.

    Raises:
        PackageNotFoundError: if it is not installed, but found in a folder of the path.
    """
    found: dict[str, list[Requirement]] = {}
    for line in requires("advmed") or []:
        requirement = Requirement(line)
        names = ["", *(host.removeprefix("adv_") for host in OURS[1:]), "search"]
        for extra in names:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found.setdefault(extra, []).append(requirement)
                break
    return found


def unmet(package: str) -> list[tuple[str, str]]:
    """What an installed package asks for that is installed in another version: its name, and a sentence."""
    found = []
    for line in requires(package) or []:
        requirement = Requirement(line)
        here = installed(requirement.name)
        if here is None or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        if not requirement.specifier.contains(here, prereleases=True):
            text = f"{package} {installed(package)} asks for {requirement.name}{requirement.specifier}, got {here}"
            found.append((requirement.name, text))
    return found


def alike(torch: str, torchvision: str) -> bool:
    """Whether two builds are for the same device, as far as their versions say."""
    try:
        local = [Version(text).local for text in (torch, torchvision)]
    except InvalidVersion:
        return True
    return None in local or local[0] == local[1]


def _versions(page: Page) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Versions of ours and of the packages that we were tested with.

    Returns:
        By extra, its packages where it is installed; and what it lacks where it is not, but has come in part with
        another one: nnU-Net brings timm.
    """
    page.add("Versions", "Python", f"{platform.python_version()} ({platform.python_implementation()})")
    page.add("Versions", "platform", platform.platform())
    page.add("Versions", "environment", sys.prefix)
    here = Path(__file__).parents[1]
    try:
        page.add("Versions", "advmed", f"{distribution('advmed').version}, {here}")
        asked = requirements()
    except PackageNotFoundError:
        page.add("Versions", "advmed", f"not installed, found in {here}")
        page.broken.append(
            "advmed is on the path, but not installed: the commands of nnU-Net do not find its trainers, and what it "
            "needs is not known. Install it with pip, or set nnUNet_extTrainer to the folder adv_nnunet/trainers"
        )
        asked = {}
    page.add("Versions", "documentation", documentation("index.md"))
    modules: dict[str, list[str]] = {}
    lacking: dict[str, list[str]] = {}
    for extra, needed in asked.items():
        missing = [requirement.name for requirement in needed if installed(requirement.name) is None]
        if extra and len(missing) == len(needed):
            continue
        if extra and {canonicalize_name(name) for name in missing} & ranges().keys():
            lacking[extra] = missing
            continue
        if missing:
            how = f"'advmed[{extra}]'" if extra else "advmed"
            be = "is" if len(missing) == 1 else "are"
            page.broken.append(f"{', '.join(missing)} {be} not installed: pip install {how}")
        modules[extra] = [requirement.name for requirement in needed if requirement.name not in missing]
        for requirement in needed:
            got = installed(requirement.name)
            if got is not None and not requirement.specifier.contains(got, prereleases=True):
                page.broken.append(f"advmed asks for {requirement.name}{requirement.specifier}, got {got}")
    for name, known in ranges().items():
        version = installed(name)
        judged = "" if version is None else _judged(newer=known.is_exceeded_by(version), older=known.is_above(version))
        shown = "not installed" if version is None else f"{version}{judged}"
        page.add("Versions", known.package, f"{shown:<26} tested: {known.oldest} to {known.newest}")
    beside: dict[str, Requirement] = {canonicalize_name(one.name): one for one in asked.get("", ())}
    for name in (*sorted(beside), COMPLETION):  # of those, no versions are written down
        if name not in ranges():
            bound = f"needed: {beside[name].specifier}" if name in beside else "for completion in the shell"
            page.add("Versions", name, f"{installed(name) or 'not installed':<26} {bound}")
    page.notes.extend(newer_than_tested(ranges()))
    for name in (*ranges(), "torchattacks"):
        for other, text in unmet(name) if installed(name) is not None else ():
            # An old pip or setuptools does no harm until something is built.
            counts = name in ranges() and canonicalize_name(other) in ranges()
            (page.broken if counts else page.notes).append(text)
    if installed("torchattacks") is not None:
        page.notes.append(
            "torchattacks holds requests at 2.25 and with it an urllib3 of 2023, whose holes are known: leave it out "
            "of an environment that is used for more than comparisons"
        )
    torch, torchvision = installed("torch"), installed("torchvision")
    if torch and torchvision and not alike(torch, torchvision):
        page.broken.append(
            f"torch {torch} and torchvision {torchvision} are built for different devices: install both in one "
            f"command, from the same place"
        )
    return modules, lacking


def _judged(*, newer: bool, older: bool) -> str:
    return " (newer)" if newer else " (older)" if older else ""


def _imports(page: Page, modules: dict[str, list[str]], lacking: dict[str, list[str]]) -> None:
    """Whether our packages can be imported, with the modules of the hosts."""
    wanted = {"": ["advmed.attacks", "advmed.methods", "advmed.report"]}
    for host in OURS[1:]:
        extra = host.removeprefix("adv_")
        if extra in modules:
            ours = [f"{host}.evaluate", *(f"{host}.{part}" for part in ("module", "trainer") if _exists(host, part))]
            wanted[extra] = ours
    names = [name for group in wanted.values() for name in group]
    lines, ended = ask(IMPORTS, *names)
    found = dict(json.loads(line) for line in lines if line.startswith('["'))
    for extra, group in wanted.items():
        title = f"advmed[{extra}]" if extra else "advmed"
        missing = next((name for name in group if name not in found), None)
        wrong = next((f"{name}: {found[name]}" for name in group if found.get(name)), None)
        if wrong is None and missing is not None:
            wrong = f"{missing}: the interpreter ended ({ended})"
        page.add("Imports", title, "works" if wrong is None else wrong.splitlines()[0])
        if wrong is not None:
            page.broken.append(f"{title} cannot be imported: {wrong.splitlines()[0]}")
    for host in OURS[1:]:
        extra = host.removeprefix("adv_")
        if extra not in modules:
            without = f", without {' and '.join(lacking[extra])}" if extra in lacking else ""
            page.add("Imports", f"advmed[{extra}]", f"not installed{without}")


def _exists(host: str, part: str) -> bool:
    try:
        return find_spec(f"{host}.{part}") is not None
    except ImportError:
        return False


def _devices(page: Page) -> None:
    lines, ended = ask(DEVICES)
    if ended or not lines:
        page.add("Devices", "PyTorch", ended)
        return
    for name, value in json.loads(lines[-1]).items():
        page.add("Devices", name, value)
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        page.add("Devices", name, os.environ.get(name, "not set"))


def examine() -> Page:
    """Looks at everything; see :class:`Page`."""
    page = Page()
    modules, lacking = _versions(page)
    _imports(page, modules, lacking)
    if installed("torch") is not None:
        _devices(page)
    for host in OURS[1:]:
        if host.removeprefix("adv_") in modules and _exists(host, "doctor"):
            import_module(f"{host}.doctor").examine(page)
    page.folder("Folders", "working folder", os.getcwd())
    page.folder("Folders", "temporary files", tempfile.gettempdir())
    return page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``advmed doctor`` has none."""


def run(args: argparse.Namespace) -> int:
    """Prints the page; returns the exit status, 1 if something is broken."""
    page = examine()
    print(page.text())
    return 1 if page.broken else 0
