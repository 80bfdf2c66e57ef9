"""The project as a user has it who never saw its repository: its wheel, and an environment that holds nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helpers.hosts import ROOT


def build_wheel(folder: Path) -> Path:
    """The wheel of the working tree, in a folder."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, called from an empty folder.

    Attributes:
        folder: of the environment.
        work: the empty folder.
        variables: of the environment, beside those of this process.
    """

    folder: Path
    work: Path
    variables: Mapping[str, str]

    def run(self, *words: object, status: int = 0) -> str:
        """What a command of the environment prints, which ends with this status."""
        program, *rest = map(str, words)
        given = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "nnUNet_extTrainer")}
        done = subprocess.run(
            [str(self.folder / "bin" / program), *rest],
            cwd=self.work,
            env={**given, **self.variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, (words, done.stdout[-3000:], done.stderr[-3000:])
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + (done.stderr if status else "")


def install(wheel: Path, folder: Path) -> Installed:
    """A fresh environment with the wheel, and what it needs from the one that runs the tests.

    Its ``site-packages`` stand behind the new ones on the path. Their own ``.pth`` files are not read, and so the
    editable installation of the working tree, which is one, is not there.
    """
    made, work = folder / "environment", folder / "work"
    work.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    program = str(made / "bin" / "python")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        program,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    (site,) = made.glob("lib/python*/site-packages")
    (site / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "YOLO_CONFIG_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    return Installed(made, work, variables)
