"""From evaluations to the numbers of a report: the metric at every level, its attacked mean and AUC_robust."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmed.evaluation.auc import auc_robust_of_curves
from advmed.evaluation.intervals import LEAST, interval, resamples, share_interval, units_of
from advmed.evaluation.loop import Evaluation
from advmed.evaluation.metric import Metric
from advmed.evaluation.subjects import Entry
from advmed.evaluation.worst import WorstOf
from advmed.progress import ProgressBar
from advmed.report.floor import lost, nobody

Array = NDArray[Any]


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
        controls: names of the attacks that are none, but noise of the same norm.
        draws: the values on resampled samples, shape (count, M, A, L); the count is 0 where there are none.
        units: independent samples with a value, or groups of them.
        is_share: whether the values are shares of independent samples, such as an accuracy.
    """

    metric: Metric
    models: tuple[str, ...]
    attacks: tuple[str, ...]
    levels: tuple[float, ...]
    values: Array
    scale: float
    controls: tuple[str, ...]
    draws: Array
    units: int
    is_share: bool

    @property
    def attacked_mean(self) -> Array:
        """Mean over the levels above 0 ("Avg." in the paper's tables), shape (M, A)."""
        return np.asarray(self.values[:, :, 1:].mean(2))

    @property
    def auc(self) -> Array:
        """AUC_robust, shape (M, A); NaN where a value is missing or negative, so that it is not defined."""
        return auc_robust_of_curves(self.levels, self.values, self.scale)

    @property
    def order(self) -> list[int]:
        """The A attacks as a reader wants them: those that hurt most on the mean over models first, controls last."""
        harm = _last((1 if self.metric.higher_is_better else -1) * self.attacked_mean).mean(0)
        return sorted(range(len(self.attacks)), key=lambda a: (self.attacks[a] in self.controls, harm[a]))

    @property
    def unmoved(self) -> Array:
        """Models that have the same value under every attack at every level, bool, (M,).

        False for a metric that is not about single samples: where it is, an attack that gets anywhere moves it.
        """
        aimed = [a for a, attack in enumerate(self.attacks) if attack not in self.controls]
        values = self.values[:, aimed]
        known = self.metric.fails_at is not None and values[:, :, 1:].size > 0
        return np.asarray((values == values[:, :, :1]).all((1, 2)) & known)

    @property
    def intervals(self) -> Array:
        """Intervals of the values, shape (2, M, A, L); NaN where there are none."""
        if self.is_share and len(self.draws):
            return share_interval(self.values, units=self.units)
        return self.interval(self.draws)

    def interval(self, draws: Array) -> Array:
        """Of what was computed from the draws, (count, ...): (2, ...)."""
        return interval(draws, units=self.units)

    @property
    def auc_draws(self) -> Array:
        """AUC_robust of the draws, shape (count, M, A)."""
        return auc_robust_of_curves(self.levels, self.draws, self.scale)

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(attack, heading) of the columns as shown; the first column is the clean value, of no attack."""
        headings = [*(f"{level:g}" for level in self.levels[1:]), "mean", "AUC_robust"]
        return [("", "clean"), *((attack, heading) for attack in self.attacks for heading in headings)]

    @property
    def cells(self) -> Array:
        """The numbers under ``columns``, shape (M, 1 + A * (L + 1))."""
        return _in_columns(self.values, self.auc, self.attacked_mean)

    @property
    def cell_intervals(self) -> Array:
        """Intervals of the cells, shape (2, M, 1 + A * (L + 1)); NaN where there are none."""
        values, auc = self.intervals, self.interval(self.auc_draws)
        mean = self.interval(self.draws[..., 1:].mean(-1))
        return _in_columns(values, auc, mean)

    @property
    def interval_text(self) -> list[list[str]]:
        """The intervals as shown; empty where there are none."""
        low, high = self.cell_intervals
        return [
            [
                f"{_show(a, d)} to {_show(b, d)}" if np.isfinite([a, b]).all() else ""
                for a, b, d in zip(lows, highs, self._digits, strict=True)
            ]
            for lows, highs in zip(low, high, strict=True)
        ]

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


def _in_columns(values: Array, auc: Array, mean: Array) -> Array:
    """Values (..., M, A, L), AUC_robust and attacked means (..., M, A) as columns, (..., M, 1 + A * (L + 1))."""
    blocks = np.concatenate([values[..., 1:], mean[..., None], auc[..., None]], axis=-1)
    width = blocks.shape[-2] * blocks.shape[-1]  # said, because of no draws nothing can be inferred
    return np.concatenate([values[..., :1, 0], blocks.reshape(*blocks.shape[:-2], width)], axis=-1)


def _digits(values: Array) -> int:
    largest = np.max(np.abs(values[np.isfinite(values)]), initial=0)
    return 4 if largest <= 1 else 3 if largest < 10 else 2


def _show(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"


def tabulate(
    entries: Sequence[Entry],
    metrics: Sequence[Metric],
    groups: Sequence[str] | None = None,
    *,
    resample: bool = True,
) -> list[Table]:
    """One table per metric.

    Args:
        entries: the models.
        metrics: the metrics.
        groups: to which each sample belongs, for the bootstrap, see :func:`advmed.evaluation.intervals.resamples`.
        resample: False for tables without intervals.

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
    curves = len(metrics) * len(entries) * len(first.attacks)
    with ProgressBar("intervals", curves, "curves", shown=resample) as bar:
        return [_tabulate(entries, metric, groups, metric.resamples if resample else 0, bar) for metric in metrics]


