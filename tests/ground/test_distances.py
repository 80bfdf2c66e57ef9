"""Distances between predictions against torch.distributions, closed forms and numerical gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from advmed.distances import bernoulli_divergence, sigmoid_divergence, softmax_divergence

Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCES = [softmax_divergence, sigmoid_divergence]
SHAPES = [(3, 4), (3, 2, 5), (2, 3, 4, 2), (2, 4, 2, 3, 2)]  # (B, classes, *spatial)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def expected(distance: Distance, clean: Tensor, other: Tensor) -> Tensor:
    """The same from torch.distributions, in float64."""
    clean, other = clean.double(), other.double()
    if distance is softmax_divergence:
        found = kl_divergence(*(Categorical(logits=x.movedim(1, -1)) for x in (clean, other)))
    else:
        found = kl_divergence(Bernoulli(logits=clean), Bernoulli(logits=other))
        if distance is bernoulli_divergence:
            return found
        found = found.sum(1)
    return found if found.ndim == 1 else found.flatten(1).mean(1)


def expected_of_any(distance: Distance, clean: Tensor, other: Tensor) -> Tensor:
    """The same for (B, classes) of any size, from logarithms: torch.distributions rounds probabilities to 0 and 1."""
    p, q = clean.double().numpy(), other.double().numpy()
    if distance is softmax_divergence:
        log_p, log_q = (z - np.logaddexp.reduce(z, 1, keepdims=True) for z in (p, q))
        return torch.from_numpy((np.exp(log_p) * (log_p - log_q)).sum(1))
    sides = ((-np.logaddexp(0, -sign * p), -np.logaddexp(0, -sign * q)) for sign in (1, -1))
    return torch.from_numpy(sum(np.exp(log_p) * (log_p - log_q) for log_p, log_q in sides).sum(1))


@pytest.mark.parametrize("distance", [*DISTANCES, bernoulli_divergence])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch_distributions(distance: Distance, shape: tuple[int, ...]) -> None:
    clean, other = (normal(*shape, seed=seed).requires_grad_() for seed in (0, 1))
    found = distance(clean, other)
    assert found.shape == (shape if distance is bernoulli_divergence else shape[:1])
    torch.testing.assert_close(found, expected(distance, clean, other), rtol=1e-12, atol=0)
    assert (found - expected(distance, other, clean)).abs().max() > 0.1  # the order of the two matters
    assert torch.autograd.gradcheck(distance, (clean, other))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-15), (torch.float32, 5e-7)])
def test_equal_predictions_have_no_distance_and_no_gradient(
    distance: Distance, shape: tuple[int, ...], dtype: torch.dtype, rounding: float
) -> None:
    clean, other = normal(*shape, dtype=dtype).requires_grad_(), normal(*shape, dtype=dtype).requires_grad_()
    found = distance(clean, other)
    assert torch.equal(found, torch.zeros(shape[:1], dtype=dtype))
    found.sum().backward()
    for argument in (clean, other):  # what is left are the last digits of probabilities that add up to 1
        torch.testing.assert_close(argument.grad, torch.zeros_like(argument), rtol=0, atol=rounding)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("size", [50.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(distance: Distance, size: float, dtype: torch.dtype) -> None:
    """Every pair of predictions that are as sure as can be, or half so, right or wrong."""
    rows = torch.tensor(list(itertools.product((-size, -size / 2, 0.0, size), repeat=3)), dtype=dtype)
    index = torch.cartesian_prod(torch.arange(len(rows)), torch.arange(len(rows)))
    clean, other = (rows[index[:, i]].requires_grad_() for i in (0, 1))
    found = distance(clean, other)
    reference = expected_of_any(distance, clean.detach(), other.detach())
    assert reference.isfinite().all()
    assert reference.max() > size  # some are as wrong as can be
    torch.testing.assert_close(found.double(), reference, rtol=1e-6, atol=1e-5)
    found.sum().backward()
    assert clean.grad.isfinite().all()
    assert other.grad.isfinite().all()
    link = torch.softmax if distance is softmax_divergence else lambda x, _: x.sigmoid()
    slope = (link(other, 1) - link(clean, 1)).detach()  # in closed form
    torch.testing.assert_close(other.grad, slope, rtol=0, atol=1e-6)


def test_a_sure_yes_and_a_surer_one_are_not_rounded_to_less_than_nothing() -> None:
    # 1 - sigmoid(18) is 0 in float32, sigmoid(-18) is not.
    clean, other = torch.tensor([[18.0], [-18.0]]), torch.tensor([[50.0], [-50.0]])
    reference = expected_of_any(sigmoid_divergence, clean, other)
    torch.testing.assert_close(sigmoid_divergence(clean, other).double(), reference, rtol=1e-3, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(distance: Distance, dtype: torch.dtype) -> None:
    clean, other = (normal(4, 3, 40, seed=seed).to(dtype) for seed in (0, 1))
    clean[0] *= 20
    single = [x.float().requires_grad_() for x in (clean, other)]
    clean, other = clean.requires_grad_(), other.requires_grad_()
    found, reference = distance(clean, other), distance(*single)
    assert found.dtype == torch.float32
    assert torch.equal(found, reference)
    found.sum().backward()
    reference.sum().backward()
    for argument, twin in zip((clean, other), single, strict=True):
        assert argument.grad.dtype == dtype
        assert torch.equal(argument.grad, twin.grad.to(dtype))
