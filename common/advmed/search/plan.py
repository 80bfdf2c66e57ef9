"""The study file of a search: read, checked as a whole before anything runs, and its texts filled in."""

from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

Value = float | int | str | bool
Setting = Mapping[str, Value]

OBJECTIVES = ("auc_robust", "attacked_mean", "clean")


@dataclass(frozen=True)
class Range:
    """Values between two numbers.

    Attributes:
        low: the lowest.
        high: the highest.
        log: whether they are drawn evenly by their logarithm.
        step: distance of two values; None for any number.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def values(self) -> list[Value]:
        """The values of a range with a step; whole numbers where low and step are."""
        assert self.step is not None
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
        whole = isinstance(self.low, int) and isinstance(self.step, int)
        found = [low + k * step for k in range(int((high - low) / step) + 1)]
        return [int(value) if whole else float(value) for value in found]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study file. Texts may hold placeholders: ``{delta}`` for a parameter, ``{folder}``, ``{name}``, ``{here}``.

    Attributes:
        study: its name in the storage.
        storage: a file for Optuna's journal, or the URL of a database.
        folder: every trial has a folder of its own in it.
        space: the values of each parameter, a list or a range.
        train: the words of the training command.
        evaluate: the words of the evaluation command, which may hold ``{checkpoint}``.
        report: the report.json that the evaluation writes.
        sampler: "grid" for all combinations, "tpe" for Optuna's sampler.
        trials: number of trials of tpe.
        seed: of tpe.
        resume: words of the command that goes on with a training that was cut off.
        checkpoint: a pattern of file names; the newest that fits is ``{checkpoint}``.
        environment: environment variables of the commands.
        files: files that are written into the trial's folder before training, by name.
        metric: name in the report; None: its first.
        attack: name in the report; None: its first.
        model: name in the report; None: its only one.
        objective: one of ``OBJECTIVES``, or a noise level, at which the metric counts.
        scale: what the values are divided by for AUC_robust in the table; None: as the report does it, and by the
            largest value of all trials where lower is better.
        patience: seconds without a sign of life after which another machine's trial counts as abandoned.
        here: the folder that the study file lies in; not in the file.
    """

    study: str
    storage: str
    folder: Path
    space: Mapping[str, Sequence[Value] | Range]
    train: Sequence[str]
    evaluate: Sequence[str]
    report: str
    sampler: str = "grid"
    trials: int | None = None
    seed: int = 0
    resume: Sequence[str] | None = None
    checkpoint: str | None = None
    environment: Mapping[str, str]
    files: Mapping[str, str]
    metric: str | None = None
    attack: str | None = None
    model: str | None = None
    objective: str | float = "auc_robust"
    scale: float | None = None
    patience: float = 300.0
    here: Path = Path()

    @property
    def definition(self) -> dict[str, Any]:
        """What must not change within a study, JSON-ready. Values may be added to a grid, trials to tpe."""
        names = ("sampler", "train", "evaluate", "report", "checkpoint", "environment", "files")
        kept = {name: getattr(self, name) for name in (*names, "metric", "attack", "model", "objective")}
        kept["parameters"] = list(self.space)
        if self.sampler == "tpe":
            kept["seed"] = self.seed
            kept["space"] = {n: vars(v) if isinstance(v, Range) else list(v) for n, v in self.space.items()}
        plain: dict[str, Any] = json.loads(json.dumps(kept))
        return plain

    def grid(self) -> list[Setting]:
        """All combinations, in the order of the file."""
        values = [v.values() if isinstance(v, Range) else v for v in self.space.values()]
        return [dict(zip(self.space, point, strict=True)) for point in itertools.product(*values)]

    def folder_of(self, setting: Setting) -> Path:
        """The trial's own folder."""
        return self.folder / name_of(setting)

    def placeholders(self, setting: Setting) -> dict[str, str]:
        """What the placeholders stand for, except ``{checkpoint}``; the folder from the root, as hosts may want it."""
        known = {name: as_text(value) for name, value in setting.items()}
        folder = str(self.folder_of(setting).absolute())
        return known | {"folder": folder, "name": name_of(setting), "here": str(self.here)}


