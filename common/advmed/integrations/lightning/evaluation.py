"""What the evaluations of both Lightning hosts do alike: images in batches, and images as pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from advmed.cli.evaluate import EvaluationHost
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch
from advmed.evaluation.subjects import Subject, spread
from advmed.integrations.lightning.data import SampleData


class LightningEvaluation(EvaluationHost):
    """The evaluation of a Lightning host; a host adds what its models and metrics are.

    Args:
        given: the arguments of the command.
        checkpoints: of the models, by their names.
        data: the data.
        device: where the models are evaluated.
    """

    folder_per_norm: ClassVar[bool] = True

    def __init__(self, given: Any, checkpoints: Mapping[str, Path], data: Any, device: torch.device) -> None:
        self.given, self.checkpoints, self.device = given, checkpoints, device
        self.data: SampleData = data
        self.split: str = given.split

    @abstractmethod
    def load_model(self, name: str, path: Path) -> Any:
        """A model with its ``name``, ``path`` and ``margins``."""

    @abstractmethod
    def batches(self, model: Any, *limits: int | None) -> list[EvaluationBatch]:
        """The images of a model in batches, or some of them; see :func:`in_batches`."""

    @cached_property
    def models(self) -> list[Any]:
        """The models, loaded."""
        return [self.load_model(name, path) for name, path in self.checkpoints.items()]

    @cached_property
    def subjects(self) -> list[Subject]:
        """See :attr:`EvaluationHost.subjects`."""
        samples = self.given.samples
        return [
            Subject(m.name, m.path, self.batches(m, samples), m.margins, partial(self.batches, m, samples))
            for m in self.models
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`EvaluationHost.settings`."""
        images = sum(len(batch.ids) for batch in self.subjects[0].batches)
        return {
            "data": type(self.data).__name__,
            "split": f"{self.split}, {images} images",
            **self.own_settings,
            "checkpoints": {name: "/".join(path.parts[-4:]) for name, path in self.checkpoints.items()},
        }

    @property
    def own_settings(self) -> dict[str, Any]:
        """What a reader should know of this host alone."""
        return {}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See :attr:`EvaluationHost.fingerprint`."""
        return {"split": self.split, "truth": self.data.fingerprint(self.split)}


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
