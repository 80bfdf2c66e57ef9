"""Mistakes of a user: each gives one message that says what is wrong and what to do, before anything is lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adv_nnunet import cli, evaluate
from adv_nnunet.checkpoints import with_names
from adv_nnunet.cli import main
from adv_nnunet.trainer import STATE
from helpers.hosts import mistake_of, overflow

pytestmark = pytest.mark.slow

NO_STANDARD = r"(?s)no thresholds\.json and no finished .*nnUNetTrainer__tiny__2d.*stock"


@pytest.mark.parametrize("missing", ["nnUNet_preprocessed", "nnUNet_results"])
def test_no_variables_of_nnunet(bench: Any, world: Any, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delenv("nnUNet_raw")  # the host trains without it, too
    trainer = type(bench.make())
    monkeypatch.delenv(missing)
    with pytest.raises(RuntimeError, match=rf"{missing} are not set\. Set them to folders \(export NAME=FOLDER\)"):
        trainer({"dataset_name": world.dataset("main")}, "2d", 0, {}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("AMAT", {"setps": 3}, r"settings\.yaml: unknown setting 'setps', did you mean 'steps'\?"),
        ("AMAT", {"warmup_epochs": 2}, r"warmup_epochs \(2\) leaves no adversarial epoch of 2; lower it"),
        ("AMAT", {"warmup_epochs": 0}, NO_STANDARD),
        (
            "AMAT",
            {"configuration": "3d_fullres", "sample_id": "slice"},
            "slice is for 2d; 3d_fullres is 3D, use 'case'",
        ),
        ("AMAT", {"start_from": "standard"}, "'start_from: standard' found no checkpoint.*stock trainer first"),
        ("AMAT", {"start_from": "nowhere.pth"}, r"there is no nowhere\.pth\. Name a checkpoint file"),
        ("AMAT", {"thresholds": "mine.json"}, r"there is no thresholds file .*mine\.json"),
        ("AMAT", {"thresholds": ("box",)}, r"\['box'\].*\['ce\+dice'\]\. Make thresholds of this model's own"),
        ("AMAT", {"thresholds": ("ce", "dice")}, r"K = 2 loss terms \['ce', 'dice'\], the model's .* K = 1 terms"),
        ("DPAAT", {"eps_min": 3.0}, r"settings.yaml: perturbation sizes .* got eps_min 3, eps 2, eps_max 4$"),
        ("TRADES", {"backward": "sequential"}, "^TRADES compares the predictions of its two passes, .* 'together'$"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_the_first_epoch(
    bench: Any, kind: str, settings: dict[str, Any], message: str
) -> None:
    given = settings.get("thresholds")
    if isinstance(given, tuple):  # of terms of these names
        settings = {**settings, "thresholds": bench.thresholds(*(0.1 for _ in given), names=given)}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        bench.train(kind, **settings)
    assert not list(bench.results.rglob("*.pth"))
    assert not any("Epoch 0" in log.read_text() for log in bench.results.rglob("training_log*.txt"))
    assert "setps" not in settings or not any(bench.results.iterdir()), "an output folder was made"


def test_a_training_that_cannot_be_continued(bench: Any, with_stock: Path) -> None:
    given = {"thresholds": bench.thresholds(100.0)}
    first = bench.train("AMAT", **given)
    # Of other sample ids.
    again = bench.make("AMAT", resume=first, sample_id="case", **given)
    with pytest.raises(ValueError, match=r"splits_final\.json or sample_id\): restore them, or start a new training"):
        again.on_train_start()
    assert "settings changed since the checkpoint: sample_id slice -> case" in bench.log(again)
    # Of another method: the checkpoint was brought to the output folder by hand.
    with pytest.raises(ValueError, match="the saved state is of the method 'AMAT', this run trains 'SAT'"):
        bench.started("SAT", resume=first)
    # Of another data set.
    checkpoint, table = bench.saved(first), Path(first.output_folder) / "margins.csv"
    checkpoint[STATE] = with_names(checkpoint[STATE], table.parent, first.settings)
    margins = checkpoint[STATE]["method"]["margins"]
    del margins["ids_sha256"]
    margins["ids"][0] = "stranger:3"
    torch.save(checkpoint, Path(first.output_folder) / "checkpoint_final.pth")
    with pytest.raises(ValueError, match=r"1 of \d+ margins .* for example stranger:3\. .* start a new training"):
        bench.started("AMAT", resume=first, **given)
    # Of the stock trainer.
    with pytest.raises(ValueError, match=r"holds no margins or counters\. .* -pretrained_weights"):
        bench.make(resume=True).load_checkpoint(str(with_stock / "checkpoint_final.pth"))


def test_nan_in_an_image(bench: Any) -> None:
    trainer = bench.make()
    for path in Path(trainer.preprocessed_dataset_folder_base).glob("advmed_checked_*"):
        path.unlink()
    training, _ = trainer.get_tr_and_val_datasets()
    load_case, case = training.load_case, training.identifiers[1]
    training.load_case = lambda name: with_nan(*load_case(name)) if name == case else load_case(name)
    with pytest.raises(ValueError, match=rf"1 preprocessed case\(s\) hold NaN .*: {case}\. Mend the raw"):
        trainer.on_train_start()


def with_nan(image: Any, *rest: Any) -> tuple[Any, ...]:
    """A case, one value of whose sixth slice is spoilt. (Readers of NIfTI files turn NaN into 0.)"""
    spoilt = image[:].copy()
    spoilt[0, 5, 20, 20] = np.nan
    return spoilt, *rest


def test_a_case_without_foreground_is_named_once_and_trained_on(bench: Any, world: Any) -> None:
    """Fold "all" validates on what it trains on."""
    for fold in (0, "all"):
        trainer = bench.ready("SAT", dataset="empty_case", fold=fold)
        assert f"1 case(s) have no foreground: {world.cases[1]}." in bench.log(trainer)
        (batch,) = bench.batches(trainer, 1)
        assert np.isfinite(trainer.train_step(batch)["loss"])


def test_the_second_stage_of_a_cascade(bench: Any, world: Any) -> None:
    folder = world.preprocessed / world.dataset("main")
    plans = json.loads((folder / "tiny.json").read_text())
    configurations, second = plans["configurations"], "3d_cascade_fullres"
    configurations[second] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    configurations["3d_lowres"] = {**configurations["3d_fullres"], "next_stage": second}
    (folder / "cascade.json").write_text(json.dumps(plans))
    with pytest.raises(
        RuntimeError, match=r"does not train the second stage of a cascade.*both of its stages with the stock one"
    ):
        bench.make(configuration=second, plans="cascade")


def test_an_output_folder_with_a_training(bench: Any) -> None:
    trainer = bench.make()
    kept = Path(trainer.output_folder) / "checkpoint_best.pth"
    kept.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"holds checkpoint_best\.pth .* --c, move it away, .* 'overwrite: true'"):
        trainer.on_train_start()
    assert kept.read_bytes() == b"precious"
    bench.started(overwrite=True)


def test_a_gradient_that_is_not_finite_is_counted_and_harms_no_other_sample(bench: Any, world: Any) -> None:
    trainer = bench.ready(thresholds=bench.thresholds(1e9))
    batch = bench.batches(trainer, 1)[0]
    batch["ids"] = [f"{world.cases[0]}:{i}" for i in range(4)]
    overflow(bench.patch, 1)
    trainer.on_train_epoch_end([trainer.train_step(batch)])
    log = bench.log(trainer)
    assert "2 attack step(s) were skipped because a gradient was not finite" in log
    assert "set 'attack_precision: float32'" in log
    assert trainer.logger.get_value("adv_nonfinite", 0) == 2
    assert trainer.method.margins.get(batch["ids"]).tolist() == [2.0] * 4


def test_a_loss_that_is_never_finite_stops_the_training(bench: Any) -> None:
    trainer = bench.ready("SAT")
    with pytest.raises(FloatingPointError, match=r"not finite in any step of epoch 0.*lower 'initial_lr'"):
        trainer.on_train_epoch_end([{"loss": np.float32("nan")}, {"loss": np.float32("inf")}])


# The command

SAME = ["-d", "4", "-c", "2d", "-device", "cpu", "-p", "tiny"]
EVALUATE = ["evaluate", *SAME, "-o", "out"]
STOCK = [*EVALUATE, "-tr", "nnUNetTrainer"]


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must fail, and returns its one message."""
    monkeypatch.chdir(tmp_path)

    def run(*words: Any) -> str:
        message = mistake_of(main, capsys, *words)
        assert message.startswith(f"adv-nnunet {words[0]}: ")
        return message

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*EVALUATE, "-i", "somewhere"], "-i and -l belong together"),
        ([*EVALUATE, "-m", "a=b", "-tr", "nnUNetTrainer"], "-m and -tr both name the models"),
        (STOCK, "there is no .*nnUNetTrainer__tiny__2d. Expected a folder that nnUNetv2_train"),
        ([*EVALUATE, "-m", "a=x", "a=y"], "2 models need 2 different names"),
        ([*EVALUATE, "--samples", "0"], "samples must be a whole number >= 1, got 0"),
        (
            ["thresholds", *SAME],
            "there is no finished standard training.*nnUNetv2_train 4 2d 0 -p tiny, or name .* -tr",
        ),
        (["thresholds", *SAME, "-p", "other"], "other.json: run nnUNetv2_plan_and_preprocess -d 4 first"),
        (["thresholds", *SAME, "-d", "hippocampus"], "give an integer number .* or a correct dataset name"),
        (["thresholds", *SAME, "-device", "cuda"], "there is no CUDA device here; choose another with -device cpu"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(
    mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = mistake(*words)
    assert re.search(message, error, re.DOTALL), error
    assert not Path("out").exists()


@pytest.mark.usefixtures("with_stock")
def test_evaluate_what_cannot_be_found(
    mistake: Callable[..., str], world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, images, labels = world.raw / world.dataset("main"), Path("images"), Path("labels")
    files = [*STOCK, "-i", "images", "-l", "labels"]
    images.mkdir()
    assert "fold_1" in mistake(*STOCK, "-f", "1")
    assert "-chk names another checkpoint file" in mistake(*STOCK, "-chk", "checkpoint_middle.pth")
    assert "there is no folder labels" in mistake(*files)
    labels.mkdir()
    assert "holds no image that ends with _0000.nii.gz" in mistake(*files)
    (images / "one_0000.nii.gz").touch()
    assert "1 image(s) have no label file in labels: one" in mistake(*files)
    for channel in ("0000", "0001"):
        shutil.copy(raw / "imagesTr" / f"{world.cases[0]}_0000.nii.gz", images / f"one_{channel}.nii.gz")
    shutil.copy(raw / "labelsTr" / f"{world.cases[0]}.nii.gz", labels / "one.nii.gz")
    assert "one in images has 2 channel(s), the model 'STD' takes 1" in mistake(*files)
    (Path("empty") / raw.name).mkdir(parents=True)
    monkeypatch.setenv("nnUNet_preprocessed", "empty")
    message = mistake(*STOCK)
    assert "preprocess the data set with nnUNetv2_plan_and_preprocess, or give raw files with -i and -l" in message


@pytest.mark.slow
def test_evaluate_models_that_do_not_go_together(
    mistake: Callable[..., str], stock: Path, finished: Callable[..., Path]
) -> None:
    volume, regions = finished(configuration="3d_fullres"), finished("regions_ignore")
    message = mistake(*EVALUATE, "-m", f"flat={stock}", f"volume={volume}")
    assert "the model 'volume' is of the configuration 3d_fullres, not of -c 2d" in message
    message = mistake(*EVALUATE, "-m", f"flat={stock}", f"regions={regions}")
    assert "the model 'regions' was trained on Dataset" in message
    assert "not those of -d 4" in message
    message = mistake(*EVALUATE, "-m", f"flat={stock}", f"regions={regions}", "-i", "images", "-l", "labels")
    assert "regions and flat do not predict the same: other labels, or 2D against 3D" in message


def test_evaluate_an_image_with_nan(
    mistake: Callable[..., str], stock: Path, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, validation_cases = world.cases[7], evaluate.validation_cases

    def spoilt(*given: Any) -> dict[str, Any]:
        cases = validation_cases(*given)
        return cases | {case: lambda: with_nan(*cases[case]())}

    monkeypatch.setattr(evaluate, "validation_cases", spoilt)
    message = mistake(*EVALUATE, "-m", stock, "--attacks", "ifgsm1", "--levels", "0", "1")
    assert "images hold NaN or infinite values, check the preprocessing of" in message
    assert f"{case}:5" in message


def test_every_process_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli._device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli._device("cuda") == torch.device("cuda:1")
    assert cli._device("cpu") == torch.device("cpu")
