"""timm networks with the normalisation inside, and their weights from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from adv_classify import ClassificationObjective
from adv_classify.network import Network, NormalizedClassifier, make_network
from advmed.attacks import PGD
from helpers.classify import noise
from helpers.mistakes import told


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


@pytest.mark.parametrize(
    ("given", "channels", "message"),
    [
        ({"mean": (0.5,)}, 3, "mean has 1 number(s) for images of 3 channel(s)"),
        ({"mean": (0.5, 0.5, 0.5)}, 1, "mean has 3 number(s) for images of 1 channel(s)"),
        ({"std": (0.5,)}, 3, "mean and std need one number per channel, std > 0"),
        ({"std": (0.5, 0.0, 0.5)}, 3, "mean and std need one number per channel, std > 0"),
        ({"std": (0.5, -1.0, 0.5)}, 3, "mean and std need one number per channel, std > 0"),
        ({"name": "resnet81"}, 3, "timm has no model 'resnet81'; near names are resnet18"),
        ({"name": "efficientnet_b00"}, 3, "efficientnet_b0"),
        ({"name": "test_vitt"}, 3, "test_vit"),
        ({"name": "qqqqqqqqqqq"}, 3, "timm has no model 'qqqqqqqqqqq'; see timm.list_models()"),
    ],
)
def test_mistakes(given: dict[str, Any], channels: int, message: str) -> None:
    told(ValueError, lambda: make_network(Network(**{"name": "test_efficientnet", **given}), 3, channels), message)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("timm.models._builder.load_pretrained", download)
    assert make_network(Network(name="test_resnet", drop_rate=rate), 3, 3).model.drop_rate == rate
    with pytest.raises(AssertionError, match="weights were asked for"):
        timm.create_model("test_resnet", pretrained=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize("start", ["", "module.", "network.model."])
def test_weights_of_a_file(tmp_path: Path, name: str, start: str) -> None:
    """Of timm, of a wrapped network, and a checkpoint of ours, which has more; for other classes too."""
    source, path, images = plain(name), tmp_path / "own.pth", noise(2, 3, 16, 16)
    own = {"state_dict": {f"{start}{k}": v for k, v in source.state_dict().items()} | {"network.mean": torch.zeros(3)}}
    torch.save(own if start else source.state_dict(), path)
    network = Network(name=name, weights=str(path), mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(make_network(network, 3, 3).eval()(images), source(images))
    other = make_network(network, 5, 3).eval()
    torch.testing.assert_close(other.model.forward_features(images), source.forward_features(images))
    assert other(images).shape == (2, 5)
    assert other.model.get_classifier().weight.shape[0] == 5


@pytest.mark.parametrize(
    ("name", "channels", "missing"),
    [("test_efficientnet", 3, "bn1.bias"), ("test_resnet", 1, "conv1.0.weight"), ("resnet10t", 3, "bn1.bias")],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, name: str, channels: int, missing: str) -> None:
    """A head that is missing is made anew."""
    path, own = tmp_path / "own.pth", plain("test_resnet").state_dict()
    torch.save({key: value for key, value in own.items() if not key.startswith("fc.")}, path)
    network = Network(name="test_resnet", weights=str(path))
    make_network(network, 3, 3)
    torch.save(plain(name, 3, channels).state_dict(), path)
    parts = (f"{path} holds weights of another network", missing, f"of {len(own)} tensors")
    told(ValueError, lambda: make_network(network, 3, 3), *parts)


def test_attacks_hold_the_whole_of_it_still() -> None:
    """BatchNorm and all: what is attacked is the module with the normalisation inside."""
    network, images = make_network(Network(name="test_resnet"), 3, 3).train(), noise(2, 3, 16, 16)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    result = PGD(2, 2.0)(ClassificationObjective(network, torch.tensor([0, 1])), images, 0.5)
    assert isinstance(network, NormalizedClassifier)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.testing.assert_close((result.images - images).flatten(1).norm(dim=1), torch.tensor([0.5, 0.5]))
