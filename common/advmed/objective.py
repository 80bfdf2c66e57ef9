"""The objective: the one thing a host hands to attacks and methods.

An objective is any callable ``images -> terms`` closed over model and targets: images of shape (B, C, *spatial) as the
network receives them, terms of shape (B, K), the host's own training loss split into its K terms, one row per sample,
gradients attached. An attack scales the loss against float16 underflow where it sees float16 autocast around it, so
autocast belongs around the attack, not only inside the objective. Five attributes are optional:

- ``model``: the ``torch.nn.Module`` that is held still while it is attacked (:mod:`advmed.guard`); without it nothing
  protects running statistics, weight gradients and the random state;
- ``names``: the K names of the terms;
- ``empty``: for each sample, in the host's memory, whether its truth holds nothing to find (a slice without a
  structure, an image without an object): what such a sample bears is no measure, see ``empty_samples`` of AMAT;
- ``take(rows) -> objective``: the objective of some samples of the batch, by their numbers, (n,), int64: an ensemble of
  attacks (:class:`advmed.attacks.Standard`) then spends nothing on those that have failed;
- ``loss(images) -> (loss, terms)``: the host's own batch loss (a scalar to back-propagate) and the terms of the same
  forward pass, for hosts whose loss is not the mean of its per-sample terms (batch Dice, batch-wide normalisers).

Methods that compare predictions (DPAAT, TRADES, MART) need a :class:`PredictingObjective`, which has three more. Where
predictions are probabilities of classes, a :class:`ClassObjective` shows them: losses to attack with
(:mod:`advmed.attacks.losses`) and MART ask for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from advmed.guard import preserved


@runtime_checkable
class Objective(Protocol):
    """A callable ``images (B, C, *spatial) -> terms (B, K)``.

    Example:
        >>> import torch
        >>> from advmed import Objective
        >>> def objective(images):  # the mean square of each image, K = 1
        ...     return images.square().flatten(1).mean(1, keepdim=True)
        >>> isinstance(objective, Objective), objective(torch.ones(3, 1, 8, 8)).shape
        (True, torch.Size([3, 1]))
    """

    def __call__(self, images: Tensor, /) -> Tensor:
        """Returns the loss terms, shape (B, K), with gradients."""
        ...


@runtime_checkable
class PredictingObjective(Objective, Protocol):
    """An objective that also gives predictions, in whatever form its task has them.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import PredictingObjective
        >>> objective = ClassificationObjective(torch.nn.Linear(4, 2), torch.tensor([0, 1]))
        >>> predictions = objective.predictions(torch.eye(2, 4))
        >>> isinstance(objective, PredictingObjective), objective.distance(predictions, predictions).tolist()
        (True, [0.0, 0.0])
    """

    def predictions(self, images: Tensor, /) -> Any:
        """The predictions of a pass like that of :meth:`Objective.__call__`, with gradients."""
        ...

    def loss_and_predictions(self, images: Tensor, /) -> tuple[Tensor, Tensor, Any]:
        """One pass for training: the loss to back-propagate, the terms (B, K), and the predictions."""
        ...

    def distance(self, clean: Any, other: Any, /) -> Tensor:
        """How far other predictions are from those on the clean images, shape (B,), >= 0, 0 where they are equal."""
        ...


class ClassScores(NamedTuple):
    """What predictions are, where they are classes: of each image, or of each of its voxels.

    Attributes:
        logits: (B, C, *places), with gradients; no places for the classes of images.
        truth: the same shape, 0 or 1: one class a place, or any number of regions.
        valid: (B, 1, *places), bool, False where a place does not count; None if all do.
        exclusive: one class a place (softmax), not regions (sigmoid).

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> objective = ClassificationObjective(torch.nn.Identity(), labels=torch.tensor([1]))
        >>> scores = objective.class_scores(torch.tensor([[0.2, 0.8]]))
        >>> scores.truth, scores.exclusive
        (tensor([[0., 1.]]), True)
    """

    logits: Tensor
    truth: Tensor
    valid: Tensor | None
    exclusive: bool


@runtime_checkable
class ClassObjective(Objective, Protocol):
    """An objective whose predictions are classes.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import ClassObjective
        >>> objective = ClassificationObjective(torch.nn.Linear(4, 2), torch.tensor([0, 1]))
        >>> isinstance(objective, ClassObjective), isinstance(lambda images: images.flatten(1), ClassObjective)
        (True, False)
    """

    def predictions(self, images: Tensor, /) -> Any:
        """As :meth:`PredictingObjective.predictions`."""
        ...

    def class_scores(self, predictions: Any, /) -> ClassScores:
        """The classes of such predictions, beside the true ones."""
        ...


@runtime_checkable
class ImageClassObjective(ClassObjective, Protocol):
    """An objective with one class an image."""

    def terms_and_errors(self, images: Tensor, /) -> tuple[Tensor, Tensor]:
        """One pass: the terms, (B, K), with gradients, and whether the class is wrong, (B,), bool."""
        ...


class Averaged:
    """The objective of a network that is random (dropout, random smoothing, a random layer): the mean over draws.

    The gradient of a single pass leads an attack to what is bad for the numbers of that pass, and a loss that is judged
    by other numbers looks robust. An attack climbs, and is judged by, the mean over several passes in its place:
    expectation over transformation (Athalye et al. 2018, "Synthesizing robust adversarial examples").

    Args:
        objective: images -> (B, K) loss terms, other ones in each pass; with its ``model`` named, or random numbers of
            the caller are used up. Losses to attack with (:class:`AttackLoss`) see its classes.
        draws: passes that the mean is over, >= 2; each costs what one costs, time and memory.

    Raises:
        ValueError: fewer than two draws, or no whole number.

    Example:
        >>> import torch
        >>> from advmed import Averaged
        >>> noisy = lambda images: (images + torch.randn_like(images)).flatten(1).sum(1, keepdim=True)
        >>> _ = torch.manual_seed(0)
        >>> passes = torch.cat([Averaged(noisy, draws=100)(torch.zeros(1, 1, 2, 2)) for _ in range(50)])
        >>> round(passes.std().item(), 1)  # of a single pass it is 2
        0.2
    """

    def __init__(self, objective: Objective, draws: int) -> None:
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
            raise ValueError(f"draws must be a whole number >= 2, got {draws!r}")
        self.objective, self.draws = objective, draws
        self.model: torch.nn.Module | None = model_of(objective)
        self.names: Sequence[str] | None = getattr(objective, "names", None)

    def __call__(self, images: Tensor) -> Tensor:
        """The mean terms."""
        return torch.stack([check_terms(self.objective(images), images) for _ in range(self.draws)]).mean(0)


def model_of(objective: Objective) -> torch.nn.Module | None:
    """The objective's model, or None if it names none."""
    model = getattr(objective, "model", None)
    return model if isinstance(model, torch.nn.Module) else None


