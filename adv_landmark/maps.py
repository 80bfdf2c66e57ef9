"""Landmarks as maps and back: a heatmap and two offset maps for each landmark (Yao et al. 2020).

A point is (x, y) in pixels of the network's input; (0, 0) is the centre of the top left pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from advmed.distances import at_least_float32


@dataclass(frozen=True)
class Targets:
    """What the maps should be.

    Attributes:
        disk: 1 within the radius of the landmark, else 0; (B, L, H, W).
        gaussian: exp(-d^2 / 2 radius^2) at distance d within the radius, else 0; (B, L, H, W).
        offset_y: from each row to the landmark, in radii; (B, L, H, 1).
        offset_x: from each column to the landmark, in radii; (B, L, 1, W).
        present: whether the landmark is known and in the image; (B, L), bool.
    """

    disk: Tensor
    gaussian: Tensor
    offset_y: Tensor
    offset_x: Tensor
    present: Tensor


def encode(points: Tensor, size: tuple[int, int], radius: float) -> Targets:
    """The maps of landmarks.

    For each landmark a disk, a Gaussian and two offsets, the targets of the multi-task U-Net (Yao et al. 2020, "Miss
    the point: targeted adversarial attack on multiple landmark detection"; AMAT paper, arXiv 2206.01736, section 3.6).

    Args:
        points: (B, L, 2), each (x, y) in pixels; NaN where a landmark is not known.
        size: (H, W) of the maps.
        radius: within which a pixel speaks for a landmark, in pixels, >= 1.

    Returns:
        ``disk`` and ``gaussian``, (B, L, H, W); ``offset_y``, (B, L, H, 1), and ``offset_x``, (B, L, 1, W), in radii;
        ``present``, (B, L), bool, whether a landmark is known and in the image.

    Example:
        >>> import torch
        >>> from adv_landmark import encode
        >>> targets = encode(torch.tensor([[[3.0, 2.0]]]), size=(8, 8), radius=2)
        >>> targets.disk.sum(), targets.offset_y[0, 0, :, 0]  # 13 pixels; each row's way to the landmark, in radii
        (tensor(13.), tensor([ 1.0000,  0.5000,  0.0000, -0.5000, -1.0000, -1.5000, -2.0000, -2.5000]))
    """
    height, width = size
    x, y = points.unbind(-1)
    limits = torch.tensor((width, height), dtype=points.dtype, device=points.device) - 0.5
    present = ((points >= -0.5) & (points <= limits)).all(-1)  # False for NaN
    rows = torch.arange(height, dtype=points.dtype, device=points.device)
    columns = torch.arange(width, dtype=points.dtype, device=points.device)
    # A landmark that is not there is put in a corner, so that its maps are finite; its pixels are none.
    offset_y = ((torch.where(present, y, 0.0)[..., None] - rows) / radius)[..., None]
    offset_x = ((torch.where(present, x, 0.0)[..., None] - columns) / radius)[..., None, :]
    squared = offset_y.square() + offset_x.square()
    disk = ((squared <= 1) & present[..., None, None]).to(points.dtype)
    return Targets(disk, torch.exp(-squared / 2) * disk, offset_y, offset_x, present)


def split_maps(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The network's output (B, 3L, H, W) as heatmap logits, y offsets and x offsets, each (B, L, H, W); no copies."""
    heat, offset_y, offset_x = at_least_float32(maps).unflatten(1, (3, -1)).unbind(1)
    return heat, offset_y, offset_x


def decode(maps: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Landmarks of maps, to a fraction of a pixel, by votes.

    Pixels vote as in Yao et al. 2020 (AMAT paper, arXiv 2206.01736, section 3.6); how the votes are counted is ours.
    For each landmark as many pixels as a disk has, those with the highest heat, vote for the place that their offsets
    point at, each with its heat. The votes are counted in windows of 3 x 3 pixels; the landmark is the mean of the
    votes in the fullest window, weighted.

    Args:
        maps: the network's output, (B, 3L, H, W): heatmap logits, then y offsets, then x offsets in radii.
        radius: that the offsets are measured in, in pixels.

    Returns:
        points: (B, L, 2), each (x, y) in pixels.
        confidence: (B, L), the share of the votes' heat in the fullest window times the mean heat of all votes; 0 where
            no vote is for a place inside, so that the point means nothing.

    Example:
        >>> import torch
        >>> from adv_landmark import decode, encode
        >>> targets = encode(torch.tensor([[[3.25, 2.5]]]), size=(8, 8), radius=2)
        >>> offsets = [offset.expand_as(targets.disk) for offset in (targets.offset_y, targets.offset_x)]
        >>> points, confidence = decode(torch.cat([20 * targets.disk - 10, *offsets], 1), radius=2)
        >>> points.round(decimals=3)
        tensor([[[3.2500, 2.5000]]])
    """
    heat, offset_y, offset_x = split_maps(maps)
    height, width = heat.shape[-2:]
    voters = min(max(1, math.ceil(math.pi * radius**2)), height * width)
    weight, index = heat.sigmoid().flatten(2).topk(voters, -1)
    weight = weight.clamp_min(1e-12)  # where no pixel speaks for a landmark, all vote alike
    y = index // width + offset_y.flatten(2).gather(2, index) * radius
    x = index % width + offset_x.flatten(2).gather(2, index) * radius
    finite = y.isfinite() & x.isfinite()  # in half precision a network may overflow
    y, x = y.where(finite, -1.0 - height), x.where(finite, -1.0 - width)
    row, column = y.round().clamp(0, height - 1), x.round().clamp(0, width - 1)
    inside = (row - y).abs().maximum((column - x).abs()) <= 1  # a vote for a place outside does not count
    cell = (row * width + column).long()
    counted = torch.zeros_like(heat).flatten(2).scatter_add(2, cell, weight * inside).unflatten(2, (height, width))
    windows = functional.avg_pool2d(counted, 3, stride=1, padding=1)
    best = windows.flatten(2).argmax(2, keepdim=True)
    near = ((row - best // width).abs() <= 1) & ((column - best % width).abs() <= 1) & inside
    share = weight * near
    total = share.sum(2)
    points = torch.stack([(share * x).sum(2), (share * y).sum(2)], -1) / total.clamp_min(1e-12)[..., None]
    return points, total / voters
