"""Intervals over samples: against closed forms, loops written apart from them, and what a 95 % interval promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from advmed.evaluation.auc import auc_robust
from advmed.evaluation.intervals import CONFIDENCE, interval, resamples, seed_of
from advmed.evaluation.metric import Metric
from advmed.report import Entry, tabulate
from helpers.evaluations import by_hand


def ids(count: int) -> list[str]:
    return [f"case_{i}" for i in range(count)]


def mean_of(name: str, **changes: Any) -> Metric:
    return Metric(name, lambda s: float(np.nanmean(s[name])), per_sample=lambda s: s[name], **changes)


def test_the_same_samples_give_the_same_draws_and_others_give_others() -> None:
    drawn = np.stack(resamples(ids(20), count=50))
    np.testing.assert_array_equal(drawn, resamples(ids(20), count=50))
    np.testing.assert_array_equal(drawn[:10], resamples(ids(20), count=10))  # more draws begin with the same ones
    assert drawn.shape == (50, 20)
    assert drawn.min() == 0
    assert drawn.max() == 19
    others = [
        resamples(ids(20)[::-1], count=50),
        resamples([*ids(19), "other"], count=50),
        resamples(ids(20), ["one"] * 10 + ["other"] * 10, count=50),
    ]
    for other in others:
        assert not np.array_equal(drawn, np.stack(other))
    assert len({seed_of(ids(20)), seed_of(ids(21)), seed_of(ids(20), ids(20))}) == 3
    assert resamples(ids(3), count=0) == []


def test_draws_are_with_replacement_and_even() -> None:
    drawn = np.stack(resamples(ids(10), count=20_000))
    counts = np.bincount(drawn.ravel(), minlength=10) / 200_000
    np.testing.assert_allclose(counts, 0.1, atol=0.003)
    missing = np.mean([3 not in row for row in drawn])
    assert missing == pytest.approx(0.9**10, abs=0.012)


def test_groups_are_drawn_whole() -> None:
    """Slices of a case come together, whatever their order and number; so many cases as there are."""
    groups = ["b", "a", "b", "c", "a", "b"]
    members = {"a": [1, 4], "b": [0, 2, 5], "c": [3]}
    drawn = resamples(ids(6), groups, count=300)
    sizes = set()
    for rows in drawn:
        times = {name: {int((rows == k).sum()) for k in indices} for name, indices in members.items()}
        assert all(len(found) == 1 for found in times.values()), "a group came in part"
        assert sum(found.pop() for found in times.values()) == 3
        sizes.add(len(rows))
    assert sizes == {3, 4, 5, 6, 7, 8, 9}
    np.testing.assert_array_equal(np.concatenate(drawn), np.concatenate(resamples(ids(6), groups, count=300)))


def test_groups_of_one_are_independent_samples() -> None:
    drawn = resamples(ids(50), ids(50), count=2000)
    assert {len(rows) for rows in drawn} == {50}
    value = np.random.default_rng(0).normal(size=50)
    spread = np.std([value[rows].mean() for rows in drawn])
    assert spread == pytest.approx(value.std() / 50**0.5, rel=0.06)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    value = np.random.default_rng(1).normal(3.0, 2.0, 400)
    draws = mean_of("v", is_mean=True).resampled({"v": value}, resamples(ids(400), count=4000))
    low, high = interval(draws)
    half = 1.959964 * value.std() / 400**0.5
    assert low == pytest.approx(value.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(value.mean() + half, abs=0.06 * half)
    low, high = interval(draws, confidence=0.5)
    half = 0.674490 * value.std() / 400**0.5
    assert (low, high) == pytest.approx((value.mean() - half, value.mean() + half), abs=0.08 * half)


def test_groups_widen_the_interval_of_samples_that_repeat_each_other() -> None:
    """Ten copies of every sample tell no more than one of it: the interval is wider by the root of ten."""
    value = np.random.default_rng(2).normal(size=60)
    copies, groups = np.repeat(value, 10), [f"g{i}" for i in np.repeat(range(60), 10)]
    metric = mean_of("v", is_mean=True)
    naive = np.ptp(interval(metric.resampled({"v": copies}, resamples(ids(600), count=2000))))
    honest = np.ptp(interval(metric.resampled({"v": copies}, resamples(ids(600), groups, count=2000))))
    assert honest / naive == pytest.approx(10**0.5, rel=0.08)


def test_an_interval_by_hand() -> None:
    draws = np.arange(101.0)
    np.testing.assert_allclose(interval(draws), [2.5, 97.5])
    np.testing.assert_allclose(interval(draws[::-1], confidence=0.8), [10, 90])
    assert CONFIDENCE == 0.95
    table = np.stack([draws, np.full(101, np.nan), np.where(draws % 2, np.nan, draws)], 1).reshape(101, 3, 1)
    found = interval(table)
    assert found.shape == (2, 3, 1)
    np.testing.assert_allclose(found[:, 0, 0], [2.5, 97.5])
    assert np.isnan(found[:, 1]).all()
    np.testing.assert_allclose(found[:, 2, 0], [2.5, 97.5])  # of the 51 that are numbers
    empty = interval(np.zeros((0, 3, 1)))
    assert empty.shape == (2, 3, 1)
    assert np.isnan(empty).all()


@pytest.mark.parametrize("broken", [(), (3, 7), tuple(range(30))])
def test_the_fast_way_of_a_mean_is_the_slow_one(broken: tuple[int, ...]) -> None:
    value = np.random.default_rng(3).random(30).astype(np.float32)
    value[list(broken)] = np.nan
    drawn = resamples(ids(30), [f"g{i // 4}" for i in range(30)], count=200)
    fast = mean_of("v", is_mean=True).resampled({"v": value}, drawn)
    slow = mean_of("v").resampled({"v": value}, drawn)
    np.testing.assert_allclose(fast, slow, rtol=1e-6)
    own = np.array(
        [sum(float(v) for v in value[rows] if v == v) / max(1, np.sum(value[rows] == value[rows])) for rows in drawn]
    )
    np.testing.assert_allclose(fast, np.where(np.isnan(slow), np.nan, own), rtol=1e-6)
    assert fast.shape == (200,)
    assert mean_of("v", is_mean=True).resampled({"v": value}, []).shape == (0,)
    # An infinite value is no large number.
    far, drawn = {"v": np.array([1.0, np.inf, 2.0])}, [np.array([0, 2, 2]), np.array([0, 1, 1])]
    assert mean_of("v", is_mean=True).resampled(far, drawn).tolist() == [pytest.approx(5 / 3), np.inf]


def test_a_metric_of_all_samples_is_computed_on_each_draw() -> None:
    """The standard deviation is no mean; neither is a score with several numbers per sample."""
    generator = np.random.default_rng(4)
    scores = {"v": generator.random(12), "tp": generator.random((12, 3))}
    metric = Metric("ratio", lambda s: float(s["tp"].sum() / s["v"].std()))
    drawn = resamples(ids(12), count=20)
    expected = [scores["tp"][rows].sum() / scores["v"][rows].std() for rows in drawn]
    np.testing.assert_allclose(metric.resampled(scores, drawn), expected)


@pytest.mark.filterwarnings("error")
def test_a_draw_without_a_value_makes_no_noise() -> None:
    scores = {"v": np.array([np.nan, 1.0])}
    drawn = [np.array([0, 0]), np.array([0, 1])]
    for metric in (mean_of("v"), mean_of("v", is_mean=True)):
        np.testing.assert_array_equal(metric.resampled(scores, drawn), [np.nan, 1.0])
        np.testing.assert_array_equal(interval(metric.resampled(scores, drawn)), [1.0, 1.0])


def test_a_mean_needs_the_values_of_the_samples() -> None:
    for changes in ({"is_mean": True}, {"fails_at": 0.5}):
        with pytest.raises(ValueError, match="v: fails_at and is_mean need per_sample"):
            Metric("v", lambda s: 0.0, **changes)
    with pytest.raises(ValueError, match="v does not say when a sample has failed"):
        mean_of("v").failed({"v": np.zeros(2)})


def test_the_interval_holds_the_truth_in_95_of_100_experiments() -> None:
    """300 experiments of 60 samples each, of a mean of values that are not normal (exponential, mean 1)."""
    generator = np.random.default_rng(5)
    metric = mean_of("v", is_mean=True)
    hits = 0
    for experiment in range(300):
        value = generator.exponential(size=60)
        drawn = resamples([f"{experiment}_{i}" for i in range(60)], count=400)
        low, high = interval(metric.resampled({"v": value}, drawn))
        hits += low <= 1 <= high
    assert 0.90 <= hits / 300 <= 0.98  # the percentile bootstrap of few skewed samples is known to be a little short


# In a report


def entry(name: str, values: np.ndarray) -> Entry:
    """An evaluation with values (L, N) of the score ``v`` at levels 0, 1, 2, ..."""
    return Entry(name, by_hand({"pgd3": values}, ids=ids(values.shape[1]), fingerprint=name))


def test_a_table_is_the_loop_over_models_and_levels() -> None:
    generator = np.random.default_rng(6)
    values = {name: generator.random((3, 40)) for name in ("a", "b")}
    (table,) = tabulate([entry(*pair) for pair in values.items()], [mean_of("v", is_mean=True, resamples=150)])
    assert table.draws.shape == (150, 2, 1, 3)
    drawn = resamples(ids(40), count=150)
    for m, name in enumerate(("a", "b")):
        for k in range(3):
            own = np.array([values[name][k][rows].mean() for rows in drawn])
            np.testing.assert_allclose(table.draws[:, m, 0, k], own)
            np.testing.assert_allclose(table.intervals[:, m, 0, k], np.percentile(own, [2.5, 97.5]))
        areas = [auc_robust((0, 1, 2), [values[name][k][rows].mean() for k in range(3)]) for rows in drawn]
        np.testing.assert_allclose(table.auc_draws[:, m, 0], areas)
    # As shown: clean, two levels, their mean, AUC_robust.
    np.testing.assert_allclose(table.cell_intervals[:, 0, -1], np.percentile(table.auc_draws[:, 0, 0], [2.5, 97.5]))
    attacked_mean = table.draws[:, 0, 0, 1:].mean(1)
    np.testing.assert_allclose(table.cell_intervals[:, 0, 3], np.percentile(attacked_mean, [2.5, 97.5]))
    low, high = table.cell_intervals[:, 0, 0]
    assert table.interval_text[0][0] == f"{low:.4f} to {high:.4f}"
    (plain,) = tabulate([entry("a", values["a"])], [mean_of("v")], resample=False)
    assert plain.draws.shape == (0, 1, 1, 3)
    assert np.isnan(plain.cell_intervals).all()
    assert plain.interval_text == [[""] * 5]


def test_differences_of_models_are_paired() -> None:
    """Two models that differ by the same amount on every sample differ by it in every draw, though each varies."""
    base = np.random.default_rng(7).random((2, 30))
    (table,) = tabulate([entry("a", base), entry("b", base + 0.05)], [mean_of("v", is_mean=True)])
    difference = table.draws[:, 1] - table.draws[:, 0]
    np.testing.assert_allclose(difference, 0.05)
    assert np.ptp(table.draws[:, 0], axis=0).min() > 0.1
    # And so do two reports of one model each, of the same samples.
    alone = [
        tabulate([one], [mean_of("v", is_mean=True)])[0].draws for one in (entry("a", base), entry("b", base + 0.05))
    ]
    np.testing.assert_allclose(alone[1] - alone[0], 0.05)


def test_groups_of_a_report() -> None:
    values = np.repeat(np.random.default_rng(9).random((2, 10)), 4, axis=1)
    groups = [f"g{i // 4}" for i in range(40)]
    metric = mean_of("v", is_mean=True)
    (single,), (grouped,) = (tabulate([entry("a", values)], [metric], chosen) for chosen in (None, groups))
    drawn = resamples(ids(40), groups, count=1000)
    np.testing.assert_allclose(grouped.draws[:, 0, 0, 1], [values[1][rows].mean() for rows in drawn])
    assert np.ptp(grouped.intervals[:, 0, 0, 1]) > 1.6 * np.ptp(single.intervals[:, 0, 0, 1])
