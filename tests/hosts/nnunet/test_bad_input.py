"""Mistakes of a user: each gives one message that says what is wrong and what to do, before anything is lost."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adv_nnunet import cli
from adv_nnunet.cli import main
from adv_nnunet.trainer import STATE
from advmed.thresholds import Thresholds


@pytest.mark.parametrize("missing", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_no_variables_of_nnunet(bench: Any, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    trainer = type(bench.make())
    monkeypatch.delenv(missing)
    with pytest.raises(RuntimeError, match=rf"{missing} are not set\. Set them to folders \(export NAME=FOLDER\)"):
        trainer({"dataset_name": bench.world.main}, "2d", 0, {}, torch.device("cpu"))


def test_a_wrong_setting_stops_before_an_output_folder_is_made(bench: Any) -> None:
    with pytest.raises(ValueError, match=r"settings\.yaml: unknown setting 'setps', did you mean 'steps'\?"):
        bench.make(setps=3)
    assert not any(bench.results.iterdir())


def test_a_warm_up_as_long_as_the_training(bench: Any) -> None:
    with pytest.raises(ValueError, match=r"warmup_epochs \(2\) leaves no adversarial epoch of 2; lower it"):
        bench.make(warmup_epochs=2).on_train_start()


SIZES = r"settings.yaml: perturbation sizes need eps_min <= eps <= eps_max, got eps_min {}, eps 2, eps_max {}$"
TOGETHER = r"^{} compares the predictions of its two passes, .* one after the other: use backward 'together'$"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("DPAAT", {"eps": 2.0, "eps_min": 3.0}, SIZES.format(3, 4)),
        ("DPAAT", {"eps": 2.0, "eps_max": 1.5}, SIZES.format(0, 1.5)),
        ("DPAAT", {"backward": "sequential"}, TOGETHER.format("DPAAT")),
        ("TRADES", {"backward": "sequential", "sync_weight": 0.0}, TOGETHER.format("TRADES")),
    ],
)
def test_settings_that_a_method_cannot_work_with(bench: Any, kind: str, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.make(kind, **settings).run_training()
    assert not list(bench.results.rglob("*.pth"))
    assert not any("Epoch 0" in log.read_text() for log in bench.results.rglob("training_log*.txt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Thresholds((0.1, 0.2), ("ce", "dice")), r"K = 2 loss terms \['ce', 'dice'\], the model's .* K = 1 terms"),
        (Thresholds((0.1,), ("box",)), r"\['box'\].*\['ce\+dice'\]\. Make thresholds of this model's own"),
        ("{}", r"is not a thresholds file of the format advmed\.thresholds/1"),
        (None, r"there is no thresholds file .*mine\.json"),
    ],
)
def test_thresholds_that_do_not_fit(bench: Any, tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "mine.json"
    if isinstance(content, Thresholds):
        content.save(path)
    elif content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        bench.make(thresholds=str(path)).on_train_start()


def test_no_thresholds_and_no_warm_up(bench: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)no thresholds\.json and no finished .*nnUNetTrainer__tiny__2d.*stock"):
        bench.make(warmup_epochs=0).on_train_start()


def test_start_from_a_training_that_is_not_there(bench: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"'start_from: standard' found no checkpoint.*stock trainer first"):
        bench.make(start_from="standard").on_train_start()
    with pytest.raises(FileNotFoundError, match=r"there is no nowhere\.pth\. Name a checkpoint file"):
        bench.make(start_from="nowhere.pth").on_train_start()


@pytest.mark.parametrize("kind", ["AMAT", "DPAAT"])
def test_margins_of_another_data_set(bench: Any, kind: str) -> None:
    trainer = bench.ready(kind, warmup_epochs=0, thresholds=_file(bench, 100.0))
    for batch in bench.batches(trainer, 2):
        trainer.train_step(batch)
    trainer.on_train_epoch_end([{"loss": np.float32(0)}])
    trainer.logger.local_logger.my_fantastic_logging["mean_fg_dice"].append(0.0)
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    checkpoint = torch.load(path, weights_only=False)
    ids = checkpoint[STATE]["method"]["margins"]["ids"]
    checkpoint[STATE]["method"]["margins"]["ids"] = ["stranger:3", *ids[1:]]
    torch.save(checkpoint, path)
    again = bench.make(kind, resume=True, warmup_epochs=0, thresholds=_file(bench, 100.0))
    again.load_checkpoint(str(path))
    with pytest.raises(ValueError, match=r"1 of \d+ margins .* for example stranger:3\. .* start a new training"):
        again.on_train_start()


@pytest.mark.parametrize("kind", ["AMAT", "DPAAT"])
def test_margins_of_other_sample_ids(bench: Any, kind: str) -> None:
    first = bench.make(kind, thresholds=_file(bench, 100.0))
    first.run_training()
    again = bench.make(kind, resume=True, thresholds=_file(bench, 100.0), sample_id="case")
    again.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    with pytest.raises(ValueError, match=r"splits_final\.json or sample_id\): restore them, or start a new training"):
        again.on_train_start()
    assert "settings changed since the checkpoint: sample_id slice -> case" in bench.log(again)


def test_continuing_a_training_of_another_method(bench: Any) -> None:
    """The user has changed the trainer, and with it the output folder; so the checkpoint was brought there by hand."""
    first = bench.make("SAT")
    first.run_training()
    again = bench.make("DPAAT", resume=True)
    again.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    with pytest.raises(ValueError, match="the saved state is of the method 'SAT', this run trains 'DPAAT'"):
        again.on_train_start()


def test_continuing_a_stock_training(bench: Any, with_stock: Path) -> None:
    trainer = bench.make(resume=True)
    with pytest.raises(ValueError, match=r"holds no margins or counters\. .* -pretrained_weights"):
        trainer.load_checkpoint(str(with_stock / "checkpoint_final.pth"))


def test_nan_in_an_image(bench: Any) -> None:
    bench.world.spoil(bench.world.dataset("nan"), bench.world.cases[1])
    trainer = bench.make(dataset="nan")
    with pytest.raises(
        ValueError, match=rf"1 preprocessed case\(s\) hold NaN .*: {bench.world.cases[1]}\. Mend the raw"
    ):
        trainer.on_train_start()


def test_a_case_without_foreground_is_named_and_trained_on(bench: Any) -> None:
    trainer = bench.ready(dataset="empty_case")
    assert f"1 case(s) have no foreground: {bench.world.cases[1]}." in bench.log(trainer)
    (batch,) = bench.batches(trainer, 1)
    assert np.isfinite(trainer.train_step(batch)["loss"])


def test_a_case_of_both_data_sets_is_named_once(bench: Any) -> None:
    """Fold "all" validates on what it trains on."""
    trainer = bench.ready("SAT", dataset="empty_case", fold="all")
    assert f"1 case(s) have no foreground: {bench.world.cases[1]}." in bench.log(trainer)


def test_the_second_stage_of_a_cascade(bench: Any) -> None:
    folder = bench.world.preprocessed / bench.world.main
    plans = json.loads((folder / "tiny.json").read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans["configurations"]["3d_lowres"] = {
        **plans["configurations"]["3d_fullres"],
        "next_stage": "3d_cascade_fullres",
    }
    (folder / "cascade.json").write_text(json.dumps(plans))
    with pytest.raises(RuntimeError, match=r"does not train the second stage of a cascade.*Train 3d_lowres"):
        bench.make(configuration="3d_cascade_fullres", plans="cascade")


def test_slices_in_3d(bench: Any) -> None:
    with pytest.raises(ValueError, match="sample_id: slice is for 2d; 3d_fullres is 3D, use 'case' or 'cell'"):
        bench.make(configuration="3d_fullres", sample_id="slice")


def test_an_output_folder_with_a_training(bench: Any) -> None:
    trainer = bench.make()
    kept = Path(trainer.output_folder) / "checkpoint_best.pth"
    kept.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"holds checkpoint_best\.pth .* --c, move it away, .* 'overwrite: true'"):
        trainer.on_train_start()
    assert kept.read_bytes() == b"precious"
    bench.make(overwrite=True).on_train_start()


def test_a_gradient_that_is_not_finite_is_counted_and_harms_no_other_sample(bench: Any) -> None:
    trainer = bench.ready(thresholds=_file(bench, 1e9), warmup_epochs=0)
    batch = bench.batches(trainer, 1)[0]
    batch["ids"] = [f"{bench.world.cases[0]}:{i}" for i in range(4)]

    def break_gradient(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[1] = torch.inf
        return gradient

    def break_first(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not next(module.parameters()).requires_grad:  # within an attack
            output.register_hook(break_gradient)
        return output

    first = next(m for m in trainer.network.modules() if isinstance(m, torch.nn.Conv2d))
    handle = first.register_forward_hook(break_first)
    loss = trainer.train_step(batch)
    handle.remove()
    trainer.on_train_epoch_end([loss])
    log = bench.log(trainer)
    assert "2 attack step(s) were skipped because a gradient was not finite" in log
    assert "set 'attack_precision: float32'" in log
    assert trainer.logger.get_value("adv_nonfinite", 0) == 2
    assert trainer.method.margins.get(batch["ids"]).tolist() == [2.0] * 4


def test_a_loss_that_is_never_finite_stops_the_training(bench: Any) -> None:
    trainer = bench.ready("SAT")
    with pytest.raises(FloatingPointError, match=r"not finite in any step of epoch 0.*lower 'initial_lr'"):
        trainer.on_train_epoch_end([{"loss": np.float32("nan")}, {"loss": np.float32("inf")}])


def _file(bench: Any, value: float) -> str:
    path = bench.folder / "thresholds.json"
    Thresholds((value,), ("ce+dice",)).save(path)
    return str(path)


# The command

EVALUATE = ["evaluate", "-d", "4", "-c", "2d", "-device", "cpu", "-p", "tiny", "-o", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "0", "4", "2"], "levels"),
        (["--levels", "1", "2"], "levels"),
        (["--levels", "0", "-1"], "levels"),
        (["--attacks", "fgsm"], "unknown attack 'fgsm': expected pgd<steps>"),
        (["-i", "somewhere"], "-i and -l belong together"),
        (["-m", "a=b", "-tr", "nnUNetTrainer"], "-m and -tr both name the models"),
        (["-tr", "nnUNetTrainer"], "there is no .*nnUNetTrainer__tiny__2d. Expected a folder that nnUNetv2_train"),
        (["-m", "a=x", "a=y"], "2 models need 2 different names"),
        (["--samples", "0"], "samples must be a whole number >= 1, got 0"),
        (["--examples", "-1"], "examples must be a whole number >= 0, got -1"),
        (["--checks", "-1"], "checks must be a whole number >= 0, got -1"),
    ],
)
def test_evaluate_with_a_mistake(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*EVALUATE, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("adv-nnunet evaluate: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_evaluate_what_cannot_be_found(
    with_stock: Path, bench: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    stock = [*EVALUATE, "-tr", "nnUNetTrainer"]
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    cases = [
        ([*stock, "-f", "1"], "fold_1"),
        ([*stock, "-chk", "checkpoint_middle.pth"], "-chk names another checkpoint file"),
        ([*stock, "-i", "images", "-l", "labels"], "there is no folder labels"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    labels.mkdir()
    assert main([*stock, "-i", "images", "-l", "labels"]) == 1
    assert "holds no image that ends with _0000.nii.gz" in capsys.readouterr().err
    (images / "one_0000.nii.gz").touch()
    assert main([*stock, "-i", "images", "-l", "labels"]) == 1
    assert "1 image(s) have no label file in labels: one" in capsys.readouterr().err
    (images / "one_0000.nii.gz").unlink()
    raw = bench.world.raw / bench.world.main
    for channel in ("0000", "0001"):
        shutil.copy(raw / "imagesTr" / f"{bench.world.cases[0]}_0000.nii.gz", images / f"one_{channel}.nii.gz")
    shutil.copy(raw / "labelsTr" / f"{bench.world.cases[0]}.nii.gz", labels / "one.nii.gz")
    assert main([*stock, "-i", "images", "-l", "labels"]) == 1
    assert "one in images has 2 channel(s), the model 'STD' takes 1" in capsys.readouterr().err


def test_evaluate_into_a_folder_of_another_evaluation(
    with_stock: Path, bench: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    quick = [*EVALUATE, "-tr", "nnUNetTrainer", "--attacks", "ifgsm1", "--samples", "2", "--examples", "0"]
    quick += ["--checks", "0"]
    assert main([*quick, "--levels", "0", "1"]) == 0
    before = (tmp_path / "out" / "report.json").read_bytes()
    assert main([*quick, "--levels", "0", "2"]) == 1
    assert "another configuration" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert main([*quick, "--levels", "0", "2", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["configuration"]["evaluation"]["levels"] == [0, 2]


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["thresholds", "-d", "4", "-c", "2d", "-p", "tiny"]
    assert main(arguments) == 1
    assert "there is no CUDA device here; choose another with -device cpu" in capsys.readouterr().err


def test_every_process_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli._device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli._device("cuda") == torch.device("cuda:1")
    assert cli._device("cpu") == torch.device("cpu")


def test_thresholds_without_a_standard_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["thresholds", "-d", "4", "-c", "2d", "-p", "tiny", "-device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "there is no finished standard training" in error
    assert "nnUNetv2_train 4 2d 0 -p tiny, or name its trainer with -tr" in error


def test_thresholds_of_a_data_set_that_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["thresholds", "-d", "4", "-c", "2d", "-p", "other", "-device", "cpu"]) == 1
    assert "other.json: run nnUNetv2_plan_and_preprocess -d 4 first" in capsys.readouterr().err


def test_a_data_set_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["thresholds", "-d", "hippocampus", "-c", "2d", "-p", "tiny", "-device", "cpu"]) == 1
    assert "give an integer number ('1', '2', etc) or a correct dataset name" in capsys.readouterr().err
