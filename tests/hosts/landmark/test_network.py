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
from helpers.lightning import shaken

NARROW = (16, 8, 8, 8, 8)
RESNET = "tu-test_resnet"
EFFICIENTNET = "tu-test_efficientnet"


def made(encoder: str = RESNET, landmarks: int = 2, channels: int = 3, **options: Any) -> LandmarkNet:
    return make_network(Network(encoder=encoder, decoder_channels=NARROW, **options), landmarks, channels).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# The network


@pytest.mark.parametrize("size", [(64, 32), (33, 50), (1, 1), (5, 96)])
@pytest.mark.parametrize(("encoder", "channels"), [(RESNET, 3), (EFFICIENTNET, 1), ("resnet18", 3)])
def test_the_network_is_the_stock_one_on_images_that_are_continued(
    encoder: str, channels: int, size: tuple[int, int]
) -> None:
    """At their lower and right edges, to what it takes; its state_dict under model. runs without this package."""
    network, images, seen = made(encoder, 3, channels), noise(2, channels, *size).requires_grad_(), []
    network.model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    stock = smp.Unet(encoder, encoder_weights=None, decoder_channels=NARROW, in_channels=channels, classes=9).eval()
    weights = {key.removeprefix("model."): value for key, value in network.state_dict().items()}
    assert all(key.startswith("model.") for key in network.state_dict())
    stock.load_state_dict(weights)
    maps = network(images)
    more = [(0, -side % 32) for side in size]
    wide = torch.from_numpy(np.pad(images.detach(), ((0, 0), (0, 0), *more), mode="edge"))
    assert torch.equal(seen[0], wide)
    assert (seen[0] is images) == (size == (64, 32))  # one that fits is not copied
    assert torch.equal(maps, stock(wide)[..., : size[0], : size[1]])
    maps.square().sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert size == (1, 1) or images.grad[..., -1, :].abs().max() > 0  # of the continued edge, too


def test_a_vgg19_with_batch_norm_is_what_is_taken_if_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stride is that of the encoder."""
    stock, asked = smp.Unet, dict[str, Any]()

    def unet(encoder: str, **options: Any) -> nn.Module:
        asked.update(options, encoder=encoder)
        model = stock(RESNET, encoder_weights=None, decoder_channels=NARROW)
        model.encoder._output_stride = 16
        return model

    assert made().stride == 32
    monkeypatch.setattr("adv_landmark.network.smp.Unet", unet)
    assert make_network(Network(), 19, 1).stride == 16
    wanted = {"in_channels": 1, "classes": 57, "decoder_channels": (256, 128, 64, 32, 16), "encoder_weights": None}
    assert asked == {"encoder": "vgg19_bn", **wanted}


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
    if name == "vgg11":
        source = nn.ModuleDict({"features": torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"])})
        more = {f"{start}classifier.0.weight": torch.zeros(4096, 5)}
    else:
        source = torchvision.models.resnet18() if name == "resnet18" else timm.create_model(name)
    shaken(source.eval())
    if name == "vgg11":
        wanted = source["features"](images)
    elif name == "resnet18":
        wanted = nn.Sequential(*list(source.children())[:-2])(images)
    else:
        wanted = source.forward_intermediates(images, intermediates_only=True, norm=False)[-1]
    torch.save({f"{start}{key}": value for key, value in source.state_dict().items()} | more, path)
    encoder = f"tu-{name}" if name.startswith("test_") else name
    found = made(encoder, weights=str(path)).model.encoder(images)[-1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.detach().abs().max()))


def test_a_checkpoint_of_ours_gives_the_whole_network(tmp_path: Path) -> None:
    """For other landmarks all but its last layer; for another decoder the encoder alone."""
    source, path = made(), tmp_path / "own.ckpt"
    shaken(source)
    saved = source.state_dict()
    torch.save({"state_dict": {f"network.{key}": value for key, value in saved.items()}}, path)
    same, other = (made(landmarks=count, weights=str(path)).state_dict() for count in (2, 3))
    assert all(torch.equal(value, saved[key]) for key, value in same.items())
    for key, value in other.items():
        assert torch.equal(value, saved[key]) if "segmentation_head" not in key else value.shape != saved[key].shape
    narrow = Network(encoder=RESNET, decoder_channels=(8, 8, 8, 8, 8), weights=str(path))
    found = make_network(narrow, 2, 3).state_dict()
    assert all(torch.equal(found[key], saved[key]) for key in saved if key.startswith("model.encoder."))
    assert not any(torch.equal(found[key], saved[key]) for key in ("model.decoder.blocks.1.conv1.0.weight",))
