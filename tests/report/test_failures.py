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
from helpers.evaluations import by_hand, mean_of

LEVELS = (0.0, 1.0, 2.0, 4.0)
DICE = mean_of("v", "Dice", fails_at=0.5)
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
SMALLEST = [2.0, 1.0, 0.0, INF, 1.0, 2.0]
"""Sample e has no value when it is clean, an empty slice, and fails as soon as something is found in it."""


def test_the_smallest_level_at_which_any_attack_succeeds() -> None:
    """Once failed stays failed, controls do not count, at the criterion itself nothing has failed."""
    turned = {name: [row[::-1] for row in rows] for name, rows in CURVES.items()}
    found = count_failures([entry("own", CLEAN, CURVES), entry("turned", CLEAN[::-1], turned)], [OTHER, DICE])
    assert found is not None
    assert found.metric is DICE
    assert (found.models, found.levels, found.ids) == (("own", "turned"), LEVELS, tuple("abcdef"))
    np.testing.assert_array_equal(found.smallest, [SMALLEST, SMALLEST[::-1]])
    assert count_failures([entry("own", CLEAN, CURVES)], [OTHER]) is None


def test_a_sample_that_never_has_a_value_is_not_known() -> None:
    never = [[(*row[:4], NAN, row[5]) for row in rows] for rows in CURVES.values()]
    found = count_failures([entry("own", CLEAN, dict(zip(CURVES, never, strict=True)))], [DICE])
    assert found is not None
    np.testing.assert_array_equal(found.smallest[0], [*SMALLEST[:4], NAN, SMALLEST[5]])


def test_errors_fail_above_their_limit() -> None:
    error = Metric("MRE", OTHER.of, False, unit="mm", per_sample=DICE.per_sample, fails_at=0.5)
    found = count_failures([entry("own", CLEAN, CURVES)], [error])
    assert found is not None
    np.testing.assert_array_equal(found.smallest[0], [0, 0, 1, 0, INF, 4])
    assert (error.failure, DICE.failure) == ("MRE above 0.5 mm", "Dice below 0.5")


def failures(*rows: Sequence[float], levels: tuple[float, ...] = LEVELS) -> Failures:
    smallest = np.array(rows, dtype=np.float64)
    ids = tuple("abcdefghij"[: smallest.shape[1]])
    return Failures(DICE, tuple(f"m{k}" for k in range(len(rows))), levels, ids, smallest)


def test_shares_and_quantiles() -> None:
    found = failures([2.0, 1.0, 0.0, INF, NAN, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [NAN] * 6, [INF] * 6)
    np.testing.assert_allclose(found.share, [[1 / 5, 2 / 5, 4 / 5, 4 / 5], [1] * 4, [0] * 4, [0] * 4])  # of five known
    np.testing.assert_array_equal(found.quantile(0.5), [2, 0, NAN, INF])
    np.testing.assert_array_equal(found.quantile(0.2), [0, 0, NAN, INF])
    np.testing.assert_array_equal(found.quantile(0.21), [1, 0, NAN, INF])
    np.testing.assert_array_equal(found.quantile(1.0), [INF, 0, NAN, INF])


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


@pytest.mark.filterwarnings("error")
def test_nothing_is_warned_of() -> None:
    found = count_failures([entry("own", [NAN] * 6, {"pgd5": [[NAN] * 6] * 3})], [replace(DICE, is_mean=True)])
    assert found is not None
    assert (found.share == 0).all()
    assert np.isnan(found.quantile(0.5)).all()
