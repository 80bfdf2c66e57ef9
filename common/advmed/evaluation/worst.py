"""The worst of several attacks, sample by sample, by the metric itself.

What is the worst depends on the metric: a metric of single samples takes each sample's worst; one of all samples
together, such as mean average precision, has no worst sample, and is searched for greedily. What a smaller noise has
done a larger one can do, so that no curve rises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from advmed.attacks import AttackResult
from advmed.evaluation.metric import Metric, Scores

Array = NDArray[Any]


@dataclass(frozen=True)
class WorstOf:
    """A row of a report that no attack makes: the worst of those that were run.

    Attributes:
        attacks: their names.
        norm: 2 or inf.
    """

    attacks: tuple[str, ...]
    norm: float

    access: ClassVar[str] = "white box"
    gradients: ClassVar[None] = None
    queries: ClassVar[None] = None

    @property
    def description(self) -> str:
        """What it is, for a report."""
        return f"the worst of {', '.join(self.attacks)} for the metric, sample by sample"

    def __call__(self, objective: Any, images: Tensor, radius: float | Tensor, /, **how: object) -> AttackResult:
        """Raises NotImplementedError: it is put together from what attacks have found."""
        raise NotImplementedError("the worst of several attacks is put together from what they found; run those")


def badness(metric: Metric, scores: Scores) -> Array:
    """How bad a metric finds each sample, (N,), larger is worse; -inf for one without a value.

    So a sample that has a value under attack only, an empty slice with a false alarm, is worse than without the attack.
    """
    assert metric.per_sample is not None
    value = np.asarray(metric.per_sample(scores), dtype=np.float64)
    return np.where(np.isnan(value), -np.inf, -value if metric.higher_is_better else value)


def worst_of(metric: Metric | None, candidates: Sequence[tuple[Scores, Array]]) -> Array:
    """Which of some candidates is the worst for each sample.

    Args:
        metric: with ``per_sample``; None: the loss alone decides.
        candidates: scores of all N samples, and the loss of each, (N,), which decides between equals.

    Returns:
        Numbers of candidates, (N,); the first where several are alike.
    """
    zeros = np.zeros(len(candidates[0][1]))
    bad = np.stack([zeros if metric is None else badness(metric, scores) for scores, _ in candidates])
    loss = np.stack([np.nan_to_num(np.asarray(loss, np.float64), nan=-np.inf) for _, loss in candidates])
    loss = np.where(bad == bad.max(0), loss, -np.inf)
    top = (bad == bad.max(0)) & (loss == loss.max(0))
    return np.asarray(top.argmax(0))


def select(parts: Sequence[Array], chosen: Array) -> Array:
    """Of some arrays of N samples, each sample of the one that was chosen for it."""
    return np.stack(parts)[chosen, np.arange(len(chosen))]


def chosen_scores(candidates: Sequence[Scores], chosen: Array) -> dict[str, Array]:
    """The scores of each sample from the candidate that was chosen for it."""
    return {name: select([np.asarray(scores[name]) for scores in candidates], chosen) for name in candidates[0]}


def greedy(metric: Metric, starts: Sequence[Scores], candidates: Sequence[Scores]) -> dict[str, Array]:
    """The worst that a metric of all samples together can be brought to by going through the samples once.

    It begins with whichever start is the worst. Then, in the order of the samples, each is replaced by what every
    candidate has made of it, in the candidates' order, and the replacement is kept if the metric is the worse for it.
    The result is never better than any start. It is a bound: another order can find worse. The metric is computed
    ``metric.resamples`` times at most, as for its interval: of more samples, as many as needed go together.

    Args:
        metric: any metric.
        starts: scores of all N samples.
        candidates: scores of all N samples.
    """
    sign = 1 if metric.higher_is_better else -1

    def bad(scores: Scores) -> float:
        value = metric.of(scores)
        return -np.inf if np.isnan(value) else -sign * value

    values = [bad(start) for start in starts]
    first = int(np.argmax(values))
    found = {name: np.array(score) for name, score in starts[first].items()}
    worst, count = values[first], len(next(iter(found.values())))
    blocks = max(1, min(count, metric.resamples // max(1, len(candidates))))
    for rows in np.array_split(np.arange(count), blocks):
        for candidate in candidates:
            if all(_alike(score[rows], candidate[name][rows]) for name, score in found.items()):
                continue
            kept = {name: score[rows].copy() for name, score in found.items()}
            for name, score in found.items():
                score[rows] = candidate[name][rows]
            value = bad(found)
            if value > worst:
                worst = value
                continue
            for name, score in found.items():
                score[rows] = kept[name]
    return found


def _alike(one: Array, other: Array) -> bool:
    return np.array_equal(one, other, equal_nan=bool(np.issubdtype(one.dtype, np.floating)))


def curve_of(
    metric: Metric,
    clean: tuple[Scores, Array],
    levels: Sequence[Mapping[str, tuple[Scores, Array]]],
    criterion: Metric | None,
) -> list[dict[str, Array]]:
    """The scores that a metric is computed from under the worst of several attacks, level by level.

    Args:
        metric: whose worst is wanted.
        clean: scores and loss of all samples without noise.
        levels: for every level above 0, the same under each attack, by name.
        criterion: what decides between samples where the metric has no value for one, or more noise is not the worse
            for it; None: the loss.
    """
    found, before, kept = [], clean, clean
    own = metric if metric.per_sample is not None and metric.monotone else None
    judge = own or (criterion if criterion is not None and criterion.per_sample is not None else None)
    for attacks in levels:
        candidates = [before, *attacks.values()]
        chosen = worst_of(judge, candidates)
        scores = chosen_scores([scores for scores, _ in candidates], chosen)
        before = scores, select([loss for _, loss in candidates], chosen)
        if own is None and metric.monotone:
            new = [scores for scores, _ in attacks.values()]
            scores = greedy(metric, [kept[0], scores, *new], [kept[0], *new])
            kept = scores, clean[1]
        found.append(scores)
    return found
