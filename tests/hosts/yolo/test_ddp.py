"""Two processes on the CPU: equal networks, equal margins, and no attack pass that waits for the other process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.detection import ONE_HEAD, QUIET, STILL, epochs
from helpers.hosts import check_levels, check_one_network, margins_of, side_by_side

pytestmark = pytest.mark.slow

EPOCHS, BATCHES = 3, 2  # in each process
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "stock": ("std", {}),
    "nothing": ("sat", {"eps": 0.0, "bn": "clean", "steps": 1}),
    "amat": ("amat", {"delta": 0.5, "steps": 2, "random_start": 1.0, "refinement": "crossing"}),
    "fast": ("amat", {}),  # as it is by default
    "dpaat": ("dpaat", {"eps": 1.0, "steps": 2, "step_size": 0.25, "average": "epoch"}),
    "moved": ("sat", {"eps": 1.0, "steps": 2, "awp": 0.1}),
    "trades": ("trades", {"eps": 1.0, "steps": 2}),
}
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(data: Any, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    arguments = {**QUIET, **STILL, "epochs": EPOCHS, "model": ONE_HEAD, "data": str(data.yaml)}
    script, folder = Path(__file__).with_name("gloo_trainer.py"), tmp_path_factory.mktemp("ddp")
    return side_by_side(script, folder, json.dumps(arguments), json.dumps(RUNS))


@pytest.mark.parametrize("run", RUNS)
def test_one_network_after_every_step_without_attacks_through_the_wrapper(ranks: Ranks, run: str) -> None:
    check_one_network([rank[run] for rank in ranks], [1] * EPOCHS * BATCHES)
    assert (ranks[0][run]["steps"] == ranks[0]["stock"]["steps"]) == (run in ("stock", "nothing")), "bit for bit"


@pytest.mark.parametrize(
    ("run", "visits", "thresholds"),
    [
        ("amat", EPOCHS - 1, "box_loss < "),
        ("fast", EPOCHS - 1, "box_loss < "),
        ("dpaat", EPOCHS, "None"),
    ],  # one epoch was clean
)
def test_the_ranks_have_the_same_margins_and_thresholds(
    ranks: Ranks, data: Any, run: str, visits: int, thresholds: str
) -> None:
    margins = check_levels([rank[run] for rank in ranks], thresholds)
    assert sorted(margins["ids"]) == data.ids("train")
    assert margins["visits"] == [visits] * 8


def test_one_rank_writes_what_both_have_learnt(ranks: Ranks) -> None:
    folder, margins = Path(ranks[0]["amat"]["folder"]), ranks[1]["amat"]["method"]["margins"]
    state = torch.load(folder / "weights" / "last.pt", weights_only=False)
    assert not hasattr(state["model"] if state["ema"] is None else state["ema"], "advmed")  # the run is over
    assert margins_of(folder / "margins.csv") == pytest.approx(
        dict(zip(margins["ids"], margins["values"], strict=True))
    )
    assert epochs(folder) == [1, 2, 3]
