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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml


@dataclass(frozen=True, eq=False)
class Command:
    """A console command of the installed environment; its output goes to a log.

    Args:
        name: of its log and stamp.
        arguments: its words.
        depends_on: what decides about its result beside them.
        output: the folder that it makes; what an unfinished or older call left there goes first.
        variables: of its environment.
    """

    name: str
    arguments: Sequence[str]
    depends_on: str = ""
    output: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def stamp(self) -> str:
        """What its stamp says."""
        return json.dumps([list(self.arguments), self.depends_on])


def executable(name: str) -> Path:
    """A console command of the installed environment."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        sys.exit(
            f"\nexpected the command {name} in {path.parent}, found none; "
            "call this script by its make target, which installs it"
        )
    return path


class Steps:
    """Runs steps once: one that is finished is skipped when it is called again, unless what it depends on changed.

    Args:
        work: the working folder.
        environment: variables for the commands, on top of those of this process.
        expected: seconds of every step in their order, on some quiet machine with two cores: how this one compares to
            it decides what is said of the time left.
    """

    def __init__(self, work: Path, environment: Mapping[str, str], expected: Sequence[float] = ()) -> None:
        self.work = work
        self.expected, self._at, self._spent, self._planned = tuple(expected), 0, 0.0, 0.0
        self.logs, self.stamps = work / "logs", work / "done"
        for folder in (self.logs, self.stamps):
            folder.mkdir(parents=True, exist_ok=True)
        # Beside data workers, threads that spin while they wait for each other were measured to be many times slower
        # than threads that sleep.
        waiting = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        self.environment = os.environ | waiting | dict(environment)

    def step(self, name: str, title: str, action: Callable[[], None], depends_on: str) -> None:
        """Run `action` unless a stamp says that it succeeded before with the same `depends_on`."""
        self._begin(title)
        if self._done(name, depends_on):
            self._end(None)
            return
        start = time.monotonic()
        action()
        (self.stamps / name).write_text(depends_on)
        self._end(time.monotonic() - start)

    def commands(self, title: str, commands: Sequence[Command]) -> None:
        """A step of console commands that do not wait for each other: each gets its share of the threads.

        What is done is kept when another one fails, which ends those that still run.
        """
        self._begin(title)
        waiting = [command for command in commands if not self._done(command.name, command.stamp)]
        if not waiting:
            self._end(None)
            return
        threads = int(self.environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        share = {} if len(waiting) == 1 else {"OMP_NUM_THREADS": str(max(1, threads // len(waiting)))}
        start = time.monotonic()
        running: dict[Command, subprocess.Popen[bytes]] = {}
        try:
            for command in waiting:
                running[command] = self._start(command, share)
            while running:
                time.sleep(0.2)
                if sys.stdout.isatty():
                    self._show(title, time.monotonic() - start)
                for command, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[command]
                    if process.returncode != 0:
                        self._give_up(command, process.returncode)
                    (self.stamps / command.name).write_text(command.stamp)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
        self._end(time.monotonic() - start)

    # The time left

    def left(self, spent: float = 0.0) -> float | None:
        """Seconds to the end of all steps, if this one has taken so many; None where it is not known."""
        ahead = self.expected[self._at - 1 :]
        if not ahead:
            return None
        pace = self._spent / self._planned if self._planned >= _ENOUGH else 1.0
        return max(ahead[0] * pace - spent, 0.0) + sum(ahead[1:]) * pace

    def _begin(self, title: str) -> None:
        self._at += 1
        self._show(title, 0.0)

    def _show(self, title: str, spent: float) -> None:
        left = self.left(spent)
        words = "" if left is None else f" (about {max(1, round(left / 60))} min left)"
        print(f"\r\033[K{title}{words} ... " if spent else f"{title}{words} ... ", end="", flush=True)

    def _end(self, seconds: float | None) -> None:
        """A step took so long; None: it was done before."""
        if seconds is not None and self._at <= len(self.expected):
            self._spent += seconds
            self._planned += self.expected[self._at - 1]
        print("done before" if seconds is None else f"{seconds:.0f} s")

    def _done(self, name: str, depends_on: str) -> bool:
        """Whether the step is done; a stamp of another one goes."""
        stamp = self.stamps / name
        if stamp.exists() and stamp.read_text() == depends_on:
            return True
        stamp.unlink(missing_ok=True)
        return False

    def _log(self, command: Command) -> Path:
        return self.logs / f"{command.name}.log"

    def _start(self, command: Command, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        if command.output is not None and command.output.exists():
            shutil.rmtree(command.output)
        words = [str(executable(command.arguments[0])), *command.arguments[1:]]
        with self._log(command).open("w") as out:
            return subprocess.Popen(
                words,
                env=self.environment | dict(variables) | dict(command.variables),
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.work,
            )

    def _give_up(self, command: Command, code: int) -> NoReturn:
        log = self._log(command)
        tail = "\n".join("    " + text for text in log.read_text(errors="replace").splitlines()[-25:])
        sys.exit(
            f"failed with exit status {code}\n\n  {shlex.join(command.arguments)}\n\n"
            f"The end of its log, {log}:\n{tail}\n\n"
            "Once the cause is mended, call the demo again: finished steps are kept."
        )


_ENOUGH = 20.0
"""Expected seconds of finished steps from which on this machine's pace is believed."""


