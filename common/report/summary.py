"""From evaluations to the numbers of a report: the metric at every level, its attacked mean and AUC_robust."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.evaluation import Evaluation, Scores
from common.metrics import auc_robust

Array = NDArray[Any]


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
    """

    name: str
    of: Callable[[Scores], float]
    higher_is_better: bool = True
    scale: float | None = None
    unit: str = ""
    description: str = ""
    per_sample: Callable[[Scores], Array] | None = None

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Entry:
    """A model of the report.

    Attributes:
        name: as shown, such as "AMAT".
        evaluation: what was measured.
        margins: the margins that its training ended with, (n,), in units of the noise level; None for none.
    """

    name: str
    evaluation: Evaluation
    margins: Array | None = None

    def __post_init__(self) -> None:
        if self.margins is not None and (self.margins.size == 0 or not np.isfinite(self.margins).all()):
            raise ValueError(f"margins of {self.name} must be one or more finite numbers, got {self.margins}")


@dataclass(frozen=True)
class Table:
    """One metric of M models under A attacks at L levels.

    Attributes:
        metric: the metric.
        models: M names.
        attacks: A names.
        levels: L noise levels, 0 first.
        values: shape (M, A, L); level 0 is the clean value, the same for every attack.
        scale: what the values were divided by for AUC_robust.
    """

    metric: Metric
    models: tuple[str, ...]
    attacks: tuple[str, ...]
    levels: tuple[float, ...]
    values: Array
    scale: float

    @property
    def attacked_mean(self) -> Array:
        """Mean over the levels above 0 ("Avg." in the paper's tables), shape (M, A)."""
        return np.asarray(self.values[:, :, 1:].mean(2))

    @property
    def auc(self) -> Array:
        """AUC_robust, shape (M, A); NaN where a value is missing or negative, so that it is not defined."""
        higher = self.metric.higher_is_better

        def area(curve: Array) -> float:
            defined = np.isfinite(curve).all() and (curve >= 0).all() and self.scale > 0
            return auc_robust(self.levels, curve, higher_is_better=higher, scale=self.scale) if defined else np.nan

        return np.array([[area(curve) for curve in curves] for curves in self.values])

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(attack, heading) of the columns as shown; the first column is the clean value, of no attack."""
        headings = [*(f"{level:g}" for level in self.levels[1:]), "mean", "AUC_robust"]
        return [("", "clean"), *((attack, heading) for attack in self.attacks for heading in headings)]

    @property
    def cells(self) -> Array:
        """The numbers under ``columns``, shape (M, 1 + A * (L + 1))."""
        blocks = np.concatenate([self.values[:, :, 1:], self.attacked_mean[:, :, None], self.auc[:, :, None]], axis=2)
        return np.concatenate([self.values[:, :1, 0], blocks.reshape(len(self.models), -1)], axis=1)

    @property
    def text(self) -> list[list[str]]:
        """The cells as shown, with as many digits as the paper gives."""
        digits = self._digits
        return [[_show(value, d) for value, d in zip(row, digits, strict=True)] for row in self.cells]

    @property
    def best(self) -> Array:
        """Which cells are the best of their column, as far as the shown digits tell, bool; all False for one model."""
        sign = 1 if self.metric.higher_is_better else -1
        columns = zip(self.cells.T, self._digits, strict=True)
        rounded = _last(sign * np.stack([column.round(digits) for column, digits in columns], axis=1))
        return np.asarray((rounded == rounded.max(0)) & np.isfinite(rounded) & (len(self.models) > 1))

    def show(self, value: float) -> str:
        """A value of the metric as text."""
        return _show(value, _digits(self.values))

    def show_auc(self, value: float) -> str:
        """An AUC_robust as text."""
        return _show(value, _digits(self.auc))

    @property
    def _digits(self) -> list[int]:
        """Digits behind the point, by column."""
        values, auc = _digits(self.values), _digits(self.auc)
        return [auc if heading == "AUC_robust" else values for _, heading in self.columns]


def _digits(values: Array) -> int:
    largest = np.max(np.abs(values[np.isfinite(values)]), initial=0)
    return 4 if largest <= 1 else 3 if largest < 10 else 2


def _show(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"


def tabulate(entries: Sequence[Entry], metrics: Sequence[Metric]) -> list[Table]:
    """One table per metric.

    Raises:
        ValueError: without models or metrics, for names given twice, or for models that were not evaluated alike
            (samples, attacks, levels, seed, bounds), whose numbers must not stand side by side.
    """
    for kind, names in (("model", [e.name for e in entries]), ("metric", [m.name for m in metrics])):
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a report needs one or more {kind}s of different names, got {names}")
    first = entries[0].evaluation
    for entry in entries[1:]:
        ours, theirs = ({**e.configuration, "ids": e.ids, "fingerprint": ""} for e in (entry.evaluation, first))
        differ = [name for name in ours if ours[name] != theirs[name]]
        if differ:
            raise ValueError(
                f"{entry.name} and {entries[0].name} were not evaluated alike: they differ in {', '.join(differ)}. "
                "Evaluate both on the same samples with the same attacks, levels, seed and bounds"
            )
    return [_tabulate(entries, metric) for metric in metrics]


def _tabulate(entries: Sequence[Entry], metric: Metric) -> Table:
    first = entries[0].evaluation
    values = np.array([[e.evaluation.curve(attack, metric.of) for attack in first.attacks] for e in entries])
    scale = metric.scale
    if scale is None:
        scale = 1.0 if metric.higher_is_better else float(np.max(values[np.isfinite(values)], initial=0))
    return Table(metric, tuple(e.name for e in entries), tuple(first.attacks), first.levels, values, scale)


def findings(table: Table) -> list[str]:
    """What the table says, in sentences: who is robust, how far it holds, what it costs on clean images.

    They speak of the attack that hurts most, on the mean over models.
    """
    sign = 1 if table.metric.higher_is_better else -1
    name = table.metric.label
    a = int(np.argmin(_last(sign * table.attacked_mean).mean(0)))
    attack, level, auc = table.attacks[a], f"{table.levels[-1]:g}", table.auc[:, a]
    clean, attacked = table.values[:, 0, 0], table.values[:, a, -1]
    rank = [int(i) for i in np.argsort(-_last(sign * auc), kind="stable")]
    best = rank[0]
    if len(table.models) == 1:
        sentences = [
            f"{name} goes from {table.show(clean[0])} on clean images to {table.show(attacked[0])} "
            f"under {attack} at noise level {level}; AUC_robust is {table.show_auc(auc[0])}."
        ]
    else:
        second, worst = rank[1], int(np.argmin(_last(sign * attacked)))
        sentences = [
            f"{table.models[best]} is the most robust of {len(table.models)} models under {attack}: "
            f"AUC_robust {table.show_auc(auc[best])}, followed by {table.models[second]} "
            f"with {table.show_auc(auc[second])}."
        ]
        if worst != best:
            sentences.append(
                f"At noise level {level}, {name} is {table.show(attacked[best])} for {table.models[best]} "
                f"and {table.show(attacked[worst])} for {table.models[worst]}."
            )
        other = int(np.argmax(_last(np.where(np.arange(len(rank)) == best, np.nan, sign * clean))))
        gain = sign * (clean[best] - clean[other])
        verdict = "no better or worse than" if gain == 0 else "better than" if gain > 0 else "worse than"
        sentences.append(
            f"On clean images, {table.models[best]} has {name} {table.show(clean[best])}, {verdict} "
            f"the best of the others ({table.models[other]}, {table.show(clean[other])})."
        )
    return sentences


def cautions(entries: Sequence[Entry], tables: Sequence[Table]) -> list[str]:
    """What a reader must know before believing the numbers; empty if nothing was noticed."""
    notes = []
    for entry in entries:
        steps = [int(condition.nonfinite.sum()) for condition in entry.evaluation.attacked.values()]
        if sum(steps):
            notes.append(f"{entry.name}: {sum(steps)} attack steps met a non-finite gradient and moved nothing.")
    for table in tables:
        sign = 1 if table.metric.higher_is_better else -1
        gain = sign * np.diff(table.values, axis=2)
        # A percent of the clean value: less can be the noise of the attack itself.
        suspicious = (gain > 0.01 * np.abs(table.values[:, :, :1])).any(2)
        notes += [
            f"{table.models[m]}: {table.metric.name} improves as the noise of {table.attacks[a]} grows. An attack that "
            "does this is too weak, or the model hides its gradients; its robustness may be overrated."
            for m, a in np.argwhere(suspicious)
        ]
    return notes


def format_table(table: Table) -> str:
    """The table as aligned plain text, the best of each column marked with ``*``."""
    columns = table.columns
    starts = {1 + a * (len(table.levels) + 1): attack for a, attack in enumerate(table.attacks)}
    head = [
        ["", *(starts.get(k, "") for k in range(len(columns)))],
        [table.metric.label, *(heading for _, heading in columns)],
    ]
    marked = [
        [model, *(text + ("*" if best else " ") for text, best in zip(texts, bests, strict=True))]
        for model, texts, bests in zip(table.models, table.text, table.best, strict=True)
    ]
    head = [[row[0], *(cell + " " for cell in row[1:])] for row in head]
    widths = [max(map(len, column)) for column in zip(*head, *marked, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in [*head, *marked]
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join(line.rstrip() for line in [*lines[:2], rule, *lines[2:]])


def _last(values: Array) -> Array:
    """Values for ranking, where a missing one comes last."""
    return np.where(np.isnan(values), -np.inf, values)
