"""Images with landmarks and stable ids: a table of points, the ISBI 2015 challenge's layout, or images alone.

Every data set is read into one table (:class:`Samples`) and checked before anything is trained; the images are decoded
when they are needed. A batch is a dict of ``image`` (B, C, H, W) in [-1, 1], ``points`` (B, L, 2), each (x, y) in
pixels of that image, NaN where one is not known, ``file_size`` (B, 2), width and height of the file, ``spacing``
(B, 2), and ``id``. Inside, (0, 0) is the centre of the top left pixel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict, Unpack

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from advmed.integrations.lightning import SampleData
from advmed.integrations.lightning.data import SPLITS, check_distinct
from advmed.integrations.lightning.images import (
    SUFFIXES,
    Header,
    common_bits,
    common_channels,
    files_of,
    headers_of,
    hidden,
    image_files,
    read_image,
    tell_of_others,
)
from advmed.integrations.lightning.tables import read_table

_FEW = 4
"""Pixels; in images of no more, points can all lie between 0 and 1."""
BOUNDS = (-1.0, 1.0)
"""Lowest and highest value of an image."""
Spacing = float | tuple[float, float] | None


@dataclass(frozen=True)
class Samples:
    """The samples of one split, as a :class:`LandmarkData` of your own reads them.

    Attributes:
        images: N files, turned as their headers (EXIF) ask, which is how viewers show them.
        points: landmarks, (N, L, 2), each (x, y) in pixels of the file; NaN where one is not known.
        ids: N stable ids.
        spacing: mm per pixel of the file in x and y, (N, 2); None where they are not known.

    Example:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from adv_landmark import Samples
        >>> points = np.array([[[3.0, 2.0], [np.nan, np.nan]]])  # of an image with two landmarks, the second not known
        >>> len(Samples([Path("case_1.png")], points, ["case_1"]))
        1
    """

    images: list[Path]
    points: np.ndarray
    ids: list[str]
    spacing: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def without_points(self) -> int:
        """Number of images without any landmark."""
        return int(np.isnan(self.points).any(2).all(1).sum())


class LandmarkDataset(Dataset[dict[str, Any]]):
    """Decodes the images of :class:`Samples`.

    Args:
        samples: the samples.
        channels: 1 or 3; images are converted.
        size: (height, width) that images are resized to.
        augment: changes images and points of the training, or None.
        bits: that images stored with 16 bits use.
    """

    def __init__(
        self,
        samples: Samples,
        channels: int,
        size: tuple[int, int],
        augment: Augmentation | None = None,
        bits: int = 16,
    ) -> None:
        self.samples, self.channels, self.size, self.augment, self.bits = samples, channels, size, augment, bits

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = read_image(self.samples.images[index], self.channels, self.bits)
        file_size = torch.tensor((image.shape[2], image.shape[1]), dtype=torch.float32)
        image = functional.to_dtype(image, torch.float32, scale=True)
        if tuple(image.shape[1:]) != self.size:
            image = functional.resize(image, list(self.size), antialias=True).clamp(0, 1)
        image = image * 2 - 1
        points = scale_points(
            torch.from_numpy(self.samples.points[index]), file_size.double(), torch.tensor(self.size[::-1])
        ).float()
        if self.augment is not None:
            image, points = self.augment(image, points)
        spacing = torch.ones(2) if self.samples.spacing is None else torch.from_numpy(self.samples.spacing[index])
        return {
            "image": image,
            "points": points,
            "file_size": file_size,
            "spacing": spacing.float(),
            "id": self.samples.ids[index],
        }


def scale_points(points: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Points (..., 2) of an image of the size ``old`` in one of the size ``new``, both (..., 2) as (width, height).

    As resampling has it: the image's edges, half a pixel outside the centres of the outermost pixels, stay its edges.
    """
    return (points + 0.5) * (new / old) - 0.5