@contextmanager
def inspecting(objective: Objective) -> Iterator[None]:
    """No gradients, no trace in the objective's model (:func:`advmed.guard.preserved`): for passes that only look."""
    model = model_of(objective)
    with torch.no_grad(), nullcontext() if model is None else preserved(model):
        yield


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode: such a tensor takes no part in a backward pass."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


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
    _require(
        objective,
        ("predictions", "loss_and_predictions", "distance"),
        f"{method} compares predictions on clean and attacked images, and {type(objective).__name__} gives none",
        "PredictingObjective",
    )
    return cast(PredictingObjective, objective)


def classes_of(objective: Objective, what: str) -> ClassObjective:
    """Returns ``objective`` if it shows classes.

    Raises:
        TypeError: otherwise, naming what needs them and what is missing.
    """
    _require(
        objective,
        ("predictions", "class_scores"),
        f"{what} is for predictions that are classes, of images or voxels; {type(objective).__name__} shows none",
        "ClassObjective",
    )
    return cast(ClassObjective, objective)


def _require(objective: Objective, names: Sequence[str], problem: str, protocol: str) -> None:
    missing = [name for name in names if not callable(getattr(objective, name, None))]
    if missing:
        raise TypeError(f"{problem}: it has no {', '.join(missing)} (see advmed.objective.{protocol})")
