"""What a margin should belong to: how far the visits of a sample agree about the noise that it bears.

    python benchmarks/visits.py record FILE.csv [--finest] -- nnUNetv2_train 4 2d 0 -tr nnUNetTrainerAMAT ...
    python benchmarks/visits.py table FILE.csv ...

`record` runs a training by AMAT as it is typed, and writes a line for each visit: its sample's id, and the noise at
which the losses that the attack saw expect the first threshold. A learning rate of next to nothing (1e-9) keeps the
network that the training starts from, so that visits differ by augmentation alone. --finest is for nnU-Net in 3D: ids
say case, part and cell. `table` tells how far visits agree, by every id that the file knows: the share of the variance
of the noise's logarithm that lies between ids (one-way random effects, intraclass correlation), and the rank
correlation of a visit with the mean of the earlier ones of its id, which is what a margin is for.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, TextIO

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from advmed.methods import METHODS, amat
from advmed.methods.base import Step

RANGE = 1e-2, 1e2
"""Shares of the median that crossings are kept between: some are 0, some infinite, and logarithms are taken."""


class Watched(amat.AMAT):
    """AMAT that writes down what every visit found; it computes the same."""

    out: ClassVar[TextIO]
    found: ClassVar[list[Tensor]] = []

    @classmethod
    def head(cls) -> None:
        """The first line of the file."""
        csv.writer(cls.out).writerow(("id", "crossing", "margin"))

    def step(self, objective: Any, images: Tensor, ids: Sequence[str], backward: Any = None) -> Step:
        self.found.clear()
        step = super().step(objective, images, ids, backward)
        rows = zip(ids, self.found[-1].tolist(), self.margins.get(ids).tolist(), strict=True)
        csv.writer(self.out).writerows(rows)
        self.out.flush()
        return step


def noted(expected: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, whose results are kept."""

    def kept(*arguments: Any) -> Tensor:
        Watched.found.append(expected(*arguments))
        return Watched.found[-1]

    return kept


def record(file: Path, finest: bool, words: list[str]) -> None:
    """The command in this process, watched."""
    amat.expected_crossing = noted(amat.expected_crossing)
    METHODS["AMAT"] = Watched
    if finest:
        by_part_and_cell()
    (command,) = entry_points(group="console_scripts", name=words[0])
    sys.argv = words
    with file.open("w", newline="") as Watched.out:
        Watched.head()
        command.load()()


def by_part_and_cell() -> None:
    """Lets ids of patches say their cell, too."""
    from adv_nnunet import loader, trainer

    class FinestLoader(loader.PartLoader, loader.CellLoader):
        """Ids of :class:`PartLoader`, and the cell after them."""

        def generate_train_batch(self) -> dict[str, Any]:
            batch = super().generate_train_batch()
            cells = [self._id(case, corner) for case, corner in zip(batch["keys"], self._corners, strict=True)]
            parts = [sample.split(":")[-1] for sample in batch["ids"]]
            batch["ids"] = [cell.replace(":", f":{part}:") for cell, part in zip(cells, parts, strict=True)]
            return batch

    trainer.PartLoader = FinestLoader


def groupings(ids: Sequence[str]) -> dict[str, list[str]]:
    """Every id that the recorded ones can be made coarser to, by what it tells apart."""
    fields = [sample.split(":") for sample in ids]
    if len(fields[0]) == 3:
        keys = {"case": (0,), "case, part": (0, 1), "case, cell": (0, 2), "case, part, cell": (0, 1, 2)}
    elif len(fields[0]) == 2:
        keys = {"case": (0,), "case, slice": (0, 1)}
    else:
        keys = {"image": (0,)}
    return {name: [":".join(one[k] for k in chosen) for one in fields] for name, chosen in keys.items()}


def agreement(groups: Sequence[str], values: NDArray[np.float64]) -> float:
    """Intraclass correlation, ICC(1), of groups of any size: the share of the variance that lies between them."""
    by = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        by[group].append(value)
    sizes = np.array([len(one) for one in by.values()])
    means = np.array([np.mean(one) for one in by.values()])
    number, groups_ = len(values), len(by)
    between = (sizes * (means - values.mean()) ** 2).sum() / (groups_ - 1)
    within = sum(((np.array(one) - np.mean(one)) ** 2).sum() for one in by.values()) / (number - groups_)
    size = (number - (sizes**2).sum() / number) / (groups_ - 1)
    found = max((between - within) / size, 0.0)
    return float(found / (found + within))


def foretold(groups: Sequence[str], values: NDArray[np.float64]) -> tuple[float, float]:
    """Rank correlation of a visit with the mean of its id's earlier visits; the share of the visits that have some."""
    sums: dict[str, tuple[float, int]] = {}
    pairs = []
    for group, value in zip(groups, values, strict=True):
        total, number = sums.get(group, (0.0, 0))
        if number:
            pairs.append((total / number, value))
        sums[group] = (total + value, number + 1)
    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs) / len(values)


def table(files: Sequence[Path]) -> str:
    """A row for each file and each id."""
    heads = ["visits of", "id", "ids", "visits of each", "variance between ids", "earlier visits foretell the next"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for file in files:
        with file.open(newline="") as opened:
            rows = [row for row in csv.DictReader(opened) if row["crossing"] != "nan"]
        crossing = np.array([float(row["crossing"]) for row in rows])
        middle = np.median(crossing[np.isfinite(crossing)])
        logs = np.log(np.clip(crossing, RANGE[0] * middle, RANGE[1] * middle))
        for name, groups in groupings([row["id"] for row in rows]).items():
            correlation, again = foretold(groups, logs)
            cells = [file.stem, name, f"{len(set(groups))}", f"{len(rows) / len(set(groups)):.1f}"]
            cells += [f"{agreement(groups, logs):.2f}", f"{correlation:.2f} (of {again:.0%} of the visits)"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    recorder = kinds.add_parser("record", epilog="after --: the training")
    recorder.add_argument("file", type=Path)
    recorder.add_argument("--finest", action="store_true", help="nnU-Net in 3D: ids of case, part and cell")
    kinds.add_parser("table").add_argument("files", type=Path, nargs="+")
    own, words = split(sys.argv[1:])
    options = parser.parse_args(own)
    if options.kind == "table":
        print(table(options.files))
    elif not words:
        parser.error("say the training after --")
    else:
        record(options.file, options.finest, words)


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first ``--``, and behind it."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


if __name__ == "__main__":
    main()
