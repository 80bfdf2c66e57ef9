"""Images with labels and stable ids: HAM10000's layout, MedMNIST's ``.npz``, folders of images.

Every data set is read into one table (:class:`Samples`) and checked before anything is trained; the images are decoded
when they are needed. A batch is a dict of ``image`` (B, C, H, W) in [0, 1], ``label`` (B,) and ``id``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack
from zipfile import BadZipFile

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.lib.npyio import NpzFile
from torch import Tensor
from torch.utils.data import Dataset, WeightedRandomSampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from advmed.integrations.lightning import SampleData
from advmed.integrations.lightning.data import SPLITS, check_distinct
from advmed.integrations.lightning.images import (
    Header,
    common_bits,
    common_channels,
    files_of,
    header,
    headers_of,
    hidden,
    image_files,
    read_image,
    tell_of_others,
)
from advmed.integrations.lightning.tables import read_table

MISSING = ("nan", "-nan", "na", "n/a", "#n/a", "<na>", "null")
"""What programs write into the cell of a label that is not known."""
_TRIED = 8
"""Training images that a transform of the user's is tried with."""
_LEFT = 0.25
"""Of their pixels, the share outside [0, 1] from which on a transform is taken for a normalisation."""


@dataclass(frozen=True)
class Samples:
    """The samples of one split, as a :class:`ClassificationData` of your own reads them.

    Attributes:
        images: uint8 arrays (H, W) or (H, W, 3), in one array (N, ...), or N files.
        labels: class numbers, (N,), int64.
        ids: N stable ids.

    Example:
        >>> import numpy as np
        >>> from adv_classify import Samples
        >>> len(Samples(np.zeros((2, 28, 28), np.uint8), np.array([0, 1]), ["case_1", "case_2"]))
        2
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
        bits: that images stored with 16 bits use.
    """

    def __init__(
        self,
        samples: Samples,
        channels: int,
        size: tuple[int, int] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        bits: int = 16,
    ) -> None:
        self.samples, self.channels, self.size, self.transform, self.bits = samples, channels, size, transform, bits

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
            return read_image(image, self.channels, self.bits)
        tensor = torch.from_numpy(np.array(image, copy=True))
        tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
        if len(tensor) > self.channels:
            return functional.rgb_to_grayscale(tensor)
        return tensor.expand(3, -1, -1) if len(tensor) < self.channels else tensor


class DataOptions(TypedDict, total=False):
    """The arguments of :class:`ClassificationData`, for the signatures of what derives from it."""

    batch_size: int
    size: int | tuple[int, int] | None
    channels: int | None
    bits: int | None
    flip: float
    rotate: float
    zoom: float
    color: float
    transform: Callable[[Tensor], Any] | None
    sampler: Literal["shuffle", "balanced"]
    workers: int
    seed: int


