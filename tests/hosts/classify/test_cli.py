"""``adv-classify`` in this process: every command, and every mistake as one clear message."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from adv_classify import evaluate as host
from adv_classify.cli import main
from adv_classify.data import ImageFolder, MedMNIST
from adv_classify.module import RobustClassifier
from advmed.integrations.lightning.cli import run_name
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


def best(run: Path) -> Path:
    return run / "checkpoints" / "best.ckpt"


def data_of(run: Path, **changes: Any) -> list[str]:
    """The data section of a run's configuration, as a file."""
    content = {"data": yaml.safe_load((run / "config.yaml").read_text())["data"]}
    content["data"]["init_args"].update(changes)
    Path("data.yaml").write_text(yaml.safe_dump(content))
    return ["--config", "data.yaml"]


# Training


@pytest.mark.slow
def test_the_installed_command_trains(npz: Path, tmp_path: Path, tools: Any) -> None:
    command = Path(sys.executable).with_name("adv-classify")
    words = tools.arguments(npz, tmp_path / "a run", model__method__name="DPAAT")
    done = subprocess.run(
        [str(command), "fit", *words], capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    assert "24 images, each met about 1.0 times" in done.stderr
    assert len(tools.margins(tools.runs(tmp_path / "a run")[0])) == 24


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no such option": ({"model__method__epz": 1}, ["unrecognized arguments: --model.method.epz 1"]),
    "no such option of the data": ({"data__colour": 1}, ["adv_classify.data.MedMNIST", "'colour' is not accepted"]),
    "no number": ({"model__method__eps": "high"}, ['"model.method.eps"', "Got value: high"]),
    "no such method": ({"model__method__name": "FREE"}, ['"model.method.name"', "'DPAAT'", "Got value: FREE"]),
    "no such norm": ({"model__attack__norm": 1}, ["norm must be 2 or inf (L2 or Linf), got 1.0"]),
    "negative noise": ({"model__method__eps": -1}, ["eps must be a finite number >= 0, got -1.0"]),
    "no steps": ({"model__attack__steps": 0}, ["steps must be a whole number >= 1, got 0"]),
    "bounds": ({"model__attack__bounds": "[1,0]"}, ["bounds must be (lowest, highest) with lowest < highest"]),
    "sizes": (
        {"model__method__name": "DPAAT", "model__method__eps": 1, "model__method__eps_min": 2},
        ["need eps_min <= eps", "got eps_min 2"],
    ),
    "no such network": (
        {"model__network__name": "resnet81"},
        ["timm has no model 'resnet81'; near names are resnet18"],
    ),
    "no such weights": ({"model__network__weights": "none.pth"}, ["there is no file of weights none.pth"]),
    "no such file": ({"data__file": "none.npz"}, ["there is no file none.npz"]),
    "no such data": (
        {"data": "Images", "data__file": None, "data__batch_size": None, "data__workers": None},
        ["Images"],
    ),
    "batch size": ({"data__batch_size": 0}, ["batch_size must be >= 1, got 0"]),
    "flip": ({"data__flip": 2}, ["flip must be between 0 and 1, got 2.0"]),
    "size": ({"data__size": "[0,16]"}, ["size must be >= 1, got (0, 16)"]),
    "no such configuration": ({"config": "none.yaml"}, ["none.yaml"]),
    "no such device": ({"trainer__accelerator": "tpu"}, []),
    "image size of the network": (
        {"model__network__name": "test_vit3"},
        ["Input height (16) doesn't match model (160)"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_before_anything_is_trained(npz: Path, tools: Any, fails: Any, name: str) -> None:
    changes, parts = WRONG[name]
    message = fails("fit", *tools.arguments(npz, Path("runs"), **changes))
    for part in parts:
        assert part in message
    assert message.count("\n") <= 2
    if name != "image size of the network":
        assert not list(Path().rglob("*.ckpt"))
    assert not list(Path().rglob("metrics.csv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"method": {"epz": 1}}}, "model.method.epz"),
        ({"model": {"methods": {"eps": 1}}}, "model.methods"),
        ({"trainer": {"epochs": 3}}, "trainer.epochs"),
        ({"data": {"class_path": "MedMNIST", "init_args": {"path": "x"}}}, "'path'"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_unknown_keys_of_a_configuration(
    npz: Path, tools: Any, fails: Any, content: dict[str, Any], message: str
) -> None:
    Path("own.yaml").write_text(yaml.safe_dump(content))
    words = tools.arguments(npz, Path("runs"), **({"data": None} if "data" in content else {}))
    if "data" in content:
        words = [w for pair in zip(words[::2], words[1::2], strict=True) if "data" not in pair[0] for w in pair]
    assert message in fails("fit", "--config", "own.yaml", *words)
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize("words", [["train"], [], ["fit"], ["evaluate"], ["thresholds"]])
def test_commands_that_are_none(fails: Any, words: list[str]) -> None:
    message = fails(*words)
    assert message.count("\n") == 0
    assert any(part in message for part in ("invalid choice: 'train'", "required", "expected"))


def test_a_broken_image_is_named_whoever_reads_it(tmp_path: Path, tools: Any, fails: Any) -> None:
    root = tools.write_folders(tmp_path / "own")
    path = root / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:-300])
    for workers in (0, 1):
        words = tools.arguments(
            Path(), Path("runs"), data="ImageFolder", data__file=None, data__root=root, data__size=16,
            data__workers=workers,
        )  # fmt: skip
        message = fails("fit", *words)
        assert "bee/1.png cannot be read as an image" in message
        assert "\n" not in message


def test_a_traceback_for_those_who_look_for_it(npz: Path, tools: Any) -> None:
    with pytest.raises(ValueError, match="timm has no model"):
        main(["--debug", "fit", *tools.arguments(npz, Path("runs"), model__network__name="nothing")])


def test_what_is_nobodys_mistake_is_not_hidden(npz: Path, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(RobustClassifier, "configure_optimizers", bug)
    with pytest.raises(KeyError, match="a bug"):
        main(["fit", *tools.arguments(npz, Path("runs"))])


def test_folders_of_grey_images_train_as_well(tmp_path: Path, tools: Any) -> None:
    root = tools.write_folders(tmp_path / "own", each=4)
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").resize((20, 12)).save(path)
    (root / "train" / "bee" / "0.png").unlink()
    words = tools.arguments(
        Path(), Path("runs"), data="ImageFolder", data__file=None, data__root=root, data__size="[16,24]",
        model__method__name="AMAT", trainer__max_epochs=2, data__rotate=10, data__zoom=0.1, data__color=0.2,
    )  # fmt: skip
    assert main(["fit", *words]) == 0
    folder = tools.runs(Path("runs"))[-1]
    assert sorted(tools.margins(folder)) == sorted(ImageFolder(str(root), size=(16, 24)).train_ids)
    model = RobustClassifier.from_checkpoint(best(folder))
    assert model.hparams["channels"] == 1
    assert model(torch.rand(2, 1, 16, 24)).shape == (2, 3)


# Validation, test and prediction


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_checkpoint_is_validated_and_tested(
    adaptive: Path, npz: Path, tmp_path: Path, run: Any, tools: Any, split: str
) -> None:
    """With the network of the checkpoint, and the data as it is given."""
    command = {"val": "validate", "test": "test"}[split]
    data = ["--data", "MedMNIST", "--data.file", npz, "--data.workers", 0]
    run(command, *data, *QUICK, "--ckpt_path", best(adaptive), "--trainer.default_root_dir", tmp_path)
    found = tools.runs(tmp_path)[-1]
    model = RobustClassifier.from_checkpoint(best(adaptive))
    dataset = MedMNIST(str(npz), workers=0).dataset(split)
    right = [int(model(sample["image"][None]).argmax()) == sample["label"] for sample in dataset]
    assert tools.logged(found, f"{split}/accuracy") == pytest.approx([np.mean(right)])
    if split == "val":
        config = adaptive / "config.yaml"
        text = run(command, "--config", config, *QUICK, "--ckpt_path", best(adaptive))
        assert f"{np.mean(right):.6g}"[:6] in text


def test_predictions(adaptive: Path, npz: Path, tmp_path: Path, run: Any, tools: Any) -> None:
    data = ["--data", "MedMNIST", "--data.file", npz, "--data.workers", 0, "--data.classes", "[x,y,z]"]
    text = run("predict", *data, *QUICK, "--ckpt_path", best(adaptive), "--trainer.default_root_dir", tmp_path)
    path = tools.runs(tmp_path)[-1] / "predictions.csv"
    assert f"Predictions: {path}" in text
    rows = tools.table(path)
    assert list(rows[0]) == ["id", "prediction", "x", "y", "z"]
    model = RobustClassifier.from_checkpoint(best(adaptive))
    dataset = MedMNIST(str(npz), workers=0).dataset("test")
    assert [row["id"] for row in rows] == [sample["id"] for sample in dataset]
    for row, sample in zip(rows, dataset, strict=True):
        wanted = model(sample["image"][None]).softmax(1)[0]
        assert [float(row[name]) for name in "xyz"] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert row["prediction"] == "xyz"[int(wanted.argmax())]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_untrained_network_is_not_judged(npz: Path, fails: Any, command: str) -> None:
    message = fails(command, "--data", "MedMNIST", "--data.file", npz, "--data.workers", 0, *QUICK)
    assert message.endswith(f"{command} needs a trained network: name its checkpoint with --ckpt_path")
    assert not list(Path().rglob("predictions.csv"))


def test_data_of_other_classes_cannot_be_validated(adaptive: Path, tmp_path: Path, tools: Any, fails: Any) -> None:
    four = tools.write_npz(tmp_path / "four.npz", classes=4)
    words = ["--data", "MedMNIST", "--data.file", four, "--data.workers", 0, *QUICK, "--ckpt_path", best(adaptive)]
    message = fails("validate", *words)
    assert "for 3 classes and 3 channel(s), and cannot be loaded into" in message
    assert "\n" not in message


def test_a_checkpoint_is_validated_without_the_weights_it_began_with(
    standard: Path, npz: Path, tmp_path: Path, tools: Any, run: Any
) -> None:
    weights = tmp_path / "begin.ckpt"
    weights.write_bytes(best(standard).read_bytes())
    folder = tools.fit(npz, tmp_path / "own", model__network__weights=weights)
    weights.unlink()
    data = ["--data", "MedMNIST", "--data.file", npz, "--data.workers", 0]
    run("validate", *data, *QUICK, "--ckpt_path", best(folder))


# Thresholds


def test_thresholds_are_written_beside_the_checkpoint(standard: Path, npz: Path, run: Any) -> None:
    text = run("thresholds", best(standard))
    path = standard / "checkpoints" / "thresholds.json"
    assert f"Written to {path}" in text
    assert "24 clean images of the split train: ce < " in text
    found = Thresholds.load(path)
    model = RobustClassifier.from_checkpoint(best(standard))
    losses = []
    for sample in MedMNIST(str(npz), workers=0).dataset("train"):
        z = model(sample["image"][None])[0].detach().double().numpy()
        losses.append(np.log(np.exp(z - z[sample["label"]]).sum()))
    assert found.names == ("ce",)
    assert (found.n, found.rule, found.source) == (24, "mean", str(best(standard)))
    assert found.source_sha256 == hashlib.sha256(best(standard).read_bytes()).hexdigest()
    assert found.values == found.mean == pytest.approx((np.mean(losses),), rel=1e-4)
    assert found.std == pytest.approx((np.std(losses),), rel=1e-4)
    path.unlink()


def test_thresholds_as_told(standard: Path, npz: Path, tmp_path: Path, run: Any) -> None:
    text = run(
        "thresholds", best(standard), "--split", "val", "--rule", "mean+2std", "--out", "own.json", "--device", "cpu",
        "--data", "MedMNIST", "--data.file", npz, "--data.workers", 0,
    )  # fmt: skip
    assert "12 clean images of the split val" in text
    found = Thresholds.load("own.json")
    assert found.values == pytest.approx((found.mean[0] + 2 * found.std[0],))
    assert found.notes == {"split": "val"}
    run("thresholds", best(standard), *data_of(standard, workers=0), "--out", "other.json")
    assert Thresholds.load("other.json").n == 24
    with pytest.raises(FileNotFoundError):
        Thresholds.load(standard / "checkpoints" / "thresholds.json")


def test_thresholds_are_of_the_weighted_loss_of_a_weighted_training(tmp_path: Path, tools: Any, run: Any) -> None:
    labels = np.repeat([0, 1, 2], [16, 5, 3])
    path = tools.write_npz(tmp_path / "own.npz", train_images=tools.pictures(labels), train_labels=labels[:, None])
    folder = tools.fit(path, tmp_path / "own", model__class_weights="balanced", model__label_smoothing=0.1)
    run("thresholds", best(folder), "--out", "own.json")
    model = RobustClassifier.from_checkpoint(best(folder))
    losses = []
    for sample in MedMNIST(str(path), workers=0).dataset("train"):
        log_p = model(sample["image"][None]).log_softmax(1)[0, sample["label"]]
        losses.append(-float(log_p) * 24 / (3 * [16, 5, 3][sample["label"]]))
    assert Thresholds.load("own.json").mean == pytest.approx((np.mean(losses),), rel=1e-4)


@pytest.mark.parametrize("command", ["thresholds", "evaluate"])
def test_mistakes_of_our_own_commands(standard: Path, tmp_path: Path, tools: Any, fails: Any, command: str) -> None:
    checkpoint = best(standard)
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(checkpoint.read_bytes())
    assert "there is no checkpoint nowhere.ckpt" in fails(command, "nowhere.ckpt")
    assert "there is no configuration" in fails(command, moved)
    assert "name one with --config, or the data with --data" in fails(command, moved)
    assert "there is no configuration none.yaml" in fails(command, moved, "--config", "none.yaml")
    Path("empty.yaml").write_text("model: {}\n")
    assert fails(command, moved, "--config", "empty.yaml") == "empty.yaml has no data section"
    assert "there is no checkpoint" in fails(command, "none.ckpt", *data_of(standard))
    assert "the data has no split 'training'" in fails(command, checkpoint, "--split", "training")
    four = tools.write_npz(tmp_path / "four.npz", classes=4)
    message = fails(command, checkpoint, *data_of(standard, file=str(four)))
    assert fails(command, checkpoint, "--data.file", four) == message
    assert "predicts 3 classes" in message
    assert "the data has 4" in message
    other = tmp_path / "other.ckpt"
    torch.save({"epoch": 3}, other)
    assert fails(command, other, *data_of(standard)) == f"{other} is no checkpoint of adv-classify"
    assert "unrecognized arguments: --rules" in fails(command, checkpoint, "--rules", "mean")
    assert not list(Path().rglob("*.json"))
    assert not list(Path().rglob("*.html"))


def test_a_rule_that_is_none(standard: Path, fails: Any) -> None:
    assert "must be 'mean' or 'mean+<number>std'" in fails("thresholds", best(standard), "--rule", "median")


# Evaluation


@pytest.fixture(scope="module")
def report(standard: Path, adaptive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models in both norms."""
    folder = tmp_path_factory.mktemp("report") / "own"
    words = ["evaluate", best(standard), best(adaptive), "--attacks", "[pgd2,ifgsm2]", "--levels", "[0,0.3,0.9]"]
    options = ["--levels_inf", "[0,0.02]", "--examples", 2, "--checks", 5, "--out", folder, "--names", "[plain,own]"]
    assert main([str(word) for word in [*words, *options]]) == 0
    return folder


def test_a_report_of_two_models_in_both_norms(report: Path, adaptive: Path) -> None:
    for kind, levels in (("L2", ["0", "0.3", "0.9"]), ("Linf", ["0", "0.02"])):
        folder = report / kind
        page = (folder / "report.html").read_text()
        assert f"Robustness of plain, own in {kind}" in page
        assert "Grad-CAM agreement" in page
        assert "val, 12 images" in page
        assert {path.name for path in folder.iterdir()} >= {"plain", "own", "report.html"}
        with next(folder.glob("*samples*.csv")).open() as file:
            rows = list(csv.DictReader(file))
        assert {row["model"] for row in rows} == {"plain", "own"}
        assert {f"{float(row['level']):g}" for row in rows} == set(levels)
        assert {row["attack"] for row in rows} >= {"pgd2", "ifgsm2"}
        assert len({row["id"] for row in rows}) == 12


@pytest.mark.parametrize("kind", ["L2", "Linf"])
def test_the_report_says_whether_to_believe_it(report: Path, npz: Path, audit: Any, kind: str) -> None:
    data = MedMNIST(str(npz), workers=0)
    names = {s["id"]: f"{s['id']} ({data.class_names[s['label']]})" for s in data.dataset("val")}
    how = {"fails_at": 0.5, "checked": 5, "shown": 2, "label": names.get, "groups": str}
    record = audit(report / kind, "accuracy", **how)
    assert record["failures"]["criterion"] == "accuracy below 0.5"


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_of_some_images_as_told(standard: Path, run: Any, tools: Any) -> None:
    text = run(
        "evaluate", best(standard), "--attacks", "[pgd1]", "--norm", "[inf]", "--samples", 5, "--split", "test",
        "--gradcam", "false", "--levels_inf", "[0,0.1]", "--examples", 0, "--out", "own", "--device", "cpu",
        "--checks", 0,
    )  # fmt: skip
    assert "Whether the attacks are strong enough was not checked." in text
    assert not Path("own", "L2").exists()
    assert "Grad-CAM" not in text
    assert "AUC_robust" in text
    folder = Path("own", "Linf")
    rows = tools.table(next(folder.glob("*samples*.csv")))
    assert {row["id"] for row in rows} == {f"test/{i:06d}" for i in (0, 2, 4, 6, 8)}
    assert (folder / standard.parents[1].name).is_dir()  # named by the run's folder


@pytest.mark.usefixtures("undrawn")
def test_levels_are_as_large_in_every_value(standard: Path, run: Any) -> None:
    text = run(
        "evaluate", best(standard), "--attacks", "[ifgsm1]", "--samples", 3, "--gradcam", "false", "--out", "own",
        "--checks", 0,
    )  # fmt: skip
    for level in (2, 4, 8):
        assert f" {round(level / 255 * 768**0.5, 4):g} " in text
        assert f" {round(level / 255, 8):g} " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attacks", "[pgd]"], "unknown attack 'pgd'"),
        (["--attacks", "[deepfool]"], "unknown attack 'deepfool': expected pgd<steps>"),
        (["--attacks", "[pgd1,pgd1]"], "attack 'pgd1' is given twice"),
        (["--attacks", "[]"], "one or more attacks"),
        (["--norm", "[1]"], "norm must be 2 or inf, got 1"),
        (["--norm", "[L2]"], "norm must be 2 or inf, got 'L2'"),
        (["--levels", "[0.5,1]"], "must be finite, start at 0"),
        (["--levels", "[0,a]"], "levels"),
        (["--names", "[a,b]"], "1 checkpoints need 1 different names, got ['a', 'b']"),
        (["--attacks", "[autoattack]", "--levels", "[0,1]", "--norm", "[2]"], "autoattack needs 4 classes or more"),
        (["--attacks", "[pgd1,cw10]"], "unknown attack 'cw10': expected pgd<steps>"),
        (["--samples", "many"], "samples"),
        (["--samples", "0"], "samples must be a whole number >= 1, got 0"),
        (["--examples", "-1"], "examples must be a whole number >= 0, got -1"),
        (["--examples", "1.5"], "examples"),
        (["--checks", "-1"], "checks must be a whole number >= 0, got -1"),
        (["--checks", "some"], "checks"),
    ],
)
def test_mistakes_of_an_evaluation(standard: Path, fails: Any, words: list[str], message: str) -> None:
    assert message in fails("evaluate", best(standard), "--samples", 2, *words)
    assert not list(Path().rglob("*.html"))


def test_two_runs_of_one_name_need_names(standard: Path, fails: Any) -> None:
    message = fails("evaluate", best(standard), best(standard))
    assert "2 checkpoints need 2 different names" in message
    assert "--names" in message


@pytest.mark.usefixtures("undrawn")
def test_a_killed_evaluation_goes_on(standard: Path, run: Any, fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["evaluate", best(standard), "--attacks", "[pgd2]", "--norm", "[2]", "--checks", 0]
    words += ["--levels", "[0,0.4]", "--examples", 0]
    config = data_of(standard, batch_size=5, workers=0)
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
    assert [len(indices) for indices in loaded] == [5, 5, 5, 2]
    assert loaded[1] == loaded[2]
    assert resumed.replace("cut", "whole") == whole
    assert "was measured with another configuration" in fails(
        *words[:-4], "--levels", "[0,0.5]", *config, "--out", "cut"
    )
    run(*words[:-4], "--levels", "[0,0.5]", "--examples", 0, *config, "--out", "cut", "--overwrite", "true")
    assert len(loaded) == 4 + 3


@pytest.mark.usefixtures("undrawn")
def test_numbers_of_two_models_of_one_name_are_not_mixed(standard: Path, adaptive: Path, run: Any, fails: Any) -> None:
    words = [
        "--attacks",
        "[pgd1]",
        "--norm",
        "[2]",
        "--samples",
        2,
        "--examples",
        0,
        "--checks",
        0,
        "--names",
        "[own]",
        "--out",
        "own",
    ]
    run("evaluate", best(standard), *words)
    message = fails("evaluate", best(adaptive), *words)
    assert "was measured with another configuration: fingerprint" in message


def test_margins_of_a_training_are_in_the_report(report: Path) -> None:
    page = (report / "L2" / "report.html").read_text()
    assert "margin" in page.lower()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/dpaat/lightning_logs/version_0/checkpoints/best.ckpt", "dpaat"),
        ("/data/runs/dpaat/version_3/checkpoints/last.ckpt", "dpaat"),
        ("dpaat/best.ckpt", "dpaat"),
        ("best.ckpt", "best"),
        ("/best.ckpt", "best"),
    ],
)
def test_a_model_has_the_name_of_its_run(path: str, name: str) -> None:
    assert run_name(path) == name


def test_a_configuration_of_the_report_names_the_checkpoints(report: Path, standard: Path) -> None:
    parts = list((report / "L2" / "plain" / "parts").iterdir())
    assert len(parts) == 2  # 12 images in batches of 8
    configuration = json.loads(str(np.load(parts[0], allow_pickle=False)["configuration"]))
    assert configuration["levels"] == [0.0, 0.3, 0.9]
    assert json.loads(configuration["fingerprint"])["split"] == "val"
