"""The embedded data: unchanged bytes, images and labels that fit, a split without overlap, and within its size."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parents[1] / "examples" / "data" / "Dataset004_Hippocampus"
CELLS = DATA.with_name("bccd")
CASES = sorted(p.name.removesuffix(".nii.gz") for p in (DATA / "labelsTr").glob("*.nii.gz"))


@pytest.mark.parametrize(("folder", "largest"), [(DATA, 7_500_000), (CELLS, 3_000_000)], ids=["hippocampus", "bccd"])
def test_every_file_is_the_one_that_was_recorded_and_none_is_large(folder: Path, largest: int) -> None:
    sums = [line.split(maxsplit=1) for line in (folder / "sha256sums.txt").read_text().splitlines()]
    found = {p.relative_to(folder).as_posix() for p in folder.glob("*/*") if p.suffix != ".cache"}
    assert found == {name for _, name in sums}
    for expected, name in sums:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= largest


def test_description_and_split_fit_the_files() -> None:
    description = json.loads((DATA / "dataset.json").read_text())
    (fold,) = json.loads((DATA / "splits_final.json").read_text())
    assert description["numTraining"] == len(CASES) == 74
    assert sorted(fold["train"] + fold["val"]) == CASES  # a case in both would be there twice
    assert (len(fold["train"]), len(fold["val"])) == (60, 14)


def test_licences_and_attribution_are_beside_the_data() -> None:
    licence = (DATA / "LICENSE").read_text()
    for needed in ("CC BY-SA 4.0", "creativecommons.org/licenses/by-sa/4.0/legalcode", "Vanderbilt", "Changes", "cite"):
        assert needed in licence
    assert "Copyright (c) 2017 shenggan" in (CELLS / "LICENSE").read_text()
    assert "MIT" in (CELLS / "README.md").read_text()


def test_images_and_labels_fit() -> None:
    import SimpleITK as sitk

    kinds = set()
    for case in CASES:
        image = sitk.ReadImage(DATA / "imagesTr" / f"{case}_0000.nii.gz")
        label = sitk.ReadImage(DATA / "labelsTr" / f"{case}.nii.gz")
        assert (image.GetSize(), image.GetDirection()) == (label.GetSize(), label.GetDirection()), case
        assert image.GetSpacing() == label.GetSpacing() == (1.0, 1.0, 1.0), case
        pixels, classes = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(label)
        kinds.add(pixels.dtype.name)
        assert np.isfinite(pixels).all() and pixels.std() > 0, case
        assert set(np.unique(classes)) == {0, 1, 2}, case
    assert kinds == {"uint8", "float32"}, "both kinds of source are meant to be in the subset"


def test_the_lists_of_blood_cells_fit_the_images() -> None:
    train, val = ((CELLS / f"{part}.txt").read_text().split() for part in ("train", "val"))
    assert (len(train), len(val)) == (96, 24)
    # No image is in both, or it would be here twice.
    assert sorted(Path(name).name for name in train + val) == sorted(p.name for p in (CELLS / "images").iterdir())


def test_every_blood_cell_has_a_class_and_a_box_inside_its_image() -> None:
    classes = set()
    for path in (CELLS / "labels").glob("*.txt"):
        rows = np.loadtxt(path, ndmin=2)
        assert rows.shape[1] == 5, path.name
        classes |= set(rows[:, 0].astype(int).tolist())
        low, high = rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2
        assert (rows[:, 3:] > 0).all() and (low > -1e-3).all() and (high < 1 + 1e-3).all(), path.name
    assert classes == {0, 1, 2}
