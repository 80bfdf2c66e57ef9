"""Distances between predictions, (B,): how far those on attacked images are from those on clean ones.

All are at least 0, and 0 with a zero gradient where the two are equal, up to rounding. Both arguments get gradients.
They are computed in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def softmax_divergence(clean: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of the softmax over dimension 1 of two tensors of logits, averaged over all other dimensions.

    For classification (Zhang et al. 2019, TRADES, eq. 5), and for label maps, as a mean over voxels.

    Args:
        clean: logits of p, (B, classes, *spatial).
        other: logits of q, same shape.
    """
    log_p, log_q = (functional.log_softmax(at_least_float32(x), 1) for x in (clean, other))
    return _average((log_p.exp() * (log_p - log_q)).sum(1))


def sigmoid_divergence(clean: Tensor, other: Tensor) -> Tensor:
    """Bernoulli KL(p || q) of two tensors of logits, summed over dimension 1, averaged over all other dimensions.

    For classes or regions that do not exclude each other.

    Args:
        clean: logits of p, (B, classes, *spatial).
        other: logits of q, same shape.
    """
    return _average(bernoulli_divergence(clean, other).sum(1))


def bernoulli_divergence(clean: Tensor, other: Tensor) -> Tensor:
    """The Bernoulli KL(p || q) of every pair of logits, in the shape of the arguments."""
    clean, other = at_least_float32(clean), at_least_float32(other)
    log = functional.logsigmoid
    p = clean.sigmoid()
    return p * (log(clean) - log(other)) + (-clean).sigmoid() * (log(-clean) - log(-other))


def _average(values: Tensor) -> Tensor:
    """Mean over all dimensions but the first."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are; half precision has too few digits for a loss."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
