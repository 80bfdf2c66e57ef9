"""Make 2D slices with landmarks from the embedded hippocampus volumes and their expert labels.

python examples/data/make_hippocampus_landmarks.py examples/data/Dataset004_Hippocampus OUTPUT_FOLDER

Of every volume three sagittal slices are taken: that in which the hippocampus is largest, and those two voxels beside
it. Landmarks are where the labels say: the foremost and the rearmost voxel, and the upper and the lower end of the
boundary between anterior part (head) and posterior part (body and tail); each the mean of the voxels (or voxel faces)
that are equally far out.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from PIL import Image

SIZE = (48, 64)
NAMES = ("anterior_tip", "posterior_tip", "boundary_superior", "boundary_inferior")
BESIDE = (-2, 0, 2)


def read(path: Path) -> np.ndarray:
    """A volume as (x, z from above, y from behind); the files' axes are x, y, z to the left, front and top."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 0, 1)[:, ::-1]


def boundary(label: np.ndarray) -> np.ndarray:
    """The faces between the two parts in a slice (z, y), each (x, y) of the picture; (n, 2)."""
    faces = []
    for axis, step in ((1, (0.5, 0.0)), (0, (0.0, 0.5))):  # voxels behind each other, and below each other
        one, other = (np.take(label, range(k, label.shape[axis] - 1 + k), axis) for k in (0, 1))
        row, column = np.nonzero((one > 0) & (other > 0) & (one != other))
        faces += [(x + step[0], y + step[1]) for x, y in zip(column, row, strict=True)]
    return np.array(faces).reshape(-1, 2)


def slices_of(label: np.ndarray) -> list[int]:
    """The largest sagittal slice and those beside it, where the two parts meet."""
    largest = int((label > 0).sum((1, 2)).argmax())
    return [x for x in (largest + step for step in BESIDE) if len(boundary(label[x]))]


def landmarks(label: np.ndarray) -> list[tuple[float, float]]:
    """The four landmarks of a slice (z, y), each (x, y) of the picture."""
    rows, columns = np.nonzero(label)
    tips = [(column, rows[columns == column].mean()) for column in (columns.max(), columns.min())]
    points = boundary(label)
    ends = [points[points[:, 1] == y].mean(0) for y in (points[:, 1].min(), points[:, 1].max())]
    return [(float(x), float(y)) for x, y in (*tips, *ends)]


def main(source: Path, target: Path) -> None:
    """Write the images and both tables."""
    fold = json.loads((source / "splits_final.json").read_text())[0]
    (target / "images").mkdir(parents=True, exist_ok=True)
    points, splits = [], []
    for split in ("train", "val"):
        for case in fold[split]:
            label = read(source / "labelsTr" / f"{case}.nii.gz")
            volume = read(source / "imagesTr" / f"{case}_0000.nii.gz").astype(np.float64)
            low, high = np.percentile(volume, (0.5, 99.5))
            grey = (np.clip((volume - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
            margins = [(total - size) // 2 for total, size in zip(SIZE, label.shape[1:], strict=True)]
            for x in slices_of(label):
                name = f"{case}_{x:02d}.png"
                picture = np.zeros(SIZE, dtype=np.uint8)
                top, left = margins
                picture[top : top + label.shape[1], left : left + label.shape[2]] = grey[x]
                Image.fromarray(picture).save(target / "images" / name, optimize=True)
                splits.append((name, split))
                found = zip(NAMES, landmarks(label[x]), strict=True)
                points += [(name, mark, f"{px + left:.2f}", f"{py + top:.2f}") for mark, (px, py) in found]
    for name, head, rows in (
        ("landmarks.csv", ("image", "landmark", "x", "y"), points),
        ("split.csv", ("image", "split"), splits),
    ):
        with (target / name).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *rows])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
