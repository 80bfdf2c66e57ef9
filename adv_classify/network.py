"""A timm network that takes images in [0, 1]: the normalisation is inside, so that noise has the image's own units."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from advmed.integrations.lightning.weights import load_weights

PREFIXES = ("network.model.", "model.", "module.")
"""What weights of ours, and of others' wrappers, are called by before their own name."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network.

    Attributes:
        name: any model of timm that classifies, such as resnet18.
        weights: a file of weights to begin with (.pth, .safetensors, or a .ckpt of ours); its classification layer is
            left out if it has other classes. Nothing is downloaded.
        mean: of the normalisation, one number per channel; None: what the model was made for.
        std: of the normalisation; None: what the model was made for.
        drop_rate: dropout before the classification layer.
        channels_last: keep weights and activations in that memory format: most convolutional networks are faster in
            it on a CPU, and on a GPU in mixed precision. What is computed is the same.

    Example:
        >>> import torch
        >>> from adv_classify import Network, RobustClassifier
        >>> network = Network(name="resnet10t", mean=(0.5,), std=(0.25,))
        >>> model = RobustClassifier(network, num_classes=2, channels=1)
        >>> model(torch.rand(4, 1, 32, 32)).shape  # images in [0, 1]: it normalises them itself
        torch.Size([4, 2])
    """

    name: str = "resnet18"
    weights: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    drop_rate: float = 0.0
    channels_last: bool = False


class NormalizedClassifier(nn.Module):
    """A classifier of normalised images, made a classifier of images in [0, 1].

    Args:
        model: the classifier.
        mean: one number per channel.
        std: one number per channel, > 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean and std need one number per channel, std > 0, got mean {mean}, std {std}")
        self.model = model
        self.register_buffer("mean", torch.tensor([float(x) for x in mean]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor([float(x) for x in std]).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, classes), of images (B, C, H, W) in [0, 1]."""
        return self.model((images - self.mean) / self.std)


def make_network(network: Network, classes: int, channels: int) -> NormalizedClassifier:
    """The network, with its weights if it names some.

    Raises:
        ValueError: for a name that timm does not know, with the nearest ones, or weights of another network.
        FileNotFoundError: if there is no file of weights.
    """
    if not timm.is_model(network.name):
        near = difflib.get_close_matches(network.name, timm.list_models(), 5, 0.5)
        raise ValueError(
            f"timm has no model {network.name!r}"
            + (f"; near names are {', '.join(near)}" if near else "; see timm.list_models()")
        )
    try:
        model = timm.create_model(
            network.name, pretrained=False, num_classes=classes, in_chans=channels, drop_rate=network.drop_rate
        )
    except TypeError as error:
        raise ValueError(f"the model {network.name} cannot be made as a classifier: {error}") from error
    if network.weights is not None:
        load_weights(model, network.weights, prefixes=PREFIXES, heads=_head_names(model))
    made_for = model.pretrained_cfg
    mean = tuple(network.mean or _per_channel(made_for.get("mean"), channels, 0.5))
    std = tuple(network.std or _per_channel(made_for.get("std"), channels, 0.25))
    if len(mean) != channels:
        raise ValueError(f"mean has {len(mean)} number(s) for images of {channels} channel(s)")
    classifier = NormalizedClassifier(model, mean, std)
    return classifier.to(memory_format=torch.channels_last) if network.channels_last else classifier


def _head_names(model: Any) -> list[str]:
    names = model.pretrained_cfg.get("classifier") or "fc"
    return [f"{name}." for name in ([names] if isinstance(names, str) else names)]


def _per_channel(values: Sequence[float] | None, channels: int, default: float) -> list[float]:
    """The model's own numbers where the channels fit, their mean for grey images, or a default."""
    if values is None or channels not in (1, len(values)):
        return [default] * channels
    return list(values) if channels == len(values) else [sum(values) / len(values)]
