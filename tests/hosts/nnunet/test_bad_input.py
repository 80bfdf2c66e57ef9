"""Mistakes of a user: each gives one message that says what is wrong and what to do, before anything is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adv_nnunet import cli, data, evaluate
from adv_nnunet.checkpoints import with_names
from adv_nnunet.cli import main
from adv_nnunet.trainer import STATE
from advmed import files
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
        ("AMAT", {"rule": "boundary"}, "^the rule 'boundary' is for classifiers"),
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


@pytest.mark.usefixtures("unremembered")
def test_nan_in_an_image(bench: Any) -> None:
    trainer = bench.make()
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
    # The attack of the one was lost as a whole: it says nothing of its margin.
    assert trainer.method.margins.get(batch["ids"]).tolist() == [2.0, 1.0, 2.0, 2.0]


def test_a_loss_that_is_never_finite_stops_the_training(bench: Any) -> None:
    trainer = bench.ready("SAT")
    with pytest.raises(FloatingPointError, match=r"not finite in any step of epoch 0.*lower 'initial_lr'"):
        trainer.on_train_epoch_end([{"loss": np.float32("nan")}, {"loss": np.float32("inf")}])


def test_a_loss_scale_that_has_fallen_to_nothing_stops_the_training(bench: Any) -> None:
    """Its scaler skips every step, and the losses are finite."""
    trainer = bench.ready("SAT")
    batch = bench.batches(trainer, 1)[0]
    batch["ids"] = ["a", "b", "c", "d"]
    outputs = [trainer.train_step(batch)]
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    trainer.grad_scaler.scale(torch.ones(()))
    trainer.on_train_epoch_end(outputs)
    assert "its loss scale has fallen to 0.5. Check the images, or lower 'initial_lr'" in bench.log(trainer)
    trainer.grad_scaler.update(2.0**-30)
    with pytest.raises(FloatingPointError, match=r"in every step: its loss scale has fallen to 9e-10"):
        trainer.on_train_epoch_end(outputs)


def relabelled(trainer: Any, changed: str, value: int) -> None:
    """Puts a value into the sixth slice of a case's segmentation."""
    for dataset in trainer.get_tr_and_val_datasets():
        load_case = dataset.load_case

        def load(case: str, load_case: Any = load_case) -> Any:
            image, segmentation, *rest = load_case(case)
            if case == changed:
                segmentation = segmentation[:].copy()
                segmentation[0, 5, 20, 20] = value
            return image, segmentation, *rest

        dataset.load_case = load


@pytest.fixture
def unremembered(world: Any) -> Iterator[Callable[[], list[Path]]]:
    """Nothing is known of the cases; returns what is remembered now. Afterwards it is forgotten again."""

    def found() -> list[Path]:
        return list(world.preprocessed.glob("*/advmed_checked_*"))

    for path in found():
        path.unlink()
    yield found
    for path in found():
        path.unlink()


@pytest.mark.usefixtures("unremembered")
@pytest.mark.parametrize("dataset", ["main", "regions", "ignore"])
def test_labels_that_are_not_declared(bench: Any, world: Any, dataset: str) -> None:
    """Label maps would fail deep inside, and regions would take them for background."""
    trainer = bench.make("SAT", dataset=dataset)
    relabelled(trainer, world.cases[3], 9)
    declared = r"0, 1, 2, ignore 3" if dataset == "ignore" else "0, 1, 2"
    with pytest.raises(ValueError, match=rf"{world.cases[3]} \(9\)\. Declared are {declared}\. Declare them"):
        trainer.on_train_start()


def cropped(image: Any, segmentation: Any, *rest: Any) -> Any:
    return image, segmentation[:][:, 1:], *rest


def unreadable(*given: Any) -> Any:
    raise RuntimeError("no such block")


@pytest.mark.usefixtures("unremembered")
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (cropped, r"have a segmentation of another shape than the image: {} \(\["),
        (unreadable, r"the preprocessed case {} cannot be read \(RuntimeError: no such block\)\. Preprocess it again"),
    ],
)
def test_a_case_that_is_damaged(bench: Any, world: Any, spoil: Callable[..., Any], told: str) -> None:
    trainer, case = bench.make("SAT"), world.cases[1]
    training, _ = trainer.get_tr_and_val_datasets()
    load_case = training.load_case
    training.load_case = lambda name: spoil(*load_case(name)) if name == case else load_case(name)
    with pytest.raises(ValueError, match=told.format(case)):
        trainer.on_train_start()


