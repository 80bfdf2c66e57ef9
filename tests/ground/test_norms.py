"""Norms, projections and random starts against numpy and their defining properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from advmed.norms import check_norm, norm, per_sample, project, random_in_ball, steepest

SHAPES = [(8,), (2, 9), (3, 4, 6), (2, 5, 4, 3), (1, 3, 3, 2, 2)]
ORDERS = [2, math.inf]


def draw(batch: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_norm(delta: Tensor, p: float) -> np.ndarray:
    return np.array([np.linalg.norm(sample.numpy().ravel(), p) for sample in delta])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_norm_is_that_of_the_flattened_sample(batch: int, shape: tuple[int, ...], p: float) -> None:
    delta = draw(batch, shape)
    np.testing.assert_allclose(norm(delta, p), reference_norm(delta, p), rtol=1e-14)
    kept = norm(delta, p, keepdim=True)
    assert kept.shape == (batch, *[1] * len(shape)) and torch.equal(kept.flatten(), norm(delta, p))
    assert norm(torch.tensor([-2.0, 0.0, 3.0]), p).tolist() == [2, 0, 3]  # of numbers, their size


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_bad_entry_makes_the_norm_of_its_sample_alone_not_finite(
    p: float, bad: float, layout: torch.memory_format
) -> None:
    delta = draw(3, (3, 7, 5)).contiguous(memory_format=layout)
    delta[1, 2, 6, 4] = bad  # the last entry: the tail of a vectorised reduction
    assert norm(delta, p).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_projection_is_the_nearest_point_of_each_samples_own_ball(
    shape: tuple[int, ...], p: float, scale: float
) -> None:
    """What is inside stays as it is, bit for bit, and so does what has been projected, within rounding."""
    delta, radius = draw(6, shape) * scale, torch.tensor([0.0, 1e-3, 0.1, 0.5, 2.0, 1e3], dtype=torch.float64)
    expected = np.stack(
        [
            np.clip(d, -r, r) if p == math.inf else d * min(1, r / np.linalg.norm(d.ravel()))
            for d, r in zip(delta.numpy(), radius.numpy(), strict=True)
        ]
    )
    found = project(delta, radius, p)
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=0)
    inside = norm(delta, p) <= radius
    assert torch.equal(found[inside], delta[inside])
    torch.testing.assert_close(project(found, radius, p), found, rtol=1e-14, atol=0)


@pytest.mark.parametrize("p", ORDERS)
def test_projection_in_float32_stays_in_the_ball(p: float) -> None:
    delta = draw(64, (3, 40, 40)).float()
    radius = torch.logspace(-6, 2, 64)
    assert (norm(project(delta, radius, p).double(), p) <= radius.double() * (1 + 1e-5)).all()


@pytest.mark.parametrize("p", ORDERS)
def test_a_zero_sample_and_a_zero_radius_make_no_nan(p: float) -> None:
    delta = draw(2, (3, 4))
    delta[0] = 0
    assert project(delta, 0.0, p).count_nonzero() == 0
    assert project(delta, 1.0, p)[0].count_nonzero() == 0
    assert steepest(delta, p)[0].count_nonzero() == 0


def test_steepest_is_unit_length_and_parallel() -> None:
    gradient = draw(4, (2, 3, 5))
    expected = np.stack([g / np.linalg.norm(g.ravel()) for g in gradient.numpy()])
    np.testing.assert_allclose(steepest(gradient, 2), expected, rtol=1e-13)
    np.testing.assert_array_equal(steepest(gradient, math.inf), np.sign(gradient.numpy()))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e37])
def test_steepest_survives_the_range_of_float32(scale: float) -> None:
    gradient = draw(3, (2, 4, 4)).float()
    torch.testing.assert_close(steepest(gradient * scale, 2), steepest(gradient, 2), rtol=1e-5, atol=1e-6)


def test_random_l2_noise_is_uniform_in_the_ball() -> None:
    """|x|/r of a uniform point has the distribution function t^d, and its direction no preference."""
    d, n = 6, 20_000
    radius = torch.linspace(0.5, 4, n)
    noise = random_in_ball(torch.empty(n, 2, 3), radius, 2, torch.Generator().manual_seed(0)).double().flatten(1)
    share = (noise.norm(dim=1) / radius).pow(d).sort().values
    assert (share - (torch.arange(n) + 0.5) / n).abs().max() < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov, 1 %
    assert share.max() <= 1 + 1e-5
    unit = noise / noise.norm(dim=1, keepdim=True)
    assert unit.mean(0).abs().max() < 4 / math.sqrt(n * d)
    torch.testing.assert_close(unit.T @ unit / n, torch.eye(d, dtype=torch.float64) / d, rtol=0, atol=0.01)


def test_random_linf_noise_is_uniform_in_the_cube() -> None:
    noise = random_in_ball(torch.empty(2, 20_000), torch.tensor([1.0, 3.0]), math.inf, torch.Generator().manual_seed(0))
    for row, radius in zip(noise, (1.0, 3.0), strict=True):
        assert row.abs().max() <= radius
        share = (row.double() / radius / 2 + 0.5).sort().values
        assert (share - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 1.63 / math.sqrt(20_000)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("shape", [(3, 8, 6), (3, 8, 6, 4)])
def test_random_noise_depends_on_the_generator_and_not_on_the_memory_layout(p: float, shape: tuple[int, ...]) -> None:
    like = torch.empty(2, *shape)
    other = like.contiguous(memory_format=torch.channels_last if len(shape) == 3 else torch.channels_last_3d)

    def noise(images: Tensor, seed: int) -> Tensor:
        return random_in_ball(images, 1.0, p, torch.Generator().manual_seed(seed))

    torch.testing.assert_close(noise(like, 1), noise(other, 1), rtol=1e-6, atol=0)
    assert noise(other, 1).stride() == other.stride()
    assert torch.equal(noise(like, 1), noise(like, 1))
    assert not torch.equal(noise(like, 1), noise(like, 2))


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_layout_is_kept_and_does_not_matter(p: float, shape: tuple[int, ...]) -> None:
    delta = draw(shape[0], shape[1:]).transpose(1, -1)
    for function in (lambda x: project(x, 0.3, p), lambda x: steepest(x, p)):
        torch.testing.assert_close(function(delta), function(delta.contiguous()), rtol=1e-14, atol=0)
        assert function(delta).stride() == delta.stride()


def test_an_empty_batch_passes_through() -> None:
    empty = torch.empty(0, 3, 4)
    for p in ORDERS:
        assert norm(empty, p).shape == (0,)
        assert project(empty, 1.0, p).shape == steepest(empty, p).shape == random_in_ball(empty, 1.0, p).shape


def test_norm_names() -> None:
    assert [check_norm(given) for given in (2, "2", "inf", np.inf)] == [2, 2, math.inf, math.inf]
    for given in (1, 0, 3, -2, math.nan, "l2", None):
        with pytest.raises(ValueError, match=r"norm must be 2 or inf \(L2 or Linf\), got "):
            check_norm(given)


def test_per_sample_shapes() -> None:
    like = torch.empty(3, 2, 4, 4, dtype=torch.float64)
    assert per_sample(2.0, like).shape == per_sample(torch.tensor([2.0]), like).shape == (3, 1, 1, 1)
    assert per_sample(torch.tensor([1, 2, 3]), like).dtype == torch.float64
    there = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    assert per_sample(there, like) is there
    for wrong in (torch.ones(2), torch.ones(3, 1)):
        with pytest.raises(ValueError, match=r"must be a number or have shape \(3,\), got \("):
            per_sample(wrong, like)
