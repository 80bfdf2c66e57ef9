"""Whose a trial is: the owner's lock and signs of life, and whether an owner is alive."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

LOCK_FILE = "trial.lock"
"""In the folder of a trial: locked while a process, or a command that it started, works there."""
SECONDS_TO_END = 30.0
"""What a command is given to end after SIGTERM, before it is killed."""


def place() -> str:
    """Where a process id means something: machine and process namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {uuid.getnode():x} {namespace}"


def lock(path: Path, wait: float = 0.0) -> IO[str] | None:
    """Locks a file until it is closed, also by a death that nothing can catch; None if somebody else has it.

    Raises:
        OSError: where the file system knows no locks.
    """
    end = time.monotonic() + wait
    file = path.open("a+")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= end:
                file.close()
                return None
            time.sleep(0.05)
        except OSError:
            file.close()
            raise


class Lost(Exception):
    """The trial is no longer this process's."""


class Busy(RuntimeError):
    """Another process works in the folder of the trial."""


class Claim:
    """A trial is being run by this process: its folder is locked, and signs of life go to the storage.

    The lock is for processes of this machine, which see at once that a process has died. The signs of life are for
    others, which see it when there has been none for ``patience`` seconds; an owner who could not give one for so long
    stops by himself (``lost``), so that no two run the trial.

    Args:
        folder: of the trial, made if it is not there.
        tell: writes a sign of life into the storage.
        patience: see :class:`Plan`.

    Raises:
        Busy: if another process works in the folder.
    """

    def __init__(self, folder: Path, tell: Callable[[Mapping[str, Any]], None], patience: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lost = ""
        self._file: IO[str] | None = None
        try:
            self._file = lock(folder / LOCK_FILE, wait=5)
            if self._file is None:
                raise Busy(f"another process works in {folder}: wait for it, or end it, and use --retry-failed")
        except OSError:  # the signs of life must do
            self._file = None
        self._patience, self._tell, self._over = patience, tell, threading.Event()
        self._life = {"place": place(), "pid": os.getpid(), "folder": str(folder.resolve())}
        self._life |= {"locked": self._file is not None}
        self.note(None)
        self._tell({**self._life, "beat": 0})
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @property
    def inherited(self) -> tuple[int, ...]:
        """The file descriptor that a command keeps open."""
        return () if self._file is None else (self._file.fileno(),)

    def note(self, command: int | None) -> None:
        """Writes into the lock file whose it is, for whoever finds the command without its owner."""
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps({"place": place(), "pid": os.getpid(), "command": command}))
            self._file.flush()

    def close(self) -> None:
        """Ends the signs of life and unlocks the folder."""
        self._over.set()
        self._thread.join()
        if self._file is not None:
            self._file.close()

    def _beat(self) -> None:
        last, beat = time.monotonic(), 0
        while not self._over.wait(self._patience / 10):
            beat += 1
            try:
                self._tell({**self._life, "beat": beat})
                last = time.monotonic()
            except Exception as error:  # whatever a storage raises
                if type(error).__name__ == "UpdateFinishedTrialError":
                    self.lost = "another process has taken it over, as this one gave no sign of life"
                    return
                if time.monotonic() - last > 0.7 * self._patience:
                    self.lost = f"the storage could not be reached for {time.monotonic() - last:.0f} s ({error})"
                    return


class Watch:
    """Whether the owners of running trials are alive."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._seen: dict[int, tuple[Any, float]] = {}  # by trial: its last sign of life, and when it was first seen
        self._moved: set[int] = set()

    def verdict(self, number: int, life: Mapping[str, Any] | None) -> str:
        """``alive``, ``dead``, or ``unknown`` for a machine that has to be watched for longer.

        Clocks of machines differ, so only ours is asked: how long the same sign of life has been the last one.
        """
        life = life or {}
        file = Path(life.get("folder", "")) / LOCK_FILE
        if life.get("place") == place() and life.get("locked") and file.exists():
            return "alive" if _held(file) and not _end_orphan(file) else "dead"
        now = time.monotonic()
        beat, since = self._seen.setdefault(number, (life.get("beat"), now))
        if beat != life.get("beat"):
            self._seen[number] = (life.get("beat"), now)
            self._moved.add(number)
            return "alive"
        if now - since > self._patience:
            # A network folder may show the lock of another machine, whose command outlives its owner.
            return "alive" if file.exists() and _held(file) else "dead"
        return "alive" if number in self._moved else "unknown"


def _held(file: Path) -> bool:
    """Whether a process has the lock."""
    try:
        mine = lock(file)
    except OSError:
        return False
    if mine is not None:
        mine.close()
    return mine is None


def _end_orphan(file: Path) -> bool:
    """Ends the command of a search that was killed by SIGKILL; True if that has freed the folder.

    The command is in the lock file, and it is the one that holds the lock: its owner has died.
    """
    try:
        note = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    if note["place"] != place() or note["command"] is None or _alive(note["pid"]):
        return False
    for number, seconds in ((signal.SIGTERM, SECONDS_TO_END), (signal.SIGKILL, 5.0)):
        signal_group(note["command"], number)
        end = time.monotonic() + seconds
        while _held(file) and time.monotonic() < end:
            time.sleep(0.05)
    return not _held(file)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def signal_group(group: int, number: int) -> None:
    """Sends a signal to a command and its workers, if they are still there."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return
