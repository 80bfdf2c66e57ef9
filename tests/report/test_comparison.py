"""Reports side by side: a classifier sign(w x) of points at known distances from its plane, so that all is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats

from advmed.attacks.names import parse_attacks
from advmed.cli.main import main
from advmed.evaluation.auc import auc_robust
from advmed.evaluation.intervals import interval
from advmed.evaluation.metric import Metric
from advmed.files import clickable
from advmed.report import Entry, write_report
from advmed.report.comparison import Report, compare_reports
from advmed.report.front import attainable
from helpers.evaluations import by_hand, mean_of, record_of
from helpers.hosts import table

LEVELS = (0.0, 0.5, 1.0)
IDS = [f"s{i:02d}" for i in range(24)]
ACCURACY = mean_of("right", "accuracy", fails_at=0.5, is_mean=True)
DISTANCE = Metric("distance", lambda s: float(s["distance"].mean()), higher_is_better=False, unit="mm")

Evaluated = Callable[..., Path]
Said = Callable[..., str]

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    """Makes a report of models by their widths: the k-th point is k / 24 of that away from the plane."""

    def make(
        name: str,
        models: dict[str, float],
        *,
        ids: Sequence[str] = IDS,
        levels: Sequence[float] = LEVELS,
        attacks: Sequence[str] = ("pgd10", "ifgsm5"),
        norm: float = 2,
        bounds: tuple[float, float] | None = None,
        metrics: Sequence[Metric] = (ACCURACY, DISTANCE),
        level_unit: str = "L2 norm",
        truth: str | None = None,
    ) -> Path:
        parsed = parse_attacks([*attacks, "gaussian"], norm=norm)

        def scores(value: Any) -> dict[str, Any]:
            return {"right": (value > 0).astype(float), "distance": np.maximum(2 - value, 0)}

        def entry(model: str, width: float) -> Entry:
            clean = width * np.array([int(id_[1:]) + 1 for id_ in ids]) / len(IDS)
            curves = {attack: [clean - level * (attack != "gaussian") for level in levels] for attack in parsed}
            mark = json.dumps({"checkpoint": model} | ({} if truth is None else {"truth": truth}))
            how: dict[str, Any] = {"scores": scores, "ids": ids, "bounds": bounds, "fingerprint": mark}
            return Entry(model, by_hand(curves, levels, attacks=parsed, **how))

        entries = [entry(*model) for model in models.items()]
        return write_report(tmp_path / name, entries, metrics, title=name, level_unit=level_unit).parent

    return make


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Compares, and returns what was said: on stdout, or the one message of a mistake."""

    def run(*words: object, status: int = 0) -> str:
        assert main(["compare", *map(str, words)]) == status
        out, error = capsys.readouterr()
        assert error.count("\n") == status
        return error if status else out

    return run


def section_of(*folders: Path, **how: Any) -> Any:
    """The only section of the reports."""
    (section,) = compare_reports([Report.read(folder) for folder in folders], **how)
    return section


def test_numbers_differences_and_files(evaluated: Evaluated, said: Said, tmp_path: Path) -> None:
    first, second = evaluated("one", {"near": 1.0}), evaluated("two", {"far": 3.0})
    text = said(first, second / "report.json", "--out", tmp_path / "out")
    rows = {(row["model"], row["column"]): row for row in table(tmp_path / "out" / "compare.csv")}
    for model, width in (("near", 1), ("far", 3)):
        # A point is lost at a level if it is nearer to the plane.
        curve = [sum(width * k / 24 > level for k in range(1, 25)) / 24 for level in LEVELS]
        wanted = [*curve, np.mean(curve[1:]), auc_robust(LEVELS, curve)]
        for column, value in zip(("clean", "0.5", "1", "mean", "AUC_robust"), wanted, strict=True):
            assert float(rows[model, column]["value"]) == pytest.approx(value)
    gain = rows["far", "1"]
    assert float(gain["difference"]) == pytest.approx(float(gain["value"]) - float(rows["near", "1"]["value"]))
    assert float(gain["difference_low"]) > 0
    assert "Differences from near, paired by sample" in text
    assert f"**{float(gain['difference']):+.4g}" in text
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["format"] == "advmed.comparison/1"
    assert len(record["rows"]) == len(rows)
    assert (tmp_path / "out" / "compare.md").read_text() in text
    page = clickable(tmp_path / "out" / "compare.md")
    assert text.splitlines()[-1] == f"Report: {page} (beside it compare.csv, compare.json, compare.png)"
    # Another task becomes a panel of its own.
    third = evaluated("three", {"far": 3.0}, metrics=[DISTANCE])
    said(first, third, "--tasks", "--out", tmp_path / "tasks")
    (height, width, _), (_, double, _) = (imread(tmp_path / name / "compare.png").shape for name in ("out", "tasks"))
    assert 2 * width == pytest.approx(double, abs=2) and width > height


