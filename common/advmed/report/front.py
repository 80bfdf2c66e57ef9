"""What one method can have over the settings of its dial: the front that another one is held against.

A method that is more robust and less accurate than another one may only be further along the same front. So it is held
against what the others have **at the same clean value**, between their two nearest settings, or at a better one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def attainable(clean: Array, attacked: Array, at: Array) -> Array:
    """The best attacked value on the line through a dial's settings where the clean value is at least ``at``.

    Args:
        clean: metric of clean images, (..., n), the settings in their order; higher is better.
        attacked: metric under attack, the same shape.
        at: wanted clean value, (...).

    Returns:
        Shape (...); NaN where the line nowhere is as accurate as that.

    Example:
        >>> import numpy as np
        >>> clean, attacked = np.array([0.9, 0.8, 0.6]), np.array([0.2, 0.4, 0.5])
        >>> attainable(clean, attacked, np.array(0.85)).item()  # half of the way between the first two
        0.3
        >>> attainable(clean, attacked, np.array(0.95)).item()
        nan
    """
    short = clean - np.asarray(at)[..., None]
    best = np.where(short >= 0, attacked, -np.inf).max(-1)
    if clean.shape[-1] > 1:
        before, after = short[..., :-1], short[..., 1:]
        crosses = before * after < 0
        share = before / np.where(crosses, before - after, 1.0)
        between = attacked[..., :-1] + share * (attacked[..., 1:] - attacked[..., :-1])
        best = np.maximum(best, np.where(crosses, between, -np.inf).max(-1))
    return np.where(np.isfinite(best), best, np.nan)
