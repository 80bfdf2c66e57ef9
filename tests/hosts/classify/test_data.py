"""Three layouts, labels, and the mistakes of classifiers' data alone; images and tables are tested for both hosts."""

from __future__ import annotations

import io
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

from adv_classify.data import ImageFolder, ImageTable, MedMNIST
from helpers.classify import COUNTS, write_folders, write_npz, write_table
from helpers.mistakes import told

STILL: dict[str, Any] = {"flip": 0.0, "workers": 0}
Rows = list[tuple[Any, Any, str]]
FOUR: Rows = [("a.png", 0, "train"), ("b.png", 1, "train"), ("c.png", 0, "val"), ("d.png", 1, "val")]


@pytest.fixture
def medmnist(tmp_path: Path) -> Callable[..., MedMNIST]:
    def make(arrays: Any = None, **options: Any) -> MedMNIST:
        return MedMNIST(str(write_npz(tmp_path / "own.npz", **(arrays or {}))), **{**STILL, **options})

    return make


def write_rows(root: Path, rows: Rows) -> Path:
    """A table of rows (image, label, split), and its images."""
    return write_table(root, [dict(zip(("image", "label", "split"), row, strict=True)) for row in rows])


# Layouts


def test_three_layouts(tmp_path: Path) -> None:
    """Of the same pictures but for folders; with ids that stay the same whatever is done with the images."""
    npz = str(write_npz(tmp_path / "own.npz"))
    table, folders = write_table(tmp_path / "table"), write_folders(tmp_path / "folders")
    (folders / "train" / "bee" / "deeper").mkdir()
    Image.new("RGB", (16, 16), (51, 51, 51)).save(folders / "train" / "bee" / "deeper" / "9.JPG")
    (folders / "train" / "bee" / "notes.txt").write_text("not an image")
    inside = [f"train/{c}/{i}.png" for c in ("ant", "bee", "cat") for i in range(2)]
    inside.insert(4, "train/bee/deeper/9.JPG")
    layouts: list[tuple[Any, ...]] = [
        (partial(MedMNIST, npz), "012", [8, 8, 8], [f"train/{i:06d}" for i in range(24)], ("val/000004", 1)),
        (partial(ImageTable, str(table)), "abc", [8, 8, 8], [f"train{i}.png" for i in range(24)], ("val4.png", 1)),
        (partial(ImageFolder, str(folders)), ["ant", "bee", "cat"], [2, 3, 2], inside, ("val/cat/0.png", 2)),
    ]
    files = (table / "images" / "val4.png", folders / "val" / "cat" / "0.png")
    stored = [np.load(npz)["val_images"][4], *(np.array(Image.open(path)) for path in files)]
    for (make, names, counts, ids, sample), pixels in zip(layouts, stored, strict=True):
        data = make(**STILL)
        assert (data.class_names, data.num_classes, data.class_counts, data.channels) == ([*names], 3, counts, 3)
        assert data.train_ids == ids
        found = data.dataset("val")[4]
        assert (found["id"], found["label"], found["image"].dtype) == (*sample, torch.float32)
        np.testing.assert_allclose(found["image"], pixels.transpose(2, 0, 1) / np.float32(255), rtol=1e-6)
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
        (("1.0", "0.0", "1", "0"), None, ["0", "1"], [1, 0]),  # as pandas writes them
        (("nan", "1+", "1+", "nan"), ["1+", "nan"], ["1+", "nan"], [1, 0]),
        (("0.5", "1.5", "0.5", "1.5"), ["0.5", "1.5"], ["0.5", "1.5"], [0, 1]),
    ],
)
def test_labels_of_a_table(tmp_path: Path, labels: Any, classes: Any, names: list[str], numbers: list[int]) -> None:
    root = write_rows(tmp_path / "own", [(row[0], label, row[2]) for row, label in zip(FOUR, labels, strict=True)])
    data = ImageTable(str(root), classes=classes, **STILL)
    assert data.class_names == names
    assert data.splits["train"].labels.tolist() == numbers


# Training images


