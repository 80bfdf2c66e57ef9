"""``adv-landmark`` in this process: every command, and every mistake as one clear message."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import default_collate

from adv_landmark import evaluate as host
from adv_landmark.cli import main
from adv_landmark.data import LandmarkTable
from adv_landmark.module import RobustLandmarks
from advmed.evaluation.auc import auc_robust
from advmed.integrations.lightning import cli
from advmed.thresholds import Thresholds

QUICK = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, and returns what it prints."""

    def started(*words: Any) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return started


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def data_of(run: Path, **changes: Any) -> list[str]:
    """The data section of a run's configuration, as a file."""
    content = {"data": yaml.safe_load((run / "config.yaml").read_text())["data"]}
    content["data"]["init_args"].update(changes)
    Path("data.yaml").write_text(yaml.safe_dump(content))
    return ["--config", "data.yaml"]


def table_of(root: Path, **options: Any) -> list[str]:
    given = {"root": root, "size": [32, 48], "workers": 0, **options}
    return ["--data", "LandmarkTable", *(str(w) for k, v in given.items() for w in (f"--data.{k}", v))]


# Training


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no such option": ({"model__method__epz": 1}, ["unrecognized arguments: --model.method.epz 1"]),
    "no such option of the data": (
        {"data__colour": 1},
        ["adv_landmark.data.LandmarkTable", "'colour' is not accepted"],
    ),
    "no number": ({"model__method__eps": "high"}, ['"model.method.eps"', "Got value: high"]),
    "no such method": ({"model__method__name": "FREE"}, ['"model.method.name"', "'DPAAT'", "Got value: FREE"]),
    "no such norm": ({"model__attack__norm": 1}, ["norm must be 2 or inf (L2 or Linf), got 1.0"]),
    "negative noise": ({"model__method__eps": -1}, ["eps must be a finite number >= 0, got -1.0"]),
    "no such heatmap": ({"model__heatmap": "gauss"}, ['"model.heatmap"', "Got value: gauss"]),
    "no such encoder": (
        {"model__network__encoder": "resnet81"},
        ["there is no encoder 'resnet81'; near names are", "resnet18"],
    ),
    "nothing like an encoder": (
        {"model__network__encoder": "qqqq"},
        ["there is no encoder 'qqqq'; see smp.encoders.get_encoder_names()"],
    ),
    "no such weights": ({"model__network__weights": "none.pth"}, ["there is no file of weights none.pth"]),
    "no such folder": ({"data__root": "none"}, ["there is no table none/landmarks.csv"]),
    "no such data": (
        {"data": "Pictures", "data__root": None, "data__size": None, "data__batch_size": None, "data__workers": None},
        ["Pictures"],
    ),
    "large radius": (
        {"model__radius": 16},
        ["the radius of a landmark, 16 pixels, must be at least 1 and fit into", "resized to 32 x 48: choose another"],
    ),
    "small radius": ({"model__radius": 0.5}, ["the radius of a landmark, 0.5 pixels, must be at least 1"]),
    "radius of small images": ({"data__size": "[16,16]"}, ["the radius of a landmark, 0.8 pixels, must be at least 1"]),
    "batch size": ({"data__batch_size": 0}, ["batch_size must be >= 1, got 0"]),
    "rotation": ({"data__rotate": 200}, ["rotate must be between 0 and 180, got 200"]),
    "size": ({"data__size": "[0,16]"}, ["size must be >= 1, got (0, 16)"]),
    "channels": ({"data__channels": 2}, ["channels must be 1 or 3, got 2"]),
    "origin": ({"data__origin": "edge"}, ["origin", "edge"]),
    "spacing": ({"data__spacing": 0}, ["spacing must be mm per pixel, > 0", "got 0"]),
    "no such configuration": ({"config": "none.yaml"}, ["none.yaml"]),
    "no such device": ({"trainer__accelerator": "tpu"}, []),
    "landmarks of the user's": ({"model__landmark_names": "[a]"}, ["landmark_names"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_before_anything_is_trained(root: Path, tools: Any, fails: Any, name: str) -> None:
    changes, parts = WRONG[name]
    message = fails("fit", *tools.arguments(root, Path("runs"), **changes))
    for part in parts:
        assert part in message
    assert message.count("\n") <= 2
    assert not list(Path().rglob("*.ckpt"))
    assert not list(Path().rglob("metrics.csv"))


def test_errors_in_mm_need_a_spacing(tmp_path: Path, tools: Any, fails: Any) -> None:
    root = tools.write_table(tmp_path / "own", spacing=None)
    message = fails("fit", *tools.arguments(root, Path("runs"), data__unit="mm"))
    assert message.endswith("errors in mm need the pixel spacing: set spacing, mm per pixel, or take unit px")
    assert message.count("\n") == 0
    run = tools.fit(root, Path("runs"))
    names = tools.table(run / "metrics.csv")[0].keys()
    assert "val/MRE" in names
    assert not [name for name in names if "SDR" in name]
    assert RobustLandmarks.from_checkpoint(last(run)).unit == "px"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"method": {"epz": 1}}}, "model.method.epz"),
        ({"model": {"methods": {"eps": 1}}}, "model.methods"),
        ({"model": {"network": {"encoders": "vgg19"}}}, "model.network.encoders"),
        ({"trainer": {"epochs": 3}}, "trainer.epochs"),
        ({"data": {"class_path": "LandmarkTable", "init_args": {"path": "x"}}}, "'path'"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_unknown_keys_of_a_configuration(
    root: Path, tools: Any, fails: Any, content: dict[str, Any], message: str
) -> None:
    Path("own.yaml").write_text(yaml.safe_dump(content))
    words = tools.arguments(root, Path("runs"))
    if "data" in content:
        words = [w for pair in zip(words[::2], words[1::2], strict=True) if "data" not in pair[0] for w in pair]
    told = fails("fit", "--config", "own.yaml", *words)
    assert message in told
    assert told.count("\n") <= 1
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize("words", [["train"], [], ["fit"], ["evaluate"], ["thresholds"]])
def test_commands_that_are_none(fails: Any, words: list[str]) -> None:
    message = fails(*words)
    assert message.count("\n") == 0
    assert any(part in message for part in ("invalid choice: 'train'", "required", "expected"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_whoever_reads_it(tmp_path: Path, tools: Any, fails: Any, workers: int) -> None:
    root = tools.write_table(tmp_path / "own")
    path = root / "images" / "train3.png"
    path.write_bytes(path.read_bytes()[:-400])
    message = fails("fit", *tools.arguments(root, Path("runs"), data__workers=workers))
    assert "images/train3.png cannot be read as an image" in message
    assert "\n" not in message


def test_a_traceback_for_those_who_look_for_it(root: Path, tools: Any) -> None:
    with pytest.raises(ValueError, match="there is no encoder 'nothing'"):
        main(["--debug", "fit", *tools.arguments(root, Path("runs"), model__network__encoder="nothing")])


def test_what_is_nobodys_mistake_is_not_hidden(root: Path, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(RobustLandmarks, "configure_optimizers", bug)
    with pytest.raises(KeyError, match="a bug"):
        main(["fit", *tools.arguments(root, Path("runs"))])


def test_a_run_is_run_again_by_its_own_configuration(adaptive: Path, tmp_path: Path, tools: Any) -> None:
    assert main(["fit", "--config", str(adaptive / "config.yaml"), "--trainer.default_root_dir", "again"]) == 0
    other = tools.runs(tmp_path / "again")[-1]
    assert (other / "margins.csv").read_text() == (adaptive / "margins.csv").read_text()
    first, second = tools.weights(adaptive), tools.weights(other)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_colour_images_at_their_own_size_train_as_well(tmp_path: Path, tools: Any) -> None:
    root = tools.write_table(tmp_path / "own", mode="RGB")
    changes = {"data__size": None, "data__channels": None, "model__method__name": "DPAAT"}
    run = tools.fit(root, Path("runs"), **changes, model__network__encoder="resnet18", model__attack__steps=1)
    model = RobustLandmarks.from_checkpoint(last(run))
    assert (model.hparams["channels"], model.size) == (3, (40, 48))
    assert yaml.safe_load((run / "adversarial.yaml").read_text())["eps"] == round((3 * 40 * 48 / 96000) ** 0.5, 5)
    assert model(torch.zeros(1, 3, 40, 48)).shape == (1, 9, 40, 48)


# Validation, test and prediction


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_a_checkpoint_is_validated_and_tested(
    adaptive: Path, root: Path, tmp_path: Path, run: Any, tools: Any, command: str, split: str
) -> None:
    """With the network of the checkpoint, whose encoder is not the default one."""
    run(command, *table_of(root), *QUICK, "--ckpt_path", last(adaptive), "--trainer.default_root_dir", tmp_path)
    found = tools.runs(tmp_path)[-1]
    model = RobustLandmarks.from_checkpoint(last(adaptive))
    batch = default_collate(list(LandmarkTable(str(root), size=(32, 48), workers=0).dataset(split)))
    with torch.no_grad():
        error = model.errors(model(batch["image"]), batch)
    assert tools.logged(found, f"{split}/MRE") == pytest.approx([float(error.nanmean())], rel=1e-4)
    if split == "val":
        text = run(command, "--config", adaptive / "config.yaml", *QUICK, "--ckpt_path", last(adaptive))
        assert f"{float(error.nanmean()):.4f}"[:6] in text


def test_predictions_are_those_of_the_network(standard: Path, root: Path, tmp_path: Path, run: Any, tools: Any) -> None:
    words = [*table_of(root, batch_size=2), *QUICK, "--ckpt_path", last(standard)]
    text = run("predict", *words, "--trainer.default_root_dir", tmp_path)
    (folder,) = tools.runs(tmp_path)
    assert f"Predictions: {folder / 'predictions.csv'}" in text
    rows = tools.table(folder / "predictions.csv")
    assert [(row["image"], row["landmark_index"]) for row in rows] == [
        (f"test{i}.png", name) for i in range(3) for name in tools.NAMES
    ]
    found = np.array([[float(row["x"]), float(row["y"])] for row in rows]).reshape(3, 3, 2)
    wanted = np.stack([tools.truth(root, f"test{i}.png") for i in range(3)])
    assert np.median(np.linalg.norm(found - wanted, axis=2)) < 3  # pixels of the file
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)
    assert sorted(p.name for p in (folder / "overlays").iterdir()) == [f"test{i}.png.png" for i in range(3)]


def test_new_images_without_landmarks_are_predicted(
    standard: Path, root: Path, tmp_path: Path, run: Any, tools: Any
) -> None:
    """Of another size, some in a folder of their own."""
    (tmp_path / "new" / "second").mkdir(parents=True)
    for name in ("test1.png", "second/test2.png"):
        whole = Image.open(root / "images" / Path(name).name)
        whole.resize((96, 80), Image.Resampling.NEAREST).save(tmp_path / "new" / name)
    words = ["--data", "Images", "--data.root", tmp_path / "new", "--data.landmarks", f"[{','.join(tools.NAMES)}]"]
    words += ["--data.size", "[32,48]", "--data.workers", 0, *QUICK, "--ckpt_path", last(standard)]
    run("predict", *words, "--trainer.default_root_dir", tmp_path / "images")
    run("predict", *table_of(root), *QUICK, "--ckpt_path", last(standard), "--trainer.default_root_dir", tmp_path)
    (own,), (usual,) = tools.runs(tmp_path / "images"), tools.runs(tmp_path)
    rows = tools.table(own / "predictions.csv")
    assert [row["image"] for row in rows] == ["second/test2.png"] * 3 + ["test1.png"] * 3
    old = {(row["image"], row["landmark_index"]): row for row in tools.table(usual / "predictions.csv")}
    for row in rows:
        same = old[Path(row["image"]).name, row["landmark_index"]]
        for axis in "xy":  # the image's edges stay its edges
            assert float(row[axis]) == pytest.approx(2 * float(same[axis]) + 0.5, abs=1.5)
    overlays = {path.relative_to(own / "overlays").as_posix() for path in (own / "overlays").rglob("*.png")}
    assert overlays == {"second/test2.png.png", "test1.png.png"}


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_untrained_network_is_not_judged(root: Path, fails: Any, command: str) -> None:
    encoder = ["--model.network.encoder", "tu-test_efficientnet"]
    message = fails(command, *table_of(root), *QUICK, *encoder)
    assert message.endswith(f"{command} needs a trained network: name its checkpoint with --ckpt_path")
    missing = fails(command, *table_of(root), *QUICK, *encoder, "--ckpt_path", "none.ckpt")
    assert "none.ckpt" in missing
    assert missing.count("\n") == 0
    assert not list(Path().rglob("predictions.csv"))


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_of_other_landmarks_is_refused(
    standard: Path, tmp_path: Path, tools: Any, fails: Any, command: str
) -> None:
    two = tools.write_table(tmp_path / "two", names=("dot", "end"))
    message = fails(command, *table_of(two), *QUICK, "--ckpt_path", last(standard))
    assert "for 3 landmarks (corner, dot, end), 1 channel(s), radius 2.4, and cannot be loaded into" in message
    assert message.endswith("for 2 landmarks (dot, end), 1 channel(s), radius 2.4")
    assert "\n" not in message


def test_a_checkpoint_is_validated_without_the_weights_it_began_with(
    standard: Path, root: Path, tmp_path: Path, tools: Any, run: Any
) -> None:
    weights = tmp_path / "begin.ckpt"
    weights.write_bytes(last(standard).read_bytes())
    folder = tools.fit(root, tmp_path / "own", model__network__weights=weights)
    weights.unlink()
    run("validate", *table_of(root), *QUICK, "--ckpt_path", last(folder))


# Thresholds


@pytest.mark.parametrize("heatmap", ["dice", "bce"])
def test_thresholds_are_written_beside_the_checkpoint(
    standard: Path, root: Path, run: Any, tmp_path: Path, tools: Any, heatmap: str
) -> None:
    """Two standard deviations above the mean, where the user does not say otherwise."""
    folder = standard if heatmap == "dice" else tools.fit(root, tmp_path / "bce", model__heatmap="bce")
    text = run("thresholds", last(folder))
    path = folder / "checkpoints" / "thresholds.json"
    assert f"Written to {path}" in text
    assert "8 clean images of the split train: heatmap < " in text
    found = Thresholds.load(path)
    path.unlink()
    model = RobustLandmarks.from_checkpoint(last(folder))
    terms = []
    for sample in LandmarkTable(str(root), size=(32, 48), workers=0).dataset("train"):
        image, points = sample["image"][None], sample["points"][None]
        with torch.no_grad():
            terms.append(model.objective_of(image, points)(image)[0].double().numpy())
    assert found.names == ("heatmap", "offset_y", "offset_x")
    assert (found.n, found.rule, found.source) == (8, "mean+2std", str(last(folder)))
    assert found.source_sha256 == hashlib.sha256(last(folder).read_bytes()).hexdigest()
    assert found.mean == pytest.approx(np.mean(terms, 0), rel=1e-3)
    assert found.std == pytest.approx(np.std(terms, 0), rel=1e-3)
    assert found.values == pytest.approx(np.mean(terms, 0) + 2 * np.std(terms, 0), rel=1e-3)


def test_thresholds_as_told(standard: Path, root: Path, run: Any) -> None:
    text = run(
        "thresholds", last(standard), "--split", "val", "--rule", "mean", "--out", "own.json", "--device", "cpu",
        *table_of(root),
    )  # fmt: skip
    assert "4 clean images of the split val" in text
    found = Thresholds.load("own.json")
    assert found.values == found.mean
    assert found.notes == {"split": "val"}
    run("thresholds", last(standard), *data_of(standard, batch_size=3), "--out", "other.json")
    assert Thresholds.load("other.json").n == 8
    with pytest.raises(FileNotFoundError):
        Thresholds.load(standard / "checkpoints" / "thresholds.json")


@pytest.mark.parametrize("command", ["thresholds", "evaluate"])
def test_mistakes_of_our_own_commands(standard: Path, tmp_path: Path, tools: Any, fails: Any, command: str) -> None:
    checkpoint = last(standard)
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(checkpoint.read_bytes())
    assert "name one with --config, or the data with --data" in fails(command, moved)
    assert "there is no configuration none.yaml" in fails(command, moved, "--config", "none.yaml")
    Path("empty.yaml").write_text("model: {}\n")
    assert fails(command, moved, "--config", "empty.yaml") == "empty.yaml has no data section"
    assert fails(command, "none.ckpt", *data_of(standard)) == "there is no checkpoint none.ckpt"
    assert "the data has no split 'training'" in fails(command, checkpoint, "--split", "training")
    two = tools.write_table(tmp_path / "two", names=("dot", "end"))
    message = fails(command, checkpoint, *data_of(standard, root=str(two)))
    assert message == f"{checkpoint} finds 3 landmarks (corner, dot, end), the data has 2 (dot, end)"
    assert fails(command, checkpoint, "--data.root", two) == fails(command, "--data.init_args.root", two, checkpoint)
    assert fails(command, checkpoint, f"--data.root={two}", "--split", "val") == message
    assert "'colour' is not accepted" in fails(command, checkpoint, "--data.colour", 1)
    colour = fails(command, checkpoint, *data_of(standard, channels=3))
    assert colour == f"{checkpoint} takes images of 1 channel(s), the data has 3"
    size = fails(command, checkpoint, *data_of(standard, size=[32, 64]))
    assert size == f"{checkpoint} was trained on images of (32, 48), the data's are resized to (32, 64)"
    other = tmp_path / "other.ckpt"
    torch.save({"epoch": 3}, other)
    assert fails(command, other, *data_of(standard)) == f"{other} is no checkpoint of adv-landmark"
    assert "unrecognized arguments: --rules" in fails(command, checkpoint, "--rules", "mean")
    assert not list(Path().rglob("*.json"))
    assert not list(Path().rglob("*.html"))


def test_a_rule_that_is_none(standard: Path, fails: Any) -> None:
    assert "must be 'mean' or 'mean+<number>std'" in fails("thresholds", last(standard), "--rule", "median")


# Evaluation


@pytest.fixture(scope="module")
def report(standard: Path, adaptive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models."""
    folder = tmp_path_factory.mktemp("report") / "own"
    words = ["evaluate", last(standard), last(adaptive), "--attacks", "[pgd2,ifgsm2]", "--levels", "[0,0.5,1.5]"]
    options = ["--examples", 3, "--checks", 3, "--out", folder, "--names", "[plain,own]", "--radii", "[2,5.5]"]
    assert main([str(word) for word in [*words, *options]]) == 0
    return folder / "L2"


def test_the_page_of_two_models(report: Path, tools: Any) -> None:
    page = (report / "report.html").read_text()
    for text in (
        "Robustness of plain, own in L2",
        "MRE (mm)",
        "radial error SD (mm)",
        "SDR 2 mm",
        "SDR 5.5 mm",
        "Mean radial error: the mean distance of found and true landmarks; unknown ones are left out.",
        "L2 norm of the noise over the image in [-1, 1] (1 x 32 x 48 values)",
        "val, 4 images",
        "3: corner, dot, end",
        "true landmark",
        "found landmark, with a line to the true one",
        "median",  # of the margins
    ):
        assert text in page, text
    assert "Grad-CAM" not in page
    assert "white line: outline of the truth" not in page
    assert not (report.parent / "Linf").exists()  # L2 alone where nobody asks


def test_the_report_says_whether_to_believe_it(report: Path, audit: Any) -> None:
    record = audit(report, "MRE", fails_at=5.5, checked=3, shown=3)
    assert record["failures"]["criterion"] == "MRE above 5.5 mm"
    assert len(set(record["failures"]["smallest_level"]["plain"].values())) > 1
    page = (report / "report.html").read_text()
    assert "(whole groups of them)" not in page
    table = record["results"]["MRE"]["models"]["plain"]["attacks"]
    assert table["gaussian"]["values"][-1] < table["pgd2"]["values"][-1]


def test_the_errors_of_every_image_are_in_the_table(
    report: Path, standard: Path, adaptive: Path, root: Path, tools: Any
) -> None:
    rows = tools.table(report / "samples.csv")
    columns = ["MRE", "error[0]", "error[1]", "error[2]"]
    assert list(rows[0]) == ["model", "id", "attack", "level", "norm", "loss", "nonfinite", *columns]
    assert len(rows) == 2 * 4 * 7  # clean, and two attacks and their control at two levels
    batch = default_collate(list(LandmarkTable(str(root), size=(32, 48), workers=0).dataset("val")))
    for name, folder in (("plain", standard), ("own", adaptive)):
        model = RobustLandmarks.from_checkpoint(last(folder))
        with torch.no_grad():
            error = model.errors(model(batch["image"]), batch).numpy()
        for image, wanted in zip(batch["id"], error, strict=True):
            (row,) = [r for r in rows if (r["model"], r["id"], r["attack"]) == (name, image, "clean")]
            found = [float(row[column] or "nan") for column in columns]
            np.testing.assert_allclose(found, [np.nanmean(wanted), *wanted], rtol=2e-3, atol=1e-3)
    assert [row["error[0]"] == row["error[2]"] == "" for row in rows] == [row["id"] == "val1.png" for row in rows]


def test_the_area_is_scaled_by_the_largest_error(report: Path) -> None:
    record = json.loads((report / "report.json").read_text())
    models = record["results"]["MRE"]["models"]
    curves = {(m, a): models[m]["attacks"][a]["values"] for m in ("plain", "own") for a in models[m]["attacks"]}
    largest = max(value for curve in curves.values() for value in curve)
    for (model, attack), curve in curves.items():
        area = (0.5 * (curve[0] + curve[1]) + 1.0 * (curve[1] + curve[2])) / 2 / 1.5
        wanted = (curve[0] * area) ** 0.5 / largest
        assert models[model]["attacks"][attack]["auc_robust"] == pytest.approx(wanted)
        assert wanted == pytest.approx(auc_robust((0, 0.5, 1.5), curve, higher_is_better=False, scale=largest))
    assert list(record["results"]) == ["MRE", "radial error SD", "SDR 2 mm", "SDR 5.5 mm"]
    assert record["margins"]["own"]["n"] == 8
    assert list(record["margins"]) == ["own"]
    assert json.loads(record["configuration"]["models"]["plain"])["split"] == "val"
    assert record["configuration"]["evaluation"]["bounds"] == [-1, 1]


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_of_some_images_as_told(
    standard: Path, run: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[Any]] = []
    monkeypatch.setattr(host, "make_examples", lambda _, attack, levels, ids, **how: drawn.append([ids, how]) or [])
    text = run(
        "evaluate", last(standard), "--attacks", "[pgd1]", "--norm", "[inf]", "--samples", 2, "--split", "test",
        "--levels_inf", "[0,0.1]", "--examples", 7, "--checks", 0, "--out", "own", "--device", "cpu", "--seed", 5,
        *data_of(standard, unit="px"),
    )  # fmt: skip
    ((shown, how),) = drawn
    assert sorted(shown) == ["test0.png", "test2.png"]
    assert how == {"seed": 5}
    assert "Whether the attacks are strong enough was not checked." in text
    assert not Path("own", "L2").exists()
    assert "AUC_robust" in text
    assert "SDR 2.5 px" in text
    assert " mm" not in text
    folder = Path("own", "Linf")
    assert f"Report: {folder / 'report.html'}" in text
    rows = tools.table(folder / "samples.csv")
    assert {row["id"] for row in rows} == {"test0.png", "test2.png"}
    assert (folder / standard.parents[1].name).is_dir()  # named by the run's folder
    error = {row["level"]: row["error[0]"] for row in rows if row["id"] == "test2.png"}
    assert float(error["0.1"]) != float(error["0"])


@pytest.mark.usefixtures("undrawn")
def test_levels_are_those_of_the_paper_for_every_value(standard: Path, run: Any, tools: Any) -> None:
    words = ["evaluate", last(standard), "--attacks", "[ifgsm1]", "--samples", 1, "--examples", 0, "--norm", "[2,inf]"]
    run(*words, "--checks", 0, "--out", "own")
    scale = (32 * 48 / (3 * 200 * 160)) ** 0.5
    for kind, wanted in (
        ("L2", [round(level * scale, 4) for level in (0, 0.5, 1, 2)]),
        ("Linf", [0, 1 / 255, 2 / 255, 4 / 255]),
    ):
        record = json.loads(Path("own", kind, "report.json").read_text())
        assert record["results"]["MRE"]["models"]["standard"]["attacks"]["ifgsm1"]["levels"] == pytest.approx(wanted)

    paper = SimpleNamespace(channels=3, size=(200, 160))
    evaluation = host.LandmarkEvaluation(SimpleNamespace(split="val"), {}, paper, torch.device("cpu"))
    assert evaluation.default_levels(2) == [0, 0.5, 1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attacks", "[pgd]"], "unknown attack 'pgd'"),
        (["--attacks", "[pgd1,pgd1]"], "attack 'pgd1' is given twice"),
        (["--attacks", "[]"], "one or more attacks"),
        (["--norm", "[1]"], "norm must be 2 or inf, got 1"),
        (["--norm", "[L2]"], "norm must be 2 or inf, got 'L2'"),
        (["--levels", "[0.5,1]"], "must be finite, start at 0"),
        (["--levels", "[0,2,1]"], "increase strictly"),
        (["--levels", "[0,a]"], "levels"),
        (["--norm", "[inf]", "--levels_inf", "[0,2,1]"], "increase strictly"),
        (["--radii", "[2,1]"], "the radii of SDR must be > 0 and increase, got [2.0, 1.0]"),
        (["--radii", "[2,2]"], "the radii of SDR must be > 0 and increase"),
        (["--radii", "[0,2]"], "the radii of SDR must be > 0 and increase"),
        (["--names", "[a,b]"], "1 checkpoints need 1 different names, got ['a', 'b']"),
        (["--samples", "many"], "samples"),
        (["--samples", "0"], "samples must be a whole number >= 1, got 0"),
        (["--examples", "-1"], "examples must be a whole number >= 0, got -1"),
        (["--examples", "1.5"], "examples"),
        (["--checks", "-1"], "checks must be a whole number >= 0, got -1"),
        (["--checks", "some"], "checks"),
    ],
)
def test_mistakes_of_an_evaluation(standard: Path, fails: Any, words: list[str], message: str) -> None:
    told = fails("evaluate", last(standard), "--samples", 2, *words)
    assert message in told
    assert told.count("\n") <= 1
    assert not list(Path().rglob("*.html"))
    assert not list(Path().rglob("*.npz"))


def test_two_runs_of_one_name_need_names(standard: Path, fails: Any) -> None:
    message = fails("evaluate", last(standard), last(standard))
    assert "2 checkpoints need 2 different names, got ['standard', 'standard']" in message
    assert "--names" in message
    assert "different names" in fails("evaluate", last(standard), last(standard), "--names", "[a,a]")


def test_a_split_without_landmarks_is_not_evaluated(standard: Path, root: Path, tools: Any, fails: Any) -> None:
    names = f"[{','.join(tools.NAMES)}]"
    words = ["--data", "Images", "--data.root", root / "images", "--data.landmarks", names, "--data.size", "[32,48]"]
    message = fails("evaluate", last(standard), *words, "--split", "test")
    assert message == "no image of the split test has a known landmark to compare with"


@pytest.mark.usefixtures("undrawn")
def test_a_killed_evaluation_goes_on(standard: Path, run: Any, fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["evaluate", last(standard), "--attacks", "[pgd2]", "--levels", "[0,0.4]", "--examples", 0, "--checks", 0]
    config = data_of(standard, batch_size=2)
    whole = run(*words, *config, "--out", "whole")
    loaded: list[list[int]] = []
    load = host.load

    def counted(model: Any, indices: Any) -> Any:
        loaded.append(list(indices))
        if len(loaded) == 2:
            raise RuntimeError("a power cut")
        return load(model, indices)

    monkeypatch.setattr(host, "load", counted)
    assert "a power cut" in fails(*words, *config, "--out", "cut")
    resumed = run(*words, *config, "--out", "cut")
    assert loaded == [[0, 1], [2, 3], [2, 3]]
    assert resumed.replace("cut", "whole") == whole
    assert run(*words, *config, "--out", "cut") == resumed
    assert len(loaded) == 3
    other = [*words[:5], "[0,0.5]", *words[6:], *config, "--out", "cut"]
    assert "was measured with another configuration: levels" in fails(*other)
    run(*other, "--overwrite", "true")
    assert len(loaded) == 3 + 2


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("change", ["checkpoint", "unit", "spacing", "landmarks"])
def test_numbers_of_other_models_and_other_truths_are_not_mixed(
    standard: Path, adaptive: Path, tmp_path: Path, tools: Any, run: Any, fails: Any, change: str
) -> None:
    """Under the same names, of images of the same names."""
    words = ["--attacks", "[pgd1]", "--levels", "[0,1]", "--examples", 0, "--checks", 0, "--names", "[own]"]
    words += ["--out", "own"]
    root = tools.write_table(tmp_path / "data")
    run("evaluate", last(standard), *words, *table_of(root))
    options = {"unit": {"unit": "px"}, "spacing": {"spacing": 0.1}}.get(change, {})
    if change == "landmarks":
        path = root / "landmarks.csv"
        rows = tools.table(path)
        tools.write_csv(path, [{**r, "x": "1"} if r["image"].startswith("val") and r["x"] else r for r in rows])
    model = adaptive if change == "checkpoint" else standard
    message = fails("evaluate", last(model), *words, *table_of(root, **options))
    of_a_report = change == "unit"  # of which the finished batches know nothing
    what = "(it differs in metrics" if of_a_report else "was measured with another configuration: fingerprint"
    assert what in message
    assert "\n" not in message
    run("evaluate", last(model), *words, *table_of(root, **options), "--overwrite", "true")


def test_every_process_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    given = (None, "cuda", "cuda:0", "cpu")
    assert [str(cli._device(name)) for name in given] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]


@pytest.mark.slow
def alike(one: str, two: str) -> None:
    """The same text, its numbers equal to a relative 1e-4."""
    number = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])")
    assert number.sub("#", one) == number.sub("#", two)
    found, wanted = ([float(text) for text in number.findall(part)] for part in (one, two))
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_two_processes_measure_what_one_does(standard: Path, tmp_path: Path, run: Any) -> None:
    """Under torchrun, each with every second batch of one image; the attack is checked, too."""
    words = ["evaluate", last(standard), *data_of(standard, batch_size=1), "--attacks", "[pgd2,square5]", "--radii"]
    words += ["[3]", "--levels", "[0,0.7]", "--examples", 1, "--samples", 3, "--checks", 9, "--device", "cpu", "--out"]
    run(*words, tmp_path / "one")
    scripts = Path(sys.executable).parent
    command = [scripts / "torchrun", "--nproc-per-node", 2, "--no-python", scripts / "adv-landmark"]
    done = subprocess.run(
        [str(word) for word in [*command, *words, tmp_path / "two"]],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Report: ") == 1
    one, two = (tmp_path / name / "L2" for name in ("one", "two"))
    # Bit for bit only on some processors: two processes may choose other kernels, which differ in the seventh digit.
    for name in ("samples.csv", "results.csv"):
        alike((one / name).read_text(), (two / name).read_text())
    records = [json.loads((folder / "report.json").read_text()) for folder in (one, two)]
    for record in records:
        del record["created"]
        for effort in record["attacks"]["standard"].values():
            del effort["seconds"]
    alike(*(json.dumps(record) for record in records))
    assert records[0]["checks"]["standard"][-1]["verdict"] != "not measured"
    assert len(list((two / "standard" / "parts").iterdir())) == 3
    assert len(list((two / "standard").glob("checks_9_0.7/parts/*"))) == 3, "no more are checked than are evaluated"
