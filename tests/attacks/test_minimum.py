"""The smallest noise, where it is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from advmed.attacks import DDN

WEIGHT = torch.tensor([3.0, -1.0, 2.0, 0.5])


def objective(images: Tensor) -> Tensor:
    return (images.flatten(1) @ WEIGHT)[:, None]


@pytest.mark.parametrize(("norm", "dual"), [(2.0, WEIGHT.norm().item()), (math.inf, WEIGHT.abs().sum().item())])
def test_the_distance_to_a_plane(norm: float, dual: float) -> None:
    images = torch.tensor([[0.5, 0.0, 0.0, 0.0], [-1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).reshape(3, 1, 2, 2)
    limit = 1.6
    before = objective(images)[:, 0]
    found, norms = DDN(200, norm).smallest(objective, images, 2.0, lambda x: objective(x)[:, 0] > limit)
    wanted = (limit - before).clamp_min(0) / dual
    assert (norms >= wanted - 1e-6).all()
    assert torch.allclose(norms, wanted, rtol=0.03)
    assert (objective(found)[:, 0] > limit - 1e-5).all()


def test_what_fails_already_stays_and_what_never_fails_is_given_back() -> None:
    images = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).reshape(2, 1, 2, 2)
    found, norms = DDN(20).smallest(objective, images, 1.0, lambda x: objective(x)[:, 0] > 2.5)
    assert norms[0] == 0
    assert torch.equal(found[0], images[0])
    found, norms = DDN(20).smallest(objective, images, 1.0, lambda x: objective(x)[:, 0] > 1e9)
    assert torch.equal(found, images)
    assert norms.isinf().all()


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_bounds_are_kept_and_noise_is_what_is_told(norm: float) -> None:
    images = torch.full((1, 1, 2, 2), 0.9)
    found, norms = DDN(50, norm).smallest(objective, images, 4.0, lambda x: objective(x)[:, 0] > 4.3, bounds=(0.0, 1.0))
    assert found.min() >= 0
    assert found.max() <= 1
    noise = (found - images).flatten(1)
    torch.testing.assert_close(norms, noise.norm(dim=1) if norm == 2 else noise.abs().amax(1))
    assert objective(found).item() > 4.3


@pytest.mark.parametrize("gamma", [0.0, 1.0, -1, 2])
def test_a_share_that_is_none(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be"):
        DDN(10, gamma=gamma)
