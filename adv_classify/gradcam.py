"""Grad-CAM (Selvaraju et al. 2017), computed by Captum: what a decision rests on, and whether noise moves it."""

from __future__ import annotations

import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn


class GradCam:
    """Grad-CAM of a classifier at its last layer of feature maps.

    Args:
        network: images to logits.
        images: a batch to look for that layer with, (B, C, H, W).
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self._attribution = LayerGradCam(network, last_feature_maps(network, images[:1]))

    def __call__(self, images: Tensor, classes: Tensor) -> Tensor:
        """The maps of the given classes, (B, H, W), >= 0, as large as the images.

        Args:
            images: (B, C, H, W).
            classes: (B,), int64.
        """
        with torch.inference_mode(False), torch.enable_grad():
            images = images.detach().clone().requires_grad_()
            maps = self._attribution.attribute(images, target=classes, relu_attributions=True)
            large = LayerAttribution.interpolate(maps, tuple(images.shape[2:]), "bilinear")
        return large.detach().sum(1)


def last_feature_maps(network: nn.Module, images: Tensor) -> nn.Module:
    """The last module whose output is a batch of maps larger than one pixel, (B, channels, height, width).

    Raises:
        ValueError: if there is none, as in networks without convolutions.
    """
    found: list[nn.Module] = []

    def look(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            found.append(module)

    leaves = [module for module in network.modules() if not any(module.children())]
    hooks = [module.register_forward_hook(look) for module in leaves]
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