def as_text(value: Value) -> str:
    """A value as it stands in a command; 1.0 as 1, which commands take for a whole number and for any other."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def is_number(value: Value) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def name_of(setting: Setting) -> str:
    """A setting as the name of a folder.

    Commas and equals signs would mean something to the hosts' commands, so there are none. A text that is not fit for
    a file name is shortened to what is, and told apart by a hash.
    """
    name = "__".join(f"{parameter}_{as_text(value)}" for parameter, value in setting.items())
    safe = re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII)[:150]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


_PLACES = ("folder", "name", "here", "checkpoint")


def read_plan(path: Path) -> Plan:
    """Reads a study file and checks all that can be checked before anything runs.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: one message for everything that is wrong in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no study file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold 'name: value' lines, got a {type(content).__name__}")
    problems: list[str] = []
    values = {name: value for name, value in _converted(content, problems)}
    if not problems:
        plan = Plan(**{"environment": {}, "files": {}, **values, "here": path.parent})
        problems = list(_problems(plan))
        if not problems:
            return plan
    raise ValueError(f"{path}: " + "; ".join(problems))


def _converted(content: Mapping[str, Any], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """The values of a study file in their types; what is wrong goes to ``problems``."""
    known = [field.name for field in fields(Plan) if field.name != "here"]
    for name in ("study", "storage", "folder", "space", "train", "evaluate", "report"):
        if content.get(name) is None:
            problems.append(f"{name} is missing")
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            problems.append(f"unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        elif value is not None:
            read: Callable[[Any], Any] = _READERS.get(name, _text)
            try:
                yield name, read(value)
            except ValueError as error:
                problems.append(f"{name} {error}")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a text, got {value!r}")
    return value


def _path(value: Any) -> Path:
    return Path(_text(value))


def _words(value: Any) -> tuple[str, ...]:
    """The words of a command as a shell would see them; placeholders are filled in later, so none splits a word."""
    text = _text(value)
    try:
        words = tuple(shlex.split(text, comments=True))
    except ValueError as error:
        raise ValueError(f"cannot be split into words: {error}") from error
    if not words:
        raise ValueError("holds no command")
    return words


def _texts(value: Any) -> dict[str, str]:
    """Names with texts, or with plain values that serve as such."""
    if not isinstance(value, Mapping) or not all(isinstance(v, str | int | float) for v in value.values()):
        raise ValueError(f"must be 'name: text' lines, got {value!r}")
    return {str(name): as_text(text) for name, text in value.items()}


def _number(value: Any) -> float | int:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3, without a point, as a text
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"must be a number, got {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {value!r}")
    return value


def _positive(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError(f"must be above 0, got {value!r}")
    return float(_number(value))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"must be a whole number, got {value!r}")
    return value


def _sampler(value: Any) -> str:
    if value not in ("grid", "tpe"):
        raise ValueError(f"must be grid or tpe, got {value!r}")
    return str(value)


def _objective(value: Any) -> str | float:
    if value in OBJECTIVES:
        return str(value)
    try:
        return float(_number(value))
    except ValueError:
        raise ValueError(f"must be {', '.join(OBJECTIVES)} or a noise level, got {value!r}") from None


def _space(value: Any) -> dict[str, tuple[Value, ...] | Range]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError("must name one or more parameters with their values, such as 'delta: [0.25, 0.5, 1.0]'")
    found: dict[str, tuple[Value, ...] | Range] = {}
    for name, values in value.items():
        if not isinstance(name, str) or not name.isidentifier() or name in _PLACES:
            raise ValueError(f"cannot have a parameter {name!r}: take a word of letters, digits and _, not folder, "
                             "name, here or checkpoint")  # fmt: skip
        try:
            found[name] = _range(values) if isinstance(values, Mapping) else _list(values)
        except ValueError as error:
            raise ValueError(f"of {name} {error}") from error
    return found


def _list(values: Any) -> tuple[Value, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"must be a list of values, or a range such as {{low: 0.1, high: 2}}, got {values!r}")
    found: list[Value] = []
    for value in values:
        if not isinstance(value, bool | int | float | str) or value == "":
            raise ValueError(f"may hold numbers, texts, true and false, got {value!r}")
        if isinstance(value, float) or (isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value)):
            value = _number(value)
        found.append(value)
    names = [as_text(value) for value in found]
    if len(set(names)) < len(names):
        raise ValueError(f"holds a value twice: {values}")
    return tuple(found)


