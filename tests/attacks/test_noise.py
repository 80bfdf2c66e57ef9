"""Noise that no one has aimed: its norm, its distribution, and what it leaves behind."""

from __future__ import annotations

import math
import random
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advmed.attacks import Noise

SHAPES = [(2, 7), (3, 4, 6), (2, 5, 4, 3), (1, 1, 1), (1, 2, 3)]
KINDS: list[Literal["gaussian", "uniform"]] = ["gaussian", "uniform"]
ORDERS = [2, math.inf]
RADII = torch.tensor([0.0, 0.05, 0.4, 1.0, 5.0], dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=dtype)


def lengths(noise: Tensor, p: float) -> Tensor:
    flat = noise.flatten(1)
    return flat.norm(dim=1) if p == 2 else flat.abs().amax(1)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_bounds_the_norm_is_the_radius(kind: Any, p: float, shape: tuple[int, ...]) -> None:
    images = uniform(5, *shape)
    result = Noise(kind, p)(flat, images, RADII, generator=seeded(0))
    torch.testing.assert_close(lengths(result.images - images, p), RADII, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.norms, RADII, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.terms, flat(result.images), rtol=0, atol=0)
    assert result.nonfinite.tolist() == [0] * 5
    assert result.crossing is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bounds", [(0.2, 0.8), "sample"])
def test_bounds_hold_and_only_make_it_smaller(kind: Any, p: float, bounds: Any) -> None:
    """Values of images that are outside the bounds themselves may stay, and move inwards only."""
    images = uniform(5, 3, 6, 6)
    result = Noise(kind, p)(flat, images, RADII, bounds=bounds, generator=seeded(0))
    free = Noise(kind, p)(flat, images, RADII, generator=seeded(0))
    assert (result.norms <= RADII * (1 + 1e-12)).all()
    assert result.norms[4] < 5
    if bounds == "sample":
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    else:
        low, high = images.clamp(max=0.2), images.clamp(min=0.8)
    torch.testing.assert_close(result.images, torch.minimum(torch.maximum(free.images, low), high), rtol=0, atol=1e-12)
    assert not torch.equal(result.images, free.images)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", ORDERS)
def test_radii_are_of_samples(kind: Any, p: float) -> None:
    """The noise of a sample is that of radius 1, times its radius."""
    images = torch.zeros(5, 2, 3, 4, dtype=torch.float64)
    one = Noise(kind, p)(flat, images, 1.0, generator=seeded(3)).images
    own = Noise(kind, p)(flat, images, RADII, generator=seeded(3)).images
    torch.testing.assert_close(own, one * RADII.reshape(5, 1, 1, 1), rtol=1e-12, atol=0)
    for i in range(4):
        assert not torch.equal(one[i], one[i + 1])


def test_radius_zero_returns_the_bits_of_the_image() -> None:
    images = uniform(2, 1, 3, 3, dtype=torch.float32)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = -0.0, 1e-42
    for p in ORDERS:
        found = Noise("gaussian", p)(flat, images, torch.tensor([0.0, 1.0]), bounds=(0.3, 0.6)).images
        same = (found.view(torch.int32) == images.view(torch.int32)).flatten(1).all(1)
        assert same.tolist() == [True, False]


def test_one_pass_and_no_gradient(tiny: SimpleNamespace) -> None:
    asked: list[bool] = []

    def terms(x: Tensor) -> Tensor:
        asked.append(x.requires_grad or torch.is_grad_enabled())
        return flat(x)

    attack = Noise("gaussian")
    attack(terms, torch.zeros(2, 1, 4), 1.0)
    assert asked == [False] * attack.queries == [False]
    assert attack.gradients == 0
    assert attack.access == "none"
    assert attack.description == "no attack, the control: gaussian noise of the same norm"


def test_no_trace_is_left_in_the_model_or_the_images(tiny: SimpleNamespace) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), tiny.cnn(dropout=0.5)).train()
    images = uniform(4, 3, 8, 8, dtype=torch.float32)
    before, version = images.clone(), images._version
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for kind in KINDS:
        Noise(kind)(tiny.Classifier(model, torch.arange(4)), images, 1.0, bounds=(0, 1))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
    assert torch.equal(images, before)
    assert images._version == version


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_repeats_it(kind: Any) -> None:
    images = uniform(2, 1, 4, 4)
    first, again, other = (Noise(kind)(flat, images, 1.0, generator=seeded(s)).images for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(*(Noise(kind)(flat, images, 1.0).images for _ in range(2)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_where_gradients_are_off(tiny: SimpleNamespace, kind: Any, mode: Any) -> None:
    objective = tiny.Classifier(tiny.cnn().double().eval(), torch.arange(3))
    images = uniform(3, 3, 8, 8)
    expected = Noise(kind)(objective, images, 0.5, generator=seeded(0))
    with mode():
        found = Noise(kind)(objective, images.clone(), 0.5, generator=seeded(0))
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.terms, expected.terms)
    assert not expected.terms.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", ORDERS)
def test_half_precision_images(dtype: torch.dtype, p: float) -> None:
    images = uniform(3, 2, 6, 6, dtype=torch.float32).to(dtype)
    seen: set[torch.dtype] = set()

    def terms(x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return flat(x)

    radius = torch.tensor([0.0, 0.25, 0.5])
    result = Noise("gaussian", p)(terms, images, radius)
    assert seen == {dtype}
    assert result.images.dtype == dtype
    assert torch.equal(result.images[0], images[0])
    torch.testing.assert_close(result.norms, radius, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_runs_under_autocast(tiny: SimpleNamespace, dtype: torch.dtype) -> None:
    objective = tiny.Classifier(tiny.cnn().eval(), torch.arange(4))
    images = uniform(4, 3, 8, 8, dtype=torch.float32)
    exact = Noise("gaussian")(objective, images, 1.0, generator=seeded(0))
    with torch.autocast("cpu", dtype):
        result = Noise("gaussian")(objective, images, 1.0, generator=seeded(0))
    assert torch.equal(result.images, exact.images)
    torch.testing.assert_close(result.terms.float(), exact.terms, rtol=0.02, atol=0.02)
    assert not torch.equal(result.terms, exact.terms)


def test_channels_last_equals_contiguous() -> None:
    images = uniform(4, 3, 8, 8)
    first = Noise("uniform")(flat, images, 0.5, generator=seeded(1)).images
    last = images.contiguous(memory_format=torch.channels_last)
    second = Noise("uniform")(flat, last, 0.5, generator=seeded(1)).images
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)
    assert second.is_contiguous(memory_format=torch.channels_last)


def test_nan_in_one_image_leaves_the_others_alone() -> None:
    images = uniform(3, 1, 4, 4)
    broken = images.clone()
    broken[1, 0, 2, 2] = math.nan
    healthy = Noise("gaussian")(flat, images, 0.5, bounds="sample", generator=seeded(0))
    result = Noise("gaussian")(flat, broken, 0.5, bounds="sample", generator=seeded(0))
    assert torch.equal(result.images[[0, 2]], healthy.images[[0, 2]])
    assert torch.equal(result.images[1].isnan(), broken[1].isnan())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "salt"}, r"kind must be 'gaussian' or 'uniform', got 'salt'"),
        ({"norm": 1}, r"norm must be 2 or inf \(L2 or Linf\), got 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Noise(**({"kind": "gaussian"} | settings))


def test_a_setting_cannot_be_changed_afterwards() -> None:
    noise = Noise("uniform", "inf")
    assert noise.norm == math.inf
    with pytest.raises(FrozenInstanceError):
        noise.norm = 2.0
