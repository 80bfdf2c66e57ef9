"""Several trained models under the same attacks, in one report: what every host's ``evaluate`` command ends in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advmed.attacks import Attack, Noise
from advmed.distributed import Processes
from advmed.evaluation.checks import Check, check, level_to_check, probes, strongest
from advmed.evaluation.loop import Evaluation, EvaluationBatch, describe, evaluate_with_bar
from advmed.evaluation.metric import Metric
from advmed.report import Entry, Example, format_table, tabulate, write_report
from advmed.report.failures import count_failures
from advmed.report.summary import Array, verdict
from advmed.report.writer import configure, refuse_another
from advmed.thresholds import sha256


@dataclass(frozen=True)
class Subject:
    """One trained model of a comparison.

    Attributes:
        name: what the report calls it.
        checkpoint: its file; the numbers of an earlier run count only if it is the same.
        batches: what it is evaluated on, see :func:`advmed.evaluation.loop.evaluate`.
        margins: the noise levels that its training ended with, (N,), or None.
        few: makes batches of so many of the samples, at even distances, for the checks of the attack; None for none.
    """

    name: str
    checkpoint: Path
    batches: Sequence[EvaluationBatch]
    margins: Array | None = None
    few: Callable[[int], Sequence[EvaluationBatch]] | None = None


Examples = Callable[[tuple[str, Any], Sequence[float], Sequence[str]], Sequence[Example]]
"""Makes the pictures: from an attack with its name, the levels above 0, and the ids of the samples to show."""


def compare(
    folder: Path,
    subjects: Sequence[Subject],
    attacks: Mapping[str, Attack],
    levels: Sequence[float],
    metrics: Sequence[Metric],
    *,
    examples: Examples,
    shown: int = 4,
    fingerprint: Mapping[str, Any],
    checks: int = 0,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    groups: Callable[[str], str] | None = None,
    overwrite: bool = False,
    say: Callable[[str], object] = print,
    **report: Any,
) -> Path:
    """Evaluates the models one after the other, writes their report, and says its tables.

    Under torchrun the processes share the batches, and the first of them writes the report.

    Args:
        folder: of the report; what is finished in it is not computed again.
        subjects: the models.
        attacks: attacks by name, the strongest first; noise of the same norm is added as their control.
        levels: noise levels, 0 first.
        metrics: the metrics, the most important first.
        examples: makes the pictures.
        shown: number of samples in them: of those that fail first and of those that fail last.
        fingerprint: what the numbers depend on beside the checkpoint, JSON-ready.
        checks: number of samples that the attack is checked on, see :mod:`advmed.evaluation.checks`; 0 for no checks.
        bounds: lowest and highest value of an input.
        seed: of the random starts.
        groups: to which group a sample belongs, by its id, for the bootstrap; None for independent samples.
        overwrite: replaces what another evaluation left in the folder.
        say: prints or logs a text.
        **report: ``title``, ``level_unit``, ``class_names`` and ``settings`` of
            :func:`advmed.report.write_report`.

    Returns:
        The path of report.html.
    """
    check_numbers(samples=None, examples=shown, checks=checks)
    _check_alike(subjects)
    processes = Processes.of_environment()
    attacks = with_control(attacks)

    how: dict[str, Any] = {"bounds": bounds, "seed": seed}
    marks = {
        subject.name: json.dumps({"checkpoint": sha256(subject.checkpoint), **fingerprint}, default=str)
        for subject in subjects
    }
    if not overwrite:  # said before hours of measuring rather than after them
        planned = {name: describe(attacks, levels, fingerprint=mark, **how) for name, mark in marks.items()}
        ids = [str(id_) for batch in subjects[0].batches for id_ in batch.ids]
        settings = report.get("settings") or {}
        refuse_another(folder, configure(planned, ids, metrics, report["level_unit"], settings), before=True)

    def measure(name: str, subject: Subject, batches: Sequence[EvaluationBatch], *what: Any) -> Evaluation:
        return evaluate_with_bar(
            name,
            batches,
            *what,
            folder=folder,
            overwrite=overwrite,
            processes=processes,
            fingerprint=marks[subject.name],
            **how,
        )

    entries = []
    criterion = next((metric for metric in metrics if metric.fails_at is not None), metrics[0])
    for subject in subjects:
        measured = measure(subject.name, subject, subject.batches, attacks, levels)
        found: list[Check] = []
        name = strongest(attacks)
        if name is not None and checks and subject.few is not None:
            level = level_to_check(measured, name, criterion)
            place = f"{subject.name}/checks_{checks}_{level:g}"
            probed = measure(place, subject, subject.few(checks), probes(attacks[name]), (0.0, level))
            found = check(measured, name, probed, criterion)
        entries.append(Entry(subject.name, measured, subject.margins, found))
    page = folder / "report.html"
    if processes.rank == 0:
        failures = count_failures(entries, metrics)
        ids = failures.first_and_last(shown) if failures else []
        ids = ids or [str(id_) for id_ in spread(entries[0].evaluation.ids, shown)]
        page = write_report(
            folder,
            entries,
            metrics,
            examples=examples(next(iter(attacks.items())), levels[1:], ids) if shown else [],
            groups=None if groups is None else [groups(id_) for id_ in measured.ids],
            overwrite=overwrite,
            **report,
        )
        for table in tabulate(entries, metrics, resample=False):
            say(f"\n{format_table(table)}")
        say(f"\n{verdict(entries)[1]}\n\nReport: {page}")
    processes.wait()
    return page


def check_numbers(*, samples: Any, examples: Any, checks: Any) -> None:
    """Numbers that a user gave: how many samples are evaluated (None: all), shown, and checked.

    Raises:
        ValueError: for one that is no whole number, or too small.
    """
    for name, value, least in (("samples", samples, 1), ("examples", examples, 0), ("checks", checks, 0)):
        if name == "samples" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")


def _check_alike(subjects: Sequence[Subject]) -> None:
    """Models have names of their own and the same samples: said before hours of measuring rather than after them."""
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a report needs one or more models of different names, got {names}")
    ids = [[id_ for batch in subject.batches for id_ in batch.ids] for subject in subjects]
    for subject, own in zip(subjects, ids, strict=True):
        if own != ids[0]:
            raise ValueError(f"{subject.name} and {subjects[0].name} cannot be compared: their samples differ")


def with_control(attacks: Mapping[str, Attack]) -> dict[str, Attack]:
    """The attacks and, unless one of them is noise that no one has aimed, Gaussian noise of their norm."""
    if not attacks or any(attack.access == "none" for attack in attacks.values()):
        return dict(attacks)
    return {**attacks, "gaussian": Noise("gaussian", next(iter(attacks.values())).norm)}


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """So many of the items, at even distances."""
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, min(number, len(items)))]
