"""AWP: adversarial weight perturbation, an ingredient of any adversarial method.

D. Wu, S.-T. Xia, Y. Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, arXiv
2004.05884: the gradient that the optimizer gets is taken where the weights have been moved uphill, layer by layer, by a
share of each layer's length. Networks then end where the loss is flat in the weights, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from advmed.attacks.problem import in_float16
from advmed.distributed import summed
from advmed.guard import unlearnt
from advmed.methods.base import AdversarialMethod, Backward, Step
from advmed.methods.shared import has_hooks, known_loss, leaves, scale_of
from advmed.objective import Objective, model_of


class WeightPerturbation:
    """Takes the steps of an adversarial method with its weights moved.

    The method makes its step as ever, which attacks the images, moves margins and says where uphill is: the gradient of
    its own training loss. Then every weight of two axes or more, so no bias and nothing of a normalisation, is moved by
    ``gamma`` times its own length along its gradient, the method's loss of the same images and the same noise is
    back-propagated there, and the weights are what they were, to the bit. That is a training pass more for each pass
    that the method learns from (:attr:`cost`), and the memory of two networks. BatchNorm, and every other layer with
    buffers, learns from the passes at the network's own weights only; processes that train together move their weights
    alike. Weights in half precision (bf16-true, not bf16-mixed) hold such moves with an error of their own.

    (Source: D. Wu et al. 2020, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS, arXiv
    2004.05884, section 4, with one step. In the authors' release uphill is told by the loss of the attacked images
    alone, but for TRADES; here by all that the method learns from.)

    Args:
        method: an adversarial method.
        gamma: share of a layer's length, in (0, 1); the authors' release has 0.01 for AT and 0.005 for TRADES.

    Raises:
        ValueError: if gamma is out of its range.

    Example:
        >>> import torch
        >>> from adv_classify import ClassificationObjective
        >>> from advmed import SAT, WeightPerturbation
        >>> network = torch.nn.Linear(4, 2)
        >>> objective = ClassificationObjective(network, torch.tensor([0, 1]))
        >>> before = network.weight.clone()
        >>> step = WeightPerturbation(SAT(eps=0.5), gamma=0.005).step(objective, torch.eye(2, 4), ["a", "b"])
        >>> step.loss.backward()  # and then the optimizer's step, as in any training
        >>> network.weight.grad.shape, torch.equal(network.weight, before)
        (torch.Size([2, 4]), True)
    """

    def __init__(self, method: AdversarialMethod, gamma: float = 0.005) -> None:
        self.method, self.gamma = method, check_share(gamma)

    @property
    def cost(self) -> float:
        """Of a step, in standard training steps, as :attr:`Method.cost`."""
        return self.method.cost + (2 if self.method.learns_from_clean else 1)

    def step(self, objective: Objective, images: Tensor, ids: Sequence[str], backward: Backward | None = None) -> Step:
        """See :meth:`Method.step`; the loss is that at the moved weights, everything else is of the method's own step.

        Raises:
            ValueError: if the objective has no ``model``, whose weights are to be moved; if weights have hooks; if the
                method attacks nothing; or in float16 without ``backward``, if the objective does not tell its
                ``loss_scale``.
        """
        model = model_of(objective)
        if model is None:
            raise ValueError("awp moves the weights of the objective's model, and this objective has no 'model'")
        scale = scale_of(objective)
        if backward is None and in_float16(images) and scale is None:
            raise ValueError(
                "awp in float16 needs the loss scale: give step() a backward, or the objective an attribute loss_scale"
            )
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        if has_hooks(weights, accumulated=backward is not None):
            raise ValueError("awp takes two gradients in a step, and hooks of weights would do their work twice")
        learning = list[Tensor](weights)
        if backward is None:
            made = self.method.step(objective, images, ids)
            learning += _strangers(made.loss, weights, images)
            uphill = _gradients(made.loss, weights, scale)
        else:
            aside: dict[int, tuple[Tensor, Tensor | None]] = {}
            _lay_aside(weights, aside)

            def noted(loss: Tensor) -> None:
                _lay_aside(_strangers(loss, weights, images), aside)
                backward(loss)

            made = self.method.step(objective, images, ids, noted)
            uphill = [weight.grad for weight in weights]
            for tensor, gradient in aside.values():
                tensor.grad = gradient
        if made.adversarial is None:
            raise ValueError(f"awp is for methods that attack images, and a step of {self.method.name} has none")
        saved = self._move(weights, uphill)
        del uphill  # as large as the network
        try:
            with unlearnt(model):
                if backward is not None:
                    loss = self.method.loss_of(objective, images.detach(), made.adversarial, backward)
                else:  # part by part, or the graphs of both passes would live at the same time
                    parts = _Gathered(learning, scale)
                    loss = self.method.loss_of(objective, images.detach(), made.adversarial, parts)
                    loss = known_loss(loss, scale, learning, parts.gradients)
        finally:
            for weight, value in saved:
                weight.copy_(value)
            torch.clear_autocast_cache()
        return replace(made, loss=loss)

    def _move(self, weights: Sequence[Tensor], uphill: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """Adds gamma * ||w|| * g / ||g||, layer by layer; uphill for all processes together.

        Returns:
            What was moved, and the values before.
        """
        pairs = [(w.detach(), g) for w, g in zip(weights, uphill, strict=True) if w.dim() > 1]  # the same memory
        saved = [(weight, weight.clone()) for weight, _ in pairs]
        gradients = summed([torch.zeros_like(weight) if g is None else g for weight, g in pairs])
        for (weight, _), gradient in zip(pairs, gradients, strict=True):
            length, norm = weight.norm(), gradient.norm()
            share = torch.where(norm.isfinite() & (norm > 0), self.gamma * length / norm, 0.0)
            weight.add_((gradient * share).nan_to_num(0.0, 0.0, 0.0))
        torch.clear_autocast_cache()  # which holds weights in half precision, as they were
        return saved


class _Gathered:
    """Goes back through the parts of a loss, and adds up their gradients apart from ``grad``."""

    def __init__(self, tensors: Sequence[Tensor], scale: Tensor | None) -> None:
        self.tensors, self.scale = tensors, scale
        self.gradients: list[Tensor | None] = [None] * len(tensors)

    def __call__(self, loss: Tensor) -> None:
        found = _gradients(loss, self.tensors, self.scale)
        both = zip(self.gradients, found, strict=True)
        self.gradients = [old if new is None else new if old is None else old + new for old, new in both]


def _strangers(loss: Tensor, weights: Sequence[Tensor], images: Tensor) -> list[Tensor]:
    """The leaves of a graph that are neither weights nor images: of a loss that learns itself."""
    known, place = {id(weight) for weight in weights}, images.untyped_storage().data_ptr()
    strangers = [leaf for leaf in leaves(loss) if id(leaf) not in known]
    return [leaf for leaf in strangers if leaf.untyped_storage().data_ptr() != place]


def check_share(gamma: float) -> float:
    """Returns ``gamma``.

    Raises:
        ValueError: if it is no number in (0, 1).
    """
    if not 0 < float(gamma) < 1:
        raise ValueError(
            f"awp must be a share of a layer's length, a number in (0, 1) such as 0.005, or 0 in a setting for none; "
            f"got {gamma!r}"
        )
    return float(gamma)


def _gradients(loss: Tensor, tensors: Sequence[Tensor], scale: Tensor | None) -> list[Tensor | None]:
    with torch.autocast(loss.device.type, enabled=False):
        return list(torch.autograd.grad(loss, list(tensors), scale, allow_unused=True))


def _lay_aside(tensors: Sequence[Tensor], aside: dict[int, tuple[Tensor, Tensor | None]]) -> None:
    """Takes what has gathered in ``grad`` away, once for each tensor."""
    for tensor in tensors:
        if id(tensor) not in aside:
            aside[id(tensor)] = tensor, tensor.grad
            tensor.grad = None
