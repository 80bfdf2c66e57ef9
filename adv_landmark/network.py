"""The multi-task U-Net (Yao et al. 2020) on segmentation_models_pytorch: images in [-1, 1] to 3 maps a landmark."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import segmentation_models_pytorch as smp
import timm
from torch import Tensor, nn
from torch.nn import functional

from advmed.integrations.lightning.weights import load_weights, read_tensors

PREFIXES = ("network.model.encoder.", "encoder.", "module.")
"""What an encoder's weights are called by before their own name, in checkpoints of ours and in others' wrappers."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network.

    Attributes:
        encoder: an encoder of segmentation_models_pytorch, such as vgg19_bn or resnet18, or of timm, such as
            tu-resnet10t. The papers' vgg19 has no normalisation: at a learning rate of 1e-3 its activations leave
            float16 in a few steps.
        weights: a file of weights for the encoder to begin with (torchvision's or timm's .pth, .safetensors), or a
            .ckpt of ours, from which the decoder, and for as many landmarks the last layer, are taken, too. Nothing is
            downloaded.
        decoder_channels: of the five stages of the decoder, from the deepest.

    Example:
        >>> from adv_landmark import Network, RobustLandmarks
        >>> network = Network(encoder="resnet18", decoder_channels=(32, 16, 8, 8, 8))
        >>> model = RobustLandmarks(network, landmark_names=["tip", "end"], channels=1, size=(64, 64))
        >>> model.network.stride  # what other sizes are continued to a multiple of
        32
    """

    encoder: str = "vgg19_bn"
    weights: str | None = None
    decoder_channels: Sequence[int] = (256, 128, 64, 32, 16)


class LandmarkNet(nn.Module):
    """A U-Net that takes images of any size: they are continued at their edges to what the encoder can halve.

    Args:
        model: the U-Net.
        stride: that heights and widths must be multiples of.
    """

    def __init__(self, model: nn.Module, stride: int) -> None:
        super().__init__()
        self.model, self.stride = model, stride

    def forward(self, images: Tensor) -> Tensor:
        """Maps, (B, 3L, H, W), of images (B, C, H, W) in [-1, 1]."""
        height, width = images.shape[-2:]
        below, right = -height % self.stride, -width % self.stride
        if below or right:
            images = functional.pad(images, (0, right, 0, below), mode="replicate")
        return self.model(images)[..., :height, :width]


def make_network(network: Network, landmarks: int, channels: int) -> LandmarkNet:
    """The network, with its encoder's weights if it names some.

    Raises:
        ValueError: for an encoder that there is not, with the nearest names, or weights of another one.
        FileNotFoundError: if there is no file of weights.
    """
    name, is_timm = network.encoder, network.encoder.startswith("tu-")
    own = smp.encoders.get_encoder_names()
    if name not in own and not (is_timm and timm.is_model(name.removeprefix("tu-"))):
        near = difflib.get_close_matches(name, [*own, *(f"tu-{model}" for model in timm.list_models())], 5, 0.5)
        if timm.is_model(name):
            near = [f"tu-{name}", *near]
        raise ValueError(
            f"there is no encoder {name!r}"
            + (f"; near names are {', '.join(near)}" if near else "; see smp.encoders.get_encoder_names()")
        )
    if len(network.decoder_channels) != 5 or min(network.decoder_channels) < 1:
        raise ValueError(f"decoder_channels must be five numbers >= 1, got {list(network.decoder_channels)}")
    try:
        model = smp.Unet(
            name,
            encoder_weights=None,
            decoder_channels=tuple(network.decoder_channels),
            in_channels=channels,
            classes=3 * landmarks,
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise ValueError(f"the encoder {name} cannot be used in a U-Net: {error}") from error
    if network.weights is not None and not _load_whole(model, network.weights):
        if is_timm:
            # What gives features calls stages.0 stages_0 in some of timm's models.
            prefixes = (*PREFIXES, "model.")
            load_weights(
                model.encoder.model, network.weights, prefixes=prefixes, alike=lambda key: key.replace("_", ".")
            )
        else:
            load_weights(model.encoder, network.weights, prefixes=PREFIXES)
    return LandmarkNet(model, model.encoder.output_stride)


def _load_whole(model: nn.Module, path: str) -> bool:
    """Takes the weights of a U-Net of ours, its last layer if it fits; False if the file holds no such one."""
    found = read_tensors(Path(path)).get("state_dict", {}) if Path(path).suffix == ".ckpt" else {}
    own = {f"network.model.{key}": value.shape for key, value in model.state_dict().items()}
    body = [key for key in own if not key.startswith("network.model.segmentation_head.")]
    if not all(key in found and found[key].shape == own[key] for key in body):
        return False
    load_weights(model, path, prefixes=("network.model.",), heads=("segmentation_head.",))
    return True
