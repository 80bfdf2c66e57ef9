"""Confidence intervals over samples: the bootstrap, with the quantiles that few samples need.

The percentile bootstrap (Efron and Tibshirani 1993, chapter 13) is too narrow for few samples: of ten, its 95 % cover
0.90. *Expanded* quantiles (Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3) make up for
that; for a mean they give what Student's t does. A share of samples has Wilson's interval, which has a width where all
samples agree. Below ten independent samples there is none.

All models, attacks and levels of a report are computed on the same resamples, and another report of the same samples
draws the same ones. So the difference of two models is paired wherever their samples are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CONFIDENCE = 0.95
LEAST = 10
"""Independent samples, or groups of samples, below which no interval is given."""
_BEYOND = 5
"""Draws behind a quantile, fewer than which do not tell where it is."""
_ROUNDING = 1e-9
"""Relative differences of draws that are those of adding numbers in another order."""


def resamples(ids: Sequence[str], groups: Sequence[str] | None = None, *, count: int) -> list[Array]:
    """Samples drawn with replacement, as many groups as there are, again and again.

    Args:
        ids: the N samples; the same ids give the same draws.
        groups: to which a sample belongs that is no independent piece of evidence, such as the case of a slice: groups
            are drawn whole. None for independent samples.
        count: number of draws.

    Returns:
        ``count`` arrays of indices; all of N numbers unless groups differ in size.
    """
    generator = np.random.default_rng(seed_of(ids, groups))
    if groups is None:
        return list(generator.integers(0, len(ids), (count, len(ids))))
    names = list(dict.fromkeys(groups))
    number = {name: k for k, name in enumerate(names)}
    belongs = np.array([number[group] for group in groups])
    members = [np.flatnonzero(belongs == k) for k in range(len(names))]
    return [
        np.concatenate([members[k] for k in drawn]) for drawn in generator.integers(0, len(names), (count, len(names)))
    ]


def seed_of(ids: Sequence[str], groups: Sequence[str] | None = None) -> int:
    """What :func:`resamples` draws from: reports with the same number have the same draws."""
    return int.from_bytes(hashlib.sha256("\n".join([*ids, *(groups or [])]).encode()).digest()[:6], "big")


def interval(draws: Array, *, units: int, confidence: float = CONFIDENCE) -> Array:
    """An interval by the expanded quantiles of the draws.

    Beyond 95 %, as for several differences at once, so few draws may lie behind a quantile that the interval would be
    too narrow (of 200, none for ten models). Then it is what the expanded quantiles stand for: Student's, of the draws'
    standard deviation.

    Args:
        draws: shape (count, ...); draws that are NaN (no class was drawn, say) are left out.
        units: how many independent samples, or groups of them, were drawn from.
        confidence: of the interval.

    Returns:
        Lowest and highest, shape (2, ...); NaN with fewer than LEAST units, where no draw is a number, and where all
        are equal: samples that agree do not say how far another one would be from them.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(10_000, 1))
        >>> interval(draws, units=1000).round(1).ravel().tolist()
        [-2.0, 2.0]
        >>> interval(draws, units=10).round(1).ravel().tolist()  # Student's t with 9 degrees, and sqrt(10 / 9)
        [-2.4, 2.4]
    """
    if not len(draws) or units < LEAST:
        return np.full((2, *draws.shape[1:]), np.nan)
    tail = expanded_tail(units, confidence)
    with np.errstate(all="ignore"):
        empty = np.isnan(draws).all(0)
        known = np.where(empty, 0.0, draws)
        if confidence > CONFIDENCE and tail * len(draws) < _BEYOND:
            half = _deviations(units, confidence) * np.nanstd(known, axis=0, ddof=1)
            low, high = np.nanmean(known, axis=0) + np.stack([-half, half])
        else:
            low, high = np.nanquantile(known, [tail, 1 - tail], axis=0)
        least, most = np.nanmin(known, axis=0), np.nanmax(known, axis=0)
        empty |= most - least <= _ROUNDING * np.maximum(np.abs(least), np.abs(most))
    return np.where(empty, np.nan, np.stack([low, high]))


def expanded_tail(units: int, confidence: float) -> float:
    """The share of draws to be left out at either end, Phi(-sqrt(n / (n - 1)) t_(n - 1)), n units."""
    from scipy.stats import norm  # here, for an evaluation needs it once, and its import takes a second

    return float(norm.cdf(-_deviations(units, confidence)))


def _deviations(units: int, confidence: float) -> float:
    """Half of an interval in standard deviations of the draws."""
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, units - 1) * np.sqrt(units / (units - 1)))


def share_interval(shares: Array, *, units: int, confidence: float = CONFIDENCE) -> Array:
    """Wilson's interval of shares of independent samples.

    Args:
        shares: any shape, in [0, 1] or NaN.
        units: the number of samples.
        confidence: of the interval.

    Returns:
        Lowest and highest, shape (2, ...); NaN for a share that is none, and with fewer than LEAST units.

    Example:
        >>> share_interval(np.array([1.0]), units=20).round(2).ravel().tolist()
        [0.84, 1.0]
    """
    from scipy.stats import binomtest

    shares = np.asarray(shares, dtype=np.float64)
    found = np.full((2, *shares.shape), np.nan)
    if units < LEAST:
        return found
    for place in np.argwhere(np.isfinite(shares)):
        at = tuple(place)
        test = binomtest(round(float(shares[at]) * units), units)
        found[(slice(None), *at)] = test.proportion_ci(confidence, method="wilson")
    return found


def repeats_interval(values: Array, *, confidence: float = CONFIDENCE) -> Array:
    """Student's interval of a mean over repeated trainings, with other seeds or on other folds.

    Args:
        values: shape (n, ...), a number for each training.
        confidence: of the interval.

    Returns:
        Lowest and highest, shape (2, ...); NaN with fewer than two trainings.

    Example:
        >>> repeats_interval(np.array([[0.70], [0.72], [0.74]])).round(3).ravel().tolist()
        [0.67, 0.77]
    """
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return np.full((2, *values.shape[1:]), np.nan)
    half = t.ppf((1 + confidence) / 2, count - 1) * values.std(0, ddof=1) / np.sqrt(count)
    return np.asarray(values.mean(0) + np.stack([-half, half]))


def units_of(count: int, groups: Sequence[str] | None = None, known: Array | None = None) -> int:
    """How many independent samples, or groups, there are.

    Args:
        count: number of samples.
        groups: to which they belong, see :func:`resamples`.
        known: which of them have a value, bool (count,); None: all.
    """
    names = np.array(groups if groups is not None else [str(k) for k in range(count)])
    return len(set(names[known] if known is not None else names))
