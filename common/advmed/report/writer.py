"""The files of a report: numbers as JSON, CSV and npz (docs/report-format.md), and the page."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from advmed.evaluation.checks import Check
from advmed.evaluation.intervals import CONFIDENCE, LEAST, seed_of
from advmed.evaluation.loop import Condition
from advmed.evaluation.metric import Metric
from advmed.evaluation.subjects import Entry
from advmed.files import write_whole
from advmed.report import figures
from advmed.report.failures import Failures, count_failures
from advmed.report.figures import Example
from advmed.report.page import render_page
from advmed.report.summary import Array, Table, cautions, doubts, findings, tabulate, verdict

FORMAT = "advmed.report/2"
FILES = ("report.json", "results.csv", "samples.csv", "table.csv", "draws.npz", "curves.png", "report.html")


def write_report(
    folder: Path,
    entries: Sequence[Entry],
    metrics: Sequence[Metric],
    *,
    title: str,
    level_unit: str,
    examples: Sequence[Example] = (),
    class_names: Mapping[int, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    groups: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a report: numbers, tables, curves and a page; one of the same configuration in the folder is renewed.

    Args:
        folder: made if it is not there.
        entries: the models, evaluated alike.
        metrics: the metrics; the findings speak of the first.
        title: of the page.
        level_unit: what a noise level is, completing "Noise level: ...", such as "L2 norm of the noise over the whole
            network input, in units of the normalised intensities".
        examples: samples to be shown.
        class_names: names of foreground labels, for the legend of the examples.
        settings: what else a reader should know (data set, fold, checkpoint files), shown as given.
        groups: to which each sample belongs that is no independent piece of evidence, such as its patient: the
            bootstrap of the intervals draws them whole. None: samples are independent.
        overwrite: replaces a report of another configuration.

    Returns:
        The path of report.html.

    Raises:
        ValueError: for models that were not evaluated alike, or examples whose arrays do not fit together.
        FileExistsError: if the folder holds another report and ``overwrite`` is False; it stays untouched.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from advmed import Entry, EvaluationBatch, LoadedBatch, Metric, evaluate, parse_attacks, write_report
        >>> darker = lambda images: -images.flatten(1).mean(1, keepdim=True)
        >>> batch = LoadedBatch(torch.ones(2, 1, 2, 2), darker, lambda images: {"mean": images.mean((1, 2, 3))})
        >>> found = evaluate([EvaluationBatch(["a", "b"], lambda: batch)], parse_attacks(["ifgsm10"]), [0, 1])
        >>> metric = Metric("mean", lambda scores: float(scores["mean"].mean()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_report(Path(folder), [Entry("model", found)], [metric], title="Test", level_unit="L2 norm")
        ...     sorted(path.name for path in page.parent.glob("re*"))
        ['report.html', 'report.json', 'results.csv']
    """
    tables = tabulate(entries, metrics, groups)
    failures = count_failures(entries, metrics)
    evaluations = {entry.name: entry.evaluation.configuration for entry in entries}
    configuration = configure(evaluations, entries[0].evaluation.ids, metrics, level_unit, settings or {})
    if not overwrite:
        refuse_another(folder, configuration)
    record = _record(entries, tables, failures, configuration, title, groups)
    page = render_page(record, entries, tables, failures, examples, class_names or {}, grouped=groups is not None)
    contents = {
        "report.json": json.dumps(record, indent=1, allow_nan=False).encode(),
        "results.csv": _csv(_result_rows(tables)),
        "samples.csv": _csv(_sample_rows(entries, metrics)),
        "table.csv": _csv(_table_rows(tables)),
        "draws.npz": _draws(tables),
        "curves.png": figures.curves(tables),
        "report.html": page.encode(),
    }
    # Everything is made before anything is written, and the record that claims the folder comes first.
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        write_whole(folder / name, contents[name])
    return folder / "report.html"


