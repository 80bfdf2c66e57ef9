"""A stock U-Net behind a padding, and weights of its encoder from files."""

from __future__ import annotations

from collections.abc import Callable
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
from adv_landmark.objective import LandmarkObjective
from advmed.attacks import PGD
from helpers.mistakes import told

NARROW = (16, 8, 8, 8, 8)
RESNET = "tu-test_resnet"
EFFICIENTNET = "tu-test_efficientnet"


def made(encoder: str = RESNET, landmarks: int = 2, channels: int = 3, **options: Any) -> LandmarkNet:
    return make_network(Network(encoder=encoder, decoder_channels=NARROW, **options), landmarks, channels).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Recorder(nn.Module):
    """Keeps what it is given, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return images


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
    recorder, images = Recorder(), noise(2, 3, *size)
    out = LandmarkNet(recorder, 8)(images)
    height, width = (-(-side // 8) * 8 for side in size)
    wanted = np.pad(images.numpy(), ((0, 0), (0, 0), (0, height - size[0]), (0, width - size[1])), mode="edge")
    assert recorder.seen is not None
    np.testing.assert_array_equal(recorder.seen.numpy(), wanted)
    assert torch.equal(out, images)
    assert (recorder.seen is images) == (size == (16, 24))


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


def test_decoder_channels_and_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network(Network(encoder=RESNET, decoder_channels=[20, 16, 12, 8, 4]), 2, 3)
    assert [block.conv2[0].out_channels for block in network.model.decoder.blocks] == [20, 16, 12, 8, 4]
    assert network.model.segmentation_head[0].in_channels == 4
    assert network.stride == 32
    stock = smp.Unet

    def unet(*names: Any, **options: Any) -> nn.Module:
        model = stock(*names, **options)
        model.encoder._output_stride = 16
        return model

    monkeypatch.setattr("adv_landmark.network.smp.Unet", unet)
    assert made("resnet18").stride == 16


# Names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("resnet81", ["there is no encoder 'resnet81'", "resnet18"]),
        ("vgg91", ["there is no encoder 'vgg91'", "vgg19"]),
        ("tu-resnet10", ["there is no encoder 'tu-resnet10'", "tu-resnet10t"]),
        ("tu-test_resnett", ["there is no encoder 'tu-test_resnett'", "tu-test_resnet"]),
        ("qqqqqqqqqqq", ["there is no encoder 'qqqqqqqqqqq'; see smp.encoders.get_encoder_names()"]),
        ("resnet10t", ["resnet10t", "tu-resnet10t"]),  # timm's own name, without its prefix
        ("tu-test_vit", ["the encoder tu-test_vit cannot be used in a U-Net: "]),
    ],
)
def test_encoders_that_there_are_not(name: str, parts: list[str]) -> None:
    told(ValueError, lambda: made(name), *parts)
    made("tu-test_resnet.r160_in1k")  # with a tag, a name is one


@pytest.mark.parametrize("given", [(16, 8, 8, 8), (16, 8, 8, 8, 8, 8), (16, 8, 8, 8, 0), (), (-1, 8, 8, 8, 8)])
def test_decoder_channels_that_do_not_fit_are_an_error(given: tuple[int, ...]) -> None:
    network = Network(encoder=RESNET, decoder_channels=given)
    message = f"decoder_channels must be five numbers >= 1, got {list(given)}"
    told(ValueError, lambda: make_network(network, 2, 3), message)


@pytest.mark.filterwarnings("ignore:For 'tu-':UserWarning")
def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("timm.models._builder.load_pretrained", download)
    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", download)
    for encoder in (RESNET, "resnet18"):
        made(encoder)
        with pytest.raises(AssertionError, match="weights were asked for"):
            smp.Unet(encoder)


# Weights


def save(path: Path, state: dict[str, Tensor]) -> str:
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("start", ["", "module.", "encoder."])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnet18"])
def test_weights_of_a_file(tmp_path: Path, start: str, name: str) -> None:
    """Of timm or torchvision, of a wrapped network, and of somebody's U-Net."""
    images = noise(2, 3, 64, 64)
    torch.manual_seed(1)
    if name == "resnet18":
        source = torchvision.models.resnet18(weights=None).eval()
        stages = [nn.Sequential(*list(source.children())[:-2])(images)]
    else:
        source = timm.create_model(name, num_classes=5).eval()
        stages = source.forward_intermediates(images, intermediates_only=True)[-3:]
    state = {f"{start}{key}": value for key, value in source.state_dict().items()}
    path = save(tmp_path / "own.pth", state | {"decoder.weight": torch.zeros(3)})
    encoder = name if name == "resnet18" else f"tu-{name}"
    found = made(encoder, weights=path).model.encoder(images)
    assert not torch.equal(made(encoder).model.encoder(images)[-1], found[-1])
    for stage in stages:
        assert any(one.shape == stage.shape and torch.allclose(one, stage, rtol=1e-4, atol=1e-5) for one in found)


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "vgg11"])
def test_weights_of_networks_that_name_their_stages_otherwise(tmp_path: Path, name: str) -> None:
    """What gives features has stages_0 in place of stages.0; the classifier of a VGG need not be there."""
    images = noise(1, 3, 64, 64)
    torch.manual_seed(1)
    if name == "vgg11":
        features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"])
        state = {f"features.{key}": value for key, value in features.state_dict().items()}
        state["classifier.0.weight"], stage = torch.zeros(4096, 5), features(images)
    else:
        source = timm.create_model(name).eval()
        state, stage = (
            source.state_dict(),
            source.forward_intermediates(images, intermediates_only=True, norm=False)[-1],
        )
    encoder = name if name == "vgg11" else f"tu-{name}"
    network = made(encoder, weights=save(tmp_path / "own.pth", state))
    torch.testing.assert_close(network.model.encoder(images)[-1], stage, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", [RESNET, "resnet18"])
def test_weights_of_a_checkpoint_of_ours(tmp_path: Path, encoder: str) -> None:
    """The encoder's, for another number of landmarks; the decoder begins anew."""
    source = made(encoder, landmarks=3)
    state = {f"network.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 1.0}, "epoch": 7}, tmp_path / "best.ckpt")
    network = made(encoder, landmarks=5, weights=str(tmp_path / "best.ckpt"))
    for key, value in network.model.encoder.state_dict().items():
        assert torch.equal(value, source.model.encoder.state_dict()[key]), key
    one, two = (model.model.decoder.blocks[0].conv1[0].weight for model in (network, source))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("encoder", "source", "channels", "missing"),
    [
        (RESNET, lambda: timm.create_model("test_efficientnet"), 3, "bn1.bias"),
        (RESNET, lambda: timm.create_model("resnet10t"), 3, "bn1.bias"),
        (RESNET, lambda: timm.create_model("test_resnet", in_chans=1), 3, "conv1.0.weight"),
        (EFFICIENTNET, lambda: timm.create_model("test_efficientnet"), 1, "conv_stem.weight"),
        ("resnet18", lambda: nn.Linear(2, 2), 3, "bn1.bias"),
    ],
)
def test_weights_of_another_network_are_refused(
    tmp_path: Path, encoder: str, source: Callable[[], nn.Module], channels: int, missing: str
) -> None:
    path = save(tmp_path / "own.pth", source().state_dict())
    parts = (f"{path} holds weights of another network", missing)
    told(ValueError, lambda: made(encoder, channels=channels, weights=path), *parts)


def test_attacks_hold_the_whole_of_it_still() -> None:
    """BatchNorm and all, at a size that needs padding."""
    network, images = made().train(), noise(2, 3, 40, 33)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    points = torch.tensor([[(4.0, 5.0), (20.0, 30.0)], [(30.0, 5.0), (2.0, 39.0)]])
    result = PGD(2, 2.0)(LandmarkObjective(network, points, (40, 33), radius=4.0), images, 0.5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.testing.assert_close((result.images - images).flatten(1).norm(dim=1), torch.tensor([0.5, 0.5]))
