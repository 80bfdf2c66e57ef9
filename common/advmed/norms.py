"""Per-sample norms, projections and random starts: everything an attack needs to know about a norm.

The norm of a sample is taken over its whole input tensor (all channels, all voxels), not per pixel. Every function
takes tensors of any rank (2D, 3D, RGB, ...) and any memory format, treats the first dimension as the batch, and
returns new tensors without rearranging the layout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORMS = (2.0, math.inf)


def check_norm(p: float | str) -> float:
    """Returns ``p`` as a float, 2.0 or inf.

    Raises:
        ValueError: for any other norm.
    """
    try:
        value = float(p)
    except (TypeError, ValueError):
        value = math.nan
    if value not in NORMS:
        raise ValueError(f"norm must be 2 or inf (L2 or Linf), got {p!r}")
    return value


def per_sample(values: float | Tensor, like: Tensor) -> Tensor:
    """A number or a (B,) tensor as a (B, 1, ..., 1) tensor that broadcasts against ``like``, on its device and dtype.

    A tensor that has that shape already is taken as it is.

    Raises:
        ValueError: if a tensor has neither one element nor one of these shapes.
    """
    shape = (like.shape[0], *([1] * (like.ndim - 1)))
    if isinstance(values, (int, float)):
        values = torch.full((), values, dtype=like.dtype, device=like.device)  # as_tensor would wait for the device
    else:
        values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
        if values.shape == shape:
            return values
    if values.ndim > 1 or (values.ndim == 1 and values.shape[0] not in (1, like.shape[0])):
        raise ValueError(
            f"a per-sample quantity must be a number or have shape ({like.shape[0]},), got {tuple(values.shape)}"
        )
    return values.expand(like.shape[0]).reshape(shape)


def norm(delta: Tensor, p: float = 2, *, keepdim: bool = False) -> Tensor:
    """Lp norm of every sample, over all its dimensions.

    Args:
        delta: shape (B, *any).
        p: 2 or inf.
        keepdim: gives (B, 1, ..., 1) instead of (B,).
    """
    p = check_norm(p)
    if delta.ndim < 2:
        return delta.abs()
    axes = tuple(range(1, delta.ndim))  # reduced as they are: flatten(1) would copy channels_last tensors
    if p == math.inf and delta.numel() > 0:
        # vector_norm(ord=inf) was measured to take 15 times as long on a CPU. NaN goes through all three.
        return torch.maximum(delta.amax(axes, keepdim), -delta.amin(axes, keepdim))
    length: Tensor = torch.linalg.vector_norm(delta, ord=p, dim=axes, keepdim=keepdim)
    return length


def project(delta: Tensor, radius: float | Tensor, p: float = 2) -> Tensor:
    """Projects every sample onto the Lp ball of its radius around 0 (the nearest point of the ball in L2).

    Args:
        delta: shape (B, *any).
        radius: one number, or shape (B,) or (B, 1, ..., 1), >= 0.
        p: 2 or inf.

    Returns:
        Shape of ``delta``; a sample inside its ball comes back unchanged, bit for bit.
    """
    p = check_norm(p)
    bound = per_sample(radius, delta)
    if p == math.inf:
        raised = torch.maximum(delta, -bound)
        return torch.minimum(raised, bound, out=raised)
    quotient = bound / norm(delta, 2, keepdim=True)
    return delta * torch.fmin(quotient, torch.ones_like(quotient))  # fmin takes the 1 for 0/0


def steepest(gradient: Tensor, p: float = 2, peak: Tensor | None = None) -> Tensor:
    """The direction of steepest ascent of unit Lp length: g / ||g||_2, or sign(g). A zero gradient gives zero.

    Args:
        gradient: shape (B, *any), finite.
        p: 2 or inf.
        peak: its Linf norm, (B, 1, ..., 1), where the caller has it already.
    """
    p = check_norm(p)
    if p == math.inf:
        return gradient.sign()
    # Scaling by the largest entry first keeps the squares of tiny gradients from underflowing to a zero length.
    peak = norm(gradient, math.inf, keepdim=True) if peak is None else peak
    tiny = torch.finfo(gradient.dtype).tiny  # in place of 0, so that nothing divides 0 by 0
    direction = gradient / peak.clamp_min(tiny)
    return direction.div_(norm(direction, 2, keepdim=True).clamp_min_(tiny))


def random_in_ball(
    like: Tensor, radius: float | Tensor, p: float = 2, generator: torch.Generator | None = None
) -> Tensor:
    """Noise drawn uniformly from the Lp ball of each sample's radius.

    L2: a normal direction of length radius * u^(1/d), d the number of entries of a sample; Linf: uniform per entry.

    Args:
        like: gives shape (B, *any), dtype, device and memory format.
        radius: one number, or shape (B,), >= 0.
        p: 2 or inf.
        generator: source of randomness on any device; the noise is drawn on the generator's device, so the same
            generator gives the same noise whatever device the images are on. Default: torch's global one.
    """
    p = check_norm(p)
    device = generator.device if generator is not None else like.device
    bound = per_sample(radius, like)
    # Drawn in one layout, or the same generator would give another noise to channels_last images.
    noise = torch.empty(like.shape, dtype=like.dtype, device=device)
    noise = noise.uniform_(-1, 1, generator=generator) if p == math.inf else noise.normal_(generator=generator)
    noise = torch.empty_like(like).copy_(noise)
    if p == math.inf:
        return noise * bound
    direction = steepest(noise, 2)
    dimensions = max(1, like[0].numel()) if like.shape[0] else 1
    uniform = torch.empty(like.shape[0], device=device, dtype=torch.float64 if device.type != "mps" else torch.float32)
    uniform.uniform_(generator=generator)
    return direction * (bound * per_sample(uniform.pow(1.0 / dimensions).to(like.device), like))
