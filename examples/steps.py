"""What the demos share: steps with a title, a log and a stamp in one working folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path


class Steps:
    """Runs steps once: one that is finished is skipped when it is called again, unless what it depends on changed.

    Args:
        work: the working folder.
        environment: variables for the commands, on top of those of this process.
    """

    def __init__(self, work: Path, environment: Mapping[str, str]) -> None:
        self.work = work
        self.logs, self.stamps = work / "logs", work / "done"
        for folder in (self.logs, self.stamps):
            folder.mkdir(parents=True, exist_ok=True)
        # Beside data workers, threads that spin while they wait for each other were measured to be many times slower
        # than threads that sleep.
        waiting = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        self.environment = os.environ | waiting | dict(environment)

    def step(self, name: str, title: str, action: Callable[[], None], depends_on: str) -> None:
        """Run `action` unless a stamp says that it succeeded before with the same `depends_on`."""
        stamp = self.stamps / name
        print(f"{title} ... ", end="", flush=True)
        if stamp.exists() and stamp.read_text() == depends_on:
            print("done before")
            return
        stamp.unlink(missing_ok=True)
        start = time.monotonic()
        action()
        stamp.write_text(depends_on)
        print(f"{time.monotonic() - start:.0f} s")

    def command(
        self,
        name: str,
        title: str,
        arguments: list[str],
        depends_on: str = "",
        output: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """A step that is one console command of the installed environment; its output goes to a log.

        `output` is the folder that the command makes; what an unfinished or older call left there goes first.
        """

        def action() -> None:
            if output is not None and output.exists():
                shutil.rmtree(output)
            log = self.logs / f"{name}.log"
            executable = Path(sysconfig.get_path("scripts")) / arguments[0]
            if not executable.exists():
                sys.exit(
                    f"\nexpected the command {arguments[0]} in {executable.parent}, found none; "
                    "call this script by its make target, which installs it"
                )
            with log.open("w") as out:
                code = subprocess.call(
                    [str(executable), *arguments[1:]],
                    env=self.environment | dict(variables or {}),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=self.work,
                )
            if code != 0:
                tail = "\n".join("    " + text for text in log.read_text(errors="replace").splitlines()[-25:])
                sys.exit(
                    f"failed with exit status {code}\n\n  {shlex.join(arguments)}\n\n"
                    f"The end of its log, {log}:\n{tail}\n\n"
                    "Once the cause is mended, call the demo again: finished steps are kept."
                )

        self.step(name, title, action, json.dumps([arguments, depends_on]))
