"""Points that stay on what they point at, three layouts, and the mistakes of landmarks' data alone.

Images, and what tables of both hosts have in common, are tested for both hosts.
"""

from __future__ import annotations

import cmath
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adv_landmark.data import (
    ISBI2015,
    Augmentation,
    Images,
    LandmarkData,
    LandmarkDataset,
    LandmarkTable,
    Samples,
    scale_points,
    transform,
)
from helpers.landmark import write_points
from helpers.mistakes import told

STILL: dict[str, Any] = {"workers": 0}
SPLIT = {"a": "train", "b": "train", "c": "val", "d": "test"}
POINTS = {
    "a": {"1": (2.0, 3.5), "2": (10.25, 7.0)},
    "b": {"1": (4.0, 4.0), "2": (11.5, 2.75)},
    "c": {"1": (5.0, 1.0), "2": (0.0, 0.0)},
    "d": {"1": (1.5, 8.0), "2": (13.0, 9.0)},
}
EMPTY = {"1": ("", ""), "2": ("", "")}
Table = Mapping[str, Mapping[str, Sequence[Any]]]


def blob(size: tuple[int, int], point: tuple[float, float], width: float = 2.5) -> np.ndarray:
    """A bright spot on black, its centre at (x, y), uint8."""
    rows, columns = np.ogrid[: size[0], : size[1]]
    squared = (columns - point[0]) ** 2 + (rows - point[1]) ** 2
    return np.round(255 * np.exp(-squared / (2 * width**2))).astype(np.uint8)


def centroid(image: Tensor) -> np.ndarray:
    """(x, y) of what is brighter than black in an image (C, H, W) in [-1, 1]."""
    weight = (image.mean(0).double() + 1).numpy()
    rows, columns = np.mgrid[: weight.shape[0], : weight.shape[1]]
    return np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()


def write(root: Path, points: Table = POINTS, split: Mapping[str, str] = SPLIT, **more: Any) -> Path:
    """The tables, and noise if no images are given."""
    random = np.random.default_rng(0)
    noise = {name: random.integers(0, 256, (12, 16), dtype=np.uint8) for name in points}
    return write_points(root, points, split, more.pop("files", noise), **more)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., LandmarkTable]:
    """Makes data of files that it writes."""

    def make(points: Table = POINTS, split: Mapping[str, str] = SPLIT, **options: Any) -> LandmarkTable:
        own = {key: options.pop(key) for key in ("column", "files", "extra") if key in options}
        root = tmp_path / f"table{len(list(tmp_path.iterdir()))}"
        return LandmarkTable(str(write(root, points, split, **own)), **{**STILL, **options})

    return make


# Points of resized images


@pytest.mark.parametrize("origin", ["centre", "corner"])
@pytest.mark.parametrize("size", [(40, 60), (25, 60), (80, 30), (21, 130), 47])
def test_points_stay_on_their_spots_when_images_are_resized(table: Any, origin: str, size: Any) -> None:
    """In another scale in x than in y, up and down; one of them is of another size."""
    wanted = {"a": (21.3, 15.8), "b": (40.75, 24.1), "c": (33.0, 20.0)}
    given = 0.5 if origin == "corner" else 0.0
    points = {name: {"spot": (x + given, y + given)} for name, (x, y) in wanted.items()}
    files = {name: blob((50, 44) if name == "c" else (40, 60), point) for name, point in wanted.items()}
    data = table(points, {"a": "train", "b": "train", "c": "val"}, files=files, size=size, origin=origin)
    for part in ("train", "val"):
        for sample in data.dataset(part):
            assert sample["image"].shape[1:] == data.size == ((47, 47) if size == 47 else size)
            np.testing.assert_allclose(sample["points"][0], centroid(sample["image"]), atol=0.03)
            back = scale_points(sample["points"], torch.tensor(data.size[::-1]), sample["file_size"])
            assert back[0].tolist() == pytest.approx(wanted[sample["id"]], abs=1e-4)