class Augmentation:
    """Rotates, scales and shifts an image and its points, and changes brightness and contrast.

    Args:
        rotate: degrees; rotated by up to as many.
        zoom: scaled by up to this fraction, up or down.
        shift: shifted by up to this fraction of height and width.
        color: strength of the changes of brightness and contrast.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(self, rotate: float, zoom: float, shift: float, color: float) -> None:
        for name, value, most in (
            ("rotate", rotate, 180),
            ("zoom", zoom, 0.9),
            ("shift", shift, 1),
            ("color", color, 1),
        ):
            if not (math.isfinite(value) and 0 <= value <= most):
                raise ValueError(f"{name} must be between 0 and {most}, got {value}")
        self.rotate, self.zoom, self.shift, self.color = rotate, zoom, shift, color

    def __call__(self, image: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """A changed image (C, H, W) in [-1, 1] and its points (L, 2)."""
        angle, zoom, across, down, brightness, contrast = (torch.rand(6) * 2 - 1).tolist()
        if self.rotate or self.zoom or self.shift:
            height, width = image.shape[1:]
            shift = (across * self.shift * width, down * self.shift * height)
            image, points = transform(image, points, angle * self.rotate, 1 + zoom * self.zoom, shift)
        if self.color:
            image = image * (1 + contrast * self.color) + brightness * self.color
        return image.clamp(*BOUNDS), points


def transform(
    image: Tensor, points: Tensor, angle: float, scale: float, shift: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Rotates an image (C, H, W) in [-1, 1] and its points (L, 2) around the image's centre, scales and shifts them.

    Args:
        image: what comes in from outside is black.
        points: each (x, y) in pixels.
        angle: degrees, from x to y.
        scale: above 1 makes larger.
        shift: in x and y, in pixels.
    """
    height, width = image.shape[1:]
    cosine, sine = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
    forward = torch.tensor(((cosine, -sine), (sine, cosine)), dtype=torch.float64)
    centre = torch.tensor((width - 1, height - 1), dtype=torch.float64) / 2
    move = torch.tensor(shift, dtype=torch.float64)
    moved = (points.double() - centre) @ forward.T + centre + move
    # affine_grid asks where a pixel comes from, in coordinates where the image's edges are -1 and 1.
    half = torch.tensor((width, height), dtype=torch.float64) / 2
    back = torch.linalg.inv(forward)
    matrix = torch.cat([back * half / half[:, None], (-(back @ move) / half)[:, None]], 1)
    grid = affine_grid(matrix[None].to(image.dtype), [1, *image.shape], align_corners=False)
    black = BOUNDS[0]
    image = grid_sample(image[None] - black, grid, align_corners=False)[0] + black
    return image, moved.to(points.dtype)


class DataOptions(TypedDict, total=False):
    """The arguments of :class:`LandmarkData` but ``spacing``, for the signatures of what derives from it."""

    batch_size: int
    size: int | tuple[int, int] | None
    channels: int | None
    bits: int | None
    unit: Literal["mm", "px"] | None
    rotate: float
    zoom: float
    shift: float
    color: float
    workers: int
    seed: int


class SpacedOptions(DataOptions, total=False):
    """All of them."""

    spacing: Spacing


