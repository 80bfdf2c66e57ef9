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
from safetensors.torch import save_file
from torch import Tensor, nn

from adv_landmark.network import LandmarkNet, Network, make_network

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
    maps = network(noise(2, channels, *size))
    assert maps.shape == (2, 3 * landmarks, *size)
    assert maps.isfinite().all()


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


@pytest.mark.parametrize("size", [(7, 13), (8, 12), (9, 8), (3, 2)])
def test_images_are_continued_at_their_lower_and_right_edges(size: tuple[int, int]) -> None:
    recorder, images = Recorder(), noise(2, 3, *size)
    out = LandmarkNet(recorder, 8)(images)
    height, width = (-(-side // 8) * 8 for side in size)
    wanted = np.pad(images.numpy(), ((0, 0), (0, 0), (0, height - size[0]), (0, width - size[1])), mode="edge")
    assert recorder.seen is not None
    np.testing.assert_array_equal(recorder.seen.numpy(), wanted)
    assert torch.equal(out, images)


def test_an_image_that_fits_is_not_copied() -> None:
    recorder, images = Recorder(), noise(1, 3, 16, 24)
    LandmarkNet(recorder, 8)(images)
    assert recorder.seen is images


def test_the_edges_carry_gradients() -> None:
    images = noise(1, 3, 33, 40).requires_grad_()
    made()(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad[..., -1, :].abs().min() > 0


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


def test_decoder_channels_are_those_of_the_decoder() -> None:
    network = make_network(Network(encoder=RESNET, decoder_channels=[20, 16, 12, 8, 4]), 2, 3)
    assert [block.conv2[0].out_channels for block in network.model.decoder.blocks] == [20, 16, 12, 8, 4]
    assert network.model.segmentation_head[0].in_channels == 4


def test_a_stride_other_than_32_is_the_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made().stride == 32
    stock = smp.Unet

    def unet(*names: Any, **options: Any) -> nn.Module:
        model = stock(*names, **options)
        model.encoder._output_stride = 16
        return model

    monkeypatch.setattr("adv_landmark.network.smp.Unet", unet)
    assert made("resnet18").stride == 16


# Names


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet18"),
        ("vgg91", "vgg19"),
        ("tu-resnet10", "tu-resnet10t"),
        ("tu-test_resnett", "tu-test_resnet"),
        ("qqqqqqqqqqq", "see smp.encoders.get_encoder_names()"),
    ],
)
def test_an_unknown_encoder_is_answered_with_near_names(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"there is no encoder '{name}'") as error:
        made(name)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_of_timm_without_its_prefix_is_answered_with_the_right_one() -> None:
    with pytest.raises(ValueError, match="resnet10t") as error:
        made("resnet10t")
    assert "tu-resnet10t" in str(error.value)


def test_a_name_of_timm_with_a_tag_is_one() -> None:
    made("tu-test_resnet.r160_in1k")


def test_an_encoder_that_gives_no_features_to_a_unet_is_refused() -> None:
    with pytest.raises(ValueError, match="the encoder tu-test_vit cannot be used in a U-Net: ") as error:
        made("tu-test_vit")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [(16, 8, 8, 8), (16, 8, 8, 8, 8, 8), (16, 8, 8, 8, 0), (), (-1, 8, 8, 8, 8)])
def test_decoder_channels_that_do_not_fit_are_an_error(given: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"decoder_channels must be five numbers >= 1, got \[") as error:
        make_network(Network(encoder=RESNET, decoder_channels=given), 2, 3)
    assert str(list(given)) in str(error.value)


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


