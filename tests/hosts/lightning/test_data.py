"""Images of either host's data, whatever they are read from, and the mistakes in a table that both tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from adv_classify.data import ImageTable, MedMNIST
from adv_landmark.data import LandmarkTable
from advmed.integrations.lightning import SampleData
from advmed.testing.lightning import LightningHost
from helpers.mistakes import told

FILES = {"a": "train", "b": "train", "c": "val", "d": "val", "e": "test"}
TABLES: dict[type[SampleData], dict[str, tuple[str, ...]]] = {
    ImageTable: {"labels.csv": ("image", "label", "split")},
    LandmarkTable: {"landmarks.csv": ("image", "landmark_index", "x", "y"), "split.csv": ("image", "split")},
}
"""The columns of the tables of a layout; the last has the splits."""
LOWEST = {LandmarkTable: -1.0}
RANDOM = np.random.default_rng(0)
PICTURES: dict[str, np.ndarray] = {
    "1": RANDOM.random((5, 20, 24)) > 0.5,
    "L": RANDOM.integers(0, 256, (5, 20, 24), dtype=np.uint8),
    "RGB": RANDOM.integers(0, 256, (5, 20, 24, 3), dtype=np.uint8),
    "I;16": RANDOM.integers(0, 65536, (5, 20, 24), dtype=np.uint16),
}
"""By the mode that Pillow has of them; radiographs often have 16 bits."""


def write(root: Path, layout: type[SampleData], pictures: np.ndarray = PICTURES["L"]) -> Callable[..., Any]:
    """Writes pictures, one for each of FILES; returns what reads them, as they are unless it is told otherwise."""
    (root / "images").mkdir(parents=True)
    still: dict[str, Any] = {"workers": 0} if layout is LandmarkTable else {"workers": 0, "flip": 0.0}
    if layout is MedMNIST:
        parts = {"train": slice(0, 2), "val": slice(2, 4), "test": slice(4, 5)}
        arrays = {f"{split}_images": pictures[part] for split, part in parts.items()}
        labels = {f"{split}_labels": np.arange(5)[part] % 2 for split, part in parts.items()}
        np.savez(root / "own.npz", **arrays, **labels)
        return partial(MedMNIST, str(root / "own.npz"), **still)
    for name, picture in zip(FILES, pictures, strict=True):
        Image.fromarray(picture).save(root / "images" / f"{name}.png")
    for table, columns in TABLES[layout].items():
        lines = [columns]
        for k, (name, split) in enumerate(FILES.items()):
            row = {"image": name, "split": split, "label": k % 2, "landmark_index": "tip", "x": 3, "y": 2}
            lines.append(tuple(str(row[column]) for column in columns))
        (root / table).write_text("".join(f"{','.join(line)}\n" for line in lines))
    return partial(layout, str(root), **still)


# Images


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("size", [None, 12, (9, 30)])
@pytest.mark.parametrize(("layout", "mode"), [*product(TABLES, PICTURES), (MedMNIST, "L"), (MedMNIST, "RGB")])
def test_images_of_every_kind_in_their_range(tmp_path: Path, layout: Any, mode: str, size: Any, channels: Any) -> None:
    """Their channels and size are those of the files, or as wished; more than 8 bits are kept."""
    pictures, lowest = PICTURES[mode], LOWEST.get(layout, 0.0)
    data = write(tmp_path / "own", layout, pictures)(size=size, channels=channels)
    own = torch.from_numpy(pictures.astype(np.float64) / {"1": 1, "I;16": 65535}.get(mode, 255))
    own = own.movedim(-1, 1) if mode == "RGB" else own[:, None]
    wanted = own if channels is None else own.expand(-1, 3, -1, -1)
    if channels == 1:
        wanted = (wanted * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    if size is not None:
        wanted = functional.resize(wanted, [12, 12] if size == 12 else list(size), antialias=True)
    exact = mode == "I;16" or (size is None and wanted.shape == own.shape)  # of bytes, each step is rounded to one
    found = [sample for split in data.splits for sample in data.dataset(split)]
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [2, 2, 1]
    assert data.channels == wanted.shape[1]
    for sample, image in zip(found, wanted * (1 - lowest) + lowest, strict=True):
        assert sample["image"].dtype == torch.float32
        assert lowest <= sample["image"].min() <= sample["image"].max() <= 1
        atol = (1e-5 if exact else 2 / 255) * (1 - lowest)
        torch.testing.assert_close(sample["image"].double(), image.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{"rotate": 90.0}, {"zoom": 0.5}, {"color": 0.9}, {"rotate": 20.0, "color": 0.5}])
def test_training_images_alone_are_augmented_within_their_range(
    host: LightningHost, options: dict[str, float], channels: int
) -> None:
    """And without strength, nothing is changed."""
    for strength in (options, {}):
        data = host.read(channels=channels, **strength)
        lowest = -1 if "points" in data.dataset("val")[0] else 0
        clean, augmented = data.dataset("train"), data.dataset("train", augment=True)
        changed = 0
        for one, other in zip(clean, augmented, strict=True):
            assert lowest <= other["image"].min() <= other["image"].max() <= 1
            assert (one["id"], one["image"].shape) == (other["id"], other["image"].shape)
            changed += not torch.equal(one["image"], other["image"])
        assert changed > 0.75 * len(clean) if strength else changed == 0
        for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
            images = torch.cat([batch["image"] for batch in loader])
            assert torch.equal(images, torch.stack([sample["image"] for sample in data.dataset(split)]))


# Tables


@pytest.mark.parametrize("layout", TABLES)
def test_tables_and_folders_of_other_names_and_files_with_and_without_suffix(tmp_path: Path, layout: Any) -> None:
    root = tmp_path / "own"
    make = write(root, layout)
    (root / "images" / "notes.txt").write_text("not an image")
    (root / "images").rename(root / "pictures")
    names = {"labels.csv": "table", "landmarks.csv": "table", "split.csv": "split_table"}
    options = {names[table]: f"my_{table}" for table in TABLES[layout]}
    for table in TABLES[layout]:
        text = (root / table).read_text()
        for image in FILES:
            text = text.replace(f"\n{image},", f"\n{image}.png,")
        (root / f"my_{table}").write_text(text)
        (root / table).unlink()
    data = make(images="pictures", **options)
    assert data.train_ids == ["a.png", "b.png"]
    np.testing.assert_array_equal(data.splits["val"].images, [root / "pictures" / f"{i}.png" for i in "cd"])


def lose(path: Path) -> None:
    path.rename(path.with_name("lost"))


Spoil = Callable[[Path], object]
SPOILT: list[tuple[str, Spoil, tuple[str, ...]]] = [
    ("images", lose, ("there is no folder of images ", "images")),
    ("images/b.png", lose, ("are not in ", "images: b")),
    ("images/b.png", lambda path: path.write_bytes(b"no"), ("b.png cannot be read as an image: ",)),
    (
        "images/b.png",
        lambda path: Image.new("L", (30, 20)).save(path),
        ("the images have 2 sizes (20 x 24, 20 x 30); set size to resize them to one",),
    ),
]


@pytest.mark.parametrize(("name", "spoil", "said"), SPOILT)
@pytest.mark.parametrize("layout", TABLES)
def test_mistakes_in_the_files(tmp_path: Path, layout: Any, name: str, spoil: Spoil, said: tuple[str, ...]) -> None:
    make = write(tmp_path / "own", layout)
    spoil(tmp_path / "own" / name)
    told(FileNotFoundError if spoil is lose else ValueError, make, *said)
    if "sizes" in said[0]:
        data = make(size=(8, 6))
        assert {sample["image"].shape for part in data.splits for sample in data.dataset(part)} == {(1, 8, 6)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image,": "file,"}, ("csv has no column image; there are file, ",)),
        ({",split": ",fold"}, ("csv has no column split; there are image, ",)),
        ({",train": ",dev", ",test": ","}, ("has the split(s) '', 'dev'; they must be train, val, test",)),
        ({",train": ",val"}, ("the data has no train images",)),
        ({",val": ",train"}, ("the data has no val images",)),
        ({"b,": "a,"}, (" more than once", " a")),
    ],
)
@pytest.mark.parametrize("layout", TABLES)
def test_mistakes_in_the_table_of_the_splits(
    tmp_path: Path, layout: Any, changes: Mapping[str, str], said: tuple[str, ...]
) -> None:
    make = write(tmp_path / "own", layout)
    path = tmp_path / "own" / [*TABLES[layout]][-1]
    text = path.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    told(ValueError, make, *said)


@pytest.mark.parametrize("layout", TABLES)
def test_tables_that_are_empty_or_missing(tmp_path: Path, layout: Any) -> None:
    make = write(tmp_path / "own", layout)
    for path in [tmp_path / "own" / table for table in reversed(TABLES[layout])]:
        path.write_text(path.read_text().splitlines()[0])
        told(ValueError, make, f"{path} has no column image, ", "; there are no rows")
        path.unlink()
        told(FileNotFoundError, make, f"there is no table {path}")


@pytest.mark.parametrize("layout", TABLES)
def test_tables_as_a_spreadsheet_writes_them(tmp_path: Path, layout: type[SampleData]) -> None:
    """With a mark of their encoding, and spaces."""
    make = write(tmp_path, layout)
    plain = make()
    for table in TABLES[layout]:
        path = tmp_path / table
        path.write_text("\ufeff" + path.read_text().replace(",", " , "), encoding="utf-8")
    data = make()
    for split, part in plain.splits.items():
        assert data.splits[split].ids == part.ids
        for own, wanted in zip(data.dataset(split), plain.dataset(split), strict=True):
            assert own.keys() == wanted.keys()
            assert all(str(own[key]) == str(wanted[key]) for key in own)
