"""Files that are written whole or not at all, and what is remembered of files from one start to the next."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo, is_zipfile

_PIECE = 1 << 20


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path``; when the block ends it takes the place of ``path``, in one go.

    Whoever reads sees the old file or the new one, never a half; a kill, a full disk or an exception in the middle
    leaves the old one. Several processes may write one path: the last to end wins.

    Args:
        path: the file; its folder exists.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "a.txt")) as temporary:
        ...         _ = temporary.write_text("whole")
        ...     [(found.name, found.read_text()) for found in Path(folder).iterdir()]
        [('a.txt', 'whole')]
    """
    path = Path(path)
    # A short name of its own: a long one of the user's may leave no room for more.
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes text, in UTF-8, or bytes to a file in one go; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_whole(path: str | Path) -> None:
    """Looks for damage in a checkpoint of PyTorch, which reads bytes that have changed without a word.

    Args:
        path: a zip archive, as checkpoints are; of other files nothing is known.

    Raises:
        ValueError: if the sums of what it holds are not those that were written.
        OSError: if it cannot be read.
    """
    if not is_zipfile(path):
        return
    try:
        with ZipFile(path) as archive:
            parts = archive.infolist()
            damaged = [part.filename for part in parts if not _as_written(archive, part)]
    except (BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    # torch.serialization.set_crc32_options(False) writes sums that never fit.
    if damaged and len(damaged) < len(parts):
        raise ValueError(
            f"{path} is damaged: some bytes of {len(damaged)} of its {len(parts)} parts, such as {damaged[0]}, are not "
            f"those that were written"
        )


def _as_written(archive: ZipFile, part: ZipInfo) -> bool:
    try:
        with archive.open(part) as content:
            while content.read(_PIECE):
                pass
    except BadZipFile:
        return False
    return True


def clickable(path: str | Path) -> str:
    """A file as terminals make it clickable, wherever the command was called: absolute, with spaces quoted.

    Example:
        >>> from advmed.files import clickable
        >>> clickable("/tmp/my report/report.html")
        'file:///tmp/my%20report/report.html'
    """
    return Path(path).absolute().as_uri()


def state_of(path: Path) -> str:
    """Tells the state of a file from others: a digest of its name, size and time of change, which shows none."""
    status = path.stat()
    return hashlib.sha256(f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}".encode()).hexdigest()[:24]


def remembered(memory: Sequence[Path]) -> dict[str, Any]:
    """What :func:`remember` wrote to these files; nothing of one that is missing or damaged."""
    found: dict[str, Any] = {}
    for path in memory:
        try:
            found |= json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            continue
    return found


def remember(content: Mapping[str, Any], memory: Sequence[Path]) -> None:
    """Writes what was found, plain types, to the first of these files that can be written; to none if none can.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     places = [Path(folder, "nowhere", "a.json"), Path(folder, "a.json")]
        ...     remember({"case": 3}, places)
        ...     remembered(places)
        {'case': 3}
    """
    for path in memory:
        try:
            write_whole(path, json.dumps(content))
            return
        except OSError:
            continue


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
