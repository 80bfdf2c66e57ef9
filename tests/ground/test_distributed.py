"""Merging across three real processes (gloo on the CPU), against one process that meets every sample."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import advmed
from helpers import shared_methods as worker
from helpers.hosts import side_by_side
from helpers.shared_methods import DPAATS, WORLD

SCRIPT = Path(worker.__file__)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
    ),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank ended with."""
    packages = SCRIPT.parents[1], Path(advmed.__file__).parents[1]  # advmed whether it is installed or not
    return side_by_side(
        SCRIPT, tmp_path_factory.mktemp("gloo"), world=WORLD, PYTHONPATH=os.pathsep.join(map(str, packages))
    )


@pytest.mark.parametrize(
    "name", ["amat", "amat shared", "amat running", "amat secant", "statistics", "running", "running, fading", *DPAATS]
)
def test_all_ranks_end_equal(ranks: list[dict[str, Any]], name: str) -> None:
    assert len(ranks) == WORLD
    assert all(rank[name] == ranks[0][name] for rank in ranks)


def test_amat_on_disjoint_samples_is_one_process_that_meets_all(ranks: list[dict[str, Any]]) -> None:
    method = worker.method_of("fixed")
    for epoch in range(worker.EPOCHS):
        for rank in range(WORLD):
            worker.train(method, rank, epoch, shared=False)
        single, merged = method.margins.state_dict(), ranks[0]["amat"][epoch]["margins"]
        assert len(set(single["values"])) > 3
        for key in ("values", "visits"):
            assert dict(zip(single["ids"], single[key], strict=True)) == dict(
                zip(merged["ids"], merged[key], strict=True)
            )


def test_amat_on_shared_samples_stays_in_its_bounds_and_counts_every_visit(ranks: list[dict[str, Any]]) -> None:
    for kind, lowest in (("shared", 0.0), ("secant", 0.25 / 4)):
        for epoch, state in enumerate(ranks[0][f"amat {kind}"]):
            margins = state["margins"]
            assert sum(margins["visits"]) == (epoch + 1) * WORLD * worker.BATCHES * 3
            for value, visits in zip(margins["values"], margins["visits"], strict=True):
                assert lowest <= value <= min(0.9, 0.25 * (visits + 1) if kind == "shared" else 0.9) + 1e-6


@pytest.mark.parametrize("kind", ["fixed", "secant"])
def test_amat_on_shared_samples_is_what_each_process_makes_of_them_merged(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    """Their visits since the last merge, exchanged by hand."""
    methods = [worker.method_of(kind) for _ in range(WORLD)]
    for epoch in range(worker.EPOCHS):
        for rank, method in enumerate(methods):
            worker.train(method, rank, epoch, shared=True)
        changes = [method.margins.changes() for method in methods]
        for method in methods:
            method.margins.merge(changes)
            method.margins.clamp(method.lowest, method.highest)
        found = ranks[0]["amat shared" if kind == "fixed" else "amat secant"][epoch]["margins"]
        expected = methods[0].margins.state_dict()
        assert (found["ids"], found["visits"]) == (expected["ids"], expected["visits"])
        assert found["values"] == pytest.approx(expected["values"], rel=1e-6)


@pytest.mark.parametrize("name", DPAATS)
def test_dpaat_on_shares_of_a_batch_is_one_process_with_the_whole(ranks: list[dict[str, Any]], name: str) -> None:
    """What a sample's loss increase is compared with is the mean of all shares, and so are the gradients."""
    found, whole = ranks[0][name], worker.dpaat_of(0, 1, worker.DPAATS[name])
    assert len(found["gradients"]) == worker.EPOCHS * 4
    np.testing.assert_allclose(found["gradients"], whole["gradients"], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found["increases"], whole["increases"], rtol=1e-6)
    for epoch in range(worker.EPOCHS):
        assert len(whole["sizes"][epoch]) == 12
        assert found["sizes"][epoch] == pytest.approx(whole["sizes"][epoch], abs=1e-6)
    assert len({round(size, 3) for size in whole["sizes"][-1].values()}) > 3


def test_statistics_pool_every_sample_once(ranks: list[dict[str, Any]]) -> None:
    every = [
        torch.cat([worker.terms_of(rank, done) for rank in range(WORLD) for done in range(epoch + 1)]).numpy()
        for epoch in range(worker.EPOCHS)
    ]
    state = ranks[0]["statistics"]
    assert state["n"] == len(every[-1])
    np.testing.assert_allclose(state["mean"], every[-1].mean(0), rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(np.array(state["m2"]) / state["n"]), every[-1].std(0), rtol=1e-12)
    for epoch, state in enumerate(ranks[0]["running"]):
        # Merged after every epoch: nothing counts twice.
        pooled = state["statistics"]
        np.testing.assert_allclose(pooled["mean"], every[epoch].mean(0), rtol=1e-12)
        np.testing.assert_allclose(np.sqrt(np.array(pooled["m2"]) / pooled["n"]), every[epoch].std(0), rtol=1e-12)
        np.testing.assert_allclose(state["ceiling"], every[0].mean(0), rtol=1e-12)
        np.testing.assert_allclose(state["now"], np.minimum(every[epoch].mean(0), every[0].mean(0)), rtol=1e-12)


def test_merging_does_not_lengthen_the_memory(ranks: list[dict[str, Any]]) -> None:
    """The weight is the mean of what the ranks would have by themselves."""
    alone = 0.0
    for epoch, state in enumerate(ranks[0]["running, fading"]):
        counts = [len(worker.terms_of(rank, epoch)) for rank in range(WORLD)]
        alone = sum(alone * np.exp(-n / 20.0) + n for n in counts) / WORLD
        assert state["statistics"]["n"] == pytest.approx(alone, rel=1e-12)
