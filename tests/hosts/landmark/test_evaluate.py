"""What an evaluation of landmarks measures: radial errors against NumPy, and how they are shown."""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adv_landmark import evaluate as host_evaluate
from adv_landmark.data import BOUNDS, LandmarkTable
from adv_landmark.maps import decode
from advmed.attacks import PGD
from advmed.attacks.names import parse_attacks
from advmed.testing.lightning import Run, data_of
from helpers.ensemble import check_ensemble
from helpers.landmark import Landmark

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(host: Landmark) -> host_evaluate.TrainedModel:
    return host_evaluate.load_model("own", host.standard.last, host.read(batch_size=3), "val", CPU)


def errors() -> np.ndarray:
    """Of 5 images with 4 landmarks, some of them not known, one image without any."""
    error = np.random.default_rng(0).gamma(2.0, 1.5, (5, 4)).astype(np.float32)
    error[1, 2] = error[2, 0] = error[2, 3] = np.nan
    error[4] = np.nan
    error[0, 0], error[0, 1] = 2.0, 2.5  # a landmark at the radius itself is found
    return error


# Metrics


def test_metrics_are_those_of_their_definitions() -> None:
    given, radii = {"error": errors()}, (2, 2.5, 3, 4)
    known = [float(value) for value in given["error"].flatten() if not math.isnan(value)]
    assert len(known) == 13
    wanted = {"MRE": sum(known) / 13, "radial error SD": statistics.stdev(known)}
    wanted |= {f"SDR {radius:g} mm": sum(value <= radius for value in known) / 13 for radius in radii}
    metrics = host_evaluate.metrics("mm", radii)
    assert {metric.name: metric.of(given) for metric in metrics} == pytest.approx(wanted)
    assert 1 / 13 <= wanted["SDR 2 mm"] < wanted["SDR 2.5 mm"] < 1
    for metric in metrics:
        assert metric.higher_is_better == metric.name.startswith("SDR"), metric.name
        assert metric.unit == ("" if metric.name.startswith("SDR") else "mm")
        assert metric.scale is None  # where lower is better, the largest value of the report
        assert (metric.per_sample is not None) == (metric.name == "MRE")
    each = metrics[0].per_sample(given)  # of an image the mean of its known landmarks
    means = [np.mean([value for value in row if not math.isnan(value)] or [math.nan]) for row in errors()]
    np.testing.assert_allclose(each, means, rtol=1e-6)
    assert np.isnan(each).tolist() == [False] * 4 + [True]


def test_metrics_of_pixels_of_a_single_error_and_of_no_radii() -> None:
    metrics = host_evaluate.metrics("px", [3, 4])
    assert [metric.label for metric in metrics] == ["MRE (px)", "radial error SD (px)", "SDR 3 px", "SDR 4 px"]
    found = [metric.of({"error": np.array([[np.nan, 3.5]])}) for metric in metrics]
    assert (found[0], found[2:]) == (3.5, [0, 1])
    assert math.isnan(found[1])
    bare = host_evaluate.metrics("px", [])
    assert [(metric.name, metric.fails_at) for metric in bare] == [("MRE", None), ("radial error SD", None)]
    for radii in ([0, 1], [-1], [2, 1], [1, 1], [1, math.nan]):
        with pytest.raises(ValueError, match="the radii of SDR must be > 0 and increase, got"):
            host_evaluate.metrics("mm", radii)


def test_an_image_fails_where_its_mean_error_is_above_the_largest_radius() -> None:
    given = {"error": np.array([[4.0, 4.0], [4.1, np.nan], [0.1, 8.0], [np.nan, np.nan]])}
    (metric,) = [metric for metric in host_evaluate.metrics("mm", [2, 4]) if metric.fails_at is not None]
    assert (metric.name, metric.failure) == ("MRE", "MRE above 4 mm")
    np.testing.assert_array_equal(metric.failed(given), [0, 1, 1, np.nan])


# Models


