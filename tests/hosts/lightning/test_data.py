"""Images of either host's data, whatever they are read from, and the mistakes in a table that both tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from adv_classify.data import ImageTable, MedMNIST, Samples
from adv_landmark.data import LandmarkTable
from advmed.integrations.lightning import SampleData, images
from advmed.integrations.lightning.data import check_distinct
from advmed.integrations.lightning.images import read_image
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
            images = {name: image for batch in loader for name, image in zip(batch["id"], batch["image"], strict=True)}
            assert images.keys() == set(data.splits[split].ids)
            assert all(torch.equal(images[sample["id"]], sample["image"]) for sample in data.dataset(split))


@pytest.mark.parametrize("labels", [np.repeat(np.arange(4), 25), np.arange(100) % 4], ids=["sorted", "in turns"])
def test_a_part_of_a_split_is_like_the_whole(tmp_path: Path, labels: np.ndarray) -> None:
    """The same part in every training and every epoch; what is predicted stays in the order of the files."""
    splits = ("train", "val", "test")
    arrays = {f"{split}_images": np.zeros((100, 4, 4), np.uint8) for split in splits}
    np.savez(tmp_path / "own.npz", **arrays, **{f"{split}_labels": labels for split in splits})
    data, other = (MedMNIST(str(tmp_path / "own.npz"), batch_size=20, workers=0, seed=seed) for seed in (0, 3))
    next(iter(other.train_dataloader()))  # which moves the order of the training on
    for split, name in (("val", "val_dataloader"), ("test", "test_dataloader")):
        batches, *again = (list(getattr(one, name)()) for one in (data, data, other))
        assert set(np.bincount(batches[0]["label"], minlength=4)) <= {4, 5, 6}
        assert sorted(i for batch in batches for i in batch["id"]) == data.splits[split].ids
        assert all([b["id"] for b in found] == [b["id"] for b in batches] for found in again)
    assert [i for batch in data.predict_dataloader() for i in batch["id"]] == data.splits["test"].ids


@pytest.mark.parametrize("layout", TABLES)
def test_images_are_turned_as_viewers_turn_them(tmp_path: Path, layout: Any) -> None:
    """Points are where an annotator saw them, and what is found is written down so."""
    pictures = {k: np.full((40, 64), 60, np.uint8) for k in range(1, 9)}
    for k, picture in pictures.items():
        picture[4 + k : 12 + k, 40:56] = 250
    make = write(tmp_path, layout)
    for suffix in (".jpg", ".png", ".tif", ".webp"):
        turned, how = layout is LandmarkTable, {"compression": "tiff_lzw"} if suffix == ".tif" else {}
        for orientation, picture in pictures.items():
            for name in FILES:
                for old in (tmp_path / "images").glob(f"{name}.*"):
                    old.unlink()
                exif = Image.Exif()
                exif[0x0112] = orientation
                Image.fromarray(picture).save(tmp_path / "images" / f"{name}{suffix}", exif=exif, **how)
            with Image.open(tmp_path / "images" / f"a{suffix}") as opened:
                itself = suffix == ".tif"  # which Pillow turns when it reads it
                opened.load()
                shown = (opened if itself else ImageOps.exif_transpose(opened)).convert("L")
            assert (shown.size == (40, 64)) == (orientation >= 5)
            warns = turned and orientation > 1 and not itself
            with pytest.warns(UserWarning, match="turned as their headers") if warns else nullcontext():
                data = make(channels=1)
            sample = data.dataset("train")[0]
            lowest = LOWEST.get(layout, 0.0)
            wanted = np.array(shown) / 255 * (1 - lowest) + lowest
            np.testing.assert_allclose(sample["image"][0], wanted, atol=1e-6)
            if turned:
                assert sample["file_size"].tolist() == [*shown.size]


def test_an_image_that_pillow_garbles_is_refused(tmp_path: Path) -> None:
    """Pillow 13 does so with uncompressed TIFFs that are to be turned; others may not."""
    picture, exif = PICTURES["L"][0], Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "own.tif", exif=exif)
    try:
        found = read_image(tmp_path / "own.tif", 1)
    except ValueError as error:
        assert "own.tif cannot be read as an image: Pillow garbles it" in str(error)
    else:
        np.testing.assert_array_equal(found[0], np.rot90(picture, -1))


@pytest.mark.parametrize("layout", TABLES)
def test_grey_and_coloured_images_together_need_a_word(tmp_path: Path, layout: Any) -> None:
    """The first image does not decide for the others, nor the training's for those of the test."""
    make = write(tmp_path, layout, PICTURES["RGB"])
    Image.fromarray(PICTURES["L"][4]).save(tmp_path / "images" / "e.png")
    told(ValueError, make, "1 image(s) are grey, such as ", "images/e.png, and 4 in colour, such as ", "images/a.png: ")
    for channels in (1, 3):
        data = make(channels=channels)
        assert {sample["image"].shape[0] for split in data.splits for sample in data.dataset(split)} == {channels}


@pytest.mark.parametrize("layout", TABLES)
def test_images_of_12_bits_in_16_need_a_word(tmp_path: Path, layout: Any) -> None:
    pictures, lowest = PICTURES["I;16"] // 16, LOWEST.get(layout, 0.0)
    make = write(tmp_path, layout, pictures)
    message = told(
        ValueError, make, "5 image(s) are stored with 16 bits, such as ", "they would use 1/16 of their range"
    )
    assert "Set bits to what they have (12, say), or to 16 if they are meant to be so dark" in message
    prints = set()
    for bits, white in ((12, 4095), (16, 65535)):
        data = make(bits=bits)
        image = (data.dataset("train")[0]["image"][0] - lowest) / (1 - lowest)
        np.testing.assert_allclose(image, pictures[0] / white, atol=1e-6)
        prints.add(data.fingerprint("val"))
    assert len(prints) == 2
    told(ValueError, lambda: make(bits=10), "images/", "where 10 bits hold 0 to 1023")
    told(ValueError, lambda: make(bits=7), "bits must be between 8 and 16, got 7")


