"""``advmed zoo``: the trained networks of a clone, and how the stock host predicts with each."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from advmed.zoo import CARD, Network, networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``zoo``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a network, such as hippocampus/AMAT: all about it")
    parser.add_argument("--folder", type=Path, default=None, help="of the networks (default: zoo of the clone)")


def run(args: argparse.Namespace) -> int:
    """Prints the list, or what is known of one network.

    Raises:
        FileNotFoundError: if there are no networks.
        ValueError: for a name that is not known, and for files that are damaged.
    """
    found = networks(args.folder)
    if args.name is None:
        print(table(found))
        print("\nadvmed zoo NAME: all about it, and how to predict with it without Advmed")
        return 0
    name = args.name.strip("/").removeprefix("zoo/")
    known = {network.name.lower(): network for network in found}
    if name.lower() not in known:
        raise ValueError(f"there is no network {args.name}; there are {', '.join(one.name for one in found)}")
    network = known[name.lower()]
    print(describe(network))
    if broken := network.damaged():
        raise ValueError(
            f"{', '.join(str(network.folder / name) for name in broken)} is not the file that the card was written "
            f"for: get it anew, by git checkout -- {network.folder}"
        )
    return 0


def table(found: list[Network]) -> str:
    """A line for each network."""
    rows = [["network", "host", "clean", "under attack, at", "AUC_robust", "MB", "licence of the data"]]
    for one in found:
        values = [f"{value:.3f}" for value in one.values]
        levels = "/".join(f"{level:g}" for level in one.levels[1:])
        attacked = f"{' / '.join(values[1:])}  ({levels})"
        cells = [one.name, one.host, f"{one.metric} {values[0]}", attacked, f"{one.auc_robust:.3f}"]
        rows.append([*cells, f"{one.size / 1e6:.1f}", one.licence])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def describe(network: Network) -> str:
    """The card, for a terminal."""
    values = ", ".join(
        f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "") + f" at {level:g}"
        for level, value, interval in zip(network.levels, network.values, network.intervals, strict=True)
    )
    lines = {
        "what it finds": network.task,
        "trained by": f"{network.method}; seed {network.seed}; {network.hours}",
        "data": f"{network.data}; {network.split}; licence {network.licence}",
        f"{network.metric}": f"{values}; {network.norm}, {network.attack}, {network.samples}",
        "AUC_robust": f"{network.auc_robust:.3f}",
        "checks": network.checks,
        "embedded data": f"{network.embedded.metric} {network.embedded.value:.4f} by the stock host, "
        f"{network.embedded.of}",
        "made with": ", ".join(f"{name} {version}" for name, version in network.versions.items()),
    }
    indent = 2 + max(map(len, lines))
    text = [
        textwrap.fill(value, 110, initial_indent=name.ljust(indent), subsequent_indent=" " * indent)
        for name, value in lines.items()
    ]
    commands = "\n".join(f"  {command}" for command in network.predict)
    return (
        f"{network.name} ({network.host})\n\n" + "\n".join(text) + "\n\nTo predict with it (no Advmed needed), in the "
        f"clone's folder:\n{commands}\n\nIts card, with what it is not for: {network.folder / CARD}"
    )
