"""Settings: dataclasses whose every value is checked before anything runs.

A host derives its own settings from :class:`MethodSettings`, reads them with :func:`read_settings`, and writes what
they resolved to with :func:`settings_text`.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from common.attacks.gradient import GradientAttack
from common.attacks.problem import check_bounds
from common.methods import AMAT, AT, DPAAT, SAT, STD, TRADES, AdaptiveRadiusMethod, Method
from common.methods.base import check_positive
from common.methods.dpaat import check_sizes
from common.norms import check_norm
from common.thresholds import RunningThresholds, Thresholds, std_factor

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (STD, AT, SAT, AMAT, TRADES, DPAAT)}
"""The training methods by name."""

S = TypeVar("S", bound="MethodSettings")


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """The attack of a training.

    Attributes:
        steps: gradient steps (both papers: 20).
        step_scale: a in alpha = a * radius / steps.
        norm: 2 or inf.
        random_start: fraction of the radius from whose ball an attack starts; TRADES, which cannot start on the clean
            image, takes 0.01 for 0.
        bounds: lowest and highest value of an input, as a pair; "sample": each sample's own; None: no bounds.

    Raises:
        ValueError: a value out of its range.
    """

    steps: int = 20
    step_scale: float = 4.0
    norm: float = 2.0
    random_start: float = 0.0
    bounds: tuple[float, float] | Literal["sample"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        GradientAttack(self.steps, self.step_scale, self.norm, self.random_start)
        check_bounds(self.bounds)


@dataclass(frozen=True, kw_only=True)
class RuleSettings:
    """The numbers and choices of the training methods, apart from their attack.

    Attributes:
        eps: radius of the noise of AT, SAT and TRADES, and first size of DPAAT, >= 0; None: the host's default.
        delta: first margin and expansion step of AMAT, > 0; None: the host's default.
        refinement: AMAT's rule for a margin that was too large, "paper" or "crossing".
        margin_min: lowest margin of AMAT, or None.
        margin_max: highest margin of AMAT, or None.
        eps_min: smallest perturbation size of DPAAT; None: 0.
        eps_max: largest perturbation size of DPAAT; None: 2 * eps.
        step_size: how far a perturbation size of DPAAT moves a visit, 0 for fixed sizes; None: eps / 10.
        sync_weight: weight of DPAAT's synchronisation loss, >= 0.
        average: what DPAAT compares a loss increase with, the mean over the "batch" or over the "epoch" so far.
        beta: weight of TRADES' distance, > 0.
        thresholds: "auto", or the path of a thresholds file (AMAT).
        rule: how thresholds are made of mean and standard deviation, "mean" or "mean+2std"; None: as the thresholds
            file was made, and "mean" where there is none.
        warmup_epochs: epochs of standard training first; None: only as many as self-calibration needs.
        backward: "together" back-propagates the clean and the adversarial part in one go, "sequential" one after the
            other, at the peak memory of a standard step.
        seed: seed of the network's weights and of random starts; None: unseeded weights, as the host has them.

    Raises:
        ValueError: a value out of its range.
    """

    eps: float | None = None
    delta: float | None = None
    refinement: Literal["paper", "crossing"] = "paper"
    margin_min: float | None = None
    margin_max: float | None = None
    eps_min: float | None = None
    eps_max: float | None = None
    step_size: float | None = None
    sync_weight: float = 1.0
    average: Literal["batch", "epoch"] = "batch"
    beta: float = 6.0
    thresholds: str = "auto"
    rule: str | None = None
    warmup_epochs: int | None = None
    backward: Literal["together", "sequential"] = "together"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.rule is not None:
            std_factor(self.rule)
        for name in ("delta", "margin_max", "beta"):
            self._check(name)
        for name in ("eps", "margin_min", "eps_min", "eps_max", "step_size", "sync_weight"):
            self._check(name, zero=True)
        if self.margin_min is not None and self.margin_max is not None and self.margin_min > self.margin_max:
            raise ValueError(f"margin_min {self.margin_min} is above margin_max {self.margin_max}")
        if self.eps is not None:
            check_sizes(self.eps_min or 0.0, self.eps, 2 * self.eps if self.eps_max is None else self.eps_max, "eps")
        if self.warmup_epochs is not None and self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be >= 0, got {self.warmup_epochs}")

    def check_method(self, name: str) -> None:
        """Raises ValueError if the method of that name cannot work with these settings."""
        compares = name == "TRADES" or (name == "DPAAT" and self.sync_weight > 0)
        if compares and self.backward == "sequential":
            raise ValueError(
                f"{name} compares the predictions of its two passes, which therefore cannot be back-propagated one "
                f"after the other: use backward 'together'"
            )

    def _check(self, name: str, *, zero: bool = False) -> None:
        value = getattr(self, name)
        if value is not None:
            check_positive(name, value, zero=zero)


@dataclass(frozen=True, kw_only=True)
class MethodSettings(AttackSettings, RuleSettings):
    """What a training method needs to know, on every host: the fields of both bases.

    Raises:
        ValueError: a value out of its range.
    """

    def __post_init__(self) -> None:
        RuleSettings.__post_init__(self)
        AttackSettings.__post_init__(self)

    def method(self, name: str, thresholds: Thresholds | RunningThresholds | None = None) -> Method:
        """The training method of that name with these settings.

        Raises:
            ValueError: if the method is unknown, or a number that it needs is None.
        """
        attack: dict[str, Any] = {
            "steps": self.steps,
            "step_scale": self.step_scale,
            "norm": self.norm,
            "random_start": self.random_start,
            "bounds": self.bounds,
            "seed": self.seed or 0,
        }
        if name == "STD":
            return STD()
        if name in ("SAT", "AT", "TRADES", "DPAAT"):
            if self.eps is None:
                raise ValueError(f"{name} needs eps, the radius of its noise")
            return self._with_radius(name, self.eps, attack)
        if name == "AMAT":
            if self.delta is None or thresholds is None:
                raise ValueError("AMAT needs delta and thresholds")
            return AMAT(
                self.delta,
                thresholds,
                refinement=self.refinement,
                margin_min=self.margin_min,
                margin_max=self.margin_max,
                **attack,
            )
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")

    def _with_radius(self, name: str, eps: float, attack: dict[str, Any]) -> Method:
        if name in ("SAT", "AT"):
            return (SAT if name == "SAT" else AT)(eps, **attack)
        self.check_method(name)
        if name == "TRADES":
            return TRADES(eps, beta=self.beta, **{**attack, "random_start": self.random_start or 0.01})
        return DPAAT(
            eps,
            eps_min=self.eps_min,
            eps_max=self.eps_max,
            step_size=self.step_size,
            sync_weight=self.sync_weight,
            average=self.average,
            **attack,
        )


def is_adaptive(name: str) -> bool:
    """Whether the method of that name keeps a noise level for each sample."""
    return issubclass(METHODS[name], AdaptiveRadiusMethod)


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
    """Settings from plain values, each checked against the type of its field.

    Raises:
        ValueError: naming ``origin`` and every value that is wrong, with the nearest name for an unknown one.
    """
    hints = typing.get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    problems, accepted = [], {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            problems.append(f"unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
            continue
        try:
            accepted[name] = _converted(value, hints[name])
        except TypeError:
            problems.append(f"{name} must be {_describe(hints[name])}, got {value!r}")
    if not problems:
        try:
            return kind(**accepted)
        except ValueError as error:
            problems.append(str(error))
    more = "" if all(name in known for name in values) else f"\nThe settings are: {', '.join(known)}."
    raise ValueError(f"{origin}: " + "; ".join(problems) + more)


def settings_text(settings: MethodSettings, **notes: Any) -> str:
    """Settings with every default filled in, as YAML that :func:`read_settings` reads.

    Args:
        settings: what to write.
        **notes: written above them as comments.
    """
    content = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
    comments = "".join(f"# {name}: {value}\n" for name, value in notes.items())
    return comments + str(yaml.safe_dump(content, sort_keys=False))


def _converted(value: Any, hint: Any) -> Any:
    """``value`` as the type says, or TypeError. Whole numbers serve as floats; nothing else is converted."""
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in get_args(hint):
            try:
                return _converted(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise TypeError
    if origin is tuple:
        parts = get_args(hint)
        if isinstance(value, (list, tuple)) and len(value) == len(parts):
            return tuple(_converted(v, part) for v, part in zip(value, parts, strict=True))
        raise TypeError
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3, without a point, as a text
        try:
            return float(value)
        except ValueError:
            raise TypeError from None
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if hint in (int, str, bool) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TypeError


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    if origin is tuple:
        return "a pair of numbers"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(hint, "null")
