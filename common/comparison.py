"""Several trained models under the same attacks, in one report: what every host's ``evaluate`` command ends in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.evaluation import Attack, EvaluationBatch, evaluate_with_bar
from common.report import Entry, Example, Metric, format_table, tabulate, write_report
from common.report.summary import Array
from common.thresholds import sha256


@dataclass(frozen=True)
class Subject:
    """One trained model of a comparison.

    Attributes:
        name: what the report calls it.
        checkpoint: its file; the numbers of an earlier run count only if it is the same.
        batches: what it is evaluated on, see :func:`common.evaluation.evaluate`.
        margins: the noise levels that its training ended with, (N,), or None.
    """

    name: str
    checkpoint: Path
    batches: Sequence[EvaluationBatch]
    margins: Array | None = None


def compare(
    folder: Path,
    subjects: Sequence[Subject],
    attacks: Mapping[str, Attack],
    levels: Sequence[float],
    metrics: Sequence[Metric],
    *,
    examples: Callable[[tuple[str, Any], Sequence[float]], Sequence[Example]],
    fingerprint: Mapping[str, Any],
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    say: Callable[[str], object] = print,
    **report: Any,
) -> Path:
    """Evaluates the models one after the other, writes their report, and says its tables.

    Args:
        folder: of the report; what is finished in it is not computed again.
        subjects: the models.
        attacks: attacks by name, the strongest first.
        levels: noise levels, 0 first.
        metrics: the metrics, the most important first.
        examples: makes the pictures, from the first attack with its name, and the levels above 0.
        fingerprint: what the numbers depend on beside the checkpoint, JSON-ready.
        bounds: lowest and highest value of an input.
        seed: of the random starts.
        overwrite: replaces what another evaluation left in the folder.
        say: prints or logs a text.
        **report: ``title``, ``level_unit``, ``class_names`` and ``settings`` of
            :func:`common.report.write_report`.

    Returns:
        The path of report.html.
    """
    entries = []
    for subject in subjects:
        measured = evaluate_with_bar(
            subject.name,
            subject.batches,
            attacks,
            levels,
            folder=folder,
            overwrite=overwrite,
            bounds=bounds,
            seed=seed,
            fingerprint=json.dumps({"checkpoint": sha256(subject.checkpoint), **fingerprint}, default=str),
        )
        entries.append(Entry(subject.name, measured, subject.margins))
    pictures = examples(next(iter(attacks.items())), levels[1:])
    page = write_report(folder, entries, metrics, examples=pictures, overwrite=overwrite, **report)
    for table in tabulate(entries, metrics):
        say(f"\n{format_table(table)}")
    say(f"\nReport: {page}")
    return page