class ClassificationData(SampleData):
    """Training, validation and test images; a subclass reads them.

    Args:
        batch_size: per process.
        size: side, or (height, width), that images are resized to; None: as they are, all alike.
        channels: 1 or 3; None: as the images are.
        bits: that images stored with 16 bits use, such as 12; None: all.
        flip: probability of a horizontal and of a vertical flip in training.
        rotate: degrees; training images are rotated by up to as many.
        zoom: training images are scaled by up to this fraction, up or down.
        color: strength of the changes of brightness and contrast (and saturation) in training.
        transform: augmentation of training images instead of the four above: any transform of an image (C, H, W) in
            [0, 1], such as those of torchvision.transforms.v2. No normalisation: the network has its own.
        sampler: "shuffle" draws every image once an epoch; "balanced" draws every class equally often.
        workers: processes that read images.
        seed: of the order of images.

    Raises:
        ValueError: for an argument out of its range, or data that are not as described, naming the file and line.
        FileNotFoundError: for a file or folder that is not there.

    Example:
        >>> import numpy as np
        >>> from adv_classify import ClassificationData, Samples
        >>> class Blank(ClassificationData):
        ...     def read(self):
        ...         train = Samples(np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 1, 1]), ["a", "b", "c", "d"])
        ...         val = Samples(np.zeros((1, 8, 8), np.uint8), np.array([1]), ["e"])
        ...         return ["benign", "malignant"], {"train": train, "val": val}
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
        bits: int | None = None,
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
        headers = check_samples(self.splits, self.class_names, self.size)
        self.channels = channels or channels_of(self.splits, headers)
        self.bits = common_bits(headers, bits)
        self.image_bits = self.bits if any(head.deep for _, head in headers) else None
        if transform is not None:
            check_transform(transform, self.dataset("train"))

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """The names of the classes and the samples of each split; called once, before anything else.

        Raises:
            NotImplementedError: here; a subclass reads them.
        """
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of all images."""
        if self.size is not None:
            return self.size
        first = self.splits["train"].images[0]
        height, width = header(first).size if isinstance(first, Path) else first.shape[:2]
        return int(height), int(width)

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
        transform = self.transform if augment else None
        return ImageDataset(self.splits[split], self.channels, self.size, transform, self.bits)

    def truth(self, split: str) -> list[Any]:
        """See :meth:`SampleData.truth`."""
        self.require(split)
        return [self.splits[split].labels, self.size, self.channels, *([] if self.bits == 16 else [self.bits])]

    def target(self, split: str, index: int) -> str:
        """See :meth:`SampleData.target`."""
        return self.class_names[int(self.splits[split].labels[index])]

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
        table: name of the table. ``label`` holds whole numbers from 0, or names, in every line; a column ``dx`` or
            ``name`` beside numbers names the classes.
        classes: the names of the classes in their order, where ``label`` holds names; None: sorted.
        **options: see :class:`ClassificationData`.

    Raises:
        ValueError: for an argument out of its range, or data that are not as described, naming the file and line.
        FileNotFoundError: for a file or folder that is not there.

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
        **options: Unpack[DataOptions],
    ) -> None:
        self.root, self.images, self.table, self.classes = Path(root), images, table, classes
        super().__init__(**options)

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """See :meth:`ClassificationData.read`.

        Raises:
            ValueError: for data that are not as described, naming file and line.
            FileNotFoundError: for a file or folder that is not there.
        """
        path = self.root / self.table
        rows = read_table(path, ("image", "label", "split"))
        known = self.classes or ()
        short = [
            line
            for line, row in enumerate(rows, 2)
            if not (row["image"] and row["label"]) or (row["label"].lower() in MISSING and row["label"] not in known)
        ]
        if short:
            raise ValueError(f"{path} has no image or label in line(s) {', '.join(map(str, short))}")
        strangers = sorted({row["split"] for row in rows} - set(SPLITS))
        if strangers:
            raise ValueError(
                f"{path} has the split(s) {', '.join(map(repr, strangers))}; they must be train, val, test"
            )
        names, labels = self._labels(path, rows)
        files = self._files([row["image"] for row in rows])
        _check_rows(path, rows, files)
        splits = {}
        for split in SPLITS:
            chosen = [i for i, row in enumerate(rows) if row["split"] == split]
            if chosen:
                paths = [files[i] for i in chosen]
                ids = [rows[i]["image"] for i in chosen]
                splits[split] = Samples(paths, np.array([labels[i] for i in chosen], dtype=np.int64), ids)
        return names, splits

    def _labels(self, path: Path, rows: list[dict[str, str]]) -> tuple[list[str], list[int]]:
        texts = [row["label"] for row in rows]
        numbers = [_number(text) for text in texts]
        if not all(number is not None and number.is_integer() for number in numbers):
            return self._named(path, texts, numbers)
        labels = [int(number) for number in numbers if number is not None]
        if self.classes:
            return list(self.classes), labels
        names = [str(k) for k in range(max(labels) + 1)]
        naming = next((name for name in ("name", "dx") if name in rows[0]), None)
        given: dict[int, str] = {}
        for line, (row, label) in enumerate(zip(rows, labels, strict=True), 2):
            if naming is None or label < 0:
                continue
            names[label] = given.setdefault(label, row[naming])
            if row[naming] != given[label]:
                raise ValueError(
                    f"{path} calls class {label} {row[naming]!r} in line {line}, and {given[label]!r} before that"
                )
        return names, labels

    def _named(self, path: Path, texts: list[str], numbers: list[float | None]) -> tuple[list[str], list[int]]:
        names = list(self.classes or sorted(set(texts)))
        unknown = sorted(set(texts) - set(names))
        if unknown:
            raise ValueError(f"{path} has label(s) {', '.join(unknown)} that are not among classes {names}")
        if not self.classes and any(number is not None for number in numbers):
            whole = [number is not None and number.is_integer() for number in numbers]
            line = whole.index(0 < sum(whole) <= len(whole) / 2)  # of the fewer
            raise ValueError(
                f"{path} has the label {texts[line]!r} in line {line + 2}, beside others of another kind: labels are "
                f"whole numbers, or names, in every line. To have all as names, list them as classes"
            )
        return names, [names.index(text) for text in texts]

    def _files(self, names: Sequence[str]) -> list[Path]:
        folder = self.root / self.images
        found = files_of(names, folder)
        missing = [name for name in names if name not in found]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} images of the table are not in {folder}: {', '.join(missing)}"
            )
        return [found[name] for name in names]


