"""The objective: the one thing a host hands to attacks and methods.

An objective is any callable ``images -> terms`` closed over model and targets: images of shape (B, C, *spatial) as the
network receives them, terms of shape (B, K), the host's own training loss split into its K terms, one row per sample,
gradients attached. An attack scales the loss against float16 underflow where it sees float16 autocast around it, so
autocast belongs around the attack, not only inside the objective. Three attributes are optional:

- ``model``: the ``torch.nn.Module`` that is held still while it is attacked (:mod:`common.guard`); without it nothing
  protects running statistics, weight gradients and the random state;
- ``names``: the K names of the terms;
- ``loss(images) -> (loss, terms)``: the host's own batch loss (a scalar to back-propagate) and the terms of the same
  forward pass, for hosts whose loss is not the mean of its per-sample terms (batch Dice, batch-wide normalisers).

Methods that compare predictions (DPAAT, TRADES) need a :class:`PredictingObjective`, which has three more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from common.guard import still


@runtime_checkable
class Objective(Protocol):
    """A callable ``images (B, C, *spatial) -> terms (B, K)``."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Returns the loss terms, shape (B, K), with gradients."""
        ...


@runtime_checkable
class PredictingObjective(Objective, Protocol):
    """An objective that also gives predictions, in whatever form its task has them."""

    def predictions(self, images: Tensor, /) -> Any:
        """The predictions of a pass like that of :meth:`Objective.__call__`, with gradients."""
        ...

    def loss_and_predictions(self, images: Tensor, /) -> tuple[Tensor, Tensor, Any]:
        """One pass for training: the loss to back-propagate, the terms (B, K), and the predictions."""
        ...

    def distance(self, clean: Any, other: Any, /) -> Tensor:
        """How far other predictions are from those on the clean images, shape (B,), >= 0, 0 where they are equal."""
        ...


def model_of(objective: Objective) -> torch.nn.Module | None:
    """The objective's model, or None if it names none."""
    model = getattr(objective, "model", None)
    return model if isinstance(model, torch.nn.Module) else None


@contextmanager
def untraced(objective: Objective) -> Iterator[None]:
    """No gradients, and no trace in the objective's model (:func:`common.guard.still`): for passes that only look."""
    model = model_of(objective)
    with torch.no_grad(), nullcontext() if model is None else still(model):
        yield


def names_of(objective: Objective, count: int) -> tuple[str, ...]:
    """The names of the objective's K terms; ``loss`` or ``term_0, ...`` where it gives none."""
    names: Sequence[str] | None = getattr(objective, "names", None)
    if names is not None:
        return tuple(names)
    return ("loss",) if count == 1 else tuple(f"term_{k}" for k in range(count))


def check_terms(terms: Tensor, images: Tensor) -> Tensor:
    """Returns ``terms`` if their shape is (B, K).

    Raises:
        ValueError: otherwise; the usual mistake is a loss already averaged over the batch.
    """
    if not isinstance(terms, Tensor) or terms.ndim != 2 or terms.shape[0] != images.shape[0]:
        got = tuple(terms.shape) if isinstance(terms, Tensor) else type(terms).__name__
        raise ValueError(
            f"the objective must return loss terms of shape (B, K) = ({images.shape[0]}, K), one row per sample and "
            f"not averaged over the batch, got {got}"
        )
    return terms


def training_pass(objective: Objective, images: Tensor) -> tuple[Tensor, Tensor]:
    """One forward pass for training: the loss to back-propagate, and the terms it is made of.

    Returns:
        loss: scalar; the host's own batch loss where the objective has ``loss``, else the batch mean of the summed
            terms.
        terms: shape (B, K), detached.
    """
    own = getattr(objective, "loss", None)
    if own is not None:
        loss, terms = own(images)
        return loss, check_terms(terms, images).detach()
    terms = check_terms(objective(images), images)
    return terms.sum(1).mean(), terms.detach()


def predicting(objective: Objective, method: str) -> PredictingObjective:
    """Returns ``objective`` if it gives predictions.

    Raises:
        TypeError: otherwise, naming the method that needs them and what is missing.
    """
    missing = [
        name
        for name in ("predictions", "loss_and_predictions", "distance")
        if not callable(getattr(objective, name, None))
    ]
    if missing:
        raise TypeError(
            f"{method} compares predictions on clean and attacked images, and {type(objective).__name__} gives none: "
            f"it has no {', '.join(missing)} (see common.objective.PredictingObjective)"
        )
    return cast(PredictingObjective, objective)
