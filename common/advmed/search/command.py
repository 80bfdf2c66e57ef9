"""The commands of a trial, and how they are stopped."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from advmed.search.claim import SECONDS_TO_END, Claim, Lost, signal_group
from advmed.search.plan import program

TAIL = 12
"""Lines of a log that are shown when its command fails."""
SECONDS_AT_ONCE = 5.0
"""What is left of a search that was told a second time to stop."""


class Interrupted(Exception):
    """The user stopped the search."""


class Stop:
    """Ctrl-C and SIGTERM, as a number that a loop looks at.

    A handler that raised could strike in the middle of a write to the storage. Where nothing looks, as in a storage
    that waits for a lock, a second signal ends the process some seconds later.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._last: threading.Timer | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.asked += 1
        if self.asked == 2:
            self._last = threading.Timer(SECONDS_AT_ONCE, os._exit, [128 + number])
            self._last.daemon = True
            self._last.start()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals that mean stop, and gives them back."""
        wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]  # nohup has SIGHUP ignored, and so it stays
        before = {n: signal.signal(n, self) for n in wanted if signal.getsignal(n) is not signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._last is not None:
                self._last.cancel()

    def sleep(self, seconds: float) -> None:
        """Sleeps.

        Raises:
            Interrupted: if the user stops the search.
        """
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(min(0.1, seconds))
        if self.asked:
            raise Interrupted


def run_command(
    words: Sequence[str], log: Path, environment: Mapping[str, str], claim: Claim, stop: Stop, what: str
) -> None:
    """Runs a command to its end, its output in a file.

    Raises:
        RuntimeError: if it fails, with the last lines of its output.
        Interrupted: if the user stops the search; the command is ended.
        Lost: if the claim is lost; the command is ended.
    """
    with log.open("ab") as out:
        out.write(f"$ {shlex.join(words)}\n".encode())
        out.flush()
        # A session of its own: Ctrl-C at the terminal reaches us alone, and we end the command with all its workers.
        # It inherits the lock, which so tells of a command that outlives us.
        process = subprocess.Popen(
            [program(words[0]) or words[0], *words[1:]],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
            pass_fds=claim.inherited,
        )
    try:
        claim.note(process.pid)
        while process.poll() is None:
            if stop.asked:
                raise Interrupted
            if claim.lost:
                raise Lost(claim.lost)
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            _end(process, stop)
    if process.returncode:
        ended = f"with status {process.returncode}" if process.returncode > 0 else f"by signal {-process.returncode}"
        raise RuntimeError(f"{what} ended {ended}, see {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    """The last lines of a log, which may be long."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-TAIL:])


def _end(process: subprocess.Popen[bytes], stop: Stop) -> None:
    """Ends a command and its workers; a second Ctrl-C does it at once."""
    signal_group(process.pid, signal.SIGTERM)
    end, asked = time.monotonic() + SECONDS_TO_END, stop.asked
    while process.poll() is None and time.monotonic() < end and stop.asked == asked:
        time.sleep(0.05)
    signal_group(process.pid, signal.SIGKILL)
    process.wait()