@pytest.mark.slow
def test_scores_are_of_the_network_on_the_images_that_are_attacked(model: host_evaluate.TrainedModel) -> None:
    """By the attack on the objective of the training; the model does not learn."""
    assert not any(part.training for part in model.module.modules())
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    loaded, read = host_evaluate.load(model, [3, 1]), model.read([3, 1])
    objective = loaded.objective
    assert objective.names == ("heatmap", "offset_y", "offset_x")
    assert (objective.heatmap, objective.heatmap_weight) == ("dice", 0.5)
    assert objective.targets.disk.sum((2, 3))[0] == pytest.approx(math.pi * 2.4**2, abs=4)
    assert objective.targets.present.tolist() == [[True, True, True], [False, True, False]]
    images = PGD(2, 1.0)(objective, loaded.images, 1.0, bounds=BOUNDS).images
    found = loaded.score(images)["error"]
    torch.testing.assert_close(found, model.module.errors(model.module(images), read), equal_nan=True)
    assert found.isnan().tolist() == [[False] * 3, [True, False, True]]
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())


@pytest.mark.slow
def test_the_unit_is_that_of_the_data_and_not_of_the_training(host: Landmark) -> None:
    error = []
    table = host.folder / "images" / "split.csv"
    rows = [line.rsplit(",", 2)[0] for line in table.read_text().splitlines()]  # without the columns of the spacing
    (table.parent / "bare.csv").write_text("\n".join(rows))
    for options in ({"unit": "px"}, {"spacing": 2, "split_table": "bare.csv"}):
        found = host_evaluate.load_model("own", host.standard.last, host.read(**options), "val", CPU)
        error.append(host_evaluate.load(found, [0]).score(found.read([0])["image"])["error"])
        assert found.module.unit == ("px" if "unit" in options else "mm")
    torch.testing.assert_close(2 * error[0], error[1])


@pytest.mark.slow
def test_examples_show_true_and_found_landmarks_of_every_model(
    host: Landmark, model: host_evaluate.TrainedModel
) -> None:
    data: LandmarkTable = host.read()
    other = host_evaluate.load_model("other", host.adaptive.last, data, "val", CPU)
    attack = ("pgd2", parse_attacks(["pgd2"])["pgd2"])

    def make(models: list[Any], ids: list[str], seed: int = 0) -> Any:
        return host_evaluate.make_examples(models, attack, [0.5, 1.5], ids, seed=seed)

    examples = make([model, other], ["val3.png", "val0.png"])
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
            with torch.no_grad():
                maps = network(torch.from_numpy(view.image)[None, None])
            torch.testing.assert_close(torch.from_numpy(view.points), decode(maps, 2.4)[0][0], rtol=1e-3, atol=1e-2)
            error = float(network.errors(maps, model.read([index])).nanmean())
            assert re.fullmatch(r"MRE [\d.]+ mm", view.note)
            assert float(view.note.split()[1]) == pytest.approx(error, abs=0.02)
            away = np.linalg.norm(view.image - example.image)
            assert away <= view.level * (1 + 1e-5)
            assert away > 0.7 * view.level or view.level == 0
            assert -1 <= view.image.min() <= view.image.max() <= 1
    assert make([model], []) == []
    images = [make([model], ["val2.png"], seed)[0].views[1].image for seed in (0, 0, 1)]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() > 1e-3


# The report


