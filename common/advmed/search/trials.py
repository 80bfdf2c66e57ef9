"""The trials of a search in Optuna's storage."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from advmed.search.claim import Busy, Claim, Lost
from advmed.search.curve import Curve, differences, refuse
from advmed.search.plan import Plan, Range, Setting, Value, is_number, name_of

TRIES = 20
"""How often tpe may propose a setting that is another process's already."""
DEFINITION = "advmed.search"
"""Attribute of Optuna's study: what must stay the same for its trials to be comparable."""


def optuna_package() -> Any:
    """Optuna, of whose log warnings are left, such as that of a lock that another process does not give back.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        optuna = import_module("optuna")
    except ImportError as error:
        raise ImportError(f"the search needs Optuna: pip install 'advmed[search]' ({error})") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(plan: Plan, create: bool = True) -> Any:
    """Optuna's study of a plan, made if it is not there.

    Raises:
        FileNotFoundError: if it is not there and not to be made.
        ValueError: for a storage that cannot be used, or that has another study by this name.
        ImportError: if Optuna is not installed, or what it needs for the storage.
    """
    optuna = optuna_package()
    shown = _shown(plan.storage)
    if not create and "://" not in plan.storage and not Path(plan.storage).exists():
        raise FileNotFoundError(f"there is no storage {shown}: the search has not been started")
    with storage_errors(plan, anything=True):
        storage = _storage(plan.storage, optuna)
        names = [study.study_name for study in storage.get_all_studies()]
        if plan.study not in names and not create:
            raise FileNotFoundError(
                f"the storage {shown} has no study {plan.study!r}; it has {', '.join(names) or 'none'}"
            )
        # Which direction is better is known when the first report is there: values of metrics where lower is better
        # are stored with a minus sign.
        study = optuna.create_study(storage=storage, study_name=plan.study, direction="maximize", load_if_exists=True)
        if DEFINITION not in study.user_attrs and not study.get_trials(deepcopy=False):
            study.set_user_attr(DEFINITION, plan.definition)
        known = study.user_attrs.get(DEFINITION)
    if known is None:
        raise ValueError(f"the study {plan.study!r} in {shown} was not made by advmed search: take another name")
    refuse(differences(plan.definition, known), f"the study {plan.study!r} in {shown}")
    return study


def _storage(name: str, optuna: Any) -> Any:
    """Optuna's storage in a file or a database."""
    if "://" not in name:
        # Absolute: Optuna's lock is a symbolic link to the file, and a relative one leads nowhere from another folder.
        path = Path(name).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = Path(f"{path}.lock")
        if lock.is_symlink() and not lock.exists():
            lock.unlink(missing_ok=True)  # left behind by a killed process, and Optuna would wait for it for ever
        journal = import_module("optuna.storages.journal")
        return optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
    for _ in range(3):
        try:
            return optuna.storages.RDBStorage(name)
        except Exception as error:  # of the database's driver
            if not re.search("already exist|unique|duplicate", str(error), re.IGNORECASE):
                raise
            time.sleep(1)  # a process that began at the same moment has made the tables
    return optuna.storages.RDBStorage(name)


def _shown(storage: str) -> str:
    """A storage as it may be printed: without a password."""
    return re.sub(r"//[^/@]*@", "//...@", storage)


@contextmanager
def storage_errors(plan: Plan, anything: bool = False) -> Iterator[None]:
    """Turns what a storage raises into one message.

    Args:
        plan: whose storage it is.
        anything: a file that is no storage can raise anything; otherwise only what Optuna and SQLAlchemy raise.

    Raises:
        ValueError: for an error of the storage.
    """
    try:
        yield
    except Exception as error:
        ours = type(error).__module__.split(".")[0] in ("optuna", "sqlalchemy")
        if isinstance(error, ImportError | FileNotFoundError) or not (ours or anything):
            raise
        reason = str(error).splitlines()[0] if str(error) else ""
        hint = "another program has it locked" if "locked" in reason else "it is not readable, or no storage of Optuna"
        raise ValueError(
            f"cannot use the storage {_shown(plan.storage)}: {hint} ({type(error).__name__}: {_shown(reason)})"
        ) from error


