"""The reports of several runs in one table and one figure, with paired differences.

Reports of the same samples have drawn the same resamples (:mod:`advmed.evaluation.intervals`), so that the difference
of two models has an interval of its own, which is narrower than those of the models suggest. It says nothing of another
training: models that were trained several times (seeds, folds) become one row, whose interval is over the trainings.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmed.evaluation.auc import auc_robust_of_curves
from advmed.evaluation.intervals import CONFIDENCE, interval, repeats_interval, share_interval
from advmed.files import replacing, write_whole
from advmed.report import figures
from advmed.report.floor import nobody
from advmed.report.front import attainable
from advmed.report.writer import FORMAT as REPORT

Array = NDArray[Any]

FORMAT = "advmed.comparison/1"
SUMMARY = ("clean", "mean", "AUC_robust")
"""The numbers that are compared."""
BEYOND = "mean beyond the front"
"""The column of what a model has more than the front at its clean value."""


@dataclass(frozen=True)
class Report:
    """A report that was written before.

    Attributes:
        path: its report.json.
        record: what that holds.
        draws: bootstrap draws by metric, (count, models, attacks, levels); empty if their file is not there.
    """

    path: Path
    record: Mapping[str, Any]
    draws: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Report:
        """Reads ``report.json``, or that of a folder.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no report, or one of another format.
        """
        path = path / "report.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}; give the folder of a report, or its report.json")
        try:
            record = json.loads(path.read_text())
            found = record["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no report of an evaluation") from error
        if found != REPORT:
            raise ValueError(
                f"{path} is in the format {found}, and only {REPORT} can be compared: call evaluate again on its "
                f"folder (what was measured is not measured again)"
            )
        draws = path.with_name("draws.npz")
        if not draws.is_file():
            return cls(path, record)
        try:
            with np.load(draws, allow_pickle=False) as archive:
                return cls(path, record, {name: archive[name].astype(np.float64) for name in archive.files})
        except Exception as error:  # a damaged archive makes its readers raise almost anything
            raise ValueError(f"{draws} is damaged: call evaluate again on its folder to write it anew") from error

    @property
    def name(self) -> str:
        """Short name: the folder, with what is above it where that only names the norm."""
        parts = self.path.resolve().parent.parts
        return "/".join(parts[-2:]) if parts[-1] in ("L2", "Linf") else parts[-1]

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics, the most important first."""
        found: dict[str, Any] = self.record["configuration"]["metrics"]
        return found

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(self.record["configuration"]["models"])

    @property
    def truth(self) -> str | None:
        """Tells the truth that was compared with, labels or points, from others; None where a host does not say."""
        return truth_of(self.record["configuration"]["models"].values())

    @property
    def evaluation(self) -> dict[str, Any]:
        """Attacks, levels, seed and bounds."""
        found: dict[str, Any] = self.record["configuration"]["evaluation"]
        return found

    @property
    def aimed(self) -> list[str]:
        """Names of the attacks that are some, the strongest first."""
        efforts = next(iter(self.record["attacks"].values()))
        return [name for name, effort in efforts.items() if effort["access"] != "none"]

    def setting(self, metric: str, attack: str) -> dict[str, Any]:
        """What two reports must share for their numbers to stand in one column."""
        return {
            "metric": {"name": metric, **self.metrics[metric]},
            "attack": {"name": attack, **self.evaluation["attacks"][attack]},
            "levels": self.evaluation["levels"],
            "bounds": self.evaluation["bounds"],
            "noise level": self.record["configuration"]["level_unit"],
        }


def truth_of(marks: Iterable[Any]) -> str | None:
    """What tells the truth of an evaluation from others, by the fingerprints of its models; None if they do not."""
    for mark in marks:
        try:
            found = json.loads(mark)["truth"]
        except (ValueError, KeyError, TypeError):
            continue
        return str(found)
    return None


def _at_odds(one: Report, other: Report) -> bool:
    """Whether two reports are of the same samples with another truth."""
    same = one.record["configuration"].get("samples") == other.record["configuration"].get("samples")
    return same and None not in (one.truth, other.truth) and one.truth != other.truth


