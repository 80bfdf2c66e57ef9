"""Metrics against the paper's tables, hand-computed cases and an independent NumPy count."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advmed.evaluation.auc import auc_robust, check_levels
from advmed.evaluation.dice import (
    Counts,
    adi,
    confusion_counts,
    dice_per_class,
    dice_per_sample,
    region_confusion_counts,
    tvdi,
)

APPENDIX_A = list(csv.DictReader((Path(__file__).parents[1] / "data" / "auc_robust_appendix_a.csv").open()))


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(";")]


@pytest.mark.parametrize("row", APPENDIX_A, ids=lambda row: f"{row['dataset']}-{row['delta']}")
def test_auc_robust_reproduces_the_paper(row: dict[str, str]) -> None:
    table = [numbers(other["values"]) for other in APPENDIX_A if other["dataset"] == row["dataset"]]
    lower = row["better"] == "lower"
    value = auc_robust(
        numbers(row["levels"]),
        numbers(row["values"]),
        higher_is_better=not lower,
        scale=max(map(max, table)) if lower else None,
    )
    # The values are printed with four digits themselves: half a unit of the last one, and what theirs add to it.
    assert value == pytest.approx(float(row["auc_robust"]), abs=1e-4)


def test_auc_robust_closed_forms() -> None:
    assert len(APPENDIX_A) == 34  # of the paper's, above
    assert auc_robust([0, 1, 7], [0.8, 0.8, 0.8]) == pytest.approx(0.8)
    # From 1 to 0 in a straight line: area 1/2, however the levels lie.
    assert auc_robust([0, 1, 4], [1.0, 0.75, 0.0]) == pytest.approx(math.sqrt(0.5))
    assert auc_robust([0, 2], [90.0, 10.0], scale=100) == pytest.approx(math.sqrt(0.9 * 0.5))
    assert auc_robust([0, 2], [2.0, 6.0], higher_is_better=False, scale=8) == pytest.approx(math.sqrt(0.25 * 0.5))


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("levels", [[], [0], [1, 2], [0, 2, 2], [0, 3, 2], [0, NAN, 2], [0, INF], [-1, 0, 1], [NAN, 1]])
def test_levels_that_are_none(levels: list[float]) -> None:
    with pytest.raises(ValueError, match=r"start at 0 .* increase strictly"):
        check_levels(levels)
    with pytest.raises(ValueError, match="start at 0"):
        auc_robust(levels, [0.5] * len(levels))


@pytest.mark.parametrize(
    ("values", "how", "message"),
    [
        *(
            (values, {}, "one finite value >= 0 for each of 2 levels")
            for values in ([0.5], [0.5, 0.5, 0.5], [0.5, NAN], [INF, 0.5], [0.5, -0.1])
        ),
        *(([1, 1], {"scale": scale}, "must be finite and > 0") for scale in (0.0, -1.0, NAN, INF)),
        ([1.6, 3.8], {"higher_is_better": False}, "needs a scale"),
    ],
)
def test_curves_without_auc_robust(values: list[float], how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auc_robust([0, 1], values, **how)


@pytest.mark.parametrize("shape", [(1, 7), (3, 6, 5), (2, 4, 3, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_counts_against_numpy(shape: tuple[int, ...], masked: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    prediction = torch.randint(0, 5, shape, generator=generator)
    truth = torch.randint(0, 5, shape, generator=generator)
    ignore = torch.rand(shape, generator=generator) < 0.3 if masked else None
    classes = (3, 1, 9)
    counts = confusion_counts(prediction, truth, classes, ignore=ignore)

    for n in range(shape[0]):
        kept = np.ones(shape[1:], bool) if ignore is None else ~ignore[n].numpy()
        p, t = prediction[n].numpy()[kept], truth[n].numpy()[kept]
        for c, label in enumerate(classes):
            assert counts.tp[n, c] == np.sum((p == label) & (t == label))
            assert counts.fp[n, c] == np.sum((p == label) & (t != label))
            assert counts.fn[n, c] == np.sum((p != label) & (t == label))
    assert {count.dtype for count in counts} == {torch.int64}
    assert {tuple(count.shape) for count in counts} == {(shape[0], 3)}


def test_region_counts_let_regions_overlap() -> None:
    prediction = torch.tensor([[[1, 1, 1, 0, 0], [0, 1, 0, 0, 0]]])
    truth = torch.tensor([[[1, 1, 0, 0, 1], [0, 1, 1, 0, 0]]]).bool()
    counts = region_confusion_counts(prediction, truth)
    assert [count.tolist() for count in counts] == [[[2, 1]], [[1, 0]], [[1, 1]]]
    without_ends = region_confusion_counts(prediction, truth, ignore=torch.tensor([[True, False, False, False, True]]))
    assert [count.tolist() for count in without_ends] == [[[1, 1]], [[1, 0]], [[0, 1]]]


LABELS = torch.zeros(2, 4, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("truth", "how", "message"),
    [
        (LABELS[0], {}, r"same shape, got \(2, 4, 4\) and \(4, 4\)"),
        (LABELS.float(), {}, r"integer labels.*torch\.float32.*argmax"),
        (LABELS.bool(), {}, r"region_confusion_counts for masks"),
        *((LABELS, {"classes": classes}, "different foreground labels") for classes in ([], [1, 1])),
        (LABELS, {"ignore": LABELS}, r"bool mask of shape \(2, 4, 4\), got torch\.int64"),
        (LABELS, {"ignore": LABELS[0].bool()}, r"bool mask of shape \(2, 4, 4\), got torch\.bool of shape \(4, 4\)"),
    ],
)
def test_counts_refuse_what_they_cannot_count(truth: Tensor, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_counts(LABELS, truth, **{"classes": [1], **how})


def test_probabilities_are_no_masks() -> None:
    with pytest.raises(ValueError, match="threshold probabilities first"):
        region_confusion_counts(torch.rand(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool))


# Sample 0 has both classes, sample 1 only the first, sample 2 a false alarm of the second, sample 3 none.
COUNTS = Counts(
    tp=torch.tensor([[4, 1], [3, 0], [0, 0], [0, 0]]),
    fp=torch.tensor([[0, 2], [1, 0], [0, 5], [0, 0]]),
    fn=torch.tensor([[2, 0], [1, 0], [0, 0], [0, 0]]),
)


def test_dice_by_hand() -> None:
    expected = torch.tensor([[8 / 10, 2 / 4], [6 / 8, NAN], [NAN, 0], [NAN, NAN]], dtype=torch.float64)
    torch.testing.assert_close(dice_per_class(COUNTS), expected, equal_nan=True)
    expected = torch.tensor([0.65, 0.75, 0, NAN], dtype=torch.float64)
    torch.testing.assert_close(dice_per_sample(COUNTS), expected, equal_nan=True)


def test_adi_is_equation_3_and_tvdi_equation_5() -> None:
    """ADI weighs samples alike; TVDI is per class. Both leave out what is absent."""
    # Per class first, ADI would be ((0.8 + 0.75) / 2 + (0.5 + 0) / 2) / 2: another number, so the order is pinned down.
    assert adi(COUNTS) == pytest.approx((0.65 + 0.75 + 0) / 3)
    assert tvdi(COUNTS) == pytest.approx((14 / (14 + 1 + 3) + 2 / (2 + 7 + 0)) / 2)
    assert tvdi(Counts(*(count[1:2] for count in COUNTS))) == pytest.approx(0.75)
    nothing = Counts(*(count[3:] for count in COUNTS))
    assert math.isnan(adi(nothing)) and math.isnan(tvdi(nothing))


def test_counts_travel_as_scores() -> None:
    scores = {name: count.numpy() for name, count in COUNTS._asdict().items()}
    assert adi(Counts.of({**scores, "other": np.zeros(4)})) == adi(COUNTS)
