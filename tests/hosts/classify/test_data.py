"""Three layouts, what a batch holds, and every mistake in the data as one clear message before anything is trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from adv_classify.data import ImageFolder, ImageTable, MedMNIST
from helpers.classify import COUNTS, pictures, write_folders, write_npz, write_table
from helpers.mistakes import told

STILL: dict[str, Any] = {"flip": 0.0, "workers": 0}
LABELS = ("image", "label", "split")
Rows = list[dict[str, Any]]


@pytest.fixture
def medmnist(tmp_path: Path) -> Callable[..., MedMNIST]:
    def make(arrays: Any = None, **options: Any) -> MedMNIST:
        return MedMNIST(str(write_npz(tmp_path / "own.npz", **(arrays or {}))), **{**STILL, **options})

    return make


def rows(*given: tuple[Any, ...], columns: tuple[str, ...] = LABELS) -> Rows:
    return [dict(zip(columns, row, strict=True)) for row in given]


def some(*more: tuple[Any, ...]) -> Rows:
    """Two classes, and whatever else."""
    return rows(("a.png", 0, "train"), ("b.png", 1, "train"), ("c.png", 0, "val"), ("d.png", 1, "val"), *more)


# Layouts


def test_three_layouts(tmp_path: Path) -> None:
    """Of the same pictures but for folders; with ids that stay the same whatever is done with the images."""
    npz = str(write_npz(tmp_path / "own.npz"))
    table, folders = write_table(tmp_path / "table"), write_folders(tmp_path / "folders")
    (folders / "train" / "bee" / "deeper").mkdir()
    Image.new("L", (16, 16), 51).save(folders / "train" / "bee" / "deeper" / "9.JPG")
    (folders / "train" / "bee" / "notes.txt").write_text("not an image")
    inside = [f"train/{c}/{i}.png" for c in ("ant", "bee", "cat") for i in range(2)]
    inside.insert(4, "train/bee/deeper/9.JPG")
    for make, names, counts, ids, sample, stored in (
        (
            partial(MedMNIST, npz),
            ["0", "1", "2"],
            [8, 8, 8],
            [f"train/{i:06d}" for i in range(24)],
            ("val/000004", 1),
            lambda: np.load(npz)["val_images"][4],
        ),
        (
            partial(ImageTable, str(table)),
            ["a", "b", "c"],  # of the column dx
            [8, 8, 8],
            [f"train{i}.png" for i in range(24)],
            ("val4.png", 1),
            lambda: np.array(Image.open(table / "images" / "val4.png")),
        ),
        (
            partial(ImageFolder, str(folders)),
            ["ant", "bee", "cat"],
            [2, 3, 2],
            inside,
            ("val/cat/0.png", 2),
            lambda: np.array(Image.open(folders / "val" / "cat" / "0.png")),
        ),
    ):
        data = make(**STILL)
        assert (data.class_names, data.num_classes, data.class_counts, data.channels) == (names, 3, counts, 3)
        assert data.train_ids == ids
        found = data.dataset("val")[4]
        assert (found["id"], found["label"], found["image"].dtype) == (*sample, torch.float32)
        np.testing.assert_allclose(found["image"], stored().transpose(2, 0, 1) / np.float32(255), rtol=1e-6)
        other = make(size=8, flip=1.0, batch_size=3, sampler="balanced", channels=1, seed=4, workers=0)
        assert other.train_ids == ids
        label = {s["id"]: s["label"] for s in data.dataset("train")}
        for batch in other.train_dataloader():
            assert [label[i] for i in batch["id"]] == batch["label"].tolist()
            assert (batch["image"].shape[1:], batch["label"].dtype) == ((1, 8, 8), torch.int64)
    assert {split: len(MedMNIST(npz).dataset(split)) for split in COUNTS} == COUNTS
    assert torch.allclose(ImageFolder(str(folders), **STILL).dataset("train")[4]["image"], torch.tensor(0.2))


@pytest.mark.parametrize(
    ("labels", "classes", "names", "numbers"),
    [
        (("nv", "mel", "nv", "mel"), None, ["mel", "nv"], [1, 0]),
        (("nv", "mel", "nv", "mel"), ["nv", "mel"], ["nv", "mel"], [0, 1]),
        ((1, 0, 1, 0), None, ["0", "1"], [1, 0]),
        ((1, 0, 1, 0), ["no", "yes"], ["no", "yes"], [1, 0]),
    ],
)
def test_labels_of_a_table(tmp_path: Path, labels: Any, classes: Any, names: list[str], numbers: list[int]) -> None:
    """And of files that are named without suffix, in tables and folders of other names."""
    splits = ("train", "train", "val", "val")
    table = rows(*((f"{i}.png", label, split) for i, (label, split) in enumerate(zip(labels, splits, strict=True))))
    root = write_table(tmp_path / "own", table)
    (root / "images" / "notes.txt").write_text("not an image")
    (root / "other.csv").write_text((root / "labels.csv").read_text().replace(".png", ""))
    (root / "images").rename(root / "pictures")
    data = ImageTable(str(root), table="other.csv", images="pictures", classes=classes, **STILL)
    assert data.class_names == names
    assert data.splits["train"].labels.tolist() == numbers
    assert data.train_ids == ["0", "1"]


def test_named_classes_of_a_grey_file_without_test_images(medmnist: Any) -> None:
    images = pictures(np.arange(24) % 3)[..., 0]
    arrays = {"train_images": images, "val_images": images[:12], "test_images": None, "test_labels": None}
    data = medmnist(arrays, classes=["x", "y", "z"])
    assert (data.channels, list(data.splits), data.class_names) == (1, ["train", "val"], ["x", "y", "z"])
    np.testing.assert_allclose(data.dataset("train")[5]["image"][0], images[5] / np.float32(255), rtol=1e-6)


# Images


@pytest.mark.parametrize("stored", ["array", "file"])
@pytest.mark.parametrize("grey", [False, True])
def test_grey_images_become_colour_images_and_the_other_way_round(tmp_path: Path, stored: str, grey: bool) -> None:
    images = pictures(np.arange(24) % 3)
    if stored == "file":
        make = partial(ImageTable, str(write_table(tmp_path / "own", grey=grey)), **STILL)
    else:
        path = write_npz(tmp_path / "own.npz", train_images=images[..., 0] if grey else images)
        make = partial(MedMNIST, str(path), **STILL)
    own, one, three = (make(channels=channels).dataset("train")[1]["image"] for channels in (None, 1, 3))
    assert (len(own), len(one), len(three)) == (1 if grey else 3, 1, 3)
    if grey:
        assert torch.equal(one, own)
        assert torch.equal(three, own.expand(3, -1, -1))
    else:
        assert torch.equal(three, own)
        luma = (own * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
        torch.testing.assert_close(one, luma, rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize(("size", "wanted"), [(8, (8, 8)), ((8, 24), (8, 24)), (16, (16, 16)), (None, (16, 16))])
def test_images_are_resized(medmnist: Any, tmp_path: Path, size: Any, wanted: tuple[int, int]) -> None:
    data = medmnist(size=size)
    image = data.dataset("train")[3]["image"]
    assert tuple(image.shape) == (3, *wanted)
    stored = torch.from_numpy(np.load(data.file)["train_images"][3]).permute(2, 0, 1)
    expected = functional.resize(stored, list(wanted), antialias=True) if wanted != (16, 16) else stored
    torch.testing.assert_close(image, expected / 255)
    if size is not None:
        root = write_table(tmp_path / "own", some())
        Image.new("RGB", (40, 20)).save(root / "images" / "d.png")
        several = ImageTable(str(root), size=size, **STILL)
        assert {s["image"].shape for split in several.splits for s in several.dataset(split)} == {(3, *wanted)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        *({"flip": 1.0}, {"rotate": 90.0}, {"zoom": 0.5}, {"color": 0.9}),
        {"flip": 0.5, "rotate": 20.0, "zoom": 0.3, "color": 0.5},
    ],
)
def test_augmentation_changes_training_images_within_their_range(medmnist: Any, options: Any, channels: int) -> None:
    data = medmnist(channels=channels, **options)
    clean, augmented = data.dataset("train"), data.dataset("train", augment=True)
    changed = 0
    for i in range(24):
        image = augmented[i]["image"]
        assert 0 <= image.min() <= image.max() <= 1
        assert image.shape == clean[i]["image"].shape
        assert augmented[i]["id"] == clean[i]["id"]
        changed += not torch.equal(image, clean[i]["image"])
    assert changed > 18
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        images = torch.cat([batch["image"] for batch in loader])
        assert torch.equal(images, torch.stack([sample["image"] for sample in data.dataset(split)]))


def test_a_flip_is_horizontal_and_vertical_and_a_transform_of_the_users_takes_its_place(medmnist: Any) -> None:
    still = medmnist()
    assert still.transform is None
    clean = still.dataset("train")[0]["image"]
    for data, wanted in (
        (medmnist(flip=1.0), clean.flip(1, 2)),
        (medmnist(flip=1.0, transform=v2.RandomHorizontalFlip(1.0)), clean.flip(2)),
        (medmnist(transform=lambda image: image * 5 - 2), (clean * 5 - 2).clamp(0, 1)),
    ):
        assert torch.equal(data.dataset("train", augment=True)[0]["image"], wanted)
    assert ((clean * 5 - 2).clamp(0, 1).min(), (clean * 5 - 2).clamp(0, 1).max()) == (0, 1)


def test_the_balanced_sampler_draws_every_class_equally_often(medmnist: Any) -> None:
    labels = np.repeat([0, 1, 2], [160, 30, 10])[:, None]
    arrays = {"train_images": np.zeros((200, 16, 16), np.uint8), "train_labels": labels}
    loader = medmnist(arrays, sampler="balanced", batch_size=50).train_dataloader()
    batches = [batch for _ in range(6) for batch in loader]
    counts = Counter(int(label) for batch in batches for label in batch["label"])
    assert sum(counts.values()) == 1200
    assert all(abs(counts[k] - 400) < 5 * (1200 * 2 / 9) ** 0.5 for k in range(3))  # 5 standard deviations
    assert max(Counter(i for batch in batches[:4] for i in batch["id"]).values()) > 1
    plain = medmnist(arrays, batch_size=50).train_dataloader()
    assert Counter(int(k) for batch in plain for k in batch["label"]) == {0: 160, 1: 30, 2: 10}


# Mistakes


GREY = np.zeros((24, 16, 16), np.uint8)
KEYS = {"train_images": None, "val_labels": None}
NO_VAL = {"val_images": GREY[:0], "val_labels": np.zeros((0, 1), np.int64)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (KEYS, "is no MedMNIST file: it has no train_images, val_labels"),
        ({"train_labels": np.zeros((24, 14), np.int64)}, "is a multi-label set (14 labels an image)"),
        ({"train_images": np.zeros((24, 8, 8, 8, 1), np.uint8)}, "(volumes are not supported)"),
        ({"val_images": GREY.astype(np.float32)}, "must be uint8 of shape (N, H, W) or (N, H, W, 3), got float32"),
        ({"train_labels": np.zeros((20, 1), np.int64)}, "24 train_images and 20 labels"),
        ({"val_labels": np.full((12, 1), -1)}, "val has label(s) [-1], but there are 3 classes, 0 to 2"),
        ({"val_labels": np.full((12, 1), 4)}, "no training image of class(es) 3, 4"),
        ({"val_images": np.zeros((12, 8, 16), np.uint8)}, "the images have 2 sizes (8 x 16, 16 x 16); set size"),
        (NO_VAL, "the data has no val images"),
    ],
)
def test_mistakes_in_a_medmnist_file(medmnist: Any, arrays: dict[str, Any], message: str) -> None:
    told(ValueError, lambda: medmnist(arrays), message)


@pytest.mark.parametrize("kind", ["text", "truncated", "one array", "empty"])
def test_a_file_that_is_no_npz(tmp_path: Path, kind: str) -> None:
    path = write_npz(tmp_path / "own.npz")
    content = {"text": b"image,label,split", "truncated": path.read_bytes()[:2000], "empty": b""}
    if kind == "one array":
        with path.open("wb") as file:
            np.save(file, GREY)
    else:
        path.write_bytes(content[kind])
    told(ValueError, lambda: MedMNIST(str(path), **STILL), f"{path} is no .npz file")


def broken(root: Path) -> None:
    (root / "images" / "b.png").write_bytes(b"no picture")


def short(root: Path) -> None:
    (root / "labels.csv").write_text("image,label,split\na.png,0,train\nb.png,1\nc.png\n")


@pytest.mark.parametrize(
    ("table", "spoil", "message"),
    [
        (rows(("a.png", "train"), columns=("image", "split")), None, "has no column label; there are image, split"),
        (
            rows(("a.png", 0, "train"), columns=("image", "class", "fold")),
            None,
            "has no column label, split; there are image, class, fold",
        ),
        (
            some(("e.png", 0, "training"), ("f.png", 0, "")),
            None,
            "has the split(s) '', 'training'; they must be train, val, test",
        ),
        (some(("e.png", -1, "train")), None, "train has label(s) [-1], but there are 2 classes"),
        (some(("e.png", 3, "test")), None, "no training image of class(es) 2, 3"),
        (some(("a.png", 0, "train")), None, "train has the same image more than once, such as a"),
        (some()[:2], None, "the data has no val images"),
        (some()[2:], None, "the data has no train images"),
        (some(), broken, "b.png cannot be read as an image"),
        (some(), short, "has no image, label or split in line(s) 3, 4"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, table: Rows, spoil: Callable[[Path], None] | None, message: str) -> None:
    root = write_table(tmp_path / "own", table)
    if spoil is not None:
        spoil(root)
    told(ValueError, lambda: ImageTable(str(root), **STILL), message)


def test_images_of_a_table_that_are_missing_or_cannot_be_decoded(tmp_path: Path) -> None:
    root = write_table(tmp_path / "own")
    lost = [f"train{i}.png" for i in range(3, 20)] + ["val0.png", "test1.png"]
    for name in lost:
        (root / "images" / name).unlink()
    told(FileNotFoundError, lambda: ImageTable(str(root), **STILL), "19 of 45 images", str(root / "images"), *lost)
    root = write_table(tmp_path / "other", some())
    broken(root)
    data = ImageTable(str(root), size=8, channels=3, **STILL)  # with a size, images are not looked at before
    told(ValueError, lambda: data.dataset("train")[1], "b.png cannot be read as an image")


def test_names_that_are_not_among_the_classes(tmp_path: Path, medmnist: Any) -> None:
    names, numbers = (
        rows(("a.png", a, "train"), ("b.png", b, "train"), ("c.png", c, "val"))
        for a, b, c in (("nv", "mel", "bkl"), (0, 1, 2))
    )
    for folder, table, parts in (
        ("names", names, ("label(s) bkl", "['nv', 'mel']")),
        ("numbers", numbers, ("val has label(s) [2]", "2 classes")),
    ):
        root = str(write_table(tmp_path / folder, table))
        told(ValueError, lambda root=root: ImageTable(root, classes=["nv", "mel"], **STILL), *parts)
    told(ValueError, lambda: medmnist(classes=["x", "y"]), "train has label(s) [2], but there are 2 classes, 0 to 1")


def test_places_that_are_missing_or_too_many(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    table = str(write_table(tmp_path / "table", some()))
    alone = str(write_folders(tmp_path / "train only", ("train",)))
    for make, *parts in (
        (partial(MedMNIST, nowhere), "there is no file", nowhere),
        (partial(ImageTable, nowhere), "there is no table", nowhere),
        (partial(ImageFolder, nowhere), "there is no folder", nowhere),
        (partial(ImageTable, table, images="pictures"), "no folder of images", "pictures"),
        (partial(ImageFolder, alone), f"there is no folder {alone}/val", "train/CLASS"),
    ):
        told(FileNotFoundError, partial(make, **STILL), *parts)
    root = write_folders(tmp_path / "strangers")
    for name in ("dog", "elk"):
        (root / "val" / name).mkdir()
    told(ValueError, partial(ImageFolder, str(root), **STILL), "val has class(es) that train has not: dog, elk")
    root = write_folders(tmp_path / "empty")
    for path in (root / "train" / "bee").iterdir():
        path.unlink()
    told(ValueError, partial(ImageFolder, str(root), **STILL), "no training image of class(es) bee")
    Image.new("RGB", (30, 20)).save(root / "train" / "bee" / "0.png")
    told(ValueError, partial(ImageFolder, str(root), **STILL), "the images have 2 sizes (16 x 16, 20 x 30)")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 0, "batch_size must be >= 1, got 0"),
        ("channels", 2, "channels must be 1 or 3, got 2"),
        ("size", 0, "size must be >= 1, got 0"),
        ("size", (16, -4), "size must be >= 1, got (16, -4)"),
        ("flip", 1.5, "flip must be between 0 and 1, got 1.5"),
        ("flip", -0.1, "flip must be between 0 and 1, got -0.1"),
        ("rotate", 270.0, "rotate must be between 0 and 180, got 270.0"),
        ("zoom", 1.0, "zoom must be between 0 and 0.9, got 1.0"),
        ("color", math.nan, "color must be between 0 and 1, got nan"),
    ],
)
def test_options_out_of_their_range(medmnist: Any, name: str, value: Any, message: str) -> None:
    told(ValueError, lambda: medmnist(**{name: value}), message)
