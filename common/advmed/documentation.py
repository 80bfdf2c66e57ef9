"""Where the pages of the documentation lie: beside the packages in a clone, in the package ``advmed`` of a wheel."""

from __future__ import annotations

from pathlib import Path

FOLDERS = (Path(__file__).resolve().parent / "docs", Path(__file__).resolve().parents[2] / "docs")
"""In a wheel, in a clone."""


def page(name: str) -> str:
    """Where a page lies, for messages.

    Args:
        name: of its file in ``docs/``, such as ``search.md``.

    Returns:
        Its path; where a packager has left the pages out, its place in the repository, in words.

    Example:
        >>> from advmed.documentation import page
        >>> Path(page("search.md")).is_file()
        True
    """
    found = [folder / name for folder in FOLDERS if (folder / name).is_file()]
    return str(found[0]) if found else f"docs/{name} in Advmed's repository"
