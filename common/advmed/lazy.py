"""Public names that are imported when they are first asked for: ``import advmed`` takes no PyTorch.

The names of a package stand in its ``__init__.pyi``, which type checkers and editors read, too: one list (lazy_loader).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lazy_loader

OURS = ("advmed", "adv_classify", "adv_landmark", "adv_nnunet", "adv_yolo")


def public_names(
    package: str, file: str, *, extra: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    Args:
        package: its ``__name__``.
        file: its ``__file__``, beside which the stub lies.
        extra: of the installation that its names may need.

    Raises:
        ImportError: by ``__getattr__``, naming the extra, if a package is missing that a name needs.
    """
    find, names, public = lazy_loader.attach_stub(package, file)

    def get(name: str) -> Any:
        try:
            return find(name)
        except ModuleNotFoundError as error:
            text = missing(f"{package}.{name}", error, extra)
            if text is None:
                raise
            raise ImportError(text, name=error.name) from error

    return get, names, public


def missing(what: str, error: ModuleNotFoundError, extra: str | None) -> str | None:
    """What to do about a package that is not installed; None without an extra, and for a module of ours."""
    package = (error.name or "").partition(".")[0]
    if extra is None or not package or package in OURS:
        return None
    return f"{what} needs {package}, which is not installed: pip install 'advmed[{extra}]'"
