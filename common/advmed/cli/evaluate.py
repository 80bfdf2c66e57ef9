"""``evaluate`` of every host: its options are checked, its models measured in every norm, and a report of each written.

A host gives an :class:`EvaluationHost` and reads :data:`advmed.cli.options.EVALUATE` in its own syntax.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from advmed.attacks import Attack, parse_attacks
from advmed.cli.runner import report_line
from advmed.distributed import Processes
from advmed.evaluation.auc import check_levels
from advmed.evaluation.checks import pictured
from advmed.evaluation.metric import Metric
from advmed.evaluation.subjects import Subject, check_alike, measure_subjects, spread, with_control, with_worst
from advmed.norms import check_norm
from advmed.progress import watched
from advmed.report import Example, format_table, tabulate, write_report
from advmed.report.failures import count_failures
from advmed.report.summary import cautions, verdict
from advmed.report.writer import FILES, configure, refuse_another
from advmed.versions import tell_if_newer

logger = logging.getLogger(__name__)

Examples = Callable[[tuple[str, Any], Sequence[float], Sequence[str]], Sequence[Example]]
"""Makes the pictures: from an attack with its name, the levels above 0, and the ids of the samples to show."""


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of an evaluation (:data:`advmed.cli.options.EVALUATE`), checked.

    Attributes:
        names: of the models.
        norms: 2, inf, or both; each has a report of its own.
        levels: noise levels, 0 first: of the norm where there is one, of L2 where there are two; None: the host's.
        levels_inf: those of Linf; None: ``levels`` where that is the only norm, else the host's.
        attacks: their names, the strongest first.
        samples: how many are evaluated; None: all.
        examples: how many are shown.
        checks: how many the attack is checked on.
        seed: of the random starts.
        out: folder of the report or reports.
        overwrite: replaces what another evaluation left there.

    Raises:
        ValueError: for a value that cannot be meant.
        NotADirectoryError: if ``out`` is a file.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    levels: tuple[float, ...] | None
    levels_inf: tuple[float, ...] | None
    attacks: tuple[str, ...]
    samples: int | None
    examples: int
    checks: int
    seed: int
    out: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"a report needs one or more models of different names, got {list(self.names)}")
        for name in self.names:
            _check_name(name)
        if self.out.is_file():
            raise NotADirectoryError(f"reports are written to a folder, and {self.out} is a file: name another")
        for name, given in (("norms", self.norms), ("attacks", self.attacks)):
            if not given:
                raise ValueError(f"evaluate needs one or more {name}, got none")
        for norm in self.norms:
            check_norm(norm)
        for levels in (self.levels, self.levels_inf):
            if levels is not None:
                check_levels(levels)
        for name, least in (("samples", 1), ("examples", 0), ("checks", 0), ("seed", -math.inf)):
            value = getattr(self, name)
            if name == "samples" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                limit = "" if least == -math.inf else f" >= {least}"
                raise ValueError(f"{name} must be a whole number{limit}, got {value!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any], names: Sequence[str], *, models: str, option: str) -> Self:
        """From the values of a command line.

        Args:
            given: the values by the names of the options.
            names: of the models, where the user gives none.
            models: what the command calls them.
            option: how a user writes the option of their names.
        """
        chosen = given["names"] or list(names)
        if len(chosen) != len(names) or len(set(chosen)) != len(chosen):
            raise ValueError(
                f"{len(names)} {models} need {len(names)} different names, got {chosen}; set them with {option}"
            )
        return cls(
            names=tuple(chosen),
            norms=tuple(dict.fromkeys(map(_norm, given["norm"]))),
            levels=_numbers("levels", given["levels"]),
            levels_inf=_numbers("levels_inf", given["levels_inf"]),
            attacks=tuple(given["attacks"]),
            out=Path(given["out"]),
            overwrite=bool(given["overwrite"]),
            **{name: given[name] for name in ("samples", "examples", "checks", "seed")},
        )

    def levels_of(self, norm: float) -> Sequence[float] | None:
        """The levels that the user gave for a norm; None for none."""
        if norm == math.inf and (self.levels_inf is not None or len(self.norms) > 1):
            return self.levels_inf
        return self.levels


class EvaluationHost(ABC):
    """What a host gives to an evaluation; all else is done by :func:`evaluate_models`.

    Its models are loaded when something of theirs is first asked for, so that other mistakes are told before.
    """

    folder_per_norm: ClassVar[bool] = False
    """Whether a report in a single norm has a folder named after the norm, too."""
    bounds: ClassVar[tuple[float, float] | None] = None
    """Lowest and highest value of an input."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions the numbers depend on, beside ours and PyTorch."""
    task: ClassVar[str] = ""
    """What ``standard`` attacks, one of :data:`advmed.attacks.standard.LOSSES`; empty: nothing but the loss."""

    def parse_attacks(self, names: Sequence[str], norm: float) -> Mapping[str, Attack]:
        """Attacks by their names.

        Raises:
            ValueError: for a name that is none.
        """
        return parse_attacks(names, norm=norm, task=self.task)

    @abstractmethod
    def default_levels(self, norm: float) -> Sequence[float]:
        """Noise levels where the user names none, 0 first."""

    @property
    @abstractmethod
    def subjects(self) -> Sequence[Subject]:
        """The models, and what each of them is evaluated on."""

    @property
    @abstractmethod
    def metrics(self) -> Sequence[Metric]:
        """The metrics, the most important first."""

    @abstractmethod
    def examples(
        self, attack: tuple[str, Attack], levels: Sequence[float], ids: Sequence[str], *, seed: int
    ) -> Sequence[Example]:
        """The pictures: samples by their ids, clean and attacked at levels above 0."""

    @property
    def data_name(self) -> str:
        """Of the data, for the title; empty where they have none."""
        return ""

    @property
    @abstractmethod
    def measured_over(self) -> str:
        """What a noise level is the norm over, completing "L2 norm of the noise over ..."."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What a reader of the report should know."""

    @property
    @abstractmethod
    def fingerprint(self) -> Mapping[str, Any]:
        """What the numbers depend on beside the checkpoint, JSON-ready."""

    @property
    def class_names(self) -> Mapping[int, str]:
        """For the legend of the pictures."""
        return {}

    @property
    def groups(self) -> Callable[[str], str] | None:
        """To which group a sample belongs, by its id, for the bootstrap; None for independent samples."""
        return None


