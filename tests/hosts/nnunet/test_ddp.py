"""Two processes on the CPU: equal networks, equal margins, and no attack pass that waits for the other process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adv_nnunet.calibration import FILE, measure
from adv_nnunet.trainer import STATE
from advmed.thresholds import Thresholds
from helpers.hosts import check_levels, check_one_network, margins_of, side_by_side

pytestmark = pytest.mark.slow

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "self-calibrated": ("AMAT", {"random_start": 1.0, "std_trainer": "nnUNetTrainerOfNobody"}),
    "measured": ("AMAT", {"backward": "sequential", "threshold_samples": 8}),
    "together": ("SAT", {"backward": "together"}),
    "sequential": ("SAT", {"backward": "sequential"}),
    "moved": ("SAT", {"awp": 0.1}),
    "standard": ("STD", {}),
    "dpaat": ("DPAAT", {"average": "epoch", "step_size": 0.25}),
    "trades": ("TRADES", {}),
}
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(world: Any, stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("ddp")
    data = world.preprocessed / world.dataset("main")
    shutil.copytree(stock, folder / "results" / data.name / stock.name)
    common = world.settings | {"epochs": 3, "refinement": "crossing"}
    runs = json.dumps({name: (kind, common | changes) for name, (kind, changes) in RUNS.items()})
    return side_by_side(
        Path(__file__).with_name("gloo_trainer.py"), folder, data, runs, **world.variables(folder / "results")
    )


@pytest.mark.parametrize("run", RUNS)
def test_one_network_after_every_step_without_attacks_through_the_wrapper(ranks: Ranks, run: str) -> None:
    passes = {"self-calibrated": [1, 1, 2, 2, 2, 2], "standard": [1] * 6, "moved": [4] * 6}
    check_one_network([rank[run] for rank in ranks], passes.get(run, [2] * 6))


@pytest.mark.parametrize(
    ("run", "epochs", "thresholds"),
    [("self-calibrated", 2, "ce+dice < "), ("measured", 3, "ce+dice < "), ("dpaat", 3, "None")],
)
def test_the_ranks_have_the_same_margins_and_thresholds(ranks: Ranks, run: str, epochs: int, thresholds: str) -> None:
    margins = check_levels([rank[run] for rank in ranks], thresholds)
    assert sum(margins["visits"]) == epochs * 2 * 4  # of both ranks
    (shared,) = (row for row, sample in enumerate(margins["ids"]) if margins["visits"][row] >= epochs * 2 * 2)
    assert margins["ids"][shared].endswith(":7")


def test_two_ranks_measure_the_thresholds_of_one_process(ranks: Ranks, bench: Any, stock: Path) -> None:
    """With batches of the whole size and its share of foreground, whatever part of a batch a rank trains with."""
    trainer = bench.make("AMAT", threshold_samples=8)
    trainer.initialize()
    alone = measure(trainer, stock / "fold_0" / "checkpoint_final.pth")
    found = Thresholds.load(Path(ranks[0]["measured"]["folder"]).parents[1] / stock.name / "fold_0" / FILE)
    assert (found.n, found.notes) == (alone.n, alone.notes)
    assert found.mean == pytest.approx(alone.mean, rel=1e-5)
    assert found.std == pytest.approx(alone.std, rel=1e-5)


def test_one_rank_writes_what_both_have_learnt(ranks: Ranks) -> None:
    first, second = (rank["measured"] for rank in ranks)
    fold = Path(first["folder"])
    assert str(fold) == second["folder"]
    assert str(Thresholds.load(fold.parents[1] / "nnUNetTrainer__tiny__2d" / "fold_0" / FILE)) == second["thresholds"]
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    margins = checkpoint[STATE]["method"]["margins"]
    assert all(margins[key] == second["method"]["margins"][key] for key in ("values", "visits"))
    assert list(margins_of(fold / "margins.csv")) == second["method"]["margins"]["ids"]
    assert not any(name.startswith("module.") for name in checkpoint["network_weights"])
    assert len([*fold.glob("checkpoint_*")]) == 2  # best and final, from one rank


def test_sequential_backward_across_ranks(ranks: Ranks) -> None:
    together, sequential = ranks[0]["together"]["weights"], ranks[0]["sequential"]["weights"]
    assert together.keys() == sequential.keys()
    for name, value in together.items():
        assert sequential[name] == pytest.approx(value, abs=2e-3, rel=1e-3), name
