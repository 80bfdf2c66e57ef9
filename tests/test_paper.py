"""The paper's tables beside ours: what `benchmarks/paper.py` prints."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from advmed import auc_robust

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def paper() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("paper")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table6", "table7"])
def test_every_published_curve_has_the_levels_of_its_table(paper: Any, name: str) -> None:
    table = paper.TABLES[name]
    levels, found = paper.levels_of(table), paper.published(table)
    assert levels[0] == 0
    assert len(levels) == 4
    assert {"AMAT"} < set(found)
    assert {f"SAT{eps:g}" for eps in paper.sats_of(table.dataset)} < set(found)
    for curves in found.values():
        clean = {curve[0] for curve in curves.values()}
        assert len(clean) == 1, "both attacks begin with the same clean value"
        assert all(len(curve) == len(levels) for curve in curves.values())


def test_the_numbers_over_delta_are_the_papers(paper: Any) -> None:
    """Their AUC_robust, which the paper prints, follows from the curves that are shown."""
    table = paper.TABLES["table9"]
    curve = paper.published(table)["delta 0.5"]["pgd100"]
    best = [row for row in paper.rows("auc_robust_appendix_a.csv") if row["dataset"] == "hippocampus"]
    wanted = next(float(row["auc_robust"]) for row in best if float(row["delta"]) == 0.5)
    assert auc_robust(paper.levels_of(table), curve) == pytest.approx(wanted, abs=1e-4)


def test_a_cell_is_ours_and_the_papers_in_brackets(paper: Any) -> None:
    curves = {"AMAT": {attack: [0.5, 0.4, 0.3, 0.2] for attack in paper.ATTACKS}}
    text = paper.page("table2", paper.TABLES["table2"], paper.Found(curves, 0.4, 17, {}), "cpu")
    assert "17 validation samples" in text
    assert "times 0.4" in text
    assert "| AMAT | 0.500 (0.784) | 0.400 (0.752) | 0.300 (0.675) | 0.200 (0.558) |" in text


def test_epochs_are_compared_with_standard_ones(paper: Any) -> None:
    found = paper.Found({}, 1.0, 17, {"STD": 2.0, "SAT5": 6.6})
    text = paper.page("table5", paper.TABLES["table5"], found, "cpu")
    assert "| SAT5 | 6.6 | 3.30 | 11.40 |" in text
