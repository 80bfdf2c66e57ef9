"""Intervals over samples: against closed forms, loops written apart from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom, norm, t

from advmed.evaluation.auc import auc_robust
from advmed.evaluation.intervals import (
    CONFIDENCE,
    expanded_tail,
    interval,
    resamples,
    seed_of,
    share_interval,
    units_of,
)
from advmed.evaluation.metric import Metric
from advmed.report import Entry, tabulate
from helpers.evaluations import by_hand, mean_of


def ids(count: int) -> list[str]:
    return [f"case_{i}" for i in range(count)]


def test_the_same_samples_give_the_same_draws_and_others_give_others() -> None:
    drawn = np.stack(resamples(ids(20), count=50))
    np.testing.assert_array_equal(drawn, resamples(ids(20), count=50))
    np.testing.assert_array_equal(drawn[:10], resamples(ids(20), count=10))  # more draws begin with the same ones
    assert (drawn.shape, drawn.min(), drawn.max()) == ((50, 20), 0, 19)
    for others in ((ids(20)[::-1],), ([*ids(19), "other"],), (ids(20), ["one"] * 10 + ["other"] * 10)):
        assert not np.array_equal(drawn, np.stack(resamples(*others, count=50)))
    assert len({seed_of(ids(20)), seed_of(ids(21)), seed_of(ids(20), ids(20))}) == 3
    assert resamples(ids(3), count=0) == []


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


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    value = np.random.default_rng(1).normal(3.0, 2.0, 400)
    draws = mean_of("v", is_mean=True).resampled({"v": value}, resamples(ids(400), count=4000))
    for confidence, quantile, tolerance in ((0.95, 1.959964, 0.06), (0.5, 0.674490, 0.08)):
        half = quantile * value.std() / 400**0.5
        wanted = (value.mean() - half, value.mean() + half)
        assert tuple(interval(draws, units=400, confidence=confidence)) == pytest.approx(wanted, abs=tolerance * half)


def test_groups_widen_the_interval_of_samples_that_repeat_each_other() -> None:
    """Ten copies of every sample tell no more than one of it: the interval is wider by the root of ten."""
    value = np.random.default_rng(2).normal(size=60)
    copies, groups = np.repeat(value, 10), [f"g{i}" for i in np.repeat(range(60), 10)]
    metric = mean_of("v", is_mean=True)
    naive = np.ptp(interval(metric.resampled({"v": copies}, resamples(ids(600), count=2000)), units=600))
    honest = np.ptp(interval(metric.resampled({"v": copies}, resamples(ids(600), groups, count=2000)), units=60))
    assert honest / naive == pytest.approx(10**0.5, rel=0.08)


@pytest.mark.filterwarnings("error")
def test_an_interval_by_hand() -> None:
    """Of so many samples that the quantiles are those of the percentile bootstrap."""
    draws, many = np.arange(101.0), 10**9
    np.testing.assert_allclose(interval(draws, units=many), [2.5, 97.5], rtol=1e-6)
    np.testing.assert_allclose(interval(draws[::-1], units=many, confidence=0.8), [10, 90], rtol=1e-6)
    assert CONFIDENCE == 0.95
    same = 3.0 + 1e-15 * np.arange(101)
    table = np.stack([draws, np.full(101, np.nan), np.where(draws % 2, np.nan, draws), same], 1).reshape(101, 4, 1)
    found = interval(table, units=many)
    assert found.shape == (2, 4, 1)
    np.testing.assert_allclose(found[:, 0, 0], [2.5, 97.5], rtol=1e-6)
    assert np.isnan(found[:, [1, 3]]).all()
    np.testing.assert_allclose(found[:, 2, 0], [2.5, 97.5], rtol=1e-6)  # of the 51 that are numbers
    for none in (interval(np.zeros((0, 3, 1)), units=50), interval(table[:, :3], units=9)):
        assert none.shape == (2, 3, 1)
        assert np.isnan(none).all()


@pytest.mark.parametrize("units", [10, 11, 25, 400])
def test_expanded_quantiles_are_those_of_students_t(units: int) -> None:
    """Where the draws of a mean are normal, whose spread is smaller than the samples' by sqrt((n - 1) / n)."""
    spread = np.sqrt((units - 1) / units)
    draws = norm.ppf((np.arange(100_000) + 0.5) / 100_000) * spread
    for confidence in (0.5, 0.95, 0.99):
        wanted = t.ppf((1 + confidence) / 2, units - 1)
        np.testing.assert_allclose(interval(draws, units=units, confidence=confidence), [-wanted, wanted], rtol=5e-3)