def _number(text: str) -> float | None:
    """A number, None for text that is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _check_rows(path: Path, rows: Sequence[Mapping[str, str]], files: Sequence[Path]) -> None:
    """Raises ValueError for an image of two lines with other labels, or of the same split."""
    first: dict[Path, tuple[int, Mapping[str, str]]] = {}
    for line, (row, file) in enumerate(zip(rows, files, strict=True), 2):
        before, other = first.setdefault(file, (line, row))
        if before != line and (row["split"] == other["split"] or row["label"] != other["label"]):
            raise ValueError(
                f"{path} has {file.name} more than once: in line {before} ({other['split']}, label {other['label']}) "
                f"and in line {line} ({row['split']}, label {row['label']})"
            )


class MedMNIST(ClassificationData):
    """A ``.npz`` file of MedMNIST (Yang et al. 2023): ``train_images``, ``train_labels``, and so on.

    Args:
        file: the file.
        classes: the names of the classes; None: their numbers.
        **options: see :class:`ClassificationData`.

    Raises:
        ValueError: for an argument out of its range, or data that are not as described, naming the file and line.
        FileNotFoundError: for a file or folder that is not there.

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

    def __init__(self, file: str, *, classes: Sequence[str] | None = None, **options: Unpack[DataOptions]) -> None:
        self.file, self.classes = Path(file), classes
        super().__init__(**options)

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """See :meth:`ClassificationData.read`.

        Raises:
            ValueError: for data that are not as described, naming file and line.
            FileNotFoundError: for a file or folder that is not there.
        """
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
                    if images.dtype != np.uint8 or not (
                        images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
                    ):
                        raise ValueError(
                            f"{split}_images of {self.file} must be uint8 of shape (N, H, W) or (N, H, W, 3), got "
                            f"{images.dtype} of shape {images.shape} (volumes are not supported)"
                        )
                    if len(images) != len(labels):
                        raise ValueError(f"{self.file} has {len(images)} {split}_images and {len(labels)} labels")
                    ids = [f"{split}/{i:06d}" for i in range(len(images))]
                    splits[split] = Samples(images, whole(labels.reshape(-1), f"{split}_labels of {self.file}"), ids)
        count = max((int(part.labels.max()) for part in splits.values() if len(part)), default=-1) + 1
        return list(self.classes or map(str, range(count))), splits


class ImageFolder(ClassificationData):
    """Folders of images: ``root/train/CLASS/*.png``, and so for val and test.

    Args:
        root: the folder.
        **options: see :class:`ClassificationData`.

    Raises:
        ValueError: for an argument out of its range, or data that are not as described, naming the file and line.
        FileNotFoundError: for a file or folder that is not there.

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

    def __init__(self, root: str, **options: Unpack[DataOptions]) -> None:
        self.root = Path(root)
        super().__init__(**options)

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """See :meth:`ClassificationData.read`.

        Raises:
            ValueError: for data that are not as described, naming file and line.
            FileNotFoundError: for a file or folder that is not there.
        """
        for split in ("train", "val"):
            if not (self.root / split).is_dir():
                raise FileNotFoundError(
                    f"there is no folder {self.root / split}; images are expected in {self.root}/train/CLASS and "
                    f"{self.root}/val/CLASS"
                )
        names = _folders(self.root / "train")
        tell_of_others([self.root / split for split in SPLITS], deep=True)
        splits = {}
        for split in SPLITS:
            if not (self.root / split).is_dir():
                continue
            strangers = [name for name in _folders(self.root / split) if name not in names]
            if strangers:
                raise ValueError(f"{self.root / split} has class(es) that train has not: {', '.join(strangers)}")
            files = [
                (path, label)
                for label, name in enumerate(names)
                if (self.root / split / name).is_dir()
                for path in image_files(self.root / split / name, deep=True)
            ]
            ids = [path.relative_to(self.root).as_posix() for path, _ in files]
            labels = np.array([label for _, label in files], dtype=np.int64)
            splits[split] = Samples([path for path, _ in files], labels, ids)
        return names, splits


def _folders(folder: Path) -> list[str]:
    """The names of the folders in one, but for hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not hidden(Path(path.name)))


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


