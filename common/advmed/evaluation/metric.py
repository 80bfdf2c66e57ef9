"""What a host measures, as the evaluation's reports and checks see it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Scores = Mapping[str, Array]
"""Per-sample ingredients of a metric, by name; the first dimension of every array is the sample."""


@dataclass(frozen=True)
class Metric:
    """A host's metric.

    Attributes:
        name: as shown, such as "ADI".
        of: computes it from the scores of all samples.
        higher_is_better: False for errors such as MRE.
        scale: what the values are divided by for AUC_robust. None takes the values as they are or, where lower is
            better, divides by the largest value of the report, as the paper does.
        unit: such as "mm"; empty for none.
        description: one sentence for the reader: over what it is a mean, what is left out.
        per_sample: its value for every sample, (N,), from the same scores; for samples.csv.
        fails_at: a sample whose value is worse than this has failed; None for a metric that knows no failure.
        resamples: number of bootstrap draws; fewer for a metric that takes long to compute.
        lost_at: the value of a sample that has nothing left to lose, such as a Dice of 0; None: there is always more.
        monotone: whether more noise, well aimed, can only make it worse; False for the spread of errors, which shrinks
            where all of them grow alike.
        is_mean: the metric is the mean of ``per_sample``, samples without a value left out; draws then cost nothing.

    Raises:
        ValueError: for one that says more of single samples than it computes: ``fails_at``, ``lost_at`` or ``is_mean``
            without ``per_sample``.

    Example:
        >>> import numpy as np
        >>> from advmed import Metric
        >>> error = lambda scores: scores["error"]
        >>> mre = Metric("MRE", lambda scores: error(scores).mean(), False, unit="mm", per_sample=error, fails_at=4)
        >>> mre.failure, mre.failed({"error": np.array([1.0, 5.0])}).tolist()
        ('MRE above 4 mm', [0.0, 1.0])
    """

    name: str
    of: Callable[[Scores], float]
    higher_is_better: bool = True
    scale: float | None = None
    unit: str = ""
    description: str = ""
    per_sample: Callable[[Scores], Array] | None = None
    fails_at: float | None = None
    resamples: int = 1000
    is_mean: bool = False
    monotone: bool = True
    lost_at: float | None = None

    def __post_init__(self) -> None:
        if self.per_sample is None and (self.fails_at is not None or self.is_mean or self.lost_at is not None):
            raise ValueError(f"{self.name}: fails_at, lost_at and is_mean need per_sample")

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def failure(self) -> str:
        """When a sample has failed, in words."""
        return f"{self.name} {'below' if self.higher_is_better else 'above'} {self.fails_at:g} {self.unit}".strip()

    def failed(self, scores: Scores) -> Array:
        """1 for a sample that has failed, 0 for one that has not, NaN for one without a value; (N,).

        Raises:
            ValueError: for a metric without ``fails_at``.
        """
        if self.per_sample is None or self.fails_at is None:
            raise ValueError(f"{self.name} does not say when a sample has failed")
        value = np.asarray(self.per_sample(scores), dtype=np.float64)
        worse = value < self.fails_at if self.higher_is_better else value > self.fails_at
        return np.where(np.isnan(value), np.nan, worse)

    def resampled(self, scores: Scores, drawn: Sequence[Array]) -> Array:
        """The metric on each of some draws of samples (arrays of indices), (count,)."""
        if self.is_mean and self.per_sample is not None:
            value = np.asarray(self.per_sample(scores), dtype=np.float64)
            known = ~np.isnan(value)
            value = np.where(known, value, 0.0)
            sums = np.array([(value[rows].sum(), known[rows].sum()) for rows in drawn]).reshape(-1, 2)
            return np.where(sums[:, 1] > 0, sums[:, 0] / np.maximum(sums[:, 1], 1), np.nan)
        found = []
        for rows in drawn:
            with warnings.catch_warnings():  # a class that was not drawn is no news
                warnings.simplefilter("ignore")
                found.append(self.of({name: score[rows] for name, score in scores.items()}))
        return np.array(found, dtype=np.float64)
