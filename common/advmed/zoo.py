"""The trained networks of ``zoo/`` in a clone of the repository: what the card of each says.

A network is a folder ``zoo/TASK/METHOD`` with the files of its host and a ``CARD.md``, whose head, between two lines
``---``, is YAML (the form that model hubs use). Cards are written by ``benchmarks/zoo.py`` from the reports of the
evaluations; nothing here imports a framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from advmed.files import sha256

CARD = "CARD.md"
FOLDER = Path(__file__).resolve().parents[2] / "zoo"
"""Where a clone has them. They are not part of the wheel."""


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The number that the stock host gives on the embedded data, with which a user can see that a network is whole.

    Attributes:
        metric: its name.
        of: the samples.
        value: on clean images.
    """

    metric: str
    of: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a card says of a trained network.

    Attributes:
        folder: where it lies.
        name: task and method, such as "hippocampus/AMAT".
        host: what predicts with it.
        task: what it finds, in what.
        method: how it was trained.
        files: the files' SHA-256 sums, by their names in the folder.
        data: what it was trained on.
        split: the numbers of samples.
        licence: of the data, and so of the network.
        seed: of the training.
        hours: that it took, on what.
        training: the commands, of which the first ones made the standard network.
        predict: commands of the stock host, to be called in the clone's root; Advmed is not needed for them.
        versions: of the packages that trained and evaluated it.
        metric: by which it was attacked.
        samples: that were attacked.
        norm: of the noise.
        levels: of the noise, 0 first.
        attack: what the values are under, with its version.
        values: the metric at the levels.
        intervals: of the values, 95 %, None where there are too few samples.
        auc_robust: of the values.
        checks: what the checks of the attack said.
        embedded: see :class:`Embedded`.
    """

    folder: Path
    name: str
    host: str
    task: str
    method: str
    files: Mapping[str, str]
    data: str
    split: str
    licence: str
    seed: int
    hours: str
    training: Sequence[str]
    predict: Sequence[str]
    versions: Mapping[str, str]
    metric: str
    samples: str
    norm: str
    levels: Sequence[float]
    attack: str
    values: Sequence[float]
    intervals: Sequence[Sequence[float] | None]
    auc_robust: float
    checks: str
    embedded: Embedded

    @property
    def size(self) -> int:
        """Bytes of its files, of those that are there."""
        return sum(path.stat().st_size for path in self._paths().values() if path.is_file())

    def damaged(self) -> list[str]:
        """The files that are missing, or not those that the card was written for."""
        paths = self._paths()
        return [name for name, path in paths.items() if not path.is_file() or sha256(path) != self.files[name]]

    def _paths(self) -> dict[str, Path]:
        return {name: self.folder / name for name in self.files}


def read_card(path: Path) -> Network:
    """Reads a card.

    Args:
        path: of the ``CARD.md``.

    Raises:
        ValueError: if its head is not the YAML of one.
    """
    head = path.read_text("utf-8").split("---\n", 2)
    try:
        content: Any = yaml.safe_load(head[1]) if len(head) == 3 and not head[0] else None
    except yaml.YAMLError as error:
        raise ValueError(f"the head of {path} is no YAML: {error}") from error
    needed = {field.name for field in fields(Network)} - {"folder"}
    if not isinstance(content, dict) or set(content) != needed:
        missing = sorted(needed - set(content or ()))
        raise ValueError(f"{path} is no card of a network" + (f": {', '.join(missing)} missing" if missing else ""))
    return Network(folder=path.parent, **content | {"embedded": Embedded(**content["embedded"])})


def networks(folder: Path | None = None) -> list[Network]:
    """The networks of a folder, by name; of a task the standard one, with which the others began, comes first.

    Args:
        folder: None: that of the clone.

    Raises:
        FileNotFoundError: if there is no such folder, or no card in it.
        ValueError: see :func:`read_card`.

    Example:
        >>> from advmed.zoo import networks
        >>> try:
        ...     networks(Path("nowhere"))
        ... except FileNotFoundError as error:
        ...     print(error)
        there is no card of a network in nowhere: the networks lie in the folder zoo of a clone of the repository, ...
    """
    folder = FOLDER if folder is None else folder
    cards = sorted(folder.glob(f"*/*/{CARD}"))
    if not cards:
        where = "the networks lie in the folder zoo of a clone of the repository, which --folder names"
        if folder == FOLDER and not folder.is_dir():
            raise FileNotFoundError(f"this installation has no trained networks, a wheel holds none: {where}")
        raise FileNotFoundError(f"there is no card of a network in {folder}: {where}")
    return sorted(map(read_card, cards), key=lambda one: (one.folder.parent.name, len(one.training), one.name))