class LightningDemo(Steps):
    """Trains by several methods with a tool on Lightning, attacks all networks, and writes the report.

    Args:
        work: the working folder.
        tool: adv-classify or adv-landmark.
        data: what is read, for the reader.
        content: the configuration that all trainings have in common.
        methods: their names, with options of their own (model.method.eps, trainer.max_epochs, ...), the standard one
            first; {STD} in a value of another is its checkpoint.
        evaluate: words for the tool's evaluate.
        seed: of weights, batches and augmentation.
        expected: see :class:`Steps`.
    """

    def __init__(
        self,
        work: Path,
        tool: str,
        data: str,
        content: Mapping[str, Any],
        methods: Mapping[str, Mapping[str, Any]],
        evaluate: list[str],
        seed: int = 0,
        expected: Sequence[float] = (),
    ) -> None:
        super().__init__(work, {}, expected)
        self.seed = seed
        self.tool, self.data, self.content, self.methods, self.words = tool, data, content, methods, evaluate

    def checkpoint(self, name: str) -> Path:
        """The checkpoint that a training ends with."""
        return self.work / name / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"

    def run(self) -> Path:
        """All steps in their order; the folder of the reports."""
        decides = json.dumps([self.content, self.methods, self.seed])
        configuration, report = self.work / "demo.yaml", self.work / "report"
        text = yaml.safe_dump(dict(self.content), sort_keys=False)

        def configure() -> None:
            configuration.write_text(text)

        self.step("data", f"1/4 {self.data}", configure, decides)
        standard, *others = [self._training(name, configuration, decides) for name in self.methods]
        self.commands(f"2/4 train {standard.name}", [standard])
        self.commands(f"3/4 train {' and '.join(other.name for other in others)}, side by side", others)
        evaluate = [self.tool, "evaluate", *(str(self.checkpoint(name)) for name in self.methods)]
        evaluate += ["--names", f"[{','.join(self.methods)}]", *self.words, "--out", str(report)]
        self.commands("4/4 attack all of them", [Command("evaluate", evaluate, decides, report)])
        return report

    def _training(self, name: str, configuration: Path, decides: str) -> Command:
        words = [self.tool, "fit", "--config", str(configuration), "--model.method.name", name]
        words += ["--seed_everything", str(self.seed)]
        for key, value in self.methods[name].items():
            words += [f"--{key}", str(value).replace("{STD}", str(self.checkpoint("STD")))]
        words += ["--trainer.default_root_dir", str(self.work / name)]
        return Command(name, words, decides, self.work / name)

    @classmethod
    def main(cls, description: str | None, folder: str, *demo: Any, expected: Sequence[float] = ()) -> None:
        """Reads the command line, runs the demo, and says what it found and where the reports are."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--work", type=Path, default=Path(folder), help=f"default: {folder}")
        parser.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation (default: 0)")
        start, options = time.monotonic(), parser.parse_args()
        running = cls(options.work.resolve(), *demo, seed=options.seed, expected=expected)
        report = running.run()
        lines = (running.logs / "evaluate.log").read_text(errors="replace").splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("---")) - 2
        print("\n" + "\n".join(lines[first:]) + f"\n\n{time.monotonic() - start:.0f} s in all.")
        assert (report / "L2" / "report.html").exists()