def test_a_table(table: Any) -> None:
    """Without a size, points are as they are."""
    data = table()
    assert (data.landmark_names, data.size, data.channels, data.unit) == (["1", "2"], (12, 16), 1, "px")
    assert {name: part.ids for name, part in data.splits.items()} == {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
    for sample in data.dataset("train"):
        np.testing.assert_array_equal(sample["points"], list(POINTS[sample["id"]].values()))
        assert (sample["file_size"].tolist(), sample["spacing"].tolist()) == ([16, 12], [1, 1])
        assert {sample[key].dtype for key in ("image", "points", "file_size", "spacing")} == {torch.float32}
    assert isinstance(data.dataset("val"), LandmarkDataset)


# Images and points together


def spot(point: tuple[float, float], size: tuple[int, int] = (70, 90)) -> Tensor:
    return torch.from_numpy(blob(size, point, 3.0)).float()[None] / 127.5 - 1


@pytest.mark.parametrize("angle", [0.0, 17.0, 90.0, -120.0, 180.0])
@pytest.mark.parametrize("scale", [1.0, 0.7, 1.4])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (6.3, -4.8)])
def test_points_move_with_what_they_point_at(angle: float, scale: float, shift: tuple[float, float]) -> None:
    """A turn goes from x to y around the centre, and a shift comes after it."""
    for point in ((50.3, 40.2), (40.0, 28.5)):
        image, moved = transform(spot(point), torch.tensor([point, (math.nan, math.nan)]), angle, scale, shift)
        turned = (complex(*point) - complex(44.5, 34.5)) * cmath.rect(scale, math.radians(angle))
        wanted = turned + complex(44.5, 34.5) + complex(*shift)
        np.testing.assert_allclose(moved[0], (wanted.real, wanted.imag), atol=1e-5)
        np.testing.assert_allclose(moved[0], centroid(image), atol=0.03)
        assert moved[1].isnan().all()
        assert (image.shape, moved.dtype, image.dtype) == ((1, 70, 90), torch.float32, torch.float32)
        assert ((image + 1).sum() / (spot(point) + 1).sum()).item() == pytest.approx(scale**2, rel=0.02)


def test_a_shift_by_whole_pixels_moves_pixels_and_black_ones_come_in() -> None:
    image = torch.rand(3, 20, 31, generator=torch.Generator().manual_seed(0)) * 2 - 1
    points = torch.tensor([(3.0, 4.0)])
    same, still = transform(image, points, 0.0, 1.0, (0.0, 0.0))
    torch.testing.assert_close(same, image, rtol=0, atol=1e-4)
    assert torch.equal(still, points)
    moved, points = transform(image, points, 0.0, 1.0, (5.0, -3.0))
    torch.testing.assert_close(moved[:, :-3, 5:], image[:, 3:, :-5], rtol=0, atol=1e-4)
    assert points.tolist() == [[8.0, 1.0]]
    for black in (moved[:, -3:], moved[:, :, :5]):
        torch.testing.assert_close(black, torch.full_like(black, -1.0), rtol=0, atol=1e-4)


# Augmentation


def drawn(count: int, **options: float) -> tuple[Tensor, Tensor]:
    """Images of a spot and their three points, augmented ``count`` times, (N, 1, H, W) and (N, 3, 2)."""
    augment = Augmentation(**{"rotate": 0.0, "zoom": 0.0, "shift": 0.0, "color": 0.0, **options})
    image, points = spot((50.0, 30.0)), torch.tensor([(44.5, 34.5), (54.5, 34.5), (math.nan, 3.0)])
    each = [augment(image, points) for _ in range(count)]
    return torch.stack([image for image, _ in each]), torch.stack([points for _, points in each])


def spans(values: Any, lowest: float, highest: float) -> None:
    """Values go from one end to the other, nearly, and no further."""
    near = 0.1 * (highest - lowest)
    assert lowest - 1e-4 <= min(values) < lowest + near
    assert highest - near < max(values) <= highest + 1e-4


def test_rotation_zoom_and_shift_are_at_most_so_large() -> None:
    torch.manual_seed(0)
    arms, away = {}, {}
    for name, most in (("rotate", 30.0), ("zoom", 0.2), ("shift", 0.1)):
        _, points = drawn(200, **{name: most})
        arms[name], away[name] = points[:, 1] - points[:, 0], points[:, 0] - torch.tensor((44.5, 34.5))
    spans(torch.rad2deg(torch.atan2(arms["rotate"][:, 1], arms["rotate"][:, 0])), -30, 30)
    spans(arms["zoom"][:, 0], 8, 12)
    for axis, side in enumerate((90, 70)):  # a part of each side
        spans(away["shift"][:, axis], -0.1 * side, 0.1 * side)
    assert np.corrcoef(away["shift"].T)[0, 1] == pytest.approx(0, abs=0.3)
    still = (away["rotate"], away["zoom"], arms["rotate"].norm(dim=1) - 10, arms["zoom"][:, 1])
    for nothing in (*still, arms["shift"] - torch.tensor((10.0, 0.0))):
        torch.testing.assert_close(nothing, torch.zeros_like(nothing))