@pytest.mark.slow
def test_the_report(host: Landmark, audit: Any) -> None:
    """What the page says, and the errors of every landmark."""
    folder = Run(host.report / "L2")
    page = (folder.folder / "report.html").read_text()
    shown = ["MRE (mm)", "radial error SD (mm)", "SDR 2 mm", "SDR 5.5 mm", "3: corner, dot, end", "true landmark"]
    shown += ["found landmark, with a line to the true one", "median"]  # of the margins
    shown += ["Mean radial error: the mean distance of found and true landmarks; unknown ones are left out."]
    shown += ["L2 norm of the noise over the image in [-1, 1] (1 x 32 x 48 values)"]
    assert [text for text in shown if text not in page] == []
    others = ("Grad-CAM", "white line: outline of the truth", "(whole groups of them)")
    assert [text for text in others if text in page] == []
    record = audit(folder.folder, "MRE", fails_at=5.5, checked=3, shown=2)
    assert record["failures"]["criterion"] == "MRE above 5.5 mm"
    assert len(set(record["failures"]["smallest_level"]["plain"].values())) > 1
    assert list(record["results"]) == ["MRE", "radial error SD", "SDR 2 mm", "SDR 5.5 mm"]

    rows, columns = folder.table("samples.csv"), ["MRE", "error[0]", "error[1]", "error[2]"]
    assert list(rows[0]) == ["model", "id", "attack", "level", "norm", "loss", "nonfinite", *columns]
    model, batch = host.module.from_checkpoint(host.standard.last), host.batch("val")
    for image, wanted in zip(batch["id"], host.errors(model, batch["image"], batch["id"]), strict=True):
        (row,) = [r for r in rows if (r["model"], r["id"], r["attack"]) == ("plain", image, "clean")]
        found = [float(row[column] or "nan") for column in columns]
        np.testing.assert_allclose(found, [np.nanmean(wanted), *wanted], rtol=2e-3, atol=1e-3)
    assert [row["error[0]"] == row["error[2]"] == "" for row in rows] == [row["id"] == "val1.png" for row in rows]

    attacks = record["results"]["MRE"]["models"]["plain"]["attacks"]
    assert attacks["gaussian"]["values"][-1] < attacks["pgd2"]["values"][-1]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_radii_and_the_unit_are_the_users(host: Landmark) -> None:
    """Another unit is another report, of which the finished batches know nothing."""
    words = ["evaluate", host.standard.last, "--attacks", "[pgd1]", "--levels", "[0,1]", "--samples", 1]
    words += ["--examples", 0, "--checks", 0, "--out", "own"]
    host.ok(*words)
    pixels = data_of(host.standard, unit="px")
    assert "(it differs in metrics" in host.fails(*words, *pixels)
    text = host.ok(*words, *pixels, "--overwrite", "true")
    assert "SDR 2.5 px" in text
    assert " mm" not in text
    assert "the radii of SDR must be > 0 and increase, got [" in host.fails(*words, "--radii", "[2,1]")


def alike(one: str, two: str) -> None:
    """The same text, its numbers equal to a relative 1e-4."""
    number = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])")
    assert number.sub("#", one) == number.sub("#", two)
    found, wanted = ([float(text) for text in number.findall(part)] for part in (one, two))
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(host: Landmark, tmp_path: Path) -> None:
    """Under torchrun, each with every second batch of one image; the attack is checked, too."""
    words = ["evaluate", host.standard.last, *data_of(host.standard, batch_size=1), "--attacks", "[pgd2,square5]"]
    words += ["--radii", "[3]", "--levels", "[0,0.7]", "--examples", 1, "--samples", 3, "--checks", 9]
    words += ["--device", "cpu", "--out"]
    host.ok(*words, tmp_path / "one")
    scripts = Path(sys.executable).parent
    command = [scripts / "torchrun", "--nproc-per-node", 2, "--no-python", scripts / "adv-landmark", *words]
    command = [str(word) for word in (*command, tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Report: ") == 1
    one, two = (tmp_path / name / "L2" for name in ("one", "two"))
    # Bit for bit only on some processors: two processes may choose other kernels, which differ in the seventh digit.
    for name in ("samples.csv", "results.csv"):
        alike((one / name).read_text(), (two / name).read_text())
    assert len(list((two / "standard" / "parts").iterdir())) == 3
    assert len(list((two / "standard").glob("checks_9_0.7/parts/*"))) == 3, "no more are checked than are evaluated"


def test_the_ensemble_is_the_worst_of_its_members(model: host_evaluate.TrainedModel) -> None:
    metrics = host_evaluate.metrics("mm", [1, 2])
    found = check_ensemble("landmarks", host_evaluate.make_batches(model, 5), metrics, (0, 0.5, 1), BOUNDS)
    assert found.curve("standard", metrics[0])[1] > found.curve("standard", metrics[0])[0]