@dataclass(frozen=True, eq=False)
class Row:
    """One model, or the mean of one that was trained several times.

    Attributes:
        report: name of its report, or of all.
        model: name, unique in the comparison.
        curve: the metric at each level, (L,).
        draws: the same on resampled samples, (count, L); None without.
        seed: of those draws.
        units: independent samples, or groups of them, that were drawn from.
        is_share: whether the values are shares of independent samples.
        doubts: names of the checks of the attack that failed.
        runs: the curve of each training by the name of its report, where several are one row.
    """

    report: str
    model: str
    curve: Array
    draws: Array | None
    seed: tuple[Any, ...]
    units: int
    is_share: bool
    doubts: tuple[str, ...]
    runs: Mapping[str, Array] | None = None


@dataclass(frozen=True)
class Section:
    """Models whose numbers can stand in one column.

    Attributes:
        metric: name.
        unit: such as "mm".
        higher_is_better: direction.
        attack: name.
        level_unit: what a noise level is.
        levels: 0 first.
        scale: what values are divided by for AUC_robust.
        rows: the models.
        fails_at: the value beyond which a sample has failed; None where that is not known.
    """

    metric: str
    unit: str
    higher_is_better: bool
    attack: str
    level_unit: str
    levels: tuple[float, ...]
    scale: float
    rows: tuple[Row, ...]
    fails_at: float | None = None

    @property
    def label(self) -> str:
        """Metric and unit."""
        return f"{self.metric} ({self.unit})" if self.unit else self.metric

    @property
    def nobody(self) -> str | None:
        """That no model is robust, and where; None if one is."""
        return nobody(
            [row.model for row in self.rows],
            self.levels,
            np.stack([row.curve for row in self.rows]),
            attack=self.attack,
            label=self.label,
            show=lambda value: f"{value:.4g}",
            higher_is_better=self.higher_is_better,
            fails_at=self.fails_at,
        )

    @property
    def columns(self) -> list[str]:
        """Headings: clean, every level, their mean, AUC_robust."""
        return ["clean", *(f"{level:g}" for level in self.levels[1:]), "mean", "AUC_robust"]

    def numbers(self, curves: Array) -> Array:
        """Curves (..., L) as the columns of the table, (..., L + 2)."""
        mean, auc = curves[..., 1:].mean(-1), auc_robust_of_curves(self.levels, curves, self.scale)
        return np.concatenate([curves, mean[..., None], auc[..., None]], axis=-1)

    def values(self, row: Row) -> Array:
        """The numbers of a model, (L + 2,); of several trainings their mean."""
        if row.runs is not None:
            return np.asarray(self.numbers(np.stack(list(row.runs.values()))).mean(0))
        return self.numbers(row.curve)

    def intervals(self, row: Row) -> Array:
        """Of the numbers of a model, (2, L + 2); NaN without draws, or with one training of those that are repeated."""
        if row.runs is not None:
            return repeats_interval(self.numbers(np.stack(list(row.runs.values()))))
        if row.draws is None:
            return np.full((2, len(self.columns)), np.nan)
        found = interval(self.numbers(row.draws), units=row.units)
        if row.is_share:
            found[:, : len(self.levels)] = share_interval(row.curve, units=row.units)
        return found

    def others(self, baseline: Row) -> list[Row]:
        """The models that can be compared with it sample by sample, or training by training."""
        return [row for row in self.rows if row is not baseline and _paired(row, baseline)]

    def differences(self, row: Row, baseline: Row) -> tuple[Array, Array]:
        """Numbers of a model less those of another, (L + 2,), and the paired intervals, (2, L + 2).

        The intervals hold for all models that are compared with the baseline at once (Bonferroni). NaN where the two
        are of other samples. Repeated trainings are paired by their report: the same seed, or fold.
        """
        gain = self.values(row) - self.values(baseline)
        paired = _paired(row, baseline)
        confidence = 1 - (1 - CONFIDENCE) / max(1, len(self.others(baseline)))
        if paired and row.runs is not None and baseline.runs is not None:
            both = [name for name in row.runs if name in baseline.runs]
            gains = np.stack([self.numbers(row.runs[name]) - self.numbers(baseline.runs[name]) for name in both])
            return gains.mean(0), repeats_interval(gains, confidence=confidence)
        if not paired or row.draws is None or baseline.draws is None:
            return (gain if paired else np.full_like(gain, np.nan)), np.full((2, gain.size), np.nan)
        drawn = self.numbers(row.draws) - self.numbers(baseline.draws)
        return gain, interval(drawn, units=row.units, confidence=confidence)

    def front(self, names: Sequence[str]) -> list[Row]:
        """The models of a front, in the order of its dial.

        Args:
            names: of models, in their order, or patterns of them such as "SAT*", whose models are ordered by the
                numbers in their names: SAT2 before SAT10.

        Raises:
            ValueError: for a name that no model has.
        """
        found: dict[str, Row] = {}
        for name in names:
            fitting = [row for row in self.rows if row.model == name or fnmatchcase(row.model, name)]
            if not fitting:
                raise ValueError(
                    f"no model is called {name!r}, of the front; there are {', '.join(row.model for row in self.rows)}"
                )
            found |= {row.model: row for row in sorted(fitting, key=lambda row: _by_number(row.model))}
        return list(found.values())

    def beyond(self, row: Row, front: Sequence[Row]) -> tuple[float, Array]:
        """Mean over the levels, better by so much than that of the front at the same clean value; and its interval.

        See :func:`advmed.report.front.attainable`. NaN where no model of the front is as good on clean images. The
        interval holds for all models beside the front at once (Bonferroni), and is NaN where trainings, or resampled
        samples, do not pair or leave the front.
        """
        gain = float(self._beyond(row.curve, [one.curve for one in front]))
        members = [row, *front]
        unknown = np.full(2, np.nan)
        confidence = 1 - (1 - CONFIDENCE) / max(1, len(self.rows) - len(front))
        if row.runs is not None:
            both = [name for name in row.runs if all(one.runs is not None and name in one.runs for one in front)]
            if not both:
                return gain, unknown
            runs = [np.stack([one.runs[name] for name in both]) for one in members if one.runs is not None]
            gains = self._beyond(runs[0], runs[1:])
            if np.isnan(gains).any():  # of the means, of the same trainings each
                return float(self._beyond(runs[0].mean(0), [one.mean(0) for one in runs[1:]])), unknown
            return float(gains.mean()), repeats_interval(gains, confidence=confidence)
        if any(one.draws is None or not _paired(one, row) for one in front) or row.draws is None:
            return gain, unknown
        drawn = self._beyond(row.draws, [one.draws for one in front if one.draws is not None])
        return gain, unknown if np.isnan(drawn).any() else interval(drawn, units=row.units, confidence=confidence)

    def _beyond(self, curves: Array, front: Sequence[Array]) -> Array:
        """Of curves (..., L), beside as many of each model of the front."""
        sign = 1 if self.higher_is_better else -1
        line = sign * np.stack(front, axis=-2)
        reached = attainable(line[..., 0], line[..., 1:].mean(-1), sign * curves[..., 0])
        return np.asarray(sign * curves[..., 1:].mean(-1) - reached)