def test_paired_intervals_are_those_of_the_paired_samples(evaluated: Evaluated) -> None:
    """Two models that are right about the same samples but for a few: the intervals of each overlap, not that of the
    difference."""
    folder = evaluated("one", {"a": 2.0, "b": 2.6}, levels=(0.0, 1.0))
    section = section_of(folder)
    a, b = section.rows
    gain, (low, high) = section.differences(b, a)
    samples = {
        (row["model"], row["id"]): float(row["accuracy"])
        for row in table(folder / "samples.csv")
        if row["attack"] == "pgd10"
    }
    change = np.array([samples["b", id_] - samples["a", id_] for id_ in IDS])
    assert gain[1] == pytest.approx(change.mean(), abs=1e-6)
    generator = np.random.default_rng(5)
    means = change[generator.integers(0, 24, (4000, 24))].mean(1)
    assert [low[1], high[1]] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.045)
    assert low[1] >= -1e-6  # b is right wherever a is
    mine, other = section.intervals(a)[:, 1], section.intervals(b)[:, 1]
    assert mine[1] > other[0]  # they overlap
    assert high[1] - low[1] < mine[1] - mine[0]


def test_intervals_of_differences_hold_for_all_models_at_once(evaluated: Evaluated, said: Said) -> None:
    """Of three models that are compared with one, each interval leaves out a third of five per cent."""
    widths = {"a": 2.0, "b": 2.6, "c": 2.2, "d": 3.0}
    alone, all_ = section_of(evaluated("two", {k: widths[k] for k in "ab"})), section_of(evaluated("four", widths))
    a, b, *_ = all_.rows
    found = all_.differences(b, a)[1]
    drawn = all_.numbers(b.draws) - all_.numbers(a.draws)
    np.testing.assert_allclose(found, interval(drawn, units=len(IDS), confidence=1 - 0.05 / 3))
    pair = alone.differences(alone.rows[1], alone.rows[0])[1]
    assert (np.ptp(found, axis=0)[1:] >= np.ptp(pair, axis=0)[1:]).all()  # all are right when clean
    assert (np.ptp(found, axis=0) > np.ptp(pair, axis=0)).any()
    assert "(95 % for all 3 models at once, by Bonferroni)" in said(evaluated("again", widths))


def test_other_samples_have_no_differences(evaluated: Evaluated, said: Said) -> None:
    text = said(evaluated("one", {"a": 1.0}), evaluated("two", {"b": 3.0}, ids=IDS[:20]))
    assert "Differences" not in text
    assert "Of other samples than a, hence without differences: b." in text


def test_lower_is_better_shares_one_scale_and_the_same_name_twice_is_told_apart_by_folder(
    evaluated: Evaluated,
) -> None:
    folders = [evaluated(name, {"AMAT": width}) for name, width in (("one", 1.0), ("two", 3.0))]
    section = section_of(*folders, metric="distance")
    assert [row.model for row in section.rows] == ["one: AMAT", "two: AMAT"]
    largest = max(row.curve.max() for row in section.rows)
    for row in section.rows:
        expected = auc_robust(LEVELS, row.curve, higher_is_better=False, scale=largest)
        assert section.numbers(row.curve)[-1] == pytest.approx(expected)
    assert section.label == "distance (mm)"


def test_a_baseline_by_name_and_failed_checks(evaluated: Evaluated, said: Said) -> None:
    folder = evaluated("one", {"a": 1.0, "b": 3.0})
    text = said(folder, "--baseline", "b")
    assert "Differences from b" in text
    assert "**-" in text  # a clear loss is marked as a clear gain is
    assert "do not rely" not in text
    assert "there is no model 'c'; there are a, b" in said(folder, "--baseline", "c", status=1)
    record = record_of(folder)
    record["checks"]["b"] = [{"name": "noise", "verdict": "failed"}, {"name": "steps", "verdict": "passed"}]
    (folder / "report.json").write_text(json.dumps(record))
    text = said(folder)
    assert "| b ! |" in text
    assert "do not rely on the robustness of: b (noise)" in text