@pytest.mark.parametrize("layout", TABLES)
def test_pixels_whose_range_is_not_known(tmp_path: Path, layout: Any) -> None:
    """Whole numbers of 32 bits beyond 16, and numbers that are not whole, with a size or without."""
    make = write(tmp_path, layout)
    (tmp_path / "images" / "c.png").unlink()
    for pixels, message in (
        (np.full((20, 24), 4095.0, np.float32), "c.tif has floating-point pixels, whose range is not known"),
        (np.full((20, 24), 100_000, np.int32), "c.tif has pixels from 100000 to 100000, where 16 bits hold 0 to 65535"),
        (np.full((20, 24), -1000, np.int32), "c.tif has pixels from -1000 to -1000, where 16 bits hold"),
    ):
        Image.fromarray(pixels).save(tmp_path / "images" / "c.tif")
        for size in (None, 8):
            told(ValueError, lambda size=size: make(size=size), message)


@pytest.mark.parametrize("layout", TABLES)
def test_a_file_is_one_sample(tmp_path: Path, layout: Any) -> None:
    """By whatever names it goes, in one split or in two; and the order of files has no part in what a name means."""
    make = write(tmp_path, layout)
    images = tmp_path / "images"
    (images / "b.png").unlink()
    (images / "b.png").symlink_to(images / "a.png")
    told(ValueError, make, "train has the same image more than once: a and b are one file, ")
    (images / "b.png").unlink()
    Image.fromarray(PICTURES["L"][1]).save(images / "b.png")
    (images / "c.png").unlink()
    (images / "c.png").symlink_to(images / "a.png")
    with pytest.warns(UserWarning, match="1 image.* in two splits, such as c of val, which is a of train: "):
        make()
    table = tmp_path / next(iter(TABLES[layout]))
    text = table.read_text()
    table.write_text(text.replace("c,0,val", "c,1,val").replace("c,tip,3,2", "c,tip,4,2"))
    told(ValueError, make, "a of train and c of val are one image with two truths: ")
    table.write_text(text)
    (images / "c.png").unlink()
    Image.fromarray(PICTURES["L"][2]).save(images / "c.png")
    for other in (".c.png", "._c.png"):
        (images / other).write_bytes(b"no picture")
    make()
    Image.fromarray(PICTURES["L"][2]).save(images / "c.tif")
    told(ValueError, make, "c may be any of c.png, c.tif in ", "write its suffix in the table, too")


@pytest.mark.parametrize("layout", TABLES)
def test_images_are_read_before_a_training(tmp_path: Path, layout: Any) -> None:
    """All of them, resized or not; those of the test split are none of its business."""
    make = write(tmp_path, layout)
    for name in "acde":
        path = tmp_path / "images" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:-100])
    for size in (None, 8):
        data = make(size=size)
        data.setup("validate")
        told(
            ValueError,
            lambda data=data: data.setup("fit"),
            "a.png cannot be read as an image: ",
            " (and 2 more image(s))",
        )


@pytest.mark.parametrize("layout", [*TABLES, MedMNIST])
def test_copies_are_named(tmp_path: Path, layout: Any) -> None:
    """Whatever they are called; a training that has them may begin."""
    pictures = PICTURES["L"].copy()
    pictures[2], pictures[4] = pictures[0], pictures[1]
    data = write(tmp_path, layout, pictures)()
    first, other, last = (data.splits[split].ids[0] for split in ("train", "val", "test"))
    with pytest.warns(UserWarning, match="are in two splits") as warned:
        data.setup("fit")
    told = [str(warning.message) for warning in warned]
    assert any(f"{other} of val, a copy of {first} of train" in line for line in told), told
    # Of a classifier, the test image has another label than its copy.
    assert any(f"{last} of test" in line and "two truths" in line for line in told) == (layout is not LandmarkTable)


def test_images_are_read_once_in_the_folder_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "own", ImageTable)()
    read: list[str] = []
    mistake = images._mistake
    monkeypatch.setattr(images, "_mistake", lambda path: (read.append(path.name), mistake(path))[1])
    for folder, times in (("runs", 1), ("runs", 1), ("others", 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        data.trainer = SimpleNamespace(default_root_dir=str(tmp_path / folder))
        data.setup("fit")
        assert sorted(read) == sorted(["a.png", "b.png", "c.png", "d.png"] * times)
    path = tmp_path / "own" / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:-100])
    told(ValueError, lambda: data.setup("fit"), "b.png cannot be read as an image: ")
    assert "own" not in (tmp_path / "runs" / ".advmed_images.json").read_text()


def test_many_ids_are_compared_at_once() -> None:
    ids = [f"img_{k:07d}" for k in range(100_000)]
    split = Samples(np.zeros((len(ids) + 1, 1, 1), np.uint8), np.zeros(len(ids) + 1, np.int64), [*ids, ids[5]])
    start = time.process_time()
    told(ValueError, lambda: check_distinct({"train": split}, lambda *_: None), "than once, such as img_0000005")
    assert time.process_time() - start < 2


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
def test_tables_in_another_encoding(tmp_path: Path, layout: Any) -> None:
    make = write(tmp_path, layout)
    for table in TABLES[layout]:
        path = tmp_path / table
        text = path.read_text()
        for encoding in ("utf-16", "latin-1"):
            path.write_bytes(f"{text}f\xe4\xe4,x\n".encode(encoding))
            told(ValueError, make, f"{path} is no table in UTF-8")
        path.write_text(text)


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
