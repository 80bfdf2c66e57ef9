"""Completion of a command in the shell, by shtab, which reads an argparse parser.

``adv-yolo`` has none: shells do not complete its ``name=value``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

OPTION = "--print-completion"


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Adds ``--print-completion SHELL``, which prints what the shell is to read."""
    parser.add_argument(
        OPTION, metavar="SHELL", action=_Print, help="print the completion of a shell, such as bash or zsh"
    )


def asks_for_completion(argv: Sequence[str]) -> bool:
    """Whether the words of a command line ask for it."""
    return any(word.partition("=")[0] == OPTION for word in argv)


class _Print(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        try:
            import shtab
        except ModuleNotFoundError as error:
            raise ImportError(f"{OPTION} needs shtab, which is not installed: pip install shtab") from error
        if values not in shtab.SUPPORTED_SHELLS:
            raise argparse.ArgumentError(self, f"there are {', '.join(shtab.SUPPORTED_SHELLS)}, got {values}")
        print(shtab.complete(parser, shell=str(values)))
        parser.exit(0)
