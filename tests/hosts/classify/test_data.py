"""Three layouts, what a batch holds, and every mistake in the data as one clear message before anything is trained."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from adv_classify.data import ClassificationData, ImageFolder, ImageTable, MedMNIST

STILL: dict[str, Any] = {"flip": 0.0, "workers": 0}
LABELS = ("image", "label", "split")


@pytest.fixture
def medmnist(tmp_path: Path, tools: Any) -> Callable[..., MedMNIST]:
    def make(counts: dict[str, int] | None = None, arrays: Any = None, **options: Any) -> MedMNIST:
        path = tools.write_npz(tmp_path / "own.npz", counts, **(arrays or {}))
        return MedMNIST(str(path), **{**STILL, **options})

    return make


def rows(*given: tuple[Any, ...], columns: tuple[str, ...] = LABELS) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in given]


def some(*more: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Two classes, and whatever else."""
    return rows(("a.png", 0, "train"), ("b.png", 1, "train"), ("c.png", 0, "val"), ("d.png", 1, "val"), *more)


# Layouts


def test_a_medmnist_file(medmnist: Any, tools: Any) -> None:
    data = medmnist()
    assert data.class_names == ["0", "1", "2"]
    assert data.num_classes == 3
    assert data.channels == 3
    assert data.class_counts == [8, 8, 8]
    assert {split: len(data.dataset(split)) for split in data.splits} == tools.COUNTS
    assert data.train_ids == [f"train/{i:06d}" for i in range(24)]
    sample = data.dataset("val")[4]
    assert (sample["id"], sample["label"]) == ("val/000004", 1)
    stored = np.load(data.file)["val_images"][4]
    assert sample["image"].dtype == torch.float32
    np.testing.assert_allclose(sample["image"].numpy(), stored.transpose(2, 0, 1).astype(np.float32) / 255, rtol=1e-6)


def test_a_grey_medmnist_file_with_names(medmnist: Any, tools: Any) -> None:
    images = tools.pictures(np.arange(24) % 3)[..., 0]
    arrays = {"train_images": images, "val_images": images[:12], "test_images": None, "test_labels": None}
    data = medmnist(arrays=arrays)
    assert data.channels == 1
    assert list(data.splits) == ["train", "val"]
    np.testing.assert_allclose(
        data.dataset("train")[5]["image"][0].numpy(), images[5].astype(np.float32) / 255, rtol=1e-6
    )
    named = MedMNIST(str(data.file), classes=["x", "y", "z"], **STILL)
    assert named.class_names == ["x", "y", "z"]


def test_a_table(tmp_path: Path, tools: Any) -> None:
    root = tools.write_table(tmp_path / "own")
    data = ImageTable(str(root), **STILL)
    assert data.class_names == ["a", "b", "c"]  # of the column dx
    assert {split: len(data.dataset(split)) for split in data.splits} == tools.COUNTS
    assert data.train_ids == [f"train{i}.png" for i in range(24)]
    sample = data.dataset("test")[2]
    assert (sample["id"], sample["label"]) == ("test2.png", 2)
    stored = np.array(Image.open(root / "images" / "test2.png"))
    np.testing.assert_allclose(sample["image"].numpy(), stored.transpose(2, 0, 1).astype(np.float32) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "classes", "names", "numbers"),
    [
        (("nv", "mel", "nv", "mel"), None, ["mel", "nv"], [1, 0]),
        (("nv", "mel", "nv", "mel"), ["nv", "mel"], ["nv", "mel"], [0, 1]),
        ((1, 0, 1, 0), None, ["0", "1"], [1, 0]),
        ((1, 0, 1, 0), ["no", "yes"], ["no", "yes"], [1, 0]),
    ],
)
def test_labels_of_a_table(
    tmp_path: Path, tools: Any, labels: tuple[Any, ...], classes: list[str] | None, names: list[str], numbers: list[int]
) -> None:
    splits = ("train", "train", "val", "val")
    table = rows(*((f"{i}.png", label, split) for i, (label, split) in enumerate(zip(labels, splits, strict=True))))
    data = ImageTable(str(tools.write_table(tmp_path / "own", table)), classes=classes, **STILL)
    assert data.class_names == names
    assert data.splits["train"].labels.tolist() == numbers


