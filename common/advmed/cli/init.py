"""``init`` of every host's command: writes the host's commented configurations into a folder of the user's.

A host gives nothing but its files, ``configurations/*.yaml`` in its package. The first line of each is a comment with
the command that takes it, the next ones say what it is for.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from advmed.cli import runner
from advmed.documentation import page as page_of
from advmed.files import write_whole

LINE = "write commented configurations into a folder, to be edited"
"""What it does, for the help of a host's command."""
FOLDER = "configurations"
EMBEDDED = re.compile(r"\bexamples/data/[\w./-]*\w")
"""Data of the repository, which no wheel has; paths begin where a command is called."""


@dataclass(frozen=True)
class Configuration:
    """A file that a host brings.

    Attributes:
        name: of the file.
        text: its content.
    """

    name: str
    text: str

    @property
    def is_study(self) -> bool:
        """Whether it is for ``advmed search``."""
        return self.text.startswith("# advmed search ")

    def command(self, path: Path) -> str:
        """What takes it, as its first line says, where it lies at ``path``."""
        return self.text.splitlines()[0].removeprefix("# ").replace(self.name, shlex.quote(str(path)), 1)


def configurations(package: str) -> list[Configuration]:
    """The files that a host brings, by name."""
    found = [path for path in files(package).joinpath(FOLDER).iterdir() if path.name.endswith(".yaml")]
    return [Configuration(path.name, path.read_text("utf-8")) for path in sorted(found, key=lambda path: path.name)]


def write_configurations(package: str, folder: Path, *, overwrite: bool = False) -> dict[Path, Configuration]:
    """Writes a host's configurations; all of them, or none where one is in the way.

    Args:
        package: of the host, such as ``adv_classify``.
        folder: made if it is missing.
        overwrite: replace files of the same name.

    Returns:
        What each file is.

    Raises:
        FileExistsError: if a file of that name holds something else, and ``overwrite`` is not set.
        OSError: if the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from advmed.cli.init import write_configurations
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in write_configurations("adv_nnunet", Path(folder, "mine"))]
        ['adversarial.yaml', 'search_nnunet.yaml']
    """
    written = {folder / configuration.name: configuration for configuration in configurations(package)}
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    others = [str(path) for path, known in written.items() if path.exists() and not _holds(path, known.text)]
    if others and not overwrite:
        raise FileExistsError(
            f"{', '.join(others)} would be overwritten, and nothing has been written: name another folder, or add "
            f"--overwrite to lose what is there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path, configuration in written.items():
        write_whole(path, configuration.text)
    return written


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``init``."""
    parser.add_argument("folder", nargs="?", default=".", type=Path, metavar="FOLDER", help="default: the current one")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same name")


def write(package: str, folder: Path, overwrite: bool, *, page: str) -> None:
    """Writes a host's configurations and says what to run next.

    Args:
        package: see :func:`write_configurations`, as the next two.
        folder: made if it is missing.
        overwrite: replace files of the same name.
        page: name of the page of the documentation where the settings are explained.

    Raises:
        OSError: see :func:`write_configurations`.
    """
    written = write_configurations(package, folder, overwrite=overwrite)
    print(f"Written: {', '.join(map(str, written))}\nEdit what fits your data, then run what its first line says:")
    for path, configuration in written.items():
        print(f"  {configuration.command(path)}")
    _tell_missing_data(written)
    print(f"What the settings mean: {page_of(page)}")
    if any(configuration.is_study for configuration in written.values()):
        print(f"What a study holds: {page_of('search.md')}")


def _tell_missing_data(written: Mapping[Path, Configuration]) -> None:
    """Says which data the files name that are not here, and what to do."""
    named: dict[str, list[str]] = {}
    for configuration in written.values():
        lines = [line for line in configuration.text.splitlines() if not line.startswith("#")]
        for place in dict.fromkeys(EMBEDDED.findall("\n".join(lines))):
            if not Path(place).exists():
                named.setdefault(place, []).append(configuration.name)
    if named:
        print(
            "These data are in a clone of Advmed's repository, and not in this folder. Call the commands in the clone's"
        )
        print("folder, or write the place of your own data into the files:")
        for place, names in named.items():
            print(f"  {place} (in {', '.join(names)})")


def main(command: str, package: str, argv: Sequence[str], *, page: str) -> None:
    """``COMMAND init`` of a host whose command is not argparse's.

    Args:
        command: of the host, such as ``adv-yolo``.
        package: see :func:`write_configurations`.
        argv: the words after ``init``.
        page: see :func:`write`.

    Raises:
        OSError: see :func:`write_configurations`.
    """
    parser = argparse.ArgumentParser(f"{command} init", description=f"{LINE.capitalize()}.", epilog=runner.DEBUG)
    add_arguments(parser)
    args = parser.parse_args(argv)
    write(package, args.folder, args.overwrite, page=page)
