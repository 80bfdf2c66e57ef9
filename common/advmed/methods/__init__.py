"""Training methods: one file per method, each a ``step`` from (objective, images, ids) to a training loss.

To add a method, write its file, add it to :data:`METHODS` and its settings to :class:`EveryMethodSettings`, and give
the hosts their trainers (a test finds one that is missing) and the paper index an entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from advmed.methods.amat import AMAT, AMATSettings
from advmed.methods.at import AT
from advmed.methods.awp import WeightPerturbation
from advmed.methods.base import (
    AdaptiveRadiusMethod,
    AdversarialMethod,
    AttackSettings,
    Method,
    MethodSettings,
    RadiusSettings,
    Step,
)
from advmed.methods.dpaat import DPAAT, DPAATSettings
from advmed.methods.fat import FAT, FATSettings
from advmed.methods.mart import MART, MARTSettings
from advmed.methods.sat import SAT
from advmed.methods.std import STD
from advmed.methods.trades import TRADES, TRADESSettings

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (STD, AT, SAT, AMAT, TRADES, DPAAT, MART, FAT)}
"""The training methods by name."""


@dataclass(frozen=True, kw_only=True)
class EveryMethodSettings(AMATSettings, TRADESSettings, DPAATSettings, MARTSettings, FATSettings):
    """The settings of all methods, so that one file serves all trainers."""


def method_class(name: str, objective: type | None = None) -> type[Method]:
    """The method of that name.

    Args:
        name: such as "AMAT".
        objective: the class of the objectives that it is for; None: not known.

    Raises:
        ValueError: if there is none.
        TypeError: if it cannot work with such objectives.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    kind = METHODS[name]
    if objective is not None and kind.needs_classes and not hasattr(objective, "class_scores"):
        others = [other.name for other in METHODS.values() if not other.needs_classes]
        raise TypeError(
            f"{name} is for predictions that are class probabilities, and those of {objective.__name__} are others; "
            f"choose one of {', '.join(others)}"
        )
    return kind


__all__ = [
    "AMAT",
    "AT",
    "DPAAT",
    "FAT",
    "MART",
    "METHODS",
    "SAT",
    "STD",
    "TRADES",
    "AdaptiveRadiusMethod",
    "AdversarialMethod",
    "AttackSettings",
    "EveryMethodSettings",
    "Method",
    "MethodSettings",
    "RadiusSettings",
    "Step",
    "WeightPerturbation",
    "method_class",
]
