"""Noise that no one has aimed: its norm, its distribution, and what it leaves behind."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from advmed.attacks import Noise
from advmed.norms import per_sample
from helpers.tensors import ORDERS, lengths, seeded, uniform

SHAPES = [(2, 7), (3, 4, 6), (2, 5, 4, 3), (1, 1, 1), (1, 2, 3)]
KINDS: list[Literal["gaussian", "uniform"]] = ["gaussian", "uniform"]
RADII = torch.tensor([0.0, 0.05, 0.4, 1.0, 5.0], dtype=torch.float64)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_noise_is_that_of_radius_1_times_the_radius_and_bounds_only_cut_it(
    kind: Any, p: float, shape: tuple[int, ...]
) -> None:
    """Values of images that are outside the bounds themselves may stay, and move inwards only."""
    images, one = uniform(5, *shape), torch.ones(5, dtype=torch.float64)
    unit = Noise(kind, p)(flat, torch.zeros_like(images), 1.0, generator=seeded(0)).images
    torch.testing.assert_close(lengths(unit, p), one, rtol=1e-12, atol=0)
    own = (per_sample(edge(images.flatten(1), 1), images) for edge in (torch.amin, torch.amax))
    boxes: list[tuple[Any, tuple[Tensor, Tensor]]] = [
        (None, (images - math.inf, images + math.inf)),
        ((0.2, 0.8), (images.clamp(max=0.2), images.clamp(min=0.8))),
        ("sample", tuple(own)),
    ]
    for bounds, (low, high) in boxes:
        result = Noise(kind, p)(flat, images, RADII, bounds=bounds, generator=seeded(0))
        free = images + unit * per_sample(RADII, images)
        expected = torch.minimum(torch.maximum(free, low), high)
        torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.norms, lengths(expected - images, p), rtol=1e-12, atol=1e-12)
        assert result.crossing is None
        assert torch.equal(expected, free) is (bounds is None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distribution_is_the_one_named(kind: Any) -> None:
    """40,000 entries of a unit length of each sample; the length that they are scaled by varies by half a per cent."""
    images = torch.zeros(4, 1, 200, 200, dtype=torch.float64)
    noise = Noise(kind)(flat, images, 1.0, generator=seeded(0)).images.flatten(1)
    deviation = 1 / 200
    assert (noise.mean(1).abs() < 4 * deviation / 200).all()
    torch.testing.assert_close(noise.std(1), torch.full((4,), deviation, dtype=torch.float64), rtol=1e-3, atol=0)
    kurtosis = (noise / deviation).pow(4).mean(1)
    expected = 3.0 if kind == "gaussian" else 1.8
    torch.testing.assert_close(kurtosis, torch.full((4,), expected, dtype=torch.float64), rtol=0.06, atol=0)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(quantiles)
    square = (2 * quantiles - 1) * math.sqrt(3)
    found = noise.quantile(quantiles, dim=1) / deviation
    assert (found - (normal if kind == "gaussian" else square)[:, None]).abs().max() < 0.04
    # Neighbours and samples are independent.
    assert abs(torch.corrcoef(torch.stack((noise[0, 1:], noise[0, :-1])))[0, 1]) < 0.02
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.02


def test_in_linf_uniform_noise_fills_its_box() -> None:
    noise = Noise("uniform", math.inf)(flat, torch.zeros(1, 1, 10_000), 0.3, generator=seeded(0)).images
    counts = torch.histc(noise, 10, -0.3, 0.3)
    assert (counts > 880).all()
    assert (counts < 1120).all()