def test_colour_changes_brightness_and_contrast_and_no_points() -> None:
    torch.manual_seed(0)
    images, points = drawn(200, color=0.3)
    clean = spot((50.0, 30.0))
    assert torch.equal(points[:, :2], torch.tensor([(44.5, 34.5), (54.5, 34.5)]).expand(200, 2, 2))
    assert ((images >= -1) & (images <= 1)).all()
    middle = (clean > -0.3) & (clean < 0.3)  # what is not cut off
    found = np.array([np.polyfit(clean[middle].numpy(), image[middle].numpy(), 1) for image in images])
    for image, (gain, offset) in zip(images, found, strict=True):
        np.testing.assert_allclose(image, (clean * gain + offset).clamp(-1, 1), atol=1e-5)
    spans(found[:, 0], 0.7, 1.3)
    spans(found[:, 1], -0.3, 0.3)
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.3


def test_training_images_are_augmented_with_their_points(table: Any) -> None:
    wanted = {"a": (36.0, 24.0), "b": (28.0, 22.0), "c": (33.0, 20.0), "d": (30.0, 25.0)}
    points = {name: {"spot": point} for name, point in wanted.items()}
    files = {name: blob((50, 64), point) for name, point in wanted.items()}
    data = table(points, files=files, size=(60, 90), rotate=40.0, zoom=0.2, shift=0.05, batch_size=2)
    torch.manual_seed(5)
    clean = {sample["id"]: sample["points"] for sample in data.dataset("train")}
    for _ in range(3):
        (batch,) = data.train_dataloader()
        for image, moved, name in zip(batch["image"], batch["points"], batch["id"], strict=True):
            np.testing.assert_allclose(moved[0], centroid(image), atol=0.05)
            assert (moved - clean[name]).norm() > 0.5


# Spacing and unit