@dataclass(frozen=True)
class Trial:
    """What Optuna's storage says of a trial, as far as a search asks for it.

    Attributes:
        number: its place in the study.
        key: what the storage calls it.
        state: WAITING, RUNNING, COMPLETE, FAILED, ABANDONED (to be taken up again), or WITHDRAWN (it was one too many).
        setting: the values of its parameters; empty for one that another process has just made.
        attributes: ours.
        parameters: Optuna's.
    """

    number: int
    key: int
    state: str
    setting: Setting
    attributes: Mapping[str, Any]
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, frozen: Any) -> Trial:
        """From Optuna's."""
        kept, state = frozen.user_attrs, frozen.state.name
        if state == "FAIL":
            state = "WITHDRAWN" if "withdrawn" in kept else "ABANDONED" if "abandoned" in kept else "FAILED"
        return cls(frozen.number, frozen._trial_id, state, kept.get("setting", {}), kept, frozen.params)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return name_of(self.setting)

    @property
    def live(self) -> bool:
        """Whether it has a result, or may yet have one."""
        return self.state in ("WAITING", "RUNNING", "COMPLETE")

    @property
    def curve(self) -> Curve | None:
        """What its report said; None before it has ended well."""
        return Curve(**self.attributes["curve"]) if self.state == "COMPLETE" else None


