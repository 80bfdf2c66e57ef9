"""Cut the embedded blood cell subset out of the full BCCD set (Ultralytics layout).

python examples/data/make_bccd_subset.py FULL_DATASET_FOLDER OUTPUT_FOLDER

Takes 96 training and 24 validation images, at even distances. The copies are byte-identical.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from make_subset import evenly

CHOSEN = {"train": 96, "val": 24}


def main(source: Path, target: Path) -> None:
    """Copy the chosen images with their labels, and write train.txt, val.txt and sha256sums.txt."""
    files = []
    for folder in ("images", "labels"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for part, count in CHOSEN.items():
        names = evenly((source / f"{part}.txt").read_text().split(), count)
        (target / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            stem = Path(name).stem
            files += [f"images/{stem}.jpg", f"labels/{stem}.txt"]
    for name in files:
        shutil.copyfile(source / name, target / name)
    shutil.copyfile(source / "bccd.yaml", target / "bccd.yaml")
    shutil.copyfile(source / "LICENSE", target / "LICENSE")
    sums = [f"{hashlib.sha256((target / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(files)]
    (target / "sha256sums.txt").write_text("".join(sums))
    print(f"{CHOSEN} images, {sum((target / f).stat().st_size for f in files)} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