def test_a_flip_is_horizontal_and_vertical_and_a_transform_of_the_users_takes_its_place(medmnist: Any) -> None:
    still = medmnist()
    assert still.transform is None
    clean = still.dataset("train")[0]["image"]
    for data, wanted in (
        (medmnist(flip=1.0), clean.flip(1, 2)),
        (medmnist(flip=1.0, transform=v2.RandomHorizontalFlip(1.0)), clean.flip(2)),
        (medmnist(transform=lambda image: image * 1.5 - 0.1), (clean * 1.5 - 0.1).clamp(0, 1)),
    ):
        assert torch.equal(data.dataset("train", augment=True)[0]["image"], wanted)
    assert ((clean * 1.5 - 0.1) < 0).any()


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.Normalize([0.5] * 3, [0.5] * 3), "as a normalisation does: leave it out, the network normalises"),
        (v2.Compose([v2.RandomApply([v2.Normalize([0.0] * 3, [1.0] * 3)])]), "as a normalisation does"),
        (lambda image: (image - image.mean()) / image.std(), "transform takes images out of [0, 1]"),
        (lambda image: image * 255, "transform takes images out of [0, 1]"),
        (v2.ToDtype(torch.uint8, scale=True), "must make a tensor of floating-point numbers, (C, H, W), of an image"),
        (v2.ToPILImage(), "got Image"),
        (v2.Grayscale(), "of shape (3, 16, 16), got torch.float32 of shape (1, 16, 16)"),
    ],
)
def test_transforms_that_are_no_augmentation(medmnist: Any, transform: Any, message: str) -> None:
    """A network that normalises its images itself was trained on black and white ones, and judged on others."""
    state = torch.get_rng_state()
    told(ValueError, lambda: medmnist(transform=transform), message)
    medmnist(transform=v2.Compose([v2.RandomRotation(20), v2.ColorJitter(0.5, 0.5), v2.GaussianNoise()]))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_balanced_sampler_draws_every_class_equally_often(medmnist: Any) -> None:
    labels = np.repeat([0, 1, 2], [160, 30, 10])[:, None]
    arrays = {"train_images": np.zeros((200, 16, 16), np.uint8), "train_labels": labels}
    medmnist = partial(medmnist, channels=1)
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
NO_VAL = {"val_images": GREY[:0], "val_labels": np.zeros((0, 1), np.int64)}


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"train_images": None, "val_labels": None}, {}, "is no MedMNIST file: it has no train_images, val_labels"),
        ({"train_labels": np.zeros((24, 14), np.int64)}, {}, "is a multi-label set (14 labels an image)"),
        ({"train_images": np.zeros((24, 8, 8, 8, 1), np.uint8)}, {}, "(volumes are not supported)"),
        ({"train_images": np.zeros((24, 8, 8, 8), np.uint8)}, {}, "of shape (24, 8, 8, 8) (volumes are not supported)"),
        (
            {"train_images": GREY},
            {},
            "the images are not alike (train in grey, val in colour, test in colour): set chan",
        ),
        ({"train_labels": np.array([*"abc"] * 8)}, {}, "train_labels of * must be whole numbers from 0, got <U1"),
        (
            {"val_labels": np.array([0, 1, 0.7] * 4)},
            {},
            "val_labels of * must be whole numbers from 0, got 0.7 for image 2",
        ),
        ({"val_labels": np.array([0, 1, np.nan] * 4)}, {}, "val_labels of * got nan for image 2"),
        ({"val_images": GREY.astype(np.float32)}, {}, "must be uint8 of shape (N, H, W) or (N, H, W, 3), got float32"),
        ({"train_labels": np.zeros((20, 1), np.int64)}, {}, "24 train_images and 20 labels"),
        ({"val_labels": np.full((12, 1), -1)}, {}, "val has label(s) [-1], but there are 3 classes, 0 to 2"),
        ({"val_labels": np.full((12, 1), 4)}, {}, "no training image of class(es) 3, 4"),
        ({"val_images": np.zeros((12, 8, 16), np.uint8)}, {}, "the images have 2 sizes (8 x 16, 16 x 16); set size"),
        (NO_VAL, {}, "the data has no val images"),
        ({}, {"classes": ["x", "y"]}, "train has label(s) [2], but there are 2 classes, 0 to 1"),
        ({}, {"flip": 1.5}, "flip must be between 0 and 1, got 1.5"),
        ({}, {"flip": -0.1}, "flip must be between 0 and 1, got -0.1"),
    ],
)
def test_mistakes_in_a_medmnist_file(medmnist: Any, arrays: dict[str, Any], options: Any, message: str) -> None:
    told(ValueError, lambda: medmnist(arrays, **options), *message.split("*"))


def test_labels_are_whole_numbers_of_whatever_type(medmnist: Any) -> None:
    labels = np.arange(24) % 3
    for kind in (np.float64, np.uint8, np.int16):
        assert medmnist({"train_labels": labels.astype(kind)}).splits["train"].labels.tolist() == labels.tolist()


def test_a_file_that_is_no_npz(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "own.npz")
    one = io.BytesIO()
    np.save(one, GREY)
    for content in (b"image,label,split", path.read_bytes()[:2000], b"", one.getvalue()):
        path.write_bytes(content)
        told(ValueError, lambda: MedMNIST(str(path), **STILL), f"{path} is no .npz file")
    path.unlink()
    told(FileNotFoundError, lambda: MedMNIST(str(path), **STILL), f"there is no file {path}")


