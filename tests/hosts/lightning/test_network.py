"""What both hosts say of networks and weights that there are not, and that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

import adv_classify.network
import adv_landmark.network
from helpers.mistakes import told

NARROW = (16, 8, 8, 8, 8)
Make = Callable[..., nn.Module]


def classifier(name: str = "test_efficientnet", channels: int = 3, **options: Any) -> nn.Module:
    return adv_classify.network.make_network(adv_classify.network.Network(name=name, **options), 3, channels)


def unet(encoder: str = "tu-test_resnet", channels: int = 3, **options: Any) -> nn.Module:
    given = {"encoder": encoder, "decoder_channels": NARROW, **options}
    return adv_landmark.network.make_network(adv_landmark.network.Network(**given), 2, channels)


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (classifier, {"mean": (0.5,)}, "mean has 1 number(s) for images of 3 channel(s)"),
        (classifier, {"mean": (0.5,) * 3, "channels": 1}, "mean has 3 number(s) for images of 1 channel(s)"),
        *(
            (classifier, {"std": std}, "mean and std need one number per channel, std > 0")
            for std in ((0.5,), (0.5, 0.0, 0.5), (0.5, -1.0, 0.5))
        ),
        *(
            (unet, {"decoder_channels": given}, f"decoder_channels must be five numbers >= 1, got {list(given)}")
            for given in ((16, 8, 8, 8), (16, 8, 8, 8, 8, 8), (16, 8, 8, 8, 0), (), (-1, 8, 8, 8, 8))
        ),
        (classifier, {"name": "resnet81"}, "timm has no model 'resnet81'; near names are resnet18"),
        (classifier, {"name": "efficientnet_b00"}, "efficientnet_b0"),
        (classifier, {"name": "test_vitt"}, "test_vit"),
        (classifier, {"name": "qqqqqqqqqqq"}, "timm has no model 'qqqqqqqqqqq'; see timm.list_models()"),
        (unet, {"encoder": "resnet81"}, "there is no encoder 'resnet81'; near names are resnet18"),
        (unet, {"encoder": "vgg91"}, "there is no encoder 'vgg91'; near names are vgg19"),
        (unet, {"encoder": "tu-resnet10"}, "tu-resnet10t"),
        (unet, {"encoder": "tu-test_resnett"}, "there is no encoder 'tu-test_resnett'; near names are tu-test_resnet"),
        (unet, {"encoder": "qqqqqqqqqqq"}, "no encoder 'qqqqqqqqqqq'; see smp.encoders.get_encoder_names()"),
        (unet, {"encoder": "resnet10t"}, "near names are tu-resnet10t"),  # timm's own name, without its prefix
        (unet, {"encoder": "tu-test_vit"}, "the encoder tu-test_vit cannot be used in a U-Net: "),
    ],
)
def test_mistakes(make: Make, given: dict[str, Any], message: str) -> None:
    told(ValueError, lambda: make(**given), message)


@pytest.mark.parametrize(("make", "name"), [(classifier, "test_resnet"), (unet, "tu-test_resnet"), (unet, "resnet18")])
def test_weights_of_another_network_are_refused(tmp_path: Path, make: Make, name: str) -> None:
    """As those of a file are wherever they do not fit."""
    path = tmp_path / "own.pth"
    torch.save(timm.create_model("test_resnet", in_chans=1).state_dict(), path)
    told(ValueError, lambda: make(name, weights=str(path)), f"{path} holds weights of another network")


@pytest.mark.filterwarnings("ignore:For 'tu-':UserWarning")
def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("timm.models._builder.load_pretrained", download)
    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", download)
    monkeypatch.setattr("segmentation_models_pytorch.encoders.load_url", download, raising=False)  # before 0.5.1
    for ours, stock in (
        (lambda: classifier("test_resnet"), lambda: timm.create_model("test_resnet", pretrained=True)),
        (lambda: unet("tu-test_resnet"), lambda: smp.Unet("tu-test_resnet")),
        (lambda: unet("resnet18"), lambda: smp.Unet("resnet18")),
    ):
        ours()
        with pytest.raises(AssertionError, match="weights were asked for"):
            stock()
