"""From which level on samples fail: evaluations made by hand, whose smallest levels are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from advmed.evaluation.metric import Metric
from advmed.report import Entry
from advmed.report.failures import Failures, count_failures
from helpers.evaluations import by_hand

LEVELS = (0.0, 1.0, 2.0, 4.0)
DICE = Metric("Dice", lambda s: float(s["v"].mean()), per_sample=lambda s: s["v"], fails_at=0.5)
OTHER = Metric("other", lambda s: float(s["v"].mean()))
INF, NAN = math.inf, math.nan


def entry(name: str, clean: Sequence[float], curves: Mapping[str, Sequence[Sequence[float]]]) -> Entry:
    """Values of N samples clean, and by attack at every level above 0."""
    return Entry(name, by_hand({attack: [clean, *rows] for attack, rows in curves.items()}, LEVELS))


CLEAN = [0.9, 0.9, 0.4, 0.9, NAN, 0.5]
CURVES = {
    #           a    b    c    d    e    f
    "pgd5": [
        (0.8, 0.4, 0.9, 0.9, 0.1, 0.5),
        (0.6, 0.9, 0.9, 0.9, 0.1, 0.5),
        (0.4, 0.9, 0.9, 0.9, 0.1, 0.5),
    ],
    "ifgsm5": [
        (0.8, 0.8, 0.9, NAN, 0.1, 0.5),
        (0.3, 0.8, 0.9, 0.9, 0.1, 0.49),
        (0.9, 0.8, 0.9, 0.9, 0.1, 0.9),
    ],
    "gaussian": [(0.0,) * 6] * 3,
}
#             a    b    c    d    e    f
SMALLEST = [2.0, 1.0, 0.0, INF, NAN, 2.0]


def test_the_smallest_level_at_which_any_attack_succeeds() -> None:
    """Once failed stays failed, controls do not count, at the criterion itself nothing has failed."""
    found = count_failures([entry("own", CLEAN, CURVES)], [OTHER, DICE])
    assert found is not None
    assert found.metric is DICE
    assert (found.models, found.levels, found.ids) == (("own",), LEVELS, tuple("abcdef"))
    np.testing.assert_array_equal(found.smallest, [SMALLEST])
    assert count_failures([entry("own", CLEAN, CURVES)], [OTHER]) is None


def test_errors_fail_above_their_limit() -> None:
    error = Metric("MRE", OTHER.of, False, unit="mm", per_sample=DICE.per_sample, fails_at=0.5)
    found = count_failures([entry("own", CLEAN, CURVES)], [error])
    assert found is not None
    np.testing.assert_array_equal(found.smallest[0], [0, 0, 1, 0, NAN, 4])
    assert (error.failure, DICE.failure) == ("MRE above 0.5 mm", "Dice below 0.5")


def failures(*rows: Sequence[float], levels: tuple[float, ...] = LEVELS) -> Failures:
    smallest = np.array(rows, dtype=np.float64)
    ids = tuple("abcdefghij"[: smallest.shape[1]])
    return Failures(DICE, tuple(f"m{k}" for k in range(len(rows))), levels, ids, smallest)


def test_shares_and_quantiles() -> None:
    found = failures(SMALLEST, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [NAN] * 6, [INF] * 6)
    np.testing.assert_allclose(
        found.share, [[1 / 5, 2 / 5, 4 / 5, 4 / 5], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    )  # of the five samples that have a value
    np.testing.assert_array_equal(found.quantile(0.5), [2, 0, NAN, INF])
    np.testing.assert_array_equal(found.quantile(0.2), [0, 0, NAN, INF])
    np.testing.assert_array_equal(found.quantile(0.21), [1, 0, NAN, INF])
    np.testing.assert_array_equal(found.quantile(1.0), [INF, 0, NAN, INF])


def test_shares_agree_with_a_loop() -> None:
    generator = np.random.default_rng(0)
    smallest = generator.choice([*LEVELS, INF, NAN], size=(3, 10))
    found = failures(*smallest.tolist())
    for m, row in enumerate(smallest):
        known = [v for v in row if v == v]
        for k, level in enumerate(LEVELS):
            assert found.share[m, k] == pytest.approx(sum(v <= level for v in known) / len(known))
        half = found.quantile(0.5)[m]
        assert sum(v <= half for v in known) >= len(known) / 2 > sum(v < half for v in known)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        # Half of them fail first, half fail last; those that are wrong from the start are nothing to look at. At the
        # same level they come in the order of the samples, and each once.
        ([[0, 4, 1, INF, NAN, 2, 1]], {0: "", 1: "c", 2: "cd", 3: "cgd", 4: "cgdb", 50: "cgfbd"}),
        # Of several models by the mean, 2.5, (8 + 1) / 2, 2, 0: never failing counts as twice the last level.
        ([[1, INF, 2, 0], [4, 1, 2, 0]], {3: "cab"}),
        ([[1, INF, 2, 4], [4, NAN, 2, 1]], {3: "cad"}),  # one without a value of any model is left out
        ([[0, 0, 0]], {2: "ac"}),  # all wrong from the start: those
        ([[NAN, NAN]], {2: ""}),
        ([[INF]], {4: "a"}),
    ],
)
def test_samples_to_look_at(rows: list[list[float]], wanted: dict[int, str]) -> None:
    found = failures(*rows)
    assert {number: "".join(found.first_and_last(number)) for number in wanted} == wanted


def test_several_models_by_their_names() -> None:
    clean = [0.9, 0.9]
    strong = entry("strong", clean, {"pgd5": [(0.9, 0.9), (0.9, 0.9), (0.9, 0.1)]})
    weak = entry("weak", clean, {"pgd5": [(0.1, 0.9), (0.1, 0.1), (0.1, 0.1)]})
    found = count_failures([strong, weak], [DICE])
    assert found is not None
    assert found.models == ("strong", "weak")
    np.testing.assert_array_equal(found.smallest, [[INF, 4], [1, 2]])
    assert found.first_and_last(2) == ["b", "a"]


@pytest.mark.filterwarnings("error")
def test_nothing_is_warned_of() -> None:
    found = count_failures([entry("own", [NAN] * 6, {"pgd5": [[NAN] * 6] * 3})], [replace(DICE, is_mean=True)])
    assert found is not None
    assert (found.share == 0).all()
    assert np.isnan(found.quantile(0.5)).all()
