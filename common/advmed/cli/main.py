"""The command ``advmed``: what concerns every host, one subcommand for each module of ``COMMANDS``.

A module of a subcommand has ``add_arguments(parser)`` and ``run(args) -> int``, the exit status; it raises what is in
``MISTAKES`` for a mistake of the user. To add a subcommand, write the module and add its line to ``COMMANDS``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "compare": ("advmed.cli.compare", "put the reports of several runs into one table and figure"),
    "search": ("advmed.cli.search", "choose delta, or any other setting, by AUC_robust on validation data"),
}
"""Subcommand: its module, and one line of help."""

MISTAKES = (OSError, ValueError, RuntimeError, TypeError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; prints one clear message for a mistake of the user, and returns the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser(argv).parse_args(argv)
    try:
        status = int(import_module(COMMANDS[args.command][0]).run(args) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads, head for example, has seen enough; the flush at the exit must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MISTAKES as error:
        if args.debug:
            raise
        print(f"advmed {args.command}: {error}", file=sys.stderr)
        return 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("advmed", description="Tools of Advmed for trainings and reports of every host.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
        if name in argv:  # the others are not imported, so that a mistyped command is answered at once
            import_module(module).add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
