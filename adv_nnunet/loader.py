"""Where sample ids come from: nnU-Net's own data loader, which also says which slice or patch it cut.

A margin belongs to a sample that comes back. nnU-Net draws random crops, augments them, and reports the case only:

- 2D: a slice is what the paper calls a sample, and slices of one case differ as much as cases do; so case and slice.
- 3D: a patch of random position never comes back exactly, while most patches of a case show the same structures; so
  the case, its patches with foreground and those without apart: background bears noise of any size, and would decide
  about a margin that both share. Where cases are much larger than patches, ``cell`` is finer: case and the cell, of a
  grid as fine as the patch, that the patch's centre lies in.

The random crop within a slice and the augmentation share their sample's margin.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

from adv_nnunet.data import OUTSIDE

_HOST_NAME = "nnUNetDataLoader"
_WORKERS = "NonDetMultiThreadedAugmenter"


class SliceLoader(nnUNetDataLoader):
    """Adds ``ids`` to every batch: ``case:slice``, the slice's index in the preprocessed case."""

    def get_bbox(self, *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        """Called by the host once per sample, in the order of the batch."""
        low, high = super().get_bbox(*args, **kwargs)
        self._corners.append(low)
        return low, high

    def generate_train_batch(self) -> dict[str, Any]:
        """The host's batch, with ``ids``."""
        self._corners: list[list[int]] = []
        batch: dict[str, Any] = super().generate_train_batch()
        batch["ids"] = [self._id(case, corner) for case, corner in zip(batch["keys"], self._corners, strict=True)]
        return batch

    def _id(self, case: str, corner: list[int]) -> str:
        return f"{case}:{corner[0]}"


BACKGROUND = ":background"
"""How the id of a patch without foreground ends."""


def has_foreground(target: Tensor | Sequence[Tensor], ignore: int | None) -> list[bool]:
    """For each sample of a batch, whether there is a structure in it.

    Args:
        target: the host's, (B, 1, *spatial) or with a channel for each region (and one for what is to be ignored); or a
            list of them, the finest first.
        ignore: the label to ignore, if there is one.
    """
    finest = target if isinstance(target, Tensor) else target[0]
    if finest.shape[1] > 1:
        foreground = (finest if ignore is None else finest[:, :-1]) > 0
    else:
        foreground = finest > 0
        if ignore is not None:
            foreground = foreground & (finest != ignore)
    found: list[bool] = foreground.flatten(1).any(1).tolist()
    return found


class PartLoader(nnUNetDataLoader):
    """Adds ``ids`` to every batch: ``case:foreground`` or ``case:background``, as the patch holds foreground or not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ignore = (kwargs["label_manager"] if "label_manager" in kwargs else args[4]).ignore_label

    def generate_train_batch(self) -> dict[str, Any]:
        """The host's batch, with ``ids``."""
        batch: dict[str, Any] = super().generate_train_batch()
        found = has_foreground(batch["target"], self._ignore if self.has_ignore else None)
        parts = ["foreground" if some else "background" for some in found]
        batch["ids"] = [f"{case}:{part}" for case, part in zip(batch["keys"], parts, strict=True)]
        return batch


class CellLoader(SliceLoader):
    """Adds ``ids`` to every batch: ``case:i,j,k``, the grid cell (as large as the patch) of the patch's centre."""

    def _id(self, case: str, corner: list[int]) -> str:
        # The loader's patch may be larger than the network's, with room for rotations; the centre is the same.
        centre = np.asarray(corner) + np.asarray(self.patch_size) // 2
        cell = np.maximum(centre, 0) // np.asarray(self.final_patch_size)
        return f"{case}:{','.join(str(int(i)) for i in cell)}"


def with_loader(
    get_dataloaders: MethodType, loader: type[nnUNetDataLoader] | None = None, seed: int | None = None
) -> Any:
    """Runs a trainer's own ``get_dataloaders`` with a loader of ours in the place of nnU-Net's, and seeded workers.

    nnU-Net has no hook for either: ``get_dataloaders`` looks both classes up as global names of its module. The method
    is run with a namespace in which these names mean ours; the host's module and method stay as they are, and whatever
    else a release does in there still happens.

    Args:
        get_dataloaders: the bound method.
        loader: in the place of nnUNetDataLoader; None: the host's.
        seed: of the workers that make batches, or of this process where there are none; None: as the host has it.

    Raises:
        RuntimeError: if there is a loader and the method does not use the host's name: then ids are not to be had.
    """
    function = cast(FunctionType, get_dataloaders.__func__)
    if loader is not None and _HOST_NAME not in function.__code__.co_names:
        raise RuntimeError(
            f"{function.__qualname__} does not build its loaders from {_HOST_NAME}, so the slices of a batch are not "
            f"known. Set 'sample_id: case' in adversarial.yaml, which needs no change of the loader."
        )
    namespace = dict(function.__globals__)
    if loader is not None:
        namespace[_HOST_NAME] = loader
    if seed is not None:
        np.random.seed(seed % 2**32)
        random.seed(seed)
        torch.manual_seed(seed)
        if _WORKERS in namespace:
            namespace[_WORKERS] = partial(_seeded, namespace[_WORKERS], seed)
    rebound = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    rebound.__kwdefaults__ = function.__kwdefaults__
    return rebound(get_dataloaders.__self__)


def _seeded(workers: Callable[..., Any], seed: int, *args: Any, **kwargs: Any) -> Any:
    """The host's workers, each with a seed of its own."""
    seeds = [(seed + number) % 2**32 for number in range(kwargs["num_processes"])]
    return workers(*args, **{**kwargs, "seeds": seeds})


def without_measuring(transforms: Any) -> Any:
    """Transforms that choose no algorithm by measuring which is faster, so that two runs compute the same."""
    for inner in (*getattr(transforms, "transforms", ()), getattr(transforms, "transform", None)):
        if inner is not None:
            without_measuring(inner)
    if hasattr(transforms, "benchmark"):
        transforms.benchmark = False
    return transforms


def slice_ids(cases: Iterable[tuple[str, int]]) -> list[str]:
    """Every id that :class:`SliceLoader` can give, from (case, number of slices) pairs."""
    return [f"{case}:{index}" for case, slices in cases for index in range(slices)]


def drawn_slices(cases: Mapping[str, Sequence[Any]], label_manager: Any) -> list[str]:
    """The ids of slices that the host draws where there is an ignore label: those with a voxel it can centre on.

    Args:
        cases: as the host's data set loads them, the properties last.
        label_manager: the host's.
    """
    annotated = tuple([OUTSIDE, *label_manager.all_labels])
    drawn = []
    for case, (image, *_, properties) in cases.items():
        places = properties["class_locations"]
        slices = {int(voxel[1]) for kind in places if len(places[kind]) for voxel in places[kind]}
        if not len(places.get(annotated, ())):  # the host draws any then
            slices = set(range(image.shape[1]))
        drawn += [f"{case}:{index}" for index in sorted(slices)]
    return drawn


def case_of(sample: str) -> str:
    """The case that a sample id belongs to."""
    return sample.rsplit(":", 1)[0] if ":" in sample else sample
