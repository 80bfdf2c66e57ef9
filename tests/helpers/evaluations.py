"""Evaluations made by hand, whose numbers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from advmed.attacks import Attack
from advmed.attacks.names import parse_attacks
from advmed.evaluation.loop import Condition, Evaluation, describe
from advmed.evaluation.metric import Metric
from advmed.report import figures

CURVES = ("curves", "curve", "failure_curves", "margin_histogram")


def by_hand(
    curves: Mapping[str, ArrayLike],
    levels: Sequence[float] | None = None,
    *,
    attacks: Mapping[str, Attack] | None = None,
    scores: Callable[[NDArray[Any]], Mapping[str, Any]] = lambda value: {"v": value},
    loss: Sequence[float] | None = None,
    ids: Sequence[str] | None = None,
    **how: Any,
) -> Evaluation:
    """An evaluation of samples with these values.

    Args:
        curves: the values by attack, (levels, samples), those of the clean samples first.
        levels: default: 0, 1, 2, ...
        attacks: default: those that the names mean.
        scores: makes the scores of the samples from their values.
        loss: of the samples, everywhere; default: their values.
        ids: default: a, b, c, ...
        **how: ``bounds``, ``seed`` and ``fingerprint`` as :func:`advmed.evaluation.loop.evaluate` has them.
    """
    values = {name: np.asarray(rows, dtype=np.float64) for name, rows in curves.items()}
    first = next(iter(values.values()))
    steps = tuple(float(level) for level in (range(len(first)) if levels is None else levels))
    attacks = parse_attacks(curves) if attacks is None else attacks

    def condition(value: NDArray[Any], level: float) -> Condition:
        own = value if loss is None else np.array(loss)
        return Condition(
            np.full(len(value), level), own, np.zeros(len(value), np.int64), dict(scores(value)), seconds=level
        )

    attacked = {
        (name, level): condition(rows[k], level) for name, rows in values.items() for k, level in enumerate(steps) if k
    }
    configuration = describe(attacks, steps, **how)
    names = tuple("abcdefghijklmnopqrstuvwxyz"[: first.shape[1]] if ids is None else ids)
    return Evaluation(configuration, attacks, steps, names, condition(first[0], 0.0), attacked)


def mean_of(score: str, name: str = "", higher_is_better: bool = True, **changes: Any) -> Metric:
    """A metric that is the mean of a score, over the samples that have one."""
    return Metric(
        name or score,
        lambda s: float(np.nanmean(s[score])),
        higher_is_better,
        per_sample=lambda s: np.asarray(s[score]),
        **changes,
    )


def record_of(folder: Path) -> dict[str, Any]:
    """report.json."""
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def leave_out_curves(patch: pytest.MonkeyPatch) -> None:
    """Curves are not drawn, which takes most of the time of a report."""
    for name in CURVES:
        patch.setattr(figures, name, lambda *_: b"not drawn")
