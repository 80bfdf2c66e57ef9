"""Grad-CAM against a computation by hand, and the agreement of maps."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from adv_classify.gradcam import GradCam, agreement, feature_layer, last_feature_maps
from helpers.classify import noise


class TwoLayers(nn.Module):
    """A convolution, and a linear layer on the means of its maps."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.maps, self.head = nn.Conv2d(3, 5, 3, stride=2), nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images).tanh().mean((2, 3)))


@pytest.fixture
def images() -> Tensor:
    return noise(3, 3, 9, 13)


def test_maps_are_those_computed_by_hand(images: Tensor) -> None:
    """The gradient of a logit at a map's pixel is head weight x tanh' / pixels; its mean over pixels weighs the map."""
    network, classes = TwoLayers(), torch.tensor([2, 0, 3])
    maps = network.maps(images).detach()
    assert maps.shape == (3, 5, 4, 6)
    slope = network.head.weight.detach()[classes][:, :, None, None] * (1 - maps.tanh() ** 2) / 24
    wanted = (slope.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    assert (wanted == 0).any()
    assert (wanted > 0).any()
    found = GradCam(network, images)(images, classes)
    assert found.shape == (3, 9, 13)
    torch.testing.assert_close(found, functional.interpolate(wanted, (9, 13), mode="bilinear")[:, 0])
    others = GradCam(network, images)(images, torch.tensor([0, 0, 3]))
    assert not torch.equal(others[0], found[0])
    assert torch.equal(others[1:], found[1:])


def test_nothing_is_left_behind(images: Tensor) -> None:
    network, classes = TwoLayers(), torch.tensor([2, 0, 3])
    cam = GradCam(network, images)
    wanted = cam(images, classes)
    with torch.no_grad():
        assert torch.equal(cam(images, classes), wanted)
    with torch.inference_mode():
        assert torch.equal(cam(images.clone(), classes), wanted)
    assert not wanted.requires_grad
    assert images.grad is None
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.maps._forward_hooks
    assert not network.maps._backward_hooks


@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", 64), ("test_efficientnet", 64), ("resnet10t", 64), ("test_resnet", 32)]
)
def test_the_last_maps_of_networks_of_timm(name: str, size: int) -> None:
    network = timm.create_model(name, num_classes=3).eval()
    images = noise(1, 3, size, size)
    layer = last_feature_maps(network, images)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = network.forward_features(images)
    handle.remove()
    if features.shape[2] > 1:
        assert torch.equal(seen[-1], features)  # what is pooled and classified
    assert seen[-1].shape[2:] == (2, 2)
    assert GradCam(network, images)(images, torch.tensor([1])).shape == (1, size, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("test_vit", 160, 10),
        ("test_vit2", 64, 4),
        ("vit_tiny_patch16_224", 224, 14),
        ("swin_tiny_patch4_window7_224", 224, 7),
        ("mixer_s32_224", 224, 7),
    ],
)
def test_maps_of_tokens_and_of_channels_that_come_last(name: str, size: int, grid: int) -> None:
    """A patch that is all that matters to the network is where the heat is."""
    network = timm.create_model(name, num_classes=3, **({} if size == 224 else {"img_size": size})).eval()
    nn.init.normal_(network.get_classifier().weight)  # timm lets a mixer's begin with zeros
    images = noise(2, 3, size, size)
    layer, arrange = feature_layer(network, images[:1])
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(images)
        moved = images.clone()
        step = size // grid
        moved[:, :, 2 * step : 3 * step, step : 2 * step] += 5
        network(moved)
    hook.remove()
    first, second = (arrange(output) for output in seen)
    assert first.shape[2:] == (grid, grid)
    change = (second - first).square().sum(1)[0]
    assert divmod(int(change.argmax()), grid) == (2, 1)
    heat = GradCam(network, images)(images, torch.tensor([1, 2]))
    assert heat.shape == (2, size, size)
    assert heat.max() > 0


@pytest.mark.parametrize("name", ["test_mambaout", "test_vit3"])
def test_what_is_no_known_family_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention keys have the shape of maps, too."""
    network = timm.create_model(name, num_classes=3, **({"img_size": 64} if "vit" in name else {})).eval()
    if "vit" in name:
        monkeypatch.setattr(type(network), "__module__", "timm.models.others")
    with pytest.raises(
        ValueError, match=r"convolutional networks, ViT, Swin and MLP-Mixer, and \w+ is none .*--gradcam"
    ):
        GradCam(network, noise(1, 3, 64, 64))


def test_the_last_layer_is_the_last_to_run_and_not_the_last_to_be_named(images: Tensor) -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first, self.one = nn.Conv2d(4, 5, 3), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)
            self.head, self.unused = nn.Linear(5, 2), nn.Conv2d(1, 1, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.one(self.second(self.first(images))).flatten(1))

    network = Crossed()
    assert last_feature_maps(network, images) is network.second
    assert not network.second._forward_hooks


def test_a_network_without_maps_is_refused(images: Tensor) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 13, 4))
    with pytest.raises(ValueError, match="no feature maps larger than one pixel"):
        GradCam(network, images)
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten())
    with pytest.raises(ValueError, match="no feature maps larger than one pixel"):
        GradCam(pixels, images)
    assert not any(module._forward_hooks for module in [*network.modules(), *pixels.modules()])


# Agreement


def test_the_agreement_is_the_correlation_and_a_flat_map_agrees_with_nothing() -> None:
    first, second = noise(6, 7, 5), noise(6, 7, 5, seed=1)
    second[1] = first[1]
    second[2] = 3 * first[2] + 2
    second[3] = 1 - first[3]
    pairs = zip(first, second, strict=True)
    wanted = torch.stack([torch.corrcoef(torch.stack(pair).flatten(1))[0, 1] for pair in pairs])
    found = agreement(first, second)
    torch.testing.assert_close(found, wanted.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1:4], torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert abs(found[0]) < 0.5
    first[0] = 0
    second[1] = 0.25
    first[2] = second[2] = 0
    assert agreement(first, second).isnan().tolist() == [True] * 3 + [False] * 3
