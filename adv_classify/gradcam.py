"""Grad-CAM (Selvaraju et al. 2017): what a decision rests on, and whether noise moves it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Arrange = Callable[[Tensor], Tensor]
"""Makes maps, (B, channels, height, width), of what a layer gives."""


class GradCam:
    """Grad-CAM of a classifier at its last layer of feature maps.

    Args:
        network: images to logits.
        images: a batch to look for that layer with, (B, C, H, W).

    Raises:
        ValueError: if it has no feature maps, or it is not known how they lie in what its layers give.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self._network = network
        self._layer, self._arrange = feature_layer(network, images[:1])

    def __call__(self, images: Tensor, classes: Tensor) -> Tensor:
        """The maps of the given classes, (B, H, W), >= 0, as large as the images.

        Args:
            images: (B, C, H, W).
            classes: (B,), int64.
        """
        seen: list[Tensor] = []
        hook = self._layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            with torch.inference_mode(False), torch.enable_grad():
                logits = self._network(images.detach().clone().requires_grad_())
                (slope,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), seen[-1])
        finally:
            hook.remove()
        weight = self._arrange(slope).mean((2, 3), keepdim=True)
        heat = (weight * self._arrange(seen[-1].detach())).sum(1, keepdim=True).relu()
        return functional.interpolate(heat, tuple(images.shape[2:]), mode="bilinear")[:, 0]


def feature_layer(network: nn.Module, images: Tensor) -> tuple[nn.Module, Arrange]:
    """The layer whose maps are looked at, and how they are made of what it gives.

    Of transformers and mixers, these are timm's families of ViT, Swin and MLP-Mixer: what others hand from layer to
    layer may have the shape of maps and be none, such as the keys of an attention.

    Raises:
        ValueError: for others, and where there are no maps.
    """
    model: Any = getattr(network, "model", network)
    family = type(model).__module__.rpartition(".")[2]
    if family == "vision_transformer":
        return model.blocks[-1].norm1, _tokens(model.patch_embed.grid_size, model.num_prefix_tokens)
    if family == "mlp_mixer":
        return model.norm, _tokens(model.stem.grid_size, 0)
    if family == "swin_transformer":
        return model.norm, lambda maps: maps.permute(0, 3, 1, 2)
    if callable(getattr(model, "forward_features", None)):
        with torch.no_grad():
            features = model.forward_features(images)
        if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[1] != model.num_features:
            raise ValueError(
                f"Grad-CAM knows convolutional networks, ViT, Swin and MLP-Mixer, and {type(model).__name__} is none "
                f"of them: leave it out with --gradcam false"
            )
    return last_feature_maps(network, images), lambda maps: maps


def _tokens(grid: tuple[int, int], prefix: int) -> Arrange:
    """Of tokens, (B, prefix + places, channels)."""
    return lambda tokens: tokens[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)


def last_feature_maps(network: nn.Module, images: Tensor) -> nn.Module:
    """The last module to end whose output is a batch of maps larger than one pixel, (B, channels, height, width).

    What is inside an attention is none.

    Raises:
        ValueError: if there is none, as in networks without convolutions.
    """
    found: list[nn.Module] = []

    def look(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            found.append(module)

    parts = [module for name, module in network.named_modules() if not re.search(r"attn\.|attention\.", name.lower())]
    hooks = [module.register_forward_hook(look) for module in parts]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError("the network has no feature maps larger than one pixel, and Grad-CAM nothing to show")
    return found[-1]


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation of two batches of maps, (B,); NaN where a map is the same everywhere."""
    first, second = (maps.double().flatten(1) for maps in (first, second))
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1)).where(
        (first.norm(dim=1) > 0) & (second.norm(dim=1) > 0), torch.nan
    )
