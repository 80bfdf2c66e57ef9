"""timm networks with the normalisation inside, and their weights from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from adv_classify.network import Network, make_network
from helpers.classify import noise
from helpers.lightning import shaken


def plain(name: str, classes: int = 3, channels: int = 3) -> nn.Module:
    return timm.create_model(name, num_classes=classes, in_chans=channels).eval()


@pytest.mark.parametrize(
    ("name", "channels", "given", "mean", "std"),
    [
        ("test_efficientnet", 3, {}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("test_resnet", 3, {}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("test_efficientnet", 1, {}, (0.449,), (0.226,)),  # the mean of the three
        ("test_efficientnet", 3, {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}, (0.1, 0.2, 0.3), (1, 2, 3)),
        ("test_efficientnet", 1, {"mean": (0.7,), "std": (0.2,)}, (0.7,), (0.2,)),
        ("test_efficientnet", 2, {}, (0.5, 0.5), (0.25, 0.25)),  # not made for so many
    ],
)
def test_the_network_is_that_of_timm_on_normalised_images(
    name: str, channels: int, given: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    network = make_network(Network(name=name, **given), 3, channels).eval()
    twin = plain(name, 3, channels)
    twin.load_state_dict(network.model.state_dict())
    images = noise(2, channels, 16, 16)
    kept = images.clone()
    normalised = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(network(images), twin(normalised), rtol=1e-4, atol=1e-5)
    assert torch.equal(images, kept)
    assert network(images).shape == (2, 3)
    assert network.state_dict()["mean"].shape == (1, channels, 1, 1)
    moved = network.to(torch.float64)
    assert moved.mean.dtype == moved.std.dtype == torch.float64
    assert "mean" not in dict(network.named_parameters())
    assert make_network(Network(name=name, drop_rate=0.4), 3, channels).model.drop_rate == 0.4


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_changes_the_memory_format_alone(channels: int) -> None:
    images = noise(2, channels, 32, 32).requires_grad_()
    found = []
    for last in (False, True):
        torch.manual_seed(0)
        network = make_network(Network(name="test_resnet", channels_last=last), 3, channels).eval()
        kernel = dict(network.named_parameters())["model.layer2.0.conv1.weight"]
        assert kernel.is_contiguous(memory_format=torch.channels_last) == last
        logits = network(images)
        found.append((network.state_dict(), logits, torch.autograd.grad(logits.square().sum(), images)[0]))
    (state, logits, gradient), (state_last, logits_last, gradient_last) = found
    assert all(torch.equal(value, state_last[key]) for key, value in state.items())
    torch.testing.assert_close(logits_last, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient_last, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize(
    ("file", "start"),
    [("own.pth", ""), ("own.pth", "module."), ("own.ckpt", "network.model."), ("own.safetensors", "")],
)
def test_weights_of_a_file(tmp_path: Path, name: str, file: str, start: str) -> None:
    """Of timm, of a wrapped network, and a checkpoint of ours, which has more; for other classes, or without any."""
    source, path, images = plain(name), tmp_path / file, noise(2, 3, 16, 16)
    shaken(source)
    state = {f"{start}{key}": value for key, value in source.state_dict().items()}
    if file == "own.safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state | {"network.mean": torch.zeros(3)}, "epoch": 3} if start else state, path)
    network = Network(name=name, weights=str(path), mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(make_network(network, 3, 3).eval()(images), source(images))
    other = make_network(network, 5, 3).eval()
    torch.testing.assert_close(other.model.forward_features(images), source.forward_features(images))
    assert other(images).shape == (2, 5)
    head = f"{start}{source.pretrained_cfg['classifier']}."
    torch.save({key: value for key, value in state.items() if not key.startswith(head)}, path.with_name("headless.pth"))
    headless = make_network(replace(network, weights=str(path.with_name("headless.pth"))), 3, 3).eval()
    torch.testing.assert_close(headless.model.forward_features(images), source.forward_features(images))
