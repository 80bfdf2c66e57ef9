"""AUC_robust of any metric (arXiv 2206.01736, Appendix A), and the noise levels that it is the area over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Returns noise levels as floats: 0 (clean), then one or more others, strictly increasing.

    Raises:
        ValueError: for anything else.
    """
    checked = tuple(float(level) for level in levels)
    increasing = all(low < high for low, high in itertools.pairwise(checked))
    if len(checked) < 2 or checked[0] != 0 or not increasing or not math.isfinite(checked[-1]):
        raise ValueError(
            "noise levels must be finite, start at 0 (the clean images) and increase strictly, two or more of them, "
            f"for example 0 5 10 15; got {' '.join(f'{level:g}' for level in checked) or 'none'}"
        )
    return checked


def auc_robust(
    levels: Sequence[float],
    values: Sequence[float] | NDArray[Any],
    *,
    higher_is_better: bool = True,
    scale: float | None = None,
) -> float:
    """AUC_robust: sqrt(clean value x area under the curve of value over noise level).

    (AMAT paper, arXiv 2206.01736, section 3.8, eq. 4; the numbers of its tables 8 to 12, in Appendix A, come out.) The
    area is the trapezoid area divided by the largest level, so a model that the noise does not harm scores its clean
    value. Higher is better where it is for the metric, lower where lower is.

    Args:
        levels: L noise levels, 0 first, strictly increasing, in any one unit.
        values: the metric at every level, (L,), finite and not negative.
        higher_is_better: whether a larger value of the metric is better.
        scale: the values are divided by it. Required where lower is better; the paper takes the largest value among
            all models compared (3.870 mm for MRE).

    Returns:
        A number without a unit.

    Raises:
        ValueError: for levels, values or a scale that are not as described.

    Example:
        >>> from advmed import auc_robust
        >>> round(auc_robust([0, 5, 10], [0.9, 0.6, 0.3]), 4)  # the area is 0.6: sqrt(0.9 * 0.6)
        0.7348
    """
    x = np.asarray(check_levels(levels))
    y = np.asarray(values, dtype=np.float64)
    if y.shape != x.shape or not np.isfinite(y).all() or (y < 0).any():
        raise ValueError(f"AUC_robust needs one finite value >= 0 for each of {x.size} levels, got {y.tolist()}")
    if scale is None:
        if not higher_is_better:
            raise ValueError(
                "AUC_robust of a metric where lower is better needs a scale, the value that counts as 1: "
                "the paper takes the largest value among all models compared"
            )
        scale = 1.0
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"the scale of AUC_robust must be finite and > 0, got {scale}")
    return float(auc_robust_of_curves(x, y, scale))


def auc_robust_of_curves(levels: Sequence[float] | NDArray[Any], values: NDArray[Any], scale: float) -> NDArray[Any]:
    """:func:`auc_robust` of many curves at once; NaN where a curve holds a value that is missing or negative.

    Args:
        levels: L noise levels, 0 first, strictly increasing.
        values: shape (..., L).
        scale: the values are divided by it.

    Returns:
        Shape (...).
    """
    x, y = np.asarray(levels, dtype=np.float64), np.asarray(values, dtype=np.float64)
    defined = np.asarray(np.isfinite(y).all(-1) & (y >= 0).all(-1))
    y = np.where(defined[..., None], y / scale if scale > 0 else np.nan, np.nan)
    area = (np.diff(x) * (y[..., 1:] + y[..., :-1]) / 2).sum(-1)
    return np.asarray(np.sqrt(y[..., 0] * area / x[-1]))