def test_a_table_need_not_name_suffixes(tmp_path: Path, tools: Any) -> None:
    root = tools.write_table(tmp_path / "own", some())
    (root / "images" / "notes.txt").write_text("not an image")
    text = (root / "labels.csv").read_text()
    (root / "other.csv").write_text(text.replace(".png", ""))
    (root / "images").rename(root / "pictures")
    data = ImageTable(str(root), table="other.csv", images="pictures", **STILL)
    assert data.train_ids == ["a", "b"]
    assert [sample["label"] for sample in data.dataset("val")] == [0, 1]


def test_folders(tmp_path: Path, tools: Any) -> None:
    root = tools.write_folders(tmp_path / "own")
    (root / "train" / "bee" / "deeper").mkdir()
    Image.new("L", (16, 16), 51).save(root / "train" / "bee" / "deeper" / "9.JPG")
    (root / "train" / "bee" / "notes.txt").write_text("not an image")
    data = ImageFolder(str(root), **STILL)
    assert data.class_names == ["ant", "bee", "cat"]
    assert data.class_counts == [2, 3, 2]
    assert data.channels == 3
    wanted = ["train/ant/0.png", "train/ant/1.png", "train/bee/0.png", "train/bee/1.png", "train/bee/deeper/9.JPG"]
    assert data.train_ids[:5] == wanted
    assert data.splits["train"].labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert torch.allclose(data.dataset("train")[4]["image"], torch.tensor(0.2))


@pytest.mark.parametrize("layout", ["npz", "table", "folders"])
def test_ids_are_the_same_whatever_is_done_with_the_images(tmp_path: Path, tools: Any, layout: str) -> None:
    def made(**options: Any) -> ClassificationData:
        given = {**STILL, **options}
        if layout == "npz":
            return MedMNIST(str(tools.write_npz(tmp_path / "own.npz")), **given)
        kind, write = (ImageTable, tools.write_table) if layout == "table" else (ImageFolder, tools.write_folders)
        root = tmp_path / layout
        return kind(str(root if root.exists() else write(root)), **given)

    first = made()
    other = made(size=8, flip=1.0, batch_size=3, sampler="balanced", channels=1, seed=4)
    assert first.train_ids == other.train_ids
    assert len(set(first.train_ids)) == len(first.train_ids)
    label = {sample["id"]: sample["label"] for sample in first.dataset("train")}
    batches = list(other.train_dataloader())
    assert {i: int(k) for batch in batches for i, k in zip(batch["id"], batch["label"], strict=True)}.items() <= set(
        label.items()
    )


# Images


