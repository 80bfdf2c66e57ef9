"""From which noise level on each sample fails: robustness as a distribution over samples, not only as a mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from advmed.evaluation.metric import Metric
from advmed.evaluation.subjects import Entry
from advmed.report.summary import Array


@dataclass(frozen=True)
class Failures:
    """The smallest evaluated level at which each sample fails, from the passes of the evaluation.

    Attributes:
        metric: which says what a failure is.
        models: M names.
        levels: L noise levels, 0 first.
        ids: N sample ids.
        smallest: shape (M, N): a level, inf for a sample that fails at none, NaN for one without a value of the metric.
    """

    metric: Metric
    models: tuple[str, ...]
    levels: tuple[float, ...]
    ids: tuple[str, ...]
    smallest: Array

    @property
    def share(self) -> Array:
        """Share of the samples that have failed up to each level, shape (M, L)."""
        known = ~np.isnan(self.smallest)
        failed = self.smallest[:, :, None] <= np.asarray(self.levels)
        return np.asarray((failed & known[:, :, None]).sum(1) / np.maximum(known.sum(1), 1)[:, None])

    def quantile(self, share: float) -> list[float]:
        """By model, the level at which so many of its samples have failed; inf where that many never do."""
        found = []
        for row in self.smallest:
            known = np.sort(row[~np.isnan(row)])
            found.append(float(known[max(0, int(np.ceil(share * known.size)) - 1)]) if known.size else float("nan"))
        return found

    def first_and_last(self, number: int) -> list[str]:
        """Ids of samples to look at: those that fail first, of all that are right when clean, and those that fail last.

        The order is that of the mean over the models. Samples that are wrong from the start for every model are shown
        only where there are no others.
        """
        levels = np.where(np.isinf(self.smallest), self.levels[-1] * 2, self.smallest)
        known = np.flatnonzero(~np.isnan(levels).any(0))
        if not known.size:
            return []
        mean = levels[:, known].mean(0)
        right = mean > 0
        order = known[np.lexsort((np.arange(known.size), mean, ~right))]
        usable = order[: int(right.sum())] if right.any() else order
        first = usable[: (number + 1) // 2]
        last = [k for k in usable[::-1] if k not in first][: number // 2]
        return [self.ids[k] for k in [*first, *last]]


def count_failures(entries: Sequence[Entry], metrics: Sequence[Metric]) -> Failures | None:
    """Failures by the first metric that knows some, under whichever attack succeeds first; None without one."""
    metric = next((m for m in metrics if m.fails_at is not None), None)
    if metric is None:
        return None
    first = entries[0].evaluation
    rows = []
    for entry in entries:
        evaluation = entry.evaluation
        smallest = np.where(metric.failed(evaluation.clean.scores) > 0, 0.0, np.inf)
        smallest[np.isnan(metric.failed(evaluation.clean.scores))] = np.nan
        for name, attack in evaluation.attacks.items():
            if attack.access == "none":
                continue
            for level in evaluation.levels[1:]:
                failed = metric.failed(evaluation.scores(name, level, metric))
                # What has no value when it is clean, an empty slice, has one as soon as something is found in it.
                smallest = np.where(np.isnan(smallest) & (failed == 0), np.inf, smallest)
                smallest = np.where(failed > 0, np.fmin(smallest, level), smallest)
        rows.append(smallest)
    return Failures(metric, tuple(e.name for e in entries), first.levels, first.ids, np.stack(rows))
