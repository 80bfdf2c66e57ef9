"""Images that are in a data set more than once under other names: by what they hold, for their names do not tell."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmed.files import remember, remembered, state_of
from advmed.progress import watched

_PIECE = 1 << 20


@dataclass(frozen=True)
class Sample:
    """A sample of a data set.

    Attributes:
        split: that it is in.
        name: its id.
        content: of its image: equal for equal ones; None if no other can be equal.
        truth: its targets, needed where there is a content; of equal ones repr is the same.
    """

    split: str
    name: str
    content: str | None
    truth: Any = None


def warnings_of_copies(samples: Iterable[Sample]) -> list[str]:
    """What is to be said of images that are there more than once; nothing of a name that comes again.

    Example:
        >>> from advmed.copies import Sample, warnings_of_copies
        >>> found = [Sample("train", "a.png", "7f", 0), Sample("val", "b.png", "7f", 0)]
        >>> warnings_of_copies(found)[0].partition(": ")[0]
        '1 image(s) are in two splits, such as b.png of val, a copy of a.png of train'
    """
    first: dict[str, Sample] = {}
    apart, across, within = [], [], []
    for sample in samples:
        if sample.content is None:
            continue
        other = first.setdefault(sample.content, sample)
        if other.name == sample.name and other.split == sample.split:
            continue
        said = f"{sample.name} of {sample.split}, a copy of {other.name} of {other.split}"
        if repr(other.truth) != repr(sample.truth):
            apart.append(said)
        elif other.split != sample.split:
            across.append(said)
        else:
            within.append(said)
    found = []
    if apart:
        found.append(f"{len(apart)} image(s) have two truths, such as {apart[0]}, with other targets: one is wrong")
    if across:
        found.append(
            f"{len(across)} image(s) are in two splits, such as {across[0]}: what is measured on them is no test"
        )
    if within:
        found.append(
            f"{len(within)} image(s) are in one split more than once, such as {within[0]}: they count as often"
        )
    return found


def digest(content: Any) -> str:
    """Of bytes, or of an array that lies in memory in one piece: equal for equal ones."""
    return hashlib.sha256(content).hexdigest()[:24]


def contents(paths: Sequence[Path], memory: Sequence[Path] = (), threads: int = 1) -> list[str | None]:
    """What tells the contents of files apart; only those are read that are as long as another one.

    Args:
        paths: of the files.
        memory: see :func:`advmed.files.remember`; a file that is in its old state is not read again.
        threads: that read.

    Returns:
        For each file a digest, or None where no other can have its content.
    """
    sizes = [path.stat().st_size for path in paths]
    often = Counter(sizes)
    states = {path: state_of(path) for path, size in zip(paths, sizes, strict=True) if often[size] > 1}
    known = remembered(memory)
    unread = [path for path, state in states.items() if state not in known]
    if unread:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            found = pool.map(_of_file, unread)
            read = list(watched(found, "looking for copies", "images", total=len(unread)))
        known |= {states[path]: found for path, found in zip(unread, read, strict=True)}
        remember(known, memory)
    return [known[states[path]] if path in states else None for path in paths]


def _of_file(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()[:24]
