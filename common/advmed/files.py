"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