def test_differences_of_models_whose_checks_failed_are_not_marked(evaluated: Evaluated, said: Said) -> None:
    folder = evaluated("one", {"a": 1.0, "b": 3.0, "c": 3.5})
    marked = [line for line in said(folder).splitlines() if "**+" in line]
    assert [line[:5] for line in marked] == ["| b |", "| c |"]
    record = record_of(folder)
    record["checks"]["b"] = [{"name": "noise", "verdict": "failed"}]
    (folder / "report.json").write_text(json.dumps(record))
    text = said(folder)
    assert [line[:5] for line in text.splitlines() if "**+" in line] == ["| c |"]
    assert text.count("| b ! |") == 2
    assert "**-" not in said(folder, "--baseline", "b")


def test_a_comparison_in_which_nobody_is_robust_says_so(evaluated: Evaluated, said: Said) -> None:
    """By the failure that the report tells: an accuracy of 4 in 24 is more than a tenth of a clean one of 1."""
    folders = [evaluated(name, {name: width}) for name, width in (("a", 1.2), ("b", 0.9))]
    told = "! No model is robust under pgd10 at noise level 1: the best accuracy there is 0.1667 (a)."
    assert told in said(*folders).splitlines()
    assert "! a is not robust under pgd10 at noise level 1, where its accuracy goes to 0.1667." in said(folders[0])
    assert "is robust" not in said(*folders, evaluated("c", {"c": 3.0}))
    record = record_of(folders[0])
    assert record["results"]["accuracy"].pop("fails_at") == 0.5
    (folders[0] / "report.json").write_text(json.dumps(record))
    assert "robust under" not in said(folders[0]), "a report of an earlier release does not tell it"
    assert told in said(*folders).splitlines()


def test_without_draws_there_are_numbers_and_no_intervals(evaluated: Evaluated) -> None:
    folder = evaluated("one", {"a": 1.0, "b": 3.0})
    (folder / "draws.npz").unlink()
    section = section_of(folder)
    gain, bounds = section.differences(section.rows[1], section.rows[0])
    assert np.isfinite(gain).all()
    assert np.isnan(bounds).all()


# Several trainings of each, and fronts


def seeds(evaluated: Evaluated, widths: dict[str, Sequence[float]]) -> list[Path]:
    """A report for each training, all in folders of the same name; a width of 0 is of a model that it lacks."""
    count = len(next(iter(widths.values())))
    return [
        evaluated(f"{k}/report", {name: those[k] for name, those in widths.items() if those[k]}) for k in range(count)
    ]


def test_repeated_trainings_are_one_row_with_student_s_interval(
    evaluated: Evaluated, said: Said, tmp_path: Path
) -> None:
    widths = {"a": (1.0, 1.2, 0.9), "b": (2.0, 2.6, 2.2)}
    folders = seeds(evaluated, widths)
    section = section_of(*folders, repeats=True)
    single = {
        name: np.stack([one.numbers(one.rows[k].curve) for one in map(section_of, folders)])
        for k, name in enumerate(widths)
    }
    a, b = section.rows
    for row in (a, b):
        values = single[row.model]
        np.testing.assert_allclose(section.values(row), values.mean(0))
        wide = values.std(0) > 0
        wanted = stats.t.interval(0.95, 2, values.mean(0)[wide], stats.sem(values, axis=0)[wide])
        np.testing.assert_allclose(section.intervals(row)[:, wide], wanted)
    gain, bounds = section.differences(b, a)
    paired = stats.ttest_rel(single["b"], single["a"])
    np.testing.assert_allclose(gain, (single["b"] - single["a"]).mean(0))
    found = paired.confidence_interval()
    np.testing.assert_allclose(bounds[:, 1:], np.stack([found.low, found.high])[:, 1:])
    text = said(*folders, "--repeats", "--out", tmp_path / "out")
    assert "Means over 3 trainings of each" in text
    assert "Differences from a, paired by training" in text
    rows = table(tmp_path / "out" / "compare.csv")
    assert {(row["model"], row["report"], row["trainings"]) for row in rows} == {
        (name, "0/report, 1/report, 2/report", "3") for name in widths
    }