def test_a_split_without_cases_and_with_unknown_ones(bench: Any) -> None:
    for change, error, told in (
        ([], ValueError, "fold 0 has no case to validate on. Give it some in splits_final.json"),
        (["nobody"], FileNotFoundError, r"1 case\(s\) of splits_final\.json are not in .*nnUNetPlans_2d: nobody\."),
    ):
        trainer = bench.make("SAT")
        trainer.get_tr_and_val_datasets()[1].identifiers = change
        with pytest.raises(error, match=told):
            trainer.on_train_start()


def test_a_case_is_read_once(bench: Any, unremembered: Callable[[], list[Path]], monkeypatch: Any) -> None:
    """Until one of its files changes; by every training that has it. What cannot be written is read again."""

    def read_by(trainer: Any) -> list[str]:
        read = []
        for dataset in trainer.get_tr_and_val_datasets():
            load_case = dataset.load_case
            dataset.load_case = lambda case, load_case=load_case: (read.append(case), load_case(case))[1]
        trainer._check_data()
        return sorted(set(read))

    first = bench.make("SAT")
    cases = sorted({case for dataset in first.get_tr_and_val_datasets() for case in dataset.identifiers})
    assert read_by(first) == cases
    assert f"Data check: {len(cases)} of {len(cases)} case(s) are read" in bench.log(first)
    assert read_by(bench.make("AT", fold=1)) == []
    (memory,) = unremembered()
    folder = Path(first.preprocessed_dataset_folder)
    os.utime(folder / f"{cases[2]}_seg.b2nd", (1, 1))
    assert read_by(bench.make("SAT")) == [cases[2]]
    memory.write_text(memory.read_text()[:100])
    assert read_by(bench.make("SAT")) == cases
    # A share that is only read: each run remembers for itself.
    memory.unlink()
    write_whole = files.write_whole

    def refused(path: Path, content: str) -> None:
        if path == memory:
            raise PermissionError(13, "Permission denied")
        write_whole(path, content)

    monkeypatch.setattr(files, "write_whole", refused)
    assert [read_by(bench.make("SAT")) for _ in range(2)] == [cases, []]


def test_several_processes_share_the_cases(
    bench: Any, unremembered: Callable[[], list[Path]], monkeypatch: Any
) -> None:
    trainer = bench.make("SAT")
    shares = []

    def told(read: Any) -> list[Any]:
        shares.append(set(read))
        return [read]

    monkeypatch.setattr(data, "gathered", told)
    cases = {case for dataset in trainer.get_tr_and_val_datasets() for case in dataset.identifiers}
    for rank in range(2):
        monkeypatch.setattr(data, "place", lambda rank=rank: (rank, 2))
        with contextlib.suppress(KeyError):  # what the other one would have told
            trainer._check_data()
        for path in unremembered():
            path.unlink()
    assert shares[0] | shares[1] == cases
    assert not shares[0] & shares[1]


def test_a_case_under_two_names(bench: Any, unremembered: Callable[[], list[Path]]) -> None:
    """In training and validation, and with another segmentation; a fold of all cases has no copies."""
    trainer = bench.make("SAT")
    training, validation = datasets = type(trainer).get_tr_and_val_datasets(trainer)
    trainer.get_tr_and_val_datasets = lambda: datasets
    one, copy, apart = training.identifiers[0], validation.identifiers[0], training.identifiers[1]
    load_case = training.load_case

    def load(case: str) -> Any:
        image, segmentation, *rest = load_case(case if case not in (copy, apart) else one)
        return (image, 1 - np.minimum(segmentation[:], 1) if case == apart else segmentation, *rest)

    training.load_case = validation.load_case = load
    trainer._check_data()
    log = bench.log(trainer)
    assert f"WARNING: 1 image(s) are in two splits, such as {copy} of val, a copy of {one} of train" in log
    assert f"WARNING: 1 image(s) have two truths, such as {apart} of train, a copy of {one} of train" in log
    for path in unremembered():
        path.unlink()
    whole = bench.make("SAT", fold="all")
    whole._check_data()
    assert "copy" not in bench.log(whole)


