"""timm networks with the normalisation inside, and weights from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adv_classify.network import Network, NormalizedClassifier, make_network


@pytest.fixture
def images(tools: Any) -> Tensor:
    return tools.noise(2, 3, 16, 16)


def plain(name: str, classes: int = 3, channels: int = 3) -> nn.Module:
    return timm.create_model(name, num_classes=classes, in_chans=channels).eval()


# Normalisation


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
    tools: Any, name: str, channels: int, given: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    network = make_network(Network(name=name, **given), 3, channels).eval()
    twin = plain(name, 3, channels)
    twin.load_state_dict(network.model.state_dict())
    images = tools.noise(2, channels, 16, 16)
    kept = images.clone()
    normalised = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(network(images), twin(normalised), rtol=1e-4, atol=1e-5)
    assert torch.equal(images, kept)
    assert network(images).shape == (2, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_changes_the_memory_format_alone(tools: Any, channels: int) -> None:
    images = tools.noise(2, channels, 32, 32).requires_grad_()
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


def test_the_normalisation_goes_where_the_network_goes() -> None:
    network = make_network(Network(name="test_efficientnet"), 3, 3)
    assert network.state_dict()["mean"].shape == (1, 3, 1, 1)
    moved = network.to(torch.float64)
    assert moved.mean.dtype == moved.std.dtype == torch.float64
    assert "mean" not in dict(network.named_parameters())


@pytest.mark.parametrize(
    ("given", "channels", "message"),
    [
        ({"mean": (0.5,)}, 3, "mean has 1 number(s) for images of 3 channel(s)"),
        ({"mean": (0.5, 0.5, 0.5)}, 1, "mean has 3 number(s) for images of 1 channel(s)"),
        ({"std": (0.5,)}, 3, "mean and std need one number per channel, std > 0"),
        ({"std": (0.5, 0.0, 0.5)}, 3, "mean and std need one number per channel, std > 0"),
        ({"std": (0.5, -1.0, 0.5)}, 3, "mean and std need one number per channel, std > 0"),
    ],
)
def test_a_normalisation_that_does_not_fit_is_an_error(given: dict[str, Any], channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        make_network(Network(name="test_efficientnet", **given), 3, channels)


# The network


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet18"),
        ("efficientnet_b00", "efficientnet_b0"),
        ("test_vitt", "test_vit"),
        ("qqqqqqqqqqq", "see timm.list_models()"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"timm has no model '{name}'") as error:
        make_network(Network(name=name), 3, 3)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


def test_dropout() -> None:
    for rate in (0.0, 0.4):
        network = make_network(Network(name="test_resnet", drop_rate=rate), 3, 3)
        assert network.model.drop_rate == rate


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("timm.models._builder.load_pretrained", download)
    make_network(Network(name="test_resnet"), 3, 3)
    with pytest.raises(AssertionError, match="weights were asked for"):
        timm.create_model("test_resnet", pretrained=True)


# Weights


def write_pth(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def write_wrapped(path: Path, state: dict[str, Tensor]) -> Path:
    return write_pth(path, {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3})


def write_safetensors(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_ours(path: Path, state: dict[str, Tensor]) -> Path:
    ours = {f"network.model.{k}": v for k, v in state.items()} | {"network.mean": torch.zeros(1, 3, 1, 1)}
    torch.save({"state_dict": ours, "hyper_parameters": {"lr": 1.0}}, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize("write", [write_pth, write_wrapped, write_safetensors, write_ours])
def test_weights_of_a_file(
    tmp_path: Path, images: Tensor, name: str, write: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    source = plain(name)
    path = write(tmp_path / "weights", source.state_dict())
    same = make_network(Network(name=name, weights=str(path), mean=(0, 0, 0), std=(1, 1, 1)), 3, 3).eval()
    torch.testing.assert_close(same(images), source(images))

    other = make_network(Network(name=name, weights=str(path), mean=(0, 0, 0), std=(1, 1, 1)), 5, 3).eval()
    torch.testing.assert_close(other.model.forward_features(images), source.forward_features(images))
    assert other(images).shape == (2, 5)
    assert other.model.get_classifier().weight.shape[0] == 5


def test_weights_of_a_run_of_ours(standard: Path, npz: Path, tools: Any, images: Tensor) -> None:
    path = standard / "checkpoints" / "best.ckpt"
    network = make_network(Network(name=tools.NETWORK, weights=str(path)), 7, 3)
    saved = tools.weights(standard, "best")
    for key, value in network.model.state_dict().items():
        if not key.startswith("classifier."):
            assert torch.equal(value, saved[f"network.model.{key}"]), key


@pytest.mark.parametrize(
    ("name", "channels", "missing"),
    [("test_efficientnet", 3, "bn1.bias"), ("test_resnet", 1, "conv1.0.weight"), ("resnet10t", 3, "bn1.bias")],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, name: str, channels: int, missing: str) -> None:
    path = write_pth(tmp_path / "weights", plain(name, 3, channels).state_dict())
    own = plain("test_resnet")
    with pytest.raises(ValueError, match="holds weights of another network") as error:
        make_network(Network(name="test_resnet", weights=str(path)), 3, 3)
    assert str(path) in str(error.value)
    assert missing in str(error.value)
    assert f"of {len(own.state_dict())} tensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_head_that_is_missing_is_made_anew_and_a_body_is_not(tmp_path: Path) -> None:
    state = plain("test_resnet").state_dict()
    body = {key: value for key, value in state.items() if not key.startswith("fc.")}
    make_network(Network(name="test_resnet", weights=str(write_pth(tmp_path / "body", body))), 3, 3)
    del state["bn1.running_mean"]
    with pytest.raises(ValueError, match=r"1 of \d+ tensors are missing .* such as bn1.running_mean$"):
        make_network(Network(name="test_resnet", weights=str(write_pth(tmp_path / "part", state))), 3, 3)


@pytest.mark.parametrize("kind", ["garbage", "empty", "list", "module", "safetensors"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    content = {"list": [1, 2], "module": nn.Linear(2, 2)}
    if kind in content:
        torch.save(content[kind], path)
    else:
        path.write_bytes(b"" if kind == "empty" else b"these are no weights")
    with pytest.raises(ValueError, match=r"weights\.\w+ (cannot be read as a|is no) file of weights") as error:
        make_network(Network(name="test_resnet", weights=str(path)), 3, 3)
    assert "\n" not in str(error.value)


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file of weights .*nothing\.pth"):
        make_network(Network(name="test_resnet", weights=str(tmp_path / "nothing.pth")), 3, 3)


def test_attacks_hold_the_whole_of_it_still(images: Tensor) -> None:
    """BatchNorm and all: what is attacked is the module with the normalisation inside."""
    from adv_classify import ClassificationObjective
    from advmed.attacks import PGD

    network = make_network(Network(name="test_resnet"), 3, 3).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    result = PGD(2, 2.0)(ClassificationObjective(network, torch.tensor([0, 1])), images, 0.5)
    assert isinstance(network, NormalizedClassifier)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.testing.assert_close((result.images - images).flatten(1).norm(dim=1), torch.tensor([0.5, 0.5]))