def _range(values: Mapping[str, Any]) -> Range:
    unknown = [str(name) for name in values if name not in ("low", "high", "log", "step")]
    if unknown or not {"low", "high"} <= set(values):
        raise ValueError(f"must have low and high, and may have log or step, got {dict(values)}")
    low, high = _number(values["low"]), _number(values["high"])
    log, step = values.get("log", False), values.get("step")
    step = None if step is None else _number(step)
    if not isinstance(log, bool) or (step is not None and (step <= 0 or log)):
        raise ValueError("may have either log: true or a step above 0")
    if low >= high or (log and low <= 0):
        raise ValueError(f"must begin below its end, and above 0 with log: true; got low {low} and high {high}")
    return Range(low, high, log, step)


_READERS: dict[str, Callable[[Any], Any]] = {
    "folder": _path,
    "space": _space,
    "train": _words,
    "evaluate": _words,
    "resume": _words,
    "sampler": _sampler,
    "trials": _whole,
    "seed": _whole,
    "environment": _texts,
    "files": _texts,
    "objective": _objective,
    "scale": _positive,
    "patience": _positive,
}


def _problems(plan: Plan) -> Iterator[str]:
    """What is wrong in a study file whose values are of the right kind."""
    if plan.sampler == "grid":
        without = [n for n, v in plan.space.items() if isinstance(v, Range) and v.step is None]
        if without:
            yield f"a grid needs a list of values, or a step, for {', '.join(without)}"
        if plan.trials is not None:
            yield "trials belongs to the sampler tpe; a grid has as many as it has points"
    elif not plan.trials:
        yield "the sampler tpe needs the number of trials, such as 'trials: 20'"
    texts = {"train": [*plan.train, *plan.environment.values(), *plan.files.values()], "report": [plan.report]}
    texts |= {"evaluate": list(plan.evaluate), "resume": list(plan.resume or ())}
    texts |= {"checkpoint": [plan.checkpoint or ""]}
    known = {*plan.space, "folder", "name", "here"}
    used: dict[str, set[str]] = {}
    for where, lines in texts.items():
        try:
            used[where] = {name for line in lines for name in placeholders(line)}
        except ValueError as error:
            yield f"{where}: {error}"
            continue
        allowed = known | ({"checkpoint"} if where in ("evaluate", "resume") and plan.checkpoint else set())
        for name in sorted(used[where] - allowed):
            more = "; give its pattern with 'checkpoint: ...'" if name == "checkpoint" and not plan.checkpoint else ""
            yield f"{where} has an unknown placeholder {{{name}}}{more}"
    for name in plan.space:
        if name not in used.get("train", {name}):
            yield f"train does not use {{{name}}}: nothing would change from trial to trial"
    for where in ("train", "report"):
        if not {"folder", "name"} & used.get(where, {"folder"}):
            yield f"{where} does not use {{folder}}: the trials would overwrite each other"
    for name in plan.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"files are written into the trial's folder, {name} would be outside"
    for where, words in (("train", plan.train), ("evaluate", plan.evaluate), ("resume", plan.resume)):
        if words and not program(words[0]):
            yield f"{where}: there is no program {words[0]}"


def placeholders(text: str) -> list[str]:
    """The names in braces; doubled braces stand for themselves.

    Raises:
        ValueError: for braces that do not match, or that hold more than a name.
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error} in {text!r}; a brace that is no placeholder is written twice") from error
    names = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in names:
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"{{{name}}} in {text!r} is no placeholder; a brace that is none is written twice")
    return [name for name, _, _ in names]


def program(word: str) -> str | None:
    """The path of a program: one that the shell would find, or one beside this Python; None if there is none."""
    return shutil.which(word) or shutil.which(str(Path(sys.executable).parent / word))


def fill(text: str, known: Mapping[str, str]) -> str:
    """A text with its placeholders filled in."""
    return text.format_map(known)


def newest(plan: Plan, known: Mapping[str, str]) -> str | None:
    """The newest file that fits the pattern of checkpoints: a host that resumes may begin a new folder."""
    if plan.checkpoint is None:
        return None
    quoted = {name: glob.escape(value) for name, value in known.items()}
    found = glob.glob(fill(plan.checkpoint, quoted), recursive=True)
    return max(found, key=os.path.getmtime, default=None)