class LandmarkData(SampleData):
    """Training, validation and test images with landmarks; a subclass reads them.

    Args:
        batch_size: per process.
        size: side, or (height, width), that images are resized to; None: as they are, all alike.
        channels: 1 or 3; None: as the images are.
        bits: that images stored with 16 bits use, such as 12; None: all.
        spacing: mm per pixel of the files, one number, or one for x and one for y; None: not known.
        unit: of errors: "mm" needs a spacing; "px" are pixels of the files; None: mm where there is a spacing.
        rotate: degrees; training images are rotated by up to as many.
        zoom: training images are scaled by up to this fraction, up or down.
        shift: training images are shifted by up to this fraction of their size.
        color: strength of the changes of brightness and contrast in training.
        workers: processes that read images.
        seed: of the order of images.

    Raises:
        ValueError: for an argument out of its range, or data that are not as described, naming the file and line.
        FileNotFoundError: for a file or folder that is not there.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from PIL import Image
        >>> from adv_landmark import LandmarkData, Samples
        >>> class Blank(LandmarkData):
        ...     def read(self):
        ...         paths = [Path(folder, f"{name}.png") for name in "ab"]
        ...         train, val = (
        ...             Samples([path], np.array([[[3.0, 2.0]]]), [path.name], self.spacings(1)) for path in paths
        ...         )
        ...         return ["tip"], {"train": train, "val": val}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in "ab":
        ...         Image.new("L", (8, 6)).save(Path(folder, f"{name}.png"))
        ...     data = Blank(spacing=0.1)
        >>> data.size, data.unit, data.landmark_names
        ((6, 8), 'mm', ['tip'])
    """

    def __init__(
        self,
        *,
        batch_size: int = 8,
        size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        bits: int | None = None,
        spacing: Spacing = None,
        unit: Literal["mm", "px"] | None = None,
        rotate: float = 0.0,
        zoom: float = 0.0,
        shift: float = 0.0,
        color: float = 0.0,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, seed=seed)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        if size is not None and min((size,) if isinstance(size, int) else size) < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        if unit not in (None, "mm", "px"):
            raise ValueError(f"unit must be mm or px, got {unit!r}")
        self.spacing = check_spacing(spacing)
        self.augmentation = Augmentation(rotate, zoom, shift, color)
        self.splits: dict[str, Samples]
        self.landmark_names, self.splits = self.read()
        self.splits = check_samples(self.splits, self.landmark_names)
        measured = all(part.spacing is not None for part in self.splits.values())
        if unit == "mm" and not measured:
            raise ValueError("errors in mm need the pixel spacing: set spacing, mm per pixel, or take unit px")
        self.unit: Literal["mm", "px"] = unit or ("mm" if measured else "px")
        headers = headers_of([path for part in self.splits.values() for path in part.images])
        self.size: tuple[int, int] = _one_size(size, {head.size for _, head in headers})
        self.channels = channels or common_channels(headers)
        self.bits = common_bits(headers, bits)

    def setup(self, stage: str) -> None:
        """See :meth:`SampleData.setup`; what is measured on a split without landmarks is no number.

        Raises:
            ValueError: for such a split that is to be measured on.
        """
        super().setup(stage)
        split = "test" if stage == "test" else "val"
        validates = self.trainer is None or self.trainer.limit_val_batches
        if stage in ("validate", "test") or (stage == "fit" and validates):
            self.require(split)
            if self.splits[split].without_points() == len(self.splits[split]):
                raise ValueError(f"no {split} image has a known landmark to compare with")

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """The names of the landmarks and the samples of each split; called once, before anything else.

        Raises:
            NotImplementedError: here; a subclass reads them.
        """
        raise NotImplementedError

    def dataset(self, split: str, *, augment: bool = False) -> LandmarkDataset:
        """The images of a split.

        Raises:
            ValueError: if there is no such split.
        """
        self.require(split)
        augmentation = self.augmentation if augment else None
        return LandmarkDataset(self.splits[split], self.channels, self.size, augmentation, self.bits)

    def truth(self, split: str) -> list[Any]:
        """See :meth:`SampleData.truth`."""
        self.require(split)
        samples = self.splits[split]
        bits = [] if self.bits == 16 else [self.bits]
        return [samples.points, samples.spacing, self.unit, self.size, self.channels, *bits]

    def target(self, split: str, index: int) -> list[list[float]]:
        """See :meth:`SampleData.target`."""
        points: list[list[float]] = self.splits[split].points[index].tolist()
        return points

    def spacings(self, count: int) -> np.ndarray | None:
        """The spacing of the settings for that many images."""
        return None if self.spacing is None else np.tile(np.array(self.spacing), (count, 1))


def _one_size(size: int | tuple[int, int] | None, found: set[tuple[int, int]]) -> tuple[int, int]:
    if size is not None:
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if len(found) > 1:
        shown = ", ".join(f"{h} x {w}" for h, w in sorted(found)[:5])
        raise ValueError(f"the images have {len(found)} sizes ({shown}); set size to resize them to one")
    return next(iter(found))