def _by_number(name: str) -> list[tuple[float, str]]:
    """A key that sorts names as their numbers go."""
    parts = re.split(r"([0-9]+(?:[.][0-9]+)?)", name)
    return [(float(part), "") if k % 2 else (0.0, part) for k, part in enumerate(parts)]


def _paired(one: Row, other: Row) -> bool:
    """Whether two models saw the same samples, or have trainings in the same reports."""
    if one.runs is not None and other.runs is not None:
        return bool(set(one.runs) & set(other.runs))
    return one.seed == other.seed


def compare_reports(
    reports: Sequence[Report],
    *,
    metric: str | None = None,
    attack: str | None = None,
    tasks: bool = False,
    repeats: bool = False,
) -> list[Section]:
    """The models of all reports, side by side.

    Args:
        reports: two or more, or one with several models.
        metric: the metric; default: the first of each report.
        attack: the attack; default: the first of each report.
        tasks: reports that measured something else become sections of their own, instead of being refused.
        repeats: models of one name are trainings of the same (other seeds, other folds), one in each report, and become
            one row, their mean.

    Raises:
        ValueError: for reports that lack the metric or attack, or whose numbers cannot stand in one column, also
            because the same samples have another truth; for repeats of which there are none.
    """
    chosen = [(report, *_choose(report, metric, attack)) for report in reports]
    first = chosen[0][0].setting(*chosen[0][1:])
    groups: dict[str, list[tuple[Report, str, str]]] = {}
    for report, name, method in chosen:
        setting = report.setting(name, method)
        differ = [key for key in first if setting[key] != first[key]]
        if differ and not tasks:
            there, here = ({key: s[key] for key in differ} for s in (first, setting))
            raise ValueError(
                f"{report.path} cannot stand beside {reports[0].path}: they differ in {', '.join(differ)} "
                f"({_short(here)}, there {_short(there)}). Evaluate them alike, or put them side by side with --tasks"
            )
        key = json.dumps(setting, sort_keys=True)
        while other := next((member for member, *_ in groups.get(key, ()) if _at_odds(report, member)), None):
            if not tasks:
                raise ValueError(
                    f"{report.path} cannot stand beside {other.path}: they are of the same samples with another truth "
                    f"(other labels, points or spacing). Evaluate all on the same data, or put them side by side with "
                    f"--tasks"
                )
            key += "'"
        groups.setdefault(key, []).append((report, name, method))
    twice = len({model for report in reports for model in report.models}) < sum(len(r.models) for r in reports)
    if repeats and not twice:
        raise ValueError(
            "no model is in two of these reports: --repeats wants a report for each seed or fold, in which the models "
            "have the same names"
        )
    names = _apart([report.path.resolve().parent for report in reports]) if repeats else None
    return [_section(members, twice, names) for members in groups.values()]


