"""Two processes on the CPU: equal networks, equal margins, and no attack pass that waits for the other process."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adv_nnunet.calibration import FILE
from adv_nnunet.trainer import STATE
from advmed.thresholds import Thresholds

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("gloo_trainer.py")
RUNS = ("self-calibrated", "measured", "together", "sequential", "standard", "dpaat", "trades")


@pytest.fixture(scope="module")
def ranks(world: Any, stock_results: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    shutil.copytree(stock_results, folder / "results")
    environment = os.environ | {
        "nnUNet_raw": str(world.raw),
        "nnUNet_preprocessed": str(world.preprocessed),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
        "OMP_NUM_THREADS": "1",
    }
    logs = [folder / f"rank_{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(SCRIPT), str(rank), str(folder), str(world.preprocessed / world.main)]
        with log.open("wb") as out:
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        statuses = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("run", RUNS)
def test_the_ranks_have_one_network_after_every_step(ranks: list[dict[str, Any]], run: str) -> None:
    first, second = (rank[run]["steps"] for rank in ranks)
    assert len(first) == 6
    assert [weights for weights, _ in first] == [weights for weights, _ in second]
    assert len({weights for weights, _ in first}) == 6, "a step changed nothing"


@pytest.mark.parametrize(
    ("run", "passes"),
    [
        ("self-calibrated", [1, 1, 2, 2, 2, 2]),
        ("measured", [2] * 6),
        ("together", [2] * 6),
        ("standard", [1] * 6),
        ("dpaat", [2] * 6),
        ("trades", [2] * 6),
    ],
)
def test_attacks_do_not_go_through_the_wrapper(ranks: list[dict[str, Any]], run: str, passes: list[int]) -> None:
    """Each of its passes waits for the other rank's, and for a gradient of every weight."""
    assert [number for _, number in ranks[0][run]["steps"]] == passes


@pytest.mark.parametrize("run", ["self-calibrated", "measured", "dpaat"])
def test_the_ranks_have_the_same_margins(ranks: list[dict[str, Any]], run: str) -> None:
    states = [rank[run]["method"] for rank in ranks]
    assert states[0] == states[1]
    margins = states[0]["margins"]
    epochs = 2 if run == "self-calibrated" else 3
    assert sum(margins["visits"]) == epochs * 2 * 4  # of both ranks
    (shared,) = (row for row, sample in enumerate(margins["ids"]) if margins["visits"][row] >= epochs * 2 * 2)
    assert margins["ids"][shared].endswith(":7")
    assert all(math.isfinite(value) and value >= 0 for value in margins["values"])
    for name in ("adv_margin_q05", "adv_margin_q50", "adv_margin_q95"):
        assert ranks[0][run]["log"][name] == ranks[1][run]["log"][name]


def test_the_ranks_have_the_same_thresholds(ranks: list[dict[str, Any]]) -> None:
    for run in ("self-calibrated", "measured"):
        assert ranks[0][run]["thresholds"] == ranks[1][run]["thresholds"]
        assert ranks[0][run]["thresholds"].startswith("ce+dice < ")
    # One rank measured; the other was told.
    fold = Path(ranks[0]["measured"]["folder"])
    (path,) = fold.parents[1].glob(f"nnUNetTrainer__tiny__2d/fold_0/{FILE}")
    assert str(Thresholds.load(path)) == ranks[1]["measured"]["thresholds"]


def test_sequential_backward_across_ranks(ranks: list[dict[str, Any]]) -> None:
    together, sequential = ranks[0]["together"]["weights"], ranks[0]["sequential"]["weights"]
    assert together.keys() == sequential.keys()
    for name, value in together.items():
        assert sequential[name] == pytest.approx(value, abs=2e-3, rel=1e-3), name


def test_the_checkpoint_holds_the_margins_of_both_ranks(ranks: list[dict[str, Any]]) -> None:
    fold = Path(ranks[0]["measured"]["folder"])
    assert fold == Path(ranks[1]["measured"]["folder"])
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint[STATE]["method"]["margins"] == ranks[1]["measured"]["method"]["margins"]
    assert not any(name.startswith("module.") for name in checkpoint["network_weights"])
    assert len([*fold.glob("checkpoint_*")]) == 2  # best and final, from one rank