def test_a_training_that_is_missing_is_left_out_of_the_pairs(evaluated: Evaluated, said: Said) -> None:
    folders = seeds(evaluated, {"a": (1.0, 1.2, 0.9), "b": (2.0, 0, 2.2), "c": (0, 3.0, 0)})
    section = section_of(*folders, repeats=True)
    a, b, c = section.rows
    gain, _ = section.differences(b, a)
    alone = [section_of(folders[k]) for k in (0, 2)]
    wanted = np.mean([one.numbers(one.rows[1].curve) - one.numbers(one.rows[0].curve) for one in alone], axis=0)
    np.testing.assert_allclose(gain, wanted)
    assert np.isnan(section.intervals(c)).all()
    assert np.isnan(section.differences(c, a)[1]).all() and np.isfinite(section.differences(c, a)[0]).all()
    text = said(*folders, "--repeats", "--baseline", "b")
    assert "Means over the trainings, 3 of a, 2 of b, 1 of c, with" in text
    assert "In no report of b, hence without differences: c." in text


@pytest.mark.parametrize("metric", ["accuracy", "distance"])
def test_beyond_a_front(metric: str, evaluated: Evaluated, said: Said) -> None:
    """By hand: a model between two settings of the front is held against the straight line between these."""
    folder = evaluated("one", {"low": 1.0, "high": 3.0, "between": 1.7, "better": 9.0})
    section = section_of(folder, metric=metric)
    rows = {row.model: row for row in section.rows}
    front = section.front(["low", "h*h"])
    assert [row.model for row in front] == ["low", "high"]
    (x1, y1), (x2, y2), (x, y) = ((rows[n].curve[0], rows[n].curve[1:].mean()) for n in ("low", "high", "between"))
    sign = 1 if section.higher_is_better else -1
    if x1 == x2:  # all are right when clean: the best of both
        wanted = y - max(y1, y2)
    else:
        # a better clean value counts, too, and the front's is the more robust one
        wanted = sign * (y - y2) if sign * x2 >= sign * x else sign * (y - np.interp(x, [x1, x2], [y1, y2]))
    gain, (low, high) = section.beyond(rows["between"], front)
    assert gain == pytest.approx(wanted) and low <= gain <= high
    text = said(folder, "--metric", metric, "--front", "low", "high")
    assert f"| between | {gain:+.4g} (" in text.replace("**", "")
    further = said(folder, "--metric", metric, "--front", "between", "high")
    assert ("its next setting may have as much" in further) == (rows["low"].curve[0] != rows["between"].curve[0])
    if metric == "distance":
        assert "| better | none of the front is as good on clean images |" in text
    assert "no model is called 'SAT*', of the front; there are low, high" in said(folder, "--front", "SAT*", status=1)


def test_beyond_a_front_with_repeated_trainings(evaluated: Evaluated, said: Said, tmp_path: Path) -> None:
    folders = seeds(evaluated, {"low": (1.0, 1.2, 0.9), "high": (3.0, 3.4, 3.2), "mine": (2.0, 2.6, 2.2)})
    section = section_of(*folders, repeats=True, metric="distance")
    *front, mine = section.rows
    gains = []
    for folder in folders:
        one = section_of(folder, metric="distance")
        gains.append(one.beyond(one.rows[2], one.rows[:2])[0])
    gain, bounds = section.beyond(mine, front)
    assert gain == pytest.approx(np.mean(gains))
    np.testing.assert_allclose(bounds, stats.t.interval(0.95, 2, np.mean(gains), stats.sem(gains)))
    said(*folders, "--repeats", "--metric", "distance", "--front", "low", "high", "--out", tmp_path / "out")
    (row,) = (r for r in table(tmp_path / "out" / "compare.csv") if "front" in r["column"] and r["model"] == "mine")
    assert float(row["value"]) == pytest.approx(gain) and row["difference"] == ""


def test_a_front_is_in_the_order_of_its_numbers(evaluated: Evaluated) -> None:
    folder = evaluated("one", {"SAT10": 3.0, "SAT2": 1.0, "SAT3.5": 2.0, "AMAT": 2.5})
    section = section_of(folder)
    assert [row.model for row in section.front(["SAT*"])] == ["SAT2", "SAT3.5", "SAT10"]
    assert [row.model for row in section.front(["SAT10", "SAT2"])] == ["SAT10", "SAT2"]  # as they were named


