"""Mistakes that are told in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def told(error: type[Exception], make: Callable[[], object], *parts: str) -> str:
    """The message of the mistake: one line, with all that matters in it."""
    with pytest.raises(error) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message
