"""What a search takes from a report.json, and whether two reports can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmed.search.plan import Plan

TRUTH = "truth"
"""The fact that tells labels, points or spacing from others; None where a host does not say."""


class Incomparable(ValueError):
    """Reports of two trials were not made alike."""


@dataclass(frozen=True)
class Curve:
    """A metric over noise levels, from a report.

    Attributes:
        levels: noise levels, 0 first.
        values: the metric at each.
        facts: what the reports of all trials must share, JSON-ready; with metric, attack, higher_is_better and scale.
    """

    levels: Sequence[float]
    values: Sequence[float]
    facts: Mapping[str, Any]

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return 1 if self.facts["higher_is_better"] else -1

    def measure(self, objective: str | float, scale: float = 1.0) -> float:
        """The number that trials are compared by.

        Raises:
            ValueError: for a level that was not evaluated, or an AUC_robust that is not defined.
        """
        if objective == "auc_robust":
            from advmed.evaluation.auc import auc_robust

            return auc_robust(self.levels, self.values, higher_is_better=self.sign > 0, scale=scale)
        if objective == "attacked_mean":
            return sum(self.values[1:]) / len(self.values[1:])
        level = 0.0 if objective == "clean" else objective
        if level not in self.levels:
            raise ValueError(f"the objective is level {level:g}, which was not evaluated; there are {row(self.levels)}")
        return self.values[list(self.levels).index(float(level))]


def read_curve(path: Path, plan: Plan) -> Curve:
    """Reads what a study file asks for from a report.json.

    Raises:
        FileNotFoundError: if there is no report.
        ValueError: if it is none, lacks the metric, attack or model, or has no number where one is needed.
    """
    from advmed.report.comparison import truth_of

    if not path.is_file():
        raise FileNotFoundError(f"the evaluation ended well but there is no report {path}: see 'report' and its log")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        configuration, results = record["configuration"], record["results"]
        metric = _chosen("metric", plan.metric, results, path)
        models = results[metric]["models"]
        if plan.model is None and len(models) > 1:
            raise ValueError(f"{path} has several models ({', '.join(models)}): name one with 'model: ...'")
        attacks = models[_chosen("model", plan.model, models, path)]["attacks"]
        attack = _chosen("attack", plan.attack, attacks, path)
        levels, values = attacks[attack]["levels"], attacks[attack]["values"]
        about = configuration["metrics"][metric]
        evaluation = configuration.get("evaluation", {})
        facts = {
            "metric": metric,
            "higher_is_better": bool(about["higher_is_better"]),
            "scale": about.get("scale"),
            "attack": attack,
            "attack settings": evaluation.get("attacks", {}).get(attack),
            "levels": levels,
            "level_unit": configuration.get("level_unit"),
            "seed": evaluation.get("seed"),
            "bounds": evaluation.get("bounds"),
            "samples": _digest(configuration.get("samples", [])),
            TRUTH: truth_of(configuration.get("models", {}).values()),
        }
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a report of Advmed: {type(error).__name__} {error}") from error
    missing = [f"{level:g}" for level, value in zip(levels, values, strict=True) if value is None or value != value]
    if missing:
        raise ValueError(f"{metric} under {attack} is not a number at level {', '.join(missing)} in {path}")
    return Curve(levels, values, facts)


def _chosen(kind: str, name: str | None, there: Mapping[str, Any], path: Path) -> str:
    if name is None and there:
        return next(iter(there))
    if name is None or name not in there:
        raise ValueError(f"{path} has no {kind} {name!r}; it has {', '.join(there) or 'none'}")
    return name


def _digest(samples: Sequence[str]) -> str:
    """Sample ids in short: a storage is not the place for thousands of file names."""
    return f"{len(samples)}, hash {hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:12]}"


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What differs between two records, in words; empty if nothing does."""
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    return "; ".join(_difference(name, ours.get(name), theirs.get(name)) for name in names)


def unlike(ours: Curve, theirs: Curve) -> str:
    """What two reports do not share, in words; empty if they can be compared.

    Of a truth that one of them does not know, as an older study, nothing is said.
    """
    known = None not in (ours.facts.get(TRUTH), theirs.facts.get(TRUTH))
    one, other = ({k: v for k, v in curve.facts.items() if known or k != TRUTH} for curve in (ours, theirs))
    if one.get(TRUTH) != other.get(TRUTH) and one["samples"] == other["samples"]:
        return "the same samples have another truth (other labels, points or spacing)"
    return differences(one, other)


def _difference(name: str, ours: Any, theirs: Any) -> str:
    if isinstance(ours, list) and isinstance(theirs, list):
        # Of a command, the words that are new and those that were there instead; all, if it is only their order.
        new, old = [word for word in ours if word not in theirs], [word for word in theirs if word not in ours]
        ours, theirs = (row(new), row(old)) if new or old else (row(ours), row(theirs))
        return f"{name} has {ours or 'nothing'!r} where there was {theirs or 'nothing'!r}"
    return f"{name} is {ours!r}, was {theirs!r}"


def row(values: Sequence[Any]) -> str:
    """Values in a line."""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def refuse(differ: str, what: str) -> None:
    """Raises ValueError if a study file differs from the one that ``what`` was begun with."""
    if differ:
        raise ValueError(
            f"{what} was begun with another study file, and trials of both could not be compared: {differ}. Undo the "
            f"change, or take another study and folder"
        )
