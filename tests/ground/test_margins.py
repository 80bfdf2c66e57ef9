"""The margin store against a dictionary."""

from __future__ import annotations

import csv
import json
import math
import struct
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advmed.margins import MarginStore


def filled(values: dict[str, float], initial: float = 0.1, *, additive: bool = False) -> MarginStore:
    store = MarginStore(initial, additive=additive)
    store.set(list(values), list(values.values()))
    return store


def content(store: MarginStore) -> dict[str, tuple[float, int]]:
    return dict(zip(store.ids(), zip(store.values().tolist(), store.visits().tolist(), strict=True), strict=True))


def single(number: float) -> float:
    """The float32 nearest to a number."""
    return struct.unpack("f", struct.pack("f", number))[0]


# Look-up and update


def test_an_id_never_set_has_the_initial_value_and_is_not_added() -> None:
    store = MarginStore(0.25)
    assert store.get(["a", "b"]).tolist() == [0.25, 0.25]
    assert store.get([]).shape == (0,)
    store.set([], [])
    assert (len(store), store.ids(), "a" in store) == (0, [], False)


@pytest.mark.parametrize("seed", range(5))
def test_random_updates_equal_a_dictionary(seed: int) -> None:
    """Growth over several doublings, duplicates, values that are not finite, any string as an id."""
    rng = np.random.default_rng(seed)
    store, values, visits = MarginStore(0.5), {}, {}
    for _ in range(60):
        ids = [f"case {i}/ü\n{i % 3}" for i in rng.integers(0, 200, size=rng.integers(1, 12))]
        assert store.get(ids).tolist() == [values.get(i, 0.5) for i in ids]
        new = rng.normal(size=len(ids)).astype(np.float32)
        new[rng.random(len(ids)) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
        store.set(ids, torch.from_numpy(new))
        for i, value in zip(ids, new.tolist(), strict=True):
            visits[i] = visits.get(i, 0) + math.isfinite(value)
            values.setdefault(i, 0.5)
        for i, value in dict(zip(ids, new.tolist(), strict=True)).items():  # the last value of a duplicate
            if math.isfinite(value):
                values[i] = value
    assert len(store) == len(values) > 100
    assert store.ids() == list(values)
    assert content(store) == {i: (values[i], visits[i]) for i in values}
    assert all(i in store for i in values)


def test_a_sample_is_known_by_any_form_of_its_id() -> None:
    store = MarginStore()
    store.set(torch.tensor([3]), [1.0])
    assert all(sample in store for sample in ("3", 3, np.int64(3), torch.tensor(3)))
    assert 4 not in store


def test_how_often_a_sample_was_met() -> None:
    store = MarginStore(1.0)
    store.set(["a", "b", "a"], [1.0, 2.0, 3.0])
    assert store.met(["b", "unknown", "a", "a"]).tolist() == [1, 0, 2, 2]


def test_who_has_not_been_met_is_known_without_looking_where_all_were() -> None:
    """A value that was not written is no visit; whether one was, the table knows until the next merge says it."""
    store = MarginStore(0.5)
    assert store.unmet(["a"]).tolist() == [True]
    store.set(["a", "b"], [math.nan, 2.0])
    assert store.unmet(["a", "b", "c"]).tolist() == [True, False, True]
    store.set(["a"], [1.0])
    assert store.unmet(["a", "b"]).tolist() == [False, False]
    store.merge()
    assert store.unmet(["a", "b"]) is None
    assert store.unmet(["b", "c"]).tolist() == [False, True]
    other = MarginStore(0.5)
    other.load_state_dict(store.state_dict())
    assert other.unmet(["a", "b"]) is None


def test_drawn_values_are_those_of_the_samples() -> None:
    """Each as often as the others; the initial value is of none of them."""
    store = MarginStore(9.0)
    with pytest.raises(ValueError, match="there are no margins to draw from"):
        store.draw(1)
    store.set(["a", "b", "c"], [1.0, 2.0, 4.0])
    found = store.draw(3000, torch.Generator().manual_seed(0))
    assert torch.equal(found, store.draw(3000, torch.Generator().manual_seed(0)))
    assert found.unique().tolist() == [1.0, 2.0, 4.0]
    for value in (1.0, 2.0, 4.0):
        assert int((found == value).sum()) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize("kind", [{}, {"additive": True}, {"averaged": True}, {"estimated": True}])
@pytest.mark.parametrize("seed", range(5))
def test_visits_of_one_batch_count_as_those_of_several_processes(seed: int, kind: dict[str, bool]) -> None:
    """An id that occurs several times in a batch: :meth:`MarginStore.merge`, a process for each of its rows."""
    rng = np.random.default_rng(seed)
    known = {f"{i}": float(value) for i, value in enumerate(rng.uniform(0.5, 2.0, size=4))}
    ids = [f"{i}" for i in rng.integers(0, 8, size=20)]  # half of them not known
    values = torch.tensor(rng.uniform(0.1, 4.0, size=20), dtype=torch.float32)
    values[rng.random(20) < 0.2] = math.nan
    stores = [MarginStore(0.5, **kind) for _ in range(21)]
    for store in stores:
        store.set(list(known), list(known.values()))
        store.merge([store.changes()])
    together, *apart = stores
    together.visit(ids, values)
    for store, sample, value in zip(apart, ids, values, strict=True):
        store.visit([sample], value.reshape(1))
    merged = apart[0]
    order = values.nan_to_num(math.inf).argsort().tolist()  # for each id those that shrink it, then those that grow it
    merged.merge([apart[row].changes() for row in order])
    expected = content(merged)
    together.merge([together.changes()])
    found = content(together)
    assert found.keys() == expected.keys()
    for sample, (value, visits) in expected.items():
        assert found[sample] == (pytest.approx(value, rel=1e-5), visits)


def test_an_id_of_which_nothing_is_known_yet_is_new_in_the_next_epoch() -> None:
    store = MarginStore(0.5)
    store.visit(["a", "b", "b"], torch.tensor([math.nan, math.nan, 2.0]))
    assert content(store) == {"a": (0.5, 0), "b": (2.0, 1)}
    store.merge()
    assert ("a" in store, content(store)) == (False, {"b": (2.0, 1)})
    store.set(["a"], [3.0])
    assert content(store) == {"b": (2.0, 1), "a": (3.0, 1)}


def test_dtypes_and_gradients_of_the_values() -> None:
    """What has been looked up is a copy."""
    store = MarginStore()
    before = store.get(["a"])
    assert store.to("cpu") is store
    assert store.device == before.device == torch.device("cpu")
    pair = torch.tensor([1.0, 2.0])
    for values in ([1, 2], pair.double(), pair.clone().requires_grad_(), pair.bfloat16()):
        store.set(["a", "b"], values)
        found = store.get(["b", "a"])
        assert (found.tolist(), found.dtype, found.requires_grad) == ([2.0, 1.0], torch.float32, False)
        store.set(["a", "b"], [9.0, 9.0])
        assert found.tolist() == [2.0, 1.0]
    assert before.tolist() == [0.0]


@pytest.mark.parametrize("values", [[1.0], [[1.0], [2.0]], 1.0, [1.0, 2.0, 3.0]])
def test_one_value_for_each_id(values: Any) -> None:
    store = MarginStore()
    with pytest.raises(ValueError, match=r"expected one value for each of 2 ids, got shape \("):
        store.set(["a", "b"], values)
    assert len(store) == 0
    for initial in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"the initial value of a margin must be finite, got {initial}"):
            MarginStore(initial)


