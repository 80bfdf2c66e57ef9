"""Files of images: what they are, and their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_UNREADABLE = (OSError, ImportError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Pillow's plugins fail each in its own manner."""
_GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L", "F")


def open_image(path: Path) -> Image.Image:
    """The decoded file.

    Raises:
        ValueError: if it cannot be read as an image.
    """
    try:
        opened = Image.open(path)
        opened.load()
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return opened


def read_image(path: Path, channels: int) -> Tensor:
    """The pixels, (C, H, W): uint8, or, of an image of 16 bits, float32 in [0, 1].

    Args:
        path: the file.
        channels: 1 or 3; others are converted.

    Raises:
        ValueError: if it cannot be read as an image, or has pixels whose range is not known.
    """
    with open_image(path) as opened:
        if opened.mode == "F":
            raise ValueError(f"{path} has floating-point pixels, whose range is not known: save it with 8 or 16 bits")
        if opened.mode.startswith("I"):
            grey = torch.from_numpy(np.array(opened).astype(np.float32) / 65535).clamp(0, 1)
            return grey[None].expand(channels, -1, -1)
        array = np.array(opened.convert("L" if channels == 1 else "RGB"))
    pixels = torch.from_numpy(array)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image; only its header is read.

    Raises:
        ValueError: if it cannot be read as an image.
    """
    try:
        with Image.open(path) as opened:
            return opened.height, opened.width
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def count_channels(path: Path) -> int:
    """1 for a grey image, 3 for colour."""
    with Image.open(path) as opened:
        return 1 if opened.mode in _GREY else 3
