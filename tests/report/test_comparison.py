from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advmed.attacks.names import parse_attacks
from advmed.cli.evaluate import compare
from advmed.cli.main import main
from advmed.evaluation.auc import auc_robust
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch
from advmed.evaluation.metric import Metric
from advmed.evaluation.subjects import Subject
from advmed.report.comparison import Report, compare_reports

LEVELS = (0.0, 0.5, 1.0)
IDS = [f"s{i:02d}" for i in range(24)]


def accuracy(scores: Any) -> float:
    return float(scores["right"].mean())


ACCURACY = Metric("accuracy", accuracy, per_sample=lambda s: np.asarray(s["right"], float), fails_at=0.5, is_mean=True)
DISTANCE = Metric("distance", lambda s: float(s["distance"].mean()), higher_is_better=False, unit="mm")


@pytest.fixture(scope="module")
def done() -> dict[str, Path]:
    return {}


class Linear:
    """Classifier sign(w x) of points at known distances from the plane, so that every number is known."""

    def __init__(self, width: float, scale: float = 1.0) -> None:
        self.model = nn.Linear(4, 1, bias=False)
        nn.init.constant_(self.model.weight, scale / 2)
        self.width = width

    def batches(self, ids: Sequence[str] = IDS) -> list[EvaluationBatch]:
        def load(part: Sequence[str]) -> LoadedBatch:
            distance = torch.tensor([self.width * (int(id_[1:]) + 1) / len(IDS) for id_ in part])
            images = distance[:, None] * torch.full((1, 4), 0.5)

            def objective(inputs: Tensor) -> Tensor:
                return nn.functional.softplus(-self.model(inputs))

            def score(inputs: Tensor) -> dict[str, Tensor]:
                logit = self.model(inputs)[:, 0]
                return {"right": (logit > 0).float(), "distance": (2 - logit).clamp_min(0)}

            return LoadedBatch(images, objective, score)

        return [EvaluationBatch(part, lambda part=part: load(part)) for part in (ids[:10], ids[10:])]


@pytest.fixture
def evaluate(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, done: dict[str, Path]) -> Callable[..., Path]:
    """Makes a report, or a copy of one that an earlier test has made alike."""

    def copied(name: str, models: dict[str, float], **changes: Any) -> Path:
        key = repr((models, changes))
        if key not in done:
            done[key] = made(tmp_path_factory.mktemp("reports"), name, models, **changes)
        return Path(shutil.copytree(done[key], tmp_path / name))

    def made(folder: Path, name: str, models: dict[str, float], **changes: Any) -> Path:
        checkpoint = folder / "model.ckpt"
        checkpoint.write_text("weights")
        ids = changes.pop("ids", IDS)
        norm = changes.pop("norm", 2)
        given: dict[str, Any] = {
            "examples": lambda *_: [],
            "fingerprint": {},
            "title": name,
            "level_unit": "L2 norm",
            "say": lambda _: None,
            "metrics": [ACCURACY, DISTANCE],
            "levels": LEVELS,
            **changes,
        }
        metrics, levels = given.pop("metrics"), given.pop("levels")
        subjects = [Subject(model, checkpoint, Linear(width).batches(ids)) for model, width in models.items()]
        attacks = parse_attacks(given.pop("attacks", ["pgd10", "ifgsm5"]), norm=norm)
        return compare(folder / name, subjects, attacks, levels, metrics, **given).parent

    return copied


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "compare.csv").open() as file:
        return {(row["model"], row["column"]): row for row in csv.DictReader(file)}