# Reports


def test_quantiles_and_histogram_against_numpy() -> None:
    values = np.random.default_rng(0).gamma(2, size=101).astype(np.float32)
    store = filled({str(i): float(v) for i, v in enumerate(values)})
    q = [0.0, 0.05, 0.31, 0.5, 0.95, 1.0]
    np.testing.assert_allclose(store.quantiles(q), np.quantile(values.astype(np.float64), q), rtol=1e-12)
    assert store.quantiles() == store.quantiles([0.05, 0.5, 0.95])
    counts, edges = store.histogram(13)
    expected, expected_edges = np.histogram(values, 13)
    assert counts.tolist() == expected.tolist()
    np.testing.assert_allclose(edges, expected_edges, rtol=1e-6)
    assert counts.dtype == torch.int64


def test_reports_of_an_empty_and_of_a_constant_store(tmp_path: Path) -> None:
    store = MarginStore(0.5)
    assert store.quantiles() == [0.5, 0.5, 0.5]
    assert store.histogram(4)[0].tolist() == [0, 0, 0, 0]
    store.to_csv(tmp_path / "empty.csv")
    assert (tmp_path / "empty.csv").read_text().split() == ["id,margin,visits"]
    store.set(["a", "b"], [2.0, 2.0])
    assert store.quantiles() == [2, 2, 2]
    assert store.histogram(4)[0].sum() == 2