def write_pth(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def write_wrapped(path: Path, state: dict[str, Tensor]) -> Path:
    return write_pth(path, {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3})


def write_encoder(path: Path, state: dict[str, Tensor]) -> Path:
    """As the checkpoint of somebody's U-Net."""
    theirs = {f"encoder.{k}": v for k, v in state.items()} | {"decoder.weight": torch.zeros(3)}
    return write_pth(path, theirs)


def write_safetensors(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


WRITERS = [write_pth, write_wrapped, write_encoder, write_safetensors]
Write = Callable[[Path, dict[str, Tensor]], Path]


@pytest.mark.parametrize("write", WRITERS)
def test_weights_of_a_file_of_timm(tmp_path: Path, write: Write) -> None:
    images = noise(2, 3, 64, 64)
    for name in ("test_resnet", "test_efficientnet"):
        torch.manual_seed(1)
        source = timm.create_model(name, num_classes=5).eval()
        path = write(tmp_path / name, source.state_dict())
        network = made(f"tu-{name}", weights=str(path))
        stages = source.forward_intermediates(images, intermediates_only=True)
        found = network.model.encoder(images)
        assert not torch.equal(made(f"tu-{name}").model.encoder(images)[-1], found[-1])
        for stage in stages[-3:]:
            assert any(one.shape == stage.shape and torch.allclose(one, stage, rtol=1e-4, atol=1e-5) for one in found)


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout"])
def test_weights_of_timms_networks_that_name_their_stages_otherwise(tmp_path: Path, name: str) -> None:
    """What gives features has stages_0 in place of stages.0 there."""
    source = timm.create_model(name).eval()
    network = made(f"tu-{name}", weights=str(write_pth(tmp_path / "weights", source.state_dict())))
    images = noise(1, 3, 64, 64)
    stage = source.forward_intermediates(images, intermediates_only=True, norm=False)[-1]
    torch.testing.assert_close(network.model.encoder(images)[-1], stage, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("write", WRITERS)
def test_weights_of_a_file_of_torchvision(tmp_path: Path, write: Write) -> None:
    torch.manual_seed(1)
    source = torchvision.models.resnet18(weights=None).eval()
    network = made("resnet18", weights=str(write(tmp_path / "weights", source.state_dict())))
    features = nn.Sequential(*list(source.children())[:-2])
    images = noise(1, 3, 32, 32)
    torch.testing.assert_close(network.model.encoder(images)[-1], features(images), rtol=1e-4, atol=1e-5)


def test_weights_of_a_vgg_of_torchvision(tmp_path: Path) -> None:
    """Of its features; the 100 million weights of its classifier need not be there, and do no harm."""
    torch.manual_seed(1)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"])
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    state["classifier.0.weight"] = torch.zeros(4096, 5)
    network = made("vgg11", weights=str(write_pth(tmp_path / "weights", state)))
    images = noise(1, 3, 32, 32)
    torch.testing.assert_close(network.model.encoder(images)[-1], features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", [RESNET, "resnet18"])
def test_weights_of_a_checkpoint_of_ours(tmp_path: Path, encoder: str) -> None:
    """The encoder's, for another number of landmarks; the decoder begins anew."""
    source = made(encoder, landmarks=3)
    path = tmp_path / "best.ckpt"
    state = {f"network.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 1.0}, "epoch": 7}, path)
    network = made(encoder, landmarks=5, weights=str(path))
    for key, value in network.model.encoder.state_dict().items():
        assert torch.equal(value, source.model.encoder.state_dict()[key]), key
    assert not torch.equal(
        network.model.decoder.blocks[0].conv1[0].weight, source.model.decoder.blocks[0].conv1[0].weight
    )


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
    path = write_pth(tmp_path / "weights", source().state_dict())
    with pytest.raises(ValueError, match="holds weights of another network") as error:
        made(encoder, channels=channels, weights=str(path))
    assert str(path) in str(error.value)
    assert missing in str(error.value)
    assert "\n" not in str(error.value)


def test_one_tensor_too_few_is_an_error(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    del state["layer2.0.bn1.running_mean"]
    with pytest.raises(ValueError, match=r": 1 of \d+ tensors are missing .* such as layer2.0.bn1.running_mean$"):
        made(weights=str(write_pth(tmp_path / "weights", state)))


@pytest.mark.parametrize("content", [b"", b"these are no weights"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read as a file of weights"):
        made(weights=str(tmp_path / "weights.pth"))


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file of weights .*nothing\.pth"):
        made(weights=str(tmp_path / "nothing.pth"))


def test_attacks_hold_the_whole_of_it_still() -> None:
    """BatchNorm and all, at a size that needs padding."""
    from adv_landmark.objective import LandmarkObjective
    from advmed.attacks import PGD

    network, images = made().train(), noise(2, 3, 40, 33)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    points = torch.tensor([[(4.0, 5.0), (20.0, 30.0)], [(30.0, 5.0), (2.0, 39.0)]])
    result = PGD(2, 2.0)(LandmarkObjective(network, points, (40, 33), radius=4.0), images, 0.5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.testing.assert_close((result.images - images).flatten(1).norm(dim=1), torch.tensor([0.5, 0.5]))
