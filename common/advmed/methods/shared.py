"""One backward pass for two uses: the gradients of the weights, and that of the images, which an attack begins with.

An attack that starts on the clean images needs the gradient there first, and a method that also learns from clean
images goes back through that very pass. Done once, it saves a forward pass and a half backward pass: n attack steps
cost (2 n + 4) / 3 standard steps in place of (2 n + 6) / 3. As no gradient of a weight may be lost on the way to the
host's optimizer, scaler and communication, the pass is handed on as a loss whose gradients are known already.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advmed.attacks.problem import CleanPass, in_float16
from advmed.objective import Objective, PredictingObjective, model_of

_FLOAT16_SCALE = 2.0**15
"""Of a loss whose gradient is taken for its direction only; see :mod:`advmed.attacks.problem`."""


class CleanGradients:
    """Takes the gradients of the clean training pass at once.

    A method has one of these. It looks at the first pass that it is given and steps aside where gradients would be
    lost: where the loss depends on weights outside the objective's model.
    """

    def __init__(self) -> None:
        self._looked = self._aside = False

    def possible(self, objective: Objective, images: Tensor, backward: Callable[[Tensor], None] | None) -> bool:
        """Whether the gradients of a pass can be taken apart from the host's own backward pass.

        Not without a model, whose weights are to be known; nor in float16 where the host does not tell its loss scale
        (attribute ``loss_scale`` of the objective), without which small gradients would be lost.
        """
        if self._aside or model_of(objective) is None:
            return False
        return backward is not None or not in_float16(images) or scale_of(objective) is not None

    def take(
        self,
        objective: Objective,
        images: Tensor,
        loss: Tensor,
        terms: Tensor,
        backward: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, CleanPass | None]:
        """Goes back through a pass.

        Args:
            objective: has a model.
            images: what went into the pass, a leaf that asks for its gradient.
            loss: scalar, the pass's part of the training loss.
            terms: (B, K), detached.
            backward: back-propagates a scalar into the weights; None: gradients wait for the loss's own backward pass.

        Returns:
            The loss to go on with (detached after ``backward``), and what an attack begins with; None where this pass
            must go back together with the rest.
        """
        if backward is not None:
            backward(loss)
            gradient, images.grad = images.grad, None
            return loss.detach(), None if gradient is None else CleanPass(terms, gradient)
        model = model_of(objective)
        assert model is not None
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        if not self._looked:
            self._looked = True
            self._aside = not self._knows_all(loss, [*weights, images]) or _hooked(weights)
            if self._aside:
                return loss, None
        scale = scale_of(objective)
        try:
            with torch.autocast(images.device.type, enabled=False):
                image, *found = torch.autograd.grad(loss, [images, *weights], scale, allow_unused=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"the gradients of the clean pass cannot be taken at once here ({error}). Set share_gradient: false, "
                f"which costs one more pass in each step"
            ) from error
        if image is None:
            return loss, None
        return known_loss(loss.detach(), scale, weights, found), CleanPass(terms, image)

    def _knows_all(self, loss: Tensor, known: Sequence[Tensor]) -> bool:
        identities = {id(tensor) for tensor in known}
        strangers = [leaf for leaf in leaves(loss) if id(leaf) not in identities]
        if strangers:
            warnings.warn(
                f"the loss depends on {len(strangers)} tensor(s) with gradients outside the objective's model, of "
                f"shapes {[tuple(leaf.shape) for leaf in strangers[:3]]}: the clean pass is not shared with the "
                f"attack, which makes a step somewhat slower",
                stacklevel=2,
            )
        return not strangers


def predictions_first(predictor: PredictingObjective, images: Tensor) -> tuple[tuple[Tensor, Tensor, Any], CleanPass]:
    """The clean pass of a method that compares predictions, whose graph is needed once more after the attack.

    Args:
        predictor: of the batch.
        images: shape (B, C, *spatial).

    Returns:
        What :meth:`advmed.objective.PredictingObjective.loss_and_predictions` gives, and what an attack begins with.
    """
    leaf = leaf_of(images)
    loss, terms, predictions = predictor.loss_and_predictions(leaf)
    scale = scale_of(predictor)
    if scale is None and in_float16(images):
        scale = loss.new_tensor(_FLOAT16_SCALE)
    with torch.autocast(images.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(loss, leaf, scale, retain_graph=True)
    return (loss, terms, predictions), CleanPass(terms.detach(), gradient)


def repeatable(predictor: PredictingObjective | None) -> bool:
    """Whether one can go back through a pass of it twice, as :func:`predictions_first` does: not where the network is
    compiled, whose buffers are given away the first time."""
    model = None if predictor is None else model_of(predictor)
    return predictor is not None and (model is None or not any(hasattr(m, "_orig_mod") for m in model.modules()))


def leaf_of(images: Tensor) -> Tensor:
    """Images that ask for their gradient: themselves, where the host made them so, or a view of them."""
    return images if images.requires_grad else images.detach().requires_grad_()


def leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a graph ends in."""
    waiting, met = [loss.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
        waiting += [following for following, _ in node.next_functions]


def has_hooks(weights: Sequence[Tensor], *, accumulated: bool = False) -> bool:
    """Whether hooks of weights may do something each time that a gradient is taken.

    Args:
        weights: to look at.
        accumulated: whether gradients come to lie in ``grad``, where hooks may wait for them, too.
    """
    if any(weight._backward_hooks for weight in weights):
        return True
    return accumulated and any(getattr(weight, "_post_accumulate_grad_hooks", None) for weight in weights)


def _hooked(weights: Sequence[Tensor]) -> bool:
    """Whether hooks of weights change their gradients, which would be done here and once more behind the loss."""
    hooked = has_hooks(weights)
    if hooked:
        warnings.warn(
            "weights have hooks that may change their gradients: the clean pass is not shared with the attack, which "
            "makes a step somewhat slower",
            stacklevel=3,
        )
    return hooked


def _apart(gradients: list[Tensor]) -> list[Tensor]:
    """Gradients that share no memory: autograd gives weights that are added to each other one and the same."""
    seen, apart = set[int](), []
    for gradient in gradients:
        place = gradient.untyped_storage().data_ptr()
        apart.append(gradient.clone() if place in seen else gradient)
        seen.add(place)
    return apart


def known_loss(
    loss: Tensor, scale: Tensor | None, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Tensor:
    """A loss whose gradients are known already, to be back-propagated as any other.

    Args:
        loss: scalar, detached.
        scale: what the gradients were multiplied by; None: nothing.
        weights: the leaves that they belong to.
        gradients: one for each; None where there is none.
    """
    known = [(weight, gradient) for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]
    apart = _apart([gradient for _, gradient in known])
    made: Tensor = _Known.apply(loss, scale, apart, *(weight for weight, _ in known))
    return made


def scale_of(objective: Objective) -> Tensor | None:
    """What the host multiplies its loss by against underflow in float16; None: not told, or nothing."""
    scale = getattr(objective, "loss_scale", None)
    return scale if isinstance(scale, Tensor) else None


class _Known(torch.autograd.Function):
    """A scalar whose gradients with respect to some weights are known already."""

    @staticmethod
    def forward(
        context: Any, loss: Tensor, scale: Tensor | None, gradients: list[Tensor], *weights: nn.Parameter
    ) -> Tensor:
        context.scale, context.gradients = scale, gradients
        return loss.clone()

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Any:
        factor = upstream if context.scale is None else upstream / context.scale
        gradients, context.gradients = context.gradients, None
        if gradients is None:
            raise RuntimeError(
                "a loss whose clean gradients were taken at once was back-propagated a second time, when they are "
                "gone; set share_gradient: false for that"
            )
        # In place: they are nobody else's, and a second set would be as large as the network.
        return None, None, None, *(gradient.mul_(factor) for gradient in gradients)