@pytest.mark.parametrize(
    ("rows", "classes", "message"),
    [
        ([*FOUR, ("e.png", -1, "train")], None, "train has label(s) [-1], but there are 2 classes"),
        ([*FOUR, ("e.png", 3, "test")], None, "no training image of class(es) 2, 3"),
        ([*FOUR, ("e.png", 2, "val")], ["nv", "mel"], "val has label(s) [2], but there are 2 classes"),
        ([*FOUR, ("e.png", "bkl", "val")], ["0", "1"], "has label(s) bkl that are not among classes ['0', '1']"),
        ([*FOUR, ("e.png", "nan", "train")], None, "has no image or label in line(s) 6"),
        ([*FOUR, ("e.png", "NA", "train")], ["0", "1"], "has no image or label in line(s) 6"),
        ([*FOUR, ("e.png", "a", "train")], None, "has the label 'a' in line 6, beside others of another"),
        ([*FOUR, ("e.png", 0.7, "val")], None, "has the label '0.7' in line 6, beside others of another"),
        ([(f"{k}.png", k / 2, "train") for k in range(1, 8, 2)], None, "has the label '0.5' in line 2"),
        ([("a.png", "1", "train"), *((f"{k}.png", f"c{k}", "train") for k in range(3))], None, "label '1' in line 2"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, rows: Rows, classes: Any, message: str) -> None:
    root = write_rows(tmp_path / "own", rows)
    told(ValueError, lambda: ImageTable(str(root), classes=classes, **STILL), message)


def test_a_class_has_one_name(tmp_path: Path) -> None:
    root = write_rows(tmp_path / "own", FOUR)
    (root / "labels.csv").write_text("image,label,dx,split\na,0,nv,train\nb,1,mel,train\nc,0,mel,val\nd,1,mel,val\n")
    said = "calls class 0 'mel' in line 4, and 'nv' before that"
    told(ValueError, lambda: ImageTable(str(root), **STILL), said)


def test_what_else_a_table_and_its_images_lack(tmp_path: Path) -> None:
    root = write_table(tmp_path / "own")
    make = partial(ImageTable, str(root), **STILL)
    picture = root / "images" / "test2.png"
    content = picture.read_bytes()
    picture.write_bytes(b"no picture")
    for options in ({}, {"size": 8, "channels": 3}):
        told(ValueError, lambda options=options: make(**options), "test2.png cannot be read as an image")
    picture.write_bytes(content)
    lost = [f"train{i}.png" for i in range(3, 20)] + ["val0.png", "test1.png"]
    for name in lost:
        (root / "images" / name).unlink()
    told(FileNotFoundError, make, "19 of 45 images", str(root / "images"), *lost)
    for text, message in (
        ("image,class,fold\na.png,0,train\n", "has no column label, split; there are image, class, fold"),
        ("image,label,split\na.png,0,train\nb.png\n,1,val\n", "has no image or label in line(s) 3, 4"),
    ):
        (root / "labels.csv").write_text(text)
        told(ValueError, make, message)


def test_folders_that_are_spoilt_or_missing(tmp_path: Path) -> None:
    make = partial(ImageFolder, str(tmp_path), **STILL)
    told(FileNotFoundError, make, f"there is no folder {tmp_path}/train; ", "train/CLASS")
    write_folders(tmp_path, ("train",))
    told(FileNotFoundError, make, f"there is no folder {tmp_path}/val; ", "train/CLASS")
    write_folders(tmp_path, ("val",))
    for path in (tmp_path / "train" / "bee").iterdir():
        path.unlink()
    told(ValueError, make, "no training image of class(es) bee")
    for name in (
        "bee/.ipynb_checkpoints/0.png",
        "bee/._0.png",
        ".ipynb_checkpoints/0.png",
    ):  # are no images, nor classes
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "train" / name)
    told(ValueError, make, "no training image of class(es) bee")
    Image.new("RGB", (30, 20)).save(tmp_path / "train" / "bee" / "0.png")
    told(ValueError, make, "the images have 2 sizes (16 x 16, 20 x 30)")
    (tmp_path / "val" / "cat" / "1.jp2").write_bytes(b"")
    (tmp_path / "train" / "cat" / "2.heic").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 file\(s\) are left out, such as .*train/cat/2.heic"):
        assert make(size=(9, 8)).image_size == (9, 8)
    (tmp_path / "val" / "cat" / "1.dcm").write_bytes(b"")
    told(ValueError, make, "1 file(s) are DICOM, which is not read, such as ", "val/cat/1.dcm")
    for path in tmp_path.glob("*/cat/*.[!p]*"):
        path.unlink()
    for name in ("dog", "elk"):
        (tmp_path / "val" / name).mkdir()
    told(ValueError, make, "val has class(es) that train has not: dog, elk")
