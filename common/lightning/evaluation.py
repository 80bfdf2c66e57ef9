"""What the evaluations of both Lightning hosts do alike: images in batches, and images as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.evaluation import EvaluationBatch, LoadedBatch


def in_batches(
    ids: Sequence[str], size: int, load: Callable[[Sequence[int]], LoadedBatch], limit: int | None = None
) -> list[EvaluationBatch]:
    """Samples in batches of ``size``, or ``limit`` of them at even distances; ``load`` is given their indices."""
    chosen = list(range(len(ids)))
    if limit is not None and limit < len(chosen):
        chosen = [int(i) for i in np.linspace(0, len(chosen) - 1, limit)]
    parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    return [EvaluationBatch([ids[i] for i in part], partial(load, part)) for part in parts]


def picture(images: Tensor) -> NDArray[Any]:
    """The first image of (B, C, H, W), as (H, W) or (H, W, 3)."""
    image: NDArray[Any] = images[0].permute(1, 2, 0).cpu().numpy()
    return image[..., 0] if image.shape[2] == 1 else image