class LandmarkTable(LandmarkData):
    r"""A table of points: ``landmarks.csv`` with the columns image, landmark_index, x and y, and a folder of images.

    Every image has a row for every landmark; x and y are empty where one is not known. ``split.csv`` has the columns
    image and split: train, val, test, or none for images that are left out.

    Args:
        root: folder with both tables.
        images: folder of the images, relative to root.
        table: name of the table of points; the landmark's column may be called landmark_index or landmark, and hold
            numbers or names.
        split_table: name of the table of splits; it may have the column spacing, or spacing_x and spacing_y, in the
            place of the setting.
        origin: what (0, 0) is in the table: the "centre" or the outer "corner" of the top left pixel.
        **options: see :class:`LandmarkData`.

    Raises:
        ValueError: for an argument out of its range, or data that are not as described, naming the file and line.
        FileNotFoundError: for a file or folder that is not there.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from adv_landmark import LandmarkTable
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "images").mkdir()
        ...     for name in "ab":
        ...         Image.new("L", (8, 6)).save(Path(root, "images", f"{name}.png"))
        ...     _ = Path(root, "landmarks.csv").write_text("image,landmark,x,y\na,tip,3,2\nb,tip,4,1\n")
        ...     _ = Path(root, "split.csv").write_text("image,split\na,train\nb,val\n")
        ...     data = LandmarkTable(root)
        >>> data.landmark_names, data.splits["val"].points.tolist()
        (['tip'], [[[4.0, 1.0]]])
    """

    def __init__(
        self,
        root: str,
        *,
        images: str = "images",
        table: str = "landmarks.csv",
        split_table: str = "split.csv",
        origin: Literal["centre", "corner"] = "centre",
        **options: Unpack[SpacedOptions],
    ) -> None:
        self.root, self.images, self.table, self.split_table = Path(root), images, table, split_table
        if origin not in ("centre", "corner"):
            raise ValueError(f"origin must be centre or corner, got {origin!r}")
        self.origin = 0.5 if origin == "corner" else 0.0
        super().__init__(**options)

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """See :meth:`LandmarkData.read`.

        Raises:
            ValueError: for data that are not as described, naming file and line.
            FileNotFoundError: for a file or folder that is not there.
        """
        path = self.root / self.table
        rows = read_table(path, ("image", "x", "y"))
        column = next((name for name in ("landmark_index", "landmark") if name in rows[0]), None)
        if column is None:
            raise ValueError(f"{path} has no column landmark_index; there are {', '.join(rows[0])}")
        names = sorted({row[column] for row in rows}, key=_in_order)
        found: dict[str, dict[str, tuple[float, float]]] = {}
        for line, row in enumerate(rows, 2):
            landmarks = found.setdefault(row["image"], {})
            if row[column] in landmarks:
                raise ValueError(f"{path} has landmark {row[column]} of {row['image']} twice, see line {line}")
            landmarks[row[column]] = _point([row["x"], row["y"]], path, line)
        counts = Counter(len(landmarks) for landmarks in found.values())
        if len(counts) > 1:
            short = [f"{image} ({len(marks)})" for image, marks in found.items() if len(marks) < len(names)]
            raise ValueError(
                f"{path} has {len(names)} landmarks, but not for all images: {', '.join(short[:5])}"
                f"{', ...' if len(short) > 5 else ''}. Write a row with empty x and y for a landmark that is not known"
            )
        split_of, spacing_of = self._splits()
        files = self._files(found, split_of)
        splits = {}
        for split in SPLITS:
            chosen = [image for image in found if split_of[image] == split]
            if chosen:
                points = np.array([[found[image][name] for name in names] for image in chosen]) - self.origin
                spacing = (
                    np.array([spacing_of[image] for image in chosen]) if spacing_of else self.spacings(len(chosen))
                )
                splits[split] = Samples([files[image] for image in chosen], points, chosen, spacing)
        return [str(name) for name in names], splits

    def _splits(self) -> tuple[dict[str, str], dict[str, tuple[float, float]]]:
        path = self.root / self.split_table
        rows = read_table(path, ("image", "split"))
        strangers = sorted({row["split"] for row in rows} - {*SPLITS, "none"})
        if strangers:
            raise ValueError(
                f"{path} has the split(s) {', '.join(map(repr, strangers))}; they must be train, val, test or none"
            )
        twice = [image for image, count in Counter(row["image"] for row in rows).items() if count > 1]
        if twice:
            raise ValueError(f"{path} has {len(twice)} image(s) more than once: {', '.join(twice[:5])}")
        if ("spacing_x" in rows[0]) != ("spacing_y" in rows[0]):
            raise ValueError(f"{path} must have both spacing_x and spacing_y, or the column spacing for both")
        columns = ["spacing", "spacing"] if "spacing" in rows[0] else ["spacing_x", "spacing_y"]
        spacing: dict[str, tuple[float, float]] = {}
        if set(columns) <= rows[0].keys():
            for line, row in enumerate(rows, 2):
                found = [_number(row[column], path, line) for column in columns]
                if self.spacing is not None:
                    pairs = zip(found, self.spacing, strict=True)
                    if row["split"] != "none" and any(x != y for x, y in pairs if not math.isnan(x)):
                        raise ValueError(
                            f"spacing is {self.spacing} in the settings, and {tuple(found)} in line {line} of {path}: "
                            f"leave one of them out"
                        )
                    continue
                x, y = found
                if not (x > 0 and y > 0 and math.isfinite(x) and math.isfinite(y)):
                    raise ValueError(f"{path} has no spacing > 0 in line {line}")
                spacing[row["image"]] = (x, y)
        return {row["image"]: row["split"] for row in rows}, spacing

    def _files(self, found: dict[str, Any], split_of: dict[str, str]) -> dict[str, Path]:
        folder = self.root / self.images
        of = files_of({*found, *split_of}, folder)
        table, split_table = self.root / self.table, self.root / self.split_table
        used = [image for image in found if split_of.get(image) != "none"]
        missing = [image for image in used if image not in of]
        if missing:
            raise FileNotFoundError(f"{len(missing)} image(s) of {table} are not in {folder}: {', '.join(missing)}")
        unsplit = [image for image in used if image not in split_of]
        if unsplit:
            raise ValueError(f"{len(unsplit)} image(s) of {table} are not in {split_table}: {', '.join(unsplit)}")
        bare = [image for image, split in split_of.items() if split != "none" and image not in found]
        if bare:
            raise ValueError(f"{len(bare)} image(s) of {split_table} have no landmarks in {table}: {', '.join(bare)}")
        extra = sorted({path.name for path in image_files(folder)} - {path.name for path in of.values()})
        if extra:
            raise ValueError(
                f"{len(extra)} image(s) in {folder} have no landmarks in {table}: {', '.join(extra)}. To leave them "
                f"out, give them the split none in {split_table}"
            )
        return of