@pytest.mark.parametrize("spoil", ["half", "bytes", "code", "other"])
def test_a_checkpoint_that_cannot_be_read(bench: Any, spoil: str) -> None:
    """And code in it is not run."""
    first = bench.train("SAT", epochs=1)
    path = Path(first.output_folder) / "checkpoint_final.pth"
    content = path.read_bytes()
    if spoil == "half":
        path.write_bytes(content[:5000])
    elif spoil == "bytes":  # PyTorch itself reads this without a word
        half = len(content) // 2
        path.write_bytes(content[:half] + bytes(64) + content[half + 64 :])
    else:
        torch.save({"network_weights": Path("x"), "y": os.system} if spoil == "code" else {"model": 1}, path)
    told = {
        "half": r"checkpoint_final\.pth cannot be read as a checkpoint .*: it is damaged, or was written in part only",
        "bytes": r"checkpoint_final\.pth cannot be read as a checkpoint \(.*are not those that were written\)",
        "code": r"checkpoint_final\.pth holds more than weights and plain values, which could run code",
        "other": r"checkpoint_final\.pth is not a checkpoint of nnU-Net: it holds no 'network_weights'",
    }[spoil]
    with pytest.raises(ValueError, match=told):
        bench.make("SAT", epochs=1, resume=first)
    with pytest.raises(ValueError, match=told):
        bench.started("SAT", epochs=1, start_from=str(path), tag="x")


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
        ([*STOCK, "-f", "zero"], "-f must be the number of a fold, from 0 on, or 'all', got 'zero'"),
        ([*STOCK, "-f", "-1"], "-f must be the number of a fold, from 0 on, or 'all', got '-1'"),
        (["evaluate", *SAME, "-o", __file__], "reports are written to a folder, and .*test_bad_input.py is a file"),
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


def test_evaluate_a_model_of_other_plans(mistake: Callable[..., str], stock: Path) -> None:
    message = mistake(*EVALUATE, "-p", "nnUNetPlans", "-m", stock)
    assert "the model 'nnUNetTrainer' has the plans tiny, not nnUNetPlans of -p. Leave -p out" in message


def test_evaluate_a_damaged_checkpoint(mistake: Callable[..., str], with_stock: Path) -> None:
    path = with_stock / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:5000])
    assert "checkpoint_final.pth cannot be read as a checkpoint" in mistake(*STOCK)


def test_evaluate_labels_that_are_not_declared(
    mistake: Callable[..., str], stock: Path, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regions would take them for background, and the numbers would be others."""
    case, validation_cases = world.cases[7], evaluate.validation_cases

    def relabel(image: Any, segmentation: Any) -> Any:
        segmentation[0, 5, 20, 20] = 255
        return image, segmentation

    def spoilt(*given: Any) -> dict[str, Any]:
        cases = validation_cases(*given)
        return cases | {case: lambda: relabel(*cases[case]())}

    monkeypatch.setattr(evaluate, "validation_cases", spoilt)
    message = mistake(*EVALUATE, "-m", stock)
    assert f"the segmentation of {case} holds the label(s) 255, which dataset.json does not declare" in message
    assert "declared are 0, 1, 2" in message


def test_evaluate_a_label_of_another_shape(mistake: Callable[..., str], stock: Path, world: Any) -> None:
    raw, (one, other) = world.raw / world.dataset("main"), world.cases[:2]
    for folder in ("images", "labels"):
        Path(folder).mkdir()
    shutil.copy(raw / "imagesTr" / f"{one}_0000.nii.gz", Path("images"))
    shutil.copy(raw / "labelsTr" / f"{other}.nii.gz", Path("labels") / f"{one}.nii.gz")
    message = mistake(*EVALUATE, "-m", stock, "-i", "images", "-l", "labels")
    assert re.search(rf"labels/{one}\.nii\.gz has another shape than its image, \(\d+, \d+, \d+\) for \(", message)


def test_evaluate_a_fold_that_validates_on_nothing(mistake: Callable[..., str], stock: Path, world: Any) -> None:
    path = world.preprocessed / world.dataset("main") / "splits_final.json"
    before = path.read_text()
    path.write_text(json.dumps([{"train": world.cases, "val": []}]))
    try:
        assert "fold 0 has no case to validate on; give raw files" in mistake(*EVALUATE, "-m", stock)
    finally:
        path.write_text(before)


@pytest.mark.parametrize("change", [{"patch_size": [64, 64]}, {"normalization_schemes": ["RescaleTo01Normalization"]}])
def test_evaluate_models_whose_noise_is_not_the_same(
    mistake: Callable[..., str], stock: Path, change: dict[str, Any]
) -> None:
    """One level would be compared that is another noise for each."""
    other = Path("nnUNetTrainer__other__2d")
    shutil.copytree(stock, other)
    plans = json.loads((other / "plans.json").read_text())
    plans["configurations"]["2d"] |= change
    (other / "plans.json").write_text(json.dumps(plans))
    message = mistake(*EVALUATE, "-m", f"a={stock}", f"b={other}")
    told = "see inputs of other sizes" if "patch_size" in change else "resample or normalise images in other ways"
    assert told in message
    assert "Evaluate them apart" in message


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
