"""Samples with stable ids, in the order that a resumed run goes on with."""

from __future__ import annotations

import hashlib
import math
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from advmed.copies import Sample, contents, digest, warnings_of_copies
from advmed.distributed import from_first_rank, patient, place
from advmed.integrations.lightning.images import check_files

SPLITS = ("train", "val", "test")
_GOLDEN = (math.sqrt(5) - 1) / 2


class Split(Protocol):
    """The samples of one split, as far as this module looks at them."""

    @property
    def ids(self) -> list[str]:
        """Their stable ids."""
        ...

    @property
    def images(self) -> Any:
        """Their images, one after the other: arrays, or the files that they are read from."""
        ...

    def __len__(self) -> int: ...


class SampleData(LightningDataModule):
    """Training, validation and test samples; a subclass fills ``splits`` and makes data sets of them.

    A batch is a dict with ``image`` (B, C, H, W), ``id`` and the host's targets.

    Args:
        batch_size: per process.
        workers: processes that read images.
        seed: of the order of images.
    """

    splits: Mapping[str, Split]

    def __init__(self, *, batch_size: int, workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self._generator = torch.Generator().manual_seed(seed)

    def setup(self, stage: str) -> None:
        """Before a training: the order begins anew, and every image is read once to see that it can be.

        Raises:
            ValueError: naming an image that cannot be read.
        """
        if stage == "fit":
            self._generator = torch.Generator().manual_seed(self.seed)
            images = [
                image for split in ("train", "val") if split in self.splits for image in self.splits[split].images
            ]
            files = [image for image in images if isinstance(image, Path)]
            with patient():  # one process may take longer than others
                check_files(files, self.workers, self._memory("images"))
                said = warnings_of_copies(self._samples()) if place()[0] == 0 else []
                for line in from_first_rank(said):
                    rank_zero_warn(line)

    def _memory(self, what: str) -> list[Path]:
        """Where it is remembered what was found in files: in the folder of this project's runs, if that is one."""
        root = getattr(self.trainer, "default_root_dir", None)
        if root is None or "://" in str(root):
            return []
        return [Path(root) / f".advmed_{what}.json"]

    def _samples(self) -> list[Sample]:
        """What is compared to find copies."""
        places = [(split, k) for split, samples in self.splits.items() for k in range(len(samples))]
        images = [self.splits[split].images[k] for split, k in places]
        files = [image for image in images if isinstance(image, Path)]
        known = iter(contents(files, self._memory("contents"), self.workers))
        found = [next(known) if isinstance(i, Path) else digest(np.ascontiguousarray(i)) for i in images]
        return [
            Sample(split, self.splits[split].ids[k], content, self.target(split, k))
            for (split, k), content in zip(places, found, strict=True)
        ]

    def target(self, split: str, index: int) -> Any:
        """The truth of a sample, of which repr tells others apart."""
        return None

    @abstractmethod
    def dataset(self, split: str, *, augment: bool = False) -> Dataset[dict[str, Any]]:
        """The samples of a split; call :meth:`require` first."""

    @abstractmethod
    def truth(self, split: str) -> list[Any]:
        """What the numbers of an evaluation depend on beside images and ids: arrays, or what repr tells apart."""

    def fingerprint(self, split: str) -> str:
        """Tells the truth of a split from others, so that numbers of two are not mixed in a resumed evaluation."""
        found = hashlib.sha256()
        for part in self.truth(split):
            found.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        return found.hexdigest()

    def order(self, generator: torch.Generator) -> Sampler[int] | None:
        """The order of training samples; None: every one once an epoch, shuffled."""
        return None

    def require(self, split: str) -> None:
        """Raises ValueError if there is no such split."""
        if split not in self.splits:
            raise ValueError(f"the data has no split {split!r}; there are {', '.join(self.splits)}")

    @property
    def train_ids(self) -> list[str]:
        """The ids of all training samples."""
        return self.splits["train"].ids

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Augmented training samples; made anew in the course of a training, their order goes on."""
        generator = self._generator
        sampler = self.order(generator)
        processes = self.trainer.world_size if self.trainer is not None else 1
        return DataLoader(
            self.dataset("train", augment=True),
            batch_size=self.batch_size,
            shuffle=sampler is None,
            sampler=sampler,
            generator=generator,
            drop_last=self._drops_last(math.ceil(len(self.splits["train"]) / processes)),
            **self._workers(),
        )

    def draws(self, split: str, least: int, most: int, seed: int) -> DataLoader[dict[str, Any]]:
        """Samples as a training draws them, the same ones for the same seed: for a look at a trained network.

        In the order of a training, those of the training with its augmentation. Neither the random state of the process
        nor the number of workers has a part in it.

        Args:
            split: of the data.
            least: as many whole epochs are drawn that there are so many samples.
            most: no more samples than these.
            seed: of order and augmentation.
        """
        training, generator = split == "train", torch.Generator().manual_seed(seed)
        dataset: Any = self.dataset(split, augment=training)
        indices: list[int] = []
        while len(indices) < min(least, most) or not indices:
            sampler = self.order(generator) if training else None
            epoch = torch.randperm(len(dataset), generator=generator).tolist() if sampler is None else list(sampler)
            indices += epoch
        drawn = Draws(dataset, indices[:most], seed)
        return DataLoader(
            drawn,
            batch_size=self.batch_size,
            generator=generator,
            drop_last=self._drops_last(len(drawn)),
            **self._workers(),
        )

    def _drops_last(self, count: int) -> bool:
        """Whether the last batch of so many samples of a process would have one image; BatchNorm needs two."""
        return count > self.batch_size > 1 == count % self.batch_size

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Validation samples, mixed: see :meth:`loader`."""
        return self.loader("val", mixed=True)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Test samples, mixed: see :meth:`loader`."""
        return self.loader("test", mixed=True)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Test samples where there are some, else validation samples, in their order."""
        return self.loader("test" if "test" in self.splits else "val")

    def loader(self, split: str, *, mixed: bool = False) -> DataLoader[dict[str, Any]]:
        """The samples of a split as they are, each once.

        Args:
            split: of the data.
            mixed: in an order, always the same, whose beginning is spread over the split, which is often sorted by
                class: where only some batches are looked at (``limit_val_batches``), they are like the whole.
                Otherwise in their own order.
        """
        samples = self.dataset(split)
        if mixed:
            # Multiples of the golden ratio are spread evenly, whether classes come one after the other or take turns.
            samples = Subset(samples, sorted(range(len(self.splits[split])), key=lambda k: k * _GOLDEN % 1))
        return DataLoader(samples, batch_size=self.batch_size, **self._workers())

    def state_dict(self) -> dict[str, Any]:
        """What makes a resumed run go on with the order, and in this process the augmentation, of the next epoch."""
        return {"order": self._generator.get_state(), "augmentation": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of an earlier run."""
        self._generator.set_state(state_dict["order"])
        torch.set_rng_state(state_dict["augmentation"])

    def _workers(self) -> dict[str, Any]:
        return {"num_workers": self.workers, "persistent_workers": self.workers > 0}


def check_distinct(splits: Mapping[str, Split], truth: Callable[[str, int], Any]) -> None:
    """Looks for samples that are there more than once; a warning where two splits have one with the same truth.

    Args:
        splits: the samples.
        truth: of a sample, by its split and index; of equal ones repr is the same.

    Raises:
        ValueError: for an id or a file that is twice in a split, or in two splits with another truth.
    """
    first: dict[Any, tuple[str, int]] = {}
    shared: list[str] = []
    for split, samples in splits.items():
        twice = [sample for sample, count in Counter(samples.ids).items() if count > 1]
        if twice:
            raise ValueError(f"{split} has the same image more than once, such as {', '.join(sorted(twice)[:3])}")
        for index, (sample, image) in enumerate(zip(samples.ids, samples.images, strict=True)):
            other, k = first.setdefault(_identity(sample, image), (split, index))
            if (other, k) == (split, index):
                continue
            name = splits[other].ids[k]
            if other == split:
                raise ValueError(
                    f"{split} has the same image more than once: {name} and {sample} are one file, {image}"
                )
            ours, theirs = truth(split, index), truth(other, k)
            if repr(ours) != repr(theirs):
                raise ValueError(
                    f"{name} of {other} and {sample} of {split} are one image with two truths: {theirs} and {ours}"
                )
            shared.append(f"{sample} of {split}, which is {name} of {other}")
    if shared:
        rank_zero_warn(
            f"{len(shared)} image(s) are in two splits, such as {shared[0]}: what is measured on them is no test"
        )


def _identity(sample: str, image: Any) -> Any:
    """What two samples have in common that are one: the file, by whatever name, or the id."""
    if not isinstance(image, Path):
        return sample
    found = image.stat()
    return found.st_dev, found.st_ino


class Draws(Dataset[dict[str, Any]]):
    """Samples of a data set in a given order, each with a random state of its own.

    Args:
        dataset: the samples, augmented or not.
        indices: which one is drawn first, second, and so on.
        seed: of what is random in a draw.
    """

    def __init__(self, dataset: Any, indices: list[int], seed: int) -> None:
        self.dataset, self.indices, self.seed = dataset, indices, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        with isolate_rng(include_cuda=False):
            seed = hash((self.seed, draw)) % 2**32
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for the GPUs, too
            np.random.seed(seed)
            random.seed(seed)
            sample: dict[str, Any] = self.dataset[self.indices[draw]]
            return sample