def test_csv(tmp_path: Path) -> None:
    store = MarginStore(0.1)
    store.set(['with, comma "and" quotes', "größe\n2", "plain"], [0.1, 1e-7, 3.0])
    store.set(["plain"], [4.5])
    path = tmp_path / "margins.csv"
    store.to_csv(path)
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["id", "margin", "visits"]
    assert {i: (float(v), int(n)) for i, v, n in rows} == content(store)


# State


def test_state_is_json_and_comes_back_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([10.0 ** rng.uniform(-44, 38, 500), [0.0, 1 / 3, -1.5]]).astype(np.float32)
    store = filled({f"ü{i}": float(v) for i, v in enumerate(values)}, initial=1 / 3)
    store.set(["ü3", "ü3"], [1.0, 0.1])
    state = json.loads(json.dumps(store.state_dict(), allow_nan=False))
    assert {type(x) for key in ("ids", "values", "visits") for x in state[key]} == {str, float, int}
    other = filled({"something else": 9.0}, initial=7.0)
    other.load_state_dict(state)
    assert other.ids() == store.ids()
    assert torch.equal(other.values().view(torch.int32), store.values().view(torch.int32))
    assert torch.equal(other.visits(), store.visits())
    assert other.initial == 1 / 3
    assert other.get(["unknown"]).tolist() == [single(1 / 3)]
    assert other.state_dict() == store.state_dict()
    other.set(["new"], [2.0])  # and it goes on growing
    assert other.get(["ü3", "new"]).tolist() == [single(0.1), 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, "not the state of a margin store: ids missing"),
        ({"initial": None, "visits": None}, "not the state of a margin store: initial, visits missing, got "),
        ({"ids": ["a"]}, r"damaged margin state: 1 ids \(1 different\), 2 values, 2 visits"),
        ({"ids": ["a", "a"]}, r"damaged margin state: 2 ids \(1 different\), 2 values, 2 visits"),
        ({"values": [1.0]}, "damaged margin state: 2 ids .*, 1 values, 2 visits"),
        ({"visits": [1, 2, 3]}, "damaged margin state: 2 ids .*, 2 values, 3 visits"),
        ({"values": [1.0, math.nan]}, "damaged margin state: a margin is not finite"),
        ({"values": [1.0, math.inf]}, "damaged margin state: a margin is not finite"),
        ({"values": [1.0, 1e300]}, "damaged margin state: a margin is not finite"),
        ({"initial": math.nan}, "damaged margin state: a margin is not finite"),
        ({"initial": [1.0]}, "damaged margin state: "),
        ({"values": [1.0, "x"]}, "damaged margin state: "),
        ({"values": [1.0, [2.0]]}, "damaged margin state: "),
        ({"values": 3}, "damaged margin state: "),
        ({"visits": [1, 1.5]}, "damaged margin state: "),
        ({"visits": [1, 2**70]}, "damaged margin state: "),
        ({"ids": ["a", ["b"]]}, "damaged margin state: "),
    ],
)
def test_damaged_states(change: dict[str, Any], message: str) -> None:
    state = {"initial": 0.1, "ids": ["a", "b"], "values": [1.0, 2.0], "visits": [1, 1]} | change
    state = {key: value for key, value in state.items() if value is not None}
    store = filled({"kept": 3.0})
    with pytest.raises(ValueError, match=message):
        store.load_state_dict(state)
    assert content(store) == {"kept": (3.0, 1)}
    assert store.initial == 0.1


