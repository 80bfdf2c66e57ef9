"""Cut the embedded hippocampus subset out of the full data set (nnU-Net raw layout, one fold in splits_final.json).

python examples/data/make_subset.py FULL_DATASET_FOLDER OUTPUT_FOLDER

Takes 60 training and 14 validation cases: of the n sorted identifiers of a part, the k-th chosen one has the index
floor(k * n / chosen). No file is decoded or written anew; the copies are byte-identical.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

CHOSEN = {"train": 60, "val": 14}


def evenly(identifiers: list[str], count: int) -> list[str]:
    """Take `count` of the sorted identifiers at even distances, the first always among them."""
    ordered = sorted(identifiers)
    return [ordered[k * len(ordered) // count] for k in range(count)]


def main(source: Path, target: Path) -> None:
    """Copy the chosen cases and write dataset.json, splits_final.json and sha256sums.txt."""
    fold = json.loads((source / "splits_final.json").read_text())[0]
    split = {part: evenly(fold[part], count) for part, count in CHOSEN.items()}
    cases = sorted(split["train"] + split["val"])
    files = []
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for case in cases:
            shutil.copyfile(source / folder / f"{case}{ending}", target / folder / f"{case}{ending}")
            files.append(f"{folder}/{case}{ending}")
    description = json.loads((source / "dataset.json").read_text())
    description["numTraining"] = len(cases)
    description["description"] += f"; subset of {len(cases)} cases"
    (target / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
    (target / "splits_final.json").write_text(json.dumps([split], indent=2) + "\n")
    sums = [f"{hashlib.sha256((target / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    (target / "sha256sums.txt").write_text("".join(sums))
    print(f"{len(split['train'])} + {len(split['val'])} cases, {sum((target / f).stat().st_size for f in files)} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