class Trials:
    """The trials of a study, for all processes that work at it.

    A setting belongs to the live trial of the lowest number. Storages number trials one after the other, so processes
    that propose the same setting at the same moment agree on whose it is, without a lock of our own.
    """

    def __init__(self, plan: Plan, study: Any) -> None:
        self._plan, self._study, self._optuna = plan, study, optuna_package()
        self.ended = self._optuna.exceptions.UpdateFinishedTrialError
        self._distributions = distributions_of(plan, self._optuna)

    def all(self) -> list[Trial]:
        """All, by their number."""
        return [Trial.of(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def by_setting(self) -> dict[str, Trial]:
        """The trial that stands for each setting: the live one, else the last."""
        found: dict[str, Trial] = {}
        for trial in self.all():
            if trial.state != "WITHDRAWN" and trial.setting and not (trial.name in found and found[trial.name].live):
                found[trial.name] = trial
        return found

    def counted(self, trials: Sequence[Trial]) -> int:
        """How many of tpe's trials are made."""
        return sum(t.state not in ("WITHDRAWN", "ABANDONED") and "retry" not in t.attributes for t in trials)

    def left(self) -> int:
        """How many settings are still to be run, those of other processes included."""
        if self._plan.sampler == "tpe":
            made = [trial for trial in self.all() if trial.state in ("COMPLETE", "FAILED")]
            return max(0, (self._plan.trials or 0) - self.counted(made))
        known = self.by_setting()
        done = {name for name, trial in known.items() if trial.state in ("COMPLETE", "FAILED")}
        return len({name_of(setting) for setting in self._plan.grid()} - done)

    def retry_failed(self) -> None:
        """Puts settings that failed into the queue again."""
        for trial in self.by_setting().values():
            if trial.state == "FAILED":
                self._queue(trial.setting, trial.parameters, {"retry": True})

    def take(self) -> Trial | None:
        """A trial for this process to run; None if there is none left, or tpe proposes what others are at."""
        for _ in range(TRIES):
            known = self.all()
            if not any(trial.state == "WAITING" for trial in known) and not self._propose(known):
                return None
            # A sampler for every trial, seeded by its number: a search that is resumed goes on, and a second process
            # does not draw what the first has drawn.
            self._study.sampler = sampler_of(self._plan, len(known), self._optuna)
            asked = self._study.ask(self._distributions)
            mine = self._settle(asked)
            if mine is not None:
                return mine
        return None

    def _propose(self, known: Sequence[Trial]) -> bool:
        """Puts the next setting into the queue, or leaves it to tpe; False if there is nothing left to run."""
        standing = self.by_setting()
        for trial in standing.values():
            if trial.state == "ABANDONED":
                kept = {name: True for name in ("retry",) if name in trial.attributes}
                self._queue(trial.setting, trial.parameters, kept | {"again": True})
                return True
        if self._plan.sampler == "tpe":
            return self.counted(known) < (self._plan.trials or 0)
        for setting in self._plan.grid():
            if name_of(setting) not in standing:
                self._queue(setting, {name: setting[name] for name in self._distributions})
                return True
        return False

    def _queue(self, setting: Setting, parameters: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> None:
        self._study.enqueue_trial(dict(parameters), user_attrs={"setting": dict(setting), **(more or {})})

    def _settle(self, asked: Any) -> Trial | None:
        """The trial if it is this process's to run; else it is withdrawn, or has the result of an equal one."""
        if "setting" not in asked.user_attrs:
            if self._plan.sampler == "grid":  # another process was faster at the queue
                self._withdraw(asked.number, asked._trial_id)
                return None
            setting = rounded(self._plan, asked.params)
            asked.set_user_attr("setting", setting)
        known = self.all()
        mine = next(trial for trial in known if trial.number == asked.number)
        before = [trial for trial in known if trial.number < mine.number]
        equal = [trial for trial in before if trial.name == mine.name]
        owner = next((trial for trial in equal if trial.live), None)
        new = not {"retry", "again"} & mine.attributes.keys()
        if self._plan.sampler == "tpe" and new:
            if self.counted(before) >= (self._plan.trials or 0):
                self._withdraw(mine.number, mine.key)
                return None
            failed = next((trial for trial in equal if trial.state == "FAILED"), None)
            if owner is None and failed is not None:  # the same again would fail again
                self.fail(mine, failed.attributes.get("error", ""))
                return None
        if owner is None:
            return mine
        if self._plan.sampler == "tpe" and owner.curve is not None and new:
            self.complete(mine, owner.curve)  # tpe counts it, nothing is trained twice
        else:
            self._withdraw(mine.number, mine.key)
        return None

    # How a trial ends

    def complete(self, trial: Trial, curve: Curve) -> None:
        """Records a result.

        Raises:
            ValueError: if the objective is not a number.
            Lost: if the trial was ended by another process.
        """
        value = curve.sign * curve.measure(self._plan.objective)
        if not math.isfinite(value):
            raise ValueError(f"the objective {self._plan.objective} of {trial.name} is not a number")
        try:
            self._attribute(trial.key, "curve", vars(curve))
            self._study.tell(trial.number, value)
        except (ValueError, self.ended) as error:
            raise Lost("another process has taken it over") from error

    def fail(self, trial: Trial, error: str) -> None:
        """Records a failure."""
        try:
            self._attribute(trial.key, "error", error)
            self._finish(trial.number)
        except self.ended:
            return

    def abandon(self, trial: Trial) -> bool:
        """Leaves a trial to whoever takes it up; False if it has ended meanwhile.

        A storage lets a trial end only once, so of several processes that find it abandoned one proceeds.
        """
        try:
            self._attribute(trial.key, "abandoned", True)
            return self._finish(trial.number)
        except self.ended:
            return False

    def claim(self, trial: Trial, folder: Path) -> Claim:
        """Makes this process the owner of a trial that it has taken.

        Optuna looks whether a trial waits and then takes it, and SQLite has no lock for both: two processes may be
        given the same one. It is of the one that got the folder, whose sign of life it then has.

        Raises:
            Busy: if another process works in the folder, at an earlier trial of this setting.
            Lost: if another process has ended the trial, or was given it at the same moment.
        """
        try:
            return Claim(folder, lambda life: self._attribute(trial.key, "life", dict(life)), self._plan.patience)
        except self.ended as error:
            raise Lost("another process has taken it over") from error
        except Busy as error:
            if any(one.key == trial.key and "life" in one.attributes for one in self.all()):
                raise Lost("another process was given it at the same moment") from error
            raise

    def _withdraw(self, number: int, key: int) -> None:
        self._attribute(key, "withdrawn", True)
        self._finish(number)

    def _finish(self, number: int) -> bool:
        try:
            self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
        except (ValueError, self.ended):
            return False
        return True

    def _attribute(self, key: int, name: str, value: Any) -> None:
        # Optuna's study has no word for this; its storages do.
        self._study._storage.set_trial_user_attr(key, name, value)


def distributions_of(plan: Plan, optuna: Any) -> dict[str, Any]:
    """The space as Optuna has it.

    Optuna's GridSampler is not used: it begins anew when values are added, and may hand a point to two processes. A
    grid's points come from the queue; the numbers among its parameters are named to Optuna for its own plots.
    """
    kinds = optuna.distributions
    found = {}
    for name, values in plan.space.items():
        if plan.sampler == "grid":
            listed = values.values() if isinstance(values, Range) else values
            numbers = [value for value in listed if is_number(value)]
            if len(numbers) == len(listed):
                found[name] = kinds.FloatDistribution(min(numbers), max(numbers))
        elif not isinstance(values, Range):
            found[name] = kinds.CategoricalDistribution(list(values))
        elif values.step is not None and all(isinstance(v, int) for v in (values.low, values.high, values.step)):
            found[name] = kinds.IntDistribution(values.low, values.high, step=values.step)
        else:
            found[name] = kinds.FloatDistribution(values.low, values.high, log=values.log, step=values.step)
    return found


def sampler_of(plan: Plan, number: int, optuna: Any) -> Any:
    """The sampler for a trial; that of a grid is asked for nothing."""
    seed = int(hashlib.sha256(f"{plan.seed} {number}".encode()).hexdigest()[:8], 16)
    if plan.sampler == "grid":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(seed=seed)


def rounded(plan: Plan, parameters: Mapping[str, Value]) -> dict[str, Value]:
    """What tpe proposes, to four digits, which are enough and give folders a readable name; listed values as listed."""
    setting = dict(parameters)
    for name, values in plan.space.items():
        value = setting[name]
        if isinstance(values, Range) and isinstance(value, float):
            short = float(f"{value:.4g}" if values.step is None else f"{value:.10g}")
            setting[name] = min(max(short, float(values.low)), float(values.high))
    return setting
