"""One of several processes at one evaluation, started by evaluation/test_processes.py as torchrun would do it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmed.attacks.names import parse_attacks
from advmed.cli.evaluate import compare
from advmed.distributed import Processes
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch
from advmed.evaluation.subjects import Subject
from advmed.report import Example, View
from helpers.evaluations import leave_out_curves, mean_of
from helpers.hosts import listening

ATTACKS = parse_attacks(["pgd3", "ifgsm2"])
LEVELS = (0, 0.5, 2)
SHARE = mean_of("right", "share", fails_at=0.5, is_mean=True)
LOSS = mean_of("loss", higher_is_better=False)
BATCHES = 5


def subject(folder: Path, name: str, loaded: list[str], measured: list[str] | None = None) -> Subject:
    """A small network of random weights, and five batches of two images."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model = nn.Sequential(nn.Flatten(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 2)).requires_grad_(False)
    checkpoint = folder / f"{name}.ckpt"

    def load(number: int) -> LoadedBatch:
        loaded.append(f"{name} {number}")
        images = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(number))
        labels = model(images).argmax(1)

        def objective(images: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(images), labels, reduction="none")[:, None]

        def score(images: Tensor) -> dict[str, Tensor]:
            if measured is not None:
                measured.append(name)
            return {"right": (model(images).argmax(1) == labels).double(), "loss": objective(images)[:, 0]}

        return LoadedBatch(images, objective, score)

    batches = [EvaluationBatch([f"{n}a", f"{n}b"], lambda n=n: load(n)) for n in range(BATCHES)]
    return Subject(name, checkpoint, batches, subset=lambda number: batches[: number // 2])


def picture(id_: str) -> Example:
    """A sample as the report shows it: its image and what is seen under noise."""
    image = torch.rand(4, 5, generator=torch.Generator().manual_seed(ord(id_[0]) + ord(id_[1]))).numpy()
    return Example(id_, image, None, [View("one", "", 0, image), View("one", "pgd3", 0.5, image[::-1])])


def run(folder: Path, report: str, *, undrawn: bool = False) -> dict[str, Any]:
    """A comparison of two models; what this process loaded, drew, said and warned of."""
    loaded: list[str] = []
    drawn: list[str] = []
    measured: list[str] = []
    said: list[str] = []

    def examples(attack: tuple[str, Any], levels: Sequence[float], ids: Sequence[str]) -> list[Example]:
        if undrawn:
            raise RuntimeError("no font for this")
        drawn.extend(ids)
        return [picture(id_) for id_ in ids]

    with listening(logging.getLogger("advmed.evaluation.loop")) as warned:
        page = compare(
            folder / report,
            [subject(folder, name, loaded, measured) for name in ("one", "other")],
            ATTACKS,
            LEVELS,
            [SHARE, LOSS],
            examples=examples,
            fingerprint={},
            checks=4,
            bounds=(0.0, 1.0),
            groups=lambda id_: id_[:1],
            say=said.append,
            title="Shared",
            level_unit="L2 norm of the noise",
        )
    found = {"loaded": loaded, "drawn": drawn, "measured": len(measured), "said": said, "warned": warned}
    return {**found, "page": str(page), "exists": page.exists()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    leave_out_curves(pytest.MonkeyPatch())
    found = {"shared": run(folder, "shared"), "again": run(folder, "shared")}
    processes = Processes.of_environment()
    if processes.rank == 0:
        (folder / "shared" / "one" / "parts" / "batch_00001.npz").write_bytes(b"no archive")
        whole = folder / "shared" / "other" / "parts" / "batch_00002.npz"
        whole.write_bytes(whole.read_bytes()[:-100])  # cut off
        (folder / "shared" / "other" / "parts" / "batch_00003.npz").unlink()
    processes.wait()
    found["mended"] = run(folder, "shared")
    found["undrawn"] = run(folder, "undrawn", undrawn=processes.rank == 1)
    found["team"] = {"rank": processes.rank, "size": processes.size}
    (folder / f"rank_{processes.rank}.json").write_text(json.dumps(found))
    processes.wait()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
