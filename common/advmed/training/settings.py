"""The settings of a training: those of its method, of its attack, and of the run around them.

A host derives its own settings from :class:`TrainingSettings`, reads them with :func:`read_settings`, and writes what
they resolved to with :func:`settings_text`.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

import yaml

from advmed.methods import (
    AttackSettings,
    EveryMethodSettings,
    Method,
    MethodSettings,
    RadiusSettings,
    method_class,
)
from advmed.methods.awp import check_share
from advmed.methods.base import AdversarialMethod, AttackOptions, ThresholdMethod
from advmed.thresholds import BOUNDARY, RunningThresholds, Thresholds, parse_rule

S = TypeVar("S", bound="TrainingSettings")
PRESETS = ("fast", "paper")


@dataclass(frozen=True, kw_only=True)
class RunSettings(MethodSettings):
    """What a run needs around its method.

    Attributes:
        preset: what decides about the settings that are left open: "fast", what measurements found at a few times the
            cost of standard training, or "paper", the method as published.
        thresholds: "auto", or the path of a thresholds file (AMAT, FAT).
        rule: how thresholds are made of the losses of the standard network: "mean" or "mean+2std" (its standard
            deviation), "median" or "median+2spread" (its median absolute deviation, for losses with outliers); of
            classifiers "boundary", too, the cross-entropy at which the right class is as probable as all others
            together, log 2, for which no network is measured; None: as the thresholds file was made; where there is
            none, "mean" (nnU-Net, classification) or "mean+2std" (YOLO, landmarks).
        awp: share of their own length by which the weights of a layer are moved uphill where an adversarial method
            takes its gradient (adversarial weight perturbation; 0.005, say), in [0, 1): a training pass more for each
            that the method learns from; 0: they are not moved.
        ramp: share of the epochs under attack in which the one noise level of SAT, AT, TRADES, MART or FAT grows in a
            straight line from 0 to eps, step by step, in [0, 1]; 0: it is eps from the first step on.
        decay: of the learning rate: "host", as the host has it; "late": it stays at its first value for three quarters
            of the training, and falls from there to a hundredth in a straight line.
        warmup_epochs: epochs of standard training first; None: only as many as self-calibration needs.
        backward: "together" back-propagates the clean and the adversarial part in one go, "sequential" one after the
            other, at the peak memory of a standard step.
        seed: seed of the network's weights and of random starts; None: unseeded weights, as the host has them.
    """

    preset: Literal["fast", "paper"] = "fast"
    thresholds: str = "auto"
    rule: str | None = None
    awp: float = 0.0
    ramp: float = 0.0
    decay: Literal["host", "late"] = "host"
    warmup_epochs: int | None = None
    backward: Literal["together", "sequential"] = "together"
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be {' or '.join(map(repr, PRESETS))}, got {self.preset!r}")
        if self.rule == BOUNDARY:
            if self.thresholds != "auto":
                raise ValueError(
                    f"the rule {BOUNDARY!r} is about no network's losses: leave out thresholds, {self.thresholds}"
                )
        elif self.rule is not None:
            parse_rule(self.rule)
        if self.awp != 0:
            check_share(self.awp)
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp must be a share in [0, 1], got {self.ramp!r}")
        if self.decay not in ("host", "late"):
            raise ValueError(f"decay must be 'host' or 'late', got {self.decay!r}")
        if self.warmup_epochs is not None and self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be >= 0, got {self.warmup_epochs}")

    def check_method(self, name: str) -> None:
        """Raises ValueError if the method of that name cannot work with these settings."""
        if self.backward == "sequential" and method_class(name).compares_predictions(self):
            raise ValueError(
                f"{name} compares the predictions of its two passes, which therefore cannot be back-propagated one "
                f"after the other: use backward 'together'"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(AttackSettings, EveryMethodSettings, RunSettings):
    """What a training needs to know, on every host: the settings of the run, of all methods, and of their attack.

    They are described one by one, with values, defaults and units, on the page of settings (docs/settings.md). Those
    that concern another method than the one that is trained mean nothing, and the host's log names those that were
    set; what is None is chosen by ``preset``.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from advmed import TrainingSettings
        >>> settings = TrainingSettings(eps=2.0, steps=10, beta=3.0)  # one set of settings for all methods
        >>> settings.make_method("SAT").eps, settings.make_method("TRADES").beta
        (2.0, 3.0)
    """

    def __post_init__(self) -> None:
        EveryMethodSettings.__post_init__(self)  # and on to that of RunSettings
        AttackSettings.__post_init__(self)

    def for_method(self, name: str) -> Self:
        """These settings, what they left open chosen by the preset of the method of that name.

        Raises:
            ValueError: if the method is unknown.

        Example:
            >>> from advmed import TrainingSettings
            >>> settings = TrainingSettings(preset="paper", norm="inf")
            >>> settings.steps, settings.for_method("SAT").steps
            (None, 20)
        """
        chosen = method_class(name).presets[self.preset]
        return replace(self, **{key: value for key, value in chosen.items() if getattr(self, key) is None})

    def without_use(self, name: str) -> list[str]:
        """Of the settings that were given another value than their default, those that mean nothing to a method.

        One file serves all trainers, so that they are no error; but a number that was given to the wrong method would
        be ignored in silence, if nobody said so before the training begins.

        Args:
            name: of the method.

        Raises:
            ValueError: if the method is unknown.

        Example:
            >>> from advmed import TrainingSettings
            >>> TrainingSettings(eps=2.0, steps=10, beta=3.0).without_use("SAT")
            ['beta']
        """
        kind = method_class(name)
        # eps is of all, and of the attack on validation images, which standard training has, too.
        own = {field.name for field in (*fields(kind.settings), *fields(RadiusSettings))}
        others = {field.name for field in fields(EveryMethodSettings)}
        if not issubclass(kind, AdversarialMethod):
            others |= {"awp", "ramp"}
        if not issubclass(kind, ThresholdMethod):
            others |= {"thresholds", "rule"}
        return [
            field.name
            for field in fields(self)
            if field.name in others - own and getattr(self, field.name) != field.default
        ]

    def attack_options(self) -> AttackOptions:
        """The arguments of a method for its attack, those that are known."""
        options: AttackOptions = {
            "norm": self.norm,
            "random_start": self.random_start,
            "bounds": self.bounds,
            "seed": self.seed or 0,
        }
        if self.steps is not None:
            options["steps"] = self.steps
        if self.step_scale is not None:
            options["step_scale"] = self.step_scale
        if self.schedule is not None:
            options["schedule"] = self.schedule
        if self.share_gradient is not None:
            options["share_gradient"] = self.share_gradient
        return options

    def make_method(self, name: str, thresholds: Thresholds | RunningThresholds | None = None) -> Method:
        """The training method of that name with these settings.

        Raises:
            ValueError: if the method is unknown, cannot work with them, or a number that it needs is None.
        """
        kind = method_class(name)
        self.check_method(name)
        chosen = self.for_method(name)
        return kind.from_settings(chosen, thresholds, **chosen.attack_options())


def read_settings(kind: type[S], path: str | Path) -> S:
    """Reads settings from a YAML file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: one message for everything that is wrong in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no settings file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold 'name: value' lines, got a {type(content).__name__}")
    return make_settings(kind, content, str(path))