def test_beyond_a_front_that_a_training_leaves_is_of_the_trainings_that_all_have(evaluated: Evaluated) -> None:
    """The first training of "mine" is better on clean images than the front, which lacks the second."""
    widths = {"low": (1.0, 1.2, 0.9), "high": (3.0, 3.4, 3.2), "mine": (3.05, 3.0, 2.2)}
    section = section_of(*seeds(evaluated, widths), repeats=True, metric="distance")
    *front, mine = section.rows
    assert mine.runs is not None and list(mine.runs) == ["0/report", "1/report", "2/report"]
    front = [
        replace(row, runs={name: row.runs[name] for name in ("0/report", "2/report")}) for row in front if row.runs
    ]
    gain, bounds = section.beyond(mine, front)
    assert np.isnan(bounds).all()
    high, own = (
        np.mean([row.runs[name] for name in ("0/report", "2/report")], axis=0) for row in (front[1], mine) if row.runs
    )
    assert high[0] < own[0]  # so that nothing of the front is better than this setting, which is cleaner, too
    assert gain == pytest.approx(high[1:].mean() - own[1:].mean())


def test_repeats_want_models_of_the_same_names(evaluated: Evaluated, said: Said) -> None:
    folders = evaluated("one", {"a": 1.0}), evaluated("two", {"b": 3.0})
    assert "no model is in two of these reports" in said(*folders, "--repeats", status=1)


def test_attainable_is_the_highest_point_of_the_line_at_that_clean_value_or_a_better_one() -> None:
    generator = np.random.default_rng(0)
    clean, attacked, at = generator.random((50, 4)), generator.random((50, 4)), generator.random(50)
    found = attainable(clean, attacked, at)
    for k in range(50):
        along = np.linspace(0, 3, 30_001)
        x, y = (np.interp(along, range(4), values[k]) for values in (clean, attacked))
        fine = y[x >= at[k]]
        assert found[k] == pytest.approx(fine.max(), abs=1e-3) if len(fine) else np.isnan(found[k])
    assert 0 < np.isnan(found).sum() < 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": (0.0, 0.5, 2.0)}, "they differ in levels"),
        ({"norm": math.inf}, "they differ in attack"),
        ({"attacks": ["pgd20"]}, "they differ in attack"),
        ({"level_unit": "L2 norm over something else"}, "they differ in noise level"),
        ({"bounds": (-9.0, 9.0)}, "they differ in bounds"),
        ({"metrics": [DISTANCE, ACCURACY]}, "they differ in metric"),
    ],
)
def test_numbers_that_cannot_stand_in_one_column(
    changes: dict[str, Any], message: str, evaluated: Evaluated, said: Said
) -> None:
    reports = evaluated("one", {"a": 1.0}), evaluated("two", {"b": 3.0}, **changes)
    assert message in said(*reports, status=1)
    assert said(*reports, "--tasks").count("noise level:") == 2


def test_another_truth_of_the_same_samples_is_refused(evaluated: Evaluated, said: Said) -> None:
    """Where both say what it was; folds have other samples, and so another truth."""
    one, two = (evaluated(name, {"a": 1.0}, truth=name) for name in ("one", "two"))
    message = "are of the same samples with another truth (other labels, points or spacing)"
    for words in ([one, two], [one, two, "--repeats"], [evaluated("none", {"b": 3.0}), two, one]):
        assert message in said(*words, status=1)
    assert said(one, two, "--tasks").count("noise level:") == 2
    same, fold = evaluated("same", {"a": 3.0}, truth="one"), evaluated("fold", {"a": 3.0}, truth="3", ids=IDS[:20])
    for other in (same, fold):
        assert said(one, other, "--repeats", "--tasks").count("noise level:") == 1
        said(one, other, "--repeats")


def test_bad_input(evaluated: Evaluated, said: Said, tmp_path: Path) -> None:
    folder = evaluated("one", {"a": 1.0})
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "old.json").write_text('{"format": "advmed.report/1"}')
    for words, message in (
        ([tmp_path / "nowhere"], "there is no"),
        ([tmp_path / "other.json"], "is no report of an evaluation"),
        ([tmp_path / "old.json"], "is in the format advmed.report/1, and only advmed.report/2"),
        ([folder, "--metric", "mAP"], "has no metric 'mAP'; it has accuracy, distance"),
        ([folder, "--attack", "gaussian"], "has no attack 'gaussian'; it has pgd10, ifgsm5"),
        ([folder, folder / "report.json"], "a report is given twice"),
    ):
        assert message in said(*words, status=1)
    (folder / "draws.npz").write_bytes(b"no archive")
    assert "is damaged" in said(folder, status=1)
