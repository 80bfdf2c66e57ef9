"""What runs every command: the one list of a user's mistakes, ``--debug``, the exit status. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from advmed.files import clickable
from advmed.lazy import missing

DEBUG = "--debug shows the whole traceback of an error."
"""For the end of a help text."""

_MISTAKES = (OSError, ValueError, TypeError, RuntimeError, ImportError, ArgumentError)


def run(
    name: str,
    body: Callable[[list[str]], int | None],
    arguments: Sequence[str] | None = None,
    *,
    extra: str | None = None,
    subcommands: Collection[str] = (),
) -> int:
    """Runs a command; prints one clear message for a mistake of the user.

    Args:
        name: of the command, as a user types it.
        body: does the work. It is given the words of the command line without ``--debug``, and returns the exit status,
            None for 0.
        arguments: the words; None: those that the process was started with.
        extra: the extra of advmed that installs what the command needs beside the core.
        subcommands: first words that a message names after the command.

    Returns:
        The exit status.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if arguments is None:
        sys.argv[1:] = argv  # where a host reads them itself
    try:
        status = body(argv) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads, head for example, has seen enough; the flush at the exit must not fail either
        if debug:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug or not is_mistake(error):
            raise
        text = missing(name, error, extra) if isinstance(error, ModuleNotFoundError) else None
        if text is None:
            text = f"{' '.join([name, *(word for word in argv[:1] if word in subcommands)])}: {message(error)}"
        print(text, file=sys.stderr)
        return 1


def report_line(page: Path, *others: Path) -> str:
    """The last line of a command that wrote a report: where it is, so that a terminal opens it by a click.

    Args:
        page: what a user reads.
        others: files in the same folder.
    """
    beside = f" (beside it {', '.join(path.name for path in others)})" if others else ""
    return f"Report: {clickable(page)}{beside}"


def is_mistake(error: Exception) -> bool:
    """Whether an error is a user's mistake, as we or a host raise it; any other is a bug, to be seen whole."""
    if isinstance(error, AssertionError):  # timm and Ultralytics explain theirs
        return bool(str(error))
    if isinstance(error, SyntaxError):  # of Ultralytics, about the command line; Python's own names a file
        return error.filename is None
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    return isinstance(error, _MISTAKES if lightning is None else (*_MISTAKES, lightning.MisconfigurationException))


def message(error: BaseException) -> str:
    """The mistake itself, where jsonargparse reports it as one of several types that the value is not."""
    where = ""
    while "Does not validate against any of the Union" in str(error) and error.__cause__ is not None:
        first = str(error).split("\n")[0]
        where = f"{first} " if first.startswith("Parser key") else where
        error = error.__cause__
    text = where + str(error)
    if "in DataLoader worker process" in text:  # PyTorch wraps what a worker raises into its traceback
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return text
