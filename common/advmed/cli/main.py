"""The command ``advmed``: what concerns every host, one subcommand for each module of ``COMMANDS``.

A module of a subcommand has ``add_arguments(parser)`` and ``run(args) -> int``, the exit status. To add a subcommand,
write the module, import what is heavy in its functions, and add its line to ``COMMANDS``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from advmed.cli import runner
from advmed.cli.completion import add_completion, asks_for_completion
from advmed.documentation import page

COMMANDS = {
    "compare": ("advmed.cli.compare", "put the reports of several runs into one table and figure"),
    "doctor": ("advmed.cli.doctor", "print versions, devices, folders and known problems, to paste into a bug report"),
    "search": ("advmed.cli.search", "choose delta, or any other setting, by AUC_robust on validation data"),
    "zoo": ("advmed.cli.zoo", "list the trained networks of a clone, and how the stock hosts predict with them"),
}
"""Subcommand: its module, and one line of help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, see :func:`advmed.cli.runner.run`."""
    return runner.run("advmed", _dispatch, arguments, subcommands=COMMANDS)


def _dispatch(argv: list[str]) -> int:
    args = _parser(argv).parse_args(argv)
    return int(import_module(COMMANDS[args.command][0]).run(args))


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "advmed",
        description="Tools of Advmed for trainings and reports of every host.",
        epilog=f"The documentation begins in: {page('index.md')}\n{runner.DEBUG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # another would break the path
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_completion(parser)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.", epilog=runner.DEBUG)
        # The others are not imported, so that a mistyped command is answered at once.
        if name in argv or asks_for_completion(argv):
            import_module(module).add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