def _tabulate(
    entries: Sequence[Entry], metric: Metric, groups: Sequence[str] | None, count: int, bar: ProgressBar
) -> Table:
    first = entries[0].evaluation
    values = np.array([[e.evaluation.curve(attack, metric) for attack in first.attacks] for e in entries])
    drawn = resamples(first.ids, groups, count=count)
    draws = np.stack([_draw(entry.evaluation, metric, drawn, bar) for entry in entries], axis=1)
    scale = metric.scale
    if scale is None:
        scale = 1.0 if metric.higher_is_better else float(np.max(values[np.isfinite(values)], initial=0))
    controls = tuple(name for name, attack in first.attacks.items() if attack.access == "none")
    names = tuple(e.name for e in entries)
    known, share = _samples_of(metric, entries)
    return Table(
        metric,
        names,
        tuple(first.attacks),
        first.levels,
        values,
        scale,
        controls,
        draws,
        units=units_of(len(first.ids), groups, known),
        is_share=share and groups is None,
    )


def _samples_of(metric: Metric, entries: Sequence[Entry]) -> tuple[Array | None, bool]:
    """Which samples have a value, (N,), if it is known; whether all values are 0 or 1."""
    if metric.per_sample is None:
        return None, False
    found = [
        np.asarray(metric.per_sample(condition.scores), dtype=np.float64)
        for entry in entries
        for condition in (entry.evaluation.clean, *entry.evaluation.attacked.values())
    ]
    values = np.stack(found)
    share = metric.is_mean and bool(np.isin(values, (0.0, 1.0)).all())  # and no value is missing
    return np.asarray(np.isfinite(values).any(0)), share


def _draw(evaluation: Evaluation, metric: Metric, drawn: Sequence[Array], bar: ProgressBar) -> Array:
    """The metric on resampled samples under every attack at every level, shape (count, A, L)."""
    clean, curves = metric.resampled(evaluation.clean.scores, drawn), []
    for attack in evaluation.attacks:
        scores = (evaluation.scores(attack, level, metric) for level in evaluation.levels[1:])
        curves.append([clean, *(metric.resampled(found, drawn) for found in scores)])
        bar.update()
    return np.moveaxis(np.array(curves), 2, 0)