def test_margins_of_another_data_set() -> None:
    store = filled({f"other_{i:02}": 1.0 for i in range(12)} | {"case_1": 1.0})
    store.require_known([*store.ids(), "case_2"])
    message = (
        r"12 of 13 margins belong to samples that are not in this data set, for example other_00, other_01, other_02\. "
        r"Delete the state\.$"
    )
    with pytest.raises(ValueError, match=message):
        store.require_known(["case_1", "case_2"], "Delete the state.")
    with pytest.raises(ValueError, match=r"other_02\.$"):
        store.require_known(iter(["case_1"]))
    MarginStore().require_known([])


# Several processes


def merged(*stores: MarginStore) -> MarginStore:
    """Merges all stores, checks that they end equal, and returns the first."""
    changes = [store.changes() for store in stores]
    json.dumps(changes)
    for store in stores:
        store.merge(changes)
    for store in stores[1:]:
        assert store.state_dict() == stores[0].state_dict()
    return stores[0]


def copies(values: dict[str, float], count: int = 2, *, additive: bool = False) -> list[MarginStore]:
    """Stores that already share values."""
    stores = [filled(values, additive=additive) for _ in range(count)]
    for store in stores:
        store.load_state_dict(store.state_dict())
    return stores


@pytest.mark.parametrize(
    ("additive", "start", "moves", "expected"),
    [
        (  # growth adds up, shrinkage multiplies; one visitor's value is taken; a visit that changed nothing counts
            False,
            {"grown": 2.0, "shrunk": 2.0, "both": 2.0, "one": 2.0, "none": 2.0, "same": 2.0, "zero": 0.0, "lost": 1.0},
            (
                {"grown": 2.5, "shrunk": 1.0, "both": 3.0, "one": 1.7, "same": 2.0, "zero": 0.5, "lost": 0.0},
                {"grown": 3.0, "shrunk": 0.5, "both": 1.0, "same": 3.0, "zero": 0.0, "lost": 0.0},
            ),
            {
                **{"grown": (3.5, 3), "shrunk": (0.25, 3), "both": (1.5, 3), "one": (single(1.7), 2)},
                **{"none": (2.0, 1), "same": (3.0, 3), "zero": (0.5, 3), "lost": (0.0, 3)},
            },
        ),
        (  # steps in both directions; whoever uses the store clamps
            True,
            {"grown": 2.0, "shrunk": 2.0, "both": 2.0, "below": 0.25, "one": 2.0, "none": 2.0},
            (
                {"grown": 2.5, "shrunk": 1.5, "both": 2.5, "below": 0.0, "one": 1.7},
                {"grown": 2.5, "shrunk": 1.75, "both": 1.5, "below": 0.125},
            ),
            {
                **{"grown": (3.0, 3), "shrunk": (1.25, 3), "both": (2.0, 3), "below": (-0.125, 3)},
                **{"one": (single(1.7), 2), "none": (2.0, 1)},
            },
        ),
        # What AMAT does on two processes from the first visit on: two expansions are two visits.
        (False, {}, ({"a": 0.2}, {"a": 0.2}), {"a": (single(0.3), 2)}),
        (  # ids that are first met by different processes get one order
            False,
            {"old": 1.0},
            ({"x": 0.2, "both": 0.3}, {"both": 0.4, "y": 0.05}),
            {"old": (1.0, 1), "x": (single(0.2), 1), "both": (0.1 + 0.2 + 0.3, 2), "y": (single(0.05), 1)},
        ),
    ],
)
def test_changes_of_two_processes(
    additive: bool, start: dict[str, float], moves: tuple[dict[str, float], ...], expected: dict[str, tuple[float, int]]
) -> None:
    stores = copies(start, additive=additive)
    for store, moved in zip(stores, moves, strict=True):
        store.set(list(moved), list(moved.values()))
    store = merged(*stores)
    found = content(store)
    assert list(found) == list(expected)
    for sample, (value, visits) in expected.items():
        assert found[sample] == (pytest.approx(value, rel=1e-6, abs=1e-7), visits)
    before = store.state_dict()
    for _ in range(3):  # merging again changes nothing
        assert store.changes() == {"ids": [], "values": [], "visits": []}
        assert merged(*stores).state_dict() == before
        assert store.additive is additive
    stores[0].set(["grown", "new"], [9.0, 0.05])  # and the next changes are those since
    stores[1].set(["new"], [0.1])
    merged(*stores)
    assert store.get(["grown"]).item() == 9.0
    assert store.get(["new"]).item() == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_single_visitors_value_is_taken_as_it_is(seed: int, additive: bool) -> None:
    """Disjoint samples: bit for bit what one process would hold, whatever the values were before and are now."""
    rng = np.random.default_rng(seed)
    ids = [f"s{i}" for i in range(300)]
    lowest = -3 if additive else -6  # steps of a given size do not cross ten orders of magnitude
    start = dict(zip(ids, (10.0 ** rng.uniform(lowest, 4, 300)).tolist(), strict=True))
    first, second = copies(start, additive=additive)
    whole = filled(start)
    for _ in range(2):
        new = (10.0 ** rng.uniform(lowest, 4, 300)).astype(np.float32)
        new[::17] = 0
        for store, part in ((first, slice(0, 150)), (second, slice(150, 280))):
            store.set(ids[part], torch.from_numpy(new[part]))
            whole.set(ids[part], torch.from_numpy(new[part]))
        merged(first, second)
        assert torch.equal(first.get(ids).view(torch.int32), whole.get(ids).view(torch.int32))
        assert content(first) == content(whole)


