"""What an evaluation measures: radial errors against NumPy, and the same numbers whenever they are measured."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adv_landmark import evaluate as host
from adv_landmark.data import Images, LandmarkTable
from adv_landmark.maps import decode
from advmed.attacks import PGD
from advmed.attacks.names import parse_attacks
from advmed.cli.evaluate import compare
from advmed.evaluation.loop import evaluate
from advmed.evaluation.subjects import Subject
from advmed.report import Entry, tabulate

CPU = torch.device("cpu")
LEVELS = (0.0, 0.5, 1.5)
BOUNDS = (-1.0, 1.0)


@pytest.fixture(scope="module")
def data(root: Path) -> LandmarkTable:
    return LandmarkTable(str(root), size=(32, 48), workers=0, batch_size=3)


@pytest.fixture(scope="module")
def model(standard: Path, data: LandmarkTable) -> host.TrainedModel:
    return host.load_model("own", standard / "checkpoints" / "last.ckpt", data, "val", CPU)


@pytest.fixture(scope="module")
def measured(model: host.TrainedModel) -> Any:
    attacks = parse_attacks(["pgd3", "ifgsm2"])
    return evaluate(host.make_batches(model), attacks, LEVELS, bounds=BOUNDS, seed=1)


def errors() -> np.ndarray:
    """Of 5 images with 4 landmarks, some of them not known, one image without any."""
    error = np.random.default_rng(0).gamma(2.0, 1.5, (5, 4)).astype(np.float32)
    error[1, 2] = error[2, 0] = error[2, 3] = np.nan
    error[4] = np.nan
    error[0, 0], error[0, 1] = 2.0, 2.5  # a landmark at the radius itself is found
    return error


# Metrics


def test_metrics_are_those_of_their_definitions() -> None:
    given = {"error": errors()}
    known = [float(value) for value in given["error"].flatten() if not math.isnan(value)]
    assert len(known) == 13
    metrics = {metric.name: metric for metric in host.metrics("mm", [2, 2.5, 3, 4])}
    assert list(metrics) == ["MRE", "radial error SD", "SDR 2 mm", "SDR 2.5 mm", "SDR 3 mm", "SDR 4 mm"]
    assert metrics["MRE"].of(given) == pytest.approx(sum(known) / 13)
    assert metrics["radial error SD"].of(given) == pytest.approx(statistics.stdev(known))
    rates = [metrics[f"SDR {r:g} mm"].of(given) for r in (2, 2.5, 3, 4)]
    assert rates == [pytest.approx(sum(value <= r for value in known) / 13) for r in (2, 2.5, 3, 4)]
    assert rates[0] >= 1 / 13
    assert 0 < rates[0] < rates[1] < 1
    for name, metric in metrics.items():
        assert metric.higher_is_better == name.startswith("SDR"), name
        assert metric.unit == ("" if name.startswith("SDR") else "mm")
        assert metric.scale is None  # where lower is better, the largest value of the report
        assert (metric.per_sample is not None) == (name == "MRE")


def test_the_error_of_an_image_is_the_mean_of_its_known_landmarks() -> None:
    given = {"error": errors()}
    (metric,) = [metric for metric in host.metrics("px", [2]) if metric.per_sample is not None]
    found = metric.per_sample(given)
    wanted = [np.mean([value for value in row if not math.isnan(value)] or [math.nan]) for row in errors()]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert np.isnan(found).tolist() == [False] * 4 + [True]


def test_a_single_error_has_no_deviation() -> None:
    one = {"error": np.array([[np.nan, 3.5]])}
    found = {metric.name: metric.of(one) for metric in host.metrics("px", [3, 4])}
    assert (found["MRE"], found["SDR 3 px"], found["SDR 4 px"]) == (3.5, 0, 1)
    assert math.isnan(found["radial error SD"])


def test_metrics_of_pixels() -> None:
    assert [metric.label for metric in host.metrics("px", [1.5])] == ["MRE (px)", "radial error SD (px)", "SDR 1.5 px"]
    assert [metric.name for metric in host.metrics("px", [])] == ["MRE", "radial error SD"]


def test_an_image_fails_where_its_mean_error_is_above_the_largest_radius() -> None:
    given = {"error": np.array([[4.0, 4.0], [4.1, np.nan], [0.1, 8.0], [np.nan, np.nan]])}
    (metric,) = [metric for metric in host.metrics("mm", [2, 4]) if metric.fails_at is not None]
    assert (metric.name, metric.failure) == ("MRE", "MRE above 4 mm")
    np.testing.assert_array_equal(metric.failed(given), [0, 1, 1, np.nan])
    assert all(metric.fails_at is None for metric in host.metrics("mm", []))


@pytest.mark.parametrize("radii", [[0, 1], [-1], [2, 1], [1, 1], [1, math.nan]])
def test_radii_that_are_none(radii: list[float]) -> None:
    with pytest.raises(ValueError, match="the radii of SDR must be > 0 and increase, got"):
        host.metrics("mm", radii)


# Models


def by_hand(model: host.TrainedModel, image: Tensor, sample: str, root: Path, tools: Any) -> np.ndarray:
    """Radial errors of one image in mm, from the table of points."""
    with torch.no_grad():
        found = decode(model.module(image[None]), model.module.radius)[0][0].double().numpy()
    place = np.stack([found[:, 0], (found[:, 1] + 0.5) / 0.8 - 0.5], 1)
    return np.hypot(*((place - tools.truth(root, sample)) * tools.SPACING).T)


def test_scores_are_of_the_network_on_the_images_that_are_attacked(
    model: host.TrainedModel, measured: Any, data: LandmarkTable, root: Path, tools: Any
) -> None:
    assert measured.ids == ("val0.png", "val1.png", "val2.png", "val3.png")
    wanted = [by_hand(model, sample["image"], sample["id"], root, tools) for sample in data.dataset("val")]
    np.testing.assert_allclose(measured.clean.scores["error"], wanted, rtol=1e-3, atol=1e-3)
    assert np.isnan(wanted[1]).tolist() == [True, False, True]
    for attack in ("pgd3", "ifgsm2"):
        for level in LEVELS[1:]:
            found = measured.attacked[attack, level]
            assert (found.norm <= level * (1 + 1e-5)).all()
            assert found.norm.max() > 0.7 * level
            assert (found.loss > measured.clean.loss).all()
            assert (np.isnan(found.scores["error"]) == np.isnan(wanted)).all()
    assert list(measured.clean.scores) == ["error"]


def test_an_attack_is_that_of_the_objective_of_the_training(model: host.TrainedModel) -> None:
    loaded = host.load(model, [3, 1])
    objective = loaded.objective
    assert objective.names == ("heatmap", "offset_y", "offset_x")
    assert (objective.heatmap, objective.heatmap_weight) == ("dice", 0.5)
    assert objective.targets.disk.sum((2, 3))[0] == pytest.approx(math.pi * 2.4**2, abs=4)
    assert objective.targets.present.tolist() == [[True, True, True], [False, True, False]]
    attack = PGD(2, 1.0)
    images = attack(objective, loaded.images, 1.0, bounds=BOUNDS).images
    error = loaded.score(images)["error"]
    batch = model.read([3, 1])
    assert torch.equal(error.isnan(), ~objective.targets.present)
    torch.testing.assert_close(error, model.module.errors(model.module(images), batch), equal_nan=True)


def test_the_tables_of_an_evaluation(measured: Any) -> None:
    tables = {table.metric.name: table for table in tabulate([Entry("own", measured)], host.metrics("mm", [2, 4]))}
    table = tables["MRE"]
    curves = []
    for attack in ("pgd3", "ifgsm2"):
        errors = [measured.scores(attack, level)["error"].astype(float) for level in LEVELS]
        curves.append([np.nanmean(error) for error in errors])
        for row, radius in (("SDR 2 mm", 2), ("SDR 4 mm", 4)):
            found = tables[row].values[0, len(curves) - 1]
            assert found == pytest.approx([(e[~np.isnan(e)] <= radius).mean() for e in errors])
    np.testing.assert_allclose(table.values[0], curves)
    assert table.scale == pytest.approx(np.max(curves))
    for k, curve in enumerate(curves):
        area = (0.5 * (curve[0] + curve[1]) + (curve[1] + curve[2])) / 2 / 1.5
        assert table.auc[0, k] == pytest.approx(math.sqrt(curve[0] * area) / np.max(curves))
    assert table.values[0, 0, 2] > table.values[0, 0, 0]


def test_a_resumed_evaluation_has_the_same_numbers_and_computes_only_the_rest(
    model: host.TrainedModel, tmp_path: Path
) -> None:
    attacks = parse_attacks(["pgd2"])
    how: dict[str, Any] = {"bounds": BOUNDS, "seed": 3, "fingerprint": "own"}
    whole = evaluate(host.make_batches(model), attacks, LEVELS, folder=tmp_path / "whole", **how)
    batches = host.make_batches(model)
    assert len(batches) == 2

    def cut() -> Any:
        raise RuntimeError("a power cut")

    with pytest.raises(RuntimeError, match="a power cut"):
        evaluate([batches[0], replace(batches[1], load=cut)], attacks, LEVELS, folder=tmp_path / "cut", **how)
    rest = [replace(batches[0], load=cut), batches[1]]
    resumed = evaluate(rest, attacks, LEVELS, folder=tmp_path / "cut", **how)
    for key, condition in {("clean", 0.0): whole.clean, **whole.attacked}.items():
        other = resumed.clean if key[0] == "clean" else resumed.attacked[key]
        np.testing.assert_array_equal(condition.norm, other.norm)
        np.testing.assert_array_equal(condition.loss, other.loss)
        np.testing.assert_array_equal(condition.scores["error"], other.scores["error"])


def test_some_images_are_at_even_distances(standard: Path, data: LandmarkTable) -> None:
    model = host.load_model("own", standard / "checkpoints" / "last.ckpt", data, "train", CPU)

    def numbers(limit: int | None) -> list[list[int]]:
        names = [batch.ids for batch in host.make_batches(model, limit)]
        return [[int(name.removeprefix("train").removesuffix(".png")) for name in ids] for ids in names]

    assert numbers(None) == numbers(8) == numbers(99) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert numbers(4) == [[0, 2, 4], [7]]
    assert numbers(1) == [[0]]


def test_a_model_of_other_data_is_refused(standard: Path, tmp_path: Path, tools: Any, root: Path) -> None:
    path = standard / "checkpoints" / "last.ckpt"
    two = LandmarkTable(str(tools.write_table(tmp_path / "two", names=("dot", "end"))), size=(32, 48), workers=0)
    with pytest.raises(ValueError, match=r"finds 3 landmarks \(corner, dot, end\), the data has 2 \(dot, end\)"):
        host.load_model("own", path, two, "val", CPU)
    colour = LandmarkTable(str(root), size=(32, 48), channels=3)
    with pytest.raises(ValueError, match=r"takes images of 1 channel\(s\), the data has 3"):
        host.load_model("own", path, colour, "val", CPU)
    large = LandmarkTable(str(root))
    with pytest.raises(ValueError, match=r"trained on images of \(32, 48\), the data's are resized to \(40, 48\)"):
        host.load_model("own", path, large, "val", CPU)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        host.load_model("own", tmp_path / "none.ckpt", large, "val", CPU)
    bare = Images(str(root / "images"), tools.NAMES, size=(32, 48))
    with pytest.raises(ValueError, match="no image of the split test has a known landmark to compare with"):
        host.load_model("own", path, bare, "test", CPU)
    with pytest.raises(ValueError, match="the data has no split 'val'; there are test"):
        host.load_model("own", path, bare, "val", CPU)


def test_the_unit_is_that_of_the_data_and_not_of_the_training(standard: Path, root: Path) -> None:
    path = standard / "checkpoints" / "last.ckpt"
    pixels = LandmarkTable(str(root), size=(32, 48), workers=0, unit="px")
    found = host.load_model("own", path, pixels, "val", CPU)
    assert found.module.unit == "px"
    twice = LandmarkTable(str(root), size=(32, 48), workers=0, spacing=2)  # also wins over the columns of the table
    error = [
        host.load(host.load_model("own", path, data, "val", CPU), [0]).score(found.read([0])["image"])["error"]
        for data in (pixels, twice)
    ]
    torch.testing.assert_close(2 * error[0], error[1])


def test_margins_come_with_the_run(adaptive: Path, model: host.TrainedModel, data: LandmarkTable, tools: Any) -> None:
    found = host.load_model("own", adaptive / "checkpoints" / "best.ckpt", data, "val", CPU).margins
    assert sorted(found) == pytest.approx(sorted(value for value, _ in tools.margins(adaptive).values()))
    assert model.margins is None


def test_a_loaded_model_does_not_learn(model: host.TrainedModel) -> None:
    assert not any(part.training for part in model.module.modules())
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    evaluate(host.make_batches(model, 1), parse_attacks(["pgd2"]), (0, 1), bounds=BOUNDS)
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    batch = model.read([2, 3])
    assert batch["id"] == ["val2.png", "val3.png"]
    assert batch["image"].shape == (2, 1, 32, 48)


# Pictures


def test_examples_show_true_and_found_landmarks_of_every_model(
    model: host.TrainedModel, adaptive: Path, data: LandmarkTable
) -> None:
    other = host.load_model("other", adaptive / "checkpoints" / "last.ckpt", data, "val", CPU)
    attack = ("pgd2", parse_attacks(["pgd2"])["pgd2"])
    examples = host.make_examples([model, other], attack, [0.5, 1.5], ["val3.png", "val0.png"], seed=0)
    assert [example.sample for example in examples] == ["val3.png", "val0.png"]
    for index, example in zip((3, 0), examples, strict=True):
        item = data.dataset("val")[index]
        np.testing.assert_array_equal(example.points, item["points"])
        np.testing.assert_array_equal(example.image, item["image"][0])
        assert (example.truth, example.boxes) == (None, None)
        assert [(view.model, view.attack, view.level) for view in example.views] == [
            (name, "pgd2" if level else "", level) for name in ("own", "other") for level in (0.0, 0.5, 1.5)
        ]
        for view in example.views:
            network = (model if view.model == "own" else other).module
            image = torch.from_numpy(view.image)[None, None]
            with torch.no_grad():
                maps = network(image)
            torch.testing.assert_close(torch.from_numpy(view.points), decode(maps, 2.4)[0][0], rtol=1e-3, atol=1e-2)
            error = network.errors(maps, model.read([index]))
            assert view.note.startswith("MRE ")
            assert view.note.endswith(" mm")
            assert float(view.note.split()[1]) == pytest.approx(float(error.nanmean()), abs=0.02)
            away = np.linalg.norm(view.image - example.image)
            assert away <= view.level * (1 + 1e-5)
            assert away > 0.7 * view.level or view.level == 0
            assert -1 <= view.image.min() <= view.image.max() <= 1
    assert host.make_examples([model], attack, [0.5], []) == []


def test_examples_begin_where_the_seed_says(model: host.TrainedModel) -> None:
    attack = ("pgd1", parse_attacks(["pgd1"])["pgd1"])
    images = [host.make_examples([model], attack, [1.0], ["val2.png"], seed=s)[0].views[1].image for s in (0, 0, 1)]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() > 1e-3


def test_a_picture_is_grey_or_colour() -> None:
    assert host.picture(torch.zeros(2, 1, 4, 5)).shape == (4, 5)
    colour = torch.rand(2, 3, 4, 5)
    np.testing.assert_array_equal(host.picture(colour)[2, 3], colour[0, :, 2, 3])


def test_models_on_other_samples_are_not_compared(model: host.TrainedModel, tmp_path: Path) -> None:
    subjects = [Subject(name, model.path, host.make_batches(model, limit)) for name, limit in (("a", None), ("b", 2))]
    given = {"examples": lambda *_: [], "fingerprint": {}, "title": "", "level_unit": ""}
    with pytest.raises(ValueError, match="b and a cannot be compared: their samples differ"):
        compare(tmp_path, subjects, parse_attacks(["pgd1"]), LEVELS, host.metrics("mm", [2]), **given)
    assert not list(tmp_path.iterdir())