class ISBI2015(LandmarkData):
    """The layout of the ISBI 2015 challenge on cephalometric radiographs (Wang et al. 2016).

    One text file for each image and annotator, a line ``x,y`` for each landmark; lines without a comma are left
    out. A landmark is the mean of the annotators who mark it; negative coordinates, such as -1,-1, mark none.
    TrainingData is the training split, Test1Data validates, Test2Data is the test split.

    Args:
        root: folder in which the three folders of images lie, and the annotators', at any depth.
        annotators: names of the annotators' folders.
        spacing: mm per pixel of the files, one number, or one for x and one for y.
        **options: see :class:`LandmarkData`.

    Raises:
        ValueError: for an argument out of its range, or data that are not as described, naming the file and line.
        FileNotFoundError: for a file or folder that is not there.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from adv_landmark import ISBI2015
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for folder, name in (("TrainingData", "001"), ("Test1Data", "151")):
        ...         Path(root, folder).mkdir()
        ...         Image.new("L", (8, 6)).save(Path(root, folder, f"{name}.bmp"))
        ...         for annotator, line in (("400_senior", "3,2"), ("400_junior", "4,2")):
        ...             Path(root, annotator).mkdir(exist_ok=True)
        ...             _ = Path(root, annotator, f"{name}.txt").write_text(line)
        ...     data = ISBI2015(root)
        >>> data.splits["train"].points.tolist(), data.unit
        ([[[3.5, 2.0]]], 'mm')
    """

    FOLDERS: ClassVar = {"train": "TrainingData", "val": "Test1Data", "test": "Test2Data"}

    def __init__(
        self,
        root: str,
        *,
        annotators: Sequence[str] = ("400_senior", "400_junior"),
        spacing: Spacing = 0.1,
        **options: Unpack[DataOptions],
    ) -> None:
        self.root, self.annotators = Path(root), list(annotators)
        super().__init__(spacing=spacing, **options)

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """See :meth:`LandmarkData.read`.

        Raises:
            ValueError: for data that are not as described, naming file and line.
            FileNotFoundError: for a file or folder that is not there.
        """
        if not self.annotators:
            raise ValueError("annotators must name one folder or more")
        annotated = [self._folder(name) for name in self.annotators]
        splits, counts = {}, {}
        doubtful: list[str] = []
        for split, name in self.FOLDERS.items():
            if split == "test" and not any(self.root.rglob(name)):
                continue
            images = image_files(self._folder(name))
            tell_of_others([self._folder(name)])
            points = []
            for image in images:
                each = [self._points(folder / f"{image.stem}.txt") for folder in annotated]
                lengths = {len(part) for part in each}
                if len(lengths) > 1:
                    raise ValueError(
                        f"the annotators of {image.stem} have different numbers of landmarks: "
                        + ", ".join(f"{n} {len(p)}" for n, p in zip(self.annotators, each, strict=True))
                    )
                points.append(_mean_of_marked(each))
                doubtful += _doubtful(image.stem, each)
                counts[image.stem] = len(points[-1])
            splits[split] = (images, points)
        if len(set(counts.values())) > 1:
            usual = Counter(counts.values()).most_common(1)[0][0]
            others = [f"{image} ({count})" for image, count in counts.items() if count != usual]
            raise ValueError(f"most images have {usual} landmarks, but not all: {', '.join(others[:5])}")
        if doubtful:
            rank_zero_warn(
                f"{len(doubtful)} landmark(s) are marked by some annotators only, and taken from those: "
                f"{'; '.join(doubtful[:5])}{'; ...' if len(doubtful) > 5 else ''}"
            )
        samples = {
            split: Samples(images, np.array(points), [p.stem for p in images], self.spacings(len(images)))
            for split, (images, points) in splits.items()
            if images
        }
        return [str(k + 1) for k in range(max(counts.values(), default=0))], samples

    def _folder(self, name: str) -> Path:
        found = (path for path in sorted(self.root.rglob(name)) if not hidden(path.relative_to(self.root)))
        folder = next((path for path in found if path.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"there is no folder {name} in {self.root}")
        return folder

    def _points(self, path: Path) -> np.ndarray:
        if not path.is_file():
            raise FileNotFoundError(f"there are no landmarks {path}")
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        parts = [(n, line.split(",")) for n, line in enumerate(lines, 1) if "," in line]
        if any(len(point) != 2 for _, point in parts):
            raise ValueError(f"{path} must have two numbers in each line with a comma, x,y")
        found = [_point(point, path, n) for n, point in parts]
        return np.array(found, dtype=np.float64).reshape(-1, 2)


def _marked(points: np.ndarray) -> Any:
    return np.all(points >= -0.5, axis=-1)  # False for NaN


def _mean_of_marked(each: Sequence[np.ndarray]) -> np.ndarray:
    """The points (L, 2) of several annotators as one; NaN where none marks the landmark."""
    points = np.array(each)
    marked = _marked(points)[..., None]
    count = marked.sum(0)
    return np.where(count > 0, np.where(marked, points, 0).sum(0) / np.maximum(count, 1), np.nan)


def _doubtful(image: str, each: Sequence[np.ndarray]) -> list[str]:
    """The landmarks that some annotators mark and some do not."""
    marked = _marked(np.array(each)).sum(0)
    return [f"{image} {k + 1}" for k in np.flatnonzero((marked > 0) & (marked < len(each)))]


class Images(LandmarkData):
    """A folder of images without landmarks, to predict.

    Args:
        root: the folder.
        landmarks: the number of landmarks, or their names, as the trained model has them.
        **options: see :class:`LandmarkData`.

    Raises:
        ValueError: for an argument out of its range, or data that are not as described, naming the file and line.
        FileNotFoundError: for a file or folder that is not there.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from adv_landmark import Images
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Image.new("L", (8, 6)).save(Path(root, "a.png"))
        ...     data = Images(root, landmarks=["tip"], size=32)
        >>> data.splits["test"].ids, data.size
        (['a.png'], (32, 32))
    """

    def __init__(self, root: str, landmarks: int | Sequence[str], **options: Unpack[SpacedOptions]) -> None:
        self.root, self.landmarks = Path(root), landmarks
        super().__init__(**options)

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        """See :meth:`LandmarkData.read`.

        Raises:
            FileNotFoundError: for a folder that is not there, or holds no images.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder of images {self.root}")
        files = image_files(self.root, deep=True)
        tell_of_others([self.root], deep=True)
        if not files:
            raise FileNotFoundError(f"there are no images ({', '.join(SUFFIXES)}) in {self.root}")
        given = self.landmarks
        names = [str(k + 1) for k in range(given)] if isinstance(given, int) else [str(name) for name in given]
        points = np.full((len(files), len(names), 2), np.nan)
        ids = [path.relative_to(self.root).as_posix() for path in files]
        return names, {"test": Samples(files, points, ids, self.spacings(len(files)))}


def check_spacing(spacing: Spacing) -> tuple[float, float] | None:
    """Spacing in x and y. Raises ValueError unless it is positive."""
    if spacing is None:
        return None
    pair = tuple(float(s) for s in spacing) if isinstance(spacing, Sequence) else (float(spacing),) * 2
    if len(pair) != 2 or not all(math.isfinite(s) and s > 0 for s in pair):
        raise ValueError(f"spacing must be mm per pixel, > 0, one number or two (x, y), got {spacing}")
    return pair


def check_samples(splits: dict[str, Samples], names: Sequence[str]) -> dict[str, Samples]:
    """The samples, landmarks outside their image made unknown, which is said.

    Raises:
        ValueError: for data without landmarks, a split without images, images that occur twice or cannot be read,
            points that are in no pixels, or images none of whose landmarks lies inside.
    """
    if not names:
        raise ValueError("the data has no landmarks")
    for split in () if set(splits) == {"test"} else ("train", "val"):
        if not len(splits.get(split, ())):
            raise ValueError(f"the data has no {split} images")
    headers = {split: [head for _, head in headers_of(samples.images)] for split, samples in splits.items()}
    check_distinct(splits, lambda split, index: splits[split].points[index].tolist())
    check_units(splits, names, headers)
    checked, outside, lost, bare = {}, [], [], 0
    for split, samples in splits.items():
        sizes = np.array([head.size[::-1] for head in headers[split]], dtype=np.float64)
        limits = sizes[:, None] - 0.5
        off = ((samples.points < -0.5) | (samples.points > limits)).any(2)  # False for NaN
        outside += [
            f"{samples.ids[i]} {names[k]} at ({samples.points[i, k, 0]:g}, {samples.points[i, k, 1]:g})"
            for i, k in np.argwhere(off)
        ]
        known = ~np.isnan(samples.points).any(2)
        lost += [samples.ids[i] for i in (known.any(1) & ~(known & ~off).any(1)).nonzero()[0]]
        points = np.where((off | ~known)[..., None], np.nan, samples.points)
        kept = range(len(samples))
        if split == "train":  # the others have nothing to teach, and their loss of 0 would count in thresholds
            kept = (known & ~off).any(1).nonzero()[0]
            bare += len(samples) - len(kept)
        checked[split] = Samples(
            [samples.images[i] for i in kept],
            points[kept],
            [samples.ids[i] for i in kept],
            None if samples.spacing is None else samples.spacing[kept],
        )
    if lost:
        raise ValueError(
            f"{len(lost)} image(s) have all their landmarks outside, such as {', '.join(lost[:3])}: are the points in "
            f"pixels of these very files?"
        )
    if "train" in checked and not len(checked["train"]):
        raise ValueError("no training image has a landmark")
    if bare:
        rank_zero_warn(f"{bare} training image(s) without any known landmark are left out")
    if outside:
        rank_zero_warn(
            f"{len(outside)} landmark(s) lie outside their image and count as not known: {'; '.join(outside[:5])}"
            f"{'; ...' if len(outside) > 5 else ''}"
        )
    return checked


def check_units(splits: Mapping[str, Samples], names: Sequence[str], headers: Mapping[str, Sequence[Header]]) -> None:
    """Says where images are turned, and where points may stand for landmarks that are not known.

    Raises:
        ValueError: for points in fractions of the image, or images all of whose landmarks are at (0, 0).
    """
    points = np.concatenate([part.points.reshape(-1, 2) for part in splits.values()])
    known = points[~np.isnan(points).any(1)]
    side = min((min(head.size) for part in headers.values() for head in part), default=0)
    if side > _FEW and len(np.unique(known, axis=0)) > 1 and known.min() >= -0.5 and known.max() <= 1:
        low, high = known.min(0), known.max(0)
        raise ValueError(
            f"all points lie between ({low[0]:g}, {low[1]:g}) and ({high[0]:g}, {high[1]:g}): are they fractions of "
            f"the image? They must be in pixels of the file"
        )
    zero, blank = [], []
    for part in splits.values():
        for sample, own in zip(part.ids, part.points, strict=True):
            at_zero = (own == 0).all(1) | (own == -0.5).all(1)  # by the centre, or the corner, of the first pixel
            if len(own) > 1 and (at_zero | np.isnan(own).any(1)).all() and at_zero.sum() > 1:
                blank.append(sample)
            zero += [f"{sample} {name}" for name, is_zero in zip(names, at_zero, strict=True) if is_zero]
    if blank or (len(zero) > 1 and len(zero) == len(known)):
        found = blank or zero
        raise ValueError(
            f"{len(found)} image(s) have all their landmarks at (0, 0), such as {found[0]}: leave x and y empty for a "
            f"landmark that is not known"
        )
    if len(zero) > 1:
        rank_zero_warn(
            f"{len(zero)} landmark(s) lie at (0, 0), such as {zero[0]}: if that stands for one that is not known, "
            f"leave x and y empty"
        )
    turned = [
        p for split, part in splits.items() for p, head in zip(part.images, headers[split], strict=True) if head.turned
    ]
    if turned and len(known):
        rank_zero_warn(
            f"{len(turned)} image(s) are turned as their headers (EXIF) ask, such as {turned[0]}: their points must be "
            f"in pixels of the image as viewers show it"
        )


def _number(text: str, path: Path, line: int) -> float:
    """A number; NaN for an empty cell."""
    try:
        value = float(text) if text.strip() else math.nan
    except ValueError as error:
        raise ValueError(f"{path} has {text!r} in line {line}, where a number is expected") from error
    if math.isinf(value):
        raise ValueError(f"{path} has {text!r} in line {line}, where a finite number is expected")
    return value


def _point(cells: Sequence[str], path: Path, line: int) -> tuple[float, float]:
    """The point (x, y) of two cells; NaN where both are empty."""
    x, y = (_number(cell, path, line) for cell in cells)
    if math.isnan(x) != math.isnan(y):
        raise ValueError(
            f"{path} has only one of x and y in line {line}: both are empty for a landmark that is not known"
        )
    return x, y


def _in_order(name: str) -> tuple[float, str]:
    """Numbers by value, then names by letter."""
    return (float(name), "") if name.lstrip("-").isdigit() else (math.inf, name)