def test_numbers_differences_and_files(evaluate: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    first, second = evaluate("one", {"near": 1.0}), evaluate("two", {"far": 3.0})
    assert main(["compare", str(first), str(second / "report.json"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    # A point is lost at a level if it is nearer to the plane: k / 24 * width <= level.
    near = [1.0, sum(k / 24 > 0.5 for k in range(1, 25)) / 24, 0.0]
    far = [1.0, sum(3 * k / 24 > 0.5 for k in range(1, 25)) / 24, sum(3 * k / 24 > 1 for k in range(1, 25)) / 24]
    for model, curve in (("near", near), ("far", far)):
        for column, value in zip(("clean", "0.5", "1"), curve, strict=True):
            assert float(rows[model, column]["value"]) == pytest.approx(value, abs=0.05)
        assert float(rows[model, "mean"]["value"]) == pytest.approx(np.mean(curve[1:]), abs=0.05)
        assert float(rows[model, "AUC_robust"]["value"]) == pytest.approx(auc_robust(LEVELS, curve), abs=0.05)
    gain = rows["far", "1"]
    assert float(gain["difference"]) == pytest.approx(
        float(gain["value"]) - float(rows["near", "1"]["value"]), abs=1e-12
    )
    assert float(gain["difference_low"]) > 0
    assert "Differences from near, paired by sample" in said
    assert f"**{float(gain['difference']):+.4g}" in said
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["format"] == "advmed.comparison/1"
    assert len(record["rows"]) == len(rows)
    assert (tmp_path / "out" / "compare.md").read_text() in said
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_paired_intervals_are_those_of_the_paired_samples(evaluate: Callable[..., Path], tmp_path: Path) -> None:
    """Two models that are right about the same samples but for a few: the intervals of each overlap, not that of the
    difference."""
    folder = evaluate("one", {"a": 2.0, "b": 2.6}, levels=(0.0, 1.0))
    reports = [Report.read(folder)]
    (section,) = compare_reports(reports)
    a, b = section.rows
    gain, (low, high) = section.differences(b, a)
    samples = {
        (row["model"], row["id"]): float(row["accuracy"])
        for row in csv.DictReader((folder / "samples.csv").open())
        if row["attack"] == "pgd10"
    }
    change = np.array([samples["b", id_] - samples["a", id_] for id_ in IDS])
    assert gain[1] == pytest.approx(change.mean(), abs=1e-6)
    generator = np.random.default_rng(5)
    means = change[generator.integers(0, 24, (4000, 24))].mean(1)
    assert [low[1], high[1]] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.045)
    mine, other = section.intervals(a)[:, 1], section.intervals(b)[:, 1]
    assert mine[1] > other[0]  # they overlap
    assert high[1] - low[1] < mine[1] - mine[0]


def test_other_samples_have_no_differences(evaluate: Callable[..., Path], capsys: Any) -> None:
    first, second = evaluate("one", {"a": 1.0}), evaluate("two", {"b": 3.0}, ids=IDS[:20])
    assert main(["compare", str(first), str(second)]) == 0
    said = capsys.readouterr().out
    assert "Differences" not in said
    assert "Of other samples than a, hence without differences: b." in said


def test_the_same_name_twice_is_told_apart_by_folder(evaluate: Callable[..., Path]) -> None:
    reports = [Report.read(evaluate(name, {"AMAT": width})) for name, width in (("one", 1.0), ("two", 3.0))]
    (section,) = compare_reports(reports)
    assert [row.model for row in section.rows] == ["one: AMAT", "two: AMAT"]


def test_lower_is_better_shares_one_scale(evaluate: Callable[..., Path]) -> None:
    reports = [Report.read(evaluate(name, {name: width})) for name, width in (("one", 1.0), ("two", 3.0))]
    (section,) = compare_reports(reports, metric="distance")
    largest = max(row.curve.max() for row in section.rows)
    for row in section.rows:
        expected = auc_robust(LEVELS, row.curve, higher_is_better=False, scale=largest)
        assert section.numbers(row.curve)[-1] == pytest.approx(expected)
    assert section.label == "distance (mm)"


def test_a_baseline_by_name(evaluate: Callable[..., Path], capsys: Any) -> None:
    folder = evaluate("one", {"a": 1.0, "b": 3.0})
    assert main(["compare", str(folder), "--baseline", "b"]) == 0
    assert "Differences from b" in capsys.readouterr().out
    assert main(["compare", str(folder), "--baseline", "c"]) == 1
    assert "there is no model 'c'; there are a, b" in capsys.readouterr().err


def test_failed_checks_are_flagged(evaluate: Callable[..., Path], capsys: Any) -> None:
    folder = evaluate("one", {"a": 1.0, "b": 3.0})
    path = folder / "report.json"
    record = json.loads(path.read_text())
    record["checks"]["b"] = [{"name": "noise", "verdict": "failed"}, {"name": "steps", "verdict": "passed"}]
    path.write_text(json.dumps(record))
    assert main(["compare", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "| b ! |" in said
    assert "do not rely on the robustness of: b (noise)" in said


def test_without_draws_there_are_numbers_and_no_intervals(evaluate: Callable[..., Path]) -> None:
    folder = evaluate("one", {"a": 1.0, "b": 3.0})
    (folder / "draws.npz").unlink()
    (section,) = compare_reports([Report.read(folder)])
    gain, bounds = section.differences(section.rows[1], section.rows[0])
    assert np.isfinite(gain).all()
    assert np.isnan(bounds).all()


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
    changes: dict[str, Any], message: str, evaluate: Callable[..., Path], capsys: Any, tmp_path: Path
) -> None:
    first, second = evaluate("one", {"a": 1.0}), evaluate("two", {"b": 3.0}, **changes)
    assert main(["compare", str(first), str(second)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert main(["compare", str(first), str(second), "--tasks", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("noise level:") == 2


def test_bad_input(evaluate: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    folder = evaluate("one", {"a": 1.0})

    def refused(*words: str) -> str:
        assert main(["compare", *words]) == 1
        return str(capsys.readouterr().err)

    assert "there is no" in refused(str(tmp_path / "nowhere"))
    (tmp_path / "other.json").write_text('{"a": 1}')
    assert "is no report of an evaluation" in refused(str(tmp_path / "other.json"))
    (tmp_path / "old.json").write_text('{"format": "advmed.report/1"}')
    assert "is in the format advmed.report/1, and only advmed.report/2" in refused(str(tmp_path / "old.json"))
    assert "has no metric 'mAP'; it has accuracy, distance" in refused(str(folder), "--metric", "mAP")
    assert "has no attack 'gaussian'; it has pgd10, ifgsm5" in refused(str(folder), "--attack", "gaussian")
    assert "a report is given twice" in refused(str(folder), str(folder / "report.json"))
    (folder / "draws.npz").write_bytes(b"no archive")
    assert "is damaged" in refused(str(folder))