def findings(table: Table, doubted: Collection[str] = ()) -> list[str]:
    """What the table says, in sentences: who is robust, how far it holds, what it costs on clean images.

    They speak of the attack that hurts most, on the mean over models. No model is called the most robust that failed
    checks, that no attack moves, of which nothing is left (:mod:`advmed.report.floor`), or that the samples do not
    tell from the next one.

    Args:
        table: of the metric.
        doubted: the models that failed checks of the attack, see :func:`doubts`.
    """
    sign = 1 if table.metric.higher_is_better else -1
    name, a = table.metric.label, table.order[0]
    attack, level, auc = table.attacks[a], f"{table.levels[-1]:g}", table.auc[:, a]
    clean, attacked = table.values[:, 0, 0], table.values[:, a, -1]
    rank = [int(i) for i in np.argsort(-_last(sign * auc), kind="stable")]
    best = rank[0]
    low, high = table.interval(table.auc_draws[:, :, a])

    def within(m: int) -> str:
        known = np.isfinite([low[m], high[m]]).all()
        return f" (95 % interval {table.show_auc(low[m])} to {table.show_auc(high[m])})" if known else ""

    floor: Any = {"higher_is_better": sign > 0, "fails_at": table.metric.fails_at}
    none = nobody(table.models, table.levels, table.values[:, a], attack=attack, label=name, show=table.show, **floor)
    but = list(_but(table, best, a, doubted, lost(table.values[best, a], clean, **floor) & (none is None)))
    sentences = [] if none is None else [none]
    if len(table.models) == 1:
        sentences.append(
            f"{name} goes from {table.show(clean[0])} on clean images to {table.show(attacked[0])} "
            f"under {attack} at noise level {level}; AUC_robust is {table.show_auc(auc[0])}{within(0)}{_joined(but)}."
        )
    else:
        second, worst = rank[1], int(np.argmin(_last(sign * attacked)))
        ahead, behind = (f"{table.show_auc(auc[m])}{within(m)}" for m in (best, second))
        doubt = _not_apart(table, best, second, a, sign)
        first = f"Under {attack}, {table.models[best]} has the best AUC_robust of {len(table.models)} models, {ahead}"
        if doubt is not None:
            sentences.append(
                f"{first}, but these samples do not tell it from {table.models[second]} with {behind}: "
                f"{'; '.join([doubt, *but])}."
            )
        elif but or none is not None:
            sentences.append(f"{first}, followed by {table.models[second]} with {behind}{_joined(but)}.")
        else:
            sentences.append(
                f"{table.models[best]} is the most robust of {len(table.models)} models under {attack}: "
                f"AUC_robust {ahead}, followed by {table.models[second]} with {behind}."
            )
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


def _but(table: Table, m: int, attack: int, doubted: Collection[str], gone: Array) -> Iterator[str]:
    """Why a model is not to be praised, whatever its AUC_robust; ``gone`` are the levels at which it is lost, (L,)."""
    model, name = table.models[m], table.metric.label
    if model in doubted:
        yield f"checks of the attack failed for {model}, whose robustness may be overrated"
    if table.attacks[attack] in table.controls:
        yield "noise that no one has aimed is no attack"
    if table.unmoved[m]:
        yield f"no attack changes {name} of {model} at any level"
    if gone[1:].any():
        k = 1 + int(np.argmax(gone[1:]))
        value = table.show(table.values[m, attack, k])
        yield f"{model} is not robust at noise level {table.levels[k]:g}, where its {name} is {value}"
    if not np.isfinite(table.auc[m, attack]):
        yield f"it is not defined for {model}"


def _joined(clauses: Sequence[str]) -> str:
    return f", but {'; '.join(clauses)}" if clauses else ""


