"""Confidence intervals over samples: the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

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


def interval(draws: Array, *, confidence: float = CONFIDENCE) -> Array:
    """Lowest and highest value of the middle of the draws.

    Args:
        draws: shape (count, ...); draws that are NaN (no class was drawn, say) are left out.
        confidence: share of the draws between the two.

    Returns:
        Shape (2, ...); NaN where no draw is a number.
    """
    if not len(draws):
        return np.full((2, *draws.shape[1:]), np.nan)
    tail = (1 - confidence) / 2
    with np.errstate(all="ignore"):
        empty = np.isnan(draws).all(0)
        found = np.nanquantile(np.where(empty, 0.0, draws), [tail, 1 - tail], axis=0)
    return np.asarray(np.where(empty, np.nan, found))
