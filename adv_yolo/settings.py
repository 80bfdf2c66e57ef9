"""The settings of our Ultralytics trainers, and how they are told apart from the host's arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from advmed.training.settings import TrainingSettings, make_settings

RULE = "mean+2std"
"""Default rule for thresholds (arXiv 2206.01736, section 3.7: BCCD)."""

# The paper's values for 320 x 320 x 3 images in [0, 1] (section 3.7): delta 3.5, SAT 1 to 15. An L2 norm grows with the
# square root of the number of values.
_DELTA_PER_VALUE = 3.5 / math.sqrt(320 * 320 * 3)
_EPS_PER_VALUE = 10.0 / math.sqrt(320 * 320 * 3)
_LINF_DELTA, _LINF_EPS = 1 / 255, 4 / 255

# Fields of the core that the host has a name or a value of its own for. The host's warmup_epochs is about the learning
# rate.
_RENAMED = {"clean_epochs": "warmup_epochs"}
_HOST = ("seed",)


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """The arguments that our trainers add to Ultralytics' own. ``warmup_epochs`` is called ``clean_epochs`` there.

    Noise is measured on the image tensor in [0, 1], over all its values. The settings are those of
    :class:`advmed.TrainingSettings`, and these; all of them are on the page of settings (docs/settings.md).

    Attributes:
        eps: None: 10 for 320 x 320 x 3 values, growing with the square root of their number; 4/255 in Linf.
        delta: None: 3.5 for 320 x 320 x 3 values, growing alike; 1/255 in Linf.
        bounds: the range of an image, [0, 1].
        thresholds: "auto" (measured on the model itself where it is a trained one of these classes, else
            self-calibrated), a file of ``adv-yolo thresholds``, or a trained ``.pt`` to be measured.
        bn: which training passes feed the running statistics of BatchNorm, which the network predicts with: "both",
            "clean" (measured: as accurate, and surer of its detections) or "adversarial". Attacks never do. AT,
            and DPAAT without its synchronisation loss, have adversarial passes only.
        robust_batches: so many batches of validation images are attacked after each validation; what the host's
            fitness is on them decides about ``best.pt`` and early stopping. 0: the host's fitness on clean images does.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> from adv_yolo import Settings
        >>> settings = Settings(steps=10).resolved(channels=3, size=320, seed=0)
        >>> settings.eps, settings.delta, settings.bounds
        (10.0, 3.5, (0.0, 1.0))
    """

    bounds: tuple[float, float] | Literal["sample"] | None = (0.0, 1.0)
    bn: Literal["both", "clean", "adversarial"] = "clean"
    robust_batches: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.robust_batches < 0:
            raise ValueError(f"robust_batches must be a whole number >= 0, got {self.robust_batches}")

    def resolved(self, channels: int, size: int, seed: int) -> Settings:
        """These settings with the defaults that depend on the image size filled in."""
        scale = math.sqrt(channels * size * size)
        linf = self.norm == math.inf
        eps = _LINF_EPS if linf else round(_EPS_PER_VALUE * scale, 4)
        delta = _LINF_DELTA if linf else round(_DELTA_PER_VALUE * scale, 4)
        return replace(
            self,
            eps=eps if self.eps is None else self.eps,
            delta=delta if self.delta is None else self.delta,
            seed=seed,
        )


def argument_names() -> list[str]:
    """Our arguments, as a user types them."""
    names = [field.name for field in fields(Settings)]
    back = {field: name for name, field in _RENAMED.items()}
    return [back.get(name, name) for name in names if name not in _HOST]


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The host's arguments and ours."""
    ours = set(argument_names())
    return (
        {name: value for name, value in arguments.items() if name not in ours},
        {name: value for name, value in arguments.items() if name in ours},
    )


def settings_of(arguments: Mapping[str, Any]) -> Settings:
    """Settings from our arguments.

    Raises:
        ValueError: naming every value that is wrong.
    """
    with our_names():
        return make_settings(
            Settings,
            {_RENAMED.get(name, name): value for name, value in arguments.items()},
            "adversarial training arguments",
        )


@contextmanager
def our_names() -> Iterator[None]:
    """Errors of the core speak of the arguments by the names that a user types."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name, field in _RENAMED.items():
            text = text.replace(field, name)
        raise ValueError(text) from error


def arguments_of(settings: Settings) -> dict[str, Any]:
    """The inverse of :func:`settings_of`: plain values by the names that a user types."""
    back = {field: name for name, field in _RENAMED.items()}
    values = {back.get(name, name): value for name, value in vars(settings).items() if name not in _HOST}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
