"""Images with labels and stable ids: HAM10000's layout, MedMNIST's ``.npz``, folders of images.

Every data set is read into one table (:class:`Samples`) and checked before anything is trained; the images are decoded
when they are needed. A batch is a dict of ``image`` (B, C, H, W) in [0, 1], ``label`` (B,) and ``id``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor
from torch.utils.data import Dataset, WeightedRandomSampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from advmed.integrations.lightning import SampleData
from advmed.integrations.lightning.data import SPLITS
from advmed.integrations.lightning.images import SUFFIXES, count_channels, image_size, read_image
from advmed.integrations.lightning.tables import read_table


@dataclass(frozen=True)
class Samples:
    """The samples of one split.

    Attributes:
        images: uint8 arrays (H, W) or (H, W, 3), in one array (N, ...), or N files.
        labels: class numbers, (N,), int64.
        ids: N stable ids.
    """

    images: np.ndarray | Sequence[Path]
    labels: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


class ImageDataset(Dataset[dict[str, Any]]):
    """Decodes the images of :class:`Samples`.

    Args:
        samples: the samples.
        channels: 1 or 3; images are converted.
        size: (height, width) that images are resized to, or None.
        transform: of an image (C, H, W) in [0, 1], or None.
    """

    def __init__(
        self,
        samples: Samples,
        channels: int,
        size: tuple[int, int] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.samples, self.channels, self.size, self.transform = samples, channels, size, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._image(index)
        if self.size is not None and tuple(image.shape[1:]) != self.size:
            image = functional.resize(image, list(self.size), antialias=True)
        image = functional.to_dtype(image, torch.float32, scale=True)
        if self.transform is not None:
            image = self.transform(image).clamp(0, 1)
        return {"image": image, "label": int(self.samples.labels[index]), "id": self.samples.ids[index]}

    def _image(self, index: int) -> Tensor:
        image = self.samples.images[index]
        if isinstance(image, Path):
            return read_image(image, self.channels)
        tensor = torch.from_numpy(np.array(image, copy=True))
        tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
        if len(tensor) > self.channels:
            return functional.rgb_to_grayscale(tensor)
        return tensor.expand(3, -1, -1) if len(tensor) < self.channels else tensor


class ClassificationData(SampleData):
    """Training, validation and test images; a subclass reads them.

    Args:
        batch_size: per process.
        size: side, or (height, width), that images are resized to; None: as they are, all alike.
        channels: 1 or 3; None: as the images are.
        flip: probability of a horizontal and of a vertical flip in training.
        rotate: degrees; training images are rotated by up to as many.
        zoom: training images are scaled by up to this fraction, up or down.
        color: strength of the changes of brightness and contrast (and saturation) in training.
        transform: augmentation of training images instead of the four above: any transform of an image (C, H, W) in
            [0, 1], such as those of torchvision.transforms.v2.
        sampler: "shuffle" draws every image once an epoch; "balanced" draws every class equally often.
        workers: processes that read images.
        seed: of the order of images.

    Example:
        >>> import numpy as np
        >>> from adv_classify import ClassificationData
        >>> from adv_classify.data import Samples
        >>> class Blank(ClassificationData):
        ...     def read(self):
        ...         split = Samples(np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 1, 1]), ["a", "b", "c", "d"])
        ...         return ["benign", "malignant"], {"train": split, "val": split}
        >>> data = Blank(batch_size=2)
        >>> data.class_counts, data.dataset("val")[0]["image"].shape
        ([1, 3], torch.Size([1, 8, 8]))
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        flip: float = 0.5,
        rotate: float = 0.0,
        zoom: float = 0.0,
        color: float = 0.0,
        transform: Callable[[Tensor], Any] | None = None,  # with Tensor, jsonargparse would ask for a maker of tensors
        sampler: Literal["shuffle", "balanced"] = "shuffle",
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, seed=seed)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        self.sampler = sampler
        self.size = (size, size) if isinstance(size, int) else None if size is None else (int(size[0]), int(size[1]))
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        self.transform = transform or augmentation(flip, rotate, zoom, color)
        self.splits: dict[str, Samples]
        self.class_names, self.splits = self.read()
        check_samples(self.splits, self.class_names, self.size)
        self.channels = channels or channels_of(self.splits["train"])

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """The names of the classes and the samples of each split; called once, before anything else."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def class_counts(self) -> list[int]:
        """Number of training images of each class."""
        return np.bincount(self.splits["train"].labels, minlength=self.num_classes).tolist()

    def dataset(self, split: str, *, augment: bool = False) -> ImageDataset:
        """The images of a split.

        Raises:
            ValueError: if there is no such split.
        """
        self.require(split)
        return ImageDataset(self.splits[split], self.channels, self.size, self.transform if augment else None)

    def truth(self, split: str) -> list[Any]:
        """See :meth:`SampleData.truth`."""
        self.require(split)
        return [self.splits[split].labels, self.size, self.channels]

    def order(self, generator: torch.Generator) -> WeightedRandomSampler | None:
        """See :meth:`SampleData.order`."""
        if self.sampler != "balanced":
            return None
        labels, counts = self.splits["train"].labels, np.array(self.class_counts)
        return WeightedRandomSampler((1 / counts[labels]).tolist(), len(labels), generator=generator)


class ImageTable(ClassificationData):
    r"""A table of images, as HAM10000 has it: ``labels.csv`` with the columns image, label and split, and a folder.

    Args:
        root: folder with ``labels.csv``.
        images: folder of the images, relative to root; files are found with and without the suffix in the table.
        table: name of the table. ``label`` holds numbers from 0, or names; a column ``dx`` or ``name`` beside numbers
            names the classes.
        classes: the names of the classes in their order, where ``label`` holds names; None: sorted.
        **options: see :class:`ClassificationData`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from adv_classify import ImageTable
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "images").mkdir()
        ...     for name in "abc":
        ...         Image.new("RGB", (8, 6)).save(Path(root, "images", f"{name}.png"))
        ...     table = "image,label,split\na,nevus,train\nb,melanoma,train\nc,nevus,val\n"
        ...     _ = Path(root, "labels.csv").write_text(table)
        ...     data = ImageTable(root)
        >>> data.class_names, data.splits["val"].ids
        (['melanoma', 'nevus'], ['c'])
    """

    def __init__(
        self,
        root: str,
        *,
        images: str = "images",
        table: str = "labels.csv",
        classes: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self.root, self.images, self.table, self.classes = Path(root), images, table, classes
        super().__init__(**options)

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """See :meth:`ClassificationData.read`."""
        path = self.root / self.table
        rows = read_table(path, ("image", "label", "split"))
        short = [i for i, row in enumerate(rows, 2) if not (row["image"] and row["label"])]
        if short:
            raise ValueError(f"{path} has no image or label in line(s) {', '.join(map(str, short))}")
        names, labels = self._labels(path, rows)
        files = self._files([row["image"] for row in rows])
        splits = {}
        for split in SPLITS:
            chosen = [i for i, row in enumerate(rows) if row["split"] == split]
            if chosen:
                paths = [files[i] for i in chosen]
                ids = [rows[i]["image"] for i in chosen]
                splits[split] = Samples(paths, np.array([labels[i] for i in chosen], dtype=np.int64), ids)
        strangers = sorted({row["split"] for row in rows} - set(SPLITS))
        if strangers:
            raise ValueError(
                f"{path} has the split(s) {', '.join(map(repr, strangers))}; they must be train, val, test"
            )
        return names, splits

    def _labels(self, path: Path, rows: list[dict[str, str]]) -> tuple[list[str], list[int]]:
        texts = [row["label"] for row in rows]
        if not all(text.lstrip("-").isdigit() for text in texts):
            names = list(self.classes or sorted(set(texts)))
            unknown = sorted(set(texts) - set(names))
            if unknown:
                raise ValueError(f"{path} has label(s) {', '.join(unknown)} that are not among classes {names}")
            return names, [names.index(text) for text in texts]
        labels = [int(text) for text in texts]
        if self.classes:
            return list(self.classes), labels
        count = max(labels) + 1
        names = [str(k) for k in range(count)]
        if naming := next((name for name in ("name", "dx") if name in rows[0]), None):
            for row, label in zip(rows, labels, strict=True):
                if 0 <= label < count:
                    names[label] = row[naming]
        return names, labels

    def _files(self, names: Sequence[str]) -> list[Path]:
        folder = self.root / self.images
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder of images {folder}")
        found = {path.name: path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
        stems = {path.stem: path for path in found.values()}
        files = [found.get(name) or stems.get(name) for name in names]
        missing = [name for name, file in zip(names, files, strict=True) if file is None]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} images of the table are not in {folder}: {', '.join(missing)}"
            )
        return [file for file in files if file is not None]


class MedMNIST(ClassificationData):
    """A ``.npz`` file of MedMNIST (Yang et al. 2023): ``train_images``, ``train_labels``, and so on.

    Args:
        file: the file.
        classes: the names of the classes; None: their numbers.
        **options: see :class:`ClassificationData`.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from adv_classify import MedMNIST
        >>> images, labels = np.zeros((2, 28, 28), np.uint8), np.array([[0], [1]])
        >>> with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        ...     np.savez(file.name, train_images=images, train_labels=labels, val_images=images, val_labels=labels)
        ...     data = MedMNIST(file.name, classes=["normal", "pneumonia"])
        >>> data.class_counts, data.splits["val"].ids
        ([1, 1], ['val/000000', 'val/000001'])
    """

    def __init__(self, file: str, *, classes: Sequence[str] | None = None, **options: Any) -> None:
        self.file, self.classes = Path(file), classes
        super().__init__(**options)

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """See :meth:`ClassificationData.read`."""
        if not self.file.is_file():
            raise FileNotFoundError(f"there is no file {self.file}")
        try:
            archive = np.load(self.file)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise ValueError(f"{self.file} is no .npz file: {error}") from error
        if not isinstance(archive, NpzFile):
            raise ValueError(f"{self.file} is no .npz file, but one array")
        with archive:
            keys = [f"{split}_{part}" for split in ("train", "val") for part in ("images", "labels")]
            lacking = [key for key in keys if key not in archive.files]
            if lacking:
                raise ValueError(
                    f"{self.file} is no MedMNIST file: it has no {', '.join(lacking)}; there are "
                    f"{', '.join(archive.files)}"
                )
            splits = {}
            for split in SPLITS:
                if f"{split}_images" in archive.files:
                    images, labels = archive[f"{split}_images"], np.asarray(archive[f"{split}_labels"])
                    if labels.ndim == 2 and labels.shape[1] != 1:
                        raise ValueError(
                            f"{self.file} is a multi-label set ({labels.shape[1]} labels an image); one label is needed"
                        )
                    if images.ndim not in (3, 4) or images.dtype != np.uint8:
                        raise ValueError(
                            f"{split}_images of {self.file} must be uint8 of shape (N, H, W) or (N, H, W, 3), got "
                            f"{images.dtype} of shape {images.shape} (volumes are not supported)"
                        )
                    if len(images) != len(labels):
                        raise ValueError(f"{self.file} has {len(images)} {split}_images and {len(labels)} labels")
                    ids = [f"{split}/{i:06d}" for i in range(len(images))]
                    splits[split] = Samples(images, labels.reshape(-1).astype(np.int64), ids)
        count = max((int(part.labels.max()) for part in splits.values() if len(part)), default=-1) + 1
        return list(self.classes or map(str, range(count))), splits


class ImageFolder(ClassificationData):
    """Folders of images: ``root/train/CLASS/*.png``, and so for val and test.

    Args:
        root: the folder.
        **options: see :class:`ClassificationData`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from adv_classify import ImageFolder
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("train/benign", "train/malignant", "val/benign"):
        ...         Path(root, name).mkdir(parents=True)
        ...         Image.new("L", (8, 8)).save(Path(root, name, "1.png"))
        ...     data = ImageFolder(root)
        >>> data.class_names, data.channels
        (['benign', 'malignant'], 1)
    """

    def __init__(self, root: str, **options: Any) -> None:
        self.root = Path(root)
        super().__init__(**options)

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """See :meth:`ClassificationData.read`."""
        for split in ("train", "val"):
            if not (self.root / split).is_dir():
                raise FileNotFoundError(
                    f"there is no folder {self.root / split}; images are expected in {self.root}/train/CLASS and "
                    f"{self.root}/val/CLASS"
                )
        names = sorted(path.name for path in (self.root / "train").iterdir() if path.is_dir())
        splits = {}
        for split in SPLITS:
            if not (self.root / split).is_dir():
                continue
            strangers = sorted(p.name for p in (self.root / split).iterdir() if p.is_dir() and p.name not in names)
            if strangers:
                raise ValueError(f"{self.root / split} has class(es) that train has not: {', '.join(strangers)}")
            files = [
                (path, label)
                for label, name in enumerate(names)
                for path in sorted((self.root / split / name).rglob("*"))
                if path.suffix.lower() in SUFFIXES
            ]
            ids = [path.relative_to(self.root).as_posix() for path, _ in files]
            labels = np.array([label for _, label in files], dtype=np.int64)
            splits[split] = Samples([path for path, _ in files], labels, ids)
        return names, splits


def augmentation(flip: float, rotate: float, zoom: float, color: float) -> Callable[[Tensor], Tensor] | None:
    """Augmentation of training images; None where all are 0.

    Raises:
        ValueError: for a value out of its range.
    """
    for name, value, most in (("flip", flip, 1), ("rotate", rotate, 180), ("zoom", zoom, 0.9), ("color", color, 1)):
        if not (math.isfinite(value) and 0 <= value <= most):
            raise ValueError(f"{name} must be between 0 and {most}, got {value}")
    steps: list[Callable[[Tensor], Tensor]] = []
    if flip:
        steps += [v2.RandomHorizontalFlip(flip), v2.RandomVerticalFlip(flip)]
    if rotate or zoom:
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandomAffine(rotate, scale=(1 - zoom, 1 + zoom) if zoom else None, interpolation=bilinear))
    if color:
        steps.append(v2.ColorJitter(brightness=color, contrast=color, saturation=color))
    return v2.Compose(steps) if steps else None


def check_samples(splits: dict[str, Samples], names: Sequence[str], size: tuple[int, int] | None) -> None:
    """Raises ValueError for a split without images, labels out of range, a class that is never seen in training, ids
    that occur twice, or images of several sizes without a size to resize them to.
    """
    for split in ("train", "val"):
        if not len(splits.get(split, ())):
            raise ValueError(f"the data has no {split} images")
    for split, samples in splits.items():
        wrong = sorted({int(label) for label in samples.labels if not 0 <= label < len(names)})
        if wrong:
            raise ValueError(f"{split} has label(s) {wrong}, but there are {len(names)} classes, 0 to {len(names) - 1}")
        if len(set(samples.ids)) < len(samples):
            twice = sorted({i for i in samples.ids if samples.ids.count(i) > 1})[:3]
            raise ValueError(f"{split} has the same image more than once, such as {', '.join(twice)}")
    absent = [names[k] for k in range(len(names)) if not (splits["train"].labels == k).any()]
    if absent:
        raise ValueError(f"no training image of class(es) {', '.join(absent)}")
    if size is None:
        sizes = {size_of(samples, i) for samples in splits.values() for i in range(len(samples))}
        if len(sizes) > 1:
            shown = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:5])
            raise ValueError(f"the images have {len(sizes)} sizes ({shown}); set size to resize them to one")


def size_of(samples: Samples, index: int) -> tuple[int, int]:
    """(height, width) of an image; of a file only its header is read."""
    image = samples.images[index]
    return image_size(image) if isinstance(image, Path) else (int(image.shape[0]), int(image.shape[1]))


def channels_of(samples: Samples) -> int:
    """1 for grey images, 3 for colour, by the first image."""
    image = samples.images[0]
    if isinstance(image, Path):
        return count_channels(image)
    return 1 if image.ndim == 2 else 3
