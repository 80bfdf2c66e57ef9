"""Evaluation against the host's own validator and closed forms, and what is left of one that was interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.tasks import DetectionModel, yaml_model_load
from ultralytics.utils import nms

from adv_yolo import evaluate as host
from adv_yolo.cli import main
from adv_yolo.scores import best_overlaps, detected, score
from advmed.attacks import PGD
from advmed.evaluation.loop import evaluate
from helpers.detection import CLASSES, ONE_HEAD, save
from helpers.ensemble import check_ensemble

pytestmark = pytest.mark.slow

QUICK = {"pgd2": PGD(2, 2.0, keep="best")}


def load(path: Path, data: Any, folder: Path, **arguments: Any) -> host.TrainedModel:
    given = {"imgsz": 96, "batch": 2, "split": "val", "workers": 0, **arguments}
    info = check_det_dataset(str(data.yaml))
    return host.load_model("m", path, info, given, torch.device("cpu"), folder)


def measure(model: host.TrainedModel, folder: Path, **more: Any) -> Any:
    how = {"bounds": (0.0, 1.0), "seed": 0, "folder": folder, "fingerprint": "x", **more}
    return evaluate(host.make_batches(model, None), QUICK, (0.0, 1.0), **how)


def host_metrics(path: Path, data: Any, folder: Path, **arguments: Any) -> tuple[float, float]:
    given = {"imgsz": 96, "batch": 2, "workers": 0, "device": "cpu", "plots": False, "verbose": False, **arguments}
    found = YOLO(str(path)).val(data=str(data.yaml), rect=False, project=str(folder), **given)
    return found.box.map, found.box.map50


@pytest.mark.parametrize("arguments", [{}, {"conf": 0.1}, {"iou": 0.3, "max_det": 5}, {"batch": 3}, {"empty": True}])
def test_level_zero_is_what_the_host_measures(
    trained: Path, make_data: Any, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    """An image without objects counts for its precision only."""
    own, given = make_data(), dict(arguments)
    if given.pop("empty", False):
        own.write_labels(own.names("val")[2], [])
    model = load(trained, own, tmp_path, **given)
    result = measure(model, tmp_path)
    scores = result.scores("pgd2", 0.0)
    found = host.mean_average_precision(scores, model.network.names)
    wanted = host_metrics(trained, own, tmp_path, **given)
    assert wanted[0] > 0.1
    assert found == pytest.approx(wanted, abs=1e-4)
    assert scores["truth"].sum(1).tolist() == [len(own.labels(name)) for name in own.names("val")]
    np.testing.assert_array_equal(np.isnan(host.image_iou(scores)), scores["truth"].sum(1) == 0)
    attacked = host.mean_average_precision(result.scores("pgd2", 1.0), model.network.names)
    assert attacked[0] < 0.9 * found[0]


@pytest.mark.parametrize("arguments", [{}, {"nms": False}])
def test_a_slow_machine_finds_what_a_fast_one_finds(
    networks: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, bool]
) -> None:
    """The host's suppression gives up after some seconds."""
    network = networks("yolo26n")
    model = load(save(network, tmp_path / "two.pt"), data, tmp_path, imgsz=64, **arguments)
    batch = host.read(model, range(4))
    with torch.no_grad():
        predictions = model.network(batch["img"])
        monkeypatch.setattr(nms, "time", SimpleNamespace(time=lambda: 0))
        wanted = model.validator.postprocess(predictions)  # of the host, for all of them at once
        clock = iter(range(0, 10**6, 100))
        monkeypatch.setattr(nms, "time", SimpleNamespace(time=lambda: next(clock)))
        found = detected(model.validator, predictions)
        scores = score(model.network, model.validator, batch, batch["img"])
    assert all(len(image["conf"]) > 0 for image in wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert scores["number"].tolist() == [len(image["conf"]) for image in wanted]


@pytest.mark.parametrize("arguments", [{}, {"nms": False}])
def test_the_head_that_predicts_is_the_hosts(
    networks: Any, data: Any, tmp_path: Path, arguments: dict[str, bool]
) -> None:
    """A model with two heads: what is measured and attacked is the one that the host's validator would ask."""
    path, given = save(networks("yolo26n"), tmp_path / "two.pt"), {"imgsz": 64, **arguments}
    model = load(path, data, tmp_path, **given)
    assert model.network.end2end is bool(arguments)
    batch = host.make_batches(model, None)[0].load()
    assert batch.objective.terms.branch == ("one2one" if arguments else "one2many")
    found = host.mean_average_precision(measure(model, tmp_path).scores("pgd2", 0.0), model.network.names)
    assert found == pytest.approx(host_metrics(path, data, tmp_path, **given), abs=1e-4)


def boxes(*rows: tuple[float, ...]) -> dict[str, torch.Tensor]:
    table = torch.tensor(rows).reshape(-1, 6)
    return {"bboxes": table[:, :4], "cls": table[:, 4], "conf": table[:, 5]}


@pytest.mark.parametrize(
    ("detections", "best"),
    [
        ([], [0, 0]),
        ([(0, 0, 10, 10, 1, 0.9)], [1, 0]),
        ([(0, 0, 10, 5, 1, 0.9), (0, 0, 10, 8, 1, 0.3)], [0.8, 0]),
        ([(0, 0, 10, 10, 0, 0.9)], [0, 0]),  # of another class
        ([(0, 0, 10, 10, 1, 0.24)], [0, 0]),  # not sure enough
        ([(0, 0, 10, 10, 1, 0.25)], [1, 0]),
        ([(5, 0, 15, 10, 1, 0.9)], [1 / 3, 0]),
        ([(25, 25, 35, 35, 2, 0.9), (0, 0, 10, 10, 1, 0.9)], [1, 25 / 175]),
        ([(50, 50, 60, 60, 1, 0.9)], [0, 0]),
    ],
)
def test_the_best_overlap_of_every_object(detections: list[tuple[float, ...]], best: list[float]) -> None:
    objects = {"bboxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), "cls": torch.tensor([1.0, 2.0])}
    assert best_overlaps(objects, boxes(*detections)).tolist() == pytest.approx(best)
    none = {"bboxes": torch.zeros(0, 4), "cls": torch.zeros(0)}
    assert best_overlaps(none, boxes(*detections)).tolist() == []


def test_the_average_iou_is_over_objects_and_an_image_without_any_has_none() -> None:
    scores = {"iou": np.array([1.5, 0.0, 0.0, 0.25]), "truth": np.array([[2, 1], [0, 0], [4, 0], [0, 1]])}
    assert host.average_iou(scores) == pytest.approx(1.75 / 8)
    np.testing.assert_allclose(host.image_iou(scores), [0.5, np.nan, 0.0, 0.25])
    (metric,) = [metric for metric in host.metrics({0: "a", 1: "b"}) if metric.fails_at is not None]
    assert (metric.name, metric.failure) == ("IoU", "IoU below 0.5")
    np.testing.assert_array_equal(metric.failed(scores), [0, np.nan, 1, 1])


def test_a_limit_takes_images_at_even_distances(trained: Path, data: Any, tmp_path: Path) -> None:
    model = load(trained, data, tmp_path)

    def chosen(folder: Path | None, *limits: Any) -> list[str]:
        return [id_ for batch in host.make_batches(model, folder, *limits) for id_ in batch.ids]

    a, b, c, d = chosen(None)
    assert chosen(None, 2) == [a, d]
    assert [len(batch.ids) for batch in host.make_batches(model, None, 3)] == [2, 1]
    # Of the images that are evaluated, some are checked.
    assert [chosen(None, 3, 2), chosen(None, 2, 32), chosen(None, None, 32)] == [[a, d], [a, d], [a, b, c, d]]
    assert chosen(data.folder) == data.ids("val")


def test_what_cannot_be_evaluated_is_said(trained: Path, networks: Any, make_data: Any, tmp_path: Path) -> None:
    own = make_data()
    with pytest.raises(FileNotFoundError, match=r"there is no model .*nothing.pt"):
        load(tmp_path / "nothing.pt", own, tmp_path)
    with pytest.raises(ValueError, match="no split 'test'; there are train, val"):
        load(trained, own, tmp_path, split="test")
    names = own.names("val")
    own.list("val", [*names, names[0]])
    with pytest.raises(ValueError, match=rf"names 1 image\(s\) more than once, such as .*{names[0]}"):
        load(trained, own, tmp_path)
    own.list("val", names)
    for name in own.names("val"):
        own.write_labels(name, [])
    with pytest.raises(ValueError, match="none of the 4 images of the split 'val' has an object"):
        load(trained, own, tmp_path)
    own.describe([*CLASSES, "another"])
    with pytest.raises(ValueError, match=r"predicts 3 class\(es\) .* the data set has 4"):
        load(trained, own, tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_two_equal_models_says_whether_to_believe_it(
    trained: Path, make_data: Any, tmp_path: Path, audit: Any
) -> None:
    """With an image without objects, which can neither fail nor be shown as one that does."""
    own, out = make_data(), tmp_path / "out"
    own.write_labels(own.names("val")[3], [])
    other = shutil.copytree(trained.parents[1], tmp_path / "other") / "weights" / "best.pt"
    words = [f"model={trained},{other}", f"data={own.yaml}", "levels=0,0.5,2", "attacks=pgd2", "batch=2"]
    words += [f"out={out}", "examples=4", "checks=3", "names=STD,AMAT", "device=cpu"]
    assert main(["evaluate", *words]) == 0
    page = (out / "report.html").read_text()
    for text in ("STD", "AMAT", "mAP50-95", "mAP50", "IoU", "AUC", "RBC", "boxes, IoU", "pgd2"):
        assert text in page, text
    assert str(trained.parent) not in page
    record = audit(out, "IoU", fails_at=0.5, checked=3, shown=4)
    for name, wanted in zip(("mAP50-95", "mAP50"), host_metrics(trained, own, tmp_path), strict=True):
        assert record["results"][name]["models"]["STD"]["clean"] == pytest.approx(wanted, abs=1e-4)
    empty, levels = own.ids("val")[3], record["failures"]["smallest_level"]["STD"]
    assert record["failures"]["criterion"] == "IoU below 0.5"
    assert len(levels) == 4
    assert levels[empty] is None
    assert any(level is not None for level in levels.values()), "an evaluation in which nothing fails tests nothing"
    assert f"{empty}: the clean input" not in page
    assert page.count(": the clean input") == 3
    parts = sorted((out / "STD" / "parts").iterdir())
    assert len(parts) == 2
    for first in parts:
        one, two = (np.load(path, allow_pickle=False) for path in (first, out / "AMAT" / "parts" / first.name))
        for name in (n for n in one.files if one[n].dtype.kind in "bif" and not n.endswith("seconds")):
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_than_three_channels_have_pictures(make_data: Any, tmp_path: Path, channels: int) -> None:
    own = make_data()
    for name in own.names("val"):
        path = own.folder / f"images/{name}.jpg"
        picture = cv2.imread(str(path))
        path.write_bytes(cv2.imencode(".png", np.dstack([picture, picture[..., 0]])[..., :channels])[1].tobytes())
    own.yaml.write_text(own.yaml.read_text() + f"channels: {channels}\n")
    model = DetectionModel({**yaml_model_load(ONE_HEAD), "channels": channels}, ch=channels, nc=3, verbose=False)
    path = save(model, tmp_path / "run" / "weights" / "best.pt")
    words = ["levels=0,1", "attacks=pgd1", "checks=0", "examples=1", f"out={tmp_path / 'out'}", "device=cpu"]
    assert main(["evaluate", f"model={path}", f"data={own.yaml}", *words]) == 0
    assert "boxes, IoU" in (tmp_path / "out" / "report.html").read_text()


def test_a_size_that_is_no_multiple_of_the_stride_is_rounded_as_the_host_rounds_it(
    trained: Path, data: Any, tmp_path: Path
) -> None:
    model = load(trained, data, tmp_path, imgsz=70)
    assert host.make_batches(model, None)[0].load().images.shape[2:] == (96, 96)


def test_margins_beside_a_checkpoint_are_read(trained: Path, data: Any, tmp_path: Path) -> None:
    path = shutil.copytree(trained.parents[1], tmp_path / "run") / "weights" / "best.pt"
    assert load(path, data, tmp_path).margins is None
    for rows, margins in (('"a, #1.jpg",1.5,2\nb.jpg,2.5,2\n', [1.5, 2.5]), ("a.jpg,1.5,2\n", [1.5])):
        (tmp_path / "run" / "margins.csv").write_text(f"id,margin,visits\n{rows}")
        assert load(path, data, tmp_path).margins.tolist() == margins


def test_the_ensemble_is_the_worst_of_its_members(trained: Path, data: Any, tmp_path: Path) -> None:
    model = load(trained, data, tmp_path)
    metrics = host.metrics(model.network.names)
    found = check_ensemble("detection", host.make_batches(model, None), metrics, (0, 1, 2), (0.0, 1.0))
    assert found.curve("standard", metrics[1])[2] < 0.9 * found.curve("standard", metrics[1])[0]