@pytest.mark.parametrize("stored", ["array", "file"])
@pytest.mark.parametrize("grey", [False, True])
def test_grey_images_become_colour_images_and_the_other_way_round(
    tmp_path: Path, tools: Any, stored: str, grey: bool
) -> None:
    def made(channels: int | None) -> ClassificationData:
        if stored == "file":
            root = tmp_path / "own"
            return ImageTable(
                str(root if root.exists() else tools.write_table(root, grey=grey)), channels=channels, **STILL
            )
        images = tools.pictures(np.arange(24) % 3)
        path = tools.write_npz(tmp_path / "own.npz", train_images=images[..., 0] if grey else images)
        return MedMNIST(str(path), channels=channels, **STILL)

    own = made(None).dataset("train")[1]["image"]
    assert len(own) == (1 if grey else 3)
    one, three = (made(channels).dataset("train")[1]["image"] for channels in (1, 3))
    assert (len(one), len(three)) == (1, 3)
    if grey:
        assert torch.equal(one, own)
        assert torch.equal(three, own.expand(3, -1, -1))
    else:
        assert torch.equal(three, own)
        luma = (own * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
        torch.testing.assert_close(one, luma, rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize(("size", "wanted"), [(8, (8, 8)), ((8, 24), (8, 24)), (16, (16, 16)), (None, (16, 16))])
def test_images_are_resized(medmnist: Any, size: Any, wanted: tuple[int, int]) -> None:
    data = medmnist(size=size)
    image = data.dataset("train")[3]["image"]
    assert tuple(image.shape) == (3, *wanted)
    stored = torch.from_numpy(np.load(data.file)["train_images"][3]).permute(2, 0, 1)
    expected = functional.resize(stored, list(wanted), antialias=True) if wanted != (16, 16) else stored
    torch.testing.assert_close(image, expected / 255)


def test_images_of_several_sizes_with_a_size(tmp_path: Path, tools: Any) -> None:
    root = tools.write_table(tmp_path / "own", some())
    Image.new("RGB", (40, 20)).save(root / "images" / "d.png")
    data = ImageTable(str(root), size=(10, 12), **STILL)
    assert {tuple(sample["image"].shape) for split in ("train", "val") for sample in data.dataset(split)} == {
        (3, 10, 12)
    }


@pytest.mark.parametrize(
    "options",
    [
        {"flip": 1.0},
        {"rotate": 90.0},
        {"zoom": 0.5},
        {"color": 0.9},
        {"flip": 0.5, "rotate": 20.0, "zoom": 0.3, "color": 0.5},
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_changes_training_images_within_their_range(
    medmnist: Any, options: dict[str, float], channels: int
) -> None:
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
    for split in ("val", "test"):
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
        images = torch.cat([batch["image"] for batch in loader])
        assert torch.equal(images, torch.stack([sample["image"] for sample in data.dataset(split)]))


def test_a_flip_is_horizontal_and_vertical(medmnist: Any) -> None:
    data = medmnist(flip=1.0)
    image = data.dataset("train", augment=True)[0]["image"]
    assert torch.equal(image, data.dataset("train")[0]["image"].flip(1, 2))
    assert medmnist(flip=0.0).transform is None


def test_a_transform_of_the_users_takes_the_place_of_the_others(medmnist: Any) -> None:
    data = medmnist(flip=1.0, transform=v2.RandomHorizontalFlip(1.0))
    assert torch.equal(data.dataset("train", augment=True)[0]["image"], data.dataset("train")[0]["image"].flip(2))
    wild = medmnist(transform=lambda image: image * 5 - 2)
    image = wild.dataset("train", augment=True)[0]["image"]
    assert (image.min(), image.max()) == (0, 1)


# Batches


def test_a_batch(medmnist: Any) -> None:
    data = medmnist(batch_size=10)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (10, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert [int(i.removeprefix("train/")) % 3 for i in batch["id"]] == batch["label"].tolist()
    assert [len(batch["id"]) for batch in data.val_dataloader()] == [10, 2]
    assert [i for batch in data.val_dataloader() for i in batch["id"]] == [f"val/{i:06d}" for i in range(12)]


def test_a_last_batch_of_one_image_is_left_out_in_training(medmnist: Any) -> None:
    """BatchNorm cannot work with it."""
    for count, sizes in ((17, [8, 8]), (18, [8, 8, 2]), (16, [8, 8])):
        data = medmnist({"train": count, "val": 9, "test": 9}, batch_size=8)
        assert [len(batch["id"]) for batch in data.train_dataloader()] == sizes
        assert [len(batch["id"]) for batch in data.val_dataloader()] == [8, 1]
    assert len(medmnist(batch_size=1).train_dataloader()) == 24


def order(data: ClassificationData, epochs: int = 1, loader: Any = None) -> list[list[str]]:
    loader = loader or data.train_dataloader()
    return [[i for batch in loader for i in batch["id"]] for _ in range(epochs)]


def test_shuffled_images_come_once_an_epoch_in_an_order_of_their_seed(medmnist: Any) -> None:
    first = order(medmnist(seed=3), 3)
    assert order(medmnist(seed=3), 3) == first
    assert len({tuple(epoch) for epoch in first}) == 3
    assert all(sorted(epoch) == medmnist().train_ids for epoch in first)
    assert order(medmnist(seed=4), 3) != first


def test_the_order_goes_on_where_a_saved_state_ends(medmnist: Any) -> None:
    data = medmnist(seed=3, flip=0.5)
    loader = data.train_dataloader()
    order(data, 2, loader)
    state = data.state_dict()
    wanted = [(batch["id"], batch["image"]) for batch in loader]
    resumed = medmnist(seed=3, flip=0.5)
    resumed.load_state_dict(state)
    for (ids, images), batch in zip(wanted, resumed.train_dataloader(), strict=True):
        assert ids == batch["id"]
        assert torch.equal(images, batch["image"])


def test_the_balanced_sampler_draws_every_class_equally_often(medmnist: Any) -> None:
    labels = np.repeat([0, 1, 2], [160, 30, 10])[:, None]
    images = np.zeros((200, 16, 16), np.uint8)
    data = medmnist(
        arrays={"train_images": images, "train_labels": labels},
        sampler="balanced",
        batch_size=50,
    )
    loader = data.train_dataloader()
    drawn = [int(label) for _ in range(6) for batch in loader for label in batch["label"]]
    assert len(drawn) == 1200
    counts = Counter(drawn)
    assert all(abs(counts[k] - 400) < 5 * (1200 * 2 / 9) ** 0.5 for k in range(3))  # 5 standard deviations
    ids = Counter(itertools.chain(*order(data)))
    assert max(ids.values()) > 1
    plain = medmnist(arrays={"train_images": images, "train_labels": labels}, batch_size=50)
    assert Counter(int(k) for batch in plain.train_dataloader() for k in batch["label"]) == {0: 160, 1: 30, 2: 10}


def test_workers_read_the_same_images(medmnist: Any) -> None:
    alone = next(iter(medmnist(batch_size=12).val_dataloader()))
    helped = next(iter(medmnist(batch_size=12, workers=1).val_dataloader()))
    assert alone["id"] == helped["id"]
    assert torch.equal(alone["image"], helped["image"])


def test_predictions_are_of_test_images_where_there_are_some(medmnist: Any) -> None:
    def first(data: ClassificationData) -> str:
        return next(iter(data.predict_dataloader()))["id"][0]

    assert first(medmnist()) == "test/000000"
    assert first(medmnist({"train": 9, "val": 6})) == "val/000000"
    with pytest.raises(ValueError, match="the data has no split 'test'; there are train, val"):
        medmnist({"train": 9, "val": 6}).test_dataloader()


# Mistakes


def told(error: type[Exception], make: Callable[[], object], *parts: str) -> None:
    """The mistake is one line, with all that matters in it."""
    with pytest.raises(error) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


GREY = np.zeros((24, 16, 16), np.uint8)
BAD_ARRAYS = {
    "no keys": (
        {"train_images": None, "val_labels": None},
        ["is no MedMNIST file: it has no train_images, val_labels"],
    ),
    "multi-label": ({"train_labels": np.zeros((24, 14), np.int64)}, ["is a multi-label set (14 labels an image)"]),
    "volumes": ({"train_images": np.zeros((24, 8, 8, 8, 1), np.uint8)}, ["train_images", "volumes are not supported"]),
    "floats": ({"val_images": GREY.astype(np.float32)}, ["val_images", "must be uint8", "float32"]),
    "too few labels": ({"train_labels": np.zeros((20, 1), np.int64)}, ["24 train_images and 20 labels"]),
    "negative label": (
        {"val_labels": np.full((12, 1), -1)},
        ["val has label(s) [-1], but there are 3 classes, 0 to 2"],
    ),
    "class without training images": ({"val_labels": np.full((12, 1), 4)}, ["no training image of class(es) 3, 4"]),
    "sizes": ({"val_images": np.zeros((12, 8, 16), np.uint8)}, ["the images have 2 sizes (8 x 16, 16 x 16); set size"]),
    "no validation images": (
        {"val_images": GREY[:0], "val_labels": np.zeros((0, 1), np.int64)},
        ["the data has no val images"],
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_mistakes_in_a_medmnist_file(medmnist: Any, name: str) -> None:
    arrays, parts = BAD_ARRAYS[name]
    told(ValueError, lambda: medmnist(arrays=arrays), *parts)


def test_labels_above_the_classes_that_are_named(medmnist: Any) -> None:
    told(ValueError, lambda: medmnist(classes=["x", "y"]), "train has label(s) [2], but there are 2 classes, 0 to 1")


@pytest.mark.parametrize("kind", ["text", "truncated", "one array", "empty"])
def test_a_file_that_is_no_npz(tmp_path: Path, tools: Any, kind: str) -> None:
    path = tools.write_npz(tmp_path / "own.npz")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, GREY)
    else:
        path.write_bytes(b"" if kind == "empty" else b"image,label,split")
    told(ValueError, lambda: MedMNIST(str(path), **STILL), f"{path} is no .npz file")


def broken(root: Path) -> None:
    (root / "images" / "b.png").write_bytes(b"no picture")


def cut(root: Path) -> None:
    path = root / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:-200])


def short(root: Path) -> None:
    (root / "labels.csv").write_text("image,label,split\na.png,0,train\nb.png,1\nc.png\n")


BAD_TABLES: dict[str, tuple[Any, Callable[[Path], None] | None, list[str]]] = {
    "no label column": (
        rows(("a.png", "train"), columns=("image", "split")),
        None,
        ["has no column label; there are image, split"],
    ),
    "wrong columns": (
        rows(("a.png", 0, "train"), columns=("image", "class", "fold")),
        None,
        ["has no column label, split; there are image, class, fold"],
    ),
    "unknown split": (
        some(("e.png", 0, "training"), ("f.png", 0, "")),
        None,
        ["has the split(s) '', 'training'; they must be train, val, test"],
    ),
    "negative label": (some(("e.png", -1, "train")), None, ["train has label(s) [-1], but there are 2 classes"]),
    "class without training images": (
        some(("e.png", 3, "test")),
        None,
        ["no training image of class(es) 2, 3"],
    ),
    "the same image twice": (some(("a.png", 0, "train")), None, ["train has the same image more than once, such as a"]),
    "no validation images": (some()[:2], None, ["the data has no val images"]),
    "no training images": (some()[2:], None, ["the data has no train images"]),
    "broken image": (some(), broken, ["b.png cannot be read as an image"]),
    "short rows": (some(), short, ["has no image, label or split in line(s) 3, 4"]),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_mistakes_in_a_table(tmp_path: Path, tools: Any, name: str) -> None:
    table, spoil, parts = BAD_TABLES[name]
    root = tools.write_table(tmp_path / "own", table)
    if spoil is not None:
        spoil(root)
    told(ValueError, lambda: ImageTable(str(root), **STILL), *parts)


@pytest.mark.parametrize("spoil", [broken, cut])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, tools: Any, spoil: Callable[[Path], None]) -> None:
    """With a size to resize to, images are not looked at before; and a header may be all that is left of one."""
    root = tools.write_table(tmp_path / "own", some())
    spoil(root)
    data = ImageTable(str(root), size=8, channels=3, **STILL)
    told(ValueError, lambda: data.dataset("train")[1], "b.png cannot be read as an image")


def test_images_of_16_bits_keep_their_greys(tmp_path: Path, tools: Any) -> None:
    """Cut off at 255, as Pillow converts them, they would be white."""
    root = tools.write_table(tmp_path / "own", some())
    ramp = np.linspace(0, 65535, 8 * 8).reshape(8, 8).astype(np.uint16)
    for path in (root / "images").iterdir():
        Image.fromarray(ramp).save(path)
    for channels in (1, 3):
        image = ImageTable(str(root), channels=channels, **STILL).dataset("train")[0]["image"]
        assert image.shape == (channels, 8, 8)
        np.testing.assert_allclose(image.numpy(), np.broadcast_to(ramp / 65535, image.shape), atol=1e-5)


def test_all_missing_images_are_listed(tmp_path: Path, tools: Any) -> None:
    root = tools.write_table(tmp_path / "own")
    lost = [f"train{i}.png" for i in range(3, 20)] + ["val0.png", "test1.png"]
    for name in lost:
        (root / "images" / name).unlink()
    told(FileNotFoundError, lambda: ImageTable(str(root), **STILL), "19 of 45 images", str(root / "images"), *lost)


def test_names_that_are_not_among_the_classes(tmp_path: Path, tools: Any) -> None:
    table = rows(("a.png", "nv", "train"), ("b.png", "mel", "train"), ("c.png", "bkl", "val"))
    root = tools.write_table(tmp_path / "own", table)
    told(ValueError, lambda: ImageTable(str(root), classes=["nv", "mel"], **STILL), "label(s) bkl", "['nv', 'mel']")
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([LABELS, ("a.png", 0, "train"), ("b.png", 1, "train"), ("c.png", 2, "val")])
    told(ValueError, lambda: ImageTable(str(root), classes=["nv", "mel"], **STILL), "val has label(s) [2]", "2 classes")


@pytest.mark.parametrize(
    ("kind", "what"),
    [(MedMNIST, "there is no file"), (ImageTable, "there is no table"), (ImageFolder, "there is no folder")],
)
def test_there_is_no_such_place(tmp_path: Path, kind: Any, what: str) -> None:
    told(FileNotFoundError, lambda: kind(str(tmp_path / "nowhere"), **STILL), what, str(tmp_path / "nowhere"))


def test_folders_that_are_missing_or_too_many(tmp_path: Path, tools: Any) -> None:
    root = tools.write_table(tmp_path / "table", some())
    told(
        FileNotFoundError, lambda: ImageTable(str(root), images="pictures", **STILL), "no folder of images", "pictures"
    )
    root = tools.write_folders(tmp_path / "train only", ("train",))
    told(FileNotFoundError, lambda: ImageFolder(str(root), **STILL), f"there is no folder {root}/val", "train/CLASS")
    root = tools.write_folders(tmp_path / "strangers")
    for name in ("dog", "elk"):
        (root / "val" / name).mkdir()
    told(ValueError, lambda: ImageFolder(str(root), **STILL), "val has class(es) that train has not: dog, elk")
    root = tools.write_folders(tmp_path / "empty")
    for path in (root / "train" / "bee").iterdir():
        path.unlink()
    told(ValueError, lambda: ImageFolder(str(root), **STILL), "no training image of class(es) bee")
    Image.new("RGB", (30, 20)).save(root / "train" / "bee" / "0.png")
    told(ValueError, lambda: ImageFolder(str(root), **STILL), "the images have 2 sizes (16 x 16, 20 x 30)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"size": 0}, "size must be >= 1, got 0"),
        ({"size": (16, -4)}, "size must be >= 1, got (16, -4)"),
        ({"flip": 1.5}, "flip must be between 0 and 1, got 1.5"),
        ({"flip": -0.1}, "flip must be between 0 and 1, got -0.1"),
        ({"rotate": 270.0}, "rotate must be between 0 and 180, got 270.0"),
        ({"zoom": 1.0}, "zoom must be between 0 and 0.9, got 1.0"),
        ({"color": float("nan")}, "color must be between 0 and 1, got nan"),
    ],
)
def test_options_out_of_their_range(medmnist: Any, options: dict[str, Any], message: str) -> None:
    told(ValueError, lambda: medmnist(**options), message)


def test_an_image_of_every_kind_is_read(tmp_path: Path, tools: Any) -> None:
    """Palettes, transparency, CMYK, JPEG and TIFF, as they come."""
    root = tools.write_table(tmp_path / "own", some())
    for mode, name in (("P", "b.png"), ("RGBA", "c.png")):
        Image.new(mode, (16, 16)).save(root / "images" / name)
    (root / "images" / "d.png").unlink()
    Image.new("CMYK", (16, 16)).save(root / "images" / "d.tif")
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(text.replace("d.png", "d.tif"))
    data = ImageTable(str(root), **STILL)
    images: list[Tensor] = [sample["image"] for split in ("train", "val") for sample in data.dataset(split)]
    assert {tuple(image.shape) for image in images} == {(3, 16, 16)}
