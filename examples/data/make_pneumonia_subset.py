"""Cut the embedded X-ray subset out of the whole of PneumoniaMNIST.

python examples/data/make_pneumonia_subset.py FULL_NPZ_FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

COUNTS = {"train": 1600, "val": 400, "test": 400}
TARGET = Path(__file__).parent / "pneumoniamnist" / "pneumoniamnist.npz"


def main(source: Path) -> None:
    """Draws images at random, seed 0, and leaves out any that was drawn before, in whatever split."""
    generator = np.random.default_rng(0)
    seen: set[bytes] = set()
    arrays = {}
    with np.load(source) as archive:
        for split in ("test", "val", "train"):  # an image of two splits is kept for the evaluation
            images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
            chosen = []
            for index in generator.permutation(len(images)):
                if len(chosen) < COUNTS[split] and images[index].tobytes() not in seen:
                    seen.add(images[index].tobytes())
                    chosen.append(index)
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
    np.savez_compressed(TARGET, **arrays)
    for name, array in arrays.items():
        print(name, array.shape, np.bincount(array.reshape(-1)).tolist() if "labels" in name else "")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