COVERED: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "dice": (lambda g, n: g.beta(6, 2, n), 0.75),
    "two kinds": (
        lambda g, n: np.where(g.random(n) < 0.3, g.beta(2, 5, n), g.beta(20, 3, n)),
        0.3 * 2 / 7 + 0.7 * 20 / 23,
    ),
    "errors in mm": (lambda g, n: g.gamma(4.0, 0.5, n), 2.0),
}


@pytest.mark.parametrize("count", [10, 20, 50])
@pytest.mark.parametrize("kind", COVERED)
def test_intervals_cover_what_they_say(kind: str, count: int) -> None:
    """Skewed values of few samples a little less often."""
    draw, truth = COVERED[kind]
    generator = np.random.default_rng(count)
    rows = np.stack(resamples(ids(count), count=400))
    held = 0
    for _ in range(600):
        low, high = interval(draw(generator, count)[rows].mean(1), units=count)
        held += bool(low <= truth <= high)
    assert 0.90 <= held / 600 <= 0.98


def test_intervals_over_cases_cover_what_they_say_and_equal_models_are_not_told_apart() -> None:
    """Slices of ten cases; two models that differ by chance only."""
    generator, cases, held, apart = np.random.default_rng(5), 12, 0, 0
    groups = [f"c{k}" for k in range(cases) for _ in range(8)]
    drawn = np.stack(resamples(ids(len(groups)), groups, count=400))
    for _ in range(600):
        hard = np.repeat(generator.normal(0, 0.1, cases), 8) + generator.normal(0.7, 0.1, len(groups))
        low, high = interval(hard[drawn].mean(1), units=cases)
        held += bool(low <= 0.7 <= high)
        gain = np.repeat(generator.normal(0, 0.03, cases), 8) + generator.normal(0, 0.05, len(groups))
        low, high = interval(gain[drawn].mean(1), units=cases)
        apart += bool(low > 0 or high < 0)
    assert 0.92 <= held / 600 <= 0.98
    assert apart / 600 <= 0.08


@pytest.mark.parametrize("others", [5, 10])
def test_intervals_of_many_differences_hold_for_all_at_once_with_few_draws(others: int) -> None:
    """Of 200 draws, as for mAP, hardly one lies behind a quantile of all at once: 5 % in all may miss."""
    generator = np.random.default_rng(others)
    confidence = 1 - 0.05 / others
    missed = 0
    for _ in range(2000):
        values = generator.normal(size=100)
        drawn = values[generator.integers(0, 100, (200, 100))].mean(1)[:, None]
        low, high = interval(drawn, units=100, confidence=confidence)
        missed += bool(low[0] > 0 or high[0] < 0)
    assert missed / 2000 == pytest.approx(0.05 / others, abs=0.005)


def test_a_share_has_wilsons_interval() -> None:
    """From its formula (Wilson 1927); it covers what it says, and has a width where all agree."""
    shares = np.array([[0.0, 0.5], [0.9, np.nan]])
    found = share_interval(shares, units=20)
    z = norm.ppf(0.975)
    middle = (shares + z**2 / 40) / (1 + z**2 / 20)
    half = z / (1 + z**2 / 20) * np.sqrt(shares * (1 - shares) / 20 + z**2 / 1600)
    np.testing.assert_allclose(found, [middle - half, middle + half], atol=1e-12)
    assert np.isnan(share_interval(shares, units=9)).all()
    for truth, count in ((0.9, 20), (0.98, 40), (0.5, 10)):
        right = np.arange(count + 1)
        low, high = share_interval(right / count, units=count)
        covered = binom.pmf(right, count, truth)[(low <= truth) & (truth <= high)].sum()
        assert 0.92 <= covered <= 0.99
        assert (high > low).all()