def doubts(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """The checks of the attack that failed, by the models that failed some."""
    failed = {entry.name: [check.name for check in entry.checks if check.verdict == "failed"] for entry in entries}
    return {name: names for name, names in failed.items() if names}


def _not_apart(table: Table, one: int, other: int, attack: int, sign: int) -> str | None:
    """Why the samples do not tell two models apart by AUC_robust; None if they do, or nothing was resampled."""
    shown = {table.show_auc(table.auc[m, attack]) for m in (one, other)}
    if len(shown) == 1 and np.isfinite(table.auc[one, attack]):
        return "to the digits shown they are equal"  # which has no interval
    if not len(table.draws):
        return None
    if table.units < LEAST:
        return f"{table.units} independent sample(s) are too few for an interval"
    gain = sign * (table.auc_draws[:, [one], attack] - table.auc_draws[:, [other], attack])
    return "the 95 % interval of their difference holds 0" if table.interval(gain)[0, 0] <= 0 else None


def verdict(entries: Sequence[Entry]) -> tuple[bool | None, str]:
    """The first line of a report: whether its numbers are to be believed, as far as the checks can tell.

    Returns:
        True if no check failed, False if one did, None if there was none; and a sentence.
    """
    bad = doubts(entries)
    if bad:
        which = "; ".join(f"{name} ({', '.join(names)})" for name, names in bad.items())
        return False, f"Do not rely on the robustness of these models: checks of the attack failed for {which}."
    counts = [sum(check.verdict == "passed" for check in entry.checks) for entry in entries]
    if not all(counts):
        return None, "Whether the attacks are strong enough was not checked."
    models = "the model" if len(entries) == 1 else f"any of the {len(entries)} models"
    return True, f"No sign of hidden gradients or a weak attack in {models}: all of {min(counts)} checks passed."


def cautions(entries: Sequence[Entry], tables: Sequence[Table]) -> list[str]:
    """What a reader must know before believing the numbers; empty if nothing was noticed."""
    notes = []
    for entry in entries:
        attacks = entry.evaluation.attacks
        steps = [
            int(condition.nonfinite.sum())
            for (name, _), condition in entry.evaluation.attacked.items()
            if not isinstance(attacks.get(name), WorstOf)  # its steps are those of the others
        ]
        if sum(steps):
            notes.append(f"{entry.name}: {sum(steps)} attack steps met a non-finite gradient and moved nothing.")
    for table in tables:
        aimed = [a for a, attack in enumerate(table.attacks) if attack not in table.controls]
        values, clean = table.values[:, aimed], table.values[:, aimed, :1]
        notes += [
            f"{table.models[m]}: {table.metric.name} is {table.show(clean[m, 0, 0])} at every noise level. Either "
            "the levels are too small to change it, or the model says the same whatever it is shown."
            for m in np.flatnonzero(table.unmoved)
        ]
        gain = np.diff(values if table.metric.higher_is_better else -values, axis=2)
        # A percent of the clean value: less can be the noise of the attack itself.
        notes += [
            f"{table.models[m]}: {table.metric.name} improves as the noise of {table.attacks[aimed[a]]} grows. An "
            "attack that does this is too weak, or the model hides its gradients; its robustness may be overrated."
            for m, a in np.argwhere((gain > 0.01 * np.abs(clean)).any(2))
            if table.metric.monotone
        ]
    return notes


def format_table(table: Table) -> str:
    """The table as aligned plain text for a terminal: a block for each attack, a row for each model.

    The best of each column of a block is marked with ``*``, where there are several models.
    """
    each = len(table.levels) + 1  # columns of an attack: its levels, their mean and AUC_robust
    rows = [[table.metric.label, *(f"{heading} " for _, heading in table.columns[: 1 + each])]]
    for a, attack in enumerate(table.attacks):
        rows.append([attack])
        for model, texts, bests in zip(table.models, table.text, table.best, strict=True):
            cells = [text + ("*" if best else " ") for text, best in zip(texts, bests, strict=True)]
            rows.append([f"  {model}", cells[0], *cells[1 + a * each : 1 + (a + 1) * each]])
    widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(2 + each)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])  # numbers under each other
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    if table.best.any():
        lines.append("* the best of its column, by attack")
    return "\n".join(line.rstrip() for line in lines)


def _last(values: Array) -> Array:
    """Values for ranking, where a missing one comes last."""
    return np.where(np.isnan(values), -np.inf, values)
