"""Two processes on the CPU, by Lightning's own strategy: one network, one table of noise levels, and the result of one
process with the same global batches."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from adv_landmark import module
from adv_landmark.data import LandmarkData
from advmed.thresholds import Thresholds

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("gloo_fit.py")
EPOCHS, BATCHES = 3, 2
COMMON: dict[str, Any] = {
    "data__batch_size": 2,
    "optimizer": "SGD",
    "optimizer__lr": 0.05,
    "trainer__max_epochs": EPOCHS,
    "trainer__precision": "64-true",  # in float32, noise in the direction of a gradient makes much of rounding errors
    "model__validation_steps": 2,
    "model__method__eps": 0.4,
}
RUNS: dict[str, dict[str, Any]] = {
    "dpaat": {"model__method__name": "DPAAT", "model__heatmap": "bce"},
    "amat": {
        "model__method__name": "AMAT",
        "model__method__delta": 0.2,
        "model__method__refinement": "crossing",
        "checkpoint__save_on_train_epoch_end": "false",
    },
    "calibrated": {"model__method__name": "AMAT", "model__method__delta": 0.2},
}
NAMES = {"train": [f"train{i}.png" for i in range(8)], "test": [f"test{i}.png" for i in range(3)]}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Thresholds that some images are below and some above."""
    path = tmp_path_factory.mktemp("thresholds") / "own.json"
    Thresholds((1.0, 0.42, 0.42), ("heatmap", "offset_y", "offset_x")).save(path)
    return {
        name: {**COMMON, **changes, **({"model__method__thresholds": path} if name == "amat" else {})}
        for name, changes in RUNS.items()
    }


@pytest.fixture(scope="module")
def ranks(
    given: dict[str, dict[str, Any]], root: Path, tools: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ddp")
    two = {"trainer__devices": 2, "trainer__strategy": "ddp", "trainer__default_root_dir": None}
    words = {name: tools.arguments(root, folder, **changes, **two) for name, changes in given.items()}
    last = folder / "dpaat" / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    two["trainer__default_root_dir"] = folder / "predict"
    short = {"ckpt_path": last, "model__attack__steps": None, "data__batch_size": 1}
    words["predict"] = tools.arguments(root, folder, **two, **short)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, logs = [], [folder / f"rank_{rank}.log" for rank in range(2)]
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "ADVMED_RUNS": json.dumps(words),
        }
        with log.open("wb") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(SCRIPT), str(folder)], env=environment, stdout=out, stderr=subprocess.STDOUT
                )
            )
    try:
        statuses = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return folder, [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("run", RUNS)
def test_the_ranks_have_one_network_and_one_table(
    ranks: tuple[Path, list[dict[str, Any]]], tools: Any, run: str
) -> None:
    folder, found = ranks
    first, second = (rank[run] for rank in found)
    assert first["steps"] == second["steps"]
    assert len(set(first["steps"])) == len(first["steps"]) == EPOCHS * BATCHES
    assert first["method"] == second["method"]
    assert first["thresholds"] == second["thresholds"]
    for key, value in first["logged"].items():
        if key.startswith(("adv/margin", "val/")):
            assert second["logged"][key] == value, key
    margins = first["method"]["margins"]
    assert sorted(margins["ids"]) == NAMES["train"]
    assert margins["visits"] == [EPOCHS - (run == "calibrated")] * 8
    written = tools.margins(tools.runs(folder / run)[-1])
    assert {i: value for i, (value, _) in written.items()} == pytest.approx(
        dict(zip(margins["ids"], margins["values"], strict=True))
    )
    for epoch in range(EPOCHS):
        batches = [rank[run]["batches"][epoch * BATCHES :][:BATCHES] for rank in found]
        met = [i for part in batches for batch in part for i in batch]
        assert len(met) == len(set(met)) == 8


def test_a_checkpoint_of_validation_knows_the_images_of_both_ranks(
    ranks: tuple[Path, list[dict[str, Any]]], tools: Any
) -> None:
    """It is written before the epoch ends."""
    (run,) = tools.runs(ranks[0] / "amat")
    state = tools.state(run, "best")
    margins = state["advmed"]["method"]["margins"]
    assert sorted(margins["ids"]) == NAMES["train"]
    assert margins["visits"] == [state["epoch"] + 1] * 8


def test_predictions_of_both_ranks_are_in_one_file(ranks: tuple[Path, list[dict[str, Any]]], tools: Any) -> None:
    (run,) = tools.runs(ranks[0] / "predict")
    rows = tools.table(run / "predictions.csv")
    assert sorted({row["image"] for row in rows}) == NAMES["test"]
    assert len(rows) == 3 * 3
    assert sorted(path.name for path in (run / "overlays").iterdir()) == [f"{name}.png" for name in NAMES["test"]]


@pytest.mark.parametrize("run", ["dpaat", "amat"])
def test_the_result_is_that_of_one_process_with_the_same_global_batches(
    ranks: tuple[Path, list[dict[str, Any]]],
    given: dict[str, dict[str, Any]],
    root: Path,
    tmp_path: Path,
    tools: Any,
    monkeypatch: pytest.MonkeyPatch,
    run: str,
) -> None:
    """Self-calibration is left out: the running thresholds of two processes meet at the end of an epoch only."""

    def loader(self: LandmarkData) -> DataLoader[dict[str, Any]]:
        dataset = self.dataset("train", augment=True)
        sampler = DistributedSampler(dataset, 1, 0, seed=0)  # Lightning's own order, in batches of both processes
        return DataLoader(dataset, batch_size=2 * self.batch_size, sampler=sampler)

    monkeypatch.setattr(LandmarkData, "train_dataloader", loader)
    monkeypatch.setattr(module, "make_network", runpy.run_path(str(SCRIPT))["without_batch_norm"])
    alone = tools.fit(root, tmp_path, **given[run])
    folder, _ = ranks
    together = tools.runs(folder / run)[-1]
    tools.close(tools.weights(alone), tools.weights(together), atol=1e-7, rtol=1e-6)
    first, second = tools.margins(alone), tools.margins(together)
    assert first.keys() == second.keys()
    for sample, (value, visits) in first.items():
        assert second[sample] == (pytest.approx(value, abs=1e-6), visits)
    assert len({round(value, 6) for value, _ in first.values()}) > 1
    moved = tools.weights(tools.fit(root, tmp_path / "still", **{**given[run], "optimizer__lr": 0.0}))
    assert max(float((value - moved[key]).abs().max()) for key, value in tools.weights(alone).items()) > 3e-3
    for key in ("val/MRE", "val/SDR_4mm", "val/robust_MRE"):
        assert tools.logged(together, key) == pytest.approx(tools.logged(alone, key), abs=1e-5), key
        assert np.isfinite(tools.logged(alone, key)).all()
    for key in ("adv/loss_clean", "adv/loss_adversarial", "adv/expanded"):
        assert tools.logged(together, key) == pytest.approx(tools.logged(alone, key), rel=1e-5), key
    assert all(value.dtype == torch.float64 for value in tools.weights(alone).values())
