"""Nothing that runs inside ``preserved`` may leave a trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advmed.guard import preserved

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1


class Tied(nn.Module):
    """Two layers that share one weight, one of which is also registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.second.weight = self.first.weight
        self.again = self.first
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.second(self.again(self.first(images))))


class Replaced(nn.Module):
    """A layer that replaces its buffer instead of writing into it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * images.detach().mean((0, 2, 3))
        return images - self.average[:, None, None]


class Writing(nn.BatchNorm2d):
    """A BatchNorm of somebody else's, which writes its statistics itself."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.running_mean.mul_(0.9).add_(0.1 * images.detach().mean((0, 2, 3)))
        return self.weight[:, None, None] * images - self.running_mean[:, None, None].clone() + self.bias[:, None, None]


class Scaled(nn.Module):
    """A layer whose buffer the backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(conv(), nn.BatchNorm2d(3), conv()),
    "batch norm without statistics": lambda: nn.Sequential(conv(), nn.BatchNorm2d(3, track_running_stats=False)),
    "batch norm, cumulative": lambda: nn.Sequential(conv(), nn.BatchNorm2d(3, momentum=None, affine=False)),
    "sync batch norm in evaluation": lambda: nn.Sequential(conv(), nn.SyncBatchNorm(3).eval()),
    "batch norm of others": lambda: nn.Sequential(conv(), Writing(3)),
    "instance norm": lambda: nn.Sequential(conv(), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(conv()), nn.Tanh()),
    "spectral norm, old": lambda: nn.Sequential(nn.utils.spectral_norm(conv()), nn.Tanh()),
    "dropout": lambda: nn.Sequential(conv(), nn.Dropout2d(0.5), nn.RReLU(), nn.AlphaDropout(0.3)),
    "tied": Tied,
    "constant buffer": lambda: nn.Sequential(conv(), Scaled()),
    "replaced buffer": lambda: nn.Sequential(conv(), Replaced()),
}


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
        if "evaluation" not in name:
            model(IMAGES)  # statistics, power iterations: something that can be lost
            model.train()
        return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a trace could be in, in plain values."""
    return {
        "state": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "tracking": [getattr(m, "track_running_stats", None) for m in model.modules()],
        "parameters": [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
    }


def attack(model: nn.Module) -> None:
    """What an attack does, and then some."""
    images = IMAGES.clone().requires_grad_()
    for _ in range(3):
        torch.autograd.grad(model(images).square().sum(), images)
    torch.rand(5)


def nested(model: nn.Module) -> None:
    with preserved(model):
        attack(model)
    assert not any(p.requires_grad for p in model.parameters())
    attack(model)


def interrupted(model: nn.Module) -> None:
    attack(model)
    model.eval()
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("inside", [attack, nested, interrupted])
def test_no_trace(name: str, inside: Callable[[nn.Module], None]) -> None:
    model = build(name)
    before = snapshot(model)
    with suppress(KeyboardInterrupt), preserved(model) as held:
        assert held is model
        assert not any(p.requires_grad for p in model.parameters())
        inside(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_a_mode_without_gradients_and_training_afterwards(name: str, mode: Any) -> None:
    model = build(name)
    before = snapshot(model)
    with mode(), preserved(model):
        model(IMAGES)
    assert snapshot(model) == before
    model(IMAGES).sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_built_before_can_still_be_back_propagated(name: str) -> None:
    gradients = []
    for interrupted in (False, True):
        model = build(name)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            loss = model(IMAGES).square().sum()
        if interrupted:
            with preserved(model):
                attack(model)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, after in zip(*gradients, strict=True):
        assert torch.equal(plain, after)


@pytest.mark.parametrize("name", ["batch norm", "batch norm, cumulative", "instance norm", "tied"])
def test_inside_batch_norm_uses_the_statistics_of_the_batch(name: str) -> None:
    model = build(name)
    twin = copy.deepcopy(model)
    expected = twin(IMAGES)  # in training mode, outside
    with preserved(model):
        assert torch.equal(model(IMAGES), expected)
        assert torch.equal(model(IMAGES), expected)
    twin.eval()
    assert not torch.allclose(twin(IMAGES), expected)


def test_layers_in_evaluation_mode_and_frozen_parameters_stay_so() -> None:
    model = build("tied")
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    expected = copy.deepcopy(model)(IMAGES)
    before = snapshot(model)
    with preserved(model):
        assert torch.equal(model(IMAGES), expected)
        attack(model)
    assert snapshot(model) == before
    assert not model.second.weight.requires_grad


def test_inside_a_pass_stores_nothing_for_weight_gradients() -> None:
    """The convolution would keep its input for the weight's gradient; the input's own needs the weight only."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(108, 2))
    stored: list[tuple[int, ...]] = []

    def sizes(function: Callable[[], Any]) -> int:
        stored.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(tuple(t.shape)) or t, lambda t: t):
            function()
        return sum(shape[0] == 4 for shape in stored)  # tensors with a batch dimension

    images = IMAGES.clone().requires_grad_()
    outside = sizes(lambda: model[2](model[1](model[0](images))))
    with preserved(model):
        inside = sizes(lambda: model[2](model[1](model[0](images))))
    assert inside < outside


def test_dropout_is_active_inside_and_the_training_pass_sees_the_same_masks_as_without() -> None:
    model = build("dropout")
    torch.manual_seed(3)
    expected = model(IMAGES)
    torch.manual_seed(3)
    with preserved(model):
        first, second = model(IMAGES), model(IMAGES)
    assert not torch.equal(first, second)
    assert torch.equal(model(IMAGES), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_random_state_of_the_models_gpu_is_restored(tiny: SimpleNamespace) -> None:
    model = tiny.cnn(dropout=0.5).cuda()
    state = torch.cuda.get_rng_state()
    with preserved(model):
        model(IMAGES.cuda())
    assert torch.equal(torch.cuda.get_rng_state(), state)