@pytest.mark.parametrize(
    ("additive", "values", "expected"),
    [(False, [1.0, 0.5, 0.25], 2.0 * 0.5 * 0.25 * 0.125), (True, [1.5, 1.75, 2.5], 2.0 - 0.5 - 0.25 + 0.5)],
)
def test_order_of_the_ranks_matters_only_to_mixed_changes_with_factors(
    additive: bool, values: list[float], expected: float
) -> None:
    outcomes = set()
    for order in permutations(values):
        stores = copies({"a": 2.0}, 3, additive=additive)
        for store, value in zip(stores, order, strict=True):
            store.set(["a"], [value])
        outcomes.add(content(merged(*stores))["a"])
    assert outcomes == {(expected, 4)}


def test_averaged_values_count_as_often_as_their_processes_met_the_sample() -> None:
    """Three processes, in any order; a process that did not meet a sample does not count."""
    for order in permutations(range(3)):
        stores = [MarginStore(9.0, averaged=True) for _ in range(3)]
        for store in stores:
            store.set(["a"], [2.0])
        merged(*stores)
        visits: tuple[list[float], ...] = ([1.0], [3.0, 4.0], [])
        for store, which in zip(stores, order, strict=True):
            for value in visits[which]:
                store.set(["a"], [value])
            if which == 1:
                store.set(["new"], [5.0])
        found = content(merged(*stores))
        assert found == {"a": (pytest.approx((1.0 + 2 * 4.0) / 3), 6), "new": (5.0, 1)}


def test_clamping_is_no_visit_and_no_change() -> None:
    stores = copies({"low": 0.01, "in": 1.0, "high": 9.0})
    for store in stores:
        store.clamp(0.1, 2.0)
        assert content(store) == {"low": (single(0.1), 1), "in": (1.0, 1), "high": (2.0, 1)}
    stores[0].set(["in"], [1.5])
    assert content(merged(*stores)) == {"low": (single(0.1), 1), "in": (1.5, 2), "high": (2.0, 1)}
    stores[0].clamp(1.2)
    assert stores[0].get(["low", "high", "unknown"]).tolist() == [single(1.2), 2.0, single(1.2)]
