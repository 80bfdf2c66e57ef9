"""Two processes on the CPU: equal networks, equal margins, and no attack pass that waits for the other process."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("gloo_trainer.py")
EPOCHS, BATCHES = 3, 2  # in each process
RUNS = ("stock", "nothing", "amat", "dpaat", "trades")


@pytest.fixture(scope="module")
def ranks(data: Any, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    arguments = {**tools.QUIET, **tools.STILL, "epochs": EPOCHS, "model": tools.ONE_HEAD, "data": str(data.yaml)}
    processes, logs = [], [folder / f"rank_{rank}.log" for rank in range(2)]
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        with log.open("wb") as out:
            command = [sys.executable, str(SCRIPT), str(folder), json.dumps(arguments)]
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        statuses = [process.wait(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("run", RUNS)
def test_the_ranks_have_one_network_after_every_step(ranks: list[dict[str, Any]], run: str) -> None:
    first, second = (rank[run]["steps"] for rank in ranks)
    assert first == second
    assert len(set(first)) == len(first) == EPOCHS * BATCHES


def test_noise_of_nothing_is_the_stock_training_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["nothing"]["steps"] == ranks[0]["stock"]["steps"]
    assert ranks[0]["amat"]["steps"] != ranks[0]["stock"]["steps"]


@pytest.mark.parametrize("run", RUNS)
def test_attacks_do_not_go_through_the_wrapper(ranks: list[dict[str, Any]], run: str) -> None:
    """Each of its passes waits for the other rank's, and for a gradient of every weight."""
    assert [rank[run]["passes"] for rank in ranks] == [EPOCHS * BATCHES] * 2


@pytest.mark.parametrize(("run", "visits"), [("amat", EPOCHS - 1), ("dpaat", EPOCHS)])  # one epoch was clean
def test_the_ranks_have_the_same_margins_and_thresholds(
    ranks: list[dict[str, Any]], data: Any, run: str, visits: int
) -> None:
    first, second = (rank[run] for rank in ranks)
    assert first["method"] == second["method"]
    margins = first["method"]["margins"]
    assert sorted(margins["ids"]) == [f"images/{name}.jpg" for name in data.names("train")]
    assert margins["visits"] == [visits] * 8
    assert all(math.isfinite(value) and value >= 0 for value in margins["values"])
    if run == "amat":
        assert first["thresholds"] == second["thresholds"]
        assert first["thresholds"].startswith("box_loss < ")
    for one, other in zip(first["epochs"], second["epochs"], strict=True):
        for key in ("margin_q05", "margin_q50", "margin_q95"):
            assert one[key] == other[key]


def test_one_rank_writes_what_both_have_learnt(ranks: list[dict[str, Any]]) -> None:
    folder = Path(ranks[0]["amat"]["folder"])
    state = torch.load(folder / "weights" / "last.pt", weights_only=False)
    network = state["model"] if state["ema"] is None else state["ema"]
    assert not hasattr(network, "advmed")  # the run is over
    with (folder / "margins.csv").open() as file:
        rows = list(csv.DictReader(file))
    margins = ranks[1]["amat"]["method"]["margins"]
    written = {row["id"]: float(row["margin"]) for row in rows}
    assert written == pytest.approx(dict(zip(margins["ids"], margins["values"], strict=True)))
    with (folder / "results.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