def make_settings(kind: type[S], values: Mapping[str, Any], origin: str) -> S:
    """Settings from plain values, each checked against the type of its field (by jsonargparse).

    Raises:
        ValueError: naming ``origin`` and every value that is wrong, with the nearest name for an unknown one.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    hints = typing.get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    problems, accepted = [], {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            problems.append(f"unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
            continue
        try:
            if value is None and type(None) not in get_args(hints[name]):  # which jsonargparse lets pass
                raise ArgumentError(None, "null")
            accepted[name] = parser.parse_object({name: value}, defaults=False)[name]
        except ArgumentError:
            problems.append(f"{name} must be {_describe(hints[name])}, got {value!r}")
    if not problems:
        try:
            return kind(**accepted)
        except ValueError as error:
            problems.append(str(error))
    more = "" if all(name in known for name in values) else f"\nThe settings are: {', '.join(known)}."
    raise ValueError(f"{origin}: " + "; ".join(problems) + more)


def settings_text(settings: TrainingSettings, **notes: object) -> str:
    """Settings with every default filled in, as YAML that :func:`read_settings` reads.

    Args:
        settings: what to write.
        **notes: written above them as comments.
    """
    content = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
    comments = "".join(f"# {name}: {value}\n" for name, value in notes.items())
    return comments + str(yaml.safe_dump(content, sort_keys=False))


def _describe(hint: Any) -> str:
    """A type in words."""
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    if origin is tuple:
        return "a pair of numbers"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(hint, "null")