def test_independent_samples_are_counted() -> None:
    assert units_of(5) == 5
    assert units_of(5, ["a", "a", "b", "b", "c"]) == 3
    assert units_of(5, ["a", "a", "b", "b", "c"], np.array([True, False, False, False, True])) == 2
    assert units_of(3, None, np.array([True, False, True])) == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("broken", [(), (3, 7), tuple(range(30))])
def test_the_fast_way_of_a_mean_is_the_slow_one(broken: tuple[int, ...]) -> None:
    value = np.random.default_rng(3).random(30).astype(np.float32)
    value[list(broken)] = np.nan
    drawn = resamples(ids(30), [f"g{i // 4}" for i in range(30)], count=200)
    fast = mean_of("v", is_mean=True).resampled({"v": value}, drawn)
    slow = mean_of("v").resampled({"v": value}, drawn)
    np.testing.assert_allclose(fast, slow, rtol=1e-6)
    assert fast.shape == (200,)
    assert np.isnan(fast).all() == (len(broken) == 30)
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


def test_a_mean_needs_the_values_of_the_samples() -> None:
    for changes in ({"is_mean": True}, {"fails_at": 0.5}):
        with pytest.raises(ValueError, match="v: fails_at, lost_at and is_mean need per_sample"):
            Metric("v", lambda s: 0.0, **changes)
    with pytest.raises(ValueError, match="v does not say when a sample has failed"):
        mean_of("v").failed({"v": np.zeros(2)})


# In a report


def entry(name: str, values: np.ndarray) -> Entry:
    """An evaluation with values (L, N) of the score ``v`` at levels 0, 1, 2, ..."""
    return Entry(name, by_hand({"pgd3": values}, ids=ids(values.shape[1]), fingerprint=name))


@pytest.mark.parametrize("groups", [None, [f"g{i // 4}" for i in range(40)]])
def test_a_table_is_the_loop_over_models_and_levels(groups: list[str] | None) -> None:
    generator = np.random.default_rng(6)
    values = {name: generator.random((3, 40)) for name in ("a", "b")}
    models = [entry(*pair) for pair in values.items()]
    (table,) = tabulate(models, [mean_of("v", is_mean=True, resamples=150)], groups)
    assert table.draws.shape == (150, 2, 1, 3)
    drawn = resamples(ids(40), groups, count=150)
    assert table.units == (40 if groups is None else 10)
    tail = expanded_tail(table.units, 0.95)
    tails = [tail, 1 - tail]
    for m, name in enumerate(("a", "b")):
        for k in range(3):
            own = np.array([values[name][k][rows].mean() for rows in drawn])
            np.testing.assert_allclose(table.draws[:, m, 0, k], own)
            np.testing.assert_allclose(table.intervals[:, m, 0, k], np.quantile(own, tails))
        areas = [auc_robust((0, 1, 2), [values[name][k][rows].mean() for k in range(3)]) for rows in drawn]
        np.testing.assert_allclose(table.auc_draws[:, m, 0], areas)
    # As shown: clean, two levels, their mean, AUC_robust.
    np.testing.assert_allclose(table.cell_intervals[:, 0, -1], np.quantile(table.auc_draws[:, 0, 0], tails))
    attacked_mean = table.draws[:, 0, 0, 1:].mean(1)
    np.testing.assert_allclose(table.cell_intervals[:, 0, 3], np.quantile(attacked_mean, tails))
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
    models = entry("a", base), entry("b", base + 0.05)
    alone, other = (tabulate([one], [mean_of("v", is_mean=True)])[0].draws for one in models)
    np.testing.assert_allclose(other - alone, 0.05)
