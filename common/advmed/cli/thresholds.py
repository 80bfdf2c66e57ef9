"""``thresholds`` of every host: its options checked, and what was measured said and written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from advmed.thresholds import Thresholds, parse_rule


@dataclass(frozen=True)
class ThresholdsOptions:
    """The options of ``thresholds`` (:data:`advmed.cli.options.THRESHOLDS`), checked.

    Attributes:
        rule: how thresholds are made of the losses (:func:`advmed.thresholds.parse_rule`); None: the host's way.
        out: the file; None: beside the checkpoint.

    Raises:
        ValueError: for a rule that is none.
    """

    rule: str | None
    out: Path | None

    def __post_init__(self) -> None:
        if self.rule is not None:
            parse_rule(self.rule)
        object.__setattr__(self, "out", None if self.out is None else Path(self.out))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """From the values of a command line."""
        return cls(given["rule"], given["out"])

    def destination(self, default: Path) -> Path:
        """The file that will be written, looked at before anything is measured.

        Args:
            default: the file beside the checkpoint.

        Raises:
            OSError: if it cannot be written.
        """
        path = self.out or default
        if path.is_dir():
            raise IsADirectoryError(f"thresholds are written to a file, and {path} is a folder; name a file (out)")
        folder = path.absolute().parent
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise type(error)(
                f"{path.name} cannot be written to {folder} ({error.strerror}); name another place (out)"
            ) from error
        return path


@dataclass(frozen=True)
class Quality:
    """How good the measured network is: thresholds of a poor one are of no use.

    Attributes:
        name: of the number, such as "Mean Dice".
        value: the number.
        least: a network below it is poorly trained.
    """

    name: str
    value: float
    least: float


def write_thresholds(
    measured: Thresholds,
    path: Path,
    *,
    of: str,
    quality: Quality | None = None,
    hint: str = "",
    say: Callable[[str], object] = print,
) -> None:
    """Writes thresholds that were measured, and says what they are.

    Args:
        measured: the thresholds, and what they can be made of.
        path: the file.
        of: what was measured, after the number of samples: "clean images of the split train".
        quality: how good the network is, where the host knows it.
        hint: how to train with them.
        say: prints or logs a line.
    """
    measured.save(path)
    say(f"{measured.n} {of}: {measured}")
    parts = [(part, found) for part in ("mean", "std", "median", "spread") if (found := getattr(measured, part))]
    for k, (name, value) in enumerate(zip(measured.names, measured.values, strict=True)):
        made_of = ", ".join(f"{part} {found[k]:.4f}" for part, found in parts)
        say(f"  {name}: threshold {value:.4f} ({measured.rule}; {made_of})")
    if quality is not None:
        say(f"{quality.name} of that network on these samples: {quality.value:.3f}.")
        if quality.value < quality.least:
            say("WARNING: this network is poorly trained; thresholds from it are too lenient or too strict by luck.")
    say(f"Written to {path}" + (f". {hint}" if hint else ""))
