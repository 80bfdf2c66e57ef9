"""When nothing is left of a metric: the one rule by which pages and comparisons call no model robust.

The best of models that are all broken is not robust. A value counts as lost where the mean sample is twice as bad as a
sample that has failed (Dice below 0.25 where a sample fails below 0.5; an error of twice the one that fails), or where
more than nine tenths of the best clean value of the compared models are gone: the best, for a model that is broken from
the start loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BEYOND_FAILURE = 2.0
"""By which factor the metric is worse than where a sample fails."""
LEFT = 0.1
"""What must be left of the best clean value, where higher is better; errors have no scale that this could be of."""


def lost(values: Array, clean: Array, *, higher_is_better: bool, fails_at: float | None) -> Array:
    """Which values leave nothing of what a model is for, bool, of the shape of the values; a NaN does not count.

    Args:
        values: of the metric under attack, any shape.
        clean: its clean values of all models that are compared.
        higher_is_better: direction of the metric.
        fails_at: the value beyond which a sample has failed; None where the metric has no notion of it.

    Example:
        >>> import numpy as np
        >>> lost(np.array([0.3, 0.2]), np.array([0.9]), higher_is_better=True, fails_at=0.5).tolist()
        [False, True]
        >>> lost(np.array([0.3, 0.2]), np.array([0.9]), higher_is_better=True, fails_at=None).tolist()
        [False, False]
    """
    if not higher_is_better:
        return np.asarray(values > (BEYOND_FAILURE * fails_at if fails_at is not None else np.inf))
    best = float(np.max(clean[np.isfinite(clean)], initial=0))
    floor = max((fails_at or 0) / BEYOND_FAILURE, LEFT * best)
    return np.asarray((values < floor) & (floor > 0))  # a metric of negative numbers has no floor


def nobody(
    models: Sequence[str],
    levels: Sequence[float],
    values: Array,
    *,
    attack: str,
    label: str,
    show: Callable[[float], str],
    higher_is_better: bool,
    fails_at: float | None,
) -> str | None:
    """That no model is robust, and from which noise level on, as a sentence; None where one is at every level.

    Noise of a smaller level is allowed at a larger one: where nobody is robust, nobody is above.

    Args:
        models: M names.
        levels: L noise levels, 0 first.
        values: of the metric, (M, L).
        attack: name of the attack.
        label: of the metric.
        show: a value as text.
        higher_is_better: direction of the metric.
        fails_at: see :func:`lost`.
    """
    gone = lost(values, values[:, 0], higher_is_better=higher_is_better, fails_at=fails_at)
    everywhere = np.asarray((gone | np.isnan(values)).all(0) & gone.any(0))
    everywhere[0] = False  # the clean value is no attack's
    if not everywhere.any():
        return None
    k = int(np.argmax(everywhere))
    best = int((np.nanargmax if higher_is_better else np.nanargmin)(values[:, k]))
    where = f"under {attack} at noise level {levels[k]:g}" + (" and above" if k < len(levels) - 1 else "")
    if len(models) == 1:
        return f"{models[0]} is not robust {where}, where its {label} goes to {show(values[0, k])}."
    at = "there" if k == len(levels) - 1 else f"at level {levels[k]:g}"
    return f"No model is robust {where}: the best {label} {at} is {show(values[best, k])} ({models[best]})."
