"""The options of our commands, each described once, and how they are written in the syntax of every host.

Imports nothing heavy: help texts are made of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        name: as a user types it.
        kind: ``str``, ``int``, ``bool``, or a list of such.
        help: what it does.
        default: None for none.
        unset: what is done where the default is None.
    """

    name: str
    kind: Any
    help: str
    default: Any = None
    unset: str = ""

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return get_origin(self.kind) is list

    def text(self, separator: str) -> str:
        """Its help with its default, the values of a list parted as the syntax has it."""
        value = self.default
        shown = self.unset if value is None else separator.join(map(str, value)) if self.is_list else str(value)
        return self.help + (f" (default: {shown})" if shown and self.kind is not bool else "")


EVALUATE = (
    Option("names", list[str], "names of the models", unset="their folders"),
    Option("norm", list[float | str], "2, inf, or both: a report for each", [2]),
    Option(
        "levels",
        list[float],
        "noise levels, 0 first: of L2, or of Linf where that is the only norm",
        unset="by the size of the input",
    ),
    Option("levels_inf", list[float], "noise levels of Linf, 0 first", unset="fixed ones"),
    Option(
        "attacks",
        list[str],
        "the strongest first: pgd100, pgd20x3, apgd100, square1000, ...",
        ["pgd100", "ifgsm10"],
    ),
    Option("samples", int, "evaluate only so many samples, at even distances", unset="all"),
    Option("examples", int, "samples shown as pictures: those that fail first and last", 4),
    Option("checks", int, "samples that the attack itself is checked on, 0 for none", 32),
    Option("seed", int, "seed of random starts", 0),
    Option("out", str, "folder of the report", "report"),
    Option("overwrite", bool, "replace what another evaluation left in the folder", False),
)
"""The options of every ``evaluate``."""

THRESHOLDS = (
    Option("rule", str, "mean, mean+2std, median or median+2spread", unset="as AMAT's training takes it"),
    Option("out", str, "the file", unset="thresholds.json beside the checkpoint"),
)
"""The options of every ``thresholds``."""


def with_defaults(options: Sequence[Option], **defaults: object) -> tuple[Option, ...]:
    """The options, some of them with a host's own defaults."""
    return tuple(replace(o, default=defaults[o.name]) if o.name in defaults else o for o in options)


def add_options(parser: argparse.ArgumentParser, options: Sequence[Option], **flags: str) -> None:
    """Adds options to a parser of argparse: ``--levels 0 1 2``, ``--overwrite``.

    Args:
        parser: the parser.
        options: the options; one that has no default, nor says what is done without it, is required.
        **flags: a second spelling, by an option's name.
    """
    for option in options:
        words = [flags[option.name]] if option.name in flags else []
        required = option.default is None and not option.unset
        given: dict[str, Any] = {"default": option.default, "help": option.text(" "), "required": required}
        if option.kind is bool:
            given["action"] = "store_true"
        elif option.is_list:
            (item,) = get_args(option.kind)
            given |= {"nargs": "+", "type": item if isinstance(item, type) else str}
        else:
            given["type"] = option.kind
        parser.add_argument(*words, f"--{option.name}", **given)


def add_typed_options(parser: Any, options: Sequence[Option]) -> None:
    """Adds options to a parser of jsonargparse, which shows their defaults itself: ``--levels '[0,1,2]'``."""
    for option in options:
        unset = f"; default: {option.unset}" if option.default is None else ""
        parser.add_argument(f"--{option.name}", type=option.kind, default=option.default, help=f"{option.help}{unset}")


def key_values(options: Sequence[Option], found: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a command line ``levels=0,1,2``, as far as its host has read it; the others have their defaults.

    A host reads ``out=2024`` and ``names=1,2`` as numbers; where a text is asked for, it is the text again.
    """
    return {option.name: _typed(option, found.get(option.name, option.default)) for option in options}


def _typed(option: Option, value: Any) -> Any:
    if option.is_list:
        values = listed(value)
        return [str(item) for item in values] if values is not None and option.kind == list[str] else values
    return str(value) if option.kind is str and value is not None else value


def key_value_help(options: Sequence[Option]) -> str:
    """A line for each option, as ``levels=...``."""
    width = max(len(option.name) for option in options) + 6
    return "\n".join(f"  {option.name + '=...':<{width}}{option.text(',')}" for option in options)


def listed(value: Any) -> list[Any] | None:
    """Values separated by commas, however a host's parser has read them."""
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, tuple):
        return list(value)
    return [part.strip() for part in str(value).strip("[]()").split(",") if part.strip()]