WIDE = (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize(
    ("options", "extra", "wanted", "unit"),
    [
        ({}, {}, {"a": (1, 1)}, "px"),
        ({"spacing": 0.25}, {}, {"a": (0.25, 0.25), "d": (0.25, 0.25)}, "mm"),
        ({"spacing": (0.5, 0.2)}, {}, {"a": (0.5, 0.2), "c": (0.5, 0.2)}, "mm"),
        ({"spacing": [0.5, 0.2], "unit": "px"}, {}, {"a": (0.5, 0.2)}, "px"),
        ({"unit": "px"}, {}, {"a": (1, 1)}, "px"),
        ({}, {"spacing": WIDE}, {"a": (0.1, 0.1), "b": (0.2, 0.2), "d": (0.4, 0.4)}, "mm"),
        ({"unit": "mm"}, {"spacing_x": WIDE, "spacing_y": (1, 2, 3, 4)}, {"b": (0.2, 2), "c": (0.3, 3)}, "mm"),
        ({"spacing": 0.3}, {"spacing": [0.3] * 4}, {"b": (0.3, 0.3)}, "mm"),  # both, and the same
        ({"spacing": (0.3, 0.2)}, {"spacing_x": [0.3] * 4, "spacing_y": ("", 0.2, "", "")}, {"a": (0.3, 0.2)}, "mm"),
    ],
)
def test_spacing_of_settings_and_of_the_table(table: Any, options: Any, extra: Any, wanted: Any, unit: str) -> None:
    data = table(extra=extra, **options)
    assert data.unit == unit
    found = {s["id"]: tuple(s["spacing"].tolist()) for part in data.splits for s in data.dataset(part)}
    for name, spacing in wanted.items():
        assert found[name] == pytest.approx(spacing)


def test_another_truth_has_another_fingerprint(table: Any) -> None:
    """So that its numbers are not mixed with those of the first."""
    first, moved = table(spacing=0.1), {**POINTS, "c": {"1": (5.0, 1.25), "2": (0.0, 0.0)}}
    changes: list[dict[str, Any]] = [{"unit": "px"}, {"spacing": 0.2}, {"size": (24, 16)}, {"channels": 3}]
    others = [table(**{"spacing": 0.1, **change}) for change in (*changes, {"points": moved})]
    assert len({data.fingerprint("val") for data in (first, table(spacing=0.1), *others)}) == 6


# A table of points


@pytest.mark.parametrize("column", ["landmark", "landmark_index"])
@pytest.mark.parametrize(
    ("names", "order"), [(("10", "9", "-1"), ["-1", "9", "10"]), (("tip", "2", "base"), ["2", "base", "tip"])]
)
def test_landmarks_are_numbers_or_names_in_their_order(table: Any, column: str, names: Any, order: list[str]) -> None:
    """Whatever the order of the rows."""
    places = {name: (float(k), 2.0 * k) for k, name in enumerate(names)}
    data = table({"a": places, "b": dict(reversed(places.items())), "c": places, "d": places}, column=column)
    assert data.landmark_names == order
    for k in range(2):
        assert data.dataset("train")[k]["points"].tolist() == [list(places[name]) for name in order]


def test_images_of_the_split_none_are_left_out(table: Any) -> None:
    """With landmarks or without, and though their files may not be there."""
    data = table(split={**SPLIT, "b": "none", "x": "none", "y": "none"})
    Image.new("L", (99, 9)).save(data.root / "images" / "x.png")
    (data.root / "images" / "b.png").unlink()
    data = LandmarkTable(str(data.root), **STILL)
    assert [name for part in data.splits.values() for name in part.ids] == ["a", "c", "d"]
    assert data.size == (12, 16)


@pytest.mark.parametrize("empty", [("", ""), ("nan", "nan"), (" ", " ")])
def test_a_landmark_without_numbers_is_not_known(table: Any, empty: tuple[str, str]) -> None:
    points = {**POINTS, "b": {"1": empty, "2": (11.5, 2.75)}, "c": {"1": empty, "2": empty}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = table(points, size=(24, 16))
    found = data.dataset("train")[1]["points"]
    assert found[0].isnan().all()
    assert found[1].tolist() == pytest.approx((11.5, (2.75 + 0.5) * 2 - 0.5))
    assert data.dataset("val")[0]["points"].isnan().all()
    assert {split: part.without_points() for split, part in data.splits.items()} == {"train": 0, "val": 1, "test": 0}


def test_landmarks_outside_are_not_known_which_is_said(table: Any) -> None:
    """The count, and the first five; (0, 0) may be the corner of the first pixel."""
    bad = {"1": (16.0, 3.0), "2": (3.0, 11.6), "3": (-0.6, 3.0), "9": (5.0, 5.0)}
    edge = {"1": (15.5, 11.5), "2": (-0.5, -0.5), "3": (15.4, 0.0), "9": (5.0, 5.0)}  # on the very edge is inside
    with pytest.warns(UserWarning, match="lie outside") as caught:
        data = table({"a": bad, "b": bad, "c": edge, "d": bad})
    (message,) = [str(w.message) for w in caught if "outside" in str(w.message)]
    wanted = "9 landmark(s) lie outside their image and count as not known: a 1 at (16, 3); a 2 at (3, 11.6); "
    assert message == wanted + "a 3 at (-0.6, 3); b 1 at (16, 3); b 2 at (3, 11.6); ..."
    known = [~sample["points"].isnan().any(-1) for part in data.splits for sample in data.dataset(part)]
    assert torch.stack(known).tolist() == [[False] * 3 + [True]] * 2 + [[True] * 4] + [[False] * 3 + [True]]
    with pytest.warns(UserWarning, match=r"3 landmark\(s\) .*\(-0.6, 3\)$"):
        table({"a": bad, "b": edge, "c": edge, "d": edge})
    points = {**POINTS, "a": {"1": (16.0, 12.0), "2": (0.0, 0.0)}, "c": POINTS["d"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = table(points, origin="corner")
    assert data.dataset("train")[0]["points"].tolist() == [[15.5, 11.5], [-0.5, -0.5]]
    with pytest.warns(UserWarning, match=r"1 landmark\(s\) lie outside .* a 1 at \(16, 12\)$"):
        table(points, origin="centre")


def test_training_images_without_a_landmark_are_left_out_which_is_said(table: Any) -> None:
    """With their spacing; validation images stay, as their predictions are asked for."""
    with pytest.warns(UserWarning, match=r"^1 training image\(s\) without any known landmark are left out$"):
        data = table({**POINTS, "a": EMPTY, "c": EMPTY}, extra={"spacing": WIDE})
    assert data.train_ids == ["b"]
    sample = data.dataset("train")[0]
    assert sample["points"].tolist() == [list(point) for point in POINTS["b"].values()]
    assert sample["spacing"].tolist() == pytest.approx([0.2, 0.2])
    stored = np.array(Image.open(data.root / "images" / "b.png"))
    np.testing.assert_allclose(sample["image"][0], stored / 127.5 - 1, atol=1e-6)
    assert data.splits["val"].ids == ["c"]


def test_points_at_zero_may_be_none_which_is_said(table: Any) -> None:
    points = {**POINTS, "a": {**POINTS["a"], "2": (0, 0)}}
    with pytest.warns(UserWarning, match=r"^2 landmark\(s\) lie at \(0, 0\), such as a 2: if that stands for one"):
        data = table(points)
    assert data.dataset("train")[0]["points"][1].tolist() == [0, 0]


def test_what_is_measured_on_has_landmarks(table: Any) -> None:
    """What is only predicted needs none."""
    data = table({**POINTS, "c": EMPTY, "d": EMPTY}, batch_size=2)
    data.setup("predict")
    for stage, split in (("fit", "val"), ("validate", "val"), ("test", "test")):
        told(
            ValueError, lambda stage=stage: data.setup(stage), f"no {split} image has a known landmark to compare with"
        )
    data = table({**POINTS, "d": EMPTY})
    data.setup("fit")
    data.setup("validate")
    told(ValueError, lambda: data.setup("test"), "no test image has a known landmark")


# Mistakes


SPACING = "spacing must be mm per pixel, > 0, one number or two (x, y), got "
SINGLE = {"1": (0, 0)}
ZERO = {"1": (0, 0), "2": (0, 0)}
PARTS = {name: {"1": (0.125 * k, 0.25), "2": (0.875, 0.25 * k)} for k, name in enumerate("abcd", 1)}
FAR = {"1": (500.0, 3.0), "2": (3.0, 900.0)}
SHORT = {f"i{k}": {"1": (1, 1), "2": (2, 2)} if k == 0 else {"1": (1, 1)} for k in range(8)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shift": 1.5}, "shift must be between 0 and 1, got 1.5"),
        ({"origin": "center"}, "origin must be centre or corner, got 'center'"),
        ({"unit": "cm"}, "unit must be mm or px, got 'cm'"),
        ({"unit": "mm"}, "errors in mm need the pixel spacing: set spacing, mm per pixel"),
        *(
            ({"spacing": bad}, f"{SPACING}{bad}")
            for bad in (-0.1, 0.0, math.inf, math.nan, (1.0, 0.0), (1.0, 1.0, 1.0))
        ),
        *(({"extra": {"spacing": (1, s, 1, 1)}}, "split.csv has no spacing > 0 in line 3") for s in ("", "0", "-1")),
        ({"extra": {"spacing": ["wide"] * 4}}, "split.csv has 'wide' in line 2, where a number is expected"),
        (
            {"spacing": 0.1, "extra": {"spacing": WIDE}},
            "spacing is (0.1, 0.1) in the settings, and (0.2, 0.2) in line 3 of ",
        ),
        ({"spacing": 0.1, "extra": {"spacing": WIDE}}, "split.csv: leave one of them out"),
        ({"extra": {"spacing_x": [1] * 4}}, "spacing_y"),  # errors would be in pixels, and nothing would say why
        ({"points": {**POINTS, "c": FAR}}, "1 image(s) have all their landmarks outside, such as c"),  # as points in mm
        ({"points": dict.fromkeys(POINTS, FAR)}, "4 image(s) have all their landmarks outside, such as a, b, c: are"),
        ({"points": dict.fromkeys(POINTS, FAR)}, "are the points in pixels of these very files?"),
        ({"points": {**POINTS, "c": {**FAR, "2": ("", "")}}}, "1 image(s) have all their"),
        ({"points": {**POINTS, "a": EMPTY, "b": EMPTY}}, "no training image has a landmark"),
        ({"points": PARTS}, "all points lie between (0.125, 0.25) and (0.875, 1): are they fractions of the image?"),
        (
            {"points": {**POINTS, "c": ZERO}},
            "1 image(s) have all their landmarks at (0, 0), such as c: leave x and y em",
        ),
        ({"points": dict.fromkeys(POINTS, ZERO)}, "4 image(s) have all their landmarks at (0, 0), such as a: leave x"),
        (
            {"points": dict.fromkeys(POINTS, SINGLE)},
            "4 image(s) have all their landmarks at (0, 0), such as a 1",
        ),
        ({"points": SHORT, "split": dict.fromkeys(SHORT, "val")}, ": i1 (1), i2 (1), i3 (1), i4 (1), i5 (1), ...."),
    ],
)
def test_mistakes_in_what_is_given(table: Any, given: dict[str, Any], message: str) -> None:
    told(ValueError, lambda: table(**given), message)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),  # where * stands for a folder
    [
        ("landmarks", "b,2,11.5,2.75\n", "", "has 2 landmarks, but not for all images: b (1). "),
        ("landmarks", "b,2,11.5,2.75\n", "", "a row with empty x and y for a landmark that is not known"),
        ("landmarks", "b,2,11.5,2.75", "b,1,4.5,4", "has landmark 1 of b twice, see line 5"),
        ("landmarks", "b,1,4.0,4.0", "b,1,4.0,four", "landmarks.csv has 'four' in line 4, where a number is expected"),
        ("landmarks", "b,1,4.0,4.0", 'b,1,"4,0",4', "has '4,0' in line 4"),
        ("landmarks", "b,1,4.0,4.0", "b,1,4,0,4,0", "landmarks.csv has more cells than columns in line 4: write deci"),
        ("landmarks", "b,1,4.0,4.0", "b,1,4.0,", "landmarks.csv has only one of x and y in line 4: both are empty"),
        ("landmarks", "b,1,4.0,4.0", "b,1,,4.0", "landmarks.csv has only one of x and y in line 4: both are empty"),
        ("landmarks", "b,1,4.0,4.0", "b,1,4.0", "landmarks.csv has only one of x and y in line 4: both are empty"),
        ("split", "c,val", "c,val,x", "split.csv has more cells than columns in line 4"),
        ("landmarks", "b,1,4.0,4.0", "b,1,inf,4", "has 'inf' in line 4, where a finite number is expected"),
        ("landmarks", "image,", "file,", "has no column image; there are file, landmark_index, x, y"),
        ("landmarks", "landmark_index", "index", "has no column landmark_index; there are image, index, x, y"),
        ("split", "c,val\nd,test", "c,dev\nd,", "has the split(s) '', 'dev'; they must be train, val, test or none"),
        ("split", "d,test\n", "", "1 image(s) of *landmarks.csv are not in *split.csv: d"),
        ("split", "d,test\n", "d,test\ne,train\n", "1 image(s) of *split.csv have no landmarks in *landmarks.csv: e"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, name: str, old: str, new: str, said: str) -> None:
    root = write(tmp_path / "own")
    path = root / f"{name}.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    told(ValueError, lambda: LandmarkTable(str(root), **STILL), *said.split("*"))


def test_images_without_landmarks_and_landmarks_without_images(tmp_path: Path) -> None:
    root = write(tmp_path / "own")
    make = partial(LandmarkTable, str(root), **STILL)
    Image.new("L", (16, 12)).save(root / "images" / "y.png")
    extra = ("1 image(s) in ", "images have no landmarks in ", ": y.png. ", "give them the split none in ", "split.csv")
    told(ValueError, make, *extra)
    for lost in ("y", "a", "d"):
        (root / "images" / f"{lost}.png").unlink()
    told(FileNotFoundError, make, "2 image(s) of ", "landmarks.csv are not in ", "images: a, d")


# The ISBI 2015 challenge


FOLDERS = {"TrainingData": ("001", "002"), "Test1Data": ("151",), "Test2Data": ("301",)}


def write_isbi(root: Path, deeper: str = "", folders: Mapping[str, Any] = FOLDERS) -> Path:
    """The junior's points are 2 to the right of and 1 below the senior's; then follow the challenge's classes."""
    for k, (folder, names) in enumerate(folders.items()):
        (root / deeper / folder).mkdir(parents=True)
        for name in names:
            picture = Image.fromarray(blob((30, 40), (10.0, 10.0 + k))).convert("RGB")
            picture.save(root / deeper / folder / f"{name}.bmp")
            for annotator, (right, below) in (("400_senior", (0, 0)), ("400_junior", (2, 1))):
                path = root / "AnnotationsByMD" / annotator / f"{name}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                marks = [f"{5 + 3 * i + right},{int(name) % 10 + 2 * i + below}" for i in range(3)]
                path.write_text("\n".join([*marks, "1", "3", "2", ""]) + "\r\n")
    return root


@pytest.mark.parametrize("deeper", ["", "RawImage/here"])
def test_the_isbi_challenge_and_the_mean_of_its_annotators(tmp_path: Path, deeper: str) -> None:
    make = partial(ISBI2015, str(write_isbi(tmp_path / "isbi", deeper)), **STILL)
    data = make()
    assert data.landmark_names == ["1", "2", "3"]
    found = {split: part.ids for split, part in data.splits.items()}
    assert found == {"train": ["001", "002"], "val": ["151"], "test": ["301"]}
    assert (data.unit, data.channels, data.size) == ("mm", 3, (30, 40))
    sample = data.dataset("train")[1]
    assert sample["points"].tolist() == [[6.0, 2.5], [9.0, 4.5], [12.0, 6.5]]
    assert sample["spacing"].tolist() == pytest.approx([0.1, 0.1])
    assert data.dataset("val")[0]["points"][0].tolist() == [6.0, 1.5]
    for annotator, x in (("400_senior", 5.0), ("400_junior", 7.0)):
        sample = make(annotators=[annotator], spacing=(0.3, 0.2)).dataset("train")[0]
        assert sample["points"][0, 0] == x
        assert sample["spacing"].tolist() == pytest.approx([0.3, 0.2])
    resized = make(size=(15, 80), unit="px")
    assert resized.dataset("train")[1]["points"][0].tolist() == pytest.approx((6.5 * 2 - 0.5, 3.0 / 2 - 0.5))
    assert (resized.dataset("train")[1]["file_size"].tolist(), resized.unit) == ([40, 30], "px")
    folders = {name: images for name, images in FOLDERS.items() if name != "Test2Data"}
    assert list(ISBI2015(str(write_isbi(tmp_path / "few", deeper, folders)), **STILL).splits) == ["train", "val"]


def test_a_landmark_that_some_annotators_do_not_mark_is_that_of_the_others(tmp_path: Path) -> None:
    """Whose mean with -1,-1 would be half way to the corner."""
    root = write_isbi(tmp_path / "isbi")
    for hidden in ("__MACOSX", ".cache"):
        (root / hidden / "400_senior").mkdir(parents=True)
    for name, content in (("400_junior/001", "7,2\n-1,-1\n,\n"), ("400_senior/002", "\ufeff5,2\n-1,-1\n11,6\n")):
        (root / "AnnotationsByMD" / f"{name}.txt").write_text(content, encoding="utf-8")
    (root / "AnnotationsByMD" / "400_junior" / "002.txt").write_text("7,3\n-1,-1\n13,7\n")
    with pytest.warns(UserWarning, match=r"^2 landmark\(s\) are marked by some .* from those: 001 2; 001 3$"):
        data = ISBI2015(str(root), **STILL)
    points = data.splits["train"].points
    assert points[0].tolist() == [[6.0, 1.5], [8.0, 3.0], [11.0, 5.0]]
    assert points[1, [0, 2]].tolist() == [[6.0, 2.5], [12.0, 6.5]]
    assert np.isnan(points[1, 1]).all()


@pytest.mark.parametrize(
    ("names", "content", "message"),
    [
        (["400_junior/151"], "5,1\n8,3\n", "of 151 have different numbers of landmarks: 400_senior 3, 400_junior 2"),
        (["400_senior/002", "400_junior/002"], "5,1\n8,3\n", "most images have 3 landmarks, but not all: 002 (2)"),
        (["400_senior/001"], "5,1\n8,x\n2,2\n", "001.txt has 'x' in line 2, where a number is expected"),
        (["400_senior/001"], "5,1\n8,\n2,2\n", "001.txt has only one of x and y in line 2"),
        (["400_senior/001"], "5,1,2\n8,3,2\n", "001.txt must have two numbers in each line with a comma"),
    ],
)
def test_mistakes_of_the_annotators(tmp_path: Path, names: list[str], content: str, message: str) -> None:
    root = write_isbi(tmp_path / "isbi")
    for name in names:
        (root / "AnnotationsByMD" / f"{name}.txt").write_text(content)
    told(ValueError, lambda: ISBI2015(str(root), **STILL), message)


def test_mistakes_in_the_isbi_folders(tmp_path: Path) -> None:
    root = write_isbi(tmp_path / "isbi")
    make = partial(ISBI2015, str(root), **STILL)
    told(ValueError, lambda: make(annotators=[]), "annotators must name one folder or more")
    told(FileNotFoundError, lambda: make(annotators=["500"]), "there is no folder 500 in ")
    (root / "AnnotationsByMD" / "400_senior" / "301.txt").unlink()
    told(FileNotFoundError, make, "there are no landmarks ", "301.txt")
    for name in ("Test1Data/151.bmp", "Test2Data/301.bmp"):
        (root / name).unlink()
    told(ValueError, make, "the data has no val images")
    (root / "TrainingData").rename(root / "Train")
    told(FileNotFoundError, make, "there is no folder TrainingData in ")


# Images alone, and a reader of one's own


def test_images_alone(tmp_path: Path) -> None:
    own = partial(Images, str(tmp_path), **STILL)
    told(FileNotFoundError, lambda: Images(str(tmp_path / "none"), 2), "there is no folder of images ", "none")
    (tmp_path / "notes.txt").write_text("not an image")
    told(FileNotFoundError, lambda: own(2), "there are no images (.bmp, .jpeg", f"in {tmp_path}")
    for name in ("b.png", "a.JPG", "deep/er/c.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 10), 255).save(tmp_path / name)
    (tmp_path / "deep" / "f.gif").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 file\(s\) are left out, such as .*f.gif"):
        data = own(2, size=(8, 8), batch_size=3)
    (tmp_path / "deep" / "f.gif").unlink()
    assert (data.landmark_names, data.unit) == (["1", "2"], "px")
    (batch,) = data.predict_dataloader()
    assert batch["id"] == ["a.JPG", "b.png", "deep/er/c.tif"]
    assert batch["points"].shape == (3, 2, 2)
    assert batch["points"].isnan().all()
    torch.testing.assert_close(batch["image"], torch.ones(3, 1, 8, 8))
    assert batch["file_size"].tolist() == [[20, 10]] * 3
    named = own(["tip", "base"], spacing=0.5)
    assert (named.landmark_names, named.unit, named.size) == (["tip", "base"], "mm", (10, 20))
    told(ValueError, lambda: own(0), "the data has no landmarks")


class Own(LandmarkData):
    """Gives the samples that it was given."""

    def __init__(self, splits: dict[str, Samples], names: list[str], **options: Any) -> None:
        self.given = names, splits
        super().__init__(**{**STILL, **options})

    def read(self) -> tuple[list[str], dict[str, Samples]]:
        return self.given


def test_data_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(blob((20, 30), (12.0, 7.0))).save(path)

    def samples(*ids: str) -> Samples:
        return Samples([path] * len(ids), np.array([[(12.0, 7.0)]] * len(ids)).reshape(-1, 1, 2), list(ids))

    for splits, message in (
        ({"train": samples("a", "b", "a"), "val": samples("c")}, "train has the same image more than once, such as a"),
        ({"train": samples(), "val": samples("a")}, "the data has no train images"),
    ):
        told(ValueError, lambda splits=splits: Own(splits, ["tip"]), message)
    with pytest.raises(NotImplementedError):
        LandmarkData(**STILL)
    points = np.array([[(3.0, 3.0), (50.0, 3.0), (4.0, math.nan)]])
    before = points.copy()
    with pytest.warns(UserWarning, match=r"1 landmark\(s\) lie outside"):
        data = Own({"test": Samples([path], points, ["a"])}, ["1", "2", "3"])
    np.testing.assert_array_equal(points, before)  # what was given stays as it is
    np.testing.assert_array_equal(data.splits["test"].points, [[(3.0, 3.0), (math.nan,) * 2, (math.nan,) * 2]])
