"""The versions that were tested, and what is said of a package that is newer. The list is ``tested.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version


@dataclass(frozen=True)
class Tested:
    """What is known of the versions of a package.

    Attributes:
        package: its name.
        oldest: version that the tests have passed with.
        newest: such version.
    """

    package: str
    oldest: str
    newest: str

    def is_exceeded_by(self, installed: str) -> bool:
        """Whether a version is newer than all that were tested; another build of one (``+cpu``) is not."""
        try:
            return Version(Version(installed).public) > Version(self.newest)
        except InvalidVersion:  # of a build from source
            return False

    def is_above(self, installed: str) -> bool:
        """Whether a version is older than all that were tested."""
        try:
            return Version(Version(installed).public) < Version(self.oldest)
        except InvalidVersion:
            return False


@cache
def ranges() -> dict[str, Tested]:
    """The packages that were tested, by their normalised names.

    Example:
        >>> from advmed.versions import ranges
        >>> ranges()["torch"].is_exceeded_by("99.0"), ranges()["torch"].is_exceeded_by("2.4.0+cpu")
        (True, False)
    """
    text = files("advmed").joinpath("tested.toml").read_text("utf-8")
    return {
        canonicalize_name(name): Tested(name, oldest, newest) for name, (oldest, newest) in tomllib.loads(text).items()
    }


def installed(package: str) -> str | None:
    """The version that is installed; None for none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def newer_than_tested(packages: Iterable[str]) -> list[str]:
    """A sentence for each package that is installed in a version newer than those that were tested."""
    found = []
    for package in packages:
        known, here = ranges().get(canonicalize_name(package)), installed(package)
        if known is not None and here is not None and known.is_exceeded_by(here):
            found.append(
                f"{package} {here} is newer than {known.newest}, the newest release that this Advmed was tested with. "
                f"If something breaks, install {package}=={known.newest}, or look for a newer Advmed"
            )
    return found


_told: set[str] = set()


def tell_if_newer(packages: Iterable[str], say: Callable[[str], object]) -> None:
    """Says, once in a process, which packages are newer than what was tested.

    Args:
        packages: the host and what its networks come from.
        say: the host's logger.
    """
    for line in newer_than_tested(packages):
        if line not in _told:
            _told.add(line)
            say(line)
