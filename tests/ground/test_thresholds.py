"""Streaming statistics against numpy, and thresholds that survive a file."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import median_abs_deviation
from torch.nn import functional

from advmed.classification import ClassificationObjective
from advmed.files import sha256
from advmed.thresholds import (
    FORMAT,
    RunningThresholds,
    TermStatistics,
    Thresholds,
    at_boundary,
    beyond_boundary,
    parse_rule,
)

NAMES = ("ce", "dice", "box")


def batches(seed: int, count: int = 12, terms: int = 3, offset: float = 0.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-3, 3, terms)
    return [rng.gamma(1.5, scale, size=(rng.integers(1, 9), terms)) + offset for _ in range(count)]


def taken_in(parts: list[np.ndarray], memory: float | None = None) -> TermStatistics:
    statistics = TermStatistics(NAMES, memory)
    for part in parts:
        statistics.update(torch.from_numpy(part))
    return statistics


def weighted(parts: list[np.ndarray], memory: float | None) -> tuple[float, np.ndarray, np.ndarray]:
    """Weight, mean and standard deviation if a sample counts exp(-m / memory) once m more have come in."""
    newer = np.cumsum([len(part) for part in parts][::-1])[::-1] - [len(part) for part in parts]
    weights = np.concatenate(
        [np.full(len(p), 1.0 if memory is None else math.exp(-m / memory)) for p, m in zip(parts, newer, strict=True)]
    )
    values = np.concatenate(parts)
    mean = np.average(values, axis=0, weights=weights)
    return weights.sum(), mean, np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights))


# Statistics


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("memory", [None, 3.0, 40.0])
def test_streaming_equals_numpy_over_any_split(seed: int, memory: float | None) -> None:
    parts = batches(seed)
    statistics = taken_in(parts, memory)
    n, mean, std = weighted(parts, memory)
    assert statistics.n == pytest.approx(n, rel=1e-12)
    np.testing.assert_allclose(statistics.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(statistics.std, std, rtol=1e-9)
    if memory is None:
        np.testing.assert_allclose(statistics.std, np.concatenate(parts).std(0), rtol=1e-10)


def test_a_large_offset_does_not_eat_the_deviation() -> None:
    """Where mean(x^2) - mean(x)^2 would have no digit left."""
    parts = [1e8 + np.random.default_rng(i).normal(size=(4, 3)) for i in range(50)]
    np.testing.assert_allclose(taken_in(parts).std, np.concatenate(parts).std(0), rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("memory", [None, 10.0])
def test_a_sample_with_a_term_that_is_not_finite_is_left_out(bad: float, memory: float | None) -> None:
    parts = batches(3)
    dirty = [np.concatenate([part, np.array([[1.0, bad, 2.0]])]) for part in parts]
    dirty.insert(4, np.full((3, 3), bad))
    clean, other = taken_in(parts, memory), taken_in(dirty, memory)
    assert other.n == clean.n
    np.testing.assert_allclose(other.mean, clean.mean, rtol=1e-12)
    np.testing.assert_allclose(other.std, clean.std, rtol=1e-12)


def test_one_sample_and_none() -> None:
    statistics = TermStatistics(["a"])
    for nothing in (torch.empty(0, 1), torch.tensor([[math.nan]])):
        statistics.update(nothing)
        with pytest.raises(ValueError, match="no thresholds to be had from no samples: no finite loss term was seen"):
            statistics.thresholds("mean")
    statistics.update(torch.tensor([[2.5]], requires_grad=True))
    assert statistics.thresholds("mean+2std").values == (2.5,)
    assert statistics.std.tolist() == [0]


def test_what_statistics_refuse() -> None:
    for shape in ((3,), (4, 2), (4, 3, 1)):
        with pytest.raises(ValueError, match=r"expected terms of shape \(B, 3\), got \("):
            TermStatistics(NAMES).update(torch.zeros(shape))
    for memory in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="memory must be a positive number of samples, got "):
            TermStatistics(NAMES, memory)


@pytest.mark.parametrize("memory", [None, 20.0])
def test_statistics_resume_from_json(memory: float | None) -> None:
    parts = batches(5)
    half = taken_in(parts[:6], memory)
    resumed = TermStatistics(NAMES)
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    for part in parts[6:]:
        resumed.update(torch.from_numpy(part))
    assert resumed.state_dict() == taken_in(parts, memory).state_dict()
    with pytest.raises(ValueError, match=r"the statistics are of the terms \['ce', 'dice', 'box'\], not \['ce'\]"):
        TermStatistics(["ce"]).load_state_dict(half.state_dict())


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_pooled_statistics_are_those_of_all_samples(ranks: int) -> None:
    parts = [batches(10 + rank, count=rank + 3) for rank in range(ranks)]
    every = np.concatenate([part for rank in parts for part in rank])
    states = [taken_in(rank).state_dict() for rank in parts]
    for average in (False, True):
        pooled = TermStatistics(NAMES)
        pooled.merge(states, average=average)
        assert pooled.n == pytest.approx(len(every) / (ranks if average else 1))
        np.testing.assert_allclose(pooled.mean, every.mean(0), rtol=1e-12)
        np.testing.assert_allclose(pooled.std, every.std(0), rtol=1e-12)


# Rules


@pytest.mark.parametrize(
    ("rule", "factor"),
    [("mean", 0), ("mean+2std", 2), ("mean + 2 std", 2), ("mean+0.5std", 0.5), ("mean+10std", 10)],
)
def test_rules(rule: str, factor: float) -> None:
    assert parse_rule(rule) == ("mean", factor)
    parts = batches(1)
    values = np.concatenate(parts)
    statistics = taken_in(parts)
    expected = values.mean(0) + factor * values.std(0)
    np.testing.assert_allclose(statistics.tensor(rule), expected, rtol=1e-10)
    made = statistics.thresholds(rule, source="checkpoint.pth", source_sha256="ab", notes={"fold": 0})
    np.testing.assert_allclose(made.values, expected, rtol=1e-10)
    np.testing.assert_allclose(made.mean, values.mean(0), rtol=1e-10)
    np.testing.assert_allclose(made.std, values.std(0), rtol=1e-10)
    assert (made.n, made.rule, made.names) == (len(values), rule, NAMES)
    assert (made.source, made.source_sha256, made.notes) == ("checkpoint.pth", "ab", {"fold": 0})


@pytest.mark.parametrize(("rule", "factor"), [("median", 0), ("median+2spread", 2), ("median + 0.5 spread", 0.5)])
def test_rules_of_the_median(rule: str, factor: float) -> None:
    parts = [*batches(1), np.array([[1.0, math.nan, 2.0]])]
    values = np.concatenate(parts[:-1])
    spread = median_abs_deviation(values, scale="normal")
    statistics = TermStatistics(NAMES, keep=True)
    for part in parts:
        statistics.update(torch.from_numpy(part))
    made = statistics.thresholds(rule)
    np.testing.assert_allclose(made.values, np.median(values, 0) + factor * spread, rtol=1e-10)
    np.testing.assert_allclose(made.median, np.median(values, 0), rtol=1e-12)
    np.testing.assert_allclose(made.spread, spread, rtol=1e-10)
    np.testing.assert_allclose(statistics.thresholds("mean").by_rule(rule).values, made.values, rtol=1e-12)
    np.testing.assert_allclose(made.by_rule("mean+2std").values, values.mean(0) + 2 * values.std(0), rtol=1e-10)
    resumed, pooled = TermStatistics(NAMES, keep=True), TermStatistics(NAMES, keep=True)
    resumed.load_state_dict(json.loads(json.dumps(statistics.state_dict())))
    assert resumed.thresholds(rule) == made
    pooled.merge([taken_in_and_kept(parts[:4]), taken_in_and_kept(parts[4:])])
    np.testing.assert_allclose(pooled.thresholds(rule).values, made.values, rtol=1e-12)


def taken_in_and_kept(parts: list[np.ndarray]) -> dict[str, Any]:
    statistics = TermStatistics(NAMES, keep=True)
    for part in parts:
        statistics.update(torch.from_numpy(part))
    return statistics.state_dict()


def test_a_few_samples_out_of_all_proportion_hardly_move_the_median() -> None:
    values = np.random.default_rng(0).normal(2, 0.5, (1000, 1))
    statistics = TermStatistics(["a"], keep=True)
    statistics.update(torch.from_numpy(np.concatenate([values, np.full((20, 1), 50.0)])))
    robust, plain = (statistics.thresholds(rule).values[0] for rule in ("median+2spread", "mean+2std"))
    assert robust == pytest.approx(3, abs=0.1)  # 2 + 2 * 0.5
    assert plain > 15


def test_other_rules_are_refused() -> None:
    rules: list[Any] = ["", "mean+std", "mean-2std", "mean+2", "2std", "mean+2std+1", "Mean", None, 2]
    for rule in [*rules, "median+2std", "mean+2spread", "median+2", "median-1spread"]:
        for refuses in (parse_rule, lambda rule: RunningThresholds(NAMES, rule)):
            with pytest.raises(ValueError, match=r"must be 'mean' or 'mean\+<number>std' \(mean\+2std\), 'median' or "):
                refuses(rule)
    with pytest.raises(ValueError, match="'median' is for thresholds measured on a standard network; self-calibrated"):
        RunningThresholds(NAMES, "median")
    with pytest.raises(ValueError, match=r"'median\+1spread' needs all losses \(keep=True\)"):
        taken_in(batches(1)).thresholds("median+1spread")
    with pytest.raises(ValueError, match=r"kept .* only where all of them count alike"):
        TermStatistics(NAMES, 10, keep=True)


def test_another_rule_for_the_same_statistics() -> None:
    made = taken_in(batches(1)).thresholds("mean", source="checkpoint.pth")
    other = made.by_rule("mean+2std")
    np.testing.assert_allclose(other.values, np.add(made.mean, np.multiply(2, made.std)), rtol=1e-12)
    assert (other.rule, other.mean, other.std, other.source) == ("mean+2std", made.mean, made.std, "checkpoint.pth")
    assert other.by_rule("mean").values == pytest.approx(made.values, rel=1e-12)
    assert made.by_rule(None) is made
    assert made.by_rule("mean+0std") is made
    by_hand = Thresholds((0.5,), ("a",))
    assert by_hand.by_rule(None) is by_hand
    with pytest.raises(ValueError, match=r"the file x hold no mean and std that the rule 'mean' .* Remove 'rule'"):
        by_hand.by_rule("mean", "the file x")
    with pytest.raises(ValueError, match=r"hold no median and spread that .* make the thresholds anew"):
        made.by_rule("median")


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_below_the_boundary_an_image_is_recognised(classes: int) -> None:
    """Of two classes, above it never."""
    logits = torch.randn(10_000, classes, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(10_000) % classes
    (limit,) = at_boundary(ClassificationObjective).values
    terms = ClassificationObjective(torch.nn.Identity(), labels)(logits).squeeze(1)
    right, below = logits.argmax(1) == labels, terms < limit
    assert right[below].all()
    assert 0.01 < below.double().mean() < 0.6
    assert classes > 2 or torch.equal(right, below)
    assert limit == pytest.approx(functional.cross_entropy(torch.zeros(1, 2), torch.tensor([1])).item())


def test_thresholds_beyond_the_boundary_are_told() -> None:
    """Of an objective that has one."""
    line = beyond_boundary(Thresholds((0.8,), ("ce",)), ClassificationObjective)
    assert line is not None
    assert line.startswith("these thresholds lie beyond ce < 0.693147, ")
    assert beyond_boundary(at_boundary(ClassificationObjective), ClassificationObjective) is None
    assert beyond_boundary(Thresholds((0.8,), ("ce",)), torch.nn.Identity) is None


def test_the_rule_of_the_boundary() -> None:
    made = at_boundary(ClassificationObjective)
    assert (made.names, made.rule, made.source) == (("ce",), "boundary", None)
    assert made.by_rule("boundary") is made
    with pytest.raises(ValueError, match="hold no mean and std"):
        made.by_rule("mean")
    with pytest.raises(ValueError, match=r"the rule 'boundary' is for classifiers, .* choose 'mean'"):
        at_boundary(torch.nn.Identity)


# Records and files


def test_a_record_takes_tensors_and_numbers() -> None:
    record = Thresholds(torch.tensor([0.5, 2.0]), ["a", "b"], mean=np.array([1, 2]))
    assert (record.values, record.names, record.mean, len(record)) == ((0.5, 2.0), ("a", "b"), (1.0, 2.0), 2)
    assert str(record) == "a < 0.5, b < 2"
    like = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(record.tensor(like), torch.tensor([0.5, 2.0], dtype=torch.float64))
    for values, names, message in (
        ((1.0, 2.0), ("a",), r"2 thresholds for 1 loss terms \['a'\]"),
        ((), (), r"0 thresholds for 0 loss terms \[\]"),
        ((1.0, math.nan), ("a", "b"), r"a threshold is NaN: \{'a': 1.0, 'b': nan\}"),
    ):
        with pytest.raises(ValueError, match=message):
            Thresholds(values, names)


@pytest.mark.parametrize("value", [1 / 3, 1e-300, -2.5, math.inf, -math.inf])
def test_a_file_gives_the_same_record_back(tmp_path: Path, value: float) -> None:
    """All of it, or the least that one can have."""
    record = Thresholds(
        (value, 0.1),
        ("ü", "dice"),
        rule="mean+2std",
        mean=(0.1, 0.2),
        std=(1 / 7, 0.0),
        n=260,
        source="fold_0/checkpoint_final.pth",
        source_sha256="00ff",
        notes={"dataset": "Dataset004", "dice": 0.88, "levels": [1, 2]},
    )
    path = tmp_path / "thresholds.json"
    record.save(path)
    assert Thresholds.load(path) == Thresholds.load(str(path)) == record
    # Strict JSON that other programs can read.
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    assert content["format"] == FORMAT == "advmed.thresholds/1"
    assert content["names"] == ["ü", "dice"]
    path.write_text(json.dumps({"format": FORMAT, "values": [0.5], "names": ["loss"]}))
    assert Thresholds.load(path) == Thresholds((0.5,), ("loss",))


HEAD = '"format": "advmed.thresholds/1"'


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "{}", b"\x80\x02\xff"),
        '{"format": "advmed.thresholds/2", "values": [1], "names": ["a"]}',
        *(
            f"{{{HEAD}, {rest}}}"
            for rest in (
                '"names": ["a"]',
                '"values": [1]',
                '"values": [1, 2], "names": ["a"]',
                '"values": null, "names": ["a"]',
                '"values": ["x"], "names": ["a"]',
                '"values": [NaN], "names": ["a"]',
                '"values": [1], "names": ["a"], "colour": 1',
            )
        ),
    ],
)
def test_files_that_are_no_thresholds(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "thresholds.json"
    with pytest.raises(FileNotFoundError, match=r"there is no thresholds file .*thresholds\.json"):
        Thresholds.load(path)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = r"thresholds.json is not a thresholds file of the format advmed.thresholds/1: "
    with pytest.raises(ValueError, match=message):
        Thresholds.load(path)


def test_thresholds_of_another_model_say_both() -> None:
    record = Thresholds((1.0, 2.0), ("ce", "dice"))
    record.require(["ce", "dice"])
    for names in (["loss"], ["dice", "ce"], ["ce", "dice", "box"]):
        with pytest.raises(ValueError) as error:
            record.require(names, "the file x.json")
        message = str(error.value)
        assert message.startswith("the file x.json do not fit this model: they are for K = 2 loss terms ['ce', 'dice']")
        assert f"the model's loss has K = {len(names)} terms {names}" in message
        assert "Make thresholds of this model's own standard training" in message


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"checkpoint" * 1000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"checkpoint" * 1000).hexdigest()


# Self-calibration


def test_running_thresholds_follow_the_rule_and_never_rise_after_the_warm_up() -> None:
    running = RunningThresholds(["a", "b"], "mean+2std")
    like = torch.zeros((), dtype=torch.float64)
    seen: list[tuple[float, float]] = []

    def after(*rows: tuple[float, float]) -> np.ndarray:
        """What the rule makes of all rows so far."""
        seen.extend(rows)
        running.update(torch.tensor(rows, dtype=torch.float64))
        return np.mean(seen, 0) + 2 * np.std(seen, 0)

    assert str(running) == "mean+2std of the clean terms, not yet measured"
    low = after((1, 1), (2, 4))
    np.testing.assert_allclose(running.tensor(like), low, rtol=1e-12)
    ceiling = after((3, 3), (4, 9))
    assert (ceiling > low).all()  # the warm-up may raise them
    np.testing.assert_allclose(running.tensor(like), ceiling, rtol=1e-12)
    running.begin()
    assert (after((10, 60)) > ceiling).all()
    np.testing.assert_allclose(running.tensor(like), ceiling, rtol=1e-12)
    expected = np.minimum(after(*[(0.5, 80.0)] * 200), ceiling)  # each term by itself
    assert expected[0] < ceiling[0]
    np.testing.assert_allclose(running.tensor(like), expected, rtol=1e-12)
    record = running.current()
    np.testing.assert_allclose(record.values, expected, rtol=1e-12)
    assert (record.source, record.n, str(record)) == ("self-calibrated", 205, str(running))
    assert running.tensor(like.float()).dtype == torch.float32


def test_running_thresholds_resume_from_json() -> None:
    parts = batches(2)
    running = RunningThresholds(NAMES, "mean", memory=15)
    for i, part in enumerate(parts):
        if i == 5:
            running.begin()
        running.update(torch.from_numpy(part))
        if i == 8:
            resumed = RunningThresholds(NAMES, "mean", memory=15)
            resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
        elif i > 8:
            resumed.update(torch.from_numpy(part))
    assert resumed.state_dict() == running.state_dict()
    assert resumed.current() == running.current()
    assert torch.equal(resumed.tensor(torch.zeros(())), running.tensor(torch.zeros(())))


def test_running_thresholds_need_a_warm_up_and_their_own_model() -> None:
    running = RunningThresholds(["ce", "dice"])
    with pytest.raises(ValueError, match="no thresholds to be had from no samples"):
        running.begin()
    assert len(running) == 2
    running.require(("ce", "dice"))
    with pytest.raises(ValueError, match=r"the self-calibrated thresholds do not fit this model: .*K = 2.*K = 1"):
        running.require(["loss"])