def evaluate_models(
    host: EvaluationHost, options: EvaluationOptions, say: Callable[[str], object] = print
) -> list[Path]:
    """Evaluates a host's models in every norm that was asked for; returns the pages of the reports.

    Everything that can be wrong is looked at before anything is measured.
    """
    attacks = {norm: host.parse_attacks(options.attacks, norm) for norm in options.norms}
    levels = {norm: check_levels(options.levels_of(norm) or host.default_levels(norm)) for norm in options.norms}
    subjects, metrics, settings = host.subjects, host.metrics, host.settings
    apart = host.folder_per_norm or len(options.norms) > 1
    reports: dict[float, dict[str, Any]] = {}
    for norm in options.norms:
        kind = "Linf" if norm == math.inf else "L2"
        title = f"Robustness of {', '.join(options.names)}" + (f" on {host.data_name}" if host.data_name else "")
        reports[norm] = {
            "folder": options.out / kind if apart else options.out,
            "title": title + (f" in {kind}" if apart else ""),
            "level_unit": f"{kind} norm of the noise over {host.measured_over}",
        }
    if not options.overwrite:
        for report in reports.values():
            refuse_other_report(report["folder"], subjects, metrics, report["level_unit"], settings)
    return [
        compare(
            subjects=subjects,
            attacks=attacks[norm],
            levels=levels[norm],
            metrics=metrics,
            examples=partial(host.examples, seed=options.seed),
            shown=options.examples,
            fingerprint=host.fingerprint,
            packages=host.packages,
            checks=options.checks,
            bounds=host.bounds,
            seed=options.seed,
            groups=host.groups,
            overwrite=options.overwrite,
            say=say,
            class_names=host.class_names,
            settings=settings,
            **report,
        )
        for norm, report in reports.items()
    ]


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
    packages: Sequence[str] = (),
    checks: int = 0,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    groups: Callable[[str], str] | None = None,
    overwrite: bool = False,
    say: Callable[[str], object] = print,
    title: str,
    level_unit: str,
    class_names: Mapping[int, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Evaluates models one after the other, writes their report, and says its tables.

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
        packages: see :func:`advmed.evaluation.loop.evaluate`.
        checks: number of samples that the attack is checked on, see :mod:`advmed.evaluation.checks`; 0 for no checks.
        bounds: lowest and highest value of an input.
        seed: of the random starts.
        groups: to which group a sample belongs, by its id, for the bootstrap; None for independent samples.
        overwrite: replaces what another evaluation left in the folder.
        say: prints or logs a text.
        title: see :func:`advmed.report.write_report`, as the rest.
        level_unit: what a noise level is.
        class_names: for the legend.
        settings: what else a reader should know.

    Returns:
        The path of report.html.
    """
    check_alike(subjects)
    if not overwrite:
        refuse_other_report(folder, subjects, metrics, level_unit, settings or {})
    processes = Processes.of_environment()
    if processes.rank == 0:
        tell_if_newer(packages, lambda line: say(f"WARNING: {line}"))
    attacks = with_control(with_worst(attacks))
    entries = measure_subjects(
        folder,
        subjects,
        attacks,
        levels,
        metrics,
        fingerprint=fingerprint,
        packages=packages,
        checks=checks,
        bounds=bounds,
        seed=seed,
        overwrite=overwrite,
        processes=processes,
    )
    page = folder / "report.html"
    samples = entries[0].evaluation.ids
    failures = count_failures(entries, metrics)
    ids = failures.first_and_last(shown) if failures else []
    ids = ids or [str(id_) for id_ in spread(samples, shown)]
    pictures = _made(examples, pictured(attacks), levels[1:], ids, processes) if shown else []
    if processes.rank == 0:
        page = write_report(
            folder,
            entries,
            metrics,
            title=title,
            level_unit=level_unit,
            examples=pictures,
            class_names=class_names,
            settings=settings,
            groups=None if groups is None else [groups(id_) for id_ in samples],
            overwrite=overwrite,
        )
        tables = tabulate(entries, metrics, resample=False)
        for table in tables:
            say(f"\n{format_table(table)}")
        warnings = [f"WARNING: {note}" for note in cautions(entries, tables)]
        say("\n".join(["", verdict(entries)[1], *warnings, "", report_line(page)]))
    processes.wait()
    return page


def _made(
    examples: Examples, attack: tuple[str, Any], levels: Sequence[float], ids: Sequence[str], processes: Processes
) -> Sequence[Example]:
    """The pictures, sample by sample, shared by the processes.

    None where they cannot be made: what was measured is worth more than they are.
    """
    own = ids[processes.rank :: processes.size]
    mine: dict[str, Sequence[Example]] | None
    try:
        shown = watched(own, "pictures", "samples", shown=processes.rank == 0)
        mine = {id_: examples(attack, levels, [id_]) for id_ in shown}
    except Exception as error:  # whatever a host's pictures raise
        logger.warning("the report has no pictures of samples: %s: %s", type(error).__name__, error, exc_info=True)
        mine = None
    made: dict[str, Sequence[Example]] = {}
    for theirs in processes.gathered(mine):
        if theirs is None:
            return []
        made.update(theirs)
    return [example for id_ in ids for example in made[id_]]


def refuse_other_report(
    folder: Path,
    subjects: Sequence[Subject],
    metrics: Sequence[Metric],
    level_unit: str,
    settings: Mapping[str, Any],
) -> None:
    """Looks for another report in a folder: said before hours of measuring rather than after them.

    Raises:
        FileExistsError: if there is one.
    """
    planned = {subject.name: {"fingerprint": ""} for subject in subjects}
    refuse_another(folder, configure(planned, [], metrics, level_unit, settings), before=True)


_LONGEST_NAME = 100
"""Bytes: what a model's name may have, which is that of a folder, a line of a table and an entry of a legend."""


def _check_name(name: str) -> None:
    """Raises ValueError for a model's name that cannot be that of a folder inside of the report's."""
    if not name.strip() or name in (".", "..", *FILES) or any(sign in name for sign in "/\\\0\n"):
        raise ValueError(f"a model's name is that of a folder in the report's, got {name!r}: choose another")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"a model's name may be {_LONGEST_NAME} bytes long, got {len(name.encode())}: {name[:40]}...")


def _norm(value: Any) -> float:
    try:
        return check_norm(value)
    except ValueError as error:
        raise ValueError(f"norm must be 2 or inf, got {value!r}") from error


def _numbers(name: str, values: Sequence[Any] | None) -> tuple[float, ...] | None:
    try:
        return None if values is None else tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers, got {', '.join(map(str, values or []))}") from error
