"""Maps against what each pixel says in float64; landmarks out of their maps again, whatever else the maps hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adv_landmark.maps import Targets, decode, encode, split_maps

SURE = 14.0
"""A logit that leaves no doubt: 8e-7 the other way."""


MAPS = ("disk", "gaussian", "offset_y", "offset_x")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scattered(batch: int, landmarks: int, size: tuple[int, int], seed: int = 0, edge: float = 0.49) -> Tensor:
    """Points anywhere in the image, up to ``edge`` beyond the centres of its outermost pixels, (B, L, 2), float64."""
    span = torch.tensor((size[1], size[0]), dtype=torch.float64) - 1 + 2 * edge
    return torch.rand(batch, landmarks, 2, generator=generator(seed), dtype=torch.float64) * span - edge


def perfect(points: Tensor, size: tuple[int, int], radius: float) -> Tensor:
    """The maps of a network without error, (B, 3L, H, W); outside the disks the offsets are noise."""
    targets = encode(points, size, radius)
    wild = torch.randn(2, *targets.disk.shape, generator=generator(9), dtype=points.dtype) * 3
    inside = targets.disk > 0
    offsets = [torch.where(inside, o, w) for o, w in zip((targets.offset_y, targets.offset_x), wild, strict=True)]
    return torch.cat([(targets.disk * 2 - 1) * SURE, *offsets], 1)


# Landmarks to maps


@pytest.mark.parametrize(("size", "radius"), [((13, 9), 1.0), ((7, 16), 2.5), ((20, 17), 4.0), ((6, 6), 11.0)])
def test_maps_are_what_each_pixel_says(size: tuple[int, int], radius: float) -> None:
    """Of landmarks that are known and lie in the image, up to its very edge; the others have no maps."""
    below, right = (side - 0.5 for side in size)
    points = scattered(2, 11, size, seed=1)
    points[1, 2:] = torch.tensor(
        [
            *((-0.501, 3.0), (3.0, -0.501), (right + 0.001, 3.0), (3.0, below + 0.001), (200.0, 3.0)),
            *((math.nan, 3.0), (3.0, math.nan), (math.inf, 3.0), (3.0, -math.inf)),
        ]
    )
    points[1, :2] = torch.tensor([(-0.5, -0.5), (right, below)])
    present = torch.ones(2, 11, dtype=torch.bool)
    present[1, 2:] = False
    targets = encode(points, size, radius)
    assert torch.equal(targets.present, present)
    assert targets.offset_y.shape == (2, 11, size[0], 1)
    assert targets.offset_x.shape == (2, 11, 1, size[1])
    rows, columns = np.mgrid[: size[0], : size[1]]
    for b, k in np.ndindex(2, 11):
        if not present[b, k]:
            assert not targets.disk[b, k].any()
            assert not targets.gaussian[b, k].any()
            continue
        x, y = points[b, k].tolist()
        squared = (columns - x) ** 2 + (rows - y) ** 2
        disk = np.sqrt(squared) <= radius
        np.testing.assert_array_equal(targets.disk[b, k], disk)
        gaussian = np.where(disk, np.exp(-squared / (2 * radius**2)), 0)
        np.testing.assert_allclose(targets.gaussian[b, k], gaussian, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(targets.offset_y[b, k, :, 0], (y - rows[:, 0]) / radius, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(targets.offset_x[b, k, 0], (x - columns[0]) / radius, rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.float64):
        made: Targets = encode(points.to(dtype), size, radius)
        for name in MAPS:
            assert getattr(made, name).dtype == dtype, name
            assert getattr(made, name).isfinite().all(), name


def test_there_may_be_no_images_and_no_landmarks() -> None:
    assert encode(torch.zeros(0, 3, 2), (5, 4), 2.0).disk.shape == (0, 3, 5, 4)
    assert encode(torch.zeros(2, 0, 2), (5, 4), 2.0).present.shape == (2, 0)


# The network's output in three


def test_the_output_is_heat_then_y_then_x_without_copies() -> None:
    maps = torch.arange(2 * 6 * 3 * 4, dtype=torch.float32).reshape(2, 6, 3, 4)
    parts = split_maps(maps)
    for k, part in enumerate(parts):
        assert torch.equal(part, maps[:, 2 * k : 2 * k + 2])
        assert part.untyped_storage().data_ptr() == maps.untyped_storage().data_ptr()
    assert {part.dtype for part in split_maps(maps.bfloat16())} == {torch.float32}
    assert {part.dtype for part in split_maps(maps.double())} == {torch.float64}


# Maps to landmarks


@pytest.mark.parametrize("radius", [1.0, 1.7, 3.0, 6.5, 12.0])
@pytest.mark.parametrize("size", [(40, 56), (61, 33), (32, 32)])
def test_what_is_encoded_is_decoded(size: tuple[int, int], radius: float) -> None:
    """Anywhere, near the border too, where a disk is not whole."""
    points = scattered(6, 5, size, seed=int(10 * radius))
    corners = [(-0.45, -0.45), (size[1] - 0.55, -0.4), (-0.4, size[0] - 0.6), (size[1] - 0.6, size[0] - 0.55)]
    points[0, :4] = torch.tensor(corners, dtype=torch.float64)
    points[0, 4] = torch.tensor((size[1] - 1.0, 0.0))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        half = dtype.itemsize == 2
        maps = perfect(points, size, radius).to(dtype)
        found, confidence = decode(maps, radius)
        assert found.shape == (6, 5, 2)
        assert found.dtype == confidence.dtype == (torch.float32 if half else dtype)
        assert (found - points).norm(dim=-1).max() < (0.1 if half else 0.01)
        assert ((confidence > 0) & (confidence <= 1)).all()
        assert not half or all(map(torch.equal, (found, confidence), decode(maps.float(), radius)))


def slow(heat: np.ndarray, dy: np.ndarray, dx: np.ndarray, radius: float) -> tuple[tuple[float, float], float]:
    """One landmark by the words of :func:`decode`, in float64."""
    height, width = heat.shape
    count = min(math.ceil(math.pi * radius * radius), height * width)
    pixels = sorted(((r, c) for r in range(height) for c in range(width)), key=lambda p: -heat[p])[:count]
    votes = []
    for row, column in pixels:
        y, x = row + dy[row, column] * radius, column + dx[row, column] * radius
        weight = max(1 / (1 + math.exp(-heat[row, column])), 1e-12)
        cell = (min(max(round(y), 0), height - 1), min(max(round(x), 0), width - 1))
        if abs(cell[0] - y) <= 1 and abs(cell[1] - x) <= 1:
            votes.append((weight, y, x, cell))
    fullest: list[tuple[float, float, float, Any]] = []
    for row in range(height):
        for column in range(width):
            window = [v for v in votes if abs(v[3][0] - row) <= 1 and abs(v[3][1] - column) <= 1]
            if sum(v[0] for v in window) > sum(v[0] for v in fullest) * (1 + 1e-9):
                fullest = window
    total = sum(v[0] for v in fullest)
    point = (sum(v[0] * v[2] for v in fullest) / total, sum(v[0] * v[1] for v in fullest) / total)
    return point, total / count


@pytest.mark.parametrize(
    ("size", "radius", "spread"), [((9, 13), 2.0, 1.5), ((14, 8), 1.2, 2.0), ((11, 11), 3.3, 1.0), ((3, 4), 5.0, 0.3)]
)
def test_random_maps_are_decoded_as_the_slow_reference_does(
    size: tuple[int, int], radius: float, spread: float
) -> None:
    """Votes go everywhere, outside too, and the windows that win are full of different ones; each landmark and image
    by itself.
    """
    maps = torch.randn(4, 9, *size, generator=generator(5), dtype=torch.float64)
    maps[:, :3] *= 2
    maps[:, 3:] *= spread
    reach = torch.arange(size[0])[:, None] + maps[:, 3:6] * radius
    assert ((reach < -1) | (reach > size[0])).double().mean() < 0.7
    before = maps.clone()
    found, confidence = decode(maps, radius)
    assert torch.equal(maps, before)
    for b in range(4):
        for k in range(3):
            point, sure = slow(*(maps[b, k + 3 * part].numpy() for part in range(3)), radius)
            assert found[b, k].tolist() == pytest.approx(point, abs=1e-9)
            assert confidence[b, k].item() == pytest.approx(sure, rel=1e-9)


LOGITS = (0.0, -40.0, -1e4, -math.inf, 1e4, math.inf)


@pytest.mark.parametrize(
    ("heat", "offset"), [*((heat, 0.0) for heat in LOGITS), *((0.0, far) for far in (50.0, -50.0, 1e30))]
)
def test_maps_without_a_landmark_do_not_end_the_run(heat: float, offset: float) -> None:
    """Heat that is equal everywhere is a finite place inside, and votes that are all outside are not trusted."""
    for size in ((9, 7), (1, 1), (2, 30)):
        maps = torch.full((2, 6, *size), offset)
        maps[:, :2] = heat
        points, confidence = decode(maps, 2.0)
        assert points.isfinite().all()
        assert ((points >= 0) & (points <= torch.tensor((size[1] - 1.0, size[0] - 1.0)))).all()
        assert ((confidence >= 0) & (confidence <= 1)).all()
        assert offset == 0 or (confidence == 0).all()
        diverged = decode(torch.full_like(maps, math.nan), 2.0)  # on a GPU, an index out of its range ends the process
        assert [part.shape for part in diverged] == [(2, 2, 2), (2, 2)]


def test_where_no_pixel_speaks_all_vote_alike() -> None:
    points = torch.tensor([[[6.25, 3.5]]])
    targets = encode(points, (9, 12), 2.0)
    offsets = [offset.expand(1, 1, 9, 12) for offset in (targets.offset_y, targets.offset_x)]
    found, confidence = decode(torch.cat([torch.full((1, 1, 9, 12), -1e5), *offsets], 1), 2.0)
    torch.testing.assert_close(found, points, rtol=0, atol=1e-4)
    assert confidence.item() < 1e-10


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_vote_for_no_place_at_all_does_not_count(value: float) -> None:
    """As of a network in half precision that overflows: it must neither end the run nor move the landmark."""
    truth = torch.tensor([[[12.3, 7.6]]], dtype=torch.float64)
    for channel in (1, 2):
        maps = perfect(truth, (20, 24), 3.0)
        maps[0, channel, 8, 12] = value
        found, _ = decode(maps, 3.0)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)