def whole(labels: np.ndarray, what: str) -> np.ndarray:
    """Labels as int64.

    Raises:
        ValueError: for one that is no whole number.
    """
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"{what} must be whole numbers from 0, got {labels.dtype}, such as {labels.flat[0]!r}")
    wrong = np.flatnonzero(~np.isfinite(labels) | (labels != np.floor(labels)))
    if len(wrong):
        raise ValueError(f"{what} must be whole numbers from 0, got {labels[wrong[0]]} for image {wrong[0]}")
    return labels.astype(np.int64)


def check_samples(
    splits: dict[str, Samples], names: Sequence[str], size: tuple[int, int] | None
) -> list[tuple[Path, Header]]:
    """The headers of all images that are files.

    Raises:
        ValueError: for a split without images, labels out of range, a class that is never seen in training, images that
            occur twice or cannot be read, or images of several sizes without a size to resize them to.
    """
    for split in ("train", "val"):
        if not len(splits.get(split, ())):
            raise ValueError(f"the data has no {split} images")
    for split, samples in splits.items():
        if not len(samples.images) == len(samples.labels) == len(samples):
            raise ValueError(
                f"{split} has {len(samples)} ids, {len(samples.images)} images and {len(samples.labels)} labels"
            )
        if isinstance(samples.images, np.ndarray) and samples.images.dtype != np.uint8:
            raise ValueError(f"the images of {split} must be uint8, 0 to 255, got {samples.images.dtype}")
        labels = whole(samples.labels, f"the labels of {split}")
        wrong = sorted({int(label) for label in labels if not 0 <= label < len(names)})
        if wrong:
            raise ValueError(f"{split} has label(s) {wrong}, but there are {len(names)} classes, 0 to {len(names) - 1}")
    if len(set(names)) < len(names):
        raise ValueError(f"two classes have one name: {', '.join(names)}")
    absent = [names[k] for k in range(len(names)) if not (splits["train"].labels == k).any()]
    if absent:
        raise ValueError(f"no training image of class(es) {', '.join(absent)}")
    headers = headers_of([i for part in splits.values() for i in part.images if isinstance(i, Path)])
    check_distinct(splits, lambda split, index: f"label {names[splits[split].labels[index]]}")
    arrays = [part.images for part in splits.values() if isinstance(part.images, np.ndarray)]
    sizes = {head.size for _, head in headers} | {images.shape[1:3] for images in arrays}
    if size is None and len(sizes) > 1:
        shown = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:5])
        raise ValueError(f"the images have {len(sizes)} sizes ({shown}); set size to resize them to one")
    return headers


def channels_of(splits: Mapping[str, Samples], headers: Sequence[tuple[Path, Header]]) -> int:
    """1 for grey images, 3 for colour.

    Raises:
        ValueError: if there are both.
    """
    if headers:
        return common_channels(headers)
    grey = {split: np.asarray(part.images[0]).ndim == 2 for split, part in splits.items() if len(part)}
    if len(set(grey.values())) > 1:
        shown = ", ".join(f"{split} in {'grey' if is_grey else 'colour'}" for split, is_grey in grey.items())
        raise ValueError(f"the images are not alike ({shown}): set channels to 1 or 3, which all are converted to")
    return 1 if grey["train"] else 3


def check_transform(transform: Callable[[Tensor], Any], dataset: ImageDataset) -> None:
    """Tries a user's transform; the random state is afterwards what it was.

    Raises:
        ValueError: if it normalises, which the network does itself, or what it makes is no image of its channels.
    """
    if _normalises(transform):
        outside = 1.0
    else:
        shares = []
        with isolate_rng(include_cuda=False):
            for index in range(min(_TRIED, len(dataset))):
                image = dataset[index]["image"]
                made = transform(image)
                if not (isinstance(made, Tensor) and made.is_floating_point() and made.shape[:-2] == image.shape[:1]):
                    got = (
                        f"{made.dtype} of shape {tuple(made.shape)}"
                        if isinstance(made, Tensor)
                        else type(made).__name__
                    )
                    raise ValueError(
                        f"transform must make a tensor of floating-point numbers, (C, H, W), of an image of shape "
                        f"{tuple(image.shape)}, got {got}"
                    )
                shares.append(((made < -0.01) | (made > 1.01)).float().mean().item())
        outside = float(np.mean(shares))
    if outside > _LEFT:
        raise ValueError(
            "transform takes images out of [0, 1], as a normalisation does: leave it out, the network normalises its "
            "images itself (model.network.mean and std), so that noise has their own units"
        )


def _normalises(transform: Any) -> bool:
    """Whether a transform of torchvision is a normalisation, or has one in it."""
    parts = getattr(transform, "transforms", None) or ()
    return type(transform).__name__ == "Normalize" or any(map(_normalises, parts))
