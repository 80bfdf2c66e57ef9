"""Several trained models under the same attacks, measured one after the other."""

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
from advmed.evaluation.loop import ALONE, Evaluation, EvaluationBatch, evaluate_with_bar
from advmed.evaluation.metric import Array, Metric
from advmed.evaluation.worst import WorstOf
from advmed.files import sha256

WORST = "worst attack"
"""The row of a report that is the worst of all its attacks."""


@dataclass(frozen=True)
class Subject:
    """One trained model of a comparison.

    Attributes:
        name: what the report calls it.
        checkpoint: its file; the numbers of an earlier run count only if it is the same.
        batches: what it is evaluated on, see :func:`advmed.evaluation.loop.evaluate`.
        margins: the noise levels that its training ended with, (N,), or None.
        subset: makes batches of so many of the samples, at even distances, for the checks of the attack; None for none.
    """

    name: str
    checkpoint: Path
    batches: Sequence[EvaluationBatch]
    margins: Array | None = None
    subset: Callable[[int], Sequence[EvaluationBatch]] | None = None


@dataclass(frozen=True)
class Entry:
    """What was measured of a model.

    Attributes:
        name: as shown, such as "AMAT".
        evaluation: the numbers.
        margins: the margins that its training ended with, (n,), in units of the noise level; None for none.
        checks: what was found on whether the attacks are to be believed, as the commands look at it; empty where not
            looked at.

    Raises:
        ValueError: for margins that are none, or not finite.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from advmed import Entry, EvaluationBatch, LoadedBatch, evaluate, parse_attacks
        >>> objective = lambda images: images.flatten(1).sum(1, keepdim=True)
        >>> batch = LoadedBatch(torch.zeros(2, 1, 2, 2), objective, lambda images: {"sum": objective(images)[:, 0]})
        >>> found = evaluate([EvaluationBatch(["a", "b"], lambda: batch)], parse_attacks(["ifgsm10"]), [0, 1])
        >>> Entry("AMAT", found, margins=np.array([0.5, 1.0])).evaluation.levels
        (0.0, 1.0)
    """

    name: str
    evaluation: Evaluation
    margins: Array | None = None
    checks: Sequence[Check] = ()

    def __post_init__(self) -> None:
        if self.margins is not None and (self.margins.size == 0 or not np.isfinite(self.margins).all()):
            raise ValueError(f"margins of {self.name} must be one or more finite numbers, got {self.margins}")


def measure_subjects(
    folder: Path,
    subjects: Sequence[Subject],
    attacks: Mapping[str, Attack],
    levels: Sequence[float],
    metrics: Sequence[Metric],
    *,
    fingerprint: Mapping[str, Any],
    packages: Sequence[str] = (),
    checks: int = 0,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    processes: Processes = ALONE,
) -> list[Entry]:
    """Evaluates the models one after the other, and checks the strongest attack on each.

    Args:
        folder: finished batches of a model are in ``folder/name``, and not computed again.
        subjects: the models, see :func:`check_alike`.
        attacks: attacks by name, the strongest first.
        levels: noise levels, 0 first.
        metrics: the metrics; the first that knows failures judges the attack.
        fingerprint: what the numbers depend on beside the checkpoint, JSON-ready.
        packages: see :func:`advmed.evaluation.loop.evaluate`.
        checks: number of samples that the attack is checked on, see :mod:`advmed.evaluation.checks`; 0 for no checks.
        bounds: lowest and highest value of an input.
        seed: of the random starts.
        overwrite: replaces what another evaluation left in the folder.
        processes: the processes that share the work.
    """
    criterion = next((metric for metric in metrics if metric.fails_at is not None), metrics[0])
    checked = strongest(attacks)
    marks = {
        subject.name: json.dumps({"checkpoint": sha256(subject.checkpoint), **fingerprint}, default=str)
        for subject in subjects
    }

    def measure(place: str, subject: Subject, batches: Sequence[EvaluationBatch], *what: Any) -> Evaluation:
        return evaluate_with_bar(
            place,
            batches,
            *what,
            folder=folder,
            overwrite=overwrite,
            processes=processes,
            fingerprint=marks[subject.name],
            packages=packages,
            bounds=bounds,
            seed=seed,
            criterion=criterion,
        )

    entries = []
    for subject in subjects:
        measured = measure(subject.name, subject, subject.batches, attacks, levels)
        found: list[Check] = []
        if checked is not None and checks and subject.subset is not None:
            name, attack = checked
            level = level_to_check(measured, name, criterion)
            place = f"{subject.name}/checks_{checks}_{level:g}"
            probed = measure(place, subject, subject.subset(checks), probes(attack), (0.0, level))
            found = check(measured, name, probed, criterion)
        entries.append(Entry(subject.name, measured, subject.margins, found))
    return entries


def check_alike(subjects: Sequence[Subject]) -> None:
    """Models have names of their own and the same samples: said before hours of measuring rather than after them.

    Raises:
        ValueError: if they do not.
    """
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a report needs one or more models of different names, got {names}")
    ids = [[id_ for batch in subject.batches for id_ in batch.ids] for subject in subjects]
    for subject, own in zip(subjects, ids, strict=True):
        if own != ids[0]:
            raise ValueError(f"{subject.name} and {subjects[0].name} cannot be compared: their samples differ")


def with_worst(attacks: Mapping[str, Attack]) -> dict[str, Attack]:
    """The attacks and, where they are two or more, the worst of all of them as a row of its own."""
    aimed = [name for name, attack in attacks.items() if attack.access != "none"]
    if len(aimed) < 2 or WORST in attacks:
        return dict(attacks)
    return {**attacks, WORST: WorstOf(tuple(aimed), attacks[aimed[0]].norm)}


def with_control(attacks: Mapping[str, Attack]) -> dict[str, Attack]:
    """The attacks and, unless one of them is noise that no one has aimed, Gaussian noise of their norm."""
    if not attacks or any(attack.access == "none" for attack in attacks.values()):
        return dict(attacks)
    return {**attacks, "gaussian": Noise("gaussian", next(iter(attacks.values())).norm)}


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """So many of the items, at even distances."""
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, min(number, len(items)))]
