"""Checks of settings that several attacks have."""

from __future__ import annotations


def check_count(name: str, value: object) -> int:
    """Returns a whole number >= 1.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def check_fraction(name: str, value: float, of: str = "") -> float:
    """Returns a number in [0, 1] as a float.

    Raises:
        ValueError: for anything else.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a fraction {of}{' ' if of else ''}in [0, 1], got {value!r}")
    return float(value)