def _apart(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder by what tells it from the others, such as "0/report" and "1/report"."""
    above = Path(os.path.commonpath(folders))
    return {folder: folder.relative_to(above).as_posix() for folder in folders}


def _choose(report: Report, metric: str | None, attack: str | None) -> tuple[str, str]:
    """The metric and attack of a report."""
    for kind, name, known in (("metric", metric, list(report.metrics)), ("attack", attack, report.aimed)):
        if name is not None and name not in known:
            raise ValueError(f"{report.path} has no {kind} {name!r}; it has {', '.join(known)}")
        if not known:
            raise ValueError(f"{report.path} has no {kind} to compare")
    return metric or next(iter(report.metrics)), attack or report.aimed[0]


def _section(members: Sequence[tuple[Report, str, str]], twice: bool, repeats: Mapping[Path, str] | None) -> Section:
    """``repeats``: names of the reports' folders, where models of one name become one row."""
    report, metric, attack = members[0]
    if repeats is None:
        rows = [row for member in members for row in _rows(*member, twice)]
    else:
        named = [(repeats[member[0].path.resolve().parent], member) for member in members]
        rows = _means([replace(row, report=name) for name, member in named for row in _rows(*member, False)])
    names = [row.model for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"two models are called alike in reports of the same name, {sorted(names)}; rename a folder")
    about = report.metrics[metric]
    scale = about["scale"]
    if scale is None:  # the paper's way: the largest value of all that are compared
        values = np.concatenate([row.curve for row in rows])
        scale = 1.0 if about["higher_is_better"] else float(np.nanmax(values))
    return Section(
        metric,
        about["unit"],
        about["higher_is_better"],
        attack,
        report.record["configuration"]["level_unit"],
        tuple(report.evaluation["levels"]),
        scale,
        tuple(rows),
        next((f for f in (r.record["results"][m].get("fails_at") for r, m, _ in members) if f is not None), None),
    )


def _rows(report: Report, metric: str, attack: str, twice: bool) -> Iterator[Row]:
    found, draws = report.record["results"][metric]["models"], report.draws.get(metric)
    a = list(report.evaluation["attacks"]).index(attack)
    for m, model in enumerate(report.models):
        values = found[model]["attacks"][attack]["values"]
        yield Row(
            report.name,
            f"{report.name}: {model}" if twice else model,
            np.array([math.nan if value is None else value for value in values], dtype=np.float64),
            None if draws is None or not len(draws) else draws[:, m, a],
            (report.record["bootstrap"]["seed"], report.record["results"][metric]["draws"]),
            report.record["results"][metric].get("units", 0),
            report.record["results"][metric].get("is_share", False),
            tuple(c["name"] for c in report.record["checks"].get(model, []) if c["verdict"] == "failed"),
        )


def _means(rows: Sequence[Row]) -> list[Row]:
    """One row for all that are called alike."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.model, []).append(row)
    return [
        Row(
            ", ".join(row.report for row in group),
            model,
            np.mean([row.curve for row in group], axis=0),
            None,
            group[0].seed,
            group[0].units,
            False,
            tuple(dict.fromkeys(doubt for row in group for doubt in row.doubts)),
            {row.report: row.curve for row in group},
        )
        for model, group in groups.items()
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


# What is written


def format_sections(sections: Sequence[Section], baseline: str | None = None, front: Sequence[str] = ()) -> str:
    """Tables in Markdown: the models, their differences from the baseline (default: the first model), and from a front.

    Raises:
        ValueError: if a section has no model of the names.
    """
    lines = []
    for section in sections:
        rows, reference = section.rows, _reference(section, baseline)
        lines += [f"**{section.label}** under {section.attack}; noise level: {section.level_unit}", ""]
        repeated = rows[0].runs is not None
        if repeated:
            counts = {row.model: len(row.runs or ()) for row in rows}
            alike = len(set(counts.values())) == 1
            each = f"{counts[rows[0].model]} trainings of each" if alike else f"the trainings, {_listed(counts)}"
            lines += [f"Means over {each}, with Student's 95 % intervals over these.", ""]
        lines += _markdown(["model", *section.columns], [[_mark(row), *_cells(section, row)] for row in rows])
        if section.nobody is not None:
            lines += ["", f"! {section.nobody}"]
        others = section.others(reference)
        if others:
            many = f" (95 % for all {len(others)} models at once, by Bonferroni)" if len(others) > 1 else ""
            by = "training" if repeated else "sample"
            lines += ["", f"Differences from {reference.model}, paired by {by}, with 95 % intervals{many}:", ""]
            changes = [[_mark(row), *_changes(section, row, reference)] for row in others]
            lines += _markdown(["model", *section.columns], changes)
        left = [row.model for row in rows if not _paired(row, reference)]
        if left:
            other = "In no report of" if repeated else "Of other samples than"
            lines += ["", f"{other} {reference.model}, hence without differences: {', '.join(left)}."]
        if front:
            lines += ["", *_beside(section, section.front(front))]
        doubted = [f"{row.model} ({', '.join(row.doubts)})" for row in rows if row.doubts]
        if doubted:
            lines += ["", f"! Checks of the attack failed, do not rely on the robustness of: {'; '.join(doubted)}."]
        lines.append("")
    return "\n".join(lines)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in counts.items())


def _beside(section: Section, front: Sequence[Row]) -> Iterator[str]:
    """What the models have beyond a front, or why that cannot be said."""
    yield (
        f"Beyond the front of {', '.join(row.model for row in front)}: mean over the levels, better by so much (worse: "
        f"-) than these reach at the same clean value or a better one; 95 % for all at once:"
    )
    yield ""
    cells = [[_mark(row), _beyond_cell(section, row, front)] for row in section.rows if row not in front]
    yield from _markdown(["model", BEYOND], cells)


def _beyond_cell(section: Section, row: Row, front: Sequence[Row]) -> str:
    gain, (low, high) = section.beyond(row, front)
    if math.isnan(gain):
        return "none of the front is as good on clean images"
    text = f"{gain:+.4g}" + (f" ({low:+.4g} to {high:+.4g})" if np.isfinite([low, high]).all() else "")
    sign = 1 if section.higher_is_better else -1
    if sign * row.curve[0] < min(sign * one.curve[0] for one in front):
        return f"{text}, and less accurate on clean images than all of the front: its next setting may have as much"
    sound = not any(one.doubts for one in (row, *front))
    better = low > 0 or high < 0
    return f"**{text}**" if sound and better else text


def _reference(section: Section, baseline: str | None) -> Row:
    """The model that the others are compared with.

    Raises:
        ValueError: if there is none of that name.
    """
    if baseline is None:
        return section.rows[0]
    found = [row for row in section.rows if row.model == baseline]
    if not found:
        raise ValueError(f"there is no model {baseline!r}; there are {', '.join(row.model for row in section.rows)}")
    return found[0]


def _mark(row: Row) -> str:
    return f"{row.model} !" if row.doubts else row.model


def _cells(section: Section, row: Row) -> list[str]:
    low, high = section.intervals(row)
    return [
        f"{value:.4g}" + (f" ({a:.4g} to {b:.4g})" if np.isfinite([a, b]).all() else "")
        for value, a, b in zip(section.values(row), low, high, strict=True)
    ]


def _changes(section: Section, row: Row, reference: Row) -> list[str]:
    """Differences; bold where the interval does not hold 0, unless a failed check says that they may be wrong."""
    sound = not (row.doubts or reference.doubts)
    gain, (low, high) = section.differences(row, reference)
    texts = []
    for value, a, b in zip(gain, low, high, strict=True):
        text = f"{value:+.4g}" + (f" ({a:+.4g} to {b:+.4g})" if np.isfinite([a, b]).all() else "")
        texts.append(f"**{text}**" if sound and (a > 0 or b < 0) else text)
    return texts


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def write_comparison(
    folder: Path, sections: Sequence[Section], baseline: str | None = None, front: Sequence[str] = ()
) -> list[Path]:
    """Writes compare.md, compare.csv (one number per row), compare.json and compare.png.

    Args:
        folder: made if it is not there; a comparison in it is renewed.
        sections: see :func:`compare_reports`.
        baseline: the model that the others are compared with; default: the first of each section.
        front: names of models, or patterns of them, in the order of their dial, that are one method's front.

    Raises:
        ValueError: if a section has no such model; nothing is written.
    """
    table, picture = format_sections(sections, baseline, front), draw(sections, front)
    rows = [row for section in sections for row in _tidy(section, _reference(section, baseline), front)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"compare.{kind}" for kind in ("md", "csv", "json", "png")]
    write_whole(paths[0], table)
    with replacing(paths[1]) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    write_whole(paths[2], json.dumps({"format": FORMAT, "rows": rows}, indent=1, allow_nan=False))
    write_whole(paths[3], picture)
    return paths


def _tidy(section: Section, reference: Row, front: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One number per row."""

    def plain(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    members = section.front(front)
    for row in section.rows:
        gain, bounds = section.differences(row, reference)
        columns, values, intervals = section.columns, section.values(row), section.intervals(row)
        if front:
            more, its = section.beyond(row, members) if row not in members else (math.nan, np.full(2, np.nan))
            columns, values = [*columns, BEYOND], np.append(values, more)
            intervals = np.column_stack([intervals, its])
            gain, bounds = np.append(gain, np.nan), np.column_stack([bounds, np.full(2, np.nan)])
        for k, (column, value) in enumerate(zip(columns, values, strict=True)):
            yield {
                "report": row.report,
                "model": row.model,
                "trainings": 1 if row.runs is None else len(row.runs),
                "metric": section.metric,
                "higher_is_better": section.higher_is_better,
                "attack": section.attack,
                "column": column,
                "value": plain(value),
                "low": plain(intervals[0, k]),
                "high": plain(intervals[1, k]),
                "baseline": reference.model,
                "difference": plain(gain[k]),
                "difference_low": plain(bounds[0, k]),
                "difference_high": plain(bounds[1, k]),
                "failed_checks": " ".join(row.doubts),
            }


@figures.own_style()
def draw(sections: Sequence[Section], front: Sequence[str] = ()) -> bytes:
    """Two panels for each section, with intervals: the metric over the noise level, and attacked over clean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.2 * len(sections), 4.0), layout="constrained", facecolor=figures.LIGHT.background)
    panels = figure.subplots(1, 2 * len(sections), squeeze=False)[0]
    for section, axes, beside in zip(sections, panels[::2], panels[1::2], strict=True):
        for m, row in enumerate(section.rows):
            low, high = section.intervals(row)[:, : len(section.levels)]
            figures.draw_line(axes, section.levels, row.curve, low, high, m, _mark(row), figures.LIGHT)
        figures.finish(axes, section.levels, section.label, section.higher_is_better, figures.LIGHT)
        axes.set_title(figures.verbatim(section.attack), loc="left", fontsize=11, color=figures.LIGHT.ink)
        chosen = [0, section.columns.index("mean")]
        figures.draw_points(
            beside,
            np.stack([section.values(row)[chosen] for row in section.rows]),
            np.stack([section.intervals(row)[:, chosen] for row in section.rows]),
            [_mark(row) for row in section.rows],
            [section.rows.index(row) for row in section.front(front)],
            section.label,
            section.higher_is_better,
            figures.LIGHT,
        )
    return figures.png(figure)
