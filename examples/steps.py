"""What the demos share: steps with a title, a log and a stamp in one working folder; and one demo of two tools."""

from __future__ import annotations

import argparse
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
from typing import Any

import yaml


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


class LightningDemo(Steps):
    """Trains by several methods with a tool on Lightning, attacks all networks, and writes the report.

    Args:
        work: the working folder.
        tool: adv-classify or adv-landmark.
        data: what is read, for the reader.
        content: the configuration that all trainings have in common.
        methods: their names, with arguments of their own; {STD} in a value is the checkpoint of that training.
        evaluate: words for the tool's evaluate.
    """

    def __init__(
        self,
        work: Path,
        tool: str,
        data: str,
        content: Mapping[str, Any],
        methods: Mapping[str, Mapping[str, Any]],
        evaluate: list[str],
    ) -> None:
        super().__init__(work, {})
        self.tool, self.data, self.content, self.methods, self.words = tool, data, content, methods, evaluate

    def checkpoint(self, name: str) -> Path:
        """The checkpoint that a training ends with."""
        return self.work / name / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"

    def run(self) -> Path:
        """All steps in their order; the folder of the reports."""
        decides, count = json.dumps([self.content, self.methods]), len(self.methods) + 2
        configuration, report = self.work / "demo.yaml", self.work / "report"
        text = yaml.safe_dump(dict(self.content), sort_keys=False)

        def configure() -> None:
            configuration.write_text(text)

        self.step("data", f"1/{count} {self.data}", configure, decides)
        for number, (name, arguments) in enumerate(self.methods.items(), start=2):
            command = [self.tool, "fit", "--config", str(configuration), "--model.method.name", name]
            for key, value in arguments.items():
                command += [f"--model.method.{key}", str(value).replace("{STD}", str(self.checkpoint("STD")))]
            command += ["--trainer.default_root_dir", str(self.work / name)]
            self.command(name, f"{number}/{count} train {name}", command, decides, self.work / name)
        evaluate = [self.tool, "evaluate", *(str(self.checkpoint(name)) for name in self.methods)]
        evaluate += ["--names", f"[{','.join(self.methods)}]", *self.words, "--out", str(report)]
        self.command("evaluate", f"{count}/{count} attack all of them", evaluate, decides, report)
        return report

    @classmethod
    def main(cls, description: str | None, folder: str, *demo: Any) -> None:
        """Reads the command line, runs the demo, and says what it found and where the reports are."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--work", type=Path, default=Path(folder), help=f"default: {folder}")
        start = time.monotonic()
        running = cls(parser.parse_args().work.resolve(), *demo)
        report = running.run()
        lines = (running.logs / "evaluate.log").read_text(errors="replace").splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("---")) - 2
        print("\n" + "\n".join(lines[first:]) + f"\n\n{time.monotonic() - start:.0f} s in all.")
        assert (report / "L2" / "report.html").exists()
