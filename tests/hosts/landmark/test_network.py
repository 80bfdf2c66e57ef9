"""A stock U-Net behind a padding, and weights of its encoder from files."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor, nn

from adv_landmark.network import LandmarkNet, Network, make_network

NARROW = (16, 8, 8, 8, 8)
RESNET = "tu-test_resnet"
EFFICIENTNET = "tu-test_efficientnet"


def made(encoder: str = RESNET, landmarks: int = 2, channels: int = 3, **options: Any) -> LandmarkNet:
    return make_network(Network(encoder=encoder, decoder_channels=NARROW, **options), landmarks, channels).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Maps of the images' size


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (64, 31), (1, 1), (5, 96), (40, 64)])
@pytest.mark.parametrize(("landmarks", "channels"), [(1, 3), (4, 1)])
def test_maps_are_as_large_as_the_images(size: tuple[int, int], landmarks: int, channels: int) -> None:
    network = made(EFFICIENTNET, landmarks, channels)
    images = noise(2, channels, *size).requires_grad_()
    maps = network(images)
    assert maps.shape == (2, 3 * landmarks, *size)
    assert maps.isfinite().all()
    maps.square().sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert size == (1, 1) or images.grad[..., -1, :].abs().max() > 0  # of the continued edge, too


@pytest.mark.parametrize("encoder", [RESNET, EFFICIENTNET, "resnet18"])
def test_the_network_is_the_stock_one_where_no_padding_is_needed(encoder: str) -> None:
    """And its state_dict under model. is that one's, which runs without this package."""
    network = made(encoder, landmarks=3)
    stock = smp.Unet(encoder, encoder_weights=None, decoder_channels=NARROW, in_channels=3, classes=9).eval()
    weights = {key.removeprefix("model."): value for key, value in network.state_dict().items()}
    assert all(key.startswith("model.") for key in network.state_dict())
    stock.load_state_dict(weights)
    images = noise(2, 3, 64, 32)
    assert torch.equal(network(images), stock(images))


@pytest.mark.parametrize("size", [(7, 13), (8, 12), (9, 8), (3, 2), (16, 24)])
def test_images_are_continued_at_their_lower_and_right_edges(size: tuple[int, int]) -> None:
    """One that fits is not copied."""
    images, seen = noise(2, 3, *size), []
    recorder = nn.Identity()
    recorder.register_forward_hook(lambda module, given, found: seen.append(found))
    out = LandmarkNet(recorder, 8)(images)
    below, right = -size[0] % 8, -size[1] % 8
    np.testing.assert_array_equal(seen[0], np.pad(images, ((0, 0), (0, 0), (0, below), (0, right)), mode="edge"))
    assert torch.equal(out, images)
    assert (seen[0] is images) == (size == (16, 24))


def test_the_vgg19_of_the_paper_is_what_is_taken_if_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def unet(encoder: str, **options: Any) -> nn.Module:
        asked.update(options, encoder=encoder)
        return stock(RESNET, encoder_weights=None, decoder_channels=NARROW)

    stock = smp.Unet
    monkeypatch.setattr("adv_landmark.network.smp.Unet", unet)
    make_network(Network(), 19, 1)
    wanted = {"in_channels": 1, "classes": 57, "decoder_channels": (256, 128, 64, 32, 16), "encoder_weights": None}
    assert asked == {"encoder": "vgg19", **wanted}


def test_the_stride_is_that_of_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made().stride == 32
    stock = smp.Unet

    def unet(*names: Any, **options: Any) -> nn.Module:
        model = stock(*names, **options)
        model.encoder._output_stride = 16
        return model

    monkeypatch.setattr("adv_landmark.network.smp.Unet", unet)
    assert made("resnet18").stride == 16


# Weights


@pytest.mark.parametrize(
    ("name", "start"),
    [
        *product(
            ("test_resnet", "test_efficientnet", "resnet18"), ("", "module.", "encoder.", "network.model.encoder.")
        ),
        *product(("test_convnext", "test_mambaout", "vgg11"), ("",)),
    ],
)
def test_weights_of_a_file(tmp_path: Path, name: str, start: str) -> None:
    """Of timm or torchvision, of a wrapped network, of somebody's U-Net, and of one of ours: the encoder's.

    What gives features has stages_0 in place of stages.0 in some of timm's; the classifier of a VGG need not be there.
    """
    images, path, more = noise(2, 3, 64, 64), tmp_path / "own.pth", {"decoder.weight": torch.zeros(3)}
    torch.manual_seed(1)
    if name == "vgg11":
        source = nn.ModuleDict({"features": torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"])})
        wanted, more = source["features"](images), {f"{start}classifier.0.weight": torch.zeros(4096, 5)}
    elif name == "resnet18":
        source = torchvision.models.resnet18(weights=None).eval()
        wanted = nn.Sequential(*list(source.children())[:-2])(images)
    else:
        source = timm.create_model(name).eval()
        wanted = source.forward_intermediates(images, intermediates_only=True, norm=False)[-1]
    torch.save({f"{start}{key}": value for key, value in source.state_dict().items()} | more, path)
    encoder = f"tu-{name}" if name.startswith("test_") else name
    found = made(encoder, weights=str(path)).model.encoder(images)[-1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