def configure(
    evaluations: Mapping[str, Mapping[str, Any]],
    samples: Sequence[str],
    metrics: Sequence[Metric],
    level_unit: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What two reports must share to count as the same.

    Args:
        evaluations: the configuration of each model's evaluation, by the model's name.
        samples: their ids.
        metrics: the metrics.
        level_unit: see :func:`write_report`.
        settings: see :func:`write_report`.
    """
    first = next(iter(evaluations.values()))
    configuration = {
        "evaluation": {name: value for name, value in first.items() if name != "fingerprint"},
        "models": {name: evaluation["fingerprint"] for name, evaluation in evaluations.items()},
        "metrics": {
            m.name: {"higher_is_better": m.higher_is_better, "scale": m.scale, "unit": m.unit} for m in metrics
        },
        "samples": list(samples),
        "level_unit": level_unit,
        "settings": settings,
    }
    plain: dict[str, Any] = json.loads(json.dumps(configuration, default=str))
    return plain


def refuse_another(folder: Path, configuration: Mapping[str, Any], *, before: bool = False) -> None:
    """Looks at a folder before anything is written into it.

    Args:
        folder: of the report.
        configuration: of :func:`configure`.
        before: nothing is measured yet: what the finished batches in the folder tell more exactly (attacks, levels,
            samples, checkpoints) is left to them.

    Raises:
        FileExistsError: if it holds a report of another configuration.
    """
    present = [name for name in FILES if (folder / name).exists()]
    if not present:
        return
    try:
        found = json.loads((folder / "report.json").read_text())["configuration"]
        if before:
            found, configuration = _without_measurement(found), _without_measurement(configuration)
        differ = [name for name in configuration if found.get(name) != configuration[name]]
        reason = f"a report of another configuration (it differs in {', '.join(differ)})" if differ else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        reason = f"files that may be of another report ({', '.join(present)})"
    if reason:
        raise FileExistsError(f"{folder} already holds {reason}: choose another folder, or ask to overwrite it")


def _without_measurement(configuration: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in configuration.items() if name not in ("evaluation", "samples")}
    return {**kept, "models": sorted(configuration["models"])}


def _record(
    entries: Sequence[Entry],
    tables: Sequence[Table],
    failures: Failures | None,
    configuration: Mapping[str, Any],
    title: str,
    groups: Sequence[str] | None,
) -> dict[str, Any]:
    """report.json: all numbers but those of single samples. What is not a number is null."""
    trusted, sentence = verdict(entries)
    return {
        "format": FORMAT,
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            **entries[0].evaluation.configuration["versions"],
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "platform": {"system": platform.system(), "machine": platform.machine()},  # no name of a computer, no paths
        "devices": {entry.name: entry.evaluation.clean.device for entry in entries},
        "configuration": dict(configuration),
        "verdict": {"trusted": trusted, "text": sentence},
        "findings": findings(tables[0], doubts(entries)),
        "cautions": cautions(entries, tables),
        "results": {
            table.metric.name: {
                "scale": table.scale,
                "draws": len(table.draws),
                "units": table.units,
                "is_share": table.is_share,
                "fails_at": table.metric.fails_at,
                "models": {model: _of_model(table, m) for m, model in enumerate(table.models)},
            }
            for table in tables
        },
        "checks": {entry.name: [_of_check(check) for check in entry.checks] for entry in entries},
        "bootstrap": {
            "confidence": CONFIDENCE,
            "least_units": LEAST,
            "seed": seed_of(entries[0].evaluation.ids, groups),
            "groups": None if groups is None else len(set(groups)),
        },
        "failures": None if failures is None else _failures(failures),
        "attacks": {entry.name: _effort(entry) for entry in entries},
        "margins": {entry.name: _distribution(entry.margins) for entry in entries if entry.margins is not None},
    }


def _of_check(check: Check) -> dict[str, Any]:
    return asdict(check) | {"figures": {name: _number(value) for name, value in check.figures.items()}}


def _of_model(table: Table, m: int) -> dict[str, Any]:
    """The numbers of one model in one metric; each interval is [lowest, highest]."""
    values, auc = table.intervals, table.interval(table.auc_draws)
    mean = table.interval(table.draws[..., 1:].mean(-1))
    return {
        "clean": _number(table.values[m, 0, 0]),
        "clean_interval": _pair(values[:, m, 0, 0]),
        "attacks": {
            attack: {
                "levels": list(table.levels),
                "values": [_number(value) for value in table.values[m, a]],
                "intervals": [_pair(values[:, m, a, k]) for k in range(len(table.levels))],
                "attacked_mean": _number(table.attacked_mean[m, a]),
                "attacked_mean_interval": _pair(mean[:, m, a]),
                "auc_robust": _number(table.auc[m, a]),
                "auc_robust_interval": _pair(auc[:, m, a]),
            }
            for a, attack in enumerate(table.attacks)
        },
    }


def _failures(failures: Failures) -> dict[str, Any]:
    """From which level on samples fail; null: at none, or without a value."""
    return {
        "criterion": failures.metric.failure,
        "levels": list(failures.levels),
        "share": {model: [_number(v) for v in row] for model, row in zip(failures.models, failures.share, strict=True)},
        "median": dict(zip(failures.models, map(_number, failures.quantile(0.5)), strict=True)),
        "smallest_level": {
            model: dict(zip(failures.ids, map(_number, row), strict=True))
            for model, row in zip(failures.models, failures.smallest, strict=True)
        },
    }


def _effort(entry: Entry) -> dict[str, Any]:
    """Per attack and level above 0: what it cost, and what noise it made."""
    evaluation = entry.evaluation
    return {
        name: {
            "access": attack.access,
            "description": attack.description,
            "recipe": getattr(attack, "recipe", None),  # only attacks that are one have it
            "gradients_per_image": attack.gradients,
            "queries_per_image": attack.queries,
            "seconds": [evaluation.at(name, level).seconds for level in evaluation.levels[1:]],
            "mean_loss": [_number(evaluation.at(name, level).loss.mean()) for level in evaluation.levels[1:]],
            "mean_norm": [_number(evaluation.at(name, level).norm.mean()) for level in evaluation.levels[1:]],
            "nonfinite_steps": [int(evaluation.at(name, level).nonfinite.sum()) for level in evaluation.levels[1:]],
        }
        for name, attack in evaluation.attacks.items()
    }


def _distribution(margins: Array) -> dict[str, Any]:
    quantiles = {f"{q:g}": _number(np.quantile(margins, q)) for q in (0, 0.25, 0.5, 0.75, 1)}
    return {"n": int(margins.size), "mean": _number(margins.mean()), "quantiles": quantiles}


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _pair(bounds: Array) -> list[float | None]:
    return [_number(bound) for bound in bounds]


def _result_rows(tables: Sequence[Table]) -> Iterator[list[Any]]:
    """One number per row, with its interval: what a data frame wants."""
    yield ["metric", "model", "attack", "access", "level", "value", "low", "high"]
    for table in tables:
        intervals = table.intervals
        for m, model in enumerate(table.models):
            for a, attack in enumerate(table.attacks):
                access = "none" if attack in table.controls else "attack"
                for k, level in enumerate(table.levels):
                    cells = (table.values[m, a, k], *intervals[:, m, a, k])
                    yield [table.metric.name, model, attack, access, f"{level:.9g}", *map(_cell, cells)]


def _draws(tables: Sequence[Table]) -> bytes:
    """The bootstrap draws, one array (count, models, attacks, levels) per metric, without pickled objects."""
    file = io.BytesIO()
    arrays: dict[str, Any] = {table.metric.name: table.draws.astype(np.float32) for table in tables}
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _table_rows(tables: Sequence[Table]) -> Iterator[list[Any]]:
    yield ["metric", "model", *(f"{attack} {heading}".strip() for attack, heading in tables[0].columns)]
    for table in tables:
        for model, cells in zip(table.models, table.cells, strict=True):
            yield [table.metric.name, model, *map(_cell, cells)]


def _sample_rows(entries: Sequence[Entry], metrics: Sequence[Metric]) -> Iterator[list[Any]]:
    """One row per model, sample and pass. Scores with more than one number per class (boxes, say) are left out."""
    first = entries[0].evaluation
    per_sample = [metric for metric in metrics if metric.per_sample is not None]
    shown = {name: score for name, score in first.clean.scores.items() if score.ndim <= 2}
    names = [name for name, score in shown.items() if score.ndim == 1]
    names += [f"{name}[{c}]" for name, score in shown.items() if score.ndim == 2 for c in range(score.shape[1])]
    yield ["model", "id", "attack", "level", "norm", "loss", "nonfinite", *(m.name for m in per_sample), *names]
    for entry in entries:
        passes: list[tuple[str, float, Condition]] = [("clean", 0.0, entry.evaluation.clean)]
        measured = {**entry.evaluation.attacked, **entry.evaluation.members}
        passes += [(attack, level, condition) for (attack, level), condition in measured.items()]
        for attack, level, c in passes:
            values = [metric.per_sample(c.scores) for metric in per_sample if metric.per_sample is not None]
            values += [c.scores[name] for name, score in shown.items() if score.ndim == 1]
            values += [column for name, score in shown.items() if score.ndim == 2 for column in c.scores[name].T]
            for id_, *row in zip(entry.evaluation.ids, c.norm, c.loss, c.nonfinite, *values, strict=True):
                yield [entry.name, id_, attack, f"{level:.9g}", *map(_cell, row)]


def _cell(value: Any) -> str:
    """Nine digits give back a float32 as it was; an empty cell is no number."""
    return ("" if np.isnan(value) else f"{value:.9g}") if np.issubdtype(type(value), np.floating) else str(value)


def _csv(rows: Iterator[list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
