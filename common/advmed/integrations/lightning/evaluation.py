"""What the evaluations of both Lightning hosts do alike: images in batches, and images as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from advmed.evaluation.loop import EvaluationBatch, LoadedBatch
from advmed.evaluation.subjects import spread


def in_batches(
    ids: Sequence[str], size: int, load: Callable[[Sequence[int]], LoadedBatch], *limits: int | None
) -> list[EvaluationBatch]:
    """Samples in batches of ``size``; ``load`` is given their indices.

    Of all samples the first limit takes as many, at even distances; of those the next, and so on; None takes all.
    """
    chosen = list(range(len(ids)))
    for limit in limits:
        chosen = chosen if limit is None else spread(chosen, limit)
    parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    return [EvaluationBatch([ids[i] for i in part], partial(load, part)) for part in parts]


def picture(images: Tensor) -> NDArray[Any]:
    """The first image of (B, C, H, W), as (H, W) or (H, W, 3)."""
    image: NDArray[Any] = images[0].permute(1, 2, 0).cpu().numpy()
    return image[..., 0] if image.shape[2] == 1 else image
